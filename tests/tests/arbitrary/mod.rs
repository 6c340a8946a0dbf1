//! Any event a journal can hold, whether or not a machine could cause it.

use hindsight_devices::{Access, Input, Reset, Width};
use hindsight_replay::{
    Answer, End, Ending, Event, Exit, FullDigest, LeftOpen, MemoryDigest, Mode, Moment, Registers,
    TimeInstruction, Turn, VcpuNumber,
};
use proptest::prelude::*;

pub fn width() -> impl Strategy<Value = Width> {
    prop_oneof![
        Just(Width::Byte),
        Just(Width::Word),
        Just(Width::Dword),
        Just(Width::Qword)
    ]
}

pub fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        (any::<u16>(), width()).prop_map(|(port, width)| Access::PortRead { port, width }),
        (any::<u16>(), width(), any::<u32>()).prop_map(|(port, width, value)| Access::PortWrite {
            port,
            width,
            value
        }),
        (any::<u64>(), width()).prop_map(|(gpa, width)| Access::MemoryRead { gpa, width }),
        (any::<u64>(), width(), any::<u64>()).prop_map(|(gpa, width, value)| Access::MemoryWrite {
            gpa,
            width,
            value
        }),
        any::<u32>().prop_map(|index| Access::MsrRead { index }),
        (any::<u32>(), any::<u64>()).prop_map(|(index, value)| Access::MsrWrite { index, value }),
    ]
}

pub fn exit() -> impl Strategy<Value = Exit> {
    let instruction = prop_oneof![Just(TimeInstruction::Rdtsc), Just(TimeInstruction::Rdtscp)];
    let mode = prop_oneof![Just(Mode::Kernel), Just(Mode::User)];
    prop_oneof![
        8 => access().prop_map(Exit::Access),
        2 => (instruction, mode)
            .prop_map(|(instruction, mode)| Exit::TimeRead { instruction, mode }),
        1 => (any::<u32>(), any::<u32>())
            .prop_map(|(leaf, subleaf)| Exit::Cpuid { leaf, subleaf }),
        1 => any::<u64>().prop_map(|value| Exit::WriteCr4 { value }),
        1 => (any::<u8>(), any::<u64>())
            .prop_map(|(number, value)| Exit::WriteDr { number, value }),
        1 => (any::<u64>(), any::<u32>())
            .prop_map(|(module, sites)| Exit::Module { module, sites }),
        1 => any::<u64>().prop_map(|message| Exit::Panic { message }),
        2 => prop_oneof![
            Just(Exit::ReadCr4),
            Just(Exit::ProtectionFault),
            Just(Exit::Halt),
            Just(Exit::Woken),
            Just(Exit::Shutdown)
        ],
    ]
}

pub fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        Just(Answer::Done),
        Just(Answer::Fault),
        any::<u64>().prop_map(Answer::Value),
        (any::<u64>(), any::<u32>()).prop_map(|(tsc, aux)| Answer::Time { tsc, aux }),
        any::<[u32; 4]>().prop_map(Answer::Cpuid),
    ]
}

/// `now` is small: who uses it adds up.
pub fn turn() -> impl Strategy<Value = Turn> {
    let register = prop_oneof![3 => 0..4u64, 1 => any::<u64>()];
    let registers = proptest::collection::vec(register, Registers::COUNT)
        .prop_map(|all| Registers(all.try_into().expect("as many as there are registers")));
    (exit(), answer(), 0..2_000_000_000u64, registers).prop_map(|(exit, answer, now, registers)| {
        Turn {
            vcpu: VcpuNumber::BOOT,
            exit,
            answer,
            now,
            registers,
        }
    })
}

pub fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        any::<u64>().prop_map(|unix_seconds| Input::WallClock { unix_seconds }),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(Input::Console),
        proptest::collection::vec(any::<u8>(), 5_000..5_010).prop_map(Input::Console),
        Just(Input::Stop),
        Just(Input::PowerButton),
    ]
}

pub fn time() -> impl Strategy<Value = Event> {
    let extreme = prop_oneof![Just(i64::MIN), Just(i64::MAX), Just(0), Just(-1), Just(1)];
    prop_oneof![any::<i64>(), extreme, -1_000_000..10_000_000_000i64]
        .prop_map(|ahead_ns| Event::Time { ahead_ns })
}

/// Its moment's exit is set by who uses it.
pub fn interrupt() -> impl Strategy<Value = Event> {
    (any::<u8>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(vector, branches, rip, rcx)| Event::Interrupt {
            vector,
            at: Moment {
                branches,
                rip,
                rcx,
                ..Moment::START
            },
        },
    )
}

pub fn end() -> impl Strategy<Value = Event> {
    let ending = prop_oneof![
        Just(Ending::Reset(Reset::Keyboard)),
        Just(Ending::Reset(Reset::ControlRegister)),
        Just(Ending::Reset(Reset::FastReset)),
        Just(Ending::TripleFault),
        Just(Ending::Halted),
        Just(Ending::Stopped),
        Just(Ending::StoppedRunning),
        Just(Ending::PowerOff),
    ];
    let panic = proptest::option::of(".{0,20}");
    (
        ending,
        panic,
        any::<u64>(),
        any::<u64>(),
        proptest::option::of(state()),
    )
        .prop_map(|(ending, panic, now, digest, state)| {
            Event::End(Box::new(End {
                ending,
                panic,
                now,
                digest,
                state,
            }))
        })
}

fn state() -> impl Strategy<Value = FullDigest> {
    let memory = |(masked, accessed)| MemoryDigest::of_parts(masked, accessed);
    any::<(u64, u32)>().prop_map(move |parts| FullDigest::of_memory(memory(parts)))
}

/// Every event but the end.
pub fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        turn().prop_map(|turn| Event::Turn(Box::new(turn))),
        time(),
        input().prop_map(Event::Input),
        interrupt(),
        any::<[u8; 2]>().prop_map(|check| Event::Witness { check }),
        state().prop_map(|digest| Event::State { digest }),
        any::<u64>().prop_map(|check| Event::FirstReads { check }),
        prop::collection::vec(any::<u8>(), 1..40).prop_map(Event::Posted),
        (0..LeftOpen::ALL.len()).prop_map(|which| Event::LeftOpen(LeftOpen::ALL[which])),
    ]
}
