//! What a probe is, and what it finds.

use std::time::Duration;

use hindsight_guest_images::MicroGuest;
use hindsight_replay::CpuidTable;
use kvm_ioctls::Kvm;
use serde::Serialize;

use crate::kvm::KvmError;
use crate::kvm::probe::{Late, ProbeVm, Stop, Stuck, bounded, share};

/// How long a probe may take.
pub(super) const LIMIT: Duration = Duration::from_secs(2);

/// What a probe says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// It is as it should be.
    #[serde(rename = "holds")]
    Holds,
    /// It is not.
    #[serde(rename = "does not")]
    Fails,
    /// Something else is missing that would be needed to find out.
    #[serde(rename = "cannot tell")]
    Unknown,
}

impl Verdict {
    /// As it is printed.
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Holds => "holds",
            Verdict::Fails => "DOES NOT",
            Verdict::Unknown => "cannot tell",
        }
    }
}

/// What hangs on a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// No recording without it; and `record` asks too, before it starts.
    Gate,
    /// No recording without it.
    Needed,
    /// Something Hindsight can do only with it.
    Feature,
    /// A way for the host to reach the guest unnoticed.
    Hole,
    /// Good to know.
    Fact,
}

/// Why a probe does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss {
    /// It does not; this was found.
    Fails(String),
    /// It cannot be found out, for this reason.
    Unknown(String),
}

impl From<KvmError> for Miss {
    fn from(error: KvmError) -> Miss {
        Miss::Fails(error.to_string())
    }
}

/// What a check returns: a clause that says what was found.
pub(super) type Checked = Result<String, Miss>;

/// A [`Checked`] that does not hold.
pub(super) fn fails<T>(what: impl ToString) -> Result<T, Miss> {
    Err(Miss::Fails(what.to_string()))
}

/// One question to the host.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Where it stands in the output.
    pub group: &'static str,
    /// What is asked, as a claim.
    pub name: &'static str,
    /// What hangs on it.
    pub weight: Weight,
    /// What it costs if the claim does not hold.
    pub cost: &'static str,
    /// Finds out.
    pub check: fn(&mut Bench) -> Checked,
}

/// One line of the output.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Where it stands.
    pub group: &'static str,
    /// What was asked.
    pub probe: &'static str,
    /// The answer.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What it costs if it does not hold.
    pub cost: &'static str,
    /// What hangs on it.
    #[serde(skip)]
    pub weight: Weight,
}

impl Finding {
    /// The finding of `probe`, given what its check said.
    pub fn new(probe: &Probe, checked: Checked) -> Finding {
        let (verdict, detail) = match checked {
            Ok(detail) => (Verdict::Holds, detail),
            Err(Miss::Fails(detail)) => (Verdict::Fails, detail),
            Err(Miss::Unknown(detail)) => (Verdict::Unknown, detail),
        };
        let Probe {
            group,
            name,
            weight,
            cost,
            ..
        } = *probe;
        Finding {
            group,
            probe: name,
            verdict,
            detail,
            cost,
            weight,
        }
    }

    /// Whether it keeps this host from recording.
    pub fn stops(&self) -> bool {
        self.verdict == Verdict::Fails && matches!(self.weight, Weight::Gate | Weight::Needed)
    }
}

/// What checks work with: a VM, made when it is first wanted.
#[derive(Debug)]
pub struct Bench {
    kvm: Kvm,
    /// The CPUID table of Hindsight's guests, with a made-up leaf ([`BRAND_LEAF`]).
    pub table: CpuidTable,
    late: Late,
    vm: Option<ProbeVm>,
}

/// The leaf with the made-up values. It is the first part of the brand string: every CPU has it,
/// and no kernel decides anything by it.
pub(super) const BRAND_LEAF: u32 = 0x8000_0002;
/// The values: `HindsightDoctor!`.
pub(super) const BRAND: [u32; 4] = [0x646e_6948, 0x6867_6973, 0x636f_4474, 0x2172_6f74];

impl Bench {
    /// The `/dev/kvm` of the host.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Whether the guest's CPU is AMD's.
    pub fn is_amd(&self) -> bool {
        matches!(
            self.table.vendor().as_str(),
            "AuthenticAMD" | "HygonGenuine"
        )
    }

    /// The VM, with `guest` about to start.
    pub fn start(&mut self, guest: &MicroGuest) -> Result<&mut ProbeVm, Miss> {
        self.start_with(guest, 0)
    }

    /// The VM, with `guest` about to start and more bits of CR4.
    pub fn start_with(&mut self, guest: &MicroGuest, cr4: u64) -> Result<&mut ProbeVm, Miss> {
        let vm = match self.vm.take() {
            Some(vm) => vm,
            None => ProbeVm::new(&self.kvm, &self.table, self.late.clone())?,
        };
        let vm = self.vm.insert(vm);
        vm.load(guest, cr4)?;
        Ok(vm)
    }

    /// Runs `guest` to its end without an exit of its own, and returns the VM.
    pub fn run(&mut self, guest: &MicroGuest) -> Result<&mut ProbeVm, Miss> {
        let vm = self.start(guest)?;
        expect(vm, &Stop::Done)?;
        Ok(vm)
    }
}

/// Runs the guest, which must stop for this reason.
pub(super) fn expect(vm: &mut ProbeVm, expected: &Stop) -> Result<(), Miss> {
    match vm.run()? {
        stop if stop == *expected => Ok(()),
        stop => fails(stop),
    }
}

/// Does `work` with a bench of its own, in bounded time.
pub(super) fn on_a_bench<T: Send + 'static>(
    kvm: &Kvm,
    limit: Duration,
    work: impl FnOnce(&mut Bench) -> T + Send + 'static,
) -> Result<T, Miss> {
    let kvm =
        share(kvm).map_err(|error| Miss::Unknown(format!("cannot share /dev/kvm: {error}")))?;
    let mut table = crate::kvm::cpuid::without_deadline(&kvm)?;
    for entry in table
        .entries
        .iter_mut()
        .filter(|entry| entry.leaf == BRAND_LEAF)
    {
        entry.values = BRAND;
    }
    let work = move |late| {
        work(&mut Bench {
            kvm,
            table,
            late,
            vm: None,
        })
    };
    bounded(limit, work).map_err(|stuck| match stuck {
        Stuck::InKvm => {
            Miss::Fails("KVM did not come back, not even when it was signalled".to_string())
        }
        Stuck::Panicked => Miss::Unknown("the probe itself failed, see above".to_string()),
    })
}
