//! The commands.

pub(crate) mod bench;
pub mod console;
pub(crate) mod debug;
pub mod diff;
pub(crate) mod disk;
pub(crate) mod doctor;
pub(crate) mod fork;
pub(crate) mod index;
pub mod inspect;
pub(crate) mod live;
pub mod pcap;
pub(crate) mod record;
pub(crate) mod replay;
pub(crate) mod run;
pub(crate) mod verify;
