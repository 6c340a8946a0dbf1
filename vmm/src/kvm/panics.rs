//! The guest's kernel panics: the call in which it says so is a trap (see [`crate::boot::panics`]).

use hindsight_replay::Exit;

use super::vcpu::KvmCpu;
use crate::boot::traps::SiteKind;

impl KvmCpu {
    /// The guest is at the call that says that it panics: where the reason is.
    pub(super) fn panic_exit(&mut self) -> Option<Exit> {
        let (_, SiteKind::Panic { .. }) = self.operands_here()? else {
            return None;
        };
        // RSI is the second argument (System V ABI, AMD64 supplement, 3.2.3).
        let message = self.page().registers().0[4];
        Some(Exit::Panic { message })
    }

    /// Makes the call.
    pub(super) fn finish_panic(&mut self) {
        if let Some((call, SiteKind::Panic { target })) = self.operands_here() {
            self.make_call(call, target, true);
        }
    }
}
