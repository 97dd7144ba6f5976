//! Where the calling thread is, and the barrier of its block.
//!
//! Blocks are one-dimensional; grids have three dimensions.

#[cfg(target_arch = "nvptx64")]
macro_rules! special_register {
    ($name:literal $(, $pure:ident)?) => {{
        let value: u32;
        // SAFETY: reads a special register; no memory, no side effect.
        unsafe {
            core::arch::asm!(concat!("mov.u32 {}, %", $name, ";"), out(reg32) value, options($($pure,)? nomem, nostack));
        }
        value
    }};
}

/// A function that reads a register. One that is `pure` may be read once for many calls, and anywhere; any other is read where
/// each call stands.
macro_rules! register_function {
    ($(#[$doc:meta])* $name:ident, $register:literal, $cpu:expr $(, $pure:ident)?) => {
        $(#[$doc])*
        #[inline(always)]
        #[must_use]
        pub fn $name() -> u32 {
            #[cfg(target_arch = "nvptx64")]
            {
                special_register!($register $(, $pure)?)
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                $cpu
            }
        }
    };
}

register_function!(
    /// The thread's index in its block.
    thread_idx_x, "tid.x", crate::cpu::thread_idx(), pure
);
register_function!(
    /// Threads in a block.
    block_dim_x, "ntid.x", crate::cpu::block_dim(), pure
);
register_function!(
    /// The block's first index in the grid.
    block_idx_x, "ctaid.x", crate::cpu::block_idx()[0], pure
);
register_function!(
    /// The block's second index in the grid.
    block_idx_y, "ctaid.y", crate::cpu::block_idx()[1], pure
);
register_function!(
    /// The block's third index in the grid.
    block_idx_z, "ctaid.z", crate::cpu::block_idx()[2], pure
);
register_function!(
    /// Blocks in the grid's first dimension.
    grid_dim_x, "nctaid.x", crate::cpu::grid_dim()[0], pure
);
register_function!(
    /// Blocks in the grid's second dimension.
    grid_dim_y, "nctaid.y", crate::cpu::grid_dim()[1], pure
);

register_function!(
    /// [`thread_idx_x`], read anew: what was computed from an earlier reading does not serve for this one. Inside a loop this
    /// keeps the compiler from making many addresses before the loop and holding all of them in registers.
    thread_idx_x_anew, "tid.x", crate::cpu::thread_idx()
);
register_function!(
    /// The multiprocessor's clock, in cycles modulo 2^32; 0 on the CPU.
    clock, "clock", 0
);

/// A number that the compiler cannot tell from any other: what is computed from it is computed where it is used, and not held in
/// registers from before a loop on.
#[inline(always)]
#[must_use]
pub fn number_anew(value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let same: u32;
        // SAFETY: a move between registers. Not `pure`, so that it stays where it is.
        unsafe {
            core::arch::asm!("mov.b32 {}, {};", out(reg32) same, in(reg32) value, options(nomem, nostack));
        }
        same
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        value
    }
}

/// The thread's index in its warp, 0 to 31.
#[inline(always)]
#[must_use]
pub fn lane_id() -> u32 {
    thread_idx_x() & 31
}

/// The warp's index in its block.
#[inline(always)]
#[must_use]
pub fn warp_id() -> u32 {
    thread_idx_x() >> 5
}

/// The thread's index in the grid's first dimension.
#[inline(always)]
#[must_use]
pub fn index_1d() -> u64 {
    u64::from(block_idx_x()) * u64::from(block_dim_x()) + u64::from(thread_idx_x())
}

/// The barrier: no thread of the block passes before every thread of the block has arrived, and what they
/// wrote to shared and global memory before it is visible to the block after it.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_threads() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier; the default memory clobber orders the surrounding accesses.
    unsafe {
        core::arch::asm!("bar.sync 0;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    crate::cpu::sync_threads();
}

/// A barrier of some warps: no thread passes before the first `THREADS` threads' worth of calls with this number (1 to 15) have
/// arrived. For blocks whose warps have different tasks; a GPU only.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_some<const NUMBER: u32, const THREADS: u32>() {
    const { assert!(NUMBER > 0 && NUMBER < 16 && THREADS.is_multiple_of(32)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier; the default memory clobber orders the surrounding accesses.
    unsafe {
        core::arch::asm!("bar.sync {}, {};", const NUMBER, const THREADS, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    crate::cpu::gpu_only()
}

/// Waits until the kernels that this one was launched behind have ended and their writes are visible.
///
/// A kernel that is launched with programmatic dependent launch starts while its predecessor still runs: before this call it
/// may only touch memory that no earlier kernel of the stream writes. Where the launch has no such attribute, where the GPU
/// does not know it, and on the CPU, it does nothing.
#[inline(always)]
pub fn wait_for_predecessors() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: no operands; the default memory clobber keeps later accesses behind it.
    unsafe {
        core::arch::asm!("griddepcontrol.wait;", options(nostack));
    }
}

/// Allows the kernel launched behind this one to start as soon as every block of this one has called this or ended, while
/// they still run. The successor waits with [`wait_for_predecessors`] before it reads what this one writes.
#[inline(always)]
pub fn allow_successor() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: no operands; touches no memory of ours.
    unsafe {
        core::arch::asm!("griddepcontrol.launch_dependents;", options(nostack));
    }
}
