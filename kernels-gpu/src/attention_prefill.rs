//! Causal attention of many consecutive tokens over their cached contexts, their own keys and values included: a
//! flash-attention loop (Dao 2023, arXiv 2307.08691) over the spans of the definition.

use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

use crate::attention::{
    Merged, PAD, Rescale, SPAN, TOKEN_STEPS, TOKEN_TILES, add_pair, base, combine, maximum, output, probability_pair,
    scale, scores, sum_of_lanes,
};

/// Query rows of a tile, of which a warp has one or two.
const TILE_ROWS: usize = 16;

/// Query rows of a block: 8 warps, or 4 with two tiles each. A span's keys and values are read once for all of them.
pub const BLOCK_ROWS: usize = 128;

/// Query rows of a block of the `short` kernels, for steps that would leave most of a GPU idle otherwise: 4 warps.
pub const SHORT_BLOCK_ROWS: usize = 64;

/// Numbers of a tile: first row, rows, position of the first row, start of the sequence's page table.
pub const TILE_FIELDS: usize = 4;

/// Keys of spans in shared memory at once, and values: one is computed, one is on its way.
const STAGES: usize = 2;

/// bf16 elements of a span's keys and values in shared memory.
const fn stage_elements(width: usize) -> usize {
    SPAN * (width + PAD) + width * (SPAN + PAD)
}

/// Bytes of dynamic shared memory that a block of `rows` query rows needs for heads of `width` elements.
#[must_use]
pub const fn shared_bytes(rows: usize, width: usize) -> usize {
    (STAGES * stage_elements(width) + rows * (width + PAD)) * size_of::<bf16>()
}

/// A span's probabilities, and what it takes to merge them.
struct Weights<const ROWS: usize> {
    max: [[f32; 2]; ROWS],
    pairs: [[[u32; 2]; TOKEN_TILES]; ROWS],
    /// The lane's own sums.
    sums: [[f32; 2]; ROWS],
}

impl<const ROWS: usize> Weights<ROWS> {
    /// Those of a span without visible tokens, which changes nothing.
    const EMPTY: Self =
        Self { max: [[f32::NEG_INFINITY; 2]; ROWS], pairs: [[[0; 2]; TOKEN_TILES]; ROWS], sums: [[0.0; 2]; ROWS] };

    /// The probabilities of tile `n`; tiles come in their order.
    #[inline(always)]
    fn add(&mut self, n: usize, scores: &[[[f32; 4]; TOKEN_TILES]; ROWS], base: &[[f32; 2]; ROWS]) {
        for r in 0..ROWS {
            for half in 0..2 {
                let pair = [scores[r][n][half * 2], scores[r][n][half * 2 + 1]];
                self.pairs[r][n][half] = probability_pair(pair, base[r][half]);
                self.sums[r][half] = here(add_pair(self.sums[r][half], self.pairs[r][n][half]));
            }
        }
    }

    /// Merges maxima and sums, and returns the factors for the values.
    #[inline(always)]
    fn merge(&self, merged: &mut [[Merged; 2]; ROWS]) -> [[Rescale; 2]; ROWS] {
        let mut rescale = [[Rescale { before: 1.0, span: -0.0 }; 2]; ROWS];
        for r in 0..ROWS {
            let sums = sum_of_lanes(self.sums[r]);
            for half in 0..2 {
                rescale[r][half] = merged[r][half].add(self.max[r][half], sums[half]);
            }
        }
        rescale
    }
}

/// Takes tokens away that a row does not see, as [`scale`] does: here the lane's own first token is taken from what is
/// visible, so that the tokens to compare are constants, not 16 registers.
#[inline(always)]
pub(crate) fn mask(scores: &mut [[f32; 4]; TOKEN_TILES], visible: [u32; 2], t: u32) {
    let visible = visible.map(|visible| visible.saturating_sub(t * 2));
    for n in 0..TOKEN_TILES {
        for element in 0..4 {
            if (n * 8 + element % 2) as u32 >= visible[element / 2] {
                scores[n][element] = f32::NEG_INFINITY;
            }
        }
    }
}

