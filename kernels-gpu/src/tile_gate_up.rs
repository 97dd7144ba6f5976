//! The gate and up layer of many tokens with its activation: see [`crate::tiles`].

use cuda_std::prelude::*;

use crate::silu_mul::{gated, gated_ordinary, is_ordinary};
use crate::tiles::{self, Layer, Layout, Tiles};

/// The layout of [`tile_gate_up_16()`].
pub const GATE_UP_16: Layout = Layout { output_warps: 4, token_warps: 1, groups: 1, pairs: 1, depth: 8 };
/// The layout of [`tile_gate_up_32()`].
pub const GATE_UP_32: Layout = Layout { output_warps: 2, token_warps: 2, groups: 2, pairs: 1, depth: 8 };
/// The layout of [`tile_gate_up_64()`].
pub const GATE_UP_64: Layout = Layout { output_warps: 2, token_warps: 2, groups: 2, pairs: 2, depth: 6 };

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn tile_gate_up<
    const OUTPUT_WARPS: usize,
    const TOKEN_WARPS: usize,
    const GROUPS: usize,
    const PAIRS: usize,
    const DEPTH: usize,
    const PENDING: usize,
>(
    x: In<bf16>,
    weight: In<bf16>,
    out: Out<bf16>,
    tokens: u32,
    ffn: u32,
    width: u32,
) {
    let block_groups = (OUTPUT_WARPS * GROUPS) as u32;
    let first_token = thread::block_idx_x() * (TOKEN_WARPS * PAIRS * 16) as u32;
    let g = thread::lane_id() / 4;
    tiles::compute::<OUTPUT_WARPS, TOKEN_WARPS, GROUPS, PAIRS, DEPTH, PENDING, false, _>(
        Layer { x, weight, tokens, outputs: 2 * ffn, width, first: 0, part: width },
        first_token,
        Tiles { first: thread::block_idx_y(), step: 1, count: 1 },
        // A group is 8 gates and their 8 ups, so that a lane has both of its products' outputs.
        |tile, r| {
            let gate = (tile * block_groups + r / 16) * 8 + r % 8;
            (if gate < ffn { gate } else { ffn - 1 }) + r % 16 / 8 * ffn
        },
        || (),
        |tile, sums, ()| {
            // All values at once and without a branch, or each would wait for the one before it. Gates that this does not
            // suit, hardly ever any, are computed again.
            let mut values = [[[[0.0f32; 2]; 2]; PAIRS]; GROUPS];
            let mut all_ordinary = true;
            let rounded = |sum: &[f32; 4], element: usize| (f32_to_bf16(sum[element]), f32_to_bf16(sum[element + 2]));
            for group in 0..GROUPS {
                for pair in 0..PAIRS {
                    for eight in 0..2 {
                        for element in 0..2 {
                            let (gate, up) = rounded(&sums[group][pair][eight], element);
                            values[group][pair][eight][element] = gated_ordinary(gate, up);
                            all_ordinary &= is_ordinary(gate);
                        }
                    }
                }
            }
            if !all_ordinary {
                for group in 0..GROUPS {
                    for pair in 0..PAIRS {
                        for eight in 0..2 {
                            for element in 0..2 {
                                let (gate, up) = rounded(&sums[group][pair][eight], element);
                                if !is_ordinary(gate) {
                                    values[group][pair][eight][element] = gated(gate, up);
                                }
                            }
                        }
                    }
                }
            }
            out.check(0, tokens as usize * ffn as usize);
            for pair in 0..PAIRS {
                for eight in 0..2 {
                    for element in 0..2 {
                        let token = first_token + tiles::token::<OUTPUT_WARPS, PAIRS>(pair, eight, element);
                        for group in 0..GROUPS {
                            let own = tiles::block_group::<OUTPUT_WARPS, GROUPS>(group);
                            let first = (tile * block_groups + own) * 8;
                            if token < tokens && first < ffn {
                                let at = token as usize * ffn as usize + (first + g) as usize;
                                let value = f32_to_bf16(values[group][pair][eight][element]);
                                // SAFETY: the token and the column, one of 8 of which there is the first, are those of
                                // the output (checked above).
                                unsafe { out.set_unchecked(at, value) };
                            }
                        }
                    }
                }
            }
        },
    );
}

macro_rules! gate_up_kernel {
    ($name:ident, $threads:tt, $layout:ident) => {
        /// The gate and up layer and the gated activation: the bits of [`crate::linear::linear_bf16()`] followed by
        /// [`crate::silu_mul::silu_mul()`].
        ///
        /// - `x`: bf16 \[M, K\]; `weight`: bf16 \[2 F, K\], gate then up; `out`: bf16 \[M, F\].
        /// - grid (ceil(M / tokens), ceil(2 F / outputs)), tokens and outputs of the layout; half of a block's outputs are
        ///   gates, half are their ups.
        /// - bytes: 4 F K + 2 M (K + F), with weights once per block of tokens and tokens once per block of outputs.
        /// - the caller: K is a multiple of 64, F of 8; [`Layout::ring_bytes`] of dynamic shared memory. `weight` is read
        ///   before the kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = 2)]
        pub fn $name(x: In<bf16>, weight: In<bf16>, out: Out<bf16>, tokens: u32, ffn: u32, width: u32) {
            const { assert!($layout.threads() == $threads) };
            tile_gate_up::<
                { $layout.output_warps },
                { $layout.token_warps },
                { $layout.groups },
                { $layout.pairs },
                { $layout.depth },
                { $layout.depth - 2 },
            >(x, weight, out, tokens, ffn, width);
        }
    };
}
gate_up_kernel!(tile_gate_up_16, 128, GATE_UP_16);
gate_up_kernel!(tile_gate_up_32, 128, GATE_UP_32);
gate_up_kernel!(tile_gate_up_64, 128, GATE_UP_64);
