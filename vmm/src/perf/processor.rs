//! Which CPU the host has.

use std::fs::read_to_string;

/// The host's CPU, as Linux tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Processor {
    /// `GenuineIntel`.
    pub vendor: String,
    /// Family, extended family included.
    pub family: u32,
    /// Model, extended model included.
    pub model: u32,
    /// As it calls itself.
    pub name: String,
    /// Whether it tells that it is a virtual machine's.
    pub hypervisor: bool,
}

impl Processor {
    /// This host's first.
    pub(crate) fn of_host() -> Option<Processor> {
        Processor::parse(&read_to_string("/proc/cpuinfo").ok()?)
    }

    /// The first of `/proc/cpuinfo`.
    fn parse(cpuinfo: &str) -> Option<Processor> {
        let first = cpuinfo.split("\n\n").next()?;
        let field = |name: &str| {
            first.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_string())
            })
        };
        Some(Processor {
            vendor: field("vendor_id")?,
            family: field("cpu family")?.parse().ok()?,
            model: field("model")?.parse().ok()?,
            name: field("model name")?,
            hypervisor: field("flags")?.split(' ').any(|flag| flag == "hypervisor"),
        })
    }

    /// Whether it is AMD's Zen or a relative, whose event needs SpecLockMap off.
    pub(crate) fn is_zen(&self) -> bool {
        matches!(
            (self.vendor.as_str(), self.family),
            ("AuthenticAMD", 0x17 | 0x19 | 0x1a) | ("HygonGenuine", 0x18)
        )
    }

    /// Whether it is software: QEMU's TCG says so in its hypervisor leaf.
    pub(crate) fn is_emulated(&self) -> bool {
        let [_, b, c, d] = host_cpuid(0x4000_0000);
        self.hypervisor && [b, c, d].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
    }
}

/// EAX, EBX, ECX and EDX of the host's own CPUID.
pub(crate) fn host_cpuid(leaf: u32) -> [u32; 4] {
    let answer = std::arch::x86_64::__cpuid(leaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_is_read_with_its_family_and_model() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 158\n\
                    model name\t: Xeon\nflags\t\t: fpu vme hypervisor sse\n\nprocessor\t: 1\n\
                    vendor_id\t: Other\n";
        let expected = Processor {
            vendor: "GenuineIntel".to_string(),
            family: 6,
            model: 158,
            name: "Xeon".to_string(),
            hypervisor: true,
        };
        assert_eq!(Processor::parse(text), Some(expected));
        assert_eq!(Processor::parse("processor : 0\n"), None);
    }
}