/// The same number, computed where it is written: the compiler would make most sums behind the last branch.
#[inline(always)]
fn here(value: f32) -> f32 {
    f32::from_bits(thread::number_anew(value.to_bits()))
}

/// Weighs 8 columns of a span's values, columns 8 n and following.
#[inline(always)]
fn weigh<const ROWS: usize>(
    n: usize,
    values: &mma::ReadBSteps,
    value_row: usize,
    pairs: &[[[u32; 2]; TOKEN_TILES]; ROWS],
) -> [[f32; 4]; ROWS] {
    let [first, second] = values.load(n * 8 * value_row);
    let [third, fourth] = values.load(n * 8 * value_row + 32);
    let mut parts = [[0.0; 4]; ROWS];
    for r in 0..ROWS {
        parts[r] = output(&pairs[r], [first, second, third, fourth]).map(here);
    }
    parts
}

/// Merges what [`weigh`] gave.
#[inline(always)]
fn merge<const ROWS: usize, const TILES: usize>(
    n: usize,
    parts: [[f32; 4]; ROWS],
    rescale: &[[Rescale; 2]; ROWS],
    sums: &mut [[[f32; 4]; TILES]; ROWS],
) {
    for r in 0..ROWS {
        for element in 0..4 {
            sums[r][n][element] = here(combine(rescale[r][element / 2], sums[r][n][element], parts[r][element]));
        }
    }
}

