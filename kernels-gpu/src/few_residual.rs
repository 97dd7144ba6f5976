//! Layers of few tokens whose output is added to the residual stream: see [`crate::few`].

use cuda_std::prelude::*;

use crate::few::{AT_ONCE, CHUNK, Layout, Segment, Strips, arena, chains, copied};

/// Of the residual kernels, by the segments of K.
#[must_use]
pub const fn residual_layout(segments: usize) -> Layout {
    Layout { warps: segments, depth: if segments == 4 { 12 } else { 16 } }
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn few_residual<const SEGMENTS: usize, const DEPTH: usize, const PENDING: usize>(
    x: In<bf16>,
    weight: In<bf16>,
    residual: InOut<f32>,
    partials: Shared<f32>,
    tokens: usize,
    outputs: usize,
    width: usize,
) {
    let arena = arena(tokens, width, residual_layout(SEGMENTS));
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let warp = thread::warp_id() as usize;
    let part = width / SEGMENTS;
    let segment = Segment { first: warp * part, width: part };
    // The token and the output of each of the lane's four sums.
    let place = |element: usize| (t * 2 + element % 2, thread::block_idx_x() as usize * 16 + g + element / 2 * 8);
    chains::<DEPTH, PENDING, AT_ONCE, _>(
        weight,
        arena,
        tokens,
        width,
        segment,
        Strips { first: thread::block_idx_x() as usize, step: outputs, end: outputs.div_ceil(16) },
        |strip, part| strip * 16 + part * 8,
        || {
            thread::wait_for_predecessors();
            // Read early: the way to memory and back is longer than an addition.
            let mut before = [0.0; 4];
            for element in 0..4 {
                let (token, output) = place(element);
                if token < tokens && output < outputs && warp == 0 {
                    before[element] = residual.get(token * outputs + output);
                }
            }
            copied(&arena.input, x, tokens, width, segment);
            before
        },
        |_, mut sums, before| {
            if SEGMENTS > 1 {
                if warp > 0 {
                    partials.store(((warp - 1) * 32 + lane) * 4, sums);
                }
                thread::sync_threads();
                if warp > 0 {
                    return;
                }
                for segment in 1..SEGMENTS {
                    let more: [f32; 4] = partials.load(((segment - 1) * 32 + lane) * 4);
                    for element in 0..4 {
                        sums[element] += more[element];
                    }
                }
            }
            for element in 0..4 {
                let (token, output) = place(element);
                if token < tokens && output < outputs {
                    residual.set(token * outputs + output, before[element] + sums[element]);
                }
            }
        },
    );
}

macro_rules! residual_kernel {
    ($name:ident, $segments:literal, $threads:tt) => {
        /// A linear layer whose output is added to the residual stream, with K in this many segments
        /// (see [`crate::linear`]).
        ///
        /// - `x`: bf16 \[T, K\]; `weight`: bf16 \[C, K\]; `residual`: f32 \[T, C\].
        /// - grid: ceil(C / 16) blocks of a warp per segment; a block makes 16 outputs.
        /// - bytes: 2 C K, and 2 T K for each block.
        /// - the caller: T is at most [`FEW`](crate::few::FEW), K a multiple of 64 times the segments; dynamic shared memory as in
        ///   [`few_qkv`](crate::few_qkv).
        #[kernel(block = $threads, min_blocks = 1)]
        pub fn $name(x: In<bf16>, weight: In<bf16>, residual: InOut<f32>, tokens: u32, outputs: u32, width: u32) {
            const DEPTH: usize = residual_layout($segments).depth;
            let partials = shared_array!(f32, 128 * $segments);
            few_residual::<$segments, DEPTH, { DEPTH / CHUNK - 2 }>(
                x,
                weight,
                residual,
                partials,
                tokens as usize,
                outputs as usize,
                width as usize,
            );
        }
    };
}
residual_kernel!(few_residual_1, 1, 32);
residual_kernel!(few_residual_2, 2, 64);
residual_kernel!(few_residual_4, 4, 128);
