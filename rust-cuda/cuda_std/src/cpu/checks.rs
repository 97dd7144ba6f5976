//! What checked mode remembers of a block: its place in time, its shared memory and its asynchronous copies.

use std::collections::VecDeque;
use std::panic::Location;

use super::block::{MAX_THREADS, block_index};
use super::fault::{Action, FaultKind, Site};
use super::history::{Access, Acquire, History, Release};
use super::memory::SHARED_LIMIT;
use super::random::Random;
use super::shadow::{ByteSet, Shadow, Wrong};
use super::{Space, memory::Arena};
use crate::launch::Grid;

/// An asynchronous copy that has not landed.
struct Copy {
    offset: usize,
    bytes: [u8; 16],
    length: usize,
    location: &'static Location<'static>,
}

/// The asynchronous copies of a thread.
#[derive(Default)]
struct Copies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

/// See the file's head.
pub(super) struct Checks {
    pub(super) random: Random,
    grid: Grid,
    block: u32,
    /// Block barriers passed.
    pub(super) epoch: u32,
    /// Warp barriers passed, by warp.
    pub(super) warp_epochs: [u32; MAX_THREADS / 32],
    /// Arrivals at counters.
    arrivals: u32,
    /// What they have told the block of others.
    acquired: Vec<Acquire>,
    /// The launch's number in the process, for buffers.
    launch: u64,
    /// Blocks run with this object, for the shared memory.
    blocks_run: u64,
    shared: History,
    initialised: ByteSet,
    in_flight: ByteSet,
    copies: Vec<Copies>,
}

