//! The index of a journal: where its frames are. It can always be made anew, so nothing depends on it.

use hindsight_replay::IndexEntry;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

#[derive(Debug, Serialize, Deserialize)]
struct Index {
    entries: Vec<IndexEntry>,
}

/// An index as it is written.
pub fn to_bytes(entries: &[IndexEntry]) -> Vec<u8> {
    let entries = entries.to_vec();
    let body = postcard::to_stdvec(&Index { entries }).expect("plain values serialise");
    [&xxh3_64(&body).to_le_bytes(), body.as_slice()].concat()
}

/// What an index says of a journal of that many bytes; `None` if it is damaged, or that of another journal.
pub fn from_bytes(bytes: &[u8], journal_bytes: u64) -> Option<Vec<IndexEntry>> {
    let (check, body) = bytes.split_first_chunk::<8>()?;
    if xxh3_64(body).to_le_bytes() != *check {
        return None;
    }
    let index: Index = postcard::from_bytes(body).ok()?;
    let last = index.entries.last()?;
    (last.offset < journal_bytes).then_some(index.entries)
}
