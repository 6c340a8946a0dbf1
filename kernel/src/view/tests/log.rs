//! The kernel's messages.

use super::some;
use super::toy::{Age, PRB, Toy};
use crate::view::Message;

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
