//! What the kernel has said: the ring buffer of `printk`, as it is since 5.10.

use super::error::{Listing, ViewError};
use super::memory::Memory;
use super::types::{Bits, Field, Lookup, Types, variable};

/// A buffer has no more descriptors.
const LINES_BITS: u64 = 18;
/// Nor more bytes.
const TEXT_BITS: u64 = 31;
/// A message is no longer: its length has 16 bits.
const MESSAGE_BYTES: u64 = 1 << 16;
/// More bytes of messages are not kept.
const TEXT_BYTES: usize = 64 << 20;
/// A descriptor's state is in the upper two bits (kernel/printk/printk_ringbuffer.h, `DESC_FLAGS_SHIFT`); below them is its
/// number.
const STATE_SHIFT: u32 = 62;
/// A text has the number of its descriptor before it.
const NUMBER_BYTES: u64 = 8;

/// A message of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its number; the first one is 0.
    pub number: u64,
    /// When it was written, in nanoseconds of the kernel's own clock for that.
    pub time_ns: u64,
    /// How urgent it is, from 0 (an emergency) to 7 (for debugging).
    pub level: u8,
    /// What it says; may have several lines.
    pub text: String,
}

/// Where the buffer is, and what is in it.
#[derive(Clone, Debug)]
pub(super) struct Log {
    /// The address of a pointer to it: `prb`.
    buffer: u64,
    count_bits: Field,
    descriptors: Field,
    infos: Field,
    head: Field,
    tail: Field,
    text_bits: Field,
    text: Field,
    descriptor_bytes: u32,
    state: Field,
    begin: Field,
    next: Field,
    info_bytes: u32,
    number: Field,
    time: Field,
    length: Field,
    level: Bits,
    finished: [u64; 2],
}

impl Log {
    pub(super) fn find(types: &Types<'_>, lookup: Lookup<'_>) -> Result<Log, ViewError> {
        let field = |name| types.field(name);
        let state = |name| Ok(u64::from(types.constant("desc_state", name)?));
        Ok(Log {
            buffer: variable(lookup, "prb")?,
            count_bits: field("printk_ringbuffer.desc_ring.count_bits")?,
            descriptors: field("printk_ringbuffer.desc_ring.descs")?,
            infos: field("printk_ringbuffer.desc_ring.infos")?,
            head: field("printk_ringbuffer.desc_ring.head_id.counter")?,
            tail: field("printk_ringbuffer.desc_ring.tail_id.counter")?,
            text_bits: field("printk_ringbuffer.text_data_ring.size_bits")?,
            text: field("printk_ringbuffer.text_data_ring.data")?,
            descriptor_bytes: types.bytes("prb_desc")?,
            state: field("prb_desc.state_var.counter")?,
            begin: field("prb_desc.text_blk_lpos.begin")?,
            next: field("prb_desc.text_blk_lpos.next")?,
            info_bytes: types.bytes("printk_info")?,
            number: field("printk_info.seq")?,
            time: field("printk_info.ts_nsec")?,
            length: field("printk_info.text_len")?,
            level: types.bits("printk_info.level")?,
            finished: [state("desc_committed")?, state("desc_finalized")?],
        })
    }

    /// The messages that are there, from the oldest on.
    pub(super) fn messages(&self, memory: &mut dyn Memory) -> Result<Listing<Message>, ViewError> {
        let buffer = memory.word(self.buffer, "prb")?;
        let bits = |memory: &mut dyn Memory, field: Field, most: u64| {
            let value = memory.field(buffer, field)?;
            let strange = ViewError::Strange {
                what: field.name,
                value,
            };
            (value <= most).then(|| 1 << value).ok_or(strange)
        };
        let count: u64 = bits(memory, self.count_bits, LINES_BITS)?;
        let text_bytes = bits(memory, self.text_bits, TEXT_BITS)?;
        let descriptors = memory.field(buffer, self.descriptors)?;
        let infos = memory.field(buffer, self.infos)?;
        let text = memory.field(buffer, self.text)?;
        let mask = (1 << STATE_SHIFT) - 1;
        let tail = memory.field(buffer, self.tail)? & mask;
        let head = memory.field(buffer, self.head)? & mask;
        let there = head.wrapping_sub(tail) & mask;
        if there >= count {
            return Err(ViewError::Strange {
                what: "number of messages",
                value: there,
            });
        }
        let mut found = Listing::default();
        let mut room = TEXT_BYTES;
        for id in (0..=there).map(|later| tail.wrapping_add(later) & mask) {
            let at = |table: u64, bytes: u32| table.wrapping_add(id % count * u64::from(bytes));
            let descriptor = at(descriptors, self.descriptor_bytes);
            let info = at(infos, self.info_bytes);
            let mut message = || {
                let state = memory.field(descriptor, self.state)?;
                // One that is being written, or that is not this one any more.
                if state & mask != id || !self.finished.contains(&(state >> STATE_SHIFT)) {
                    return Ok(None);
                }
                let begin = memory.field(descriptor, self.begin)?;
                let next = memory.field(descriptor, self.next)?;
                let length = memory.field(info, self.length)?.min(MESSAGE_BYTES);
                let place = place(begin, next, text_bytes, length);
                let mut bytes = vec![0; place.end.saturating_sub(place.start) as usize];
                memory.fill(text.wrapping_add(place.start), "log's text", &mut bytes)?;
                Ok(Some(Message {
                    number: memory.field(info, self.number)?,
                    time_ns: memory.field(info, self.time)?,
                    level: self.level(memory, info)?,
                    text: String::from_utf8_lossy(&bytes).into_owned(),
                }))
            };
            match message() {
                Ok(None) => {}
                Ok(Some(message)) => {
                    let Some(left) = room.checked_sub(message.text.len()) else {
                        found.note(ViewError::TooMany {
                            what: "bytes of messages",
                            limit: TEXT_BYTES,
                        });
                        break;
                    };
                    room = left;
                    found.items.push(message);
                }
                Err(error) => found.note(error),
            }
        }
        Ok(found)
    }

    fn level(&self, memory: &mut dyn Memory, info: u64) -> Result<u8, ViewError> {
        let Bits { name, shift, count } = self.level;
        let mut byte = [0];
        let at = info.wrapping_add(u64::from(shift / 8));
        memory.fill(at, name, &mut byte)?;
        let value = u32::from(byte[0]) >> (shift % 8);
        Ok((value & ((1 << count.min(8)) - 1)) as u8)
    }
}

/// Where a text of `length` bytes is in the buffer whose descriptor says that its block goes from `begin` to `next`. These
/// two count on, round after round. A block that would not fit before the end is at the beginning of the next round. One
/// without a text is at an odd place.
fn place(begin: u64, next: u64, bytes: u64, length: u64) -> std::ops::Range<u64> {
    let (round, last) = (begin / bytes, next.wrapping_sub(1) / bytes);
    if begin & 1 != 0 {
        return 0..0;
    }
    let block = if round == last { begin % bytes } else { 0 };
    let end = next.wrapping_sub(1) % bytes + 1;
    let start = block + NUMBER_BYTES;
    start..end.min(start.saturating_add(length)).max(start)
}
