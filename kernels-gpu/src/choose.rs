//! The last pass of a fast draw: the exact filters and the draw, among the candidates of [`crate::candidates`].

use cuda_std::prelude::*;

use crate::candidates::{CAPACITY, MAX_PARTS, SUMMARY};
use crate::distance;
use crate::rank::{self, THREADS, WARPS};
use crate::row_parameters::RowParameters;
use crate::sample::{Selection, draw_from_row, fraction, lowest_logit, mass, noisy};

/// The most candidates of a row that are sorted; a row with more is drawn from the whole vocabulary.
pub const SORTED: usize = 4096;

/// The most candidates that top-k leaves for a short sort. Parts that know nothing of each other find many times as many as a
/// row keeps, and a sort of all of them would be most of this kernel.
pub const FIRST: usize = 512;

/// Sorts `size` keys, the greatest first; `size` is a power of two. What was written before need not be behind a barrier.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn sort(keys: &Shared<u64>, size: usize) {
    let mut width = 2;
    while width <= size {
        let mut distance = width / 2;
        while distance > 0 {
            // Pairs at most 32 apart are within 64 keys, which belong to one warp.
            if width == 2 || distance > 32 || (distance == 32 && width > 64) {
                thread::sync_threads();
            } else {
                warp::sync_warp();
            }
            let mut pair = thread::thread_idx_x() as usize;
            while pair < size / 2 {
                let low = ((pair & !(distance - 1)) << 1) | (pair & (distance - 1));
                let (a, b) = (keys.get(low), keys.get(low + distance));
                let falls = low & width == 0;
                if (a < b) == falls && a != b {
                    keys.set(low, b);
                    keys.set(low + distance, a);
                }
                pair += THREADS;
            }
            distance >>= 1;
        }
        width <<= 1;
    }
    thread::sync_threads();
}

/// How many of the first `count` keys, which fall, are at least `floor`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn count_from(keys: &Shared<u64>, count: usize, floor: u64) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = (low + high) / 2;
        if keys.get(middle) >= floor {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// What the candidates of a row say.
struct Row {
    parameters: RowParameters,
    /// The row's greatest logit.
    max: f32,
    /// Candidates.
    count: usize,
    /// Every token of the row from here up is a candidate.
    floor: u64,
    /// The mass of the whole row, where it was summed.
    whole_mass: Option<u64>,
}

/// The winner's key among the sorted candidates; none if they do not decide. The same in every thread.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn winner(row: &Row, keys: &Shared<u64>, chosen: &Shared<u64>, scratch: &Shared<u64>) -> Option<u64> {
    let thread = thread::thread_idx_x() as usize;
    let parameters = &row.parameters;
    // What is kept, and whether that is known to be all that the filters so far keep.
    let mut kept = count_from(keys, row.count, row.floor);
    let mut whole = row.floor <= 1;
    let top_k = parameters.top_k as usize;
    if top_k > 0 {
        if top_k <= kept {
            (kept, whole) = (top_k, true);
        }
        if !whole {
            return None;
        }
    }
    if parameters.top_p < 1.0 {
        let run = kept.div_ceil(THREADS);
        let from = if thread * run < kept { thread * run } else { kept };
        let to = if from + run < kept { from + run } else { kept };
        let mut own = 0;
        for index in from..to {
            own += mass(rank::logit_of(keys.get(index)), row.max);
        }
        let (mut before, sum) = rank::block_scan(own, scratch);
        let total = if whole { sum } else { row.whole_mass? };
        let wanted = fraction(total, parameters.top_p);
        if sum < wanted {
            return None;
        }
        if before < wanted && wanted <= before + own {
            for index in from..to {
                let here = mass(rank::logit_of(keys.get(index)), row.max);
                if before < wanted && wanted <= before + here {
                    chosen.set(0, index as u64 + 1);
                }
                before += here;
            }
        }
        thread::sync_threads();
        (kept, whole) = (chosen.get(0) as usize, true);
    }
    let lowest = lowest_logit(row.max, parameters.min_p);
    if !whole && rank::logit_of(keys.get(kept - 1)) >= lowest {
        return None;
    }
    let mut winner = 0;
    let mut index = thread;
    while index < kept {
        let key = keys.get(index);
        let logit = rank::logit_of(key);
        if logit >= lowest {
            let key = noisy(logit, rank::id_of(key), parameters);
            winner = if key > winner { key } else { winner };
        }
        index += THREADS;
    }
    Some(rank::block_max(winner, scratch))
}

