//! Runs blocks on one OS thread: the scheduler of their threads.

use std::cell::RefCell;

use super::block::{Block, NO_FIBER};
use super::checks::Checks;
use super::fault::{Fault, FaultKind};
use super::fiber::{Command, Fiber, Pause, current};
use crate::launch::{Grid, Launch};

/// A launch as all its workers see it.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) launch: &'a Launch<'a>,
    pub(super) grid: Grid,
    /// In checked mode the seed and the launch's number in the process.
    pub(super) checked: Option<(u64, u64)>,
}

// SAFETY: what keeps a launch from being shared is the raw pointers to shadows in its arguments; a shadow is Sync, and
// the launch's borrow keeps it alive.
unsafe impl Sync for Job<'_> {}

/// The fibers and the block of this OS thread, kept from launch to launch.
struct Worker {
    /// Owned; threads on fibers reach it through the same pointer.
    block: *mut Block,
    fibers: Vec<Fiber>,
    idle: Vec<u16>,
}

thread_local! {
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
}

/// Runs block number `linear` here.
pub(super) fn run_block(job: &Job<'_>, linear: u32) -> Result<(), Fault> {
    WORKER.with(|worker| worker.borrow_mut().get_or_insert_with(Worker::new).run(job, linear))
}

/// Removes what checked mode left, when the block is over or the scheduler panics.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        current(|c| {
            c.block.set(std::ptr::null_mut());
            c.arena.set(std::ptr::null_mut());
            c.checked.set(false);
        });
    }
}

impl Worker {
    fn new() -> Self {
        Self { block: Box::into_raw(Block::new()), fibers: Vec::new(), idle: Vec::new() }
    }

    fn run(&mut self, job: &Job<'_>, linear: u32) -> Result<(), Fault> {
        {
            // SAFETY: owned by this worker; no thread of a block runs now.
            let block = unsafe { &mut *self.block };
            block.begin(job.launch.kernel(), job.launch.args(), job.grid, linear);
            if let Some((seed, launch)) = job.checked {
                block.checks.get_or_insert_with(Checks::new).begin(seed, launch, job.grid, linear);
            } else {
                block.checks = None;
            }
            current(|c| {
                c.block.set(self.block);
                c.arena.set(block.arena.pointer());
                c.checked.set(job.checked.is_some());
            });
        }
        let running = Running;
        loop {
            if job.checked.is_some() {
                self.run_in_seeded_order();
            } else {
                self.run_in_order();
            }
            // SAFETY: as above.
            if !unsafe { (*self.block).unblock() } {
                break;
            }
        }
        // SAFETY: as above.
        let fault = unsafe { (*self.block).fault.take() };
        let Some(fault) = fault else {
            drop(running);
            return Ok(());
        };
        // SAFETY: as above; the fault is put back so that the threads that unwind are not taken for panics.
        let waiting: Vec<usize> = unsafe {
            (*self.block).fault = Some(fault.clone());
            (*self.block).waiting_threads().collect()
        };
        for thread in waiting {
            self.step(thread, Command::Abort);
        }
        drop(running);
        Err(fault)
    }

    /// Fast mode: warp after warp, each until none of its lanes is ready.
    fn run_in_order(&mut self) {
        // SAFETY: no thread runs now; every access below ends before a thread is resumed.
        let warps = unsafe { (*self.block).threads } as usize / 32;
        loop {
            let mut idle = true;
            for index in 0..warps {
                loop {
                    // SAFETY: as above.
                    let (ready, failed) =
                        unsafe { ((&(*self.block).warps)[index].ready, (*self.block).fault.is_some()) };
                    if failed {
                        return;
                    }
                    if ready == 0 {
                        break;
                    }
                    idle = false;
                    self.step(index * 32 + ready.trailing_zeros() as usize, Command::Continue);
                }
            }
            if idle {
                return;
            }
        }
    }

    /// Checked mode: the seed chooses among all threads that are ready.
    fn run_in_seeded_order(&mut self) {
        loop {
            let thread = {
                // SAFETY: no thread runs now; the reference ends before one is resumed.
                let block = unsafe { &mut *self.block };
                let warps = &block.warps[..block.threads as usize / 32];
                let count: u32 = warps.iter().map(|warp| warp.ready.count_ones()).sum();
                let Some(checks) = block.checks.as_mut() else { return };
                if count == 0 || block.fault.is_some() {
                    return;
                }
                let mut nth = checks.random.below(count);
                let mut thread = 0;
                for (index, warp) in warps.iter().enumerate() {
                    let here = warp.ready.count_ones();
                    if nth < here {
                        let mut lanes = warp.ready;
                        for _ in 0..nth {
                            lanes &= lanes - 1;
                        }
                        thread = index * 32 + lanes.trailing_zeros() as usize;
                        break;
                    }
                    nth -= here;
                }
                thread
            };
            self.step(thread, Command::Continue);
        }
    }

    /// Starts a thread, or tells one that waits to go on (or to unwind).
    #[inline(always)]
    fn step(&mut self, thread: usize, command: Command) {
        let (fiber, command) = {
            // SAFETY: no thread runs now; the reference ends before one is resumed.
            let block = unsafe { &mut *self.block };
            let warp = &mut block.warps[thread / 32];
            let lane = 1u32 << (thread % 32);
            warp.ready &= !lane;
            if block.fibers[thread] == NO_FIBER {
                warp.started |= lane;
                let Some(fiber) = self.idle.pop().or_else(|| Self::add_fiber(&mut self.fibers, block, thread)) else {
                    return;
                };
                (fiber, Command::Start(thread as u32))
            } else {
                (std::mem::replace(&mut block.fibers[thread], NO_FIBER), command)
            }
        };
        match self.fibers[fiber as usize].resume(command) {
            Pause::Idle => self.idle.push(fiber),
            Pause::Waiting => {
                let waiting = current(|c| c.thread.get()) as usize;
                // SAFETY: as above.
                unsafe { (&mut (*self.block).fibers)[waiting] = fiber };
            }
        }
    }

    #[cold]
    fn add_fiber(fibers: &mut Vec<Fiber>, block: &mut Block, thread: usize) -> Option<u16> {
        match Fiber::new(fibers.len()) {
            Ok(fiber) => {
                fibers.push(fiber);
                Some((fibers.len() - 1) as u16)
            }
            Err(error) => {
                block.fail(thread as u32, FaultKind::Stack { message: error.to_string() });
                None
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.fibers.clear();
        // SAFETY: made by Box::into_raw in `new`; the fibers, which alone use it, are gone.
        drop(unsafe { Box::from_raw(self.block) });
    }
}
