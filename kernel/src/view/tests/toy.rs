//! A kernel of a few structures, to be written into a memory of a few bytes.

use std::collections::BTreeMap;

use crate::symbols::btf::Btf;
use crate::testing::BtfBuilder;
use crate::view::types::Types;
use crate::view::{Memory, View, ViewError};

const POINTER: u32 = 2;

/// Where the toy's variables are.
pub(super) const INIT_TASK: u64 = 0xffff_ffff_8200_0000;
pub(super) const CURRENT: u64 = 0x1_0000;
pub(super) const PER_CPU_OFFSET: u64 = 0xffff_ffff_8210_0000;
pub(super) const PRB: u64 = 0xffff_ffff_8220_0000;
pub(super) const SPECIAL: u64 = 0xffff_ffff_8230_0000;

/// How the toy's version is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    /// Mappings in a list, `state` of 64 bits, as in 5.10.
    Old,
    /// `pcpu_hot` and a maple tree, as in 6.2.
    New,
}

/// The types of a toy, without the structures whose names are among `without`.
pub(super) fn types(age: Age, without: &[&str]) -> Vec<u8> {
    let mut b = BtfBuilder::default();
    let char = b.int("char", 1);
    let short = b.int("short", 2);
    let int = b.int("int", 4);
    let long = b.int("long", 8);
    let pointer = b.derived(POINTER, "", 0);
    let list = b.structure(
        "list_head",
        16,
        &[("next", pointer, 0), ("prev", pointer, 8)],
    );
    let name = b.array(char, int, 16);
    let uid = b.structure("", 4, &[("val", int, 0)]);
    let counter = b.structure("", 8, &[("counter", long, 0)]);
    let vector = b.array(long, int, 8);
    let path = b.structure("path", 16, &[("mnt", pointer, 0), ("dentry", pointer, 8)]);
    let lower = b.structure("", 8, &[("hash", int, 0), ("len", int, 4)]);
    let text = b.structure("qstr", 16, &[("", lower, 0), ("name", pointer, 8)]);
    let hash = b.structure(
        "hlist_bl_node",
        16,
        &[("next", pointer, 0), ("pprev", pointer, 8)],
    );
    let mount = b.structure("vfsmount", 16, &[("mnt_root", pointer, 0)]);
    let tree = b.structure("maple_tree", 16, &[("ma_root", pointer, 8)]);
    let (pivots, slots) = (b.array(long, int, 15), b.array(pointer, int, 16));
    let (few_pivots, few_slots) = (b.array(long, int, 9), b.array(pointer, int, 10));
    let position = b.structure(
        "prb_data_blk_lpos",
        16,
        &[("begin", long, 0), ("next", long, 8)],
    );
    let descriptors = b.structure(
        "prb_desc_ring",
        40,
        &[
            ("count_bits", int, 0),
            ("descs", pointer, 8),
            ("infos", pointer, 16),
            ("head_id", counter, 24),
            ("tail_id", counter, 32),
        ],
    );
    let texts = b.structure(
        "prb_data_ring",
        16,
        &[("size_bits", int, 0), ("data", pointer, 8)],
    );
    let (state, areas) = match age {
        Age::Old => (("state", long, 112), ("mmap", pointer, 0)),
        Age::New => (("__state", int, 112), ("mm_mt", tree, 0)),
    };
    let hot = b.structure("", 16, &[("current_task", pointer, 8)]);
    let inner = b.structure("", 160, &[areas, ("pgd", pointer, 16)]);
    let mut structure = |name: &str, bytes, members: &[(&str, u32, u32)]| {
        if !without.contains(&name) {
            b.structure(name, bytes, members);
        }
    };
    structure("pcpu_hot", 64, &[("", hot, 0)]);
    structure(
        "task_struct",
        128,
        &[
            ("exit_state", int, 4),
            ("flags", int, 8),
            ("static_prio", int, 12),
            ("pid", int, 16),
            ("tgid", int, 20),
            ("real_parent", pointer, 24),
            ("comm", name, 32),
            ("tasks", list, 48),
            ("thread_node", list, 64),
            ("signal", pointer, 80),
            ("mm", pointer, 88),
            ("start_boottime", long, 96),
            ("cred", pointer, 104),
            state,
        ],
    );
    structure(
        "signal_struct",
        32,
        &[
            ("nr_threads", int, 0),
            ("leader", int, 4),
            ("thread_head", list, 8),
        ],
    );
    structure("cred", 16, &[("euid", uid, 8)]);
    structure(
        "mm_struct",
        160,
        &[
            ("", inner, 0),
            ("exe_file", pointer, 24),
            ("saved_auxv", vector, 32),
            ("arg_start", long, 96),
            ("arg_end", long, 104),
            ("start_brk", long, 112),
            ("brk", long, 120),
            ("start_stack", long, 128),
        ],
    );
    structure("file", 32, &[("f_path", path, 8)]);
    structure(
        "dentry",
        64,
        &[
            ("d_hash", hash, 0),
            ("d_parent", pointer, 16),
            ("d_name", text, 24),
        ],
    );
    structure(
        "mount",
        64,
        &[
            ("mnt_parent", pointer, 8),
            ("mnt_mountpoint", pointer, 16),
            ("mnt", mount, 24),
        ],
    );
    structure(
        "vm_area_struct",
        72,
        &[
            ("vm_start", long, 0),
            ("vm_end", long, 8),
            ("vm_flags", long, 16),
            ("vm_pgoff", long, 24),
            ("vm_file", pointer, 32),
            ("vm_ops", pointer, 40),
            ("vm_private_data", pointer, 48),
            ("vm_next", pointer, 56),
        ],
    );
    structure("vm_special_mapping", 8, &[("name", pointer, 0)]);
    structure(
        "maple_range_64",
        256,
        &[("pivot", pivots, 8), ("slot", slots, 128)],
    );
    structure(
        "maple_arange_64",
        256,
        &[("pivot", few_pivots, 8), ("slot", few_slots, 80)],
    );
    structure(
        "printk_ringbuffer",
        64,
        &[("desc_ring", descriptors, 0), ("text_data_ring", texts, 40)],
    );
    structure(
        "prb_desc",
        24,
        &[("state_var", counter, 0), ("text_blk_lpos", position, 8)],
    );
    if !without.contains(&"printk_info") {
        let members = [
            ("seq", long, 0, 0),
            ("ts_nsec", long, 64, 0),
            ("text_len", short, 128, 0),
        ];
        let level = ("level", char, 157, 3);
        b.bit_fields("printk_info", 24, &[&members[..], &[level]].concat());
    }
    b.enumeration(
        "desc_state",
        &[("desc_committed", 1), ("desc_finalized", 2)],
    );
    b.enumeration(
        "maple_type",
        &[
            ("maple_leaf_64", 1),
            ("maple_range_64", 2),
            ("maple_arange_64", 3),
        ],
    );
    b.build()
}

