//! Launches kernels on the CPU.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::fault::{Fault, FaultKind};
use super::memory::SHARED_LIMIT;
use super::pool::Pool;
use super::random::Random;
use super::worker::{Job, run_block};
use crate::launch::{Grid, Launch};

/// Runs kernels: fast, or checked.
pub struct Executor(Mode);

enum Mode {
    Fast(Pool),
    Checked(u64),
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Mode::Fast(pool) => f.debug_struct("Executor").field("threads", &pool.threads()).finish(),
            Mode::Checked(seed) => f.debug_struct("Executor").field("seed", seed).finish(),
        }
    }
}

impl Executor {
    /// Fast mode on `threads` OS threads, the caller's among them: blocks run in parallel, and what costs little to
    /// look for is found (indices out of bounds, misaligned vectors, rendezvous that can never take place). A kernel
    /// that spins until another thread writes is not found: it hangs, as it may on a GPU.
    ///
    /// More than 32 threads count as 32: each may need 1024 stacks of two mappings each, and Linux gives a process
    /// 65530 mappings.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self(Mode::Fast(Pool::new(threads.clamp(1, 32) - 1)))
    }

    /// Checked mode: one OS thread; blocks and threads run in an order that `seed` decides; races, reads of memory
    /// that nobody wrote and divergent barriers are found as well. Buffers without a [`Shadow`](super::Shadow) are
    /// not checked for races and unwritten memory. Some hundred times slower.
    #[must_use]
    pub fn checked(seed: u64) -> Self {
        Self(Mode::Checked(seed))
    }

    /// OS threads that it uses.
    #[must_use]
    pub fn threads(&self) -> usize {
        match &self.0 {
            Mode::Fast(pool) => pool.threads(),
            Mode::Checked(_) => 1,
        }
    }

    /// Runs a launch to its end. After a fault the buffers that it writes hold anything; the executor stays usable.
    ///
    /// # Errors
    /// The fault of the lowest block among those that failed.
    pub fn run(&self, launch: &Launch<'_>, grid: Grid) -> Result<(), Fault> {
        let blocks = validate(launch, grid)?;
        match &self.0 {
            Mode::Fast(pool) => {
                let job = Job { launch, grid, checked: None };
                let (job, first) = (&job, Mutex::new(None::<(u64, Fault)>));
                pool.for_each(u64::from(blocks), &|linear| match run_block(job, linear as u32) {
                    Ok(()) => true,
                    Err(fault) => {
                        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                        if first.as_ref().is_none_or(|(earlier, _)| linear < *earlier) {
                            *first = Some((linear, fault));
                        }
                        false
                    }
                });
                first.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, fault)| Err(fault))
            }
            Mode::Checked(seed) => {
                static LAUNCHES: AtomicU64 = AtomicU64::new(1);
                let number = LAUNCHES.fetch_add(1, Ordering::Relaxed);
                let job = Job { launch, grid, checked: Some((*seed, number)) };
                let mut order: Vec<u32> = (0..blocks).collect();
                let mut random = Random::new(!seed);
                for last in (1..order.len()).rev() {
                    order.swap(last, random.below(last as u32 + 1) as usize);
                }
                order.into_iter().try_for_each(|linear| run_block(&job, linear))
            }
        }
    }

    /// Calls `task` for every index below `tasks` on the executor's threads, in any order: for work that is not a
    /// kernel and would otherwise fight with it for the cores. Little work stays on the caller's thread. A task must
    /// not use the executor itself.
    ///
    /// # Panics
    /// When a task panics.
    pub fn for_each(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        match &self.0 {
            Mode::Fast(pool) => pool.for_each(tasks as u64, &|index| {
                task(index as usize);
                true
            }),
            Mode::Checked(_) => (0..tasks).for_each(task),
        }
    }
}

/// The number of blocks, if a GPU could run the launch.
fn validate(launch: &Launch<'_>, grid: Grid) -> Result<u32, Fault> {
    let [x, y, z] = grid.blocks;
    let fault = |kind| Err(Fault { kernel: launch.kernel().name, block: [0; 3], thread: 0, kind: Box::new(kind) });
    let bytes = grid.dynamic_shared_bytes as usize;
    if bytes > SHARED_LIMIT {
        return fault(FaultKind::SharedMemory { bytes, limit: SHARED_LIMIT, at: None });
    }
    let blocks = x.checked_mul(y).and_then(|xy| xy.checked_mul(z)).unwrap_or(0);
    if blocks == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 {
        return fault(FaultKind::Grid { blocks: grid.blocks });
    }
    Ok(blocks)
}
