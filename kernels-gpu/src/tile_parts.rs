//! A linear layer of many tokens as f32 sums, with K in segments: see [`crate::tiles`].

use cuda_std::prelude::*;

use crate::tiles::{self, Layer, Layout, Tiles};

/// The layout of [`tile_parts_16()`].
pub const PARTS_16: Layout = Layout { output_warps: 2, token_warps: 1, groups: 1, pairs: 1, depth: 14 };
/// The layout of [`tile_parts_32()`].
pub const PARTS_32: Layout = Layout { output_warps: 2, token_warps: 2, groups: 1, pairs: 1, depth: 12 };
/// The layout of [`tile_parts_64()`].
pub const PARTS_64: Layout = Layout { output_warps: 2, token_warps: 2, groups: 1, pairs: 2, depth: 8 };

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn tile_parts<
    const OUTPUT_WARPS: usize,
    const TOKEN_WARPS: usize,
    const GROUPS: usize,
    const PAIRS: usize,
    const DEPTH: usize,
    const PENDING: usize,
>(
    x: In<bf16>,
    weight: In<bf16>,
    parts: Out<f32>,
    tokens: u32,
    outputs: u32,
    width: u32,
    part: u32,
) {
    let block_outputs = (OUTPUT_WARPS * GROUPS * 16) as u32;
    let first_token = thread::block_idx_x() * (TOKEN_WARPS * PAIRS * 16) as u32;
    let segment = thread::block_idx_z();
    let g = thread::lane_id() / 4;
    let matrix = tokens as usize * outputs as usize;
    tiles::compute::<OUTPUT_WARPS, TOKEN_WARPS, GROUPS, PAIRS, DEPTH, PENDING, false, _>(
        Layer { x, weight, tokens, outputs, width, first: segment * part, part },
        first_token,
        Tiles { first: thread::block_idx_y(), step: 1, count: 1 },
        |tile, r| tile * block_outputs + r,
        || (),
        |tile, sums, ()| {
            let start = segment as usize * matrix;
            parts.check(start, matrix);
            for pair in 0..PAIRS {
                for eight in 0..2 {
                    for element in 0..2 {
                        let token = first_token + tiles::token::<OUTPUT_WARPS, PAIRS>(pair, eight, element);
                        let row = start + token as usize * outputs as usize;
                        for group in 0..GROUPS {
                            let first = tile * block_outputs + tiles::block_group::<OUTPUT_WARPS, GROUPS>(group) * 16;
                            if token < tokens && first < outputs {
                                for half in 0..2 {
                                    let at = row + (first + g) as usize + half * 8;
                                    let sum = sums[group][pair][eight][half * 2 + element];
                                    // SAFETY: the token and the output, one of 16 of which there is the first, are
                                    // those of the segment's matrix, which is inside (checked above).
                                    unsafe { parts.set_unchecked(at, sum) };
                                }
                            }
                        }
                    }
                }
            }
        },
    );
}

macro_rules! parts_kernel {
    ($name:ident, $threads:tt, $layout:ident) => {
        /// A linear layer with K in equal, consecutive segments: parts\[s, m, n\] = the sum over the k of segment s of
        /// x\[m, k\] weight\[n, k\], the chain of [`crate::linear`] from 0.
        ///
        /// - `x`: bf16 \[M, K\]; `weight`: bf16 \[N, K\]; `parts`: f32 \[S, M, N\].
        /// - grid (ceil(M / tokens), ceil(N / outputs), S), tokens and outputs of the layout; a block makes that tile of a
        ///   segment.
        /// - bytes: 2 (N K + M K) + 4 S M N, with weights once per block of tokens and tokens once per block of outputs.
        /// - the caller: `part` = K / S is a multiple of 64, N of 16; [`Layout::ring_bytes`] of dynamic shared memory. `weight` is read
        ///   before the kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = 2)]
        pub fn $name(x: In<bf16>, weight: In<bf16>, parts: Out<f32>, tokens: u32, outputs: u32, width: u32, part: u32) {
            const { assert!($layout.threads() == $threads) };
            tile_parts::<
                { $layout.output_warps },
                { $layout.token_warps },
                { $layout.groups },
                { $layout.pairs },
                { $layout.depth },
                { $layout.depth - 2 },
            >(x, weight, parts, tokens, outputs, width, part);
        }
    };
}
parts_kernel!(tile_parts_16, 64, PARTS_16);
parts_kernel!(tile_parts_32, 128, PARTS_32);
parts_kernel!(tile_parts_64, 128, PARTS_64);
