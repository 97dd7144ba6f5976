//! Causal attention of many consecutive tokens over their cached contexts, their own keys and values included: a
//! flash-attention loop (Dao 2023, arXiv 2307.08691) over the spans of the definition.

use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

use crate::attention::{
    Merged, PAD, SPAN, TOKEN_STEPS, TOKEN_TILES, combine, maximum, output, probabilities, scale, scores, sum,
};

/// Query rows of a warp.
const WARP_ROWS: usize = 16;

/// Query rows of a block: 8 warps. A span's keys and values are read once for all of them.
pub const BLOCK_ROWS: usize = 128;

/// Query rows of a block of the `short` kernels, for steps that would leave most of a GPU idle otherwise: 4 warps.
pub const SHORT_BLOCK_ROWS: usize = 64;

/// Numbers of a tile: first row, rows, position of the first row, start of the sequence's page table.
pub const TILE_FIELDS: usize = 4;

/// Spans in shared memory at once: one is computed, one is on its way.
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

#[inline(always)]
fn prefill<const WARPS: usize, const STEPS: usize, const TILES: usize>(
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
    let (key_row, value_row) = (width + PAD, SPAN + PAD);
    let staged: Shared<bf16> = shared::dynamic(0, STAGES * stage_elements(width));
    let queries_at = STAGES * stage_elements(width) * size_of::<bf16>();
    let queries: Shared<bf16> = shared::dynamic(queries_at, WARPS * WARP_ROWS * key_row);
    let thread = thread::thread_idx_x() as usize;
    let threads = WARPS * 32;
    thread::allow_successor();
    thread::wait_for_predecessors();

    let entry = thread::block_idx_y() as usize * TILE_FIELDS;
    let (first_row, rows) = (tiles.get(entry) as usize, tiles.get(entry + 1) as usize);
    let (first_position, table) = (tiles.get(entry + 2) as usize, tiles.get(entry + 3) as usize);
    let head = thread::block_idx_x() as usize;
    let heads = thread::grid_dim_x() as usize;
    let kv_heads = kv_heads as usize;
    let kv_head = head / ratio as usize;
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let warp_row = thread::warp_id() as usize * WARP_ROWS;
    let end = first_position + rows;
    let spans = end.div_ceil(SPAN);

    // Starts a span's keys and values on their way to its stage. A page holds both as they are staged, less the padding.
    let fetch = |span_index: usize, page: usize| {
        let page_start = (page * kv_heads + kv_head) * SPAN * width;
        key_pages.check(page_start, SPAN * width);
        value_pages.check(page_start, SPAN * width);
        let keys = span_index % STAGES * stage_elements(width);
        let values = keys + SPAN * key_row;
        let present = end - span_index * SPAN;
        if present >= SPAN {
            for i in 0..SPAN * width / 8 / threads {
                let chunk = thread + i * threads;
                let to = keys + chunk / (width / 8) * key_row + chunk % (width / 8) * 8;
                // SAFETY: chunk < SPAN * width / 8, and the page was checked above; both sides are multiples of 16 bytes.
                unsafe { cp_async::copy_unchecked::<_, 8>(&staged, to, &key_pages, page_start + chunk * 8) };
            }
            for i in 0..SPAN * width / 8 / threads {
                let chunk = thread + i * threads;
                let to = values + chunk / (SPAN / 8) * value_row + chunk % (SPAN / 8) * 8;
                // SAFETY: as above.
                unsafe { cp_async::copy_unchecked::<_, 8>(&staged, to, &value_pages, page_start + chunk * 8) };
            }
        } else {
            // Tokens that are not there become zeros: memory that nobody wrote is not read.
            let mut chunk = thread;
            while chunk < SPAN * width / 8 {
                let token = chunk / (width / 8);
                let to = keys + token * key_row + chunk % (width / 8) * 8;
                if token < present {
                    cp_async::copy::<_, 8>(&staged, to, &key_pages, page_start + chunk * 8);
                } else {
                    staged.store(to, [bf16::ZERO; 8]);
                }
                let token = chunk % (SPAN / 8) * 8;
                let to = values + chunk / (SPAN / 8) * value_row + token;
                if token + 8 <= present {
                    cp_async::copy::<_, 8>(&staged, to, &value_pages, page_start + chunk * 8);
                } else {
                    let mut tokens = [bf16::ZERO; 8];
                    for i in 0..8 {
                        if token + i < present {
                            tokens[i] = value_pages.get(page_start + chunk * 8 + i);
                        }
                    }
                    staged.store(to, tokens);
                }
                chunk += threads;
            }
        }
        cp_async::commit_group();
    };
    fetch(0, page_tables.get(table) as usize);
    // Always one page ahead of the copies, so that nothing waits for a page's number.
    let mut next_page = if spans > 1 { page_tables.get(table + 1) as usize } else { 0 };

    // The queries stay in shared memory: their operands would take a quarter of the registers. Rows that are not there
    // are zeros.
    for i in 0..WARP_ROWS * width / 4 / 32 {
        let chunk = thread + i * threads;
        let (row, column) = (chunk / (width / 4), chunk % (width / 4) * 4);
        let mut values = [bf16::ZERO; 4];
        if row < rows {
            values = q.load::<4>((first_row + row) * q_stride as usize + head * width + column).map(f32_to_bf16);
        }
        queries.store(row * key_row + column, values);
    }

    let mut merged = [Merged::EMPTY; 2];
    let mut sums = [[0.0f32; 4]; TILES];
    // One past the last position that a row of this warp has; nothing for a warp without rows.
    let warp_end = if warp_row + WARP_ROWS < rows { warp_row + WARP_ROWS } else { rows };
    let warp_end = if warp_row < rows { first_position + warp_end } else { 0 };
    let mut span_index = 0;
    while span_index < spans {
        cp_async::wait_group::<0>();
        // This span has landed for all, and all have left the one before it, whose stage the next one takes.
        thread::sync_threads();
        if span_index + 1 < spans {
            fetch(span_index + 1, next_page);
            if span_index + 2 < spans {
                next_page = page_tables.get(table + span_index + 2) as usize;
            }
        }
        let span_start = span_index * SPAN;
        let keys = span_index % STAGES * stage_elements(width);
        let values = keys + SPAN * key_row;
        span_index += 1;
        if span_start >= warp_end {
            continue;
        }

        let key = |pair: usize, s: usize| mma::load_b_columns(&staged, keys + pair * 16 * key_row + s * 16, key_row);
        let query = |s: usize| mma::load_a(&queries, warp_row * key_row + s * 16, key_row);
        let mut tile = scores::<STEPS, TOKEN_TILES>(query, key);
        // Only the spans on the diagonal have tokens that some row does not see.
        let visible = if span_start + SPAN > first_position + warp_row + 1 {
            let seen = |row: usize| (first_position + warp_row + row + 1).saturating_sub(span_start) as u32;
            Some([seen(g), seen(g + 8)])
        } else {
            None
        };
        scale(&mut tile, factor, visible);
        let max = maximum(&tile);
        let pairs = probabilities(&tile, max);
        let span_sum = sum(&pairs);
        let rescale = [merged[0].add(max[0], span_sum[0]), merged[1].add(max[1], span_sum[1])];
        for n in 0..TILES {
            let [first, second] = mma::load_b_steps(&staged, values + n * 8 * value_row, value_row);
            let [third, fourth] = mma::load_b_steps(&staged, values + n * 8 * value_row + 32, value_row);
            let part = output(&pairs, [first, second, third, fourth]);
            for element in 0..4 {
                sums[n][element] = combine(rescale[element / 2], sums[n][element], part[element]);
            }
        }
    }

    for half in 0..2 {
        let row = warp_row + g + half * 8;
        if row < rows {
            let inverse = 1.0 / merged[half].sum;
            for n in 0..TILES {
                let column = ((first_row + row) * heads + head) * width + n * 8 + t * 2;
                out.store(
                    column,
                    [f32_to_bf16(sums[n][half * 2] * inverse), f32_to_bf16(sums[n][half * 2 + 1] * inverse)],
                );
            }
        }
    }
}

