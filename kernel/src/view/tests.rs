use super::*;
use crate::testing::debian_kernels;
use toy::{Age, CURRENT, INIT_TASK, PER_CPU_OFFSET, PRB, SPECIAL, Toy};

mod toy;

const BOTH: [Age; 2] = [Age::Old, Age::New];
const ONE: u64 = 0xffff_8880_0001_0000;
const TWO: u64 = 0xffff_8880_0002_0000;
const THREE: u64 = 0xffff_8880_0003_0000;
const MM: u64 = 0xffff_8880_0004_0000;
const TABLE: u64 = 0xffff_8880_0005_0000;
const FILE: u64 = 0xffff_8880_0006_0000;
/// Directory entries and mounts are from here on.
const ENTRIES: u64 = 0xffff_8880_0100_0000;
const MOUNTS: u64 = 0xffff_8880_0200_0000;
/// Mappings and nodes.
const AREAS: u64 = 0xffff_8880_0300_0000;
const NODES: u64 = 0xffff_8880_0400_0000;

/// Two processes, of which the second has two threads.
fn some(age: Age) -> Toy {
    let mut toy = Toy::new(age);
    toy.task(INIT_TASK, 0, 0, "swapper/0");
    toy.task(ONE, 1, INIT_TASK, "init");
    toy.task(TWO, 7, ONE, "a worker");
    toy.task(THREE, 8, ONE, "another");
    toy.set(THREE, "task_struct.tgid", 7);
    toy.set(THREE, "task_struct.signal", TWO + 0x1000);
    toy.threads(TWO, &[TWO, THREE]);
    toy.processes(&[ONE, TWO]);
    toy
}

/// The same, where the first process has memory of its own.
fn program(age: Age) -> Toy {
    let mut toy = some(age);
    toy.set(ONE, "task_struct.mm", MM);
    for (member, value) in [
        ("mm_struct.pgd", TABLE),
        ("mm_struct.exe_file", FILE),
        ("mm_struct.arg_start", 0x7ff0),
        ("mm_struct.arg_end", 0x8003),
        ("mm_struct.start_brk", 0x60_0000),
        ("mm_struct.brk", 0x60_2000),
        ("mm_struct.start_stack", 0x7fff_0010),
    ] {
        toy.set(MM, member, value);
    }
    let auxv = [6_u64, 4096, 9, 0x40_1000, 0, 0, 77, 78];
    toy.write(
        toy.place(MM, "mm_struct.saved_auxv"),
        auxv.map(u64::to_le_bytes).as_flattened(),
    );
    let root = ENTRIES;
    toy.entry(root, root, "/");
    toy.entry(root + 0x1000, root, "mnt");
    toy.entry(root + 0x2000, root + 0x2000, "/");
    toy.entry(root + 0x3000, root + 0x2000, "bin");
    toy.entry(root + 0x4000, root + 0x3000, "sh");
    toy.mount(MOUNTS, root, MOUNTS, root);
    let mounted = toy.mount(MOUNTS + 0x1000, root + 0x2000, MOUNTS, root + 0x1000);
    toy.file(FILE, mounted, root + 0x4000);
    toy
}

/// The only task with memory of its own.
fn init(toy: &mut Toy) -> Task {
    let view = toy.view.clone();
    view.tasks(toy).items.remove(0)
}

#[test]
fn processes_are_listed_with_their_threads_after_them() {
    for age in BOTH {
        let mut toy = some(age);
        toy.set(ONE, "task_struct.flags", 0x0020_0000);
        toy.set(ONE, "task_struct.static_prio", 100);
        toy.set(TWO, "task_struct.exit_state", 0x20);
        let view = toy.view.clone();
        let found = view.tasks(&mut toy);
        assert_eq!(found.broken, None);
        let short = |task: &Task| {
            let state = task.state.letter();
            (task.pid, task.tgid, task.parent, task.name.clone(), state)
        };
        assert_eq!(
            found.items.iter().map(short).collect::<Vec<_>>(),
            [
                (1, 1, 0, "init".into(), 'S'),
                (7, 7, 1, "a worker".into(), 'Z'),
                (8, 7, 1, "another".into(), 'S'),
            ]
        );
        let first = &found.items[0];
        let rest = (first.uid, first.nice, first.start_ns, first.is_kernel);
        assert_eq!(rest, (33, -20, 1_000_000_000, true));
        assert!(first.is_process() && !found.items[2].is_process());
    }
}

