//! A block while it runs: which threads are ready, where the others wait, and what they share.

use std::any::Any;
use std::panic::Location;

use super::checks::Checks;
use super::fault::{Action, Fault, FaultKind, Site};
use super::fiber::{current, suspend, unwind};
use super::memory::Arena;
use super::mma::Fragments;
use crate::launch::{Arg, Grid, KernelDesc};

/// Threads in the largest block.
pub(super) const MAX_THREADS: usize = 1024;
const MAX_WARPS: usize = MAX_THREADS / 32;

/// No fiber holds the thread: it has not begun, or it runs, or it is over.
pub(super) const NO_FIBER: u16 = u16::MAX;

/// A warp's lanes, as bit masks.
pub(super) struct Warp {
    /// Lanes that can run now, begun or not.
    pub(super) ready: u32,
    pub(super) started: u32,
    exited: u32,
    /// Lanes that wait at the warp's rendezvous.
    at_warp: u32,
    /// Lanes that wait at the block's barrier.
    at_block: u32,
    /// Which half of `values` the next exchange uses: lanes still read the other one.
    parity: usize,
    values: [[u32; 32]; 2],
    product: Fragments,
}

impl Warp {
    const NEW: Self = Self {
        ready: 0,
        started: 0,
        exited: 0,
        at_warp: 0,
        at_block: 0,
        parity: 0,
        values: [[0; 32]; 2],
        product: Fragments::ZERO,
    };
}

type Place = (Action, &'static Location<'static>);

/// A block. Its threads reach it through a raw pointer, so no reference to it lives across a switch.
pub(super) struct Block {
    pub(super) entry: unsafe fn(&[Arg]),
    pub(super) arguments: *const [Arg],
    pub(super) kernel: &'static KernelDesc,
    pub(super) grid: Grid,
    pub(super) index: [u32; 3],
    pub(super) linear: u32,
    pub(super) threads: u32,
    pub(super) warps: Box<[Warp; MAX_WARPS]>,
    /// The fiber of each waiting thread.
    pub(super) fibers: Box<[u16; MAX_THREADS]>,
    /// Where each thread last waited.
    places: Box<[Option<Place>; MAX_THREADS]>,
    /// Threads at the block's barrier, and the first of them.
    arrived: u32,
    first_arrived: u32,
    pub(super) exited: u32,
    pub(super) fault: Option<Fault>,
    pub(super) arena: Arena,
    /// In checked mode, what it remembers.
    pub(super) checks: Option<Box<Checks>>,
}

unsafe fn no_entry(_: &[Arg]) {}

const NO_ARGUMENTS: *const [Arg] = &[];
const NO_KERNEL: &KernelDesc = &KernelDesc { name: "", block: 32, params: &[], entry: no_entry };

