//! What a GPU kernel written in Rust is made of: thread indices, barriers, warp shuffles, shared memory,
//! atomics, tensor-core products, asynchronous copies and bit-reproducible float functions.
//!
//! The names follow Rust-CUDA's `cuda_std`; the implementation is ours, because that crate does not build
//! with a current compiler. There are two of them behind one API:
//!
//! - on `nvptx64-nvidia-cuda`, every function is a few PTX instructions;
//! - anywhere else the same kernel runs on the CPU under the SIMT executor ([`cpu`]): lanes are stackful
//!   coroutines, warps have 32 lanes, and barriers, shuffles and votes are real rendezvous.
//!
//! A kernel is an ordinary function with the [`kernel`] attribute. Its buffer arguments are [`In`], [`Out`]
//! and [`InOut`]; everything else is a plain `u32`, `i32`, `u64` or `f32`.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `thread` | where am I: thread, block, lane, warp; the block barrier |
//! | `warp` | shuffles, votes and reductions over the 32 lanes of a warp |
//! | `global` | buffers in device memory |
//! | `shared` | memory shared by the threads of a block |
//! | `mma` | tensor-core products |
//! | `cp_async` | copies from global to shared memory that do not wait |
//! | `bulk` | the same by the copy engine, with barriers in shared memory (Hopper and later) |
//! | `tensor_copy` | boxes of matrices by the copy engine, into all blocks of a cluster (Hopper and later) |
//! | `wgmma` | tensor-core products of a warpgroup from shared memory (Hopper) |
//! | `tagged` | words that running blocks hand to each other |
//! | `math` | float functions with the same bits on every device |
//! | `bf16` | conversions to and from `half::bf16` |
//! | `launch` | (CPU side only) what the host needs to start a kernel |
//! | `cpu` | (CPU side only) the executor |
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(asm_experimental_arch))]

pub use cuda_std_macros::kernel;
pub use global::{In, InOut, Out};
pub use shared::Shared;

pub mod bf16;
pub mod bulk;
pub mod cp_async;
#[cfg(not(target_arch = "nvptx64"))]
pub mod cpu;
pub mod global;
#[cfg(not(target_arch = "nvptx64"))]
pub mod launch;
pub mod math;
pub mod mma;
pub mod shared;
pub mod tagged;
pub mod tensor_copy;
pub mod thread;
pub mod warp;
pub mod wgmma;

/// Names that a kernel file wants in scope.
pub mod prelude {
    pub use crate::bf16::{bf16_pair, bf16_to_f32, f32_to_bf16, unpack_bf16_pair};
    pub use crate::{In, InOut, Out, Shared, kernel, math, mma, shared_array, thread, warp};
    pub use half::bf16;
}

/// Types that may live in device memory: plain bits, any of which are a value.
///
/// # Safety
/// The type has no padding, no references, no drop glue, and every bit pattern is a value of it.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The name that the PTX checks and messages use.
    const NAME: &'static str;
}

macro_rules! elements {
    ($($t:ty = $name:literal),*) => {
        $(
            // SAFETY: an unsigned, signed or float word (or a transparent wrapper of one): all bits are values.
            unsafe impl Element for $t {
                const NAME: &'static str = $name;
            }
        )*
    };
}
elements!(u8 = "u8", u16 = "u16", u32 = "u32", i32 = "i32", u64 = "u64", f32 = "f32", half::bf16 = "bf16");

/// Ends the kernel with a fault: the launch fails, nothing more is written.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub(crate) fn trap() -> ! {
    // SAFETY: `trap` has no operands and does not return.
    unsafe { core::arch::asm!("trap;", options(noreturn, nostack)) }
}
