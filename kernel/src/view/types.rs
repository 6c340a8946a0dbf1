//! Where the members of the kernel's structures are.

use super::error::ViewError;
use crate::symbols::btf::{Btf, Member};

/// A member of one of the kernel's structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// The structure and the member, such as `task_struct.pid`.
    pub name: &'static str,
    /// From the beginning of the structure, in bytes.
    pub offset: u32,
    /// How many bytes it has.
    pub bytes: u32,
}

impl Field {
    /// Where it is in the structure at `base`.
    pub(super) fn of(self, base: u64) -> u64 {
        base.wrapping_add(self.offset.into())
    }

    /// The structure that has it at `address`.
    pub(super) fn container(self, address: u64) -> u64 {
        address.wrapping_sub(self.offset.into())
    }
}

/// A bit field of one of the kernel's structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bits {
    /// The structure and the member.
    pub name: &'static str,
    /// From the beginning of the structure, in bits.
    pub shift: u32,
    /// How many bits it has.
    pub count: u32,
}

/// Where the kernel's variables are, by their names.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<u64>;

/// The address of a variable that there must be.
pub(super) fn variable(lookup: Lookup<'_>, name: &str) -> Result<u64, ViewError> {
    lookup(name).ok_or_else(|| ViewError::Lacks { what: name.into() })
}

/// The types of a kernel.
#[derive(Debug)]
pub(super) struct Types<'a>(pub Btf<'a>);

impl Types<'_> {
    /// A member, by the name of the structure and the names that lead to it, with dots between.
    pub(super) fn field(&self, name: &'static str) -> Result<Field, ViewError> {
        self.either(&[name])
    }

    /// The first of these that there is.
    pub(super) fn either(&self, names: &[&'static str]) -> Result<Field, ViewError> {
        let lacks = || ViewError::Lacks {
            what: names.join(" or "),
        };
        let found = names.iter().find_map(|name| {
            let member = self.member(name)?;
            Some(Field {
                name,
                offset: member.offset,
                bytes: self.0.bytes(member.of)?,
            })
        });
        found.ok_or_else(lacks)
    }

    /// The size of a structure, in bytes.
    pub(super) fn bytes(&self, structure: &str) -> Result<u32, ViewError> {
        let found = self.0.structure(structure);
        let bytes = found.and_then(|of| self.0.bytes(of));
        bytes.ok_or_else(|| ViewError::Lacks {
            what: structure.into(),
        })
    }

    /// A constant of an enumeration.
    pub(super) fn constant(&self, enumeration: &str, name: &str) -> Result<u32, ViewError> {
        let found = self.0.constant(enumeration, name);
        found.ok_or_else(|| ViewError::Lacks { what: name.into() })
    }

    /// A bit field, by the names of its structure and itself.
    pub(super) fn bits(&self, name: &'static str) -> Result<Bits, ViewError> {
        let found = name.split_once('.').and_then(|(structure, member)| {
            let of = self.0.structure(structure)?;
            let (shift, count) = self.0.bit_field(of, member)?;
            Some(Bits { name, shift, count })
        });
        found.ok_or_else(|| ViewError::Lacks { what: name.into() })
    }

    fn member(&self, name: &str) -> Option<Member> {
        let (structure, path) = name.split_once('.')?;
        self.0.path(self.0.structure(structure)?, path)
    }
}
