//! What gdb talks to: a replay as its remote target.

mod arch;
mod server;
mod target;

pub(crate) use server::{Peer, serve};
