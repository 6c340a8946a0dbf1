//! Time reads without exits on the host's KVM: a kernel of a few instructions, loaded as Linux is.

use hindsight_devices::Reset;
use hindsight_devices::{Devices, NoDisks};
use hindsight_replay::{
    Detail, Ending, Exit, Header, JournalReader, Live, Machine, MachineDescription, QuickReads,
    Recorder, Replayer,
};
use hindsight_tests::sim::{Scenario, Trace};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::skip::skip;
use hindsight_vmm::kvm::KvmCpu;
use hindsight_vmm::session::{LoadedKernel, build, describe};
use kvm_ioctls::Kvm;

/// How often the kernel reads the time.
const READS: u64 = 200;
const VIRTUAL: u64 = 0xffff_ffff_8100_0000;
const PHYSICAL: u64 = 0x100_0000;
/// Of the text, mostly padding, and of the data after it.
const TEXT_BYTES: usize = 64 << 10;
const DATA_BYTES: usize = 64;
const MEMORY_BYTES: u64 = 32 << 20;

/// Reads the time [`READS`] times and compares each with the one before; resets the machine if none fell,
/// else triple faults.
#[rustfmt::skip]
const CODE: [u8; 34] = [
    0x31, 0xdb,                   //        xor ebx, ebx
    0xb9, READS as u8, 0, 0, 0,   //        mov ecx, READS
    0x0f, 0x31,                   // again: rdtsc
    0x48, 0xc1, 0xe2, 0x20,       //        shl rdx, 32
    0x48, 0x09, 0xd0,             //        or rax, rdx
    0x48, 0x39, 0xd8,             //        cmp rax, rbx
    0x72, 0x0b,                   //        jb bad
    0x48, 0x89, 0xc3,             //        mov rbx, rax
    0xff, 0xc9,                   //        dec ecx
    0x75, 0xeb,                   //        jnz again
    0xb0, 0xfe,                   //        mov al, 0xfe
    0xe6, 0x64,                   //        out 0x64, al
    0x0f, 0x0b,                   // bad:   ud2
];

/// An ELF file with padding in its text and room after its data.
fn kernel() -> Vec<u8> {
    let mut text = CODE.to_vec();
    text.resize(TEXT_BYTES, 0xcc);
    let offset = 64 + 2 * 56;
    let names = b"\0.text\0.data\0.shstrtab\0";
    let names_at = offset + TEXT_BYTES + DATA_BYTES;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    let put = |file: &mut Vec<u8>, words: &[(u64, usize)]| {
        for (value, bytes) in words {
            file.extend_from_slice(&value.to_le_bytes()[..*bytes]);
        }
    };
    file.resize(16, 0);
    put(
        &mut file,
        &[(2, 2), (62, 2), (1, 4), (PHYSICAL, 8), (64, 8)],
    );
    put(&mut file, &[((names_at + names.len()) as u64, 8), (0, 4)]);
    put(
        &mut file,
        &[(64, 2), (56, 2), (2, 2), (64, 2), (4, 2), (3, 2)],
    );
    let data_address = VIRTUAL + TEXT_BYTES as u64;
    for (flags, start, bytes, memory) in [
        (5, 0, TEXT_BYTES, TEXT_BYTES),
        (6, TEXT_BYTES, DATA_BYTES, 4096),
    ] {
        put(
            &mut file,
            &[(1, 4), (flags, 4), ((offset + start) as u64, 8)],
        );
        let start = start as u64;
        put(&mut file, &[(VIRTUAL + start, 8), (PHYSICAL + start, 8)]);
        put(
            &mut file,
            &[(bytes as u64, 8), (memory as u64, 8), (4096, 8)],
        );
    }
    file.extend(text);
    file.resize(names_at, 0);
    file.extend(names);
    for (name, kind, flags, address, at, bytes) in [
        (0, 0, 0, 0, 0, 0),
        (1, 1, 6, VIRTUAL, offset, TEXT_BYTES),
        (7, 1, 3, data_address, offset + TEXT_BYTES, DATA_BYTES),
        (13, 3, 0, 0, names_at, names.len()),
    ] {
        put(&mut file, &[(name, 4), (kind, 4), (flags, 8), (address, 8)]);
        put(
            &mut file,
            &[(at as u64, 8), (bytes as u64, 8), (0, 8), (1, 8), (0, 8)],
        );
    }
    file
}

