//! Who used which byte: what race detection remembers.
//!
//! Inside a block kernels order their accesses by barriers alone, and a barrier orders everything of its block (or warp)
//! before it with everything after it. So two accesses are ordered exactly when one thread made both, or a barrier that
//! both threads take part in was passed between them, which two counters tell; and few accesses per byte are enough to
//! find a conflict with any later one (see [`Cell::keep`]). Blocks are ordered by arrivals at counters alone
//! ([`Release`], [`Acquire`]).

use std::panic::Location;
use std::sync::Arc;

use super::fault::Action;

/// One access by one thread.
#[derive(Clone, Copy)]
pub(super) struct Access {
    /// The line; none in an empty slot.
    pub(super) location: Option<&'static Location<'static>>,
    /// The block's number in the grid.
    pub(super) block: u32,
    /// Block barriers that the block had passed.
    pub(super) epoch: u32,
    /// Warp barriers that the warp had passed.
    pub(super) warp_epoch: u32,
    /// Arrivals at counters that the block had made.
    pub(super) arrivals: u32,
    pub(super) thread: u16,
    pub(super) action: Action,
}

/// An arrival at a counter, as those see it who arrive later: what was before it for its own thread is before them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Release {
    pub(super) block: u32,
    pub(super) epoch: u32,
    pub(super) warp_epoch: u32,
    pub(super) arrivals: u32,
    pub(super) thread: u16,
}

impl Release {
    fn covers(&self, access: &Access) -> bool {
        self.block == access.block
            && (access.epoch < self.epoch
                || (access.thread / 32 == self.thread / 32 && access.warp_epoch < self.warp_epoch)
                || (access.thread == self.thread && access.arrivals <= self.arrivals))
    }
}

/// The same arrival as its own block sees it: what it learned of others.
pub(super) struct Acquire {
    pub(super) epoch: u32,
    pub(super) warp_epoch: u32,
    pub(super) thread: u16,
    pub(super) releases: Arc<[Release]>,
}

impl Acquire {
    /// Is `access`, a later one of the same block, behind the arrival?
    pub(super) fn reaches(&self, access: &Access) -> bool {
        access.thread == self.thread
            || access.epoch > self.epoch
            || (access.thread / 32 == self.thread / 32 && access.warp_epoch > self.warp_epoch)
    }
}

impl Access {
    const NONE: Self =
        Self { location: None, block: 0, epoch: 0, warp_epoch: 0, arrivals: 0, thread: 0, action: Action::Read };

    fn same_warp(&self, other: &Self) -> bool {
        self.block == other.block && self.thread / 32 == other.thread / 32
    }

    /// Does `self` come before `later` in every run? (It did in this one.) `known` is what the block of `later` has acquired.
    fn before(&self, later: &Self, known: &[Acquire]) -> bool {
        if self.block != later.block {
            return known
                .iter()
                .any(|acquire| acquire.reaches(later) && acquire.releases.iter().any(|release| release.covers(self)));
        }
        self.thread == later.thread
            || self.epoch < later.epoch
            || (self.same_warp(later) && self.warp_epoch < later.warp_epoch)
    }

    fn conflicts(&self, later: &Self, known: &[Acquire]) -> bool {
        self.location.is_some() && !self.before(later, known)
    }
}

/// What is known of a granule of memory.
#[derive(Clone, Copy)]
struct Cell {
    writer: Access,
    readers: [Access; 2],
    atomics: [Access; 2],
}

impl Cell {
    const EMPTY: Self = Self { writer: Access::NONE, readers: [Access::NONE; 2], atomics: [Access::NONE; 2] };

    fn record(&mut self, access: Access, known: &[Acquire]) -> Result<(), Access> {
        let against: &[&[Access]] = match access.action {
            Action::Read => &[&[self.writer], &self.atomics],
            Action::Atomic => &[&[self.writer], &self.readers],
            _ => &[&[self.writer], &self.readers, &self.atomics],
        };
        let mut earlier = against.iter().flat_map(|set| set.iter());
        if let Some(&earlier) = earlier.find(|earlier| earlier.conflicts(&access, known)) {
            return Err(earlier);
        }
        match access.action {
            Action::Read => Self::keep(&mut self.readers, access, known),
            Action::Atomic => Self::keep(&mut self.atomics, access, known),
            _ => *self = Self { writer: access, ..Self::EMPTY },
        }
        Ok(())
    }

    /// Adds an access to a set in which none conflicts with another. Two suffice when they are in different warps: any
    /// later thread is unordered with at least one of them until a block barrier orders all of the block. (Blocks run
    /// one after another here, so an access of another block conflicts with everything to come, unless an arrival at a
    /// counter orders it. Where many blocks read what one writes after it has heard of some of them, a third reader that
    /// it has not heard of may be missed.)
    fn keep(set: &mut [Access; 2], access: Access, known: &[Acquire]) {
        for slot in set.iter_mut() {
            if slot.location.is_none() || slot.before(&access, known) {
                *slot = Access::NONE;
            }
        }
        if let Some(slot) = set.iter_mut().find(|slot| slot.location.is_none()) {
            *slot = access;
        } else if set[0].same_warp(&set[1]) {
            set[1] = access;
        }
    }
}

