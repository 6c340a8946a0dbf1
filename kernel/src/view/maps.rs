//! What a program has mapped, as `/proc/PID/maps` has it.

use std::collections::BTreeSet;

use super::error::{Listing, ViewError};
use super::memory::{Left, Memory, text};
use super::paths::Paths;
use super::types::{Field, Lookup, Types};

/// More mappings than this are not shown; a program has no more unless its operator allows them (vm.max_map_count).
const MAPPINGS: usize = 1 << 16;
/// More bytes of their names are not kept.
const NAMES_BYTES: usize = 16 << 20;
/// The kernel's names for what it maps itself are no longer.
const NAME_BYTES: usize = 32;
const PAGE_BYTES: u64 = 4096;

/// VM_READ, VM_WRITE, VM_EXEC and VM_MAYSHARE of include/linux/mm.h, which are in no kernel's types.
const READ: u64 = 0x1;
const WRITE: u64 = 0x2;
const EXECUTE: u64 = 0x4;
const MAY_SHARE: u64 = 0x80;

/// A stretch of a program's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The address after its last one.
    pub end: u64,
    /// The flags of `vm_flags`.
    flags: u64,
    /// Where in its file it begins, in bytes.
    pub offset: u64,
    /// Its file's path, or what it is: `[heap]`, `[stack]`, or what the kernel calls it. Empty if it is memory and no more.
    pub name: String,
}

impl Mapping {
    /// What may be done with it, as in `/proc/PID/maps`: `r-xp`.
    pub fn permissions(&self) -> String {
        let either = |flag, yes, no| if self.flags & flag != 0 { yes } else { no };
        [
            either(READ, 'r', '-'),
            either(WRITE, 'w', '-'),
            either(EXECUTE, 'x', '-'),
            either(MAY_SHARE, 's', 'p'),
        ]
        .iter()
        .collect()
    }
}

/// Where mappings are, and what is in one (`struct vm_area_struct`).
#[derive(Clone, Debug)]
pub(super) struct Maps {
    areas: Areas,
    start: Field,
    end: Field,
    flags: Field,
    page: Field,
    file: Field,
    operations: Field,
    private: Field,
    heap: [Field; 2],
    stack: Field,
    special: Option<Special>,
}

/// What the kernel maps of its own accord.
#[derive(Clone, Copy, Debug)]
struct Special {
    /// The operations of such mappings: `special_mapping_vmops`.
    operations: u64,
    name: Field,
}

/// Where a `struct mm_struct` has its mappings.
#[derive(Clone, Debug)]
enum Areas {
    /// Before 6.1, in a list.
    List { first: Field, next: Field },
    /// In a maple tree.
    Tree(Tree),
}

#[derive(Clone, Debug)]
struct Tree {
    root: Field,
    leaf: Node,
    inner: [Node; 2],
}

/// A kind of node: it has slots, and between each and the next the last address that belongs to the one before.
#[derive(Clone, Copy, Debug)]
struct Node {
    kind: u64,
    pivots: Field,
    slots: Field,
}

impl Maps {
    pub(super) fn find(types: &Types<'_>, lookup: Lookup<'_>) -> Result<Maps, ViewError> {
        let field = |name| types.field(name);
        let special = lookup("special_mapping_vmops").and_then(|operations| {
            let name = field("vm_special_mapping.name").ok()?;
            Some(Special { operations, name })
        });
        Ok(Maps {
            areas: Areas::find(types)?,
            start: field("vm_area_struct.vm_start")?,
            end: field("vm_area_struct.vm_end")?,
            flags: field("vm_area_struct.vm_flags")?,
            page: field("vm_area_struct.vm_pgoff")?,
            file: field("vm_area_struct.vm_file")?,
            operations: field("vm_area_struct.vm_ops")?,
            private: field("vm_area_struct.vm_private_data")?,
            heap: [field("mm_struct.start_brk")?, field("mm_struct.brk")?],
            stack: field("mm_struct.start_stack")?,
            special,
        })
    }

