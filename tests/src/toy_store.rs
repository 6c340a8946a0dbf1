//! A store of checkpoints in memory, which breaks as a test wants it to.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use hindsight_replay::rng::Rng;
use hindsight_replay::{
    CheckpointHead, Checkpoints, CoreState, Notes, PAGE_BYTES, PagePlace, PageSink, PageSource,
};

type Pages = BTreeMap<PagePlace, [u8; PAGE_BYTES]>;

/// Checkpoints in memory.
#[derive(Clone, Debug)]
pub struct ToyStore<C, S> {
    heads: Vec<CheckpointHead>,
    kept: Vec<(CoreState<C, S>, Pages)>,
    notes: Vec<Option<Notes>>,
    /// Nothing more is kept.
    full: bool,
    /// What was handed over last is to be lost.
    late: bool,
    noise: Option<Rng>,
}

impl<C, S> ToyStore<C, S> {
    /// A store with nothing in it. With `noise`, now and then it is full, or cannot give something back.
    pub fn new(noise: Option<u64>) -> ToyStore<C, S> {
        ToyStore {
            heads: Vec::new(),
            kept: Vec::new(),
            notes: Vec::new(),
            full: false,
            late: false,
            noise: noise.map(|noise| Rng::new(noise, 31)),
        }
    }

    /// Flips a bit of the first page at checkpoint `number`.
    pub fn alter(&mut self, number: usize) {
        let pages = &mut self.kept[number].1;
        let page = pages.entry(PagePlace::in_memory(0));
        page.or_insert([0; PAGE_BYTES])[77] ^= 4;
    }

    fn strikes(&mut self, one_in: u64) -> bool {
        self.noise
            .as_mut()
            .is_some_and(|noise| noise.one_in(one_in))
    }
}

fn broken() -> io::Error {
    io::Error::other("the toy store is broken, as the test ordered")
}

impl<C: Clone, S: Clone> Checkpoints<C, S> for ToyStore<C, S> {
    type Error = io::Error;

    fn heads(&self) -> &[CheckpointHead] {
        &self.heads
    }

    fn is_open(&self) -> bool {
        !self.full
    }

    fn append<E>(
        &mut self,
        head: CheckpointHead,
        core: &CoreState<C, S>,
        base: Option<usize>,
        changed: &mut PageSource<'_, E>,
        notes: Option<&Notes>,
    ) -> Result<io::Result<usize>, E> {
        assert!(self.heads.last().is_none_or(|last| last.exits < head.exits));
        if self.full {
            return Ok(Err(broken()));
        }
        let mut pages = base.map_or_else(Pages::new, |base| self.kept[base].1.clone());
        let mut bytes = [0; PAGE_BYTES];
        while let Some(place) = changed(&mut bytes) {
            pages.insert(place?, bytes);
        }
        self.full = self.strikes(40);
        if self.full && self.strikes(2) {
            return Ok(Err(broken()));
        }
        self.late = self.full;
        self.heads.push(head);
        self.kept.push((core.clone(), pages));
        self.notes.push(notes.cloned());
        Ok(Ok(self.heads.len() - 1))
    }

    fn settle(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.late) {
            // It comes out late that the last one could not be kept.
            self.heads.pop();
            self.kept.pop();
            self.notes.pop();
            return Err(broken());
        }
        Ok(())
    }

    fn notes(&mut self, number: usize) -> Option<Notes> {
        self.notes[number].clone()
    }

    fn load(&mut self, number: usize) -> io::Result<CoreState<C, S>> {
        match self.strikes(20) {
            true => Err(broken()),
            false => Ok(self.kept[number].0.clone()),
        }
    }

    fn pages(
        &mut self,
        number: usize,
        base: Option<usize>,
        also: &BTreeSet<PagePlace>,
        put: &mut PageSink<'_>,
    ) -> io::Result<()> {
        let none = Pages::new();
        let before = base.map_or(&none, |base| &self.kept[base].1);
        let pages = &self.kept[number].1;
        let places = before.keys().chain(pages.keys());
        let differ = places.filter(|place| before.get(place) != pages.get(place));
        let wanted: BTreeSet<_> = differ.chain(also).copied().collect();
        let given: Vec<_> = wanted
            .into_iter()
            .map(|place| (place, pages.get(&place).copied()))
            .collect();
        for (place, bytes) in given {
            if self.strikes(100) {
                return Err(broken());
            }
            if put(place, bytes.as_ref()).is_break() {
                break;
            }
        }
        Ok(())
    }
}
