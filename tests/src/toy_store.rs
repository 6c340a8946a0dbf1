//! A store of checkpoints in memory, which breaks as a test wants it to.

use std::collections::{BTreeMap, BTreeSet};

use hindsight_replay::rng::Rng;
use hindsight_replay::{CheckpointHead, Checkpoints, CoreState, PAGE_BYTES, PageName, PageTable};

/// Checkpoints in memory.
#[derive(Clone, Debug)]
pub struct ToyStore<C, S> {
    heads: Vec<CheckpointHead>,
    kept: Vec<(CoreState<C, S>, PageTable)>,
    pages: Vec<[u8; PAGE_BYTES]>,
    names: BTreeMap<[u8; PAGE_BYTES], PageName>,
    /// Pages that cannot be read.
    lost: BTreeSet<PageName>,
    /// Nothing more is kept.
    full: bool,
    noise: Option<Rng>,
}

impl<C, S> ToyStore<C, S> {
    /// A store with nothing in it. With `noise`, now and then it loses a page, is full, or cannot give a checkpoint back.
    pub fn new(noise: Option<u64>) -> ToyStore<C, S> {
        ToyStore {
            heads: Vec::new(),
            kept: Vec::new(),
            pages: Vec::new(),
            names: BTreeMap::new(),
            lost: BTreeSet::new(),
            full: false,
            noise: noise.map(|noise| Rng::new(noise, 31)),
        }
    }

    fn strikes(&mut self, one_in: u64) -> bool {
        self.noise
            .as_mut()
            .is_some_and(|noise| noise.one_in(one_in))
    }
}

fn broken() -> std::io::Error {
    std::io::Error::other("the toy store is broken, as the test ordered")
}

impl<C: Clone, S: Clone> Checkpoints<C, S> for ToyStore<C, S> {
    type Error = std::io::Error;

    fn heads(&self) -> &[CheckpointHead] {
        &self.heads
    }

    fn load(&mut self, number: usize) -> Result<(CoreState<C, S>, PageTable), std::io::Error> {
        match self.strikes(20) {
            true => Err(broken()),
            false => Ok(self.kept[number].clone()),
        }
    }

    fn read_page(
        &mut self,
        name: PageName,
        into: &mut [u8; PAGE_BYTES],
    ) -> Result<(), std::io::Error> {
        if self.lost.contains(&name) {
            return Err(broken());
        }
        *into = match name {
            PageName::ZEROES => [0; PAGE_BYTES],
            PageName(number) => self.pages[number as usize - 1],
        };
        Ok(())
    }

    fn put_page(&mut self, bytes: &[u8; PAGE_BYTES]) -> Result<PageName, std::io::Error> {
        assert!(bytes.iter().any(|byte| *byte != 0), "zeroes have a name");
        if self.strikes(200) {
            self.full = true;
        }
        if self.full {
            return Err(broken());
        }
        if let Some(name) = self.names.get(bytes) {
            return Ok(*name);
        }
        self.pages.push(*bytes);
        let name = PageName(self.pages.len() as u64);
        self.names.insert(*bytes, name);
        if self.strikes(50) {
            self.lost.insert(name);
        }
        Ok(name)
    }

    fn append(
        &mut self,
        head: CheckpointHead,
        core: &CoreState<C, S>,
        pages: &PageTable,
    ) -> Result<(), std::io::Error> {
        assert!(self.heads.last().is_none_or(|last| last.exits < head.exits));
        if self.full {
            return Err(broken());
        }
        self.heads.push(head);
        self.kept.push((core.clone(), pages.clone()));
        Ok(())
    }

    fn is_open(&self) -> bool {
        !self.full
    }
}
