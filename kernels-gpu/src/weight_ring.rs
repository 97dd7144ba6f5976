//! Weights on their way through a block's shared memory, for [`crate::decode_step`]: one warp asks for them in the order in which
//! the others will want them, as far ahead as there is room.
//!
//! A unit is what a warp takes at once: some rows of a weight, or a part of each. Units lie in a ring of bytes, one behind the
//! other; one that would not fit before the ring's end starts at its beginning. Filler and takers count units alike, so
//! a number is all that they share.

use cuda_std::bulk::{self, Barriers};
use cuda_std::prelude::*;

use crate::attention::SPAN;
use crate::attention_decode_short::{key_elements, span_bytes};

/// Most units in a ring.
pub const UNITS: u32 = 16;

/// Elements after each row of a unit: 16 bytes put the eight rows that a fragment reads into different banks.
pub const PAD: u32 = 8;

/// The ring: its barriers and numbers are at the start of the block's shared memory, its bytes at `base`.
#[derive(Clone, Copy)]
pub(crate) struct Ring {
    memory: Shared<u8>,
    base: u32,
    bytes: u32,
}

/// Bytes of a ring's barriers and numbers.
pub(crate) const CONTROL_BYTES: usize = UNITS as usize * (8 + 8 + 4 + 4);

impl Ring {
    /// The ring in `bytes` from byte `base` of a block's dynamic shared memory on. Called by all threads, it ends with a barrier of
    /// the block.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn new(memory: Shared<u8>, base: u32, bytes: u32) -> Self {
        let ring = Self { memory, base, bytes };
        if thread::thread_idx_x() == 0 {
            for unit in 0..UNITS as usize {
                ring.full().init(unit, 1);
                ring.empty().init(unit, 1);
            }
            Barriers::publish();
        }
        thread::sync_threads();
        ring
    }

    /// The same, of which nothing has been computed yet.
    #[inline(always)]
    pub(crate) fn anew(self) -> Self {
        Self { memory: self.memory.anew(), ..self }
    }

    /// A unit has landed.
    #[inline(always)]
    fn full(&self) -> Barriers {
        Barriers::new(self.memory.part(0, UNITS as usize))
    }

    /// A unit has been taken.
    #[inline(always)]
    fn empty(&self) -> Barriers {
        Barriers::new(self.memory.part(UNITS as usize * 8, UNITS as usize))
    }

    /// Of each unit, its byte in dynamic shared memory.
    #[inline(always)]
    fn places(&self) -> Shared<u32> {
        self.memory.part(UNITS as usize * 16, UNITS as usize)
    }

    /// Of each unit, the bytes asked for before it.
    #[inline(always)]
    fn starts(&self) -> Shared<u32> {
        self.memory.part(UNITS as usize * 20, UNITS as usize)
    }

    /// Waits until a unit has landed, and returns its byte in dynamic shared memory.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn wait(&self, unit: u32) -> u32 {
        let slot = (unit % UNITS) as usize;
        self.full().wait(slot, unit / UNITS % 2);
        self.places().get(slot)
    }

    /// A unit has been taken: for one thread, after a barrier with all that read it.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn free(&self, unit: u32) {
        self.empty().arrive((unit % UNITS) as usize);
    }
}

/// The side that asks for weights: a warp.
pub(crate) struct Filler {
    ring: Ring,
    /// The next unit's number.
    next: u32,
    /// The first unit that is not known to be taken.
    oldest: u32,
    /// Where the next unit goes.
    at: u32,
    /// Bytes asked for so far, and those left out at the ring's end.
    asked: u32,
    /// Units that may be on their way at once.
    ahead: u32,
    /// Clock cycles between units for each KiB of them: what is asked for faster than memory gives it delays what others wait for.
    pub(crate) pace: u32,
    /// When the next unit may be asked for.
    due: u32,
}

impl Filler {
    #[inline(always)]
    pub(crate) fn new(ring: Ring, ahead: u32, pace: u32) -> Self {
        Self { ring, next: 0, oldest: 0, at: 0, asked: 0, ahead, pace, due: thread::clock() }
    }

