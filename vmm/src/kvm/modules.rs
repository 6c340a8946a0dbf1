//! Loadable modules: rewritten at the call with which the kernel makes them executable.
//!
//! That call is a trap (see [`crate::boot::modules`], which also says what is looked for in a module and why nothing undoes
//! it). At its exit the module's text is read and decoded; with the answer the sites in it become traps, and the call is
//! made for the guest: a return address pushed, and RIP set to where it leads.

use hindsight_replay::{Exit, LeftOpen};

use super::vcpu::KvmCpu;
use crate::boot::GuestRam;
use crate::boot::modules::ModuleText;
use crate::boot::traps::{self, SiteKind};

/// A module that is about to be made executable.
#[derive(Clone, Debug)]
pub struct LoadingModule {
    /// Address of the call that says so.
    call: u64,
    /// Where it leads.
    target: u64,
    /// Whether it pushes a return address.
    returns: bool,
    /// What is to be trapped.
    text: ModuleText,
}

impl KvmCpu {
    /// The guest is at a call that makes a module executable: what is to be trapped in it.
    pub(super) fn module_exit(&mut self) -> Option<Exit> {
        let (call, kind) = self.operands_here()?;
        let SiteKind::Module { target, returns } = kind else {
            return None;
        };
        // RDI is the first argument (System V ABI, AMD64 supplement, 3.2.3).
        let module = self.page().registers().0[5];
        let view = self.view();
        let layout = self.text.modules.as_ref()?;
        let text = layout.text(module, &|gva, buffer| view.read(gva, buffer));
        let sites = text.sites.len() as u32;
        self.loading = Some(LoadingModule {
            call,
            target,
            returns,
            text,
        });
        Some(Exit::Module { module, sites })
    }

    /// Rewrites the module, and makes the call.
    pub(super) fn finish_module(&mut self) {
        let Some(loading) = self.loading.take() else {
            return;
        };
        if loading.text.is_cut {
            self.noticed.add(LeftOpen::ModuleText);
        }
        self.noticed.look_soon();
        for site in &loading.text.sites {
            let (trap, length) = traps::rewrite(site.kind, site.length);
            let written = self.write_guest(site.address, &trap[..length]);
            assert!(written, "{:#x} was read and is not there", site.address);
        }
        // Whatever stood there before is gone: the kernel has given its place to this module.
        let LoadingModule { text, .. } = &loading;
        let operands = &mut self.text.operands;
        operands.retain(|address, _| !text.ranges.iter().any(|range| range.contains(address)));
        let with_operands = text.sites.iter().filter(|site| site.kind.has_operands());
        operands.extend(with_operands.map(|site| (site.address, site.kind)));
        self.make_call(&loading);
    }

    /// Does what the rewritten call or jump did.
    fn make_call(&mut self, loading: &LoadingModule) {
        let LoadingModule { call, target, .. } = *loading;
        if !loading.returns {
            self.page()
                .change_registers(|registers| registers.rip = target);
            return;
        }
        let rsp = self.page().registers().0[6].wrapping_sub(8);
        let returns_to = call.wrapping_add(traps::CALL_BYTES as u64);
        if self.write_guest(rsp, &returns_to.to_le_bytes()) {
            self.page().change_registers(|registers| {
                registers.rsp = rsp;
                registers.rip = target;
            });
        } else {
            // No stack to push to: give the call back, and let the CPU find that out.
            self.write_guest(call, &traps::call(call, target));
            self.page()
                .change_registers(|registers| registers.rip = call);
        }
    }

    /// Writes to guest-virtual memory, whether the guest may or not; `false` if it is not all mapped to RAM.
    fn write_guest(&mut self, gva: u64, bytes: &[u8]) -> bool {
        let Some(pieces) = self.view().pieces(gva, bytes.len()) else {
            return false;
        };
        let mut rest = bytes;
        pieces.into_iter().all(|(gpa, length)| {
            let (piece, behind) = rest.split_at(length);
            rest = behind;
            self.memory.write(gpa, piece).is_ok()
        })
    }
}
