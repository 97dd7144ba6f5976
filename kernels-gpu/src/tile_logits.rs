//! The head of many tokens, and their best tokens: see [`crate::tiles`].

use cuda_std::prelude::*;

use crate::rank;
use crate::tiles::{self, Layer, Layout, Tiles};

/// The layout of [`tile_logits_16()`].
pub const LOGITS_16: Layout = Layout { output_warps: 4, token_warps: 1, groups: 2, pairs: 1, depth: 5 };
/// The layout of [`tile_logits_32()`].
pub const LOGITS_32: Layout = Layout { output_warps: 4, token_warps: 1, groups: 2, pairs: 2, depth: 4 };
/// The layout of [`tile_logits_64()`].
pub const LOGITS_64: Layout = Layout { output_warps: 2, token_warps: 2, groups: 4, pairs: 2, depth: 4 };

/// The best of what a lane has seen for a token: ids come in rising order, so the first of equals stays. NaN and negative
/// infinity never get here.
#[derive(Clone, Copy)]
struct Best {
    logit: f32,
    id: u32,
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn tile_logits<
    const OUTPUT_WARPS: usize,
    const TOKEN_WARPS: usize,
    const GROUPS: usize,
    const PAIRS: usize,
    const DEPTH: usize,
    const PENDING: usize,
>(
    x: In<bf16>,
    weight: In<bf16>,
    logits: Out<f32>,
    best: Out<u64>,
    warp_best: Shared<u64>,
    tokens: u32,
    vocab: u32,
    width: u32,
) {
    let (block_outputs, block_tokens) = ((OUTPUT_WARPS * GROUPS * 16) as u32, (TOKEN_WARPS * PAIRS * 16) as u32);
    let first_token = thread::block_idx_x() * block_tokens;
    let (block, blocks) = (thread::block_idx_y(), thread::grid_dim_y());
    let count = (vocab.div_ceil(block_outputs) - block).div_ceil(blocks);
    let g = thread::lane_id() / 4;
    let mut held = [[[Best { logit: f32::NEG_INFINITY, id: 0 }; 2]; 2]; PAIRS];
    tiles::compute::<OUTPUT_WARPS, TOKEN_WARPS, GROUPS, PAIRS, DEPTH, PENDING, true, _>(
        Layer { x, weight, tokens, outputs: vocab, width, first: 0, part: width },
        first_token,
        Tiles { first: block, step: blocks, count },
        |tile, r| tile * block_outputs + r,
        || (),
        |tile, sums, ()| {
            let first = tile * block_outputs + tiles::block_group::<OUTPUT_WARPS, GROUPS>(0) * 16 + g;
            let id = |group: usize, half: usize| first + (group * 16 + half * 8) as u32;
            for group in 0..GROUPS {
                for half in 0..2 {
                    let id = id(group, half);
                    for pair in 0..PAIRS {
                        for eight in 0..2 {
                            for element in 0..2 {
                                let logit = sums[group][pair][eight][half * 2 + element];
                                let held = &mut held[pair][eight][element];
                                let better = logit > held.logit && id < vocab;
                                held.logit = if better { logit } else { held.logit };
                                held.id = if better { id } else { held.id };
                            }
                        }
                    }
                }
            }
            if logits.is_empty() {
                return;
            }
            logits.check(0, tokens as usize * vocab as usize);
            for pair in 0..PAIRS {
                for eight in 0..2 {
                    for element in 0..2 {
                        let token = first_token + tiles::token::<OUTPUT_WARPS, PAIRS>(pair, eight, element);
                        for group in 0..GROUPS {
                            for half in 0..2 {
                                let id = id(group, half);
                                if token < tokens && id < vocab {
                                    let at = token as usize * vocab as usize + id as usize;
                                    let logit = sums[group][pair][eight][half * 2 + element];
                                    // SAFETY: the token and the id are those of the logits (checked above).
                                    unsafe { logits.set_unchecked(at, logit) };
                                }
                            }
                        }
                    }
                }
            }
        },
    );

    let warp_row = thread::warp_id() % OUTPUT_WARPS as u32 * block_tokens;
    for pair in 0..PAIRS {
        for eight in 0..2 {
            for element in 0..2 {
                let Best { logit, id } = held[pair][eight][element];
                let key = rank::warp_max(rank::rank_key(logit, id as usize), 4);
                if g == 0 {
                    let token = tiles::token::<OUTPUT_WARPS, PAIRS>(pair, eight, element);
                    warp_best.set((warp_row + token) as usize, key);
                }
            }
        }
    }
    thread::sync_threads();
    let thread = thread::thread_idx_x();
    if thread < block_tokens && first_token + thread < tokens {
        let mut key = 0;
        for warp in 0..OUTPUT_WARPS as u32 {
            let other = warp_best.get((warp * block_tokens + thread) as usize);
            key = if other > key { other } else { key };
        }
        best.set(block as usize * tokens as usize + (first_token + thread) as usize, key);
    }
}

macro_rules! logits_kernel {
    ($name:ident, $threads:tt, $layout:ident) => {
        /// The head. Logits are written where wanted, and the first token of the order of [`crate::rank`] of each block's
        /// share of the vocabulary in any case, for [`few_argmax`](crate::few_logits::few_argmax()).
        ///
        /// - `x`: bf16 \[M, K\]; `weight`: bf16 \[V, K\]; `logits`: f32 \[M, V\], or empty; `best`: u64 \[blocks, M\].
        /// - grid (ceil(M / tokens), blocks), at most ceil(V / outputs) blocks, tokens and outputs of the layout; a block
        ///   takes every so many tiles of those tokens, and its copies go on from one tile to the next.
        /// - bytes: 2 V K, 2 M K for each tile of outputs, 4 M V if logits are wanted.
        /// - the caller: K is a multiple of 64; [`Layout::ring_bytes`] of dynamic shared memory. `weight` is read before the
        ///   kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = 2)]
        pub fn $name(
            x: In<bf16>,
            weight: In<bf16>,
            logits: Out<f32>,
            best: Out<u64>,
            tokens: u32,
            vocab: u32,
            width: u32,
        ) {
            const { assert!($layout.threads() == $threads && $layout.tokens() <= $threads) };
            let warp_best = shared_array!(u64, $layout.output_warps * $layout.tokens());
            tile_logits::<
                { $layout.output_warps },
                { $layout.token_warps },
                { $layout.groups },
                { $layout.pairs },
                { $layout.depth },
                { $layout.depth - 2 },
            >(x, weight, logits, best, warp_best, tokens, vocab, width);
        }
    };
}
logits_kernel!(tile_logits_16, 128, LOGITS_16);
logits_kernel!(tile_logits_32, 128, LOGITS_32);
logits_kernel!(tile_logits_64, 128, LOGITS_64);