impl Checks {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            random: Random::new(0),
            grid: Grid::new_1d(1),
            block: 0,
            epoch: 0,
            warp_epochs: [0; MAX_THREADS / 32],
            arrivals: 0,
            acquired: Vec::new(),
            launch: 0,
            blocks_run: 0,
            shared: History::new(SHARED_LIMIT),
            initialised: ByteSet::new(SHARED_LIMIT),
            in_flight: ByteSet::new(SHARED_LIMIT),
            copies: std::iter::repeat_with(Copies::default).take(MAX_THREADS).collect(),
        })
    }

    /// A block begins.
    pub(super) fn begin(&mut self, seed: u64, launch: u64, grid: Grid, block: u32) {
        self.random = Random::new(seed ^ u64::from(block).wrapping_mul(0xd1b5_4a32_d192_ed03));
        self.grid = grid;
        self.block = block;
        self.epoch = 0;
        self.warp_epochs = [0; MAX_THREADS / 32];
        self.arrivals = 0;
        self.acquired.clear();
        self.launch = launch;
        self.blocks_run += 1;
        self.initialised.clear();
        self.in_flight.clear();
        for copies in &mut self.copies {
            copies.open.clear();
            copies.groups.clear();
        }
    }

    fn access(&self, thread: u32, action: Action, at: &'static Location<'static>) -> Access {
        Access {
            location: Some(at),
            block: self.block,
            epoch: self.epoch,
            warp_epoch: self.warp_epochs[thread as usize / 32],
            arrivals: self.arrivals,
            thread: thread as u16,
            action,
        }
    }

    fn site(&self, access: &Access) -> Site {
        Site {
            block: block_index(self.grid, access.block),
            thread: u32::from(access.thread),
            action: access.action,
            location: access.location.unwrap_or(Location::caller()),
        }
    }

    fn race(&self, space: Space, offset: usize, first: &Access, second: &Access) -> FaultKind {
        FaultKind::Race { space, offset, first: self.site(first), second: self.site(second) }
    }

    /// An access to a buffer.
    pub(super) fn global(
        &self,
        shadow: &Shadow,
        start: usize,
        bytes: usize,
        (thread, action, at): (u32, Action, &'static Location<'static>),
    ) -> Result<(), FaultKind> {
        let access = self.access(thread, action, at);
        shadow.access(self.launch, start, bytes, access, &self.acquired).map_err(|wrong| match wrong {
            Wrong::Outside => {
                FaultKind::OutOfBounds { space: Space::Global, index: start, count: bytes, length: shadow.bytes(), at }
            }
            Wrong::Uninitialised(offset) => FaultKind::Uninitialised { space: Space::Global, offset, at },
            Wrong::Race(offset, earlier) => self.race(Space::Global, offset, &earlier, &access),
        })
    }

    /// An arrival at a counter: the thread learns what those before it knew, and leaves what it knows.
    pub(super) fn arrive(
        &mut self,
        shadow: &Shadow,
        start: usize,
        bytes: usize,
        (thread, at): (u32, &'static Location<'static>),
    ) -> Result<(), FaultKind> {
        let releases = shadow.arrivals(self.launch, start);
        let here = self.access(thread, Action::Atomic, at);
        let Access { block, epoch, warp_epoch, arrivals, thread: number, .. } = here;
        self.acquired.push(Acquire { epoch, warp_epoch, thread: number, releases });
        self.global(shadow, start, bytes, (thread, Action::Atomic, at))?;
        let mut known = vec![Release { block, epoch, warp_epoch, arrivals, thread: number }];
        for acquire in self.acquired.iter().filter(|acquire| acquire.reaches(&here)) {
            for release in acquire.releases.iter() {
                if !known.contains(release) {
                    known.push(*release);
                }
            }
        }
        shadow.set_arrivals(start, known.into());
        self.arrivals += 1;
        Ok(())
    }

    /// An access to shared memory.
    pub(super) fn shared(
        &mut self,
        start: usize,
        bytes: usize,
        (thread, action, at): (u32, Action, &'static Location<'static>),
    ) -> Result<(), FaultKind> {
        let access = self.access(thread, action, at);
        let range = start..start + bytes;
        if let Some(offset) = self.in_flight.find(range.clone(), true)
            && let Some(copy) = self.copy_of(offset)
        {
            return Err(FaultKind::UnfinishedCopy { offset, copy, access: self.site(&access) });
        }
        if matches!(action, Action::Read | Action::Atomic)
            && let Some(offset) = self.initialised.find(range.clone(), false)
        {
            return Err(FaultKind::Uninitialised { space: Space::Shared, offset, at });
        }
        let recorded = self.shared.record(self.blocks_run, start, bytes, access, &[]);
        recorded.map_err(|(offset, earlier)| self.race(Space::Shared, offset, &earlier, &access))?;
        if matches!(action, Action::Write | Action::Atomic) {
            self.initialised.set(range, true);
        }
        Ok(())
    }

    /// The copy that is writing this byte.
    fn copy_of(&self, offset: usize) -> Option<Site> {
        self.copies.iter().enumerate().find_map(|(thread, copies)| {
            let all = copies.open.iter().chain(copies.groups.iter().flatten());
            let copy = all.into_iter().find(|copy| (copy.offset..copy.offset + copy.length).contains(&offset))?;
            Some(self.site(&self.access(thread as u32, Action::AsyncCopy, copy.location)))
        })
    }

    /// A thread starts a copy of these bytes, at most 16. The start counts as a write, because the hardware may write
    /// at once; so does the landing.
    pub(super) fn start_copy(
        &mut self,
        offset: usize,
        value: &[u8],
        thread: u32,
        at: &'static Location<'static>,
    ) -> Result<(), FaultKind> {
        self.shared(offset, value.len(), (thread, Action::AsyncCopy, at))?;
        let mut bytes = [0; 16];
        bytes[..value.len()].copy_from_slice(value);
        self.in_flight.set(offset..offset + value.len(), true);
        self.copies[thread as usize].open.push(Copy { offset, bytes, length: value.len(), location: at });
        Ok(())
    }

    /// A thread closes its open copies into a group.
    pub(super) fn commit(&mut self, thread: u32) {
        let copies = &mut self.copies[thread as usize];
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    }

    /// A thread waits until at most `pending` of its groups are under way.
    pub(super) fn wait(&mut self, thread: u32, pending: usize, arena: &mut Arena) -> Result<(), FaultKind> {
        while self.copies[thread as usize].groups.len() > pending {
            for copy in self.copies[thread as usize].groups.pop_front().unwrap_or_default() {
                let range = copy.offset..copy.offset + copy.length;
                self.in_flight.set(range.clone(), false);
                self.shared(copy.offset, copy.length, (thread, Action::AsyncCopy, copy.location))?;
                self.initialised.set(range, true);
                arena.write_bytes(copy.offset, &copy.bytes[..copy.length]);
            }
        }
        Ok(())
    }
}
