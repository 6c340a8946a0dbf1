use hindsight_devices::{DiskSpec, NetSpec};

use super::super::limits::HEADER_MAX;
use super::*;

/// A head with something in every field.
fn full() -> Header {
    let content = |bytes| Content {
        bytes,
        blake3: [9; 32],
    };
    let entry = |leaf, subleaf| CpuidEntry {
        leaf,
        subleaf,
        values: [1, 2, 3, 4],
    };
    let disk = |bytes| DiskSpec {
        bytes,
        read_only: false,
        serial: "0123456789abcdefghij".into(),
    };
    let image = |bytes| Image {
        bytes,
        sample: [1; 32],
    };
    let mut header = Header::smallest();
    let machine = &mut header.machine;
    machine.memory_bytes = 256 << 20;
    machine.cmdline = "console=ttyS0".into();
    machine.kernel = content(8 << 20);
    machine.kernel_version = "6.1.0".into();
    machine.initrd = Some(content(256 << 20));
    machine.cpuid.entries = vec![entry(0, None), entry(4, Some(0)), entry(4, Some(1))];
    machine.ns_per_exit = 60_000;
    machine.quick_reads = Some(QuickReads::new(7, 8, 60_000));
    machine.devices = Devices {
        console: true,
        entropy: true,
        net: Some(NetSpec::default()),
        disks: vec![disk(512), disk(DISK_BYTES_MAX)],
    };
    machine.images = vec![image(512), image(DISK_BYTES_MAX)];
    header.host.holes = vec!["RDRAND".into()];
    header
}

#[test]
fn a_head_that_a_recorder_writes_is_taken_up_to_its_bounds() {
    assert_eq!(Header::smallest().check(), Ok(()));
    assert_eq!(full().check(), Ok(()));
    let mut largest = full();
    largest.machine.memory_bytes = MEMORY_BYTES_MAX;
    largest.machine.kernel.bytes = KERNEL_BYTES_MAX;
    largest.machine.ns_per_exit = EXIT_NS_MAX;
    largest.machine.cmdline = "x".repeat(CMDLINE_BYTES_MAX);
    largest.host.holes = vec!["x".repeat(512); HOLES_MAX];
    largest.machine.cpuid.entries = (0..CPUID_ENTRIES_MAX as u32)
        .map(|leaf| CpuidEntry {
            leaf,
            subleaf: None,
            values: [u32::MAX; 4],
        })
        .collect();
    assert_eq!(largest.check(), Ok(()));
    let body = postcard::to_stdvec(&largest).unwrap();
    assert!(body.len() <= HEADER_MAX, "{}", body.len());
}

/// Changes a head in one place.
type Change = fn(&mut Header);

#[test]
fn a_head_that_contradicts_itself_or_asks_for_too_much_is_refused_by_name() {
    let changes: &[(&str, Change)] = &[
        ("RAM", |h| h.machine.memory_bytes = 0),
        ("RAM", |h| h.machine.memory_bytes = 4095),
        ("RAM", |h| h.machine.memory_bytes = MEMORY_BYTES_MAX + 4096),
        ("RAM", |h| h.machine.memory_bytes = u64::MAX - 4095),
        ("vCPUs: 0,", |h| h.machine.vcpus = 0),
        ("vCPUs: 2,", |h| h.machine.vcpus = 2),
        ("vCPUs: 255,", |h| h.machine.vcpus = 255),
        ("command line", |h| h.machine.cmdline = "x".repeat(4097)),
        ("command line", |h| h.machine.cmdline = "a\0b".into()),
        ("kernel's version", |h| {
            h.machine.kernel_version = "x".repeat(1025);
        }),
        ("kernel's file", |h| h.machine.kernel.bytes = u64::MAX),
        ("initrd", |h| h.machine.memory_bytes = 128 << 20),
        ("an exit", |h| h.machine.ns_per_exit = u64::MAX),
        ("time reads", |h| {
            h.machine.quick_reads.as_mut().unwrap().reads = 0;
        }),
        ("time reads", |h| {
            h.machine.quick_reads.as_mut().unwrap().step_ns = 0;
        }),
        ("time reads", |h| {
            h.machine.quick_reads.as_mut().unwrap().step_ns = u64::MAX;
        }),
        ("CPUID", |h| h.machine.cpuid.entries.clear()),
        ("CPUID", |h| h.machine.cpuid.entries.swap(0, 1)),
        ("CPUID", |h| {
            let first = h.machine.cpuid.entries[0];
            h.machine.cpuid.entries.insert(0, first);
        }),
        ("CPUID", |h| {
            let first = h.machine.cpuid.entries[0];
            h.machine.cpuid.entries = vec![first; 257];
        }),
        ("images", |h| h.machine.images.clear()),
        ("images", |h| h.machine.devices.disks.clear()),
        ("image", |h| h.machine.images[0].bytes = 1024),
        ("devices", |h| h.machine.devices.disks[0].bytes = 513),
        ("disk 0", |h| {
            h.machine.devices.disks[0].bytes = DISK_BYTES_MAX + 512;
            h.machine.images[0].bytes = DISK_BYTES_MAX + 512;
        }),
        ("disks", |h| {
            // As many devices as there are slots, but more disks than a recording has names for.
            h.machine.devices.console = false;
            h.machine.devices.disks = vec![h.machine.devices.disks[0].clone(); 6];
            h.machine.images = vec![h.machine.images[0].clone(); 6];
        }),
        ("serial", |h| {
            h.machine.devices.disks[1].serial = "x".repeat(21);
        }),
        ("recorder", |h| h.host.recorder = "x".repeat(1025)),
        ("CPU", |h| h.host.cpu = "x".repeat(1025)),
        ("host's kernel", |h| h.host.kernel = "x".repeat(1025)),
        ("left open", |h| h.host.holes = vec![String::new(); 65]),
        ("left open", |h| h.host.holes = vec!["x".repeat(1025)]),
    ];
    for (word, change) in changes {
        let mut header = full();
        change(&mut header);
        let refused = header.check().expect_err(word);
        assert!(refused.contains(word), "{word}: {refused}");
    }
}
