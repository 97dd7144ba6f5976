//! Log-probabilities of the chosen token and of the most likely ones.

use cuda_std::prelude::*;

use crate::argmax::first_below;
use crate::rank::{self, THREADS, WARPS};

/// Loads that a thread has on their way at once.
const AHEAD: usize = 8;

/// values\[r, 0\] = ln p of `chosen[r]`; ids\[r, j\] and values\[r, 1 + j\] = the j-th most likely token (ties: lowest id first)
/// and its ln p, where ln p = (logit - max) - ln(sum e^(logit - max)).
///
/// - `logits`: f32 \[R, V\], as the model gave them; `chosen`: u32 \[R\]; `ids`: u32 \[R, count\]; `values`: f32 \[R, 1 + count\].
/// - a block does one row. The sum has one fixed tree: thread t of 512 adds the elements t, t + 512, ... in order; the
///   lanes of a warp are added at distances 16, 8, 4, 2, 1; then the 16 warps in order.
/// - bytes: 4 (2 + count) per element, mostly from cache.
/// - the caller: `vocab` = V; rows start at multiples of 16 bytes where V is a multiple of 4; a token beyond the vocabulary gives NaN; places beyond the tokens that can be chosen get
///   id `u32::MAX` and negative infinity.
#[kernel(block = 512)]
pub fn log_probs(logits: In<f32>, chosen: In<u32>, ids: Out<u32>, values: Out<f32>, vocab: u32, count: u32) {
    let scratch = shared_array!(u64, WARPS);
    let sums = shared_array!(f32, WARPS);
    let thread = thread::thread_idx_x() as usize;
    let row = thread::block_idx_x() as usize;
    let (vocab, count) = (vocab as usize, count as usize);
    let start = row * vocab;

    thread::allow_successor();
    thread::wait_for_predecessors();
    let next = |limit: u64| first_below(limit, &logits, start, vocab, &scratch);
    let mut best = next(u64::MAX);
    let max = if best == 0 { 0.0 } else { logits.get(start + rank::id_of(best) as usize) };

    let mut sum = 0.0;
    let mut id = thread;
    while id < vocab {
        // Loads first: the chain of sums waits for all of them at once. The last rounds read the last element again.
        let mut values = [0.0; AHEAD];
        for i in 0..AHEAD {
            let index = id + i * THREADS;
            values[i] = logits.get(start + if index < vocab { index } else { vocab - 1 });
        }
        for i in 0..AHEAD {
            if id + i * THREADS < vocab {
                sum += math::exp(values[i] - max);
            }
        }
        id += AHEAD * THREADS;
    }
    let sum = warp::sum_f32(sum);
    if thread::lane_id() == 0 {
        sums.set(thread::warp_id() as usize, sum);
    }
    thread::sync_threads();
    let mut total = 0.0;
    for warp in 0..WARPS {
        total += sums.get(warp);
    }
    let log_sum = math::ln(total);

    if thread == 0 {
        let id = chosen.get(row) as usize;
        let value = if id < vocab { logits.get(start + id) - max - log_sum } else { f32::NAN };
        values.set(row * (1 + count), value);
    }
    for j in 0..count {
        if thread == 0 {
            let id = rank::id_of(best);
            let value = if best == 0 { f32::NEG_INFINITY } else { logits.get(start + id as usize) - max - log_sum };
            ids.set(row * count + j, id);
            values.set(row * (1 + count) + 1 + j, value);
        }
        if j + 1 < count && best != 0 {
            best = next(best);
        }
    }
}
