//! What checked mode knows of a buffer: which bytes somebody has written, and who used them in this launch.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::fault::Action;
use super::history::{Access, Acquire, History, Release};

/// A set of bytes.
pub(super) struct ByteSet(Vec<u64>);

impl ByteSet {
    pub(super) fn new(bytes: usize) -> Self {
        Self(vec![0; bytes.div_ceil(64)])
    }

    /// Adds or removes a range inside the set's bounds.
    pub(super) fn set(&mut self, range: Range<usize>, member: bool) {
        let mut byte = range.start;
        while byte < range.end {
            let count = (64 - byte % 64).min(range.end - byte);
            let mask = (u64::MAX >> (64 - count)) << (byte % 64);
            if member {
                self.0[byte / 64] |= mask;
            } else {
                self.0[byte / 64] &= !mask;
            }
            byte += count;
        }
    }

    /// The first byte of the range that is (or is not) a member.
    pub(super) fn find(&self, mut range: Range<usize>, member: bool) -> Option<usize> {
        range.find(|&byte| (self.0[byte / 64] >> (byte % 64) & 1 == 1) == member)
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// Why an access is wrong.
pub(super) enum Wrong {
    Outside,
    Uninitialised(usize),
    Race(usize, Access),
}

struct State {
    initialised: ByteSet,
    history: History,
    /// The arrivals at each counter, by its offset, in the launch `arrivals_of`.
    arrivals: HashMap<usize, Arc<[Release]>>,
    arrivals_of: u64,
}

/// What checked mode knows of a buffer. Belongs to the buffer's allocation and lives as long: bytes stay initialised
/// from one launch to the next. Fast mode neither reads nor writes it.
pub struct Shadow {
    bytes: usize,
    state: Mutex<State>,
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Shadow {
    /// The shadow of an allocation of `bytes` bytes, none of them written.
    #[must_use]
    pub fn new(bytes: usize) -> Arc<Self> {
        let (initialised, history) = (ByteSet::new(bytes), History::new(bytes));
        let state = State { initialised, history, arrivals: HashMap::new(), arrivals_of: 0 };
        Arc::new(Self { bytes, state: Mutex::new(state) })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inside(&self, range: Range<usize>) -> Range<usize> {
        range.start.min(self.bytes)..range.end.min(self.bytes)
    }

    /// The host has written these bytes of the allocation. What lies outside it is ignored.
    pub fn mark_initialised(&self, bytes: Range<usize>) {
        self.state().initialised.set(self.inside(bytes), true);
    }

    /// Forgets that these bytes were written, for memory that is given to somebody else.
    pub fn mark_uninitialised(&self, bytes: Range<usize>) {
        self.state().initialised.set(self.inside(bytes), false);
    }

    /// Has every one of these bytes been written?
    #[must_use]
    pub fn is_initialised(&self, bytes: Range<usize>) -> bool {
        bytes.end <= self.bytes && self.state().initialised.find(bytes, false).is_none()
    }

    /// Checks and records an access.
    pub(super) fn access(
        &self,
        stamp: u64,
        start: usize,
        bytes: usize,
        access: Access,
        known: &[Acquire],
    ) -> Result<(), Wrong> {
        let range = start..start.saturating_add(bytes);
        if range.end > self.bytes {
            return Err(Wrong::Outside);
        }
        let mut state = self.state();
        if matches!(access.action, Action::Read | Action::Atomic)
            && let Some(byte) = state.initialised.find(range.clone(), false)
        {
            return Err(Wrong::Uninitialised(byte));
        }
        let recorded = state.history.record(stamp, start, bytes, access, known);
        recorded.map_err(|(byte, earlier)| Wrong::Race(byte, earlier))?;
        if access.action != Action::Read {
            state.initialised.set(range, true);
        }
        Ok(())
    }

    /// The arrivals so far at the counter at `offset`.
    pub(super) fn arrivals(&self, stamp: u64, offset: usize) -> Arc<[Release]> {
        let mut state = self.state();
        if state.arrivals_of != stamp {
            state.arrivals_of = stamp;
            state.arrivals.clear();
        }
        state.arrivals.get(&offset).cloned().unwrap_or_default()
    }

    /// One more arrival, and all that its thread knows of.
    pub(super) fn set_arrivals(&self, offset: usize, releases: Arc<[Release]>) {
        self.state().arrivals.insert(offset, releases);
    }
}
