use proptest::prelude::*;

use super::*;
use crate::testing::{BtfBuilder, debian_kernels};

/// `struct inner { u32 a; char pad[4]; union { u64 b; }; }`, an array of three, an enumeration, and an outer structure.
fn some() -> Vec<u8> {
    let mut btf = BtfBuilder::default();
    let int = btf.int("unsigned int", 4);
    let long = btf.int("unsigned long", 8);
    let nameless = btf.structure("", 8, &[("b", long, 0)]);
    let inner = btf.structure("inner", 16, &[("a", int, 0), ("", nameless, 8)]);
    let alias = btf.derived(TYPEDEF, "inner_t", inner);
    let constant = btf.derived(CONST, "", alias);
    let array = btf.array(constant, int, 3);
    let pointer = btf.derived(PTR, "", constant);
    btf.enumeration("kinds", &[("FIRST", 0), ("SECOND", 7)]);
    btf.structure("outer", 64, &[("list", array, 8), ("to", pointer, 56)]);
    btf.build()
}

#[test]
fn members_are_found_through_names_arrays_pointers_and_nameless_structures() {
    let bytes = some();
    let btf = Btf::parse(&bytes).unwrap();
    let outer = btf.structure("outer").unwrap();
    let list = btf.member(outer, "list").unwrap();
    assert_eq!(list.offset, 8);
    let (element, count) = btf.elements(list.of).unwrap();
    assert_eq!((btf.bytes(element), count), (Some(16), 3));
    assert_eq!(btf.member(element, "a").unwrap().offset, 0);
    let b = btf.member(element, "b").unwrap();
    assert_eq!((b.offset, btf.bytes(b.of)), (8, Some(8)));
    let to = btf.member(outer, "to").unwrap();
    let pointee = btf.pointee(to.of).unwrap();
    assert_eq!(btf.member(pointee, "b").map(|b| b.offset), Some(8));
    assert_eq!(btf.constant("kinds", "SECOND"), Some(7));

    assert_eq!(btf.structure("inner_t"), None);
    assert_eq!(btf.structure("out"), None);
    assert_eq!(btf.member(outer, "a"), None);
    assert_eq!(btf.elements(to.of), None);
    assert_eq!(btf.pointee(list.of), None);
    assert_eq!(btf.constant("kinds", "THIRD"), None);
}

#[test]
fn types_that_lead_in_a_circle_lead_nowhere() {
    let mut btf = BtfBuilder::default();
    btf.derived(TYPEDEF, "round", 2);
    btf.derived(TYPEDEF, "and_round", 1);
    btf.structure("self", 8, &[("", 3, 0), ("x", 1, 0)]);
    let bytes = btf.build();
    let btf = Btf::parse(&bytes).unwrap();
    let own = btf.structure("self").unwrap();
    assert_eq!(btf.member(own, "y"), None);
    let x = btf.member(own, "x").unwrap();
    assert_eq!((btf.bytes(x.of), btf.elements(x.of)), (None, None));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        cut in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        whole in any::<bool>(),
    ) {
        let mut bytes = some();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if !whole {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Some(btf) = Btf::parse(&bytes) {
            for name in ["outer", "inner", ""] {
                let Some(of) = btf.structure(name) else { continue };
                for member in ["list", "to", "a", "b"].iter().filter_map(|name| btf.member(of, name)) {
                    btf.elements(member.of);
                    btf.pointee(member.of);
                    btf.bytes(member.of);
                }
            }
            btf.constant("kinds", "SECOND");
        }
    }
}

#[test]
fn debians_kernels_describe_struct_module_as_their_headers_do() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = crate::Elf::parse(&kernel.elf).unwrap();
        let btf = Btf::parse(elf.section(".BTF").unwrap()).unwrap();
        let module = btf.structure("module").unwrap();
        // include/linux/module.h: an enumeration, then two pointers.
        let [state, list, name] =
            ["state", "list", "name"].map(|name| btf.member(module, name).unwrap().offset);
        assert_eq!([state, list, name], [0, 8, 24], "{path}");
        assert_eq!(btf.bytes(module).unwrap() % 64, 0, "{path}");
        assert_eq!(btf.constant("module_state", "MODULE_STATE_COMING"), Some(1));
    }
}
