//! Why a launch failed, with the lines of the kernel that did it.

use std::error::Error;
use std::fmt;
use std::panic::Location;

use super::Space;

/// A launch that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kernel's name.
    pub kernel: &'static str,
    /// The block that failed.
    pub block: [u32; 3],
    /// The thread of that block.
    pub thread: u32,
    /// What it did.
    pub kind: Box<FaultKind>,
}

/// One side of a conflict: which thread did something, and where in the source.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The thread's block.
    pub block: [u32; 3],
    /// The thread in its block.
    pub thread: u32,
    /// What it did there.
    pub action: Action,
    /// The line of the kernel.
    pub location: &'static Location<'static>,
}

/// What a thread did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A read.
    Read,
    /// A write.
    Write,
    /// An atomic update.
    Atomic,
    /// An asynchronous copy to shared memory.
    AsyncCopy,
    /// The block's barrier.
    SyncThreads,
    /// The warp's barrier.
    SyncWarp,
    /// A shuffle or a vote.
    Exchange,
    /// A tensor-core product.
    Mma,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// An access outside a buffer or a shared array.
    OutOfBounds {
        /// The memory.
        space: Space,
        /// The first element of the access.
        index: usize,
        /// Elements of the access.
        count: usize,
        /// Elements that there are.
        length: usize,
        /// The line.
        at: &'static Location<'static>,
    },
    /// A vector access to an address that is not a multiple of its size.
    Misaligned {
        /// The address (in shared memory: the offset).
        address: usize,
        /// Bytes of the access.
        bytes: usize,
        /// The line.
        at: &'static Location<'static>,
    },
    /// A read of memory that nobody has written.
    Uninitialised {
        /// The memory.
        space: Space,
        /// Its byte in the buffer's allocation or in the block's shared memory.
        offset: usize,
        /// The line.
        at: &'static Location<'static>,
    },
    /// Two threads used the same bytes, at least one wrote, and nothing orders them.
    Race {
        /// The memory.
        space: Space,
        /// The byte in the buffer's allocation or in the block's shared memory.
        offset: usize,
        /// The access that the executor saw first.
        first: Site,
        /// The other.
        second: Site,
    },
    /// An access to shared memory that an asynchronous copy is still writing: its thread has not waited for it.
    UnfinishedCopy {
        /// The byte in the block's shared memory.
        offset: usize,
        /// The copy.
        copy: Site,
        /// The access.
        access: Site,
    },
    /// Threads that had to meet took different ways: two rendezvous, or one and the kernel's end.
    Divergence {
        /// A thread that waits.
        waits: Site,
        /// The thread that does not come.
        other: u32,
        /// Where that one waits; none when it has left the kernel.
        other_at: Option<Site>,
    },
    /// No thread of the block can go on.
    Deadlock {
        /// A thread that waits.
        waits: Site,
        /// A thread that it waits for.
        other: u32,
        /// Where that one waits; none when it has left the kernel.
        other_at: Option<Site>,
    },
    /// More shared memory than a block may have.
    SharedMemory {
        /// Bytes that the block would need.
        bytes: usize,
        /// Bytes that it may have.
        limit: usize,
        /// The line; none when the launch itself asks for too much.
        at: Option<&'static Location<'static>>,
    },
    /// The kernel panicked. The panic hook has told where.
    Panic {
        /// The panic's message.
        message: String,
    },
    /// A grid that no device takes: a dimension is 0 or too large.
    Grid {
        /// Its blocks.
        blocks: [u32; 3],
    },
    /// The operating system gives no memory for another thread's stack.
    Stack {
        /// Its message.
        message: String,
    },
    /// The kernel's blocks wait for each other, or use a GPU's copy engine; the executor has neither.
    GpuOnly {
        /// The line.
        at: &'static Location<'static>,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "atomic update",
            Self::AsyncCopy => "asynchronous copy",
            Self::SyncThreads => "sync_threads",
            Self::SyncWarp => "sync_warp",
            Self::Exchange => "shuffle or vote",
            Self::Mma => "tensor-core product",
        })
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "{} at {} by thread {} of block ({x}, {y}, {z})", self.action, self.location, self.thread)
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Global => "global memory",
            Self::Shared => "shared memory",
        })
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { space, index, count, length, at } => {
                write!(f, "{at}: {count} element(s) from {index} on are outside the {length} of this {space}")
            }
            Self::Misaligned { address, bytes, at } => {
                write!(f, "{at}: an access of {bytes} bytes to address {address:#x}, which is not a multiple of them")
            }
            Self::Uninitialised { space, offset, at } => {
                write!(f, "{at}: reads byte {offset} of {space}, which nobody has written")
            }
            Self::Race { space, offset, first, second } => {
                write!(f, "race on byte {offset} of {space}: {first}, and {second}; put a barrier between them")
            }
            Self::UnfinishedCopy { offset, copy, access } => write!(
                f,
                "byte {offset} of shared memory is still being copied: {access}, before the wait for the {copy}; \
                 call cp_async::wait_group and a barrier between them"
            ),
            Self::Divergence { waits, other, other_at } => {
                write!(f, "divergence: {waits} needs thread {other}, which ")?;
                match other_at {
                    Some(site) => write!(f, "is elsewhere: {site}"),
                    None => f.write_str("has left the kernel"),
                }
            }
            Self::Deadlock { waits, other, other_at } => {
                write!(f, "deadlock: {waits} waits for thread {other}, which ")?;
                match other_at {
                    Some(site) => write!(f, "waits elsewhere: {site}"),
                    None => f.write_str("has left the kernel"),
                }
            }
            Self::SharedMemory { bytes, limit, at } => {
                write!(f, "the block needs {bytes} bytes of shared memory and may have {limit}")?;
                at.map_or(Ok(()), |at| write!(f, " ({at})"))
            }
            Self::Panic { message } => write!(f, "the kernel panicked: {message}"),
            Self::Grid { blocks: [x, y, z] } => {
                write!(f, "a grid of {x} x {y} x {z} blocks: 1 to 2147483647 x 65535 x 65535, 4294967295 in all")
            }
            Self::Stack { message } => write!(f, "no memory for a thread's stack: {message}"),
            Self::GpuOnly { at } => {
                write!(
                    f,
                    "{at} needs a GPU: the executor runs a block to its end before the next, and has no copy engine"
                )
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "kernel {}, block ({x}, {y}, {z}), thread {}: {}", self.kernel, self.thread, self.kind)
    }
}

impl Error for Fault {}
