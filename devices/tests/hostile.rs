//! Whatever a guest does: it does not panic the board, and a save changes nothing.

use hindsight_devices::{
    Access, Board, BoardState, BusContext, Devices, Input, Nanos, NoDisks, Output, Ram, Reply,
    Room, Width,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Access(Access),
    Accept(Input),
    Wait(Nanos),
    ToDeadline,
    Acknowledge,
    TakeOutput,
}

/// Everything that can be seen of a board after a step.
#[derive(Debug, PartialEq)]
struct Seen {
    reply: Option<Reply>,
    vector: Option<u8>,
    output: Vec<Output>,
    pending: bool,
    deadline: Option<Nanos>,
    time_stamp: u64,
    room: Room,
}

fn take(board: &mut Board, step: &Step) -> Seen {
    let (mut reply, mut vector, mut output) = (None, None, Vec::new());
    let ram = Ram::new();
    let mut context = BusContext {
        ram: &ram,
        storage: &mut NoDisks,
    };
    board.count_exit(matches!(step, Step::Wait(_) | Step::ToDeadline));
    match step {
        Step::Access(access) => {
            let answer = board.access(*access, &mut context);
            reply = Some(answer.expect("there is no disk to fail"));
        }
        Step::Accept(input) => board.accept(input.clone(), &ram),
        Step::Wait(ns) => board.advance(board.now().saturating_add(*ns)),
        Step::ToDeadline => board.advance(board.deadline().unwrap_or(board.now())),
        Step::Acknowledge => vector = Some(board.acknowledge()),
        Step::TakeOutput => output = board.take_outputs(),
    }
    let (pending, deadline) = (board.interrupt_pending(), board.deadline());
    assert!(
        deadline.is_none_or(|deadline| deadline > board.now()),
        "a deadline has passed"
    );
    let (time_stamp, room) = (board.time_stamp(), board.room(&ram));
    Seen {
        reply,
        vector,
        output,
        pending,
        deadline,
        time_stamp,
        room,
    }
}

fn width() -> impl Strategy<Value = Width> {
    prop_oneof![
        8 => Just(Width::Byte),
        1 => Just(Width::Word),
        1 => Just(Width::Dword),
        1 => Just(Width::Qword),
    ]
}

/// Mostly ports where something is, sometimes any port.
fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        4 => prop::sample::select(vec![0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1]),
        4 => 0x40..=0x43u16,
        4 => 0x70..=0x71u16,
        4 => 0x3f8..=0x3ffu16,
        2 => 0x600..=0x60bu16,
        2 => prop::sample::select(vec![0x60, 0x61, 0x64, 0x92, 0x505, 0xcf8, 0xcf9, 0xcfc]),
        1 => any::<u16>(),
    ]
}

fn msr() -> impl Strategy<Value = u32> {
    let known = vec![
        0x10,
        0x17,
        0x3b,
        0x79,
        0x8b,
        0x1a0,
        0xc001_0015,
        0xc001_1029,
        0xc000_0103,
    ];
    prop_oneof![
        4 => prop::sample::select(known),
        2 => prop::sample::select(vec![0x1b, 0x6e0]),
        4 => 0x800..=0x83fu32,
        1 => any::<u32>(),
    ]
}

/// A value for one of them: small ones, legal states of IA32_APIC_BASE, IPIs.
fn msr_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => value().prop_map(u64::from),
        1 => prop::sample::select(vec![0xfee0_0900u64, 0xfee0_0d00, 0xfee0_0100]),
        1 => any::<u64>(),
    ]
}

/// Mostly registers of the APICs.
fn gpa() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..0x40u64).prop_map(|index| 0xfee0_0000 + 16 * index),
        2 => (0..8u64).prop_map(|lvt| 0xfee0_0320 + 16 * lvt),
        6 => prop::sample::select(vec![0xfec0_0000, 0xfec0_0010]),
        1 => 0xfee0_0000..0xfee0_1000u64,
        1 => any::<u64>(),
    ]
}

/// What their registers hold: vectors, with modes and masks.
fn memory_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => 0..0x40u64,
        3 => (any::<u8>(), 0..8u64, 0..8u64, any::<bool>()).prop_map(|(vector, low, high, level)| {
            u64::from(vector) | low << 8 | u64::from(level) << 15 | high << 16
        }),
        1 => any::<u64>(),
    ]
}

/// Doublewords, mostly.
fn memory_width() -> impl Strategy<Value = Width> {
    prop_oneof![8 => Just(Width::Dword), 1 => width()]
}

