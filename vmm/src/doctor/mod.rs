//! What this host's KVM can do, found out with micro-guests.
//!
//! Every line of the output comes from a question put to this host now. Each question has a
//! virtual machine of its own and a time limit, so that a KVM that fails one, or hangs in it,
//! still answers the next. `record` asks the few without which a recording would be worthless.

mod calibration;
mod control;
mod counter;
mod cpu;
mod entropy;
mod exactness;
mod exits;
mod finding;
mod host;
mod report;
mod skid;
mod spec_lock_map;
mod speed;

use std::time::Duration;

use hindsight_guest_images::Ring;
use kvm_ioctls::Kvm;

use crate::kvm::KvmError;
use crate::perf::CounterEvent;
pub(crate) use calibration::{Effort, calibrate};
use finding::{Finding, LIMIT, Miss, Probe, Verdict, Weight, on_a_bench};
pub use report::Report;
use report::WAY_OUT;

/// What is asked of the doctor.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Count this raw event, instead of the one that is known for this CPU.
    pub event: Option<CounterEvent>,
    /// Say whether this margin, in branches, covers the skid of overflow signals.
    pub margin: Option<u64>,
}

/// All probes that need a guest, in the order of the output.
fn probes() -> impl Iterator<Item = &'static Probe> {
    [
        exits::PROBES,
        cpu::PROBES,
        control::PROBES,
        entropy::PROBES,
        speed::PROBES,
    ]
    .into_iter()
    .flatten()
}

/// Probes everything; `progress` is told what is being asked.
pub fn examine(wishes: &Wishes, progress: &mut dyn FnMut(&str)) -> Report {
    let mut findings = host::findings();
    let kvm = Kvm::new().map_err(KvmError::Open);
    findings.push(opening(&kvm));
    for probe in probes() {
        progress(&format!("asking: {}", probe.name));
        findings.push(match &kvm {
            Ok(kvm) => ask(kvm, probe),
            Err(_) => Finding::new(
                probe,
                Err(Miss::Unknown("there is no /dev/kvm to ask".to_string())),
            ),
        });
    }
    progress("calibrating the branch counter");
    findings.extend(counter::findings(kvm.as_ref().ok(), wishes));
    Report::new(findings)
}

/// Whether there is a `/dev/kvm` for us.
fn opening(kvm: &Result<Kvm, KvmError>) -> Finding {
    let (verdict, detail) = match kvm {
        Ok(kvm) => (
            Verdict::Holds,
            format!("API version {}", kvm.get_api_version()),
        ),
        Err(KvmError::Open(why)) => (Verdict::Fails, why.to_string()),
        Err(error) => (Verdict::Fails, error.to_string()),
    };
    let (group, probe, cost) = ("host", "/dev/kvm opens", "no guest can run");
    Finding {
        group,
        probe,
        verdict,
        detail,
        cost,
        weight: Weight::Needed,
    }
}

/// Puts one question.
fn ask(kvm: &Kvm, probe: &Probe) -> Finding {
    let checked = on_a_bench(kvm, LIMIT, probe.check).and_then(|checked| checked);
    Finding::new(probe, checked)
}

/// The few probes without which a recording would be worthless, all in one VM. Returns what the
/// host cannot keep from the guest, a phrase each, or why it cannot record and what to do.
pub fn check_recorder(kvm: &Kvm) -> Result<Vec<String>, String> {
    let limit = Duration::from_secs(5);
    let result = on_a_bench(kvm, limit, |bench| {
        for probe in probes().filter(|probe| probe.weight == Weight::Gate) {
            if let Err(Miss::Fails(detail)) = (probe.check)(bench) {
                return Err(format!(
                    "\"{}\" does not hold ({detail}): {}",
                    probe.name, probe.cost
                ));
            }
        }
        // Not to know the holes is no reason not to record, but one to say so.
        Ok(entropy::holes(bench).unwrap_or_else(|miss| {
            let (Miss::Fails(why) | Miss::Unknown(why)) = miss;
            vec![format!(
                "which instructions cannot be hidden here is unknown: {why}"
            )]
        }))
    });
    let refused = match result {
        Ok(Ok(holes)) => return Ok(holes),
        Ok(Err(refused)) => refused,
        Err(Miss::Fails(why) | Miss::Unknown(why)) => why,
    };
    Err(format!(
        "this host cannot record: {refused}. The way out: {WAY_OUT}. `hindsight doctor` tells more"
    ))
}

/// Whether a debugger can stop a guest of this host's KVM between two exits: whether breakpoints in debug registers work, in
/// ring 0 and in ring 3.
pub fn check_breakpoints(kvm: &Kvm) -> [bool; 2] {
    [Ring::Kernel, Ring::User].map(|ring| {
        let checked = on_a_bench(kvm, LIMIT, move |bench| control::breakpoint(bench, ring));
        matches!(checked, Ok(Ok(_)))
    })
}
