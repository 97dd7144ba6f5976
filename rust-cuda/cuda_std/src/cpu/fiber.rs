//! Coroutines that run the threads of a block.
//!
//! A fiber pulls threads: it runs one after another to completion on the same stack, and only when a thread has to
//! wait does the scheduler take another fiber. So a kernel without barriers needs one fiber, and no stack is switched.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use corosensei::stack::{DefaultStack, Stack, StackPointer};
use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::block::Block;

/// Bytes of a fiber's stack; touched pages alone cost memory. Room for unwinding and for a panic's backtrace.
const STACK_BYTES: usize = 256 * 1024;

/// What the scheduler tells a fiber.
#[derive(Clone, Copy)]
pub(super) enum Command {
    /// Run this thread from its start.
    Start(u32),
    /// Go on with the thread that waits.
    Continue,
    /// Unwind the thread that waits.
    Abort,
    /// Return: the fiber is being dropped.
    Quit,
}

/// Why a fiber came back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    /// It has no thread.
    Idle,
    /// Its thread waits at a rendezvous.
    Waiting,
}

type Switch = Yielder<Command, Pause>;

/// What the running thread of a block is. One per OS thread.
pub(super) struct Current {
    /// Its index in the block.
    pub(super) thread: Cell<u32>,
    /// Its block; null outside a kernel.
    pub(super) block: Cell<*mut Block>,
    /// The block's shared memory.
    pub(super) arena: Cell<*mut u8>,
    /// True in checked mode.
    pub(super) checked: Cell<bool>,
    switch: Cell<*const Switch>,
}

thread_local! {
    static CURRENT: Current = const {
        Current {
            thread: Cell::new(0),
            block: Cell::new(std::ptr::null_mut()),
            arena: Cell::new(std::ptr::null_mut()),
            checked: Cell::new(false),
            switch: Cell::new(std::ptr::null()),
        }
    };
}

/// Reads the running thread's state.
#[inline(always)]
pub(super) fn current<R>(read: impl FnOnce(&Current) -> R) -> R {
    CURRENT.with(read)
}

/// The payload with which a faulty or aborted thread unwinds.
pub(super) struct Unwind;

/// Leaves the running thread without calling the panic hook.
pub(super) fn unwind() -> ! {
    resume_unwind(Box::new(Unwind))
}

/// Suspends the running thread until the scheduler continues it. Inlined up to the kernel's own code: processors
/// predict returns by a stack of calls, so each return between one switch and the next costs two mispredictions.
#[inline(always)]
pub(super) fn suspend() {
    let (thread, switch) = current(|c| (c.thread.get(), c.switch.get()));
    // SAFETY: set by `run_threads` on this very fiber, whose root frame holds the yielder and outlives the thread.
    let command = unsafe { (*switch).suspend(Pause::Waiting) };
    if matches!(command, Command::Abort) {
        unwind();
    }
    current(|c| {
        c.thread.set(thread);
        c.switch.set(switch);
    });
}

/// Runs `first`, and then every thread that the block hands out, until one of them waits for good or none is left.
fn run_threads(switch: &Switch, first: u32) {
    let mut thread = first;
    loop {
        let block = current(|c| {
            c.thread.set(thread);
            c.switch.set(switch);
            c.block.get()
        });
        // SAFETY: the scheduler set the block before it resumed this fiber and keeps it until all threads are done;
        // the arguments are the launch's, whose contract the entry asks for.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { ((*block).entry)(&*(*block).arguments) }));
        let panic = result.err().filter(|payload| !payload.is::<Unwind>());
        // SAFETY: as above; no other reference to the block is alive while a fiber runs.
        let next = unsafe { (*block).finish(thread, panic) };
        match next {
            Some(next) => thread = next,
            None => return,
        }
    }
}

/// A stack whose base is moved down a little. Stacks are aligned to pages, so without it the hot ends of the 32 stacks
/// of a warp would all fall into the same few sets of the first-level cache.
#[cfg(unix)]
struct ColouredStack {
    stack: DefaultStack,
    base: StackPointer,
}

#[cfg(unix)]
impl ColouredStack {
    fn new(index: usize) -> std::io::Result<Self> {
        let stack = DefaultStack::new(STACK_BYTES)?;
        let base = StackPointer::new(stack.base().get() - index % 32 * 128).unwrap_or(stack.base());
        Ok(Self { stack, base })
    }
}

#[cfg(unix)]
// SAFETY: the memory below `base` down to `limit` belongs to `stack`, which lives as long; it has a guard page, and
// the offset is a multiple of every stack alignment.
unsafe impl Stack for ColouredStack {
    fn base(&self) -> StackPointer {
        self.base
    }

    fn limit(&self) -> StackPointer {
        self.stack.limit()
    }
}

#[cfg(unix)]
type FiberStack = ColouredStack;
#[cfg(not(unix))]
type FiberStack = DefaultStack;

/// A coroutine that runs threads.
pub(super) struct Fiber(Coroutine<Command, Pause, (), FiberStack>);

impl Fiber {
    /// Fiber number `index` of its worker.
    pub(super) fn new(index: usize) -> std::io::Result<Self> {
        #[cfg(unix)]
        let stack = ColouredStack::new(index)?;
        #[cfg(not(unix))]
        let stack = {
            let _ = index;
            DefaultStack::new(STACK_BYTES)?
        };
        Ok(Self(Coroutine::with_stack(stack, |switch: &Switch, first: Command| {
            let mut command = first;
            loop {
                match command {
                    Command::Start(thread) => run_threads(switch, thread),
                    Command::Quit => return,
                    Command::Continue | Command::Abort => {}
                }
                command = switch.suspend(Pause::Idle);
            }
        })))
    }

    /// Runs the fiber until it pauses.
    #[inline(always)]
    pub(super) fn resume(&mut self, command: Command) -> Pause {
        match self.0.resume(command) {
            CoroutineResult::Yield(pause) => pause,
            CoroutineResult::Return(()) => Pause::Idle,
        }
    }
}

impl Drop for Fiber {
    fn drop(&mut self) {
        if self.0.started() && !self.0.done() {
            self.resume(Command::Quit);
        }
    }
}
