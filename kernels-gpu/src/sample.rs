//! The random choice of a token: top-k, top-p and min-p filters, then the Gumbel-max draw.
//!
//! Everything is exact and free of order: selections are by radix over unique keys ([`crate::rank`]), counts and
//! probability masses are integers, maxima do not depend on order. So the result does not depend on the device, on
//! the number of threads, or on the batch.

use cuda_std::prelude::*;

use crate::philox;
use crate::rank::{self, THREADS, WARPS};

/// Digits of 8 bits in a rank key.
const DIGITS: u32 = 8;

/// A token's mass for top-p: e^(logit - max) as a multiple of 2^-40, rounded down. Sums of 2^18 of them fit 64 bits.
#[inline(always)]
fn mass(logit: f32, max: f32) -> u64 {
    // The difference of two infinities is NaN: the whole mass would be 0 and no prefix could reach top-p.
    let relative = if logit == max { 1.0 } else { math::exp(logit - max) };
    (relative * 1_099_511_627_776.0) as u64
}

/// The sum over the lanes below this one and this one.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn inclusive_scan(value: u64) -> u64 {
    let lane = thread::lane_id();
    let mut sum = value;
    let mut distance = 1;
    while distance < 32 {
        let source = lane.wrapping_sub(distance);
        let high = warp::shuffle_u32((sum >> 32) as u32, source);
        let low = warp::shuffle_u32(sum as u32, source);
        if lane >= distance {
            sum += (u64::from(high) << 32) | u64::from(low);
        }
        distance <<= 1;
    }
    sum
}

/// The shared memory of a selection.
struct Selection {
    /// Weight per digit value.
    histogram: Shared<u64>,
    /// The chosen digit, the weight still wanted below it, and the weight of the digit.
    chosen: Shared<u64>,
}

impl Selection {
    /// The smallest key such that the tokens with at least that key weigh at least `wanted`: a radix selection from
    /// the highest digit down. `weight` of a token below `floor` is not asked for; `wanted` is at least 1 and at most
    /// the whole weight.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn threshold(
        &self,
        logits: &In<f32>,
        start: usize,
        vocab: usize,
        floor: u64,
        wanted: u64,
        weight: impl Fn(f32) -> u64,
    ) -> u64 {
        let thread = thread::thread_idx_x() as usize;
        let mut prefix = 0u64;
        let mut wanted = wanted;
        let mut digit = DIGITS;
        while digit > 0 {
            digit -= 1;
            let shift = digit * 8;
            if thread < 256 {
                self.histogram.set(thread, 0);
            }
            thread::sync_threads();
            let mut id = thread;
            while id < vocab {
                let logit = logits.get(start + id);
                let key = rank::rank_key(logit, id);
                // The digits above this one agree with what is chosen so far.
                if key >= floor && key != 0 && (shift == 56 || key >> (shift + 8) == prefix >> (shift + 8)) {
                    self.histogram.atomic_add((key >> shift) as usize & 255, weight(logit));
                }
                id += THREADS;
            }
            thread::sync_threads();
            // The first warp walks the digit values from the greatest down, 8 to a lane.
            if thread::warp_id() == 0 {
                let top = 255 - thread::lane_id() as usize * 8;
                let mut own = 0;
                for i in 0..8 {
                    own += self.histogram.get(top - i);
                }
                let upto = inclusive_scan(own);
                let mut before = upto - own;
                if before < wanted && wanted <= upto {
                    for i in 0..8 {
                        let here = self.histogram.get(top - i);
                        if before < wanted && wanted <= before + here {
                            self.chosen.set(0, (top - i) as u64);
                            self.chosen.set(1, wanted - before);
                            self.chosen.set(2, here);
                        }
                        before += here;
                    }
                }
            }
            thread::sync_threads();
            prefix |= self.chosen.get(0) << shift;
            wanted = self.chosen.get(1);
            // All of the digit is wanted: every key with this prefix is in.
            let all = self.chosen.get(2) == wanted;
            thread::sync_threads();
            if all {
                break;
            }
        }
        prefix
    }
}

