//! Loadable modules: rewritten at the call with which the kernel makes them executable.
//!
//! That call is a trap (see [`hindsight_kernel::rewrite::modules`], which also says what is looked for in a
//! module and why nothing undoes it). At its exit the module's text is read and decoded; with the answer the
//! sites in it become traps, and the call is made for the guest: a return address pushed, and RIP set to where
//! it leads.

use hindsight_replay::{Exit, LeftOpen};

use super::cpu::KvmCpu;
use super::error::KvmError;
use super::traps::Here;
use crate::boot::GuestRam;
use hindsight_kernel::rewrite::modules::ModuleText;
use hindsight_kernel::rewrite::traps;

/// A module that is about to be made executable.
#[derive(Clone, Debug)]
pub(super) struct LoadingModule {
    /// Address of the call that says so.
    call: u64,
    /// Where it leads.
    target: u64,
    /// Whether it pushes a return address.
    returns: bool,
    /// What is to be trapped.
    text: ModuleText,
    /// Guest-physical addresses of what is written, in the order of the sites: pieces of no more than a page.
    places: Vec<Vec<(u64, usize)>>,
}

impl KvmCpu {
    /// The guest is at a call that makes a module executable: what is to be trapped in it.
    pub(super) fn module_exit(&mut self, here: Here, target: u64, returns: bool) -> Exit {
        // RDI is the first argument (System V ABI, AMD64 supplement, 3.2.3).
        let module = self.page().registers().0[5];
        let (text, places) = self.module_text(module);
        let sites = text.sites.len() as u32;
        self.loading = Some(LoadingModule {
            call: here.address,
            target,
            returns,
            text,
            places,
        });
        Exit::Module { module, sites }
    }

    /// What is to be trapped in the module at `module`, and where that is. All of it is looked up before anything is
    /// written: what a guest calls a module's text may be anything, its page tables among it.
    fn module_text(&mut self, module: u64) -> (ModuleText, Vec<Vec<(u64, usize)>>) {
        let (Some(layout), Ok(view)) = (self.vm.text.modules.as_ref(), self.view()) else {
            return Default::default();
        };
        let text = layout.text(module, &|gva, buffer| view.read(gva, buffer));
        let places: Option<Vec<_>> = text
            .sites
            .iter()
            .map(|site| view.pieces(site.address, site.length))
            .collect();
        match places {
            Some(places) => (text, places),
            // It is not there twice.
            None => (
                ModuleText {
                    is_cut: true,
                    ..ModuleText::default()
                },
                Vec::new(),
            ),
        }
    }

    /// Rewrites the module, and makes the call.
    pub(super) fn finish_module(&mut self) -> Result<(), KvmError> {
        let Some(loading) = self.loading.take() else {
            return Ok(());
        };
        if loading.text.is_cut {
            self.vm.noticed.add(LeftOpen::ModuleText);
        }
        self.vm.noticed.look_soon();
        for (site, pieces) in loading.text.sites.iter().zip(&loading.places) {
            let (trap, length) = traps::rewrite(site.kind, site.length);
            self.write_pieces(pieces, &trap[..length]);
        }
        // Whatever was there before is gone: the kernel has given its place to this module.
        self.vm.text.sites.load_module(&loading.text);
        self.make_call(loading.call, loading.target, loading.returns)
    }

    /// Does what the rewritten call or jump did.
    pub(super) fn make_call(
        &mut self,
        call: u64,
        target: u64,
        returns: bool,
    ) -> Result<(), KvmError> {
        if !returns {
            self.page()
                .change_registers(|registers| registers.rip = target);
            return Ok(());
        }
        let rsp = self.page().registers().0[6].wrapping_sub(8);
        let returns_to = call.wrapping_add(traps::CALL_BYTES as u64);
        if self.write_guest(rsp, &returns_to.to_le_bytes())? {
            self.page().change_registers(|registers| {
                registers.rsp = rsp;
                registers.rip = target;
            });
        } else {
            // No stack to push to: give the call back, and let the CPU find that out.
            self.forget_trap();
            self.write_guest(call, &traps::call(call, target))?;
            self.page()
                .change_registers(|registers| registers.rip = call);
        }
        Ok(())
    }

    /// Writes to guest-virtual memory, whether the guest may or not; `false`, and nothing is written, if it is not
    /// all mapped to RAM.
    pub(super) fn write_guest(&mut self, gva: u64, bytes: &[u8]) -> Result<bool, KvmError> {
        let Some(pieces) = self.view()?.pieces(gva, bytes.len()) else {
            return Ok(false);
        };
        self.write_pieces(&pieces, bytes);
        Ok(true)
    }

    /// Writes to places that [`GuestView::pieces`](super::guest_text::GuestView::pieces) gave.
    fn write_pieces(&mut self, pieces: &[(u64, usize)], bytes: &[u8]) {
        let mut rest = bytes;
        for &(gpa, length) in pieces {
            let (piece, after) = rest.split_at(length);
            rest = after;
            self.vm
                .memory
                .write(gpa, piece)
                .expect("pieces are places in RAM");
        }
    }
}
