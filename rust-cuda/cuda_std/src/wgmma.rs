//! Matrix products of a warpgroup (four consecutive warps, the first a multiple of four) from shared memory: `wgmma`, of compute
//! capability 9.0 with its architecture-specific features.
//!
//! An operand is a tile of rows of 64 bf16 (128 bytes) in the layout that [`tensor_copy`](crate::tensor_copy) leaves: 16-byte piece
//! p of row r stands in place p ^ (r % 8) of the row (PTX ISA, "128-byte swizzle").
//!
//! On the CPU, and on a GPU without them, a kernel that multiplies so ends with a fault.

use half::bf16;

use crate::Shared;

/// Rows of the first operand.
pub const ROWS: usize = 64;

/// Elements of k in a row of a tile.
pub const DEPTH: usize = 64;

/// A tile as an operand: PTX's matrix descriptor.
#[derive(Clone, Copy)]
pub struct Operand(u64);

impl Operand {
    /// The tile whose first row starts at element `start`, at a multiple of 1024 bytes of shared memory.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn new(memory: &Shared<bf16>, start: usize) -> Self {
        #[cfg(target_arch = "nvptx64")]
        {
            /// From eight rows to the next eight, in units of 16 bytes.
            const EIGHT_ROWS: u64 = 8 * 128 / 16;
            /// The 128-byte swizzle. With it the other distance means nothing.
            const SWIZZLE: u64 = 1 << 62;
            let address = u64::from(memory.address_of(start) & 0x3_ffff) >> 4;
            Self(address | 1 << 16 | EIGHT_ROWS << 32 | SWIZZLE)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (memory, start);
            crate::cpu::gpu_only()
        }
    }
}

/// Sums of a warpgroup's tile of 64 rows and N columns, `COUNT` = N / 2 to a thread. Of warp w (of four) and lane l, element
/// 4 i + j is of row 16 w + l / 4, or 8 more for j > 1, and column 8 i + 2 (l % 4) + j % 2.
pub trait Sums {
    /// Starts to add the products of a stage, 64 of k: the chain of four steps of 16 k in order, each of which adds to what is there.
    /// `a` has 64 rows, `b` has N. [`wait`] tells when they have been read; the sums are there after [`settle`](Self::settle).
    fn add(&mut self, a: Operand, b: Operand);

    /// Waits until all that was started is done.
    fn settle(&mut self);
}

/// Waits until all stages that a warpgroup has started, but for the last `PENDING`, have been read.
#[inline(always)]
pub fn wait<const PENDING: u32>() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
    // SAFETY: a wait.
    unsafe {
        core::arch::asm!("wgmma.wait_group.sync.aligned {};", const PENDING, options(nostack));
    }
}

macro_rules! sums {
    ($columns:literal: 0 $($i:literal)*) => {
        impl Sums for [f32; $columns / 2] {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            fn add(&mut self, a: Operand, b: Operand) {
                #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
                // SAFETY: reads shared memory of the two tiles (the kernel's duty) and registers.
                unsafe {
                    core::arch::asm!(
                        "{{",
                        ".reg .pred add;",
                        ".reg .b64 a, b;",
                        "setp.eq.u32 add, 0, 0;",
                        "mov.b64 a, {a};",
                        "mov.b64 b, {b};",
                        "wgmma.fence.sync.aligned;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "wgmma.commit_group.sync.aligned;",
                        "}}",
                        inout(reg32) self[0],
                        $(inout(reg32) self[$i],)*
                        a = in(reg64) a.0,
                        b = in(reg64) b.0,
                        options(nostack)
                    );
                }
                #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90a")))]
                {
                    let _ = (a.0, b.0);
                    crate::bulk::unsupported()
                }
            }

            #[inline(always)]
            fn settle(&mut self) {
                #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
                // SAFETY: a wait; the registers are named because they change until it is over.
                unsafe {
                    core::arch::asm!(
                        concat!("wgmma.wait_group.sync.aligned 0; // {0}", $(" {", $i, "}",)*),
                        inout(reg32) self[0],
                        $(inout(reg32) self[$i],)*
                        options(nostack)
                    );
                }
            }
        }
    };
    (@step $columns:literal 0 $($i:literal)*) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.bf16.bf16 {{{0}", $(", {", $i, "}",)*
            "}}, a, b, add, 1, 1, 0, 0;"
        )
    };
}
sums!(32: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
sums!(80: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39);
sums!(96: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47);
sums!(128: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63);