#[test]
fn the_letters_of_states_are_those_of_proc() {
    // fs/proc/array.c, task_state_array; include/linux/sched.h, TASK_REPORT.
    let letter = |state, exit| State::of(state, exit).letter();
    let found: String = [0, 1, 2, 4, 8, 0x40, 0x402, 0x102, 0x1000, 0x8002]
        .map(|state| letter(state, 0))
        .iter()
        .collect();
    assert_eq!(found, "RSDTtPIDDD");
    assert_eq!((letter(0x80, 0x10), letter(0x80, 0x20)), ('X', 'Z'));
}

#[test]
fn the_running_task_is_found_by_the_processors_own_data() {
    for age in BOTH {
        let mut toy = some(age);
        let moved = 0xffff_8880_0700_0000_u64;
        toy.write(PER_CPU_OFFSET, &moved.to_le_bytes());
        let member = if age == Age::New { 8 } else { 0 };
        toy.write(moved + CURRENT + member, &THREE.to_le_bytes());
        let view = toy.view.clone();
        let current = view.current(&mut toy).unwrap();
        assert_eq!((current.address, current.pid), (THREE, 8));
        toy.unmap(PER_CPU_OFFSET, 8);
        let what = "__per_cpu_offset";
        let address = PER_CPU_OFFSET;
        let error = ViewError::Unmapped { what, address };
        assert_eq!(view.current(&mut toy), Err(error));
    }
}

#[test]
fn a_list_that_leads_in_a_circle_is_shown_once_and_said_to() {
    let mut toy = some(Age::New);
    let [one, two, three] = [ONE, TWO, THREE].map(|at| toy.place(at, "task_struct.tasks"));
    let head = toy.place(INIT_TASK, "task_struct.tasks");
    // It never comes back to where it began.
    toy.write(head, &one.to_le_bytes());
    toy.link(&[one, two, three]);
    let view = toy.view.clone();
    let found = view.tasks(&mut toy);
    let pids: Vec<i32> = found.items.iter().map(|task| task.pid).collect();
    // The third is there as a thread of the second, and by itself, with the second as its thread.
    assert_eq!(pids, [1, 7, 8, 8, 7]);
    let what = "tasks";
    let address = one;
    assert_eq!(found.broken, Some(ViewError::Circle { what, address }));

    let mut toy = some(Age::New);
    let thread = toy.place(THREE, "task_struct.thread_node");
    toy.write(thread, &thread.to_le_bytes());
    let found = view.tasks(&mut toy);
    assert_eq!(found.items.len(), 3);
    assert!(
        found
            .broken
            .unwrap()
            .to_string()
            .contains("threads lead in a circle")
    );
}

#[test]
fn what_comes_after_a_pointer_to_nowhere_is_missing_and_what_came_before_is_not() {
    let mut toy = some(Age::New);
    let next = toy.place(ONE, "task_struct.tasks");
    toy.write(next, &0xdead_0000_0000_0100_u64.to_le_bytes());
    let view = toy.view.clone();
    let found = view.tasks(&mut toy);
    assert_eq!(found.items.len(), 1);
    let told = found.broken.unwrap().to_string();
    assert!(told.contains("0xdead000000000"), "{told}");

    // One of several that cannot be read is left out.
    let mut toy = some(Age::New);
    toy.unmap(toy.place(ONE, "task_struct.comm"), 16);
    let found = view.tasks(&mut toy);
    assert_eq!(
        found.items.iter().map(|task| task.pid).collect::<Vec<_>>(),
        [7, 8]
    );
    assert!(
        found
            .broken
            .unwrap()
            .to_string()
            .contains("task_struct.comm")
    );
}

