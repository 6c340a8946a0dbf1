//! What is on the other side of the door: a live world, or a recorded one.
//!
//! [`Live`] asks the world; [`Recorder`] writes down what another door answered; [`Replayer`] reads the
//! answers and refuses to go on where the machine differs. [`Nobody`] is outside of a machine that is off its recording.

mod chaos;
mod closed;
mod divergence;
mod live;
mod nobody;
mod recorder;
mod replayer;
mod world;

pub use chaos::{Chaos, Visits};
pub use closed::Closed;
pub use divergence::{Difference, Divergence, first_difference};
pub use live::{Live, Patience, TOLERANCE_NS};
pub use nobody::Nobody;
pub use recorder::{Recorder, WITNESS_EVERY};
pub use replayer::Replayer;
pub use world::World;
