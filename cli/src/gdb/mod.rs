//! What gdb talks to: a replay as its remote target.

mod arch;
mod files;
mod memory;
mod monitor;
mod program;
mod progress;
mod server;
mod target;
mod writes;

pub(crate) use server::{Peer, serve};
pub(crate) use target::Guest;
