//! Entropy: can the guest execute what CPUID hides, and get an answer it could not compute?

use hindsight_guest_images::Ring;
use hindsight_guest_images::layout::DATA;
use hindsight_guest_images::micro::{self, Attempt, Outcome};

use super::finding::{Bench, Checked, Miss, Probe, Weight, fails};
use crate::kvm::probe::{Stop, exception_name};

/// TSC_AUX, and a value for it that no processor number looks like.
const TSC_AUX: u32 = 0xc000_0103;
const TSC_AUX_VALUE: u64 = 0x5eed;
/// KVM_HC_CLOCK_PAIRING (Linux, Documentation/virt/kvm/x86/hypercalls.rst).
const CLOCK_PAIRING: u32 = 9;

macro_rules! hidden {
    ($name:literal, $attempt:ident, $cost:literal) => {
        Probe {
            group: "entropy",
            name: $name,
            weight: Weight::Hole,
            cost: $cost,
            check: |bench| hidden(bench, Attempt::$attempt),
        }
    };
}

const X87_COST: &str = "x87's pointers to its last instruction and operand are lost when the host switches: programs that \
     read them (FNSTENV, FNSAVE) are not reproducible";

/// All probes of this group.
pub(super) const PROBES: &[Probe] = &[
    hidden!(
        "RDRAND, hidden, faults",
        Rdrand,
        "RDRAND cannot be hidden: programs that use it without asking CPUID are not reproducible"
    ),
    hidden!(
        "RDSEED, hidden, faults",
        Rdseed,
        "RDSEED cannot be hidden: programs that use it without asking CPUID are not reproducible"
    ),
    hidden!(
        "RDPMC tells nothing",
        Rdpmc,
        "RDPMC shows the host's performance counters"
    ),
    hidden!(
        "RDPID, hidden, tells nothing",
        Rdpid,
        "RDPID shows the number of the host's processor"
    ),
    hidden!(
        "RDPRU, hidden, faults",
        Rdpru,
        "RDPRU shows the host's clocks (APERF, MPERF)"
    ),
    hidden!(
        "MONITOR, hidden, tells nothing",
        Monitor,
        "MONITOR cannot be hidden: how long MWAIT waits is the host's doing"
    ),
    hidden!(
        "TPAUSE, hidden, faults",
        Tpause,
        "TPAUSE cannot be hidden: whether its deadline passed is the host's doing"
    ),
    hidden!(
        "XBEGIN, hidden, faults",
        Xbegin,
        "XBEGIN cannot be hidden: whether a transaction aborts is the host's doing"
    ),
    hidden!(
        "XGETBV, hidden, faults",
        Xgetbv,
        "XGETBV shows the host's extended state"
    ),
    hidden!(
        "XSAVE, hidden, faults",
        Xsave,
        "XSAVE cannot be hidden: what it writes depends on when the host switched the thread"
    ),
    hidden!(
        "AVX, hidden, faults",
        Avx,
        "AVX cannot be hidden: programs that use it without asking CPUID may lose its registers"
    ),
    hidden!(
        "CR4.OSXSAVE cannot be set",
        SetOsxsave,
        "CR4.OSXSAVE can be set: a kernel that does not ask CPUID opens XSAVE and AVX"
    ),
    Probe {
        group: "entropy",
        name: "x87's pointers outlive an exit",
        weight: Weight::Hole,
        cost: X87_COST,
        check: x87,
    },
    Probe {
        group: "entropy",
        name: "no hypercall tells the time",
        weight: Weight::Hole,
        cost: "a kernel that asks by hypercall (Linux does only where CPUID shows KVM) sees the host's clock",
        check: hypercall,
    },
];

/// What the gate tries in both rings, and what to say if it runs.
const HOLES: [(Attempt, &str); 8] = [
    (Attempt::Rdrand, "RDRAND"),
    (Attempt::Rdseed, "RDSEED"),
    (Attempt::Rdpmc, "RDPMC"),
    (
        Attempt::Rdpid,
        "RDPID (its answer is the host's processor number)",
    ),
    (Attempt::Rdpru, "RDPRU"),
    (Attempt::Tpause, "TPAUSE"),
    (Attempt::Xbegin, "XBEGIN"),
    (Attempt::Xsave, "XSAVE"),
];

/// Whether an attempt let something in.
fn is_hole(attempt: Attempt, outcome: Outcome) -> bool {
    match (attempt, outcome) {
        // It waits for nothing without MWAIT, and has no result.
        (Attempt::Monitor, Outcome::Ran(_)) => false,
        // MFENCE in its place; a counter that stands still, as the MSR filter keeps it.
        (Attempt::Tpause | Attempt::Rdpmc, Outcome::Ran(0)) => false,
        // The guest's own register.
        (Attempt::Rdpid, Outcome::Ran(value)) => value != TSC_AUX_VALUE,
        (_, Outcome::Ran(_)) => true,
        (_, Outcome::Faulted(_) | Outcome::Lost | Outcome::NotReached) => false,
    }
}

fn describe(attempt: Attempt, outcome: Outcome) -> String {
    match (attempt, outcome) {
        (Attempt::Rdpid, Outcome::Ran(TSC_AUX_VALUE)) => {
            "answers the guest's own TSC_AUX".to_string()
        }
        (Attempt::Tpause, Outcome::Ran(0)) => "runs as MFENCE".to_string(),
        (Attempt::Rdpmc, Outcome::Ran(0)) => "runs, the counter stands still at 0".to_string(),
        (
            Attempt::Monitor
            | Attempt::Xsave
            | Attempt::Avx
            | Attempt::SetOsxsave
            | Attempt::Tpause,
            Outcome::Ran(_),
        ) => "runs".to_string(),
        (_, Outcome::Ran(value)) => format!("runs, answers {value:#x}"),
        (_, Outcome::Faulted(vector)) => exception_name(vector),
        (_, Outcome::Lost) => "is not survived".to_string(),
        (_, Outcome::NotReached) => "was not reached".to_string(),
    }
}

