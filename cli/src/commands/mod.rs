//! The commands.

pub mod bench;
pub mod console;
pub mod diff;
pub mod disk;
pub mod doctor;
pub mod inspect;
pub mod pcap;
pub mod record;
pub mod replay;
pub mod run;
