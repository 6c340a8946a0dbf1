//! Facts about the host that need no guest.

use std::fs::read_to_string;
use std::path::Path;

use super::finding::{Checked, Finding, Miss, Verdict, Weight, fails};
use crate::perf::Processor;
use crate::perf::host_cpuid;

const GROUP: &str = "host";
/// What a small machine and its recorder need.
const ENOUGH_KIB: u64 = 1 << 20;

/// All facts.
pub(super) fn findings() -> Vec<Finding> {
    let fact = |probe, cost, checked: Checked| {
        let (verdict, detail) = match checked {
            Ok(detail) => (Verdict::Holds, detail),
            Err(Miss::Fails(detail)) => (Verdict::Fails, detail),
            Err(Miss::Unknown(detail)) => (Verdict::Unknown, detail),
        };
        Finding {
            group: GROUP,
            probe,
            verdict,
            detail,
            cost,
            weight: Weight::Fact,
        }
    };
    let unread = |what: &str| Miss::Unknown(format!("{what} cannot be read"));
    let processor = Processor::of_host();
    let cpu = processor.as_ref().ok_or_else(|| unread("/proc/cpuinfo"));
    let bare = cpu.clone().and_then(|cpu| {
        if cpu.hypervisor {
            fails("this host is a virtual machine")
        } else {
            Ok("bare metal".to_string())
        }
    });
    let named = cpu.map(|cpu| {
        format!(
            "{}, {} family {} model {}",
            cpu.name, cpu.vendor, cpu.family, cpu.model
        )
    });
    vec![
        fact("CPU", "", named),
        fact(
            "kernel",
            "",
            read("/proc/sys/kernel/osrelease").ok_or_else(|| unread("its release")),
        ),
        fact(
            "KVM is stock (kvm_intel, kvm_amd)",
            "what holds elsewhere may not hold here",
            module(),
        ),
        fact(
            "no hypervisor below",
            "exits are nested: costlier, and with quirks of their own",
            bare,
        ),
        fact(
            "TSC is invariant",
            "the recorder's clock may run unevenly",
            invariant_tsc(),
        ),
        fact(
            "transparent hugepages",
            "guest memory takes more TLB misses",
            hugepages(),
        ),
        fact(
            "memory",
            "guests larger than that swap, or do not start",
            memory(),
        ),
    ]
}

fn read(path: &str) -> Option<String> {
    Some(read_to_string(path).ok()?.trim().to_string())
}

fn module() -> Checked {
    for name in ["kvm_intel", "kvm_amd"] {
        if Path::new("/sys/module").join(name).exists() {
            let nested = read(&format!("/sys/module/{name}/parameters/nested"));
            return Ok(format!(
                "{name}, nested={}",
                nested.as_deref().unwrap_or("?")
            ));
        }
    }
    let mut others: Vec<String> = std::fs::read_dir("/sys/module")
        .map_err(|error| Miss::Unknown(format!("/sys/module: {error}")))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    others.sort();
    match others.as_slice() {
        [] => fails("no KVM module is loaded"),
        names => fails(format!("instead there is {}", names.join(", "))),
    }
}

fn invariant_tsc() -> Checked {
    // Intel SDM vol. 3, 17.17.1; AMD APM vol. 3, E.4.7.
    let leaf = 0x8000_0007;
    if host_cpuid(0x8000_0000)[0] < leaf || host_cpuid(leaf)[3] & 1 << 8 == 0 {
        return fails("CPUID 0x80000007 EDX bit 8 is clear");
    }
    Ok("CPUID 0x80000007 EDX bit 8 is set".to_string())
}

fn hugepages() -> Checked {
    match read("/sys/kernel/mm/transparent_hugepage/enabled") {
        None => fails("the host's kernel has none"),
        Some(choice) if choice.contains("[never]") => fails(choice),
        Some(choice) => Ok(choice),
    }
}

fn memory() -> Checked {
    let text =
        read("/proc/meminfo").ok_or_else(|| Miss::Unknown("no /proc/meminfo".to_string()))?;
    let available = available_kib(&text)
        .ok_or_else(|| Miss::Unknown("/proc/meminfo does not say".to_string()))?;
    let detail = format!("{} MiB available", available / 1024);
    if available < ENOUGH_KIB {
        fails(detail)
    } else {
        Ok(detail)
    }
}

fn available_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_kib() {
        assert_eq!(
            available_kib("MemTotal: 9 kB\nMemAvailable:   123 kB\n"),
            Some(123)
        );
        assert_eq!(available_kib("MemTotal: 9 kB\n"), None);
    }
}
