//! The second pass of a fast draw, for rows with top-p and without top-k: the mass of the whole vocabulary.

use cuda_std::prelude::*;

use crate::candidates::{self, SUMMARY};
use crate::rank::{self, WARPS};
use crate::row_parameters::RowParameters;
use crate::sample::mass;

/// sums\[r, p\] = the mass of part p of row r, in multiples of 2^-40 of the likeliest token's; nothing for rows that do not
/// need it.
///
/// - `logits`: f32 \[R, V\]; `parameters`: u32 \[R, 12\]; `summaries`: u64 \[R, parts, 4\], of
///   [`sample_candidates()`](candidates::sample_candidates()); `sums`: u64 \[R, parts\].
/// - grid and caller: as of `sample_candidates`.
/// - bytes: 4 per element.
#[kernel(block = 512, min_blocks = 2)]
pub fn sample_masses(logits: In<f32>, parameters: In<u32>, summaries: In<u64>, sums: Out<u64>, vocab: u32) {
    let scratch = shared_array!(u64, WARPS);
    let thread = thread::thread_idx_x() as usize;
    let (row, vocab) = (thread::block_idx_y() as usize, vocab as usize);
    let (part, parts) = (thread::block_idx_x() as usize, thread::grid_dim_x() as usize);
    thread::allow_successor();
    thread::wait_for_predecessors();

    let parameters = RowParameters::of_row(&parameters, row);
    if !parameters.needs_whole_mass() {
        return;
    }
    let best = if thread < parts { summaries.get((row * parts + thread) * SUMMARY) } else { 0 };
    let keys = candidates::part(&logits, row, vocab, &parameters);
    let best = rank::block_max(best, &scratch);
    let max = rank::logit_of(best);
    let mut own = 0;
    for quad in keys {
        for key in quad {
            if key != 0 {
                own += mass(rank::logit_of_key(key), max);
            }
        }
    }
    let (_, sum) = rank::block_scan(own, &scratch);
    if thread == 0 {
        sums.set(row * parts + part, sum);
    }
}