/// ids\[r\] = a token of row r, drawn with probability e^logit among those that pass the filters; `u32::MAX` if no logit
/// is finite.
///
/// In this order: the `top_k` first tokens (0: all); of those the shortest prefix whose mass reaches `top_p` (1: all; at
/// least one token); of those the ones with logit >= max + ln(min_p) (0: all); then the largest logit + Gumbel noise,
/// keyed by (seed, position, id).
///
/// - `logits`: f32 \[R, V\], already divided by the temperature; `seeds`: u64 \[R\]; `positions`: u32 \[R\]; `top_ks`: u32 \[R\];
///   `top_ps`, `min_ps`: f32 \[R\]; `ids`: u32 \[R\].
/// - a block does one row.
/// - bytes: 4 per element for the draw alone; up to 8 times that for each of top-k and top-p (mostly from cache).
/// - the caller: `vocab` = V is at most 2^18 with top-p.
#[kernel(block = 512, min_blocks = 1)]
pub fn sample(
    logits: In<f32>,
    seeds: In<u64>,
    positions: In<u32>,
    top_ks: In<u32>,
    top_ps: In<f32>,
    min_ps: In<f32>,
    ids: Out<u32>,
    vocab: u32,
) {
    let scratch = shared_array!(u64, WARPS);
    let histogram = shared_array!(u64, 256);
    let chosen = shared_array!(u64, 3);
    let selection = Selection { histogram, chosen };
    let thread = thread::thread_idx_x() as usize;
    let row = thread::block_idx_x() as usize;
    let vocab = vocab as usize;
    let start = row * vocab;

    let mut best = 0;
    let mut choosable = 0;
    let mut id = thread;
    while id < vocab {
        let key = rank::rank_key(logits.get(start + id), id);
        best = if key > best { key } else { best };
        choosable += u32::from(key != 0);
        id += THREADS;
    }
    let best = rank::block_max(best, &scratch);
    if best == 0 {
        if thread == 0 {
            ids.set(row, u32::MAX);
        }
        return;
    }
    let max = logits.get(start + rank::id_of(best) as usize);

    let mut floor = 1;
    let top_k = u64::from(top_ks.get(row));
    if top_k > 0 && top_k < block_sum(u64::from(choosable), &scratch) {
        floor = selection.threshold(&logits, start, vocab, floor, top_k, |_| 1);
    }
    let top_p = top_ps.get(row);
    if top_p < 1.0 {
        let mut own = 0;
        let mut id = thread;
        while id < vocab {
            let logit = logits.get(start + id);
            if rank::rank_key(logit, id) >= floor {
                own += mass(logit, max);
            }
            id += THREADS;
        }
        let total = block_sum(own, &scratch);
        let wanted = fraction(total, top_p);
        floor = selection.threshold(&logits, start, vocab, floor, wanted, |logit| mass(logit, max));
    }
    let min_p = min_ps.get(row);
    let lowest = if min_p > 0.0 { max + math::ln(min_p) } else { f32::NEG_INFINITY };

    let (seed, position) = (seeds.get(row), positions.get(row));
    let mut winner = 0;
    let mut id = thread;
    while id < vocab {
        let logit = logits.get(start + id);
        if rank::rank_key(logit, id) >= floor && logit >= lowest {
            let key = rank::rank_key(logit + philox::gumbel(seed, position, id as u32), id);
            winner = if key > winner { key } else { winner };
        }
        id += THREADS;
    }
    let winner = rank::block_max(winner, &scratch);
    if thread == 0 {
        ids.set(row, rank::id_of(winner));
    }
}

/// `total * p`, rounded up, at least 1: p as a multiple of 2^-32, in integers so that no float sum is involved.
#[inline(always)]
fn fraction(total: u64, p: f32) -> u64 {
    let p = (math::max(p, 0.0) * 4_294_967_296.0) as u64;
    let (high, low) = (total >> 32, total & 0xffff_ffff);
    let wanted = high * p + ((low * p + 0xffff_ffff) >> 32);
    if wanted == 0 { 1 } else { wanted }
}

/// The sum of the block's values, in every thread.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn block_sum(value: u64, scratch: &Shared<u64>) -> u64 {
    let sum = inclusive_scan(value);
    thread::sync_threads();
    if thread::lane_id() == 31 {
        scratch.set(thread::warp_id() as usize, sum);
    }
    thread::sync_threads();
    let mut total = 0;
    for warp in 0..WARPS {
        total += scratch.get(warp);
    }
    total
}
