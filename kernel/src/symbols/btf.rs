//! Where a member lies in one of the kernel's own structures.
//!
//! Which members `struct module` has, and where, differs between kernels and their configurations. Distributions build
//! theirs with a description of all types inside (BTF, for eBPF programs that face the same question). This reads
//! as much of it as that takes, and as it takes to read structures in the memory of a running kernel: structures, arrays
//! and enumerations, by name. The format is that of Linux,
//! Documentation/bpf/btf.rst, "BTF Type and String Encoding".
//!
//! A reader of our own rather than a crate: those that exist turn every type of some hundred thousand into a value, and
//! do not promise to survive bytes that somebody has altered.

use super::kallsyms::Symbols;
use crate::image::Elf;

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// Name, info, and size or type.
const TYPE_BYTES: usize = 12;
/// Name, type and offset of a member.
const MEMBER_BYTES: usize = 12;
/// Chains of typedefs and qualifiers are followed this far; they could lead in a circle.
const CHAIN: usize = 32;
/// How many members are looked at to find one; nameless structures that hold each other may have any number.
const MEMBERS: usize = 1 << 16;

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// The types of a kernel.
#[derive(Clone, Debug)]
pub(crate) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins; the first has number 1.
    starts: Vec<u32>,
}

/// A type's number; 0 is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Type(u32);

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Offset in the structure, in bytes.
    pub offset: u32,
    /// What it is.
    pub of: Type,
}

/// A type's own words.
#[derive(Clone, Copy)]
struct Head<'a> {
    name: u32,
    kind: u32,
    count: usize,
    /// Members' offsets have a bit field's size above bit 23.
    has_bit_fields: bool,
    /// A structure's or enumeration's size in bytes, or the type that this one is derived from.
    size_or_type: u32,
    rest: &'a [u8],
}

