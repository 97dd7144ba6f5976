//! A linear layer of many tokens as f32 sums, with K in segments, on Hopper: see [`crate::warpgroup_tiles`].

use cuda_std::prelude::*;
use cuda_std::tensor_copy::copy_rows;

use crate::tiles::Tiles;
use crate::warpgroup_tiles::{self, Layout, STAGE};

/// The layout of [`wgmma_parts_64()`].
pub const PARTS_64: Layout = Layout { groups: 1, outputs: 32, depth: 18, ahead: 18, cluster: 1 };
/// The layout of [`wgmma_parts_128()`].
pub const PARTS_128: Layout = Layout { groups: 2, outputs: 32, depth: 10, ahead: 10, cluster: 1 };
/// The layout of [`wgmma_parts_256()`].
pub const PARTS_256: Layout = Layout { groups: 4, outputs: 32, depth: 6, ahead: 6, cluster: 1 };

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn wgmma_parts<const GROUPS: usize, const DEPTH: usize, const AHEAD: usize, const CLUSTER: usize>(
    x_map: In<u64>,
    weight_map: In<u64>,
    parts: Out<f32>,
    tokens: u32,
    outputs: u32,
    part: u32,
) {
    const OUTPUTS: usize = 32;
    let (first_token, segment) = (thread::block_idx_y() * (GROUPS * 64) as u32, thread::block_idx_z());
    warpgroup_tiles::compute::<GROUPS, OUTPUTS, DEPTH, AHEAD, CLUSTER, { OUTPUTS / 2 }, _>(
        x_map,
        first_token,
        segment * part,
        part / STAGE as u32,
        Tiles { first: thread::block_idx_x(), step: 1, count: 1 },
        |tile, k, place| {
            let row = tile * OUTPUTS as u32;
            // SAFETY: the map is of boxes of so many rows (the kernel's contract).
            unsafe { copy_rows(&place.memory, place.start, &weight_map, k, row, &place.barriers, place.barrier, None) };
        },
        || (),
        |tile, sums, ()| {
            for half in 0..2 {
                let token = first_token + warpgroup_tiles::token(half);
                let row = (segment as usize * tokens as usize + token as usize) * outputs as usize;
                for eight in 0..OUTPUTS / 8 {
                    let output = tile * OUTPUTS as u32 + warpgroup_tiles::column(eight);
                    if token < tokens && output < outputs {
                        let at = eight * 4 + half * 2;
                        parts.store(row + output as usize, [sums[at], sums[at + 1]]);
                    }
                }
            }
        },
    );
}

macro_rules! parts_kernel {
    ($name:ident, $threads:tt, $cluster:tt, $layout:ident) => {
        /// A linear layer with K in equal, consecutive segments: parts\[s, m, n\] = the sum over the k of segment s of
        /// x\[m, k\] weight\[n, k\], the chain of [`crate::linear`] from 0.
        ///
        /// - `x_map`: the tensor map of x, bf16 \[M, K\], in boxes of 64 of k and the layout's rows; `weight_map`: that of the weight,
        ///   bf16 \[N, K\], in boxes of 64 of k and the layout's outputs; `parts`: f32 \[S, M, N\].
        /// - grid (ceil(N / outputs) and what fills a cluster, ceil(M / tokens), S), tokens and outputs of the layout; a block makes
        ///   that tile of a segment.
        /// - bytes: 2 (N K + M K) + 4 S M N, with weights once per block of tokens and tokens once per cluster.
        /// - the caller: `part` = K / S is a multiple of 64, N of 8; [`Layout::ring_bytes`] of dynamic shared memory; an `sm_90a`
        ///   image. The weight is read before the kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = 1, cluster = $cluster)]
        pub fn $name(x_map: In<u64>, weight_map: In<u64>, parts: Out<f32>, tokens: u32, outputs: u32, part: u32) {
            const { assert!($layout.threads() == $threads && $layout.cluster == $cluster && $layout.outputs == 32) };
            wgmma_parts::<{ $layout.groups }, { $layout.depth }, { $layout.ahead }, $cluster>(
                x_map, weight_map, parts, tokens, outputs, part,
            );
        }
    };
}
parts_kernel!(wgmma_parts_64, 160, 1, PARTS_64);
parts_kernel!(wgmma_parts_128, 288, 1, PARTS_128);
parts_kernel!(wgmma_parts_256, 544, 1, PARTS_256);
