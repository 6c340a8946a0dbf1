//! Two file systems compared name by name.
//!
//! Both are a guest's work and may be damaged on purpose: a directory in itself, a file of more bytes than there are,
//! a million names for nothing. Directories are gone through one after the other, each once; a file's content is
//! read only where its bytes can differ; and names, changes, paths and bytes read have each a bound. Where one is
//! reached that is said, and what was found until then stands.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::budget::Budget;
use super::ext::{ExtError, FileSystem, Inode, Kind, Piece, ROOT, Source};
use super::files::{Change, FileChange};

/// How deep directories may nest.
const DEPTH_MAX: usize = 512;
/// Directories that may wait to be compared.
const WAITING_MAX: usize = 1_000_000;
/// Places that cannot be read of which each is told.
const UNREAD_MAX: usize = 20;
/// Content that is compared at once, in bytes.
const PIECE_BYTES: u64 = 1 << 16;

/// What became of a comparison.
#[derive(Debug, Default)]
pub(super) struct Compared {
    /// The changes, in the order of their paths.
    pub changes: Vec<FileChange>,
    /// What could not be compared.
    pub notes: Vec<String>,
}

/// Whether bytes at these two places, the second on the disk as it is now, are known to be the same.
pub(super) type Untouched<'a> = &'a dyn Fn(u64, u64, u64) -> bool;

/// Compares a file system that was there, is there, or both.
pub(super) fn compare<S: Source>(
    before: Option<FileSystem<S>>,
    now: Option<FileSystem<S>>,
    untouched: Untouched<'_>,
    budget: &Budget,
) -> Compared {
    let mut comparison = Comparison {
        before,
        now,
        untouched,
        changes: Vec::new(),
        entered: Default::default(),
        unread: 0,
        notes: Vec::new(),
        budget,
        linked: BTreeMap::new(),
    };
    if let Err(why) = comparison.all() {
        comparison
            .notes
            .push(format!("the rest was not compared: {why}"));
    }
    if comparison.unread > UNREAD_MAX {
        let more = comparison.unread - UNREAD_MAX;
        comparison
            .notes
            .push(format!("and {more} more places cannot be read"));
    }
    // A directory's own names come right after it.
    let mut changes = comparison.changes;
    changes.sort_by(|(one, ..), (other, ..)| {
        one.split(|byte| *byte == b'/')
            .cmp(other.split(|byte| *byte == b'/'))
    });
    Compared {
        changes: changes
            .into_iter()
            .map(|(path, change, what)| FileChange {
                change,
                partition: None,
                path: printable(&path),
                what,
            })
            .collect(),
        notes: comparison.notes,
    }
}

/// A directory's name and where it is.
struct Place {
    above: Option<Rc<Place>>,
    name: Vec<u8>,
    depth: usize,
}

impl Place {
    /// The path of `name` in the directory at `place`.
    fn path(place: &Option<Rc<Place>>, name: &[u8]) -> Vec<u8> {
        let mut names = vec![name];
        let mut next = place;
        while let Some(place) = next {
            names.push(&place.name);
            next = &place.above;
        }
        names
            .iter()
            .rev()
            .flat_map(|name| [b"/", *name].concat())
            .collect()
    }
}

/// A directory that is still to be compared: what it was, and what it is.
struct Waiting {
    place: Option<Rc<Place>>,
    inodes: (Option<u32>, Option<u32>),
}

struct Comparison<'a, S> {
    before: Option<FileSystem<S>>,
    now: Option<FileSystem<S>>,
    untouched: Untouched<'a>,
    changes: Vec<(Vec<u8>, Change, Vec<&'static str>)>,
    /// Directories that were met, before and now: a sound file system has each in one place.
    entered: (BTreeSet<u32>, BTreeSet<u32>),
    unread: usize,
    notes: Vec<String>,
    budget: &'a Budget,
    /// What came out for inodes that have several names.
    linked: BTreeMap<(u32, u32), bool>,
}

/// Why the comparison has to end.
type Stop = String;