const _: () = assert!(TOKEN_STEPS == 4, "values are loaded two steps at a time");

macro_rules! prefill_kernel {
    ($name:ident, $threads:tt, $min_blocks:tt, $steps:literal, $tiles:literal) => {
        /// Causal attention of consecutive tokens of any number of sequences: see [`crate::attention`].
        ///
        /// - `q`: f32 \[T, q_stride\], query heads from column 0 on, rounded to bf16 here; pages as in
        ///   [`crate::kv_write`], the rows' own keys and values in them; `page_tables`: u32, of all sequences; `tiles`: u32
        ///   \[tiles, [`TILE_FIELDS`]\], each some consecutive tokens of one sequence; `out`: bf16 \[T, H, D\].
        /// - grid (H, tiles), the longest contexts first; a warp takes 16 rows, a block stages each span's keys and values
        ///   in shared memory.
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
            prefill::<{ $threads / 32 }, $steps, $tiles>(
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
prefill_kernel!(attention_prefill_32, 256, 2, 2, 4);
prefill_kernel!(attention_prefill_64, 256, 2, 4, 8);
prefill_kernel!(attention_prefill_96, 256, 1, 6, 12);
prefill_kernel!(attention_prefill_128, 256, 1, 8, 16);
prefill_kernel!(attention_prefill_short_32, 128, 4, 2, 4);
prefill_kernel!(attention_prefill_short_64, 128, 4, 4, 8);
prefill_kernel!(attention_prefill_short_96, 128, 2, 6, 12);
prefill_kernel!(attention_prefill_short_128, 128, 2, 8, 16);
