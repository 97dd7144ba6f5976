//! Worker threads that help with one job at a time.
//!
//! A job starts on the caller's thread; workers join while it is open, and the caller waits only for those that did.
//! So a job that is over before anybody wakes up costs the caller next to nothing. Idle workers spin for a moment,
//! because launches come in quick succession, and then sleep.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(30);
/// Work that is over sooner than this stays on the caller's thread: waking a worker costs a few microseconds.
const WORTH_WAKING: Duration = Duration::from_micros(15);

const OPEN: u64 = 1;
const ONE_HELPER: u64 = 2;
const HELPERS: u64 = 0xffff_fffe;
const GENERATION_SHIFT: u32 = 32;

type Job<'a> = dyn Fn() + Sync + 'a;

struct Shared {
    /// Bit 0: a job is open; bits 1 to 31: helpers inside it; bits 32 to 63: the job's number.
    state: AtomicU64,
    /// The open job. Written only while no job is open and no helper is inside.
    job: UnsafeCell<Option<*const Job<'static>>>,
    panicked: AtomicBool,
    quit: AtomicBool,
}

// SAFETY: `job` is written under the pool's lock while the state is closed with no helpers, and read only by helpers
// that entered through the state, which the writer published after it; the job itself is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

struct Worker {
    asleep: Arc<AtomicBool>,
    handle: JoinHandle<()>,
}

/// Worker threads.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    one_job: Mutex<()>,
}

impl Pool {
    /// `helpers` threads besides the caller's. Fewer when the system refuses one.
    pub(super) fn new(helpers: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            quit: AtomicBool::new(false),
        });
        let workers = (0..helpers)
            .map_while(|index| {
                let asleep = Arc::new(AtomicBool::new(false));
                let (shared, flag) = (Arc::clone(&shared), Arc::clone(&asleep));
                let thread = std::thread::Builder::new().name(format!("kernel-{index}"));
                thread.spawn(move || shared.work(&flag)).ok().map(|handle| Worker { asleep, handle })
            })
            .collect();
        Self { shared, workers, one_job: Mutex::new(()) }
    }

    /// Threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` for every index below `tasks`, in any order and on any thread, until one call returns false.
    ///
    /// # Panics
    /// When a call panics, after all calls that had begun are over.
    pub(super) fn for_each(&self, tasks: u64, task: &(dyn Fn(u64) -> bool + Sync)) {
        let next = AtomicU64::new(0);
        let go_on = AtomicBool::new(true);
        let one = || {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks || !go_on.load(Ordering::Relaxed) {
                return false;
            }
            if !task(index) {
                go_on.store(false, Ordering::Relaxed);
            }
            true
        };
        let all = || while one() {};
        if self.workers.is_empty() || tasks < 2 {
            return all();
        }
        let start = Instant::now();
        let mut done = 0;
        while one() {
            done += 1;
            let remaining = tasks - done;
            if start.elapsed() * u32::try_from(remaining).unwrap_or(u32::MAX) > WORTH_WAKING * done as u32 {
                return self.share(remaining, &all);
            }
        }
    }

    /// Runs `job` on this thread and on the workers that come before it is over here.
    fn share(&self, tasks: u64, job: &Job<'_>) {
        let lock = self.one_job.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        shared.panicked.store(false, Ordering::Relaxed);
        // SAFETY: only the lifetime changes; `Closing` keeps this frame until no helper is inside.
        let job_pointer = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) };
        // SAFETY: under the lock, with the state closed and without helpers (the last owner waited for that).
        unsafe { *shared.job.get() = Some(job_pointer) };
        let generation = (shared.state.load(Ordering::Relaxed) >> GENERATION_SHIFT).wrapping_add(1);
        shared.state.store((generation << GENERATION_SHIFT) | OPEN, Ordering::SeqCst);
        let closing = Closing(shared);
        for worker in self.workers.iter().take(usize::try_from(tasks).unwrap_or(usize::MAX)) {
            if worker.asleep.swap(false, Ordering::SeqCst) {
                worker.handle.thread().unpark();
            }
        }
        job();
        drop(closing);
        drop(lock);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a task panicked on a worker thread");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.handle.thread().unpark();
            // A worker catches its jobs' panics, so it ends in order.
            let _ = worker.handle.join();
        }
    }
}

/// Closes the job and waits for its helpers, also when the job panics.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while state & HELPERS != 0 {
            spins += 1;
            if spins.is_multiple_of(256) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    fn work(&self, asleep: &AtomicBool) {
        let mut seen = 0;
        let mut idle_since = Instant::now();
        while !self.quit.load(Ordering::Relaxed) {
            if self.help(&mut seen) {
                idle_since = Instant::now();
                continue;
            }
            for _ in 0..64 {
                std::hint::spin_loop();
            }
            if idle_since.elapsed() < SPIN {
                continue;
            }
            asleep.store(true, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            let nothing_new = state & OPEN == 0 || state >> GENERATION_SHIFT == seen;
            if nothing_new && !self.quit.load(Ordering::SeqCst) {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
            idle_since = Instant::now();
        }
    }

    /// Joins the open job unless it has been joined already.
    fn help(&self, seen: &mut u64) -> bool {
        let state = self.state.load(Ordering::Acquire);
        let generation = state >> GENERATION_SHIFT;
        if state & OPEN == 0 || generation == *seen {
            return false;
        }
        if self.state.compare_exchange(state, state + ONE_HELPER, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true;
        }
        *seen = generation;
        // SAFETY: entered while the job was open, so its owner waits until the count falls; the write of the pointer
        // happened before the state was opened.
        let job = unsafe { *self.job.get() };
        if let Some(job) = job {
            // SAFETY: as above.
            if catch_unwind(AssertUnwindSafe(|| unsafe { (*job)() })).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
        self.state.fetch_sub(ONE_HELPER, Ordering::AcqRel);
        true
    }
}
