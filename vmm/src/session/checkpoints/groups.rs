//! Groups of pages, out of the file: when they are wanted, or ahead of that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;
use std::thread::Builder;

use super::format::{GROUP_BYTES, GROUP_PAGES};
use super::table::{PageName, PageTable};
use super::unpacked::{GROUPS_KEPT, Unpacked};
use super::writer::Group;
use super::{CheckpointError, CheckpointFile, GROUPS_AT_ONCE};

/// How far apart what is read at once may be, and how long it is at most.
const GAP_BYTES: u64 = 256 << 10;
const SPAN_BYTES_MAX: u64 = 4 << 20;

impl CheckpointFile {
    /// Has those groups unpacked, which are in ascending order.
    pub(super) fn unpack(&mut self, groups: &[u64]) -> Result<(), CheckpointError> {
        self.unpacked.make_room();
        while groups.iter().any(|group| !self.unpacked.has(*group))
            && let Some(ahead) = &self.ahead
        {
            match ahead.recv() {
                Ok(piece) => self.unpacked.take(piece),
                // It is done. What went wrong there goes wrong again where it matters.
                Err(_) => self.ahead = None,
            }
        }
        let missing = self.missing(groups)?;
        unpack_groups(&self.file, missing, &mut self.unpacked)
    }

    /// Those groups that are not unpacked, as they stand in the file.
    fn missing(&self, groups: &[u64]) -> Result<Vec<(u64, Group)>, CheckpointError> {
        let mut missing = BTreeMap::new();
        for group in groups.iter().filter(|group| !self.unpacked.has(**group)) {
            let place = self.groups.get(*group as usize).copied();
            let place = place.filter(|place| place.bytes as usize <= 2 * GROUP_BYTES);
            let place = place.ok_or(CheckpointError::Damaged("there is no such page"))?;
            missing.insert(place.at, (*group, place));
        }
        Ok(missing.into_values().collect())
    }

    /// Begins to unpack what one of the checkpoints has.
    pub(super) fn expect_all(&mut self, number: usize) {
        let pages = PageTable::default().changes_to(&self.table(number));
        let names = pages.into_iter().map(|(_, name)| name);
        self.unpack_ahead(names);
    }

    /// Begins to unpack the pages of these names, as far as they can be kept, beside whoever puts them somewhere.
    pub(super) fn unpack_ahead(&mut self, names: impl Iterator<Item = PageName>) {
        if self.ahead.is_some() {
            return;
        }
        let names = names.filter(|name| *name >= PageName::FIRST);
        let groups: BTreeSet<u64> = names.map(|name| group_of(name).0).collect();
        let groups: Vec<u64> = groups.into_iter().take(GROUPS_KEPT).collect();
        let (Ok(missing), Ok(file)) = (self.missing(&groups), self.file.try_clone()) else {
            return;
        };
        if missing.len() <= GROUPS_AT_ONCE {
            return;
        }
        let (sender, ahead) = channel();
        let unpack = move || {
            for groups in missing.chunks(GROUPS_AT_ONCE) {
                let mut piece = Unpacked::new();
                let unpacked = unpack_groups(&file, groups.to_vec(), &mut piece);
                if unpacked.is_err() || sender.send(piece).is_err() {
                    return;
                }
            }
        };
        let started = Builder::new().name("unpack".into()).spawn(unpack);
        self.ahead = started.is_ok().then_some(ahead);
    }
}

/// Reads and unpacks groups, in the order of the file; neighbours are read at once.
fn unpack_groups(
    file: &File,
    mut missing: Vec<(u64, Group)>,
    unpacked: &mut Unpacked,
) -> Result<(), CheckpointError> {
    while let Some((_, first)) = missing.first().copied() {
        let mut end = first.at + u64::from(first.bytes);
        let near = missing.iter().take_while(|(_, place)| {
            let next = place.at + u64::from(place.bytes);
            let is_near = place.at <= end + GAP_BYTES && next - first.at <= SPAN_BYTES_MAX;
            end = if is_near { next } else { end };
            is_near
        });
        let count = near.count();
        let mut packed = vec![0; (end - first.at) as usize];
        file.read_exact_at(&mut packed, first.at)?;
        let groups = missing.drain(..count).map(|(group, place)| {
            let start = (place.at - first.at) as usize;
            let packed = &packed[start..start + place.bytes as usize];
            (group, packed, place.check)
        });
        unpacked.keep(&groups.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// The group of a page that is in the file, and its number there.
pub(super) fn group_of(name: PageName) -> (u64, usize) {
    let number = name.0 - PageName::FIRST.0;
    (number / GROUP_PAGES, (number % GROUP_PAGES) as usize)
}