/// A value; small ones and the clock's registers come up often.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![2 => 0..16u32, 2 => any::<u8>().prop_map(u32::from), 1 => any::<u32>()]
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        6 => (port(), width()).prop_map(|(port, width)| Access::PortRead { port, width }),
        12 => (port(), width(), value())
            .prop_map(|(port, width, value)| Access::PortWrite { port, width, value }),
        2 => (gpa(), memory_width()).prop_map(|(gpa, width)| Access::MemoryRead { gpa, width }),
        8 => (gpa(), memory_width(), memory_value())
            .prop_map(|(gpa, width, value)| Access::MemoryWrite { gpa, width, value }),
        1 => msr().prop_map(|index| Access::MsrRead { index }),
        3 => (msr(), msr_value()).prop_map(|(index, value)| Access::MsrWrite { index, value }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => access().prop_map(Step::Access),
        // A few ticks of the timer's oscillator, or a few of the guest's timer interrupts.
        4 => (0..5_000u64).prop_map(Step::Wait),
        3 => (0..5_000_000u64).prop_map(Step::Wait),
        1 => prop_oneof![any::<u64>(), 0..200_000_000_000_000u64].prop_map(Step::Wait),
        4 => Just(Step::ToDeadline),
        3 => Just(Step::Acknowledge),
        1 => Just(Step::TakeOutput),
        1 => prop::collection::vec(any::<u8>(), 0..200)
            .prop_map(|bytes| Step::Accept(Input::Console(bytes))),
        1 => any::<u64>().prop_map(|unix_seconds| Step::Accept(Input::WallClock { unix_seconds })),
        1 => Just(Step::Accept(Input::Stop)),
        1 => Just(Step::Accept(Input::PowerButton)),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..400)
}

#[test]
fn a_deadline_that_does_not_come_is_saved_even_when_its_time_has_passed() {
    let write = |gpa, value| {
        Step::Access(Access::MemoryWrite {
            gpa,
            width: Width::Dword,
            value,
        })
    };
    let set = |value| {
        Step::Access(Access::MsrWrite {
            index: 0x6e0,
            value,
        })
    };
    let mut board = Board::new(&Devices::default());
    // The timer's LVT entry in deadline mode, a deadline in 292 years and a bit, and those years.
    for step in [
        write(0xfee0_0320, 2 << 17),
        set(1 << 63),
        Step::Wait(1 << 63),
    ] {
        take(&mut board, &step);
    }
    assert!(Board::restore(board.save()).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_hostile_guest_never_panics_the_board(steps in steps()) {
        let mut board = Board::new(&Devices::default());
        for step in &steps {
            take(&mut board, step);
        }
    }

    #[test]
    fn save_and_restore_at_any_point_changes_nothing_that_follows(
        before in steps(),
        after in steps(),
    ) {
        let mut board = Board::new(&Devices::default());
        for step in &before {
            take(&mut board, step);
        }
        let bytes = postcard::to_stdvec(&board.save()).unwrap();
        let state: BoardState = postcard::from_bytes(&bytes).unwrap();
        prop_assert_eq!(&state, &board.save());
        let mut restored = Board::restore(state).unwrap();
        for step in &after {
            prop_assert_eq!(take(&mut board, step), take(&mut restored, step));
        }
        prop_assert_eq!(board.save(), restored.save());
    }

    #[test]
    fn a_clone_is_the_same_board(before in steps(), after in steps()) {
        let mut board = Board::new(&Devices::default());
        for step in &before {
            take(&mut board, step);
        }
        let mut clone = board.clone();
        for step in &after {
            prop_assert_eq!(take(&mut board, step), take(&mut clone, step));
        }
    }

    /// Waiting for a deadline in one jump or in many small ones is the same.
    #[test]
    fn no_interrupt_comes_before_the_deadline(before in steps(), cuts in 1..50u64) {
        let mut board = Board::new(&Devices::default());
        for step in &before {
            take(&mut board, step);
        }
        prop_assume!(!board.interrupt_pending());
        if let Some(deadline) = board.deadline() {
            let start = board.now();
            for cut in 0..cuts {
                board.advance(start + (deadline - 1 - start) / cuts * cut);
                prop_assert!(!board.interrupt_pending());
            }
            board.advance(deadline - 1);
            prop_assert!(!board.interrupt_pending());
        }
    }

    /// A damaged save is refused or makes some board, but never one that panics.
    #[test]
    fn a_damaged_save_never_panics_the_board(
        before in steps(),
        after in steps(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut board = Board::new(&Devices::default());
        for step in &before {
            take(&mut board, step);
        }
        let mut bytes = postcard::to_stdvec(&board.save()).unwrap();
        for (index, value) in damage {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        let Ok(state) = postcard::from_bytes::<BoardState>(&bytes) else { return Ok(()) };
        if let Ok(mut restored) = Board::restore(state) {
            for step in &after {
                take(&mut restored, step);
            }
        }
    }
}