#[test]
fn a_program_tells_its_file_arguments_and_auxiliary_vector() {
    for age in BOTH {
        let mut toy = program(age);
        toy.write_user(TABLE, 0x7ff0, b"/bin/sh\0-c\0echo a\0\0");
        // Another program has other memory there.
        toy.write_user(TABLE + 1, 0x7ff0, b"no");
        let task = init(&mut toy);
        let view = toy.view.clone();
        assert_eq!(view.page_table_of(&mut toy, &task), Ok(TABLE));
        assert_eq!(
            view.executable(&mut toy, &task),
            Ok(Some("/mnt/bin/sh".into()))
        );
        let arguments = view.arguments(&mut toy, &task).unwrap();
        assert_eq!(arguments, ["/bin/sh", "-c", "echo a"]);
        let auxv = view.auxv(&mut toy, &task).unwrap();
        let words = [6_u64, 4096, 9, 0x40_1000, 0, 0].map(u64::to_le_bytes);
        assert_eq!(auxv, words.as_flattened());

        // A thread of the kernel's has none of it.
        let thread = view.tasks(&mut toy).items.remove(1);
        assert_eq!(view.executable(&mut toy, &thread), Ok(None));
        assert_eq!(view.arguments(&mut toy, &thread), Ok(vec![]));
        assert_eq!(view.auxv(&mut toy, &thread), Ok(vec![]));
    }
}

#[test]
fn arguments_of_any_length_are_read_as_far_as_there_are_any() {
    let mut toy = program(Age::New);
    toy.set(MM, "mm_struct.arg_end", u64::MAX);
    toy.write_user(TABLE, 0x7ff0, b"sh\0-x");
    let task = init(&mut toy);
    let view = toy.view.clone();
    assert_eq!(view.arguments(&mut toy, &task).unwrap(), ["sh", "-x"]);
    toy.set(MM, "mm_struct.arg_end", 0);
    assert_eq!(view.arguments(&mut toy, &task), Ok(vec![]));
}

#[test]
fn a_file_that_was_deleted_or_is_in_no_directory_says_so() {
    let mut toy = program(Age::New);
    let task = init(&mut toy);
    let view = toy.view.clone();
    let sh = ENTRIES + 0x4000;
    toy.set(sh, "dentry.d_hash.pprev", 0);
    let path = view.executable(&mut toy, &task).unwrap();
    assert_eq!(path.as_deref(), Some("/mnt/bin/sh (deleted)"));
    toy.entry(sh, sh, "memfd:x");
    toy.set(sh, "dentry.d_hash.pprev", 0);
    let path = view.executable(&mut toy, &task).unwrap();
    assert_eq!(path.as_deref(), Some("/memfd:x (deleted)"));
}

#[test]
fn directories_and_mounts_that_lead_in_a_circle_have_no_path() {
    let mut toy = program(Age::New);
    let task = init(&mut toy);
    let view = toy.view.clone();
    toy.entry(ENTRIES + 0x3000, ENTRIES + 0x4000, "bin");
    let told = view.executable(&mut toy, &task).unwrap_err().to_string();
    assert!(told.contains("parts of a path"), "{told}");

    let mut toy = program(Age::New);
    let root = ENTRIES + 0x2000;
    toy.mount(MOUNTS + 0x2000, root, MOUNTS + 0x1000, root);
    toy.mount(MOUNTS + 0x1000, root, MOUNTS + 0x2000, root);
    assert!(view.executable(&mut toy, &task).is_err());
}