/// ids\[r\] = the token that [`sample()`](crate::sample::sample()) draws from row r, from what
/// [`sample_candidates()`](crate::candidates::sample_candidates()) and, with `summed`,
/// [`sample_masses()`](crate::masses::sample_masses()) left. Where that does not decide, this does what `sample` does.
///
/// - `logits`, `parameters`, `summaries`, `candidates`: as of `sample_candidates`; `sums`: u64 \[R, parts\]; `ids`: u32 \[R\].
/// - a block does one row.
/// - bytes: 8 per candidate; where they do not decide, those of `sample`.
/// - the caller: `vocab` = V; `summed` is 0 or 1; with 0, rows with top-p and without top-k are slow.
#[kernel(block = 512, min_blocks = 1)]
pub fn sample_choose(
    logits: In<f32>,
    parameters: In<u32>,
    summaries: In<u64>,
    candidates: In<u64>,
    sums: In<u64>,
    ids: Out<u32>,
    vocab: u32,
    parts: u32,
    summed: u32,
) {
    let scratch = shared_array!(u64, WARPS);
    let histogram = shared_array!(u64, 256);
    let chosen = shared_array!(u64, 3);
    let keys = shared_array!(u64, SORTED);
    let first_keys = shared_array!(u64, FIRST);
    let histogram_of_all = shared_array!(u32, distance::BINS);
    let first_bins = shared_array!(u32, 2);
    let found = shared_array!(u32, 1);
    let counts = shared_array!(u32, MAX_PARTS);
    let thread = thread::thread_idx_x() as usize;
    let row = thread::block_idx_x() as usize;
    let (vocab, parts) = (vocab as usize, parts as usize);
    thread::allow_successor();
    thread::wait_for_predecessors();

    let parameters = RowParameters::of_row(&parameters, row);
    let whole_mass = summed != 0 && parameters.needs_whole_mass();
    let (mut best, mut floor, mut drawn, mut sum) = (0, 0, 0, 0);
    if thread < parts {
        let place = row * parts + thread;
        [best, floor] = summaries.load(place * SUMMARY);
        let [found, winner] = summaries.load(place * SUMMARY + 2);
        drawn = winner;
        if whole_mass {
            sum = sums.get(place);
        }
        counts.set(thread, found as u32);
    }
    // The barriers inside put the counts where every thread sees them.
    let best = rank::block_max(best, &scratch);
    if best == 0 || parameters.keeps_all() {
        let winner = rank::block_max(drawn, &scratch);
        if thread == 0 {
            ids.set(row, rank::id_of(winner));
        }
        return;
    }
    let floor = rank::block_max(floor, &scratch);
    let (_, sum) = rank::block_scan(sum, &scratch);
    let (mut count, mut lost) = (0, false);
    for part in 0..parts {
        let here = counts.get(part) as usize;
        count += here;
        lost |= here > CAPACITY;
    }

    let mut decided = None;
    if !lost && count <= SORTED {
        let mut part = thread::warp_id() as usize;
        while part < parts {
            let mut offset = 0;
            for before in 0..part {
                offset += counts.get(before) as usize;
            }
            let mut index = thread::lane_id() as usize;
            while index < counts.get(part) as usize {
                keys.set(offset + index, candidates.get((row * parts + part) * CAPACITY + index));
                index += 32;
            }
            part += WARPS;
        }
        let max = rank::logit_of(best);
        // Of the candidates, which `keys` are, `top_k` or a few more: all that are as near to the best as these.
        let (mut keys, mut count) = (keys, count);
        let top_k = parameters.top_k as usize;
        if top_k > 0 && top_k < count {
            if thread < distance::BINS {
                histogram_of_all.set(thread, 0);
            }
            if thread == 0 {
                found.set(0, 0);
            }
            thread::sync_threads();
            let mut index = thread;
            while index < count {
                histogram_of_all.atomic_add(distance::bin(max, rank::logit_of(keys.get(index))), 1);
                index += THREADS;
            }
            let (bin, upto) = distance::first_bins(&histogram_of_all, parameters.top_k, &first_bins);
            if upto as usize <= FIRST {
                let mut index = thread;
                while index < count {
                    let key = keys.get(index);
                    if distance::bin(max, rank::logit_of(key)) <= bin as usize {
                        first_keys.set(found.atomic_add(0, 1) as usize, key);
                    }
                    index += THREADS;
                }
                (keys, count) = (first_keys, upto as usize);
            }
        }
        let size = count.next_power_of_two();
        let mut index = count + thread;
        while index < size {
            keys.set(index, 0);
            index += THREADS;
        }
        sort(&keys, size);
        let whole_mass = if whole_mass { Some(sum) } else { None };
        let row = Row { parameters, max, count, floor, whole_mass };
        decided = winner(&row, &keys, &chosen, &scratch);
    }
    let id = if let Some(winner) = decided {
        rank::id_of(winner)
    } else {
        draw_from_row(&logits, row, vocab, &parameters, &Selection { histogram, chosen }, &scratch)
    };
    if thread == 0 {
        ids.set(row, id);
    }
}
