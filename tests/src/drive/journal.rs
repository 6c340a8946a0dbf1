//! The target that reads journals: any bytes, or bytes that are sealed first, so that what is behind the
//! checks is reached.

use hindsight_devices::{Board, Ram};
use hindsight_replay::{
    Event, FRAME_HEAD_BYTES, FRAME_MAGIC, JournalReader, MAGIC, TailReason, VERSION,
};
use vm_memory::GuestAddress;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Reads `data`: its first byte says whether it is a file as it is (even) or the contents of one to be
/// sealed (odd).
pub fn read(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    if first & 1 == 0 {
        read_file(rest);
    } else {
        read_file(&seal(rest));
    }
}

/// A journal whose checks are right. Its head and then each frame's events are `contents`, each behind its
/// length in two bytes, little-endian; what a frame covers follows from its number.
pub fn seal(contents: &[u8]) -> Vec<u8> {
    let mut rest = contents;
    let mut next = || {
        let (length, behind) = rest.split_at_checked(2)?;
        let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
        let (part, behind) = behind.split_at(length.min(behind.len()));
        rest = behind;
        Some(part)
    };
    let head = next().unwrap_or_default();
    let mut seed = xxh3_64_with_seed(head, u64::from(VERSION));
    let mut file = MAGIC.to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend((head.len() as u32).to_le_bytes());
    file.extend(seed.to_le_bytes());
    file.extend(head);
    let mut number = 0;
    while let Some(events) = next() {
        seed = seal_frame(&mut file, number, events, seed);
        number += 1;
    }
    file
}

/// Adds a frame; returns the seed of the next.
fn seal_frame(file: &mut Vec<u8>, number: u32, events: &[u8], seed: u64) -> u64 {
    // One frame of zstd, of one raw block (RFC 8878, 3.1.1).
    let length = events.len() as u32;
    let mut payload = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    payload.extend(length.to_le_bytes());
    payload.extend(&(length << 3 | 1).to_le_bytes()[..3]);
    payload.extend(events);
    let mut head = FRAME_MAGIC.to_vec();
    head.extend(number.to_le_bytes());
    head.extend((payload.len() as u32).to_le_bytes());
    head.extend(length.to_le_bytes());
    head.extend((u64::from(number) << 20).to_le_bytes());
    head.extend((u64::from(number + 1) << 20).to_le_bytes());
    head.resize(FRAME_HEAD_BYTES, 0);
    let check = xxh3_64_with_seed(&payload, xxh3_64_with_seed(&head, seed));
    head[48..].copy_from_slice(&check.to_le_bytes());
    file.extend(head);
    file.extend(payload);
    check
}

/// Whatever the file says: its reading ends, and what it says can be given to a board.
fn read_file(file: &[u8]) {
    let Ok(mut reader) = JournalReader::open(file) else {
        return;
    };
    let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("64 KiB can be mapped");
    let mut board = Board::new(&reader.header().machine.devices);
    let mut frames = 0;
    while let Some(frame) = reader.next_frame().expect("memory can be read") {
        frames += 1;
        assert!(
            frames * FRAME_HEAD_BYTES <= file.len(),
            "more frames than there is room for"
        );
        assert_eq!(frame.entries.len(), frame.sizes.len());
        for entry in frame.entries {
            assert!(
                entry.exits <= frame.head.through,
                "an event behind its frame"
            );
            if let Event::Input(input) = entry.event {
                board.accept(input, &ram);
                board.take_outputs();
            }
        }
    }
    let tail = reader.tail().expect("what is read has an end");
    assert!(tail.offset <= file.len() as u64);
    if tail.reason == TailReason::Closed {
        assert_eq!(tail.offset, file.len() as u64);
    }
}
