//! Hostile kernel files cost no more memory than their length allows. In a file of its own, with one test, since it counts
//! the allocations of the whole process.

use std::alloc::System;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cap::Cap;
use hindsight_replay::rng::Rng;
use hindsight_tests::drive::{Loaded, limit_allocations_by, load_kernel, seal_kernel};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const SEEDS: u64 = 1_000;
/// The slowest of these takes a hundredth of it.
const LOAD_TIME_MAX: Duration = Duration::from_secs(60);

fn limit(bytes: usize) {
    let limit = ALLOCATOR.allocated().saturating_add(bytes);
    ALLOCATOR.set_limit(usize::MAX).expect("all is below it");
    ALLOCATOR
        .set_limit(limit)
        .expect("it is above what is allocated");
}

/// A file that would take more than it may ends the process; its name is shown first.
fn boot(name: &str, data: &[u8]) -> Option<Loaded> {
    let started = Instant::now();
    eprintln!("{name}");
    let loaded = load_kernel(data);
    assert!(
        started.elapsed() < LOAD_TIME_MAX,
        "{name} took {:?}",
        started.elapsed()
    );
    loaded
}

/// Sections for `seal_kernel`: 0 is `.text`, 2 `.altinstr_replacement`, 3 `.altinstructions`, 4 `.rodata`, 6 `.BTF`.
fn sealed(sections: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut contents = vec![1];
    for (name, bytes) in sections {
        for part in bytes.chunks(0xffff) {
            contents.push(*name);
            contents.extend((part.len() as u16).to_le_bytes());
            contents.extend(part);
        }
    }
    contents
}

/// An ELF file of one segment, whose `count` sections all are the same code.
fn overlapping(count: u16) -> Vec<u8> {
    let mut file = vec![0];
    file.extend(seal_kernel(
        &sealed(&[(0, [0x0f, 0x31].repeat(0x4000))])[1..],
    ));
    let headers = u64::from_le_bytes(file[1 + 40..][..8].try_into().unwrap()) as usize + 1;
    let section = file[headers + 64..][..64].to_vec();
    let names = file[headers + 128..][..64].to_vec();
    file.truncate(headers + 64);
    for _ in 0..count {
        file.extend(&section);
    }
    file.extend(names);
    file[1 + 60..][..2].copy_from_slice(&(count + 2).to_le_bytes());
    file[1 + 62..][..2].copy_from_slice(&(count + 1).to_le_bytes());
    file
}

/// `levels` structures without a name, each of which has `members` of the one before.
fn nested_types(levels: u32, members: u32) -> Vec<u8> {
    let (mut types, strings) = (Vec::new(), b"\0module\0".to_vec());
    for level in 0..levels {
        let name = u32::from(level + 1 == levels);
        for word in [name, 4 << 24 | members, 8] {
            types.extend(word.to_le_bytes());
        }
        for _ in 0..members {
            for word in [0, level, 0] {
                types.extend(word.to_le_bytes());
            }
        }
    }
    let mut btf = vec![0x9f, 0xeb, 1, 0];
    for word in [
        24,
        0,
        types.len() as u32,
        types.len() as u32,
        strings.len() as u32,
    ] {
        btf.extend(word.to_le_bytes());
    }
    [btf, types, strings].concat()
}

#[test]
fn no_kernels_file_costs_more_memory_or_time_than_its_length_allows() {
    limit_allocations_by(limit);
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/kernel");
    let mut paths: Vec<_> = std::fs::read_dir(corpus)
        .expect("the corpus is there")
        .map(|file| file.expect("it reads").path())
        .collect();
    paths.sort();
    for path in paths {
        let loaded = boot(
            &path.display().to_string(),
            &std::fs::read(&path).expect("it reads"),
        );
        // These are kernels, and reach all there is.
        let name = path
            .file_name()
            .expect("a file")
            .to_string_lossy()
            .into_owned();
        if name.starts_with("modules-") {
            let expected = Loaded {
                sites: 5,
                module_calls: 1,
                spans: 2,
                transmits: 1,
            };
            assert_eq!(loaded, Some(expected), "{name}");
        }
        let is_image = name.starts_with("bzimage-");
        assert!(!is_image || loaded.is_some(), "{name}: not loaded");
    }
    for seed in 0..SEEDS {
        let mut rng = Rng::new(seed, 3);
        let length = 16 + rng.below(3_000);
        let mut data: Vec<u8> = (0..length).map(|_| rng.number() as u8).collect();
        data[0] |= 1;
        boot(&format!("seed {seed}"), &data);
    }
    boot("overlapping sections", &overlapping(4_000));
    let rdtsc = [0x0f, 0x31].repeat(400_000);
    boot("nothing but rdtsc", &sealed(&[(0, rdtsc)]));
    let few = [[0x0f, 0x31].repeat(300), vec![0x90; 0x8000]].concat();
    boot(
        "nested types",
        &sealed(&[(0, few.clone()), (6, nested_types(30, 400))]),
    );
    // Each of these entries patches the first five bytes of the text with themselves, as far as anybody can tell.
    let text_bytes = few.len().next_multiple_of(8) as i32;
    let patches = (0..4_600).flat_map(|index: i32| {
        let at = text_bytes + 14 * index;
        let mut entry = [(-at).to_le_bytes(), (-at - 4).to_le_bytes()].concat();
        entry.extend([0x6b, 0, 0, 0, 5, 2]);
        entry
    });
    boot(
        "many alternatives",
        &sealed(&[(0, few), (3, patches.collect())]),
    );
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
    let tables = [&[0; 48][..], digits, &[0; 4]].concat().repeat(15_000);
    boot(
        "many symbol tables",
        &sealed(&[(0, vec![0x0f, 0x31]), (4, tables)]),
    );
}