/// The host's KVM, or word of what is missing.
fn kvm() -> Option<Kvm> {
    Kvm::new()
        .inspect_err(|error| skip(&format!("/dev/kvm does not open: {error}")))
        .ok()
}

fn machine(kvm: &Kvm, description: &MachineDescription) -> (KvmCpu, Machine) {
    let kernel = LoadedKernel::open(&kernel()).expect("a kernel");
    build(kvm, description, &kernel, &[]).expect("it is built")
}

fn description(kvm: &Kvm, quick: bool) -> MachineDescription {
    let kernel = LoadedKernel::open(&kernel()).expect("a kernel");
    let mut description = describe(
        kvm,
        &kernel,
        &[],
        String::new(),
        MEMORY_BYTES,
        (Devices::default(), Vec::new()),
        quick,
    )
    .expect("a machine");
    if let Some(quick) = &mut description.quick_reads {
        assert_eq!(quick.sites, 1);
        // What an exit costs here is not what this is about.
        description.ns_per_exit = 33_000;
        *quick = QuickReads {
            step_ns: 1_000,
            ..*quick
        };
    }
    description
}

fn time_reads(trace: &Trace) -> Vec<u64> {
    let reads = trace.turns.iter();
    let reads = reads.filter(|turn| matches!(turn.exit, Exit::TimeRead { .. }));
    reads.map(|turn| turn.now).collect()
}

#[test]
fn time_never_falls_from_read_to_read_and_every_thirty_third_exits() {
    let Some(kvm) = kvm() else { return };
    for (quick, exits) in [(true, READS.div_ceil(33)), (false, READS)] {
        let header = Header {
            machine: description(&kvm, quick),
            ..Scenario::new(1).header(Detail::Full)
        };
        let (mut cpu, mut machine) = machine(&kvm, &header.machine);
        let mut journal = Vec::new();
        let live = Live::new(SimWorld::new(1, 1_000), Some(1));
        let mut door = Recorder::create(live, &mut journal, &header).expect("a Vec");
        let mut recorded = Trace::default();
        let end = machine
            .run(&mut cpu, &mut NoDisks, &mut door, &mut recorded)
            .expect("it runs");
        drop(door);
        assert_eq!(end.ending, Ending::Reset(Reset::Keyboard), "{recorded:?}");
        assert_eq!(time_reads(&recorded).len() as u64, exits);

        // Memory is digested at each exit: the clock in it is the same.
        let (mut cpu, mut machine) = self::machine(&kvm, &header.machine);
        let reader = JournalReader::open(journal.as_slice()).expect("whole");
        let mut door = Replayer::new(reader, None, None);
        let mut replayed = Trace::default();
        let again = machine
            .run(&mut cpu, &mut NoDisks, &mut door, &mut replayed)
            .expect("it replays");
        assert_eq!((again, replayed), (end, recorded));
        assert!(door.states_checked() > exits);
    }
}

#[test]
fn a_replay_that_would_rewrite_the_kernel_otherwise_is_refused() {
    let Some(kvm) = kvm() else { return };
    let kernel = LoadedKernel::open(&kernel()).expect("a kernel");
    let whole = describe(
        &kvm,
        &kernel,
        &[],
        String::new(),
        MEMORY_BYTES,
        (Devices::default(), Vec::new()),
        true,
    )
    .expect("fine");
    for change in [(1, 0), (0, 1)] {
        let mut description = whole.clone();
        let quick = description.quick_reads.as_mut().expect("it has one");
        quick.sites += change.0;
        quick.check ^= change.1;
        let error = build(&kvm, &description, &kernel, &[]).expect_err("another rewriting");
        assert!(error.to_string().contains("time reads"), "{error}");
    }
}