    /// What is mapped in the `struct mm_struct` at `mm`, in ascending order.
    pub(super) fn of(
        &self,
        memory: &mut dyn Memory,
        mm: u64,
        paths: &Paths,
    ) -> Result<Listing<Mapping>, ViewError> {
        let [heap, heap_end] = self.heap;
        let heap = memory.field(mm, heap)?..memory.field(mm, heap_end)?;
        let stack = memory.field(mm, self.stack)?;
        let areas = self.areas.of(memory, mm)?;
        let mut found = Listing {
            items: Vec::new(),
            broken: areas.broken,
        };
        // Mappings of one file are side by side.
        let mut last = (0, String::new());
        let mut room = NAMES_BYTES;
        for area in areas.items.into_iter() {
            let mapping = self.mapping(memory, area, &mut last, paths, |mapping| {
                if mapping.start <= heap.end && mapping.end > heap.start {
                    "[heap]"
                } else if (mapping.start..mapping.end).contains(&stack) {
                    "[stack]"
                } else {
                    ""
                }
            });
            let mapping = mapping.and_then(|mapping| {
                let left = room.checked_sub(mapping.name.len());
                room = left.ok_or(ViewError::TooMany {
                    what: "bytes of file names",
                    limit: NAMES_BYTES,
                })?;
                Ok(mapping)
            });
            match mapping {
                Ok(mapping) => found.items.push(mapping),
                Err(error @ ViewError::TooMany { .. }) => {
                    found.note(error);
                    break;
                }
                Err(error) => found.note(error),
            }
        }
        Ok(found)
    }

    fn mapping(
        &self,
        memory: &mut dyn Memory,
        area: u64,
        last: &mut (u64, String),
        paths: &Paths,
        nameless: impl Fn(&Mapping) -> &'static str,
    ) -> Result<Mapping, ViewError> {
        let mut mapping = Mapping {
            start: memory.field(area, self.start)?,
            end: memory.field(area, self.end)?,
            flags: memory.field(area, self.flags)?,
            offset: 0,
            name: String::new(),
        };
        let file = memory.field(area, self.file)?;
        if file == 0 {
            let special = self.special_name(memory, area)?;
            mapping.name = special.unwrap_or_else(|| nameless(&mapping).into());
            return Ok(mapping);
        }
        mapping.offset = memory.field(area, self.page)?.wrapping_mul(PAGE_BYTES);
        if last.0 != file {
            // A path that cannot be read is no reason not to show the mapping.
            let path = paths.of_file(memory, file);
            *last = (file, path.unwrap_or_else(|error| format!("({error})")));
        }
        mapping.name.clone_from(&last.1);
        Ok(mapping)
    }

    fn special_name(
        &self,
        memory: &mut dyn Memory,
        area: u64,
    ) -> Result<Option<String>, ViewError> {
        let Some(special) = self.special else {
            return Ok(None);
        };
        if memory.field(area, self.operations)? != special.operations {
            return Ok(None);
        }
        let of = memory.field(area, self.private)?;
        let at = memory.field(of, special.name)?;
        let mut name = [0; NAME_BYTES];
        let read = memory.read(at, &mut name);
        Ok(Some(text(&name[..read])))
    }
}

impl Areas {
    fn find(types: &Types<'_>) -> Result<Areas, ViewError> {
        let field = |name| types.field(name);
        if let (Ok(first), Ok(next)) = (field("mm_struct.mmap"), field("vm_area_struct.vm_next")) {
            return Ok(Areas::List { first, next });
        }
        let node = |kind, pivots, slots| {
            Ok(Node {
                kind: types.constant("maple_type", kind)?.into(),
                pivots: field(pivots)?,
                slots: field(slots)?,
            })
        };
        let range = |kind| node(kind, "maple_range_64.pivot", "maple_range_64.slot");
        let gaps = node(
            "maple_arange_64",
            "maple_arange_64.pivot",
            "maple_arange_64.slot",
        );
        Ok(Areas::Tree(Tree {
            root: field("mm_struct.mm_mt.ma_root")?,
            leaf: range("maple_leaf_64")?,
            inner: [range("maple_range_64")?, gaps?],
        }))
    }

    /// The addresses of the mappings' structures.
    fn of(&self, memory: &mut dyn Memory, mm: u64) -> Result<Listing<u64>, ViewError> {
        match self {
            Areas::List { first, next } => {
                let first = memory.field(mm, *first)?;
                Ok(list(memory, first, *next))
            }
            Areas::Tree(tree) => {
                let root = memory.field(mm, tree.root)?;
                Ok(tree.entries(memory, root))
            }
        }
    }
}