/// What is known of the toy.
pub(super) fn view(age: Age, without: &[&str]) -> Result<View, ViewError> {
    let bytes = types(age, without);
    let types = Types(Btf::parse(&bytes).expect("it was just built"));
    View::of(&types, &|name| {
        Some(match (name, age) {
            ("init_top_pgt", _) => 0xffff_ffff_8240_0000,
            ("init_task", _) => INIT_TASK,
            ("current_task", Age::Old) | ("pcpu_hot", Age::New) => CURRENT,
            ("__per_cpu_offset", _) => PER_CPU_OFFSET,
            ("prb", _) => PRB,
            ("special_mapping_vmops", _) => SPECIAL,
            _ => return None,
        })
    })
}

/// A memory of a few bytes; what was not written is not mapped.
#[derive(Clone, Debug)]
pub(super) struct Toy {
    types: Vec<u8>,
    kernel: BTreeMap<u64, u8>,
    /// By page table and address.
    users: BTreeMap<(u64, u64), u8>,
    pub view: View,
}

impl Toy {
    pub(super) fn new(age: Age) -> Toy {
        Toy {
            types: types(age, &[]),
            kernel: BTreeMap::new(),
            users: BTreeMap::new(),
            view: view(age, &[]).expect("nothing is missing"),
        }
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.kernel.extend((at..).zip(bytes.iter().copied()));
    }

    pub(super) fn write_user(&mut self, table: u64, at: u64, bytes: &[u8]) {
        let places = (at..).map(|at| (table, at));
        self.users.extend(places.zip(bytes.iter().copied()));
    }

    pub(super) fn unmap(&mut self, at: u64, bytes: u64) {
        self.kernel
            .retain(|place, _| !(at..at + bytes).contains(place));
    }

    /// Where a member of the structure at `base` is.
    pub(super) fn place(&self, base: u64, name: &'static str) -> u64 {
        let types = Types(Btf::parse(&self.types).expect("it was just built"));
        types.field(name).expect("the toy has it").of(base)
    }