impl Block {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            entry: no_entry,
            arguments: NO_ARGUMENTS,
            kernel: NO_KERNEL,
            grid: Grid::new_1d(1),
            index: [0; 3],
            linear: 0,
            threads: 0,
            warps: Box::new([const { Warp::NEW }; MAX_WARPS]),
            fibers: Box::new([NO_FIBER; MAX_THREADS]),
            places: Box::new([None; MAX_THREADS]),
            arrived: 0,
            first_arrived: 0,
            exited: 0,
            fault: None,
            arena: Arena::new(),
            checks: None,
        })
    }

    /// Makes it block number `linear` of a launch.
    pub(super) fn begin(&mut self, kernel: &'static KernelDesc, arguments: *const [Arg], grid: Grid, linear: u32) {
        let [x, y, _] = grid.blocks;
        self.kernel = kernel;
        self.entry = kernel.entry;
        self.arguments = arguments;
        self.grid = grid;
        self.index = block_index(grid, linear);
        debug_assert_eq!(self.index[0] + x * (self.index[1] + y * self.index[2]), linear);
        self.linear = linear;
        self.threads = kernel.block;
        for warp in &mut self.warps[..kernel.block as usize / 32] {
            warp.ready = u32::MAX;
            warp.started = 0;
            warp.exited = 0;
            warp.at_warp = 0;
            warp.at_block = 0;
        }
        self.arrived = 0;
        self.exited = 0;
        self.fault = None;
        self.arena.begin(grid.dynamic_shared_bytes as usize);
    }

    /// The fault of `thread`.
    pub(super) fn fail(&mut self, thread: u32, kind: FaultKind) {
        if self.fault.is_none() {
            self.fault = Some(Fault { kernel: self.kernel.name, block: self.index, thread, kind: Box::new(kind) });
        }
    }

    /// A thread is over. Returns the next one that its fiber shall run.
    pub(super) fn finish(&mut self, thread: u32, panic: Option<Box<dyn Any + Send>>) -> Option<u32> {
        self.exited += 1;
        let index = thread as usize / 32;
        self.warps[index].exited |= 1 << (thread % 32);
        if let Some(payload) = panic {
            let message = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
                (Some(text), _) => (*text).to_owned(),
                (_, Some(text)) => text.clone(),
                _ => "with a payload that is not text".to_owned(),
            };
            self.fail(thread, FaultKind::Panic { message });
        }
        if self.fault.is_some() || self.checks.is_some() {
            return None;
        }
        let fresh = |warp: &Warp| warp.ready & !warp.started;
        let mut index = index;
        if fresh(&self.warps[index]) == 0 && self.warps[index].exited == u32::MAX {
            index += 1;
        }
        let warps = self.threads as usize / 32;
        let warp = self.warps[..warps].get_mut(index)?;
        let candidates = fresh(warp);
        if candidates == 0 {
            return None;
        }
        let lane = candidates.trailing_zeros();
        warp.ready &= !(1 << lane);
        warp.started |= 1 << lane;
        Some(index as u32 * 32 + lane)
    }

    /// Lets all threads at the block's barrier go on.
    fn release_barrier(&mut self) {
        for warp in &mut self.warps[..self.threads as usize / 32] {
            warp.ready |= warp.at_block;
            warp.at_block = 0;
        }
        self.arrived = 0;
        if let Some(checks) = &mut self.checks {
            checks.epoch += 1;
        }
    }

    fn site(&self, thread: u32) -> Option<Site> {
        let (action, location) = self.places[thread as usize]?;
        Some(Site { block: self.index, thread, action, location })
    }

    /// Where `thread` waits now; none if it is over.
    fn waiting_site(&self, thread: u32) -> Option<Site> {
        let warp = &self.warps[thread as usize / 32];
        if warp.exited >> (thread % 32) & 1 == 1 { None } else { self.site(thread) }
    }

    /// No thread is ready. Returns true when that could be helped, false when the block is over or has failed.
    pub(super) fn unblock(&mut self) -> bool {
        if self.exited == self.threads || self.fault.is_some() {
            return false;
        }
        let warps = &self.warps[..self.threads as usize / 32];
        if let Some((index, warp)) = warps.iter().enumerate().find(|(_, warp)| warp.at_warp != 0) {
            let waits = index as u32 * 32 + warp.at_warp.trailing_zeros();
            let other = index as u32 * 32 + warp.at_warp.trailing_ones().min(31);
            let other = if warp.at_warp & 1 == 1 { other } else { index as u32 * 32 };
            if let Some(site) = self.site(waits) {
                let other_at = self.waiting_site(other);
                self.fail(waits, FaultKind::Deadlock { waits: site, other, other_at });
            }
            return false;
        }
        // All that are left wait at the barrier, and the others have left the kernel. A GPU lets them pass.
        if self.checks.is_some()
            && let Some(waits) = self.site(self.first_arrived)
        {
            let gone = warps.iter().position(|warp| warp.exited != 0).unwrap_or(0);
            let other = gone as u32 * 32 + warps[gone].exited.trailing_zeros();
            self.fail(waits.thread, FaultKind::Divergence { waits, other, other_at: None });
            return false;
        }
        self.release_barrier();
        true
    }

    /// The threads that still wait are to be unwound.
    pub(super) fn waiting_threads(&self) -> impl Iterator<Item = usize> {
        (0..self.threads as usize).filter(|&thread| self.fibers[thread] != NO_FIBER)
    }
}

/// The position of block number `linear`.
pub(super) fn block_index(grid: Grid, linear: u32) -> [u32; 3] {
    let [x, y, _] = grid.blocks;
    [linear % x, linear / x % y, linear / x / y]
}

/// The running thread and its block. The reference must be gone before the thread suspends or calls the kernel's code.
#[inline(always)]
pub(super) fn running() -> (u32, *mut Block) {
    let (thread, block) = current(|c| (c.thread.get(), c.block.get()));
    assert!(!block.is_null(), "a kernel's functions run under cuda_std::cpu::Executor");
    (thread, block)
}

/// Ends the running thread, and with it the launch.
#[cold]
pub(super) fn raise(kind: FaultKind) -> ! {
    let (thread, block) = running();
    // SAFETY: the block of the running thread; no other reference to it is alive.
    unsafe { (*block).fail(thread, kind) };
    unwind()
}

fn same_line(a: &'static Location<'static>, b: &'static Location<'static>) -> bool {
    std::ptr::eq(a, b) || a == b
}

