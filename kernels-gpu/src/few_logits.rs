//! The head of few tokens, and the likeliest token of each: see [`crate::few`].

use cuda_std::prelude::*;

use crate::few::{AT_ONCE, CHUNK, FEW, Layout, Segment, Strips, arena, chains, normalised};
use crate::rank;

/// Of [`few_logits()`].
pub const LOGITS: Layout = Layout { warps: 4, depth: 8 };

/// RMSNorm and the head. Logits are written where wanted, and each block's first token of the order of [`crate::rank`] in
/// any case, for [`few_argmax()`].
///
/// - `residual`: f32 \[T, C\]; `gain`: bf16 \[C\]; `weight`: bf16 \[V, C\]; `logits`: f32 \[T, V\], or empty;
///   `best`: u64 \[blocks, [`FEW`]\].
/// - any grid of blocks of [`LOGITS`]'s warps; a warp takes every so many strips of 16 outputs.
/// - bytes: 2 V C, 4 T V if logits are wanted, and 4 T C for each block.
/// - the caller: T is at most [`FEW`], C a multiple of 64; dynamic shared memory as in [`few_qkv`](crate::few_qkv).
#[kernel(block = 128, min_blocks = 1)]
pub fn few_logits(
    residual: In<f32>,
    gain: In<bf16>,
    weight: In<bf16>,
    logits: Out<f32>,
    best: Out<u64>,
    tokens: u32,
    width: u32,
    vocab: u32,
    eps: f32,
) {
    let block_best = shared_array!(u64, LOGITS.warps * FEW);
    let (tokens, width, vocab) = (tokens as usize, width as usize, vocab as usize);
    let arena = arena(tokens, width, LOGITS);
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let (block, warp) = (thread::block_idx_x() as usize, thread::warp_id() as usize);
    let mut warp_best = [0u64; 2];
    chains::<{ LOGITS.depth }, { LOGITS.depth / CHUNK - 2 }, AT_ONCE, _>(
        weight,
        arena,
        tokens,
        width,
        Segment { first: 0, width },
        Strips {
            first: block * LOGITS.warps + warp,
            step: thread::grid_dim_x() as usize * LOGITS.warps,
            end: vocab.div_ceil(16),
        },
        |strip, part| strip * 16 + part * 8,
        || normalised::<{ LOGITS.warps * 32 }>(&arena.input, residual, gain, tokens, width, eps),
        |strip, sums, ()| {
            for element in 0..4 {
                let (token, id) = (t * 2 + element % 2, strip * 16 + g + element / 2 * 8);
                if token < tokens && id < vocab {
                    if !logits.is_empty() {
                        logits.set(token * vocab + id, sums[element]);
                    }
                    let key = rank::rank_key(sums[element], id);
                    let held = &mut warp_best[element % 2];
                    *held = if key > *held { key } else { *held };
                }
            }
        },
    );
    for column in 0..2 {
        let key = rank::warp_max(warp_best[column], 4);
        if g == 0 {
            block_best.set(warp * FEW + t * 2 + column, key);
        }
    }
    thread::sync_threads();
    let thread = thread::thread_idx_x() as usize;
    if thread < FEW {
        let mut key = 0;
        for warp in 0..LOGITS.warps {
            let other = block_best.get(warp * FEW + thread);
            key = if other > key { other } else { key };
        }
        best.set(block * FEW + thread, key);
    }
}

/// ids\[t\] = the token of the greatest of `best`\[.., t\], as [`crate::argmax`] has it.
///
/// - `best`: u64 \[blocks, columns\], of [`few_logits()`], where `columns` is [`FEW`], or of [`crate::tile_logits`], where it
///   is T; `ids`: u32 \[T\].
/// - a block does one token.
/// - bytes: 8 per block of the head and token.
#[kernel(block = 512)]
pub fn few_argmax(best: In<u64>, ids: Out<u32>, columns: u32) {
    let scratch = shared_array!(u64, rank::WARPS);
    let token = thread::block_idx_x() as usize;
    thread::wait_for_predecessors();
    let mut key = 0;
    let columns = columns as usize;
    let mut index = thread::thread_idx_x() as usize * columns + token;
    while index < best.len() {
        let other = best.get(index);
        key = if other > key { other } else { key };
        index += rank::THREADS * columns;
    }
    let key = rank::block_max(key, &scratch);
    if thread::thread_idx_x() == 0 {
        ids.set(token, rank::id_of(key));
    }
}
