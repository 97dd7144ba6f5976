//! The first of the passes of a fast draw: each block reads a part of a row once and leaves the few tokens that the filters
//! can possibly keep. [`crate::choose`] draws among them.
//!
//! A thread keeps its logits in registers and knows the first of them in rank. At least n tokens of the block rank as high as
//! the n-th of these firsts, so every token that does is a candidate: those that top-k wants are among them, with no
//! histogram over the vocabulary and no second reading. How the row is divided changes no bit: the candidates above the
//! greatest of the blocks' floors are all of the row's tokens there, and nothing below it is believed.

use cuda_std::prelude::*;

use crate::rank::{self, THREADS, WARPS};
use crate::row_parameters::RowParameters;
use crate::{distance, philox, quads};

/// Loads of 16 bytes per thread.
const QUADS: usize = 4;

/// The most tokens of a block's part of a row.
pub const PART: usize = THREADS * QUADS * 4;

/// The most parts of a row.
pub const MAX_PARTS: usize = 64;

/// The most threads whose firsts a block goes down to: top-k up to this many is always decided by the candidates.
pub const DEPTH: u32 = 96;

/// Room for candidates of a part.
pub const CAPACITY: usize = 512;

/// Words that a part leaves beside its candidates: its first key, the floor of its candidates, their number (which may
/// exceed [`CAPACITY`]; the rest is lost), and the winner of the draw where no filter is on.
pub const SUMMARY: usize = 4;

/// The logit keys of a thread's tokens, after the temperature; 0 beyond the row. Keys alone stay in registers: what needs a
/// logit takes it from its key.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn part(logits: &In<f32>, row: usize, vocab: usize, parameters: &RowParameters) -> [[u32; 4]; QUADS] {
    let values = quads::load::<QUADS>(logits, row * vocab, vocab, first_id);
    let mut keys = [[0; 4]; QUADS];
    for quad in 0..QUADS {
        for i in 0..4 {
            keys[quad][i] = rank::logit_key(parameters.scaled(values[quad][i]));
        }
    }
    keys
}

/// The first token of a quad. Parts are interleaved by what a warp reads at once: likely tokens, which often are neighbours,
/// spread over the parts.
#[inline(always)]
fn first_id(quad: usize) -> usize {
    // In 32 bits: ids of 64 would not leave room for the keys in registers.
    let segment = (quad as u32 * WARPS as u32 + thread::warp_id()) * thread::grid_dim_x() + thread::block_idx_x();
    (segment * 128 + thread::lane_id() * 4) as usize
}

/// A key such that at least `wanted` of the threads' keys, of which `best` is the greatest, and few more are as great; 1 if
/// fewer are not 0. By distance from the best in one pass; where that tells too few apart, by the digits of the keys.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn floor_of(key: u64, best: u64, wanted: u32, histogram: &Shared<u32>, chosen: &Shared<u32>) -> u64 {
    let thread = thread::thread_idx_x() as usize;
    let max = rank::logit_of(best);
    if thread < distance::BINS {
        histogram.set(thread, 0);
    }
    thread::sync_threads();
    if key != 0 {
        histogram.atomic_add(distance::bin(max, rank::logit_of(key)), 1);
    }
    let (bin, upto) = distance::first_bins(histogram, wanted, chosen);
    if bin as usize == distance::BINS {
        1
    } else if bin as usize + 1 < distance::BINS && upto <= wanted + wanted / 4 + 8 {
        distance::floor(max, bin)
    } else {
        floor_by_digits(key, wanted, histogram, chosen)
    }
}

/// As [`floor_of`], and nearer to `wanted`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn floor_by_digits(key: u64, wanted: u32, histogram: &Shared<u32>, chosen: &Shared<u32>) -> u64 {
    /// The digit that says that fewer are not 0.
    const NONE: u32 = 256;
    let thread = thread::thread_idx_x() as usize;
    let most = wanted + wanted / 8 + 4;
    // Whoever reads what was chosen before has done so.
    thread::sync_threads();
    let (mut prefix, mut above) = (0_u64, 0);
    let mut shift = 64;
    while shift > 0 {
        shift -= 8;
        if thread < 256 {
            histogram.set(thread, 0);
        }
        thread::sync_threads();
        if key != 0 && (shift == 56 || key >> (shift + 8) == prefix >> (shift + 8)) {
            histogram.atomic_add((key >> shift) as usize & 255, 1);
        }
        thread::sync_threads();
        // The first warp walks the digits from the greatest down, 8 to a lane.
        if thread::warp_id() == 0 {
            let lane = thread::lane_id() as usize;
            let top = 255 - lane * 8;
            let mut own = 0;
            for i in 0..8 {
                own += histogram.get(top - i);
            }
            let upto = above + rank::inclusive_scan(u64::from(own)) as u32;
            let mut before = upto - own;
            if lane == 31 && upto < wanted {
                chosen.set(0, NONE);
            }
            if before < wanted && wanted <= upto {
                for i in 0..8 {
                    let here = histogram.get(top - i);
                    if before < wanted && wanted <= before + here {
                        chosen.set(0, (top - i) as u32);
                        chosen.set(1, before);
                        chosen.set(2, before + here);
                    }
                    before += here;
                }
            }
        }
        thread::sync_threads();
        let digit = chosen.get(0);
        if digit == NONE {
            return 1;
        }
        prefix |= u64::from(digit) << shift;
        above = chosen.get(1);
        let upto = chosen.get(2);
        thread::sync_threads();
        if upto <= most {
            break;
        }
    }
    if prefix == 0 { 1 } else { prefix }
}

