//! What the tests share: a toy CPU, a seeded world, and the runs that bring them together.
#![forbid(unsafe_code)]

pub mod both_ways;
pub mod busy_world;
pub mod damage;
pub mod debian;
pub mod drive;
pub mod index_damage;
pub mod measure;
pub mod peak;
pub mod recorded;
pub mod requests;
pub mod seeds;
pub mod seeking;
pub mod session;
pub mod sim;
pub mod sim_world;
pub mod skip;
pub mod toy_counter;
pub mod toy_cpu;
pub mod toy_debug;
pub mod toy_disks;
pub mod toy_driver;
pub mod toy_memory;
pub mod toy_program;
pub mod toy_store;
pub mod whole;