/// The block's barrier.
#[inline(always)]
pub(super) fn sync_threads(at: &'static Location<'static>) {
    let (thread, block) = running();
    // SAFETY: the block of the running thread; the reference ends before the thread suspends.
    if meet_block(thread, unsafe { &mut *block }, at) {
        suspend();
    }
}

/// A thread arrives at the block's barrier. Must it wait?
#[inline(never)]
fn meet_block(thread: u32, block: &mut Block, at: &'static Location<'static>) -> bool {
    let checked = block.checks.is_some();
    if block.arrived == 0 {
        block.first_arrived = thread;
    } else if checked
        && let Some(waits) = block.site(block.first_arrived)
        && !same_line(waits.location, at)
    {
        let here = Site { block: block.index, thread, action: Action::SyncThreads, location: at };
        diverged(block, waits, here);
    }
    block.places[thread as usize] = Some((Action::SyncThreads, at));
    block.arrived += 1;
    let last = block.arrived == block.threads;
    if !last || checked {
        block.warps[thread as usize / 32].at_block |= 1 << (thread % 32);
    }
    if last {
        block.release_barrier();
    }
    !last || checked
}

/// A rendezvous of the warp; the last lane finishes the operation. Must this one wait? In checked mode the last
/// does too, so that the seed decides who goes on first.
#[inline(never)]
fn meet_warp(thread: u32, block: &mut Block, action: Action, at: &'static Location<'static>) -> bool {
    let (index, lane) = (thread as usize / 32, thread % 32);
    let warp = &mut block.warps[index];
    if warp.at_warp != 0 {
        let first = index as u32 * 32 + warp.at_warp.trailing_zeros();
        if let Some((waiting, line)) = block.places[first as usize]
            && (waiting != action || (block.checks.is_some() && !same_line(line, at)))
        {
            let here = Site { block: block.index, thread, action, location: at };
            let waits = Site { thread: first, action: waiting, location: line, ..here };
            diverged(block, waits, here);
        }
    }
    block.places[thread as usize] = Some((action, at));
    warp.at_warp |= 1 << lane;
    if warp.at_warp == u32::MAX {
        match action {
            Action::Mma => warp.product.multiply(),
            Action::Exchange => warp.parity ^= 1,
            _ => {
                if let Some(checks) = &mut block.checks {
                    checks.warp_epochs[index] += 1;
                }
            }
        }
        warp.at_warp = 0;
        let wait = block.checks.is_some();
        warp.ready = if wait { u32::MAX } else { !(1 << lane) };
        wait
    } else {
        true
    }
}

/// Two threads that had to meet are at different places.
#[cold]
fn diverged(block: &mut Block, waits: Site, here: Site) -> ! {
    block.fail(here.thread, FaultKind::Divergence { waits, other: here.thread, other_at: Some(here) });
    unwind()
}

/// The warp's barrier.
#[inline(always)]
pub(super) fn sync_warp(at: &'static Location<'static>) {
    let (thread, block) = running();
    // SAFETY: the block of the running thread; the reference ends before the thread suspends.
    if meet_warp(thread, unsafe { &mut *block }, Action::SyncWarp, at) {
        suspend();
    }
}

/// Every lane shows a word to all.
#[inline(always)]
pub(super) fn exchange<R>(value: u32, at: &'static Location<'static>, read: impl FnOnce(&[u32; 32], usize) -> R) -> R {
    let (thread, block) = running();
    let (index, lane) = (thread as usize / 32, thread as usize % 32);
    let parity = {
        // SAFETY: the block of the running thread; this reference ends before the thread suspends.
        let warp = unsafe { &mut (&mut (*block).warps)[index] };
        warp.values[warp.parity][lane] = value;
        warp.parity
    };
    // SAFETY: as above.
    if meet_warp(thread, unsafe { &mut *block }, Action::Exchange, at) {
        suspend();
    }
    // SAFETY: as above; `read` is this crate's own code and does not suspend. The half stays as it is until the
    // exchange after the next one, which no lane reaches before all have left this one.
    read(unsafe { &(&(*block).warps)[index].values[parity] }, lane)
}

/// The warp's tensor-core product.
#[inline(always)]
pub(super) fn product(a: [u32; 4], b: [u32; 2], c: [f32; 4], at: &'static Location<'static>) -> [f32; 4] {
    let (thread, block) = running();
    let (index, lane) = (thread as usize / 32, thread as usize % 32);
    // SAFETY: the block of the running thread; the reference ends with the statement.
    unsafe { (&mut (*block).warps)[index].product.deposit(lane, a, b, c) };
    // SAFETY: as above.
    if meet_warp(thread, unsafe { &mut *block }, Action::Mma, at) {
        suspend();
    }
    // SAFETY: as above.
    unsafe { (&(*block).warps)[index].product.result(lane) }
}