/// The candidates of each part of each row, and what else it leaves; see the module.
///
/// - `logits`: f32 \[R, V\]; `parameters`: u32 \[R, 12\], the records of [`RowParameters`]; `summaries`: u64 \[R, parts,
///   [`SUMMARY`]\]; `candidates`: u64 \[R, parts, [`CAPACITY`]\], keys of [`crate::rank`] in no order.
/// - grid (parts, R), at most [`MAX_PARTS`]; a block does a part of a row.
/// - bytes: 4 per element.
/// - the caller: `vocab` = V, at most parts * [`PART`]; rows start at multiples of 16 bytes where V is a multiple of 4.
#[kernel(block = 512, min_blocks = 2)]
pub fn sample_candidates(logits: In<f32>, parameters: In<u32>, summaries: Out<u64>, candidates: Out<u64>, vocab: u32) {
    let scratch = shared_array!(u64, WARPS);
    let histogram = shared_array!(u32, 256);
    let chosen = shared_array!(u32, 3);
    let found = shared_array!(u32, 1);
    let thread = thread::thread_idx_x() as usize;
    let (row, vocab) = (thread::block_idx_y() as usize, vocab as usize);
    let place = row * thread::grid_dim_x() as usize + thread::block_idx_x() as usize;
    thread::allow_successor();
    thread::wait_for_predecessors();

    let parameters = RowParameters::of_row(&parameters, row);
    let keys = part(&logits, row, vocab, &parameters);
    // Ids rise within a thread: the first of equals stays. Its place, a constant, takes fewer registers than its id.
    let (mut first_key, mut first_place) = (0, 0);
    for quad in 0..QUADS {
        for i in 0..4 {
            if keys[quad][i] > first_key {
                (first_key, first_place) = (keys[quad][i], quad * 4 + i);
            }
        }
    }
    let own = rank::rank_of(first_key, first_id(first_place / 4) + first_place % 4);
    if thread == 0 {
        found.set(0, 0);
    }
    let best = rank::block_max(own, &scratch);

    if parameters.keeps_all() {
        let mut winner = 0;
        // The quads in turn: one copy of the noise's code, and its registers once. The second reading is from cache.
        let mut quad = 0;
        while quad < QUADS {
            let id = first_id(quad);
            if id < vocab {
                let noise = philox::gumbel_quad(parameters.seed, parameters.position, id as u32 / 4);
                let [values] = quads::load::<1>(&logits, row * vocab, vocab, |_| id);
                for i in 0..4 {
                    let logit = parameters.scaled(values[i]);
                    if rank::logit_key(logit) != 0 {
                        let key = rank::rank_key(logit + noise[i], id + i);
                        winner = if key > winner { key } else { winner };
                    }
                }
            }
            quad += 1;
        }
        let winner = rank::block_max(winner, &scratch);
        if thread == 0 {
            summaries.store(place * SUMMARY, [best, 1]);
            summaries.store(place * SUMMARY + 2, [0, winner]);
        }
        return;
    }

    let wanted = if parameters.top_k == 0 || parameters.top_k > DEPTH { DEPTH } else { parameters.top_k };
    let floor = if best == 0 {
        1
    } else if wanted == 1 {
        best
    } else {
        floor_of(own, best, wanted, &histogram, &chosen)
    };
    if own >= floor {
        for quad in 0..QUADS {
            for i in 0..4 {
                if keys[quad][i] == 0 || keys[quad][i] < (floor >> 32) as u32 {
                    continue;
                }
                let key = rank::rank_of(keys[quad][i], first_id(quad) + i);
                if key >= floor {
                    let slot = found.atomic_add(0, 1) as usize;
                    if slot < CAPACITY {
                        candidates.set(place * CAPACITY + slot, key);
                    }
                }
            }
        }
    }
    thread::sync_threads();
    if thread == 0 {
        summaries.store(place * SUMMARY, [best, floor]);
        summaries.store(place * SUMMARY + 2, [u64::from(found.get(0)), 0]);
    }
}
