//! The head of many tokens, and their best tokens, on Hopper: see [`crate::warpgroup_tiles`].

use cuda_std::prelude::*;
use cuda_std::tensor_copy::copy_rows;
use cuda_std::wgmma::Sums;

use crate::rank;
use crate::tiles::Tiles;
use crate::warpgroup_tiles::{self, Layout, STAGE};

/// The layout of [`wgmma_logits_64()`].
pub const LOGITS_64: Layout = Layout { groups: 1, outputs: 128, depth: 8, ahead: 8, cluster: 2 };
/// The layout of [`wgmma_logits_128()`].
pub const LOGITS_128: Layout = Layout { groups: 2, outputs: 128, depth: 6, ahead: 6, cluster: 2 };
/// The layout of [`wgmma_logits_256()`]: 17 warps have registers for no more outputs.
pub const LOGITS_256: Layout = Layout { groups: 4, outputs: 96, depth: 5, ahead: 5, cluster: 2 };

/// The best of what a lane has seen for a token: ids come in rising order, so the first of equals stays. NaN and negative
/// infinity never get here.
#[derive(Clone, Copy)]
struct Best {
    logit: f32,
    id: u32,
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn wgmma_logits<
    const GROUPS: usize,
    const OUTPUTS: usize,
    const DEPTH: usize,
    const AHEAD: usize,
    const CLUSTER: usize,
    const COUNT: usize,
>(
    x_map: In<u64>,
    weight_map: In<u64>,
    logits: Out<f32>,
    best: Out<u64>,
    tokens: u32,
    vocab: u32,
    width: u32,
) where
    [f32; COUNT]: Sums,
{
    let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
    let first_token = thread::block_idx_y() * (GROUPS * 64) as u32;
    let mut held = [Best { logit: f32::NEG_INFINITY, id: 0 }; 2];
    warpgroup_tiles::compute::<GROUPS, OUTPUTS, DEPTH, AHEAD, CLUSTER, COUNT, _>(
        x_map,
        first_token,
        0,
        width / STAGE as u32,
        // All blocks have as many: a cluster's share their tokens' copies. What is beyond the vocabulary is zeros.
        Tiles { first: block, step: blocks, count: vocab.div_ceil(OUTPUTS as u32).div_ceil(blocks) },
        |tile, k, place| {
            let row = tile * OUTPUTS as u32;
            // SAFETY: the map is of boxes of so many rows (the kernel's contract).
            unsafe { copy_rows(&place.memory, place.start, &weight_map, k, row, &place.barriers, place.barrier, None) };
        },
        || (),
        |tile, sums, ()| {
            for half in 0..2 {
                let held = &mut held[half];
                // Computed where they are used: 17 warps have no registers for all ids.
                let first = thread::number_anew(tile * OUTPUTS as u32 + warpgroup_tiles::column(0));
                for eight in 0..OUTPUTS / 8 {
                    for element in 0..2 {
                        let id = first + (eight * 8 + element) as u32;
                        let logit = sums[eight * 4 + half * 2 + element];
                        let better = logit > held.logit && id < vocab;
                        held.logit = if better { logit } else { held.logit };
                        held.id = if better { id } else { held.id };
                    }
                }
            }
            if logits.is_empty() {
                return;
            }
            logits.check(0, tokens as usize * vocab as usize);
            for half in 0..2 {
                let token = first_token + warpgroup_tiles::token(half);
                if token >= tokens {
                    continue;
                }
                let first = thread::number_anew(tile * OUTPUTS as u32 + warpgroup_tiles::column(0));
                let row = token as usize * vocab as usize + first as usize;
                for eight in 0..OUTPUTS / 8 {
                    for element in 0..2 {
                        let column = eight * 8 + element;
                        if first + (column as u32) < vocab {
                            // SAFETY: the token and the id are those of the logits (checked above).
                            unsafe { logits.set_unchecked(row + column, sums[eight * 4 + half * 2 + element]) };
                        }
                    }
                }
            }
        },
    );
    if thread::warp_id() as usize == GROUPS * 4 {
        return;
    }
    for half in 0..2 {
        let Best { logit, id } = held[half];
        let mut key = rank::rank_key(logit, id as usize);
        // Four lanes have a token's columns.
        for distance in [1, 2] {
            let other = rank::shuffle_xor(key, distance);
            key = if other > key { other } else { key };
        }
        let token = first_token + warpgroup_tiles::token(half);
        if thread::lane_id().is_multiple_of(4) && token < tokens {
            best.set(block as usize * tokens as usize + token as usize, key);
        }
    }
}

macro_rules! logits_kernel {
    ($name:ident, $threads:tt, $cluster:tt, $layout:ident) => {
        /// The head. Logits are written where wanted, and the first token of the order of [`crate::rank`] of each block's
        /// share of the vocabulary in any case, for [`few_argmax`](crate::few_logits::few_argmax()).
        ///
        /// - `x_map`: the tensor map of x, bf16 \[M, K\], in boxes of 64 of k and the layout's rows; `weight_map`: that of the weight,
        ///   bf16 \[V, K\], in boxes of 64 of k and the layout's outputs; `logits`: f32 \[M, V\], or empty; `best`: u64 \[blocks, M\].
        /// - grid (blocks, a multiple of the cluster, ceil(M / tokens)), tokens and outputs of the layout; a block takes every so many
        ///   tiles of those tokens, and its copies go on from one tile to the next.
        /// - bytes: 2 V K, 2 M K for each tile of outputs of a cluster, 4 M V if logits are wanted.
        /// - the caller: K is a multiple of 64; [`Layout::ring_bytes`] of dynamic shared memory; an `sm_90a` image. The weight is
        ///   read before the kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = 1, cluster = $cluster)]
        pub fn $name(
            x_map: In<u64>,
            weight_map: In<u64>,
            logits: Out<f32>,
            best: Out<u64>,
            tokens: u32,
            vocab: u32,
            width: u32,
        ) {
            const { assert!($layout.threads() == $threads && $layout.cluster == $cluster) };
            wgmma_logits::<
                { $layout.groups },
                { $layout.outputs },
                { $layout.depth },
                { $layout.ahead },
                $cluster,
                { $layout.outputs / 2 },
            >(x_map, weight_map, logits, best, tokens, vocab, width);
        }
    };
}
logits_kernel!(wgmma_logits_64, 160, 2, LOGITS_64);
logits_kernel!(wgmma_logits_128, 288, 2, LOGITS_128);
logits_kernel!(wgmma_logits_256, 544, 2, LOGITS_256);