/// One block. `ROWS` is the number of a warp's row tiles: with two, every operand of keys and values that is read from shared
/// memory serves two products.
#[inline(always)]
fn prefill<const WARPS: usize, const ROWS: usize, const STEPS: usize, const TILES: usize>(
    q: In<f32>,
    key_pages: In<bf16>,
    value_pages: In<bf16>,
    page_tables: In<u32>,
    tiles: In<u32>,
    out: Out<bf16>,
    q_stride: u32,
    kv_heads: u32,
    ratio: u32,
    factor: f32,
) {
    let width = STEPS * 16;
    // Whether a span's values are weighed while the next one's probabilities are computed. A warp of two tiles shares its
    // scheduler with one other, which is in the same phase after each barrier; so it gives the tensor cores and the units for
    // exponentials work at once by itself. It costs the registers of a span's probabilities: too many with one tile a warp,
    // of which there are four, or where the assembler loads far ahead.
    let late = ROWS == 2 && !cfg!(target_feature = "sm_120");
    let (key_row, value_row) = (width + PAD, SPAN + PAD);
    let staged: Shared<bf16> = shared::dynamic(0, STAGES * stage_elements(width));
    let queries_at = STAGES * stage_elements(width) * size_of::<bf16>();
    let queries: Shared<bf16> = shared::dynamic(queries_at, WARPS * ROWS * TILE_ROWS * key_row);
    let thread = thread::thread_idx_x();
    let threads = WARPS * 32;
    thread::allow_successor();
    thread::wait_for_predecessors();

    let entry = thread::block_idx_y() as usize * TILE_FIELDS;
    let (first_row, rows) = (tiles.get(entry), tiles.get(entry + 1));
    let (first_position, table) = (tiles.get(entry + 2), tiles.get(entry + 3));
    let head = thread::block_idx_x();
    let heads = thread::grid_dim_x();
    let kv_head = head / ratio;
    let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
    let warp_rows = (ROWS * TILE_ROWS) as u32;
    let warp_row = thread::warp_id() * warp_rows;
    let end = first_position + rows;
    let spans = end.div_ceil(SPAN as u32);

    value_pages.check(0, key_pages.len());

    // Where a thread's 16-byte pieces of a page go in a stage. A page holds keys and values as they are staged, less the
    // padding; piece i is `threads` behind piece i - 1.
    let place = |i: usize, per_row: usize, row: usize| {
        if threads.is_multiple_of(per_row) {
            (thread as usize / per_row + i * (threads / per_row)) * row + thread as usize % per_row * 8
        } else {
            let piece = thread as usize + i * threads;
            piece / per_row * row + piece % per_row * 8
        }
    };
    // Where the keys of a page start, and its values in theirs.
    let page_start = |page: u32| (page as usize * kv_heads as usize + kv_head as usize) * (SPAN * width);
    let stage_of = |span: u32| span as usize % STAGES * stage_elements(width);
    let values_of = |span: u32| stage_of(span) + SPAN * key_row;
    // Starts a span's keys on their way to its stage.
    let fetch_keys = |span: u32, page: u32| {
        let page_start = page_start(page);
        key_pages.check(page_start, SPAN * width);
        let keys = stage_of(span);
        let present = end - span * SPAN as u32;
        if present >= SPAN as u32 {
            let from = page_start + thread as usize * 8;
            for i in 0..SPAN * width / 8 / threads {
                let to = keys + place(i, width / 8, key_row);
                // SAFETY: the pieces are those of the page, which is in the cache (checked above); both sides are multiples
                // of 16 bytes.
                unsafe { cp_async::copy_unchecked::<_, 8>(&staged, to, &key_pages, from + i * threads * 8) };
            }
        } else {
            // Tokens that are not there become zeros: memory that nobody wrote is not read.
            let mut piece = thread as usize;
            while piece < SPAN * width / 8 {
                let token = piece / (width / 8);
                let to = keys + token * key_row + piece % (width / 8) * 8;
                if (token as u32) < present {
                    cp_async::copy::<_, 8>(&staged, to, &key_pages, page_start + piece * 8);
                } else {
                    staged.store(to, [bf16::ZERO; 8]);
                }
                piece += threads;
            }
        }
    };
    // The same of its values.
    let fetch_values = |span: u32, page: u32| {
        let page_start = page_start(page);
        let values = values_of(span);
        let present = end - span * SPAN as u32;
        if present >= SPAN as u32 {
            let from = page_start + thread as usize * 8;
            for i in 0..SPAN * width / 8 / threads {
                let to = values + place(i, SPAN / 8, value_row);
                // SAFETY: as above; the keys of the same page have been fetched, and there are as many values as keys
                // (checked at the start).
                unsafe { cp_async::copy_unchecked::<_, 8>(&staged, to, &value_pages, from + i * threads * 8) };
            }
        } else {
            let mut piece = thread as usize;
            while piece < SPAN * width / 8 {
                let token = piece % (SPAN / 8) * 8;
                let to = values + piece / (SPAN / 8) * value_row + token;
                if token as u32 + 8 <= present {
                    cp_async::copy::<_, 8>(&staged, to, &value_pages, page_start + piece * 8);
                } else {
                    let mut tokens = [bf16::ZERO; 8];
                    for i in 0..8 {
                        if ((token + i) as u32) < present {
                            tokens[i] = value_pages.get(page_start + piece * 8 + i);
                        }
                    }
                    staged.store(to, tokens);
                }
                piece += threads;
            }
        }
    };
    let mut page = page_tables.get(table as usize);
    fetch_keys(0, page);
    if !late {
        fetch_values(0, page);
    }
    cp_async::commit_group();
    // Always one page ahead of the copies, so that nothing waits for a page's number.
    let mut next_page = if spans > 1 { page_tables.get(table as usize + 1) } else { 0 };

    // The queries stay in shared memory: their operands would take a quarter of the registers. Rows that are not there
    // are zeros.
    for i in 0..ROWS * TILE_ROWS * width / 4 / 32 {
        let piece = thread as usize + i * threads;
        let (row, column) = (piece / (width / 4), piece % (width / 4) * 4);
        let mut values = [bf16::ZERO; 4];
        if (row as u32) < rows {
            let from = (first_row as usize + row) * q_stride as usize + (head * width as u32) as usize + column;
            values = q.load::<4>(from).map(f32_to_bf16);
        }
        queries.store(row * key_row + column, values);
    }
    let query = mma::ReadA::new(&queries, warp_row as usize * key_row, key_row);

    // Some targets' assemblers load operands so far ahead that registers run out, but not past a branch, even one that is
    // never taken (each with a condition of its own, or the compiler would join them).
    let loads_far_ahead = cfg!(target_feature = "sm_120") || (STEPS == 8 && !cfg!(target_feature = "sm_90"));
    let stop_loading_ahead = |place: usize| {
        if loads_far_ahead && kv_heads == u32::MAX - place as u32 {
            tiles.check(usize::MAX, 1);
        }
    };

    // The same for what is to take turns: the assembler would issue all products first, then all exponentials. A comparison and
    // a branch each.
    let apart = |place: usize| {
        if kv_heads == u32::MAX - 100 - place as u32 {
            tiles.check(usize::MAX, 1);
        }
    };

    let mut merged = [[Merged::EMPTY; 2]; ROWS];
    let mut sums = [[[0.0f32; 4]; TILES]; ROWS];
    // Of the span whose values are still to be weighed.
    let mut last = Weights::<ROWS>::EMPTY;
    // One past the last position that a row of this warp has; nothing for a warp without rows.
    let last_row = if warp_row + warp_rows <= rows { warp_row + warp_rows } else { rows };
    let warp_end = if warp_row < rows { first_position + last_row } else { 0 };
    let mut span = 0;
    while span < spans + u32::from(late) {
        cp_async::wait_group::<0>();
        // What this turn takes has landed for all, and all have left what the last one took, whose place comes next.
        thread::sync_threads();
        if late && span < spans {
            fetch_values(span, page);
        }
        if span + 1 < spans {
            page = next_page;
            fetch_keys(span + 1, page);
            if !late {
                fetch_values(span + 1, page);
            }
            if span + 2 < spans {
                next_page = page_tables.get((table + span) as usize + 2);
            }
        }
        cp_async::commit_group();
        let span_start = span * SPAN as u32;
        if span_start < warp_end {
            let keys = mma::ReadBColumns::new(&staged, stage_of(span), key_row);
            let key = |pair: usize, s: usize| {
                if (ROWS == 2 || pair.is_multiple_of(2)) && s + pair > 0 {
                    stop_loading_ahead(s * 4 + pair);
                }
                keys.load(pair * 16 * key_row + s * 16)
            };
            let mut tile = scores::<STEPS, TOKEN_TILES, ROWS>(|r, s| query.load(r * TILE_ROWS * key_row + s * 16), key);
            // While the products are on their way.
            let rescale = if late { last.merge(&mut merged) } else { [[Rescale { before: 1.0, span: -0.0 }; 2]; ROWS] };
            // Only the spans on the diagonal have tokens that some row does not see.
            let first_seen = first_position + warp_row + 1;
            let diagonal = span_start + SPAN as u32 > first_seen;
            let mut next = Weights::<ROWS>::EMPTY;
            let mut bases = [[0.0; 2]; ROWS];
            for r in 0..ROWS {
                let first_seen = first_seen + (r * TILE_ROWS) as u32 + g;
                scale(&mut tile[r], factor, None);
                if diagonal {
                    mask(&mut tile[r], [0, 8].map(|offset| (first_seen + offset).saturating_sub(span_start)), t);
                }
                next.max[r] = maximum(&tile[r]);
                bases[r] = base(next.max[r]);
            }
            if late && span > 0 {
                let values = mma::ReadBSteps::new(&staged, values_of(span - 1), value_row);
                let mut parts = [[0.0; 4]; ROWS];
                for n in 0..TILES {
                    apart(n);
                    let now = weigh(n, &values, value_row, &last.pairs);
                    for j in n * TOKEN_TILES / TILES..(n + 1) * TOKEN_TILES / TILES {
                        next.add(j, &tile, &bases);
                    }
                    // Not this tile's, which would wait for its products.
                    if n > 0 {
                        merge(n - 1, parts, &rescale, &mut sums);
                    }
                    parts = now;
                }
                merge(TILES - 1, parts, &rescale, &mut sums);
            } else {
                for j in 0..TOKEN_TILES {
                    next.add(j, &tile, &bases);
                }
            }
            last = next;
        }
        // All values, or those of the last span that the warp sees, behind it.
        let weighed = if late { span.wrapping_sub(1) } else { span };
        let weighs =
            if late { span_start >= warp_end && span_start < warp_end + SPAN as u32 } else { span_start < warp_end };
        if weighs && weighed < spans {
            let rescale = last.merge(&mut merged);
            let values = mma::ReadBSteps::new(&staged, values_of(weighed), value_row);
            for n in 0..TILES {
                if ROWS == 2 || n.is_multiple_of(2) {
                    stop_loading_ahead(STEPS * 4 + n);
                }
                merge(n, weigh(n, &values, value_row, &last.pairs), &rescale, &mut sums);
            }
        }
        span += 1;
    }

    // Read again rather than kept in registers over the loop.
    let (first_row, rows) = (tiles.get(entry), tiles.get(entry + 1));
    for r in 0..ROWS {
        for half in 0..2 {
            let row = warp_row + (r * TILE_ROWS) as u32 + g + half as u32 * 8;
            if row < rows {
                let inverse = 1.0 / merged[r][half].sum;
                let part = ((first_row + row) * heads + head) as usize;
                for n in 0..TILES {
                    out.store(
                        part * width + n * 8 + t as usize * 2,
                        [half * 2, half * 2 + 1].map(|element| f32_to_bf16(sums[r][n][element] * inverse)),
                    );
                }
            }
        }
    }
}

