//! The toy CPU's memory: guest memory like any other, of which a look-ahead may have a copy of its own.

use std::collections::BTreeMap;

use hindsight_devices::Ram;
use vm_memory::{Bytes, GuestAddress};

/// Memory, in words of eight bytes.
#[derive(Clone, Debug)]
pub struct ToyMemory {
    ram: Ram,
    bytes: usize,
    /// What was written, if nothing of that may be seen in `ram`.
    written: Option<BTreeMap<usize, u64>>,
}

impl ToyMemory {
    /// Zeroes.
    pub fn new(bytes: usize) -> ToyMemory {
        let ram = Ram::from_ranges(&[(GuestAddress(0), bytes)]).expect("some pages can be mapped");
        ToyMemory {
            ram,
            bytes,
            written: None,
        }
    }

    /// A copy that can be written to. It is good for as long as nobody writes to this.
    pub fn ghost(&self) -> ToyMemory {
        ToyMemory {
            written: Some(self.written.clone().unwrap_or_default()),
            ..self.clone()
        }
    }

    /// The memory that others see.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The word at this address, a multiple of eight.
    pub fn word(&self, at: usize) -> u64 {
        let written = self.written.as_ref().and_then(|words| words.get(&at));
        written.copied().unwrap_or_else(|| {
            self.ram
                .read_obj(GuestAddress(at as u64))
                .expect("it is RAM")
        })
    }

    /// Writes it.
    pub fn set_word(&mut self, at: usize, value: u64) {
        match &mut self.written {
            Some(words) => drop(words.insert(at, value)),
            None => {
                let at = GuestAddress(at as u64);
                self.ram.write_obj(value, at).expect("it is RAM");
            }
        }
    }

    /// All of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes];
        self.ram
            .read_slice(&mut bytes, GuestAddress(0))
            .expect("it is RAM");
        for (at, word) in self.written.iter().flatten() {
            bytes[*at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The pages of a toy whose memory is all RAM, for its [`hindsight_replay::Stateful`].
#[macro_export]
macro_rules! pages_of_ram {
    ($error:ty) => {
        fn pages(&mut self) -> Result<Vec<u64>, $error> {
            Ok(hindsight_replay::memory::all(self.ram()).collect())
        }

        fn has_page(&self, number: u64) -> bool {
            hindsight_replay::memory::has(self.ram(), number)
        }

        fn read_page(
            &mut self,
            number: u64,
            into: &mut [u8; hindsight_replay::PAGE_BYTES],
        ) -> Result<(), $error> {
            assert!(hindsight_replay::memory::read(self.ram(), number, into));
            Ok(())
        }

        fn write_page(
            &mut self,
            number: u64,
            from: &[u8; hindsight_replay::PAGE_BYTES],
        ) -> Result<(), $error> {
            assert!(hindsight_replay::memory::write(self.ram(), number, from));
            Ok(())
        }

        fn take_changed_pages(&mut self) -> Result<Vec<u64>, $error> {
            Ok(hindsight_replay::memory::take_written(self.ram()))
        }
    };
}
