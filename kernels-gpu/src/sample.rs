//! The random choice of a token: top-k, top-p and min-p filters, then the Gumbel-max draw.
//!
//! Everything is exact and free of order: selections are by radix over unique keys ([`crate::rank`]), counts and
//! probability masses are integers, maxima do not depend on order. So the result does not depend on the device, on
//! the number of threads, or on the batch.

use cuda_std::prelude::*;

use crate::philox;
use crate::rank::{self, THREADS, WARPS};
use crate::row_parameters::RowParameters;

/// Digits of 8 bits in a rank key.
const DIGITS: u32 = 8;

/// A token's mass for top-p: e^(logit - max) as a multiple of 2^-40, rounded down. Sums of 2^18 of them fit 64 bits.
#[inline(always)]
pub(crate) fn mass(logit: f32, max: f32) -> u64 {
    // The difference of two infinities is NaN: the whole mass would be 0 and no prefix could reach top-p.
    let relative = if logit == max { 1.0 } else { math::exp(logit - max) };
    (relative * 1_099_511_627_776.0) as u64
}

/// The shared memory of a selection.
pub(crate) struct Selection {
    /// Weight per digit value.
    pub(crate) histogram: Shared<u64>,
    /// The chosen digit, the weight still wanted below it, and the weight of the digit.
    pub(crate) chosen: Shared<u64>,
}

impl Selection {
    /// The smallest key such that the tokens with at least that key weigh at least `wanted`: a radix selection from
    /// the highest digit down. `weight` of a token below `floor` is not asked for; `wanted` is at least 1 and at most
    /// the whole weight.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn threshold(
        &self,
        logit: &impl Fn(usize) -> f32,
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
                let logit = logit(id);
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
                let upto = rank::inclusive_scan(own);
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

/// The least logit that min-p keeps.
#[inline(always)]
pub(crate) fn lowest_logit(max: f32, min_p: f32) -> f32 {
    if min_p > 0.0 { max + math::ln(min_p) } else { f32::NEG_INFINITY }
}

/// The key of a token in the draw: the logit with its noise.
#[inline(always)]
pub(crate) fn noisy(logit: f32, id: u32, parameters: &RowParameters) -> u64 {
    rank::rank_key(logit + philox::gumbel(parameters.seed, parameters.position, id), id as usize)
}

/// What [`sample()`] draws from a row, by one block; the same in every thread.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn draw_from_row(
    logits: &In<f32>,
    row: usize,
    vocab: usize,
    parameters: &RowParameters,
    selection: &Selection,
    scratch: &Shared<u64>,
) -> u32 {
    let thread = thread::thread_idx_x() as usize;
    let logit = |id: usize| parameters.scaled(logits.get(row * vocab + id));
    let mut best = 0;
    let mut choosable = 0;
    let mut id = thread;
    while id < vocab {
        let key = rank::rank_key(logit(id), id);
        best = if key > best { key } else { best };
        choosable += u64::from(key != 0);
        id += THREADS;
    }
    let best = rank::block_max(best, scratch);
    if best == 0 {
        return u32::MAX;
    }
    let max = rank::logit_of(best);

    let mut floor = 1;
    let top_k = u64::from(parameters.top_k);
    if top_k > 0 && top_k < rank::block_scan(choosable, scratch).1 {
        floor = selection.threshold(&logit, vocab, floor, top_k, |_| 1);
    }
    if parameters.top_p < 1.0 {
        let mut own = 0;
        let mut id = thread;
        while id < vocab {
            let logit = logit(id);
            if rank::rank_key(logit, id) >= floor {
                own += mass(logit, max);
            }
            id += THREADS;
        }
        let (_, total) = rank::block_scan(own, scratch);
        let wanted = fraction(total, parameters.top_p);
        floor = selection.threshold(&logit, vocab, floor, wanted, |logit| mass(logit, max));
    }
    let lowest = lowest_logit(max, parameters.min_p);
    let mut winner = 0;
    let mut id = thread;
    while id < vocab {
        let logit = logit(id);
        if rank::rank_key(logit, id) >= floor && logit >= lowest {
            let key = noisy(logit, id as u32, parameters);
            winner = if key > winner { key } else { winner };
        }
        id += THREADS;
    }
    rank::id_of(rank::block_max(winner, scratch))
}

/// ids\[r\] = a token of row r, drawn with probability e^logit among those that pass the filters; `u32::MAX` if no logit
/// is finite.
///
/// In this order: logits are divided by the temperature (0: they stay); the `top_k` first tokens (0: all); of those the
/// shortest prefix whose mass reaches `top_p` (1: all; at least one token); of those the ones with logit >= max +
/// ln(min_p) (0: all); then the largest logit + Gumbel noise, keyed by (seed, position, id).
///
/// This is the definition, and what [`crate::choose`] falls back to: one block reads the row many times over. On a CPU it is
/// also the fastest form.
///
/// - `logits`: f32 \[R, V\]; `parameters`: u32 \[R, 12\], the records of [`RowParameters`]; `ids`: u32 \[R\].
/// - a block does one row.
/// - bytes: 4 per element for the draw alone; up to 8 times that for each of top-k and top-p (mostly from cache).
/// - the caller: `vocab` = V is at most 2^18 with top-p.
#[kernel(block = 512, min_blocks = 1)]
pub fn sample(logits: In<f32>, parameters: In<u32>, ids: Out<u32>, vocab: u32) {
    let scratch = shared_array!(u64, WARPS);
    let histogram = shared_array!(u64, 256);
    let chosen = shared_array!(u64, 3);
    let row = thread::block_idx_x() as usize;
    let parameters = RowParameters::of_row(&parameters, row);
    let id = draw_from_row(&logits, row, vocab as usize, &parameters, &Selection { histogram, chosen }, &scratch);
    if thread::thread_idx_x() == 0 {
        ids.set(row, id);
    }
}

/// `total * p`, rounded up, at least 1: p as a multiple of 2^-32, in integers so that no float sum is involved.
#[inline(always)]
pub(crate) fn fraction(total: u64, p: f32) -> u64 {
    let p = (math::max(p, 0.0) * 4_294_967_296.0) as u64;
    let (high, low) = (total >> 32, total & 0xffff_ffff);
    let wanted = high * p + ((low * p + 0xffff_ffff) >> 32);
    if wanted == 0 { 1 } else { wanted }
}