const _: () = assert!(TOKEN_STEPS == 4, "values are loaded two steps at a time");

macro_rules! prefill_kernel {
    ($name:ident, $threads:tt, $min_blocks:tt, $rows:literal, $steps:literal, $tiles:literal) => {
        /// Causal attention of consecutive tokens of any number of sequences: see [`crate::attention`].
        ///
        /// - `q`: f32 \[T, q_stride\], query heads from column 0 on, rounded to bf16 here; pages as in
        ///   [`crate::kv_write`], the rows' own keys and values in them; `page_tables`: u32, of all sequences; `tiles`: u32
        ///   \[tiles, [`TILE_FIELDS`]\], each some consecutive tokens of one sequence; `out`: bf16 \[T, H, D\].
        /// - grid (H, tiles), the longest contexts first; a warp takes 16 rows, or 32 in the `wide`
        ///   kernel; a block stages each span's keys and values in shared memory.
        /// - bytes: 4 D per token of context, query head and tile.
        /// - the caller: a tile has at most 16 rows per warp of the block; `ratio` = H / G; [`shared_bytes`] of dynamic
        ///   shared memory for these rows; `q` and pages are multiples of 16 bytes.
        #[kernel(block = $threads, min_blocks = $min_blocks)]
        pub fn $name(
            q: In<f32>,
            key_pages: In<bf16>,
            value_pages: In<bf16>,
            page_tables: In<u32>,
            tiles: In<u32>,
            out: Out<bf16>,
            q_stride: u32,
            kv_heads: u32,
            ratio: u32,
            scale: f32,
        ) {
            prefill::<{ $threads / 32 }, $rows, $steps, $tiles>(
                q,
                key_pages,
                value_pages,
                page_tables,
                tiles,
                out,
                q_stride,
                kv_heads,
                ratio,
                scale,
            );
        }
    };
}
// Blocks on a multiprocessor at once: as many as leave the registers that a tile needs.
prefill_kernel!(attention_prefill_32, 256, 1, 1, 2, 4);
prefill_kernel!(attention_prefill_64, 256, 2, 1, 4, 8);
prefill_kernel!(attention_prefill_96, 256, 1, 1, 6, 12);
prefill_kernel!(attention_prefill_short_32, 128, 3, 1, 2, 4);
prefill_kernel!(attention_prefill_short_64, 128, 4, 1, 4, 8);
prefill_kernel!(attention_prefill_short_96, 128, 2, 1, 6, 12);
prefill_kernel!(attention_prefill_short_128, 128, 2, 1, 8, 16);
prefill_kernel!(attention_prefill_wide_64, 128, 2, 2, 4, 8);
