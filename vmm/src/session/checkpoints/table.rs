//! What the pages of a machine hold, as names of contents.

use std::collections::BTreeMap;

use hindsight_replay::PagePlace;

/// The name of a page's content in a store of pages: equal names are equal contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PageName(pub(super) u64);

impl PageName {
    /// Of a page that holds what it holds at power-on.
    pub(super) const POWER_ON: PageName = PageName(0);
    /// Of a page that holds only zeroes.
    pub(super) const ZEROES: PageName = PageName(1);
    /// The first of those that are in the file.
    pub(super) const FIRST: PageName = PageName(2);
}

/// The names of what all pages of a machine hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PageTable {
    /// By page number. Guest memory is dense.
    memory: Vec<PageName>,
    /// By page number, without those that are as at power-on. Disks are not dense.
    disks: BTreeMap<u64, PageName>,
}

impl PageTable {
    /// The name at `place`.
    pub(super) fn get(&self, place: PagePlace) -> PageName {
        let name = match place.number() {
            Ok(number) => usize::try_from(number)
                .ok()
                .and_then(|number| self.memory.get(number)),
            Err(number) => self.disks.get(&number),
        };
        name.copied().unwrap_or(PageName::POWER_ON)
    }

    /// Changes it. A table has room for each page of guest memory up to the highest that was named: the caller has
    /// seen to it that there is such a page.
    pub(super) fn set(&mut self, place: PagePlace, name: PageName) {
        match place.number() {
            Ok(number) => {
                let number = usize::try_from(number).expect("there is such a page");
                if number >= self.memory.len() {
                    self.memory.resize(number + 1, PageName::POWER_ON);
                }
                self.memory[number] = name;
            }
            Err(number) if name == PageName::POWER_ON => drop(self.disks.remove(&number)),
            Err(number) => drop(self.disks.insert(number, name)),
        }
    }

    /// The places at which another table has another name, with that, by ascending place.
    pub(super) fn changes_to(&self, other: &PageTable) -> Vec<(PagePlace, PageName)> {
        let mut changes = Vec::new();
        for number in 0..self.memory.len().max(other.memory.len()) {
            let place = PagePlace::in_memory(number as u64);
            let name = other.get(place);
            if self.get(place) != name {
                changes.push((place, name));
            }
        }
        let mut disks: BTreeMap<u64, PageName> = BTreeMap::new();
        disks.extend(
            self.disks
                .keys()
                .map(|number| (*number, PageName::POWER_ON)),
        );
        disks.extend(&other.disks);
        for (number, name) in disks {
            let place = PagePlace::on_disks(number);
            if self.get(place) != name {
                changes.push((place, name));
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_changes_make_one_table_of_another() {
        let (memory, disks) = (PagePlace::in_memory, PagePlace::on_disks);
        let table = |names: &[(PagePlace, u64)]| {
            let mut table = PageTable::default();
            for (place, name) in names {
                table.set(*place, PageName(*name));
            }
            table
        };
        let a = table(&[
            (memory(0), 1),
            (memory(9), 2),
            (disks(1 << 50), 3),
            (disks(4), 4),
        ]);
        let b = table(&[(memory(0), 1), (memory(3), 5), (disks(4), 6), (disks(7), 7)]);
        let changes = a.changes_to(&b);
        let expected = [
            (memory(3), 5),
            (memory(9), 0),
            (disks(4), 6),
            (disks(7), 7),
            (disks(1 << 50), 0),
        ];
        assert_eq!(
            changes,
            expected.map(|(place, name)| (place, PageName(name)))
        );
        let mut made = a.clone();
        for (place, name) in changes {
            made.set(place, name);
        }
        assert!(made.changes_to(&b).is_empty() && b.changes_to(&made).is_empty());
        assert_eq!(b.get(memory(1 << 40)), PageName::POWER_ON);
    }
}