impl<'a> Btf<'a> {
    /// The types of a kernel, out of its own image.
    pub(crate) fn of_kernel(elf: &Elf<'a>, symbols: &Symbols<'_>) -> Option<Btf<'a>> {
        let between = || {
            let start = symbols.lookup("__start_BTF")?;
            let bytes = symbols.lookup("__stop_BTF")?.checked_sub(start)?;
            elf.at(start, usize::try_from(bytes).ok()?)
        };
        Btf::parse(elf.section(".BTF").or_else(between)?)
    }

    /// Reads the table of types; `None` if the bytes are no whole one.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Btf<'a>> {
        let head = bytes.get(..24)?;
        let (magic, version) = (u16::from_le_bytes([head[0], head[1]]), head[2]);
        if magic != MAGIC || version != VERSION {
            return None;
        }
        let [head_bytes, type_at, type_bytes, string_at, string_bytes] =
            [4, 8, 12, 16, 20].map(|at| u32_at(head, at).unwrap_or(0) as usize);
        let body = bytes.get(head_bytes..)?;
        let types = body.get(type_at..type_at.checked_add(type_bytes)?)?;
        let strings = body.get(string_at..string_at.checked_add(string_bytes)?)?;
        let mut btf = Btf {
            types,
            strings,
            starts: Vec::new(),
        };
        let mut at = 0;
        while at < types.len() {
            btf.starts.push(u32::try_from(at).ok()?);
            let head = head_at(types, at)?;
            at += TYPE_BYTES + trailer_bytes(&head)?;
        }
        // The last one's trailer may not reach beyond the table.
        (at == types.len()).then_some(btf)
    }

    /// The first structure of this name.
    pub(crate) fn structure(&self, name: &str) -> Option<Type> {
        self.first(|head| head.kind == STRUCT && self.is_named(head.name, name))
    }

    /// A member of a structure or union, or of a nameless one in it.
    pub(crate) fn member(&self, of: Type, name: &str) -> Option<Member> {
        self.member_within(of, name, CHAIN, &mut { MEMBERS })
    }

    fn member_within(
        &self,
        of: Type,
        name: &str,
        depth: usize,
        patience: &mut usize,
    ) -> Option<Member> {
        let head = self.head(self.plain(of)?)?;
        if !matches!(head.kind, STRUCT | UNION) {
            return None;
        }
        let members = head.rest.get(..head.count * MEMBER_BYTES)?;
        members.chunks_exact(MEMBER_BYTES).find_map(|member| {
            *patience = patience.checked_sub(1)?;
            let of = Type(u32_at(member, 4)?);
            let bits = u32_at(member, 8)?;
            let bits = if head.has_bit_fields {
                (bits >> 24 == 0).then_some(bits)?
            } else {
                bits
            };
            let offset = bits.is_multiple_of(8).then_some(bits / 8)?;
            let own_name = u32_at(member, 0)?;
            if self.is_named(own_name, name) {
                return Some(Member { offset, of });
            }
            if !self.is_named(own_name, "") {
                return None;
            }
            let inner = self.member_within(of, name, depth.checked_sub(1)?, patience)?;
            Some(Member {
                offset: offset.checked_add(inner.offset)?,
                of: inner.of,
            })
        })
    }

    /// Offset and size, in bits, of a structure's own bit field.
    pub(crate) fn bit_field(&self, of: Type, name: &str) -> Option<(u32, u32)> {
        let head = self.head(self.plain(of)?)?;
        if !matches!(head.kind, STRUCT | UNION) || !head.has_bit_fields {
            return None;
        }
        let members = head.rest.get(..head.count * MEMBER_BYTES)?;
        let mut members = members.chunks_exact(MEMBER_BYTES);
        let bits = members.find_map(|member| {
            let is_it = self.is_named(u32_at(member, 0)?, name);
            is_it.then_some(u32_at(member, 8)?)
        })?;
        Some((bits & 0x00ff_ffff, bits >> 24)).filter(|(_, count)| *count > 0)
    }

    /// A member of a member and so on: `path` has dots between their names.
    pub(crate) fn path(&self, of: Type, path: &str) -> Option<Member> {
        let start = Member { offset: 0, of };
        path.split('.').try_fold(start, |outer, name| {
            let inner = self.member(outer.of, name)?;
            Some(Member {
                offset: outer.offset.checked_add(inner.offset)?,
                of: inner.of,
            })
        })
    }

    /// What an array is made of, and how many of them.
    pub(crate) fn elements(&self, of: Type) -> Option<(Type, u32)> {
        let head = self.head(self.plain(of)?)?;
        if head.kind != ARRAY {
            return None;
        }
        Some((Type(u32_at(head.rest, 0)?), u32_at(head.rest, 8)?))
    }

    /// What a pointer points to.
    pub(crate) fn pointee(&self, of: Type) -> Option<Type> {
        let head = self.head(self.plain(of)?)?;
        (head.kind == PTR).then_some(Type(head.size_or_type))
    }

    /// Size in bytes of a structure, an integer, a pointer or an array of such.
    pub(crate) fn bytes(&self, mut of: Type) -> Option<u32> {
        let mut times = 1_u32;
        for _ in 0..CHAIN {
            let head = self.head(self.plain(of)?)?;
            let each = match head.kind {
                PTR => 8,
                INT | STRUCT | UNION | ENUM => head.size_or_type,
                ARRAY => {
                    let (element, count) = self.elements(of)?;
                    (of, times) = (element, times.checked_mul(count)?);
                    continue;
                }
                _ => return None,
            };
            return times.checked_mul(each);
        }
        None
    }

    /// The value of a constant of an enumeration of this name.
    pub(crate) fn constant(&self, enumeration: &str, constant: &str) -> Option<u32> {
        let of = self.first(|head| head.kind == ENUM && self.is_named(head.name, enumeration))?;
        let head = self.head(of)?;
        let constants = head.rest.get(..head.count * 8)?.chunks_exact(8);
        constants.into_iter().find_map(|entry| {
            self.is_named(u32_at(entry, 0)?, constant)
                .then_some(u32_at(entry, 4)?)
        })
    }

    fn first(&self, wanted: impl Fn(&Head<'_>) -> bool) -> Option<Type> {
        (1..=self.starts.len() as u32)
            .map(Type)
            .find(|&of| self.head(of).is_some_and(|head| wanted(&head)))
    }

    /// The type behind typedefs and qualifiers.
    fn plain(&self, mut of: Type) -> Option<Type> {
        for _ in 0..CHAIN {
            let head = self.head(of)?;
            match head.kind {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => of = Type(head.size_or_type),
                _ => return Some(of),
            }
        }
        None
    }

    fn head(&self, of: Type) -> Option<Head<'a>> {
        let start = self.starts.get(of.0.checked_sub(1)? as usize)?;
        head_at(self.types, *start as usize)
    }

    fn is_named(&self, at: u32, name: &str) -> bool {
        let found = self.strings.get(at as usize..).unwrap_or(&[]);
        found.get(name.len()) == Some(&0) && found.starts_with(name.as_bytes())
    }
}

fn head_at(types: &[u8], at: usize) -> Option<Head<'_>> {
    let (head, rest) = types.get(at..)?.split_at_checked(TYPE_BYTES)?;
    let info = u32_at(head, 4)?;
    Some(Head {
        name: u32_at(head, 0)?,
        kind: info >> 24 & 0x1f,
        count: (info & 0xffff) as usize,
        has_bit_fields: info >> 31 != 0,
        size_or_type: u32_at(head, 8)?,
        rest,
    })
}

/// How much follows a type's head; `None` for a kind of a later format, whose size nobody knows.
fn trailer_bytes(head: &Head<'_>) -> Option<usize> {
    Some(match head.kind {
        INT | VAR | DECL_TAG => 4,
        ARRAY => 12,
        STRUCT | UNION | DATASEC | ENUM64 => 12 * head.count,
        ENUM | FUNC_PROTO => 8 * head.count,
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, tags.
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests;