/// Mappings of the program's file, of memory, of the heap and the stack, and one of the kernel's.
fn areas(toy: &mut Toy) -> [u64; 5] {
    let mut number = 0;
    let mut area = |start: u64, pages: u64, flags: u64, file: u64| {
        let at = AREAS + 0x1000 * number;
        number += 1;
        for (member, value) in [
            ("vm_area_struct.vm_start", start),
            ("vm_area_struct.vm_end", start + 4096 * pages),
            ("vm_area_struct.vm_flags", flags),
            ("vm_area_struct.vm_pgoff", 2),
            ("vm_area_struct.vm_file", file),
            ("vm_area_struct.vm_ops", 0),
            ("vm_area_struct.vm_private_data", 0),
            ("vm_area_struct.vm_next", 0),
        ] {
            toy.set(at, member, value);
        }
        at
    };
    let found = [
        area(0x40_0000, 1, 5, FILE),
        area(0x50_0000, 1, 0x83, 0),
        area(0x60_0000, 2, 3, 0),
        area(0x7fff_0000, 1, 3, 0),
        area(0x7fff_f000, 1, 5, 0),
    ];
    toy.set(found[4], "vm_area_struct.vm_ops", SPECIAL);
    toy.set(
        found[4],
        "vm_area_struct.vm_private_data",
        AREAS + 0x10_0000,
    );
    toy.set(
        AREAS + 0x10_0000,
        "vm_special_mapping.name",
        AREAS + 0x10_1000,
    );
    toy.write(AREAS + 0x10_1000, b"[vdso]\0");
    found
}

/// Those as `/proc/PID/maps` has them.
const MAPS: [&str; 5] = [
    "400000-401000 r-xp 2000 /mnt/bin/sh",
    "500000-501000 rw-s 0 ",
    "600000-602000 rw-p 0 [heap]",
    "7fff0000-7fff1000 rw-p 0 [stack]",
    "7ffff000-80000000 r-xp 0 [vdso]",
];

fn lines(found: &Listing<Mapping>) -> Vec<String> {
    let line = |m: &Mapping| {
        let (from, to, what) = (m.start, m.end, m.permissions());
        format!("{from:x}-{to:x} {what} {:x} {}", m.offset, m.name)
    };
    found.items.iter().map(line).collect()
}

#[test]
fn mappings_are_read_from_a_list() {
    let mut toy = program(Age::Old);
    let areas = areas(&mut toy);
    toy.set(MM, "mm_struct.mmap", areas[0]);
    for (at, next) in areas.iter().zip(&areas[1..]) {
        toy.set(*at, "vm_area_struct.vm_next", *next);
    }
    let task = init(&mut toy);
    let view = toy.view.clone();
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(
        (lines(&found), &found.broken),
        (MAPS.map(String::from).to_vec(), &None)
    );

    toy.set(areas[4], "vm_area_struct.vm_next", areas[2]);
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(lines(&found), MAPS);
    let (what, address) = ("mappings", areas[2]);
    assert_eq!(found.broken, Some(ViewError::Circle { what, address }));
}

/// A node: where it is, its kind, and slots with the last address of each.
fn node(toy: &mut Toy, at: u64, kind: u64, slots: &[(u64, u64)]) -> u64 {
    let (pivot, slot) = match kind {
        3 => ("maple_arange_64.pivot", "maple_arange_64.slot"),
        _ => ("maple_range_64.pivot", "maple_range_64.slot"),
    };
    let (pivot, slot) = (toy.place(at, pivot), toy.place(at, slot));
    toy.write(at, &[0; 256]);
    let pivots = if kind == 3 { 9 } else { 15 };
    for (number, (to, last)) in (0..).zip(slots) {
        toy.write(slot + 8 * number, &to.to_le_bytes());
        if number < pivots {
            toy.write(pivot + 8 * number, &last.to_le_bytes());
        }
    }
    at | kind << 3 | 4
}