fn list(memory: &mut dyn Memory, first: u64, next: Field) -> Listing<u64> {
    let (mut found, mut seen) = (Listing::default(), BTreeSet::new());
    let mut left = Left::new("mappings", MAPPINGS);
    let mut at = first;
    while at != 0 {
        let what = "mappings";
        let circle = ViewError::Circle { what, address: at };
        let following = (seen.insert(at).then_some(()).ok_or(circle))
            .and_then(|()| left.take())
            .and_then(|()| memory.field(at, next));
        match following {
            Ok(following) => {
                found.items.push(at);
                at = following;
            }
            Err(error) => {
                found.note(error);
                break;
            }
        }
    }
    found
}

impl Tree {
    /// What is in the leaves, in ascending order. (Documentation/core-api/maple_tree.rst; lib/maple_tree.c, "The
    /// Maple State" and `ma_data_end`.)
    fn entries(&self, memory: &mut dyn Memory, root: u64) -> Listing<u64> {
        let (mut found, mut seen) = (Listing::default(), BTreeSet::new());
        let mut left = Left::new("mappings", MAPPINGS);
        // A root that is a node has 2 in its lower bits. Else it is an entry for address 0, where nothing is mapped.
        let mut todo: Vec<(u64, u64)> = if root & 3 == 2 && root > PAGE_BYTES {
            vec![(root, u64::MAX)]
        } else {
            Vec::new()
        };
        while let Some((encoded, last)) = todo.pop() {
            // A node is at a multiple of 256; below that is its kind.
            let (at, kind) = (encoded & !0xff, encoded >> 3 & 0xf);
            if !seen.insert(at) {
                found.note(ViewError::Circle {
                    what: "mappings",
                    address: at,
                });
                continue;
            }
            let is_leaf = kind == self.leaf.kind;
            let mut inner = self.inner.iter();
            let node = match is_leaf {
                true => Some(self.leaf),
                false => inner.find(|node| node.kind == kind).copied(),
            };
            let Some(node) = node else {
                found.note(ViewError::Strange {
                    what: "kind of maple node",
                    value: kind,
                });
                continue;
            };
            let slots = match node.slots(memory, at, last) {
                Ok(slots) => slots,
                Err(error) => {
                    found.note(error);
                    continue;
                }
            };
            // Pointers have no lower bits; what has some is kept for the tree's own use.
            if is_leaf {
                let entries = slots.iter().map(|&(slot, _)| slot);
                for entry in entries.filter(|slot| *slot != 0 && slot & 3 == 0) {
                    if let Err(error) = left.take() {
                        found.note(error);
                        return found;
                    }
                    found.items.push(entry);
                }
            } else {
                if let Err(error) = left.take() {
                    found.note(error);
                    return found;
                }
                todo.extend(slots.into_iter().rev().filter(|(slot, _)| *slot != 0));
            }
        }
        found
    }
}

impl Node {
    /// The slots of the node at `at`, up to the one for the address `last`, each with its own last address.
    fn slots(
        self,
        memory: &mut dyn Memory,
        at: u64,
        last: u64,
    ) -> Result<Vec<(u64, u64)>, ViewError> {
        let words = |memory: &mut dyn Memory, field: Field| {
            // A node has 256 bytes.
            let mut bytes = [0; 256];
            let bytes = &mut bytes[..field.bytes.min(256) as usize];
            memory.fill(field.of(at), field.name, bytes)?;
            let (words, _) = bytes.as_chunks::<8>();
            Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
        };
        let pivots: Vec<u64> = words(memory, self.pivots)?;
        let slots: Vec<u64> = words(memory, self.slots)?;
        let mut found = Vec::with_capacity(slots.len());
        for (number, slot) in slots.into_iter().enumerate() {
            let pivot = match pivots.get(number) {
                Some(0) if number > 0 => last,
                Some(pivot) => (*pivot).min(last),
                None => last,
            };
            found.push((slot, pivot));
            if pivot == last {
                break;
            }
        }
        Ok(found)
    }
}
