//! The gate and up layer of few tokens, and the gated activation: see [`crate::few`].

use cuda_std::prelude::*;

use crate::few::{CHUNK, Layout, Segment, Strips, arena, chains, normalised, own_strip};
use crate::silu_mul::gated;

/// Of [`few_gate_up()`] and [`few_gate_up_wide()`]: small models have a block for each multiprocessor of a large GPU, with
/// room beside it for the kernel before and the kernel after.
pub const GATE_UP: Layout = Layout { warps: 5, depth: 8 };

/// Each stage of the ring is waited for before the next is asked for: this is the largest layer, and there is time.
const PACE: usize = 0;

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn gate_up<const THREADS: usize>(
    residual: In<f32>,
    gain: In<bf16>,
    weight: In<bf16>,
    out: Out<bf16>,
    tokens: u32,
    width: u32,
    ffn: u32,
    eps: f32,
) {
    let (tokens, width, ffn) = (tokens as usize, width as usize, ffn as usize);
    let arena = arena(tokens, width, GATE_UP);
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let strips = ffn / 8;
    chains::<{ GATE_UP.depth }, { GATE_UP.depth / CHUNK - 2 }, PACE, _>(
        weight,
        arena,
        tokens,
        width,
        Segment { first: 0, width },
        Strips { first: own_strip(GATE_UP, strips), step: strips, end: strips },
        |strip, part| part * ffn + strip * 8,
        || normalised::<THREADS>(&arena.input, residual, gain, tokens, width, eps),
        |strip, sums, ()| {
            for index in 0..2 {
                let token = t * 2 + index;
                if token < tokens {
                    let value = gated(f32_to_bf16(sums[index]), f32_to_bf16(sums[index + 2]));
                    out.set(token * ffn + strip * 8 + g, f32_to_bf16(value));
                }
            }
        },
    );
}

macro_rules! gate_up_kernel {
    ($name:ident, $threads:tt) => {
        /// RMSNorm, the gate and up layer, and the gated activation.
        ///
        /// - `residual`: f32 \[T, C\]; `gain`: bf16 \[C\]; `weight`: bf16 \[2 F, C\], gate then up; `out`: bf16 \[T, F\].
        /// - grid: blocks of [`GATE_UP`]'s warps for F / 8 strips; a warp makes 8 gates and their 8 ups.
        /// - bytes: 4 F C, and 4 T C for each block.
        /// - the caller: T is at most [`FEW`](crate::few::FEW), C a multiple of 64, F of 16; dynamic shared memory as in [`few_qkv`](crate::few_qkv).
        #[kernel(block = $threads, min_blocks = 1)]
        pub fn $name(
            residual: In<f32>,
            gain: In<bf16>,
            weight: In<bf16>,
            out: Out<bf16>,
            tokens: u32,
            width: u32,
            ffn: u32,
            eps: f32,
        ) {
            gate_up::<$threads>(residual, gain, weight, out, tokens, width, ffn, eps);
        }
    };
}
gate_up_kernel!(few_gate_up, 160);
gate_up_kernel!(few_gate_up_wide, 256);