/// Tries all of `list` in a ring; says too where the guest stopped.
fn attempt(bench: &mut Bench, ring: Ring, list: &[Attempt]) -> Result<(Vec<Outcome>, Stop), Miss> {
    let vm = bench.start(&micro::attempts(ring, list))?;
    vm.set_msr(TSC_AUX, TSC_AUX_VALUE);
    let stop = vm.run()?;
    Ok((micro::outcomes(&vm.bytes(DATA, 16 * list.len())), stop))
}

/// As [`attempt`], of a guest that came to its end.
fn attempt_all(bench: &mut Bench, ring: Ring, list: &[Attempt]) -> Result<Vec<Outcome>, Miss> {
    match attempt(bench, ring, list)? {
        (outcomes, Stop::Done) => Ok(outcomes),
        (_, stop) => Err(Miss::Unknown(stop.to_string())),
    }
}

fn hidden(bench: &mut Bench, what: Attempt) -> Checked {
    let (mut open, mut unknown) = (false, false);
    let mut found = Vec::new();
    for (name, ring) in [("ring 3", Ring::User), ("ring 0", Ring::Kernel)] {
        let (outcomes, stop) = attempt(bench, ring, &[what])?;
        open |= is_hole(what, outcomes[0]);
        found.push(if stop == Stop::Done {
            format!("{name}: {}", describe(what, outcomes[0]))
        } else {
            unknown = true;
            format!("{name}: {stop}")
        });
    }
    match found.join("; ") {
        detail if open => fails(detail),
        detail if unknown => Err(Miss::Unknown(detail)),
        detail => Ok(detail),
    }
}

/// What this host cannot keep from the guest, phrased for the recording's head.
pub(super) fn holes(bench: &mut Bench) -> Result<Vec<String>, Miss> {
    let list = HOLES.map(|(attempt, _)| attempt);
    let user = attempt_all(bench, Ring::User, &list)?;
    let kernel = attempt_all(bench, Ring::Kernel, &list)?;
    let mut holes = Vec::new();
    for (((attempt, name), user), kernel) in HOLES.iter().zip(user).zip(kernel) {
        let who = match (is_hole(*attempt, user), is_hole(*attempt, kernel)) {
            (true, true) => "programs and kernels",
            (true, false) => "programs",
            (false, true) => "kernels",
            (false, false) => continue,
        };
        holes.push(format!(
            "{name} cannot be made to fault here: {who} that use it without asking CPUID are not \
             reproducible"
        ));
    }
    if let Err(Miss::Fails(_)) = x87(bench) {
        holes.push(X87_COST.to_string());
    }
    Ok(holes)
}

/// AMD's CPUs without XSAVEERPTR (before Zen) save these pointers with the other registers only while an x87
/// exception is pending, and so do not keep them over an exit (AMD APM vol. 2, 11.4.4; Linux,
/// X86_BUG_FXSAVE_LEAK). Older ones of Intel lose the selectors among them.
fn x87(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::x87_pointers())?;
    for expected in [Stop::Mark, Stop::Done] {
        match vm.run()? {
            stop if stop == expected => {}
            // A KVM that emulates such guests need not know x87.
            stop => return Err(Miss::Unknown(stop.to_string())),
        }
    }
    let [before, after] =
        micro::X87_ENVIRONMENTS.map(|at| vm.bytes(at, micro::X87_ENVIRONMENT_BYTES));
    // Intel SDM vol. 1, figure 8-9: of seven words, the instruction's pointer and selector with its opcode,
    // the operand's pointer and selector.
    let words = |bytes: &[u8]| -> Vec<u32> {
        let words = bytes.as_chunks().0.iter();
        words
            .skip(3)
            .map(|word| u32::from_le_bytes(*word))
            .collect()
    };
    let (before, after) = (words(&before), words(&after));
    if before != after {
        return fails(format!("{before:x?} before an exit, {after:x?} after it"));
    }
    Ok(format!("{before:x?} before an exit and after it"))
}

fn hypercall(bench: &mut Bench) -> Checked {
    let guest = micro::hypercall(CLOCK_PAIRING, bench.is_amd());
    let vm = bench.start(&guest)?;
    match vm.run()? {
        Stop::Done => {}
        Stop::Fault(fault) => {
            return Ok(format!("a hypercall is {}", exception_name(fault.vector)));
        }
        stop => return Err(Miss::Unknown(stop.to_string())),
    }
    let [result] = vm.words(DATA);
    match result as i64 {
        0 => {
            let [seconds] = vm.words::<1>(DATA + 0x100);
            fails(format!(
                "KVM_HC_CLOCK_PAIRING answers the host's time, {seconds} s"
            ))
        }
        error => Ok(format!("KVM_HC_CLOCK_PAIRING is refused ({error})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_no_hole_and_an_answer_is_one_unless_it_is_the_guests_own() {
        assert!(!is_hole(Attempt::Rdrand, Outcome::Faulted(6)));
        assert!(is_hole(Attempt::Rdrand, Outcome::Ran(1)));
        assert!(!is_hole(Attempt::Rdpid, Outcome::Ran(TSC_AUX_VALUE)));
        assert!(is_hole(Attempt::Rdpid, Outcome::Ran(0)));
        assert!(!is_hole(Attempt::Monitor, Outcome::Ran(0)));
    }
}
