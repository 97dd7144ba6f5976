//! Greedy choice: the most likely token.

use cuda_std::prelude::*;

use crate::rank::{self, THREADS, WARPS};

/// ids\[r\] = the token with the largest logit of row r, the lowest id among equals; `u32::MAX` if every logit is NaN or
/// negative infinity.
///
/// - `logits`: f32 \[R, V\]; `ids`: u32 \[R\].
/// - a block does one row; a thread every 512th element.
/// - bytes: 4 per element.
/// - the caller: `vocab` = V.
#[kernel(block = 512)]
pub fn argmax(logits: In<f32>, ids: Out<u32>, vocab: u32) {
    let scratch = shared_array!(u64, WARPS);
    let row = thread::block_idx_x() as usize;
    let vocab = vocab as usize;
    thread::allow_successor();
    thread::wait_for_predecessors();
    let mut best = 0;
    let mut id = thread::thread_idx_x() as usize;
    while id < vocab {
        let key = rank::rank_key(logits.get(row * vocab + id), id);
        best = if key > best { key } else { best };
        id += THREADS;
    }
    let best = rank::block_max(best, &scratch);
    if thread::thread_idx_x() == 0 {
        ids.set(row, rank::id_of(best));
    }
}