impl<S: Source> Comparison<'_, S> {
    fn all(&mut self) -> Result<(), Stop> {
        let root = |system: &Option<FileSystem<S>>| system.as_ref().map(|_| ROOT);
        let inodes = (root(&self.before), root(&self.now));
        self.entered.0.extend(inodes.0);
        self.entered.1.extend(inodes.1);
        let mut waiting = vec![Waiting {
            place: None,
            inodes,
        }];
        while let Some(next) = waiting.pop() {
            self.directory(&next, &mut waiting)?;
            if waiting.len() > WAITING_MAX {
                return Err(format!("there are more than {WAITING_MAX} directories"));
            }
        }
        Ok(())
    }

    /// What `found` holds; where a place cannot be read that is reported, and what cannot go on ends all.
    fn or_told<T>(&mut self, path: &[u8], found: Result<T, ExtError>) -> Result<Option<T>, Stop> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(why @ (ExtError::Damaged(_) | ExtError::Unsupported(_))) => {
                self.told(path, &why.to_string());
                Ok(None)
            }
            Err(why) => Err(why.to_string()),
        }
    }

    fn told(&mut self, path: &[u8], why: &str) {
        self.unread += 1;
        if self.unread <= UNREAD_MAX {
            self.notes.push(format!("{}: {why}", printable(path)));
        }
    }

    fn directory(&mut self, at: &Waiting, waiting: &mut Vec<Waiting>) -> Result<(), Stop> {
        let path = || match &at.place {
            None => b"/".to_vec(),
            Some(place) => Place::path(&place.above, &place.name),
        };
        let list = |system: &Option<FileSystem<S>>, inode| match (system, inode) {
            (Some(system), Some(inode)) => {
                system.inode(inode).and_then(|inode| system.names(&inode))
            }
            _ => Ok(BTreeMap::new()),
        };
        let both = list(&self.before, at.inodes.0)
            .and_then(|before| Ok((before, list(&self.now, at.inodes.1)?)));
        let Some((mut before, now)) = self.or_told(&path(), both)? else {
            return Ok(());
        };
        if !self.budget.names((before.len() + now.len()) as u64) {
            return Err("there are more names than are gone through".into());
        }
        for (name, inode) in now {
            let old = before.remove(&name);
            self.name(&at.place, name, (old, Some(inode)), waiting)?;
        }
        for (name, inode) in before {
            self.name(&at.place, name, (Some(inode), None), waiting)?;
        }
        Ok(())
    }

    fn name(
        &mut self,
        place: &Option<Rc<Place>>,
        name: Vec<u8>,
        numbers: (Option<u32>, Option<u32>),
        waiting: &mut Vec<Waiting>,
    ) -> Result<(), Stop> {
        let read = |system: &Option<FileSystem<S>>, inode| match (system, inode) {
            (Some(system), Some(inode)) => system.inode(inode).map(Some),
            _ => Ok(None),
        };
        let both = read(&self.before, numbers.0)
            .and_then(|before| Ok((before, read(&self.now, numbers.1)?)));
        let Some((old, new)) = self.or_told(&Place::path(place, &name), both)? else {
            return Ok(());
        };
        match (&old, &new) {
            (Some(old), Some(new)) if old.is_like(new) => {
                let what = self.differences(old, new);
                let path = || Place::path(place, &name);
                match self.or_told(&path(), what)? {
                    Some(what) if !what.is_empty() => self.tell(Change::Modified, path(), what)?,
                    _ => {}
                }
            }
            (old, new) => {
                for (inode, change) in [(old, Change::Removed), (new, Change::Added)] {
                    if inode.is_some() {
                        self.tell(change, Place::path(place, &name), Vec::new())?;
                    }
                }
            }
        }
        self.enter(place, name, (old, new), waiting);
        Ok(())
    }

    /// Lets what is a directory, before, now, or both, wait for its turn.
    fn enter(
        &mut self,
        place: &Option<Rc<Place>>,
        name: Vec<u8>,
        (old, new): (Option<Inode>, Option<Inode>),
        waiting: &mut Vec<Waiting>,
    ) {
        let number = |inode: Option<Inode>| {
            inode
                .filter(|inode| inode.kind() == Kind::Directory)
                .map(|inode| inode.number)
        };
        let (old, new) = (number(old), number(new));
        if (old, new) == (None, None) {
            return;
        }
        let is_old = old.is_none_or(|inode| self.entered.0.insert(inode));
        let is_new = new.is_none_or(|inode| self.entered.1.insert(inode));
        let depth = place.as_ref().map_or(0, |place| place.depth) + 1;
        let why = if !(is_old && is_new) {
            "it is in more than one directory, which none can be"
        } else if depth > DEPTH_MAX {
            "it is in more directories within each other than are gone through"
        } else {
            let place = Place {
                above: place.clone(),
                name,
                depth,
            };
            waiting.push(Waiting {
                place: Some(Rc::new(place)),
                inodes: (old, new),
            });
            return;
        };
        self.told(&Place::path(place, &name), why);
    }

    fn tell(&mut self, change: Change, path: Vec<u8>, what: Vec<&'static str>) -> Result<(), Stop> {
        if !self.budget.change(path.len() as u64) {
            return Err("there are more changes than are reported".into());
        }
        self.changes.push((path, change, what));
        Ok(())
    }

    /// What two inodes of one kind and name do not have in common. A directory's size and time say only that
    /// something in it has changed, which is reported by itself.
    fn differences(&mut self, old: &Inode, new: &Inode) -> Result<Vec<&'static str>, ExtError> {
        let has_content = matches!(old.kind(), Kind::File | Kind::Link);
        let same_size = !has_content || old.size == new.size;
        let same_content = match old.kind() {
            Kind::File | Kind::Link => same_size && self.same_content(old, new)?,
            Kind::Device(..) => old.kind() == new.kind(),
            Kind::Directory | Kind::Other(_) => true,
        };
        let told = [
            ("content", !same_content),
            ("size", !same_size),
            ("mode", old.mode() != new.mode()),
            ("owner", old.owner() != new.owner()),
            (
                "time",
                old.kind() != Kind::Directory && old.modified() != new.modified(),
            ),
        ];
        Ok(told
            .into_iter()
            .filter(|(_, differs)| *differs)
            .map(|(name, _)| name)
            .collect())
    }

    /// Whether two of one kind, name and size have the same in them. What may differ is read, all of it: a change
    /// need not show in the times, and blocks that were never written can have come from another file.
    fn same_content(&mut self, old: &Inode, new: &Inode) -> Result<bool, ExtError> {
        let key = (old.number, new.number);
        let several = old.links() > 1 || new.links() > 1;
        if let Some(same) = self.linked.get(&key).filter(|_| several) {
            return Ok(*same);
        }
        let (Some(before), Some(now)) = (&self.before, &self.now) else {
            return Ok(false);
        };
        let same = if old.kind() == Kind::Link {
            before.link_target(old)? == now.link_target(new)?
        } else {
            let contents = (Content::of(before, old)?, Content::of(now, new)?);
            same(contents, old.size, self.untouched, self.budget)?
        };
        if several {
            self.linked.insert(key, same);
        }
        Ok(same)
    }
}