const PAGE_BYTES: usize = 1024;

struct Page {
    stamp: u64,
    /// A cell is for `1 << shift` bytes. Pages start coarse and are split when a smaller access comes, so that
    /// neighbours never share a cell.
    shift: u32,
    cells: Vec<Cell>,
}

impl Page {
    fn split(&mut self, shift: u32) {
        let copies = 1 << (self.shift - shift);
        self.cells = self.cells.iter().flat_map(|&cell| std::iter::repeat_n(cell, copies)).collect();
        self.shift = shift;
    }
}

/// The accesses to one memory. Costs 40 to 160 bytes for each byte used.
pub(super) struct History {
    pages: Vec<Option<Page>>,
}

impl History {
    pub(super) fn new(bytes: usize) -> Self {
        Self { pages: std::iter::repeat_with(|| None).take(bytes.div_ceil(PAGE_BYTES)).collect() }
    }

    /// Records an access in the launch (or block) `stamp`, which begins with nothing remembered. Fails with the byte
    /// and the earlier access that conflicts. `start + bytes` is inside the memory.
    pub(super) fn record(
        &mut self,
        stamp: u64,
        start: usize,
        bytes: usize,
        access: Access,
        known: &[Acquire],
    ) -> Result<(), (usize, Access)> {
        let end = start + bytes;
        let fits = (start | bytes).trailing_zeros().min(2);
        let mut position = start;
        while position < end {
            let page =
                self.pages[position / PAGE_BYTES].get_or_insert_with(|| Page { stamp, shift: 2, cells: Vec::new() });
            if page.stamp != stamp || page.cells.is_empty() {
                page.stamp = stamp;
                page.shift = fits;
                page.cells.clear();
                page.cells.resize(PAGE_BYTES >> fits, Cell::EMPTY);
            } else if page.shift > fits {
                page.split(fits);
            }
            let cell = &mut page.cells[(position % PAGE_BYTES) >> page.shift];
            cell.record(access, known).map_err(|earlier| (position, earlier))?;
            position += 1 << page.shift;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::random::Random;

    /// Every access so far, with the pairwise rule: the definition of a race.
    fn races(all: &[(usize, usize, Access)], start: usize, bytes: usize, access: &Access) -> bool {
        all.iter().any(|(other_start, other_bytes, other)| {
            let overlap = start < other_start + other_bytes && *other_start < start + bytes;
            let same_block = other.block == access.block;
            let same_warp = same_block && other.thread / 32 == access.thread / 32;
            let ordered = same_block
                && (other.thread == access.thread
                    || other.epoch != access.epoch
                    || (same_warp && other.warp_epoch != access.warp_epoch));
            let harmless = match (other.action, access.action) {
                (Action::Read, Action::Read) | (Action::Atomic, Action::Atomic) => true,
                _ => ordered,
            };
            overlap && !harmless
        })
    }

    #[test]
    fn few_remembered_accesses_find_exactly_the_races_that_all_would() {
        let here = Location::caller();
        let (mut found, mut clean) = (0, 0);
        for seed in 0..20_000 {
            let mut random = Random::new(seed);
            let mut history = History::new(64);
            let mut all = Vec::new();
            let (mut block, mut epoch, mut warp_epochs) = (0, 0, [0; 3]);
            let (writes, barriers) = (2 + random.below(60), 4 + random.below(12));
            let memory = 8 << random.below(4);
            let mut raced = false;
            for _ in 0..40 {
                match random.below(barriers) {
                    0 if random.below(4) == 0 => (block, epoch, warp_epochs) = (block + 1, 0, [0; 3]),
                    0 | 1 => epoch += 1,
                    2 | 3 => warp_epochs[random.below(3) as usize] += 1,
                    _ => {}
                }
                let thread = random.below(3) * 32 + random.below(3);
                let action = match random.below(writes) {
                    0 => Action::Write,
                    1 => Action::Atomic,
                    _ => Action::Read,
                };
                let bytes = 1 << random.below(4);
                let start = random.below(memory / bytes) as usize * bytes as usize;
                let warp_epoch = warp_epochs[thread as usize / 32];
                let access = Access {
                    location: Some(here),
                    block,
                    epoch,
                    warp_epoch,
                    arrivals: 0,
                    thread: thread as u16,
                    action,
                };
                let expected = races(&all, start, bytes as usize, &access);
                let result = history.record(seed, start, bytes as usize, access, &[]);
                assert_eq!(result.is_err(), expected, "seed {seed}, after {} accesses", all.len());
                if expected {
                    raced = true;
                    break;
                }
                all.push((start, bytes as usize, access));
            }
            if raced { found += 1 } else { clean += 1 }
        }
        assert!(found > 500 && clean > 500, "{found} with a race, {clean} without");
    }
}
