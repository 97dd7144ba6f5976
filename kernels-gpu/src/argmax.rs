//! Greedy choice: the most likely token.

use cuda_std::prelude::*;

use crate::quads;
use crate::rank::{self, THREADS, WARPS};

/// Loads of 16 bytes that a thread has on their way at once.
const QUADS: usize = 4;

/// The greatest key below `limit` of the row that starts at `start`, in every thread of the block; 0 if there is none.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn first_below(limit: u64, logits: &In<f32>, start: usize, vocab: usize, scratch: &Shared<u64>) -> u64 {
    let thread = thread::thread_idx_x() as usize;
    let mut best = 0;
    let mut base = 0;
    while base < vocab {
        let first = |quad: usize| base + (quad * THREADS + thread) * 4;
        let values = quads::load::<QUADS>(logits, start, vocab, first);
        for quad in 0..QUADS {
            for i in 0..4 {
                let key = rank::rank_key(values[quad][i], first(quad) + i);
                best = if key > best && key < limit { key } else { best };
            }
        }
        base += QUADS * THREADS * 4;
    }
    rank::block_max(best, scratch)
}

/// ids\[r\] = the token with the largest logit of row r, the lowest id among equals; `u32::MAX` if every logit is NaN or
/// negative infinity.
///
/// - `logits`: f32 \[R, V\]; `ids`: u32 \[R\].
/// - a block does one row.
/// - bytes: 4 per element.
/// - the caller: `vocab` = V; rows start at multiples of 16 bytes where V is a multiple of 4.
#[kernel(block = 512)]
pub fn argmax(logits: In<f32>, ids: Out<u32>, vocab: u32) {
    let scratch = shared_array!(u64, WARPS);
    let row = thread::block_idx_x() as usize;
    let vocab = vocab as usize;
    thread::allow_successor();
    thread::wait_for_predecessors();
    let best = first_below(u64::MAX, &logits, row * vocab, vocab, &scratch);
    if thread::thread_idx_x() == 0 {
        ids.set(row, rank::id_of(best));
    }
}