    /// Sets a member of the structure at `base`.
    pub(super) fn set(&mut self, base: u64, name: &'static str, value: u64) {
        let types = Types(Btf::parse(&self.types).expect("it was just built"));
        let field = types.field(name).expect("the toy has it");
        let bytes = value.to_le_bytes();
        self.write(field.of(base), &bytes[..field.bytes.min(8) as usize]);
    }

    /// Links these places to a list, the first of which is its head.
    pub(super) fn link(&mut self, places: &[u64]) {
        for (at, next) in places.iter().zip(places.iter().cycle().skip(1)) {
            self.write(*at, &next.to_le_bytes());
        }
    }

    /// A task, which is on no list yet, with a process of its own and a parent.
    pub(super) fn task(&mut self, at: u64, pid: u64, parent: u64, name: &str) {
        for (member, value) in [
            ("task_struct.exit_state", 0),
            ("task_struct.flags", 0),
            ("task_struct.static_prio", 120),
            ("task_struct.pid", pid),
            ("task_struct.tgid", pid),
            ("task_struct.real_parent", parent),
            ("task_struct.signal", at + 0x1000),
            ("task_struct.mm", 0),
            ("task_struct.start_boottime", pid * 1_000_000_000),
            ("task_struct.cred", at + 0x2000),
        ] {
            self.set(at, member, value);
        }
        let state = self.place(at, "task_struct.cred") + 8;
        self.write(state, &[1, 0, 0, 0, 0, 0, 0, 0]);
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(16, 0);
        self.write(self.place(at, "task_struct.comm"), &bytes);
        self.set(at + 0x1000, "signal_struct.nr_threads", 1);
        self.set(at + 0x1000, "signal_struct.leader", 0);
        self.set(at + 0x2000, "cred.euid.val", 33);
        self.threads(at, &[at]);
    }

    /// These are the threads of the process whose first one is at `leader`.
    pub(super) fn threads(&mut self, leader: u64, threads: &[u64]) {
        let mut places = vec![self.place(leader + 0x1000, "signal_struct.thread_head")];
        places.extend(
            threads
                .iter()
                .map(|at| self.place(*at, "task_struct.thread_node")),
        );
        self.link(&places);
    }

    /// These are the processes that there are.
    pub(super) fn processes(&mut self, tasks: &[u64]) {
        let all = [&[INIT_TASK], tasks].concat();
        let places: Vec<u64> = all
            .iter()
            .map(|at| self.place(*at, "task_struct.tasks"))
            .collect();
        self.link(&places);
    }

    /// A directory entry, in a directory.
    pub(super) fn entry(&mut self, at: u64, parent: u64, name: &str) {
        self.set(at, "dentry.d_hash.pprev", 1);
        self.set(at, "dentry.d_parent", parent);
        self.set(at, "dentry.d_name.len", name.len() as u64);
        self.set(at, "dentry.d_name.name", at + 0x100);
        self.write(at + 0x100, name.as_bytes());
    }

    /// What is mounted on the entry `on` of the mount `parent`; returns the address of its `struct vfsmount`.
    pub(super) fn mount(&mut self, at: u64, root: u64, parent: u64, on: u64) -> u64 {
        self.set(at, "mount.mnt_parent", parent);
        self.set(at, "mount.mnt_mountpoint", on);
        let mounted = self.place(at, "mount.mnt");
        self.set(mounted, "vfsmount.mnt_root", root);
        mounted
    }

    pub(super) fn file(&mut self, at: u64, mounted: u64, entry: u64) {
        self.set(at, "file.f_path.mnt", mounted);
        self.set(at, "file.f_path.dentry", entry);
    }
}

impl Memory for Toy {
    fn read(&mut self, address: u64, into: &mut [u8]) -> usize {
        let found = (address..).map(|at| self.kernel.get(&at));
        copy(found, into)
    }

    fn read_user(&mut self, page_table: u64, address: u64, into: &mut [u8]) -> usize {
        let found = (address..).map(|at| self.users.get(&(page_table, at)));
        copy(found, into)
    }
}

fn copy<'a>(from: impl Iterator<Item = Option<&'a u8>>, into: &mut [u8]) -> usize {
    let found = from.map_while(|byte| byte);
    let places = into.iter_mut().zip(found);
    places.map(|(place, byte)| *place = *byte).count()
}