/// The bytes of a file.
struct Content<'a, S> {
    system: &'a FileSystem<S>,
    pieces: Vec<Piece>,
    /// Those that stand in the inode.
    inline: Option<Vec<u8>>,
}

impl<'a, S: Source> Content<'a, S> {
    fn of(system: &'a FileSystem<S>, inode: &Inode) -> Result<Content<'a, S>, ExtError> {
        let inline = inode
            .is_inline()
            .then(|| system.inline_content(inode))
            .transpose()?;
        Ok(Content {
            system,
            pieces: system.pieces(inode)?,
            inline,
        })
    }

    /// Where the bytes from `at` on stand, and up to where that is so; `None` if they are zero.
    fn place(&self, at: u64) -> (Option<u64>, u64) {
        let next = self.pieces.partition_point(|piece| piece.start <= at);
        let end = self.pieces.get(next).map_or(u64::MAX, |piece| piece.start);
        let piece = next.checked_sub(1).map(|index| self.pieces[index]);
        match piece.filter(|piece| at < piece.start + piece.bytes) {
            Some(piece) => (
                Some(piece.offset + (at - piece.start)),
                piece.start + piece.bytes,
            ),
            None => (None, end),
        }
    }

    /// Fills `into` from what `place` gave.
    fn read(&self, at: u64, place: Option<u64>, into: &mut [u8]) -> Result<(), ExtError> {
        match (&self.inline, place) {
            (Some(inline), _) => {
                let start = usize::try_from(at).unwrap_or(usize::MAX).min(inline.len());
                let count = into.len().min(inline.len() - start);
                into[..count].copy_from_slice(&inline[start..start + count]);
                into[count..].fill(0);
                Ok(())
            }
            (None, Some(offset)) => self.system.read(offset, into),
            (None, None) => {
                into.fill(0);
                Ok(())
            }
        }
    }
}

/// Whether two files of one size have the same in them.
fn same<S: Source>(
    (old, new): (Content<'_, S>, Content<'_, S>),
    size: u64,
    untouched: Untouched<'_>,
    budget: &Budget,
) -> Result<bool, ExtError> {
    let spend = |bytes| {
        if budget.content(bytes) {
            Ok(())
        } else {
            Err(ExtError::TooMuch)
        }
    };
    let inline = old.inline.is_some() || new.inline.is_some();
    let mut buffers = (vec![0; PIECE_BYTES as usize], vec![0; PIECE_BYTES as usize]);
    let mut at = 0;
    while at < size {
        let ((was, old_end), (is, new_end)) = (old.place(at), new.place(at));
        let end = old_end.min(new_end).min(size);
        let bytes = end - at;
        let same = match (was, is) {
            _ if inline => false,
            (None, None) => true,
            (Some(was), Some(is)) => {
                // Asking costs a little for each block.
                spend(bytes / 4096)?;
                old.system.is_in_place(was, bytes)
                    && new.system.is_in_place(is, bytes)
                    && untouched(was, is, bytes)
            }
            _ => false,
        };
        let end = if same { end } else { end.min(at + PIECE_BYTES) };
        if !same {
            let count = (end - at) as usize;
            spend(2 * (end - at))?;
            old.read(at, was, &mut buffers.0[..count])?;
            new.read(at, is, &mut buffers.1[..count])?;
            if buffers.0[..count] != buffers.1[..count] {
                return Ok(false);
            }
        }
        at = end;
    }
    Ok(true)
}

/// A name that can be shown to a person: guests may choose any bytes.
fn printable(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.contains(char::is_control) => text.into(),
        _ => path.escape_ascii().to_string(),
    }
}