    /// Waits for room for the next unit, and makes it known.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn room(&mut self, bytes: u32, expected: u32) -> (u32, usize) {
        let ring = self.ring;
        if self.at + bytes > ring.bytes {
            self.asked = self.asked.wrapping_add(ring.bytes - self.at);
            self.at = 0;
        }
        let end = self.asked.wrapping_add(bytes);
        while self.oldest != self.next {
            let slot = (self.oldest % UNITS) as usize;
            let fits = end.wrapping_sub(ring.starts().get(slot)) <= ring.bytes;
            if fits && self.next.wrapping_sub(self.oldest) < UNITS {
                break;
            }
            ring.empty().wait(slot, self.oldest / UNITS % 2);
            self.oldest = self.oldest.wrapping_add(1);
        }
        if self.next >= self.ahead {
            let landed = self.next - self.ahead;
            ring.full().wait((landed % UNITS) as usize, landed / UNITS % 2);
        }
        if self.pace > 0 {
            let mut now = thread::clock();
            while self.due.wrapping_sub(now).cast_signed() > 0 {
                now = thread::clock();
            }
            // Who is late does not catch up.
            self.due = now.wrapping_add(expected / 64 * self.pace / 16);
        }
        let slot = (self.next % UNITS) as usize;
        let at = self.at;
        if thread::lane_id() == 0 {
            ring.places().set(slot, ring.base + at);
            ring.starts().set(slot, self.asked);
            if expected == 0 {
                ring.full().arrive(slot);
            } else {
                ring.full().arrive_and_expect(slot, expected);
            }
        }
        warp::sync_warp();
        self.at += bytes;
        self.asked = end;
        self.next = self.next.wrapping_add(1);
        (at, slot)
    }

    /// Asks for columns `first` to `first + width` of `rows` rows of a weight, which start at each lane's own element `row`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn fill(&mut self, weight: In<bf16>, rows: u32, row: usize, first: u32, width: u32) {
        let (at, slot) = self.room(unit_bytes(rows, width), rows * width * 2);
        let lane = thread::lane_id();
        if lane < rows {
            let memory = self.ring.memory.part((self.ring.base + at) as usize, (rows * (width + PAD)) as usize);
            let (to, from) = ((lane * (width + PAD)) as usize, row + first as usize);
            // SAFETY: the row is one of the weight's (the caller's duty), the place is free.
            unsafe { bulk::copy_unchecked(&memory, to, &weight, from, width as usize, &self.ring.full(), slot) };
        }
    }

    /// Asks for the keys \[[`SPAN`], `width`\] and the values \[`width`, [`SPAN`]\] of a span, both from element `first` on. They are as in
    /// [`crate::attention_decode_short`].
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn fill_span(&mut self, keys: In<bf16>, values: In<bf16>, first: usize, width: u32) {
        let span = SPAN as u32;
        keys.check(first, (span * width) as usize);
        values.check(first, (span * width) as usize);
        let (at, slot) = self.room(span_bytes(width as usize) as u32, span * width * 4);
        let memory: Shared<bf16> =
            self.ring.memory.part((self.ring.base + at) as usize, span_bytes(width as usize) / size_of::<bf16>());
        let full = self.ring.full();
        let copy = |to: usize, source: &In<bf16>, row: u32, length: u32| {
            let to = to + (row * (length + PAD)) as usize;
            // SAFETY: the row is one of the page's, as checked; the place is free.
            unsafe {
                bulk::copy_unchecked(
                    &memory,
                    to,
                    source,
                    first + (row * length) as usize,
                    length as usize,
                    &full,
                    slot,
                );
            }
        };
        let mut row = thread::lane_id();
        while row < span {
            copy(0, &keys, row, width);
            row += 32;
        }
        let mut row = thread::lane_id();
        while row < width {
            copy(key_elements(width as usize), &values, row, span);
            row += 32;
        }
    }

    /// Keeps bytes of the ring free for those who take the unit: they may write there.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn reserve(&mut self, bytes: u32) {
        self.room(bytes, 0);
    }
}

/// Bytes of a unit of so many rows and columns.
#[must_use]
pub const fn unit_bytes(rows: u32, width: u32) -> u32 {
    rows * (width + PAD) * 2
}