#[test]
fn mappings_are_read_from_a_tree() {
    let mut toy = program(Age::New);
    let [a, b, c, d, e] = areas(&mut toy);
    let last = u64::MAX;
    // What is left over after a node's last slot counts for nothing.
    let first = node(
        &mut toy,
        NODES,
        1,
        &[
            (0, 0x3f_ffff),
            (a, 0x40_0fff),
            (0, 0x4f_ffff),
            (b, 0x50_0fff),
            (e, 0),
        ],
    );
    let second = node(
        &mut toy,
        NODES + 0x100,
        1,
        &[
            (c, 0x60_1fff),
            (0, 0x7ffe_ffff),
            (d, 0x7fff_0fff),
            (0, 0x7fff_efff),
            (e, 0x7fff_ffff),
            (0, last),
        ],
    );
    let root = node(
        &mut toy,
        NODES + 0x200,
        3,
        &[(first, 0x50_0fff), (second, last), (first, 9)],
    );
    toy.set(MM, "mm_struct.mm_mt.ma_root", root | 2);
    let task = init(&mut toy);
    let view = toy.view.clone();
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(
        (lines(&found), &found.broken),
        (MAPS.map(String::from).to_vec(), &None)
    );

    // A node that is its own child, and one of a kind that there is not.
    let round = NODES + 0x300;
    let strange = NODES + 0x400 | 7 << 3;
    let round = node(
        &mut toy,
        round,
        2,
        &[(round | 2 << 3, 1), (strange, 2), (second, last)],
    );
    toy.set(MM, "mm_struct.mm_mt.ma_root", round | 2);
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(lines(&found), MAPS[2..]);
    assert!(found.broken.unwrap().to_string().contains("in a circle"));

    toy.set(MM, "mm_struct.mm_mt.ma_root", 0);
    assert_eq!(view.maps(&mut toy, &task), Ok(Listing::default()));
}

/// A buffer of four messages and 64 bytes of text. Each message has its state, where its text begins and ends, and how many
/// bytes of it count.
fn log(toy: &mut Toy, tail: u64, messages: &[(u64, u64, u64, u64)], text: &[u8; 64]) {
    let (buffer, descriptors) = (PRB + 0x1000, PRB + 0x2000);
    let (infos, texts) = (PRB + 0x3000, PRB + 0x4000);
    toy.write(PRB, &buffer.to_le_bytes());
    for (member, value) in [
        ("printk_ringbuffer.desc_ring.count_bits", 2),
        ("printk_ringbuffer.desc_ring.descs", descriptors),
        ("printk_ringbuffer.desc_ring.infos", infos),
        (
            "printk_ringbuffer.desc_ring.head_id.counter",
            tail + messages.len() as u64 - 1,
        ),
        ("printk_ringbuffer.desc_ring.tail_id.counter", tail),
        ("printk_ringbuffer.text_data_ring.size_bits", 6),
        ("printk_ringbuffer.text_data_ring.data", texts),
    ] {
        toy.set(buffer, member, value);
    }
    toy.write(texts, text);
    for (id, (state, begin, next, length)) in (tail..).zip(messages) {
        let (descriptor, info) = (descriptors + 24 * (id % 4), infos + 24 * (id % 4));
        toy.set(descriptor, "prb_desc.state_var.counter", state << 62 | id);
        toy.set(descriptor, "prb_desc.text_blk_lpos.begin", *begin);
        toy.set(descriptor, "prb_desc.text_blk_lpos.next", *next);
        toy.set(info, "printk_info.seq", id);
        toy.set(info, "printk_info.ts_nsec", 1000 * id);
        toy.set(info, "printk_info.text_len", *length);
        // Five bits of flags come before the level.
        toy.write(info + 19, &[6 << 5 | 0x1f]);
    }
}

#[test]
fn messages_are_read_from_the_oldest_on_and_over_the_end_of_the_buffer() {
    let mut toy = some(Age::New);
    let mut text = [b'-'; 64];
    text[40..45].copy_from_slice(b"first");
    text[8..14].copy_from_slice(b"second");
    text[24..29].copy_from_slice(b"third");
    let messages = [
        (2, 32, 48, 5),
        // It had no room before the end.
        (2, 48, 80, 6),
        // Nothing is said, and something that is not yet.
        (1, 1, 1, 0),
        (0, 80, 96, 5),
    ];
    log(&mut toy, 5, &messages, &text);
    let view = toy.view.clone();
    let found = view.log(&mut toy).unwrap();
    let short = |m: &Message| (m.number, m.time_ns, m.level, m.text.clone());
    let found: Vec<_> = found.items.iter().map(short).collect();
    assert_eq!(
        found,
        [
            (5, 5000, 6, "first".into()),
            (6, 6000, 6, "second".into()),
            (7, 7000, 6, String::new())
        ]
    );

    // No text reaches beyond its block.
    log(&mut toy, 5, &[(1, 80, 96, 0xffff)], &text);
    assert_eq!(view.log(&mut toy).unwrap().items[0].text, "third---");
    // Nor are there more messages than there is room for.
    log(&mut toy, 5, &[(1, 80, 96, 5); 5], &text);
    let told = view.log(&mut toy).unwrap_err().to_string();
    assert!(told.contains("number of messages"), "{told}");
}

