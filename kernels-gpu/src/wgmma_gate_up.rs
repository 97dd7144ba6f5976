//! The gate and up layer of many tokens with its activation, on Hopper: see [`crate::warpgroup_tiles`].

use cuda_std::prelude::*;
use cuda_std::tensor_copy::copy_eights;

use crate::silu_mul::{gated, gated_ordinary, is_ordinary};
use crate::tiles::Tiles;
use crate::warpgroup_tiles::{self, Layout, STAGE};

/// The layout of [`wgmma_gate_up_64()`].
pub const GATE_UP_64: Layout = Layout { groups: 1, outputs: 80, depth: 12, ahead: 12, cluster: 1 };
/// The layout of [`wgmma_gate_up_128()`].
pub const GATE_UP_128: Layout = Layout { groups: 2, outputs: 80, depth: 8, ahead: 8, cluster: 1 };
/// The layout of [`wgmma_gate_up_256()`].
pub const GATE_UP_256: Layout = Layout { groups: 4, outputs: 80, depth: 5, ahead: 6, cluster: 1 };

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn wgmma_gate_up<const GROUPS: usize, const DEPTH: usize, const AHEAD: usize, const CLUSTER: usize>(
    x_map: In<u64>,
    weight_map: In<u64>,
    out: Out<bf16>,
    tokens: u32,
    ffn: u32,
    width: u32,
) {
    const OUTPUTS: usize = 80;
    const EIGHTS: usize = OUTPUTS / 16;
    let first_token = thread::block_idx_y() * (GROUPS * 64) as u32;
    warpgroup_tiles::compute::<GROUPS, OUTPUTS, DEPTH, AHEAD, CLUSTER, { OUTPUTS / 2 }, _>(
        x_map,
        first_token,
        0,
        width / STAGE as u32,
        Tiles { first: thread::block_idx_x(), step: 1, count: 1 },
        // Eight gates, their ups, the next eight gates: a lane has both of its products' outputs.
        |tile, k, place| {
            let eight = tile * EIGHTS as u32;
            // SAFETY: the map is of boxes of so many rows (the kernel's contract).
            unsafe {
                copy_eights(
                    &place.memory,
                    place.start,
                    &weight_map,
                    k,
                    0,
                    0,
                    eight,
                    &place.barriers,
                    place.barrier,
                    None,
                );
            };
        },
        || (),
        |tile, sums, ()| {
            for half in 0..2 {
                // A row's values at once and without a branch, or each would wait for the one before it. Gates that this does not
                // suit, hardly ever any, are computed again. (Both rows at once need more registers than 17 warps have.)
                let mut values = [[0.0f32; 2]; EIGHTS];
                let mut all_ordinary = true;
                let rounded = |eight: usize, element: usize| {
                    let at = eight * 8 + half * 2 + element;
                    (f32_to_bf16(sums[at]), f32_to_bf16(sums[at + 4]))
                };
                for eight in 0..EIGHTS {
                    for element in 0..2 {
                        let (gate, up) = rounded(eight, element);
                        values[eight][element] = gated_ordinary(gate, up);
                        all_ordinary &= is_ordinary(gate);
                    }
                }
                if !all_ordinary {
                    for eight in 0..EIGHTS {
                        for element in 0..2 {
                            let (gate, up) = rounded(eight, element);
                            if !is_ordinary(gate) {
                                values[eight][element] = gated(gate, up);
                            }
                        }
                    }
                }
                let token = first_token + warpgroup_tiles::token(half);
                for eight in 0..EIGHTS {
                    let at = tile * (OUTPUTS / 2) as u32 + warpgroup_tiles::column(eight);
                    if token < tokens && at < ffn {
                        let pair = values[eight].map(f32_to_bf16);
                        out.store(token as usize * ffn as usize + at as usize, pair);
                    }
                }
            }
        },
    );
}

macro_rules! gate_up_kernel {
    ($name:ident, $threads:tt, $cluster:tt, $layout:ident) => {
        /// The gate and up layer and the gated activation: the bits of [`crate::linear::linear_bf16()`] followed by
        /// [`crate::silu_mul::silu_mul()`].
        ///
        /// - `x_map`: the tensor map of x, bf16 \[M, K\], in boxes of 64 of k and the layout's rows; `weight_map`: that of the weight,
        ///   bf16 \[2 F, K\], gate then up, as \[F / 8\]\[gate, up\]\[8\]\[K\] in boxes of 5 of the first dimension, all of the
        ///   next two and 64 of k; `out`: bf16 \[M, F\].
        /// - grid (ceil(2 F / outputs) and what fills a cluster, ceil(M / tokens)), tokens and outputs of the layout; half of a
        ///   block's outputs are gates, half are their ups.
        /// - bytes: 4 F K + 2 M (K + F), with weights once per block of tokens and tokens once per cluster.
        /// - the caller: K is a multiple of 64, F of 8; [`Layout::ring_bytes`] of dynamic shared memory; an `sm_90a` image. The
        ///   weight is read before the kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = 1, cluster = $cluster)]
        pub fn $name(x_map: In<u64>, weight_map: In<u64>, out: Out<bf16>, tokens: u32, ffn: u32, width: u32) {
            const { assert!($layout.threads() == $threads && $layout.cluster == $cluster && $layout.outputs == 80) };
            wgmma_gate_up::<{ $layout.groups }, { $layout.depth }, { $layout.ahead }, $cluster>(
                x_map, weight_map, out, tokens, ffn, width,
            );
        }
    };
}
gate_up_kernel!(wgmma_gate_up_64, 160, 1, GATE_UP_64);
gate_up_kernel!(wgmma_gate_up_128, 288, 1, GATE_UP_128);
gate_up_kernel!(wgmma_gate_up_256, 544, 1, GATE_UP_256);
