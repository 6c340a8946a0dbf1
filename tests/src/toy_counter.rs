//! A branch counter for the toy CPU: its calls come late, and it can be told to miscount.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use hindsight_replay::Counter;

use hindsight_replay::rng::Rng;

/// The counting part, which the CPU feeds.
#[derive(Clone, Debug)]
pub struct Pmu(Rc<RefCell<State>>);

#[derive(Debug)]
struct State {
    count: u64,
    armed: Option<u64>,
    /// So many branches from now the call arrives.
    late: Option<u64>,
    rng: Rng,
    skid: u64,
    miscounts_one_in: Option<u64>,
}

impl Pmu {
    /// A conditional branch has retired.
    pub fn retire(&self) {
        let mut state = self.0.borrow_mut();
        let wrong = state
            .miscounts_one_in
            .is_some_and(|share| state.rng.one_in(share));
        let counts = match wrong {
            false => 1,
            true if state.rng.one_in(2) => 0,
            true => 2,
        };
        state.count += counts;
        state.late = state.late.map(|late| late.saturating_sub(1));
        if state.armed.is_some_and(|at| at <= state.count) {
            state.armed = None;
            let skid = state.skid;
            state.late = Some(state.rng.below(skid + 1));
        }
    }

    /// Whether a call arrives now. It does so once.
    pub fn calls(&self) -> bool {
        self.0
            .borrow_mut()
            .late
            .take_if(|late| *late == 0)
            .is_some()
    }
}

/// The counter.
#[derive(Debug)]
pub struct ToyCounter {
    pmu: Pmu,
    margin: u64,
}

impl ToyCounter {
    /// A counter whose calls come up to `skid` branches late, on the host of `noise`, used with
    /// `margin`.
    pub fn new(noise: u64, skid: u64, margin: u64) -> ToyCounter {
        let state = State {
            count: 0,
            armed: None,
            late: None,
            rng: Rng::new(noise, 6),
            skid,
            miscounts_one_in: None,
        };
        ToyCounter {
            pmu: Pmu(Rc::new(RefCell::new(state))),
            margin,
        }
    }

    /// The same, but about one branch in `share` counts twice or not at all.
    pub fn miscounting(self, share: u64) -> ToyCounter {
        self.pmu.0.borrow_mut().miscounts_one_in = Some(share);
        self
    }

    /// The counting part.
    pub fn pmu(&self) -> Pmu {
        self.pmu.clone()
    }
}

impl Counter for ToyCounter {
    type Error = Infallible;

    fn read(&mut self) -> Result<u64, Infallible> {
        Ok(self.pmu.0.borrow().count)
    }

    fn arm(&mut self, at: Option<u64>) -> Result<(), Infallible> {
        let mut state = self.pmu.0.borrow_mut();
        state.armed = at;
        state.late = None;
        if at.is_some_and(|at| at <= state.count) {
            state.armed = None;
            state.late = Some(0);
        }
        Ok(())
    }

    fn margin(&self) -> u64 {
        self.margin
    }

    fn check(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}