#[test]
fn a_kernel_that_lacks_something_says_what() {
    let lacks = |what: &str| ViewError::Lacks { what: what.into() };
    let without = |names| toy::view(Age::New, names);
    let error = without(&["signal_struct"]).unwrap_err();
    assert_eq!(error, lacks("signal_struct.thread_head"));
    assert!(
        error
            .to_string()
            .contains("has no signal_struct.thread_head")
    );
    // What else there is can be looked at.
    let view = without(&["mm_struct", "dentry", "printk_info"]).unwrap();
    let mut toy = program(Age::New);
    let tasks = view.tasks(&mut toy);
    assert_eq!(tasks.items.len(), 3);
    let task = &tasks.items[0];
    assert_eq!(view.auxv(&mut toy, task), Err(lacks("mm_struct.pgd")));
    assert_eq!(view.log(&mut toy), Err(lacks("printk_info")));
}

/// Any memory: most of what is read there leads to somewhere in it, some to nowhere.
struct Any {
    seed: u64,
    /// How many different words there are.
    words: u64,
    bytes_read: u64,
}

impl Memory for Any {
    fn read(&mut self, address: u64, into: &mut [u8]) -> usize {
        self.bytes_read += 8 + into.len() as u64;
        for (at, place) in (address..=u64::MAX).zip(into.iter_mut()) {
            let mut mixed = ((at & !7) % (8 * self.words)) ^ self.seed;
            for _ in 0..2 {
                mixed = (mixed ^ mixed >> 31).wrapping_mul(0xd6e8_feb8_6659_fd93);
            }
            let word = match mixed >> 60 {
                0 => 0,
                1 => mixed,
                2 => mixed & 0xff,
                _ => 0xffff_8880_0000_0000 | mixed % self.words << 3,
            };
            *place = word.to_le_bytes()[(at & 7) as usize];
        }
        // Somewhere nothing is mapped.
        if address % 97 == self.seed % 97 {
            0
        } else {
            into.len()
        }
    }

    fn read_user(&mut self, page_table: u64, address: u64, into: &mut [u8]) -> usize {
        self.read(page_table ^ address, into)
    }
}

#[test]
fn no_memory_makes_a_look_at_it_endless() {
    for seed in 0..48_u64 {
        for age in BOTH {
            let view = toy::view(age, &[]).unwrap();
            let words = [16, 1 << 10, 1 << 40][seed as usize % 3];
            let mut memory = Any {
                seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                words,
                bytes_read: 0,
            };
            let current = view.current(&mut memory);
            let tasks = view.tasks(&mut memory);
            assert!(tasks.items.len() <= 2 << 14, "{seed}");
            let some = tasks.items.iter().take(20).chain(current.as_ref().ok());
            for task in some {
                let _ = view.executable(&mut memory, task);
                let _ = view.arguments(&mut memory, task);
                let _ = view.auxv(&mut memory, task);
                let _ = view.maps(&mut memory, task);
            }
            let _ = view.log(&mut memory);
            assert!(memory.bytes_read < 1 << 30, "{seed}: {}", memory.bytes_read);
        }
    }
}

#[test]
fn debians_kernels_say_where_everything_is() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = crate::Elf::parse(&kernel.elf).unwrap();
        let view = View::new(&elf).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(elf.physical(view.page_table()).is_some(), "{path}");
        for lacking in [
            view.programs.as_ref().err(),
            view.paths.as_ref().err(),
            view.maps.as_ref().err(),
            view.log.as_ref().err(),
        ] {
            assert_eq!(lacking, None, "{path}");
        }
    }
}
