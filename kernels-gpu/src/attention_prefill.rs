//! Causal attention of many consecutive tokens of one sequence over its cached context, their own keys and values
//! included: a flash-attention loop (Dao 2023, arXiv 2307.08691) over the spans of the definition.

use cuda_std::prelude::*;

use crate::attention::{Merged, SPAN, combine, span};

/// Query rows of a block: 4 warps of 16.
pub const BLOCK_ROWS: usize = 64;

/// Tokens of padding after each row of the shared value tile, and elements after each row of the key tile: 8 elements
/// put the eight rows that a fragment reads into different banks.
const PAD: usize = 8;

#[inline(always)]
fn prefill<const STEPS: usize, const TILES: usize>(
    key_tile: Shared<bf16>,
    value_tile: Shared<bf16>,
    q: In<f32>,
    key_pages: In<bf16>,
    value_pages: In<bf16>,
    page_table: In<u32>,
    out: Out<bf16>,
    first_position: u32,
    rows: u32,
    q_stride: u32,
    kv_heads: u32,
    ratio: u32,
    scale: f32,
) {
    let width = STEPS * 16;
    let (key_row, value_row) = (width + PAD, SPAN + PAD);
    let thread = thread::thread_idx_x() as usize;
    let (rows, first_position) = (rows as usize, first_position as usize);
    // The last tiles see the most spans: start them first.
    let tile = (thread::grid_dim_x() - 1 - thread::block_idx_x()) as usize * BLOCK_ROWS;
    let head = thread::block_idx_y() as usize;
    let heads = kv_heads as usize * ratio as usize;
    let kv_head = head / ratio as usize;
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let warp_row = tile + thread::warp_id() as usize * 16;
    let context = first_position + rows;
    let tile_end = if tile + BLOCK_ROWS < rows { tile + BLOCK_ROWS } else { rows };

    let load_query = |row: usize, column: usize| {
        if row < rows {
            let [low, high]: [f32; 2] = q.load(row * q_stride as usize + head * width + column);
            bf16_pair(low, high)
        } else {
            0
        }
    };
    let mut query = [[0u32; 4]; STEPS];
    for s in 0..STEPS {
        let column = s * 16 + t * 2;
        query[s] = [
            load_query(warp_row + g, column),
            load_query(warp_row + g + 8, column),
            load_query(warp_row + g, column + 8),
            load_query(warp_row + g + 8, column + 8),
        ];
    }

    let mut merged = [Merged::EMPTY; 2];
    let mut output = [[0.0f32; 4]; TILES];
    let spans = (first_position + tile_end).div_ceil(SPAN);
    let mut span_index = 0;
    while span_index < spans {
        let span_start = span_index * SPAN;
        let page = page_table.get(span_index) as usize;
        let page_start = (page * kv_heads as usize + kv_head) * SPAN * width;
        let present = if context - span_start < SPAN { context - span_start } else { SPAN };

        thread::sync_threads();
        // Keys: rows of D elements, 8 at a time. Tokens that are not there are never visible; their rows stay as they are
        // in the first span's tile or are zero.
        let mut chunk = thread;
        while chunk < SPAN * width / 8 {
            let (token, column) = (chunk / (width / 8), chunk % (width / 8) * 8);
            let values: [bf16; 8] =
                if token < present { key_pages.load(page_start + token * width + column) } else { [bf16::ZERO; 8] };
            key_tile.store(token * key_row + column, values);
            chunk += 128;
        }
        // Values: rows of SPAN tokens, 8 at a time, zero where there is no token.
        let mut chunk = thread;
        while chunk < SPAN * width / 8 {
            let (column, token) = (chunk / (SPAN / 8), chunk % (SPAN / 8) * 8);
            let source = page_start + column * SPAN + token;
            if token + 8 <= present {
                value_tile.store(column * value_row + token, value_pages.load::<8>(source));
            } else {
                for i in 0..8 {
                    let value = if token + i < present { value_pages.get(source + i) } else { bf16::ZERO };
                    value_tile.set(column * value_row + token + i, value);
                }
            }
            chunk += 128;
        }
        thread::sync_threads();

        // Whole warps skip spans that none of their rows sees.
        let last_row = if warp_row + 16 < rows { warp_row + 16 } else { rows };
        if warp_row < rows && span_start < first_position + last_row {
            let pair = |tile: &Shared<bf16>, index: usize| {
                let [low, high]: [bf16; 2] = tile.load(index);
                u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16)
            };
            let key = |n: usize, s: usize| {
                let start = (n * 8 + g) * key_row + s * 16 + t * 2;
                [pair(&key_tile, start), pair(&key_tile, start + 8)]
            };
            let value = |n: usize, s: usize| {
                let start = (n * 8 + g) * value_row + s * 16 + t * 2;
                [pair(&value_tile, start), pair(&value_tile, start + 8)]
            };
            let visible = [0, 8].map(|offset| {
                let seen = first_position + warp_row + g + offset + 1;
                seen.saturating_sub(span_start) as u32
            });
            let result = span::<STEPS, TILES>(&query, key, value, visible, scale);
            let rescale = [merged[0].add(result.max[0], result.sum[0]), merged[1].add(result.max[1], result.sum[1])];
            for n in 0..TILES {
                for element in 0..4 {
                    output[n][element] = combine(rescale[element / 2], output[n][element], result.out[n][element]);
                }
            }
        }
        span_index += 1;
    }

    for half in 0..2 {
        let row = warp_row + g + half * 8;
        if row < rows {
            let inverse = 1.0 / merged[half].sum;
            for n in 0..TILES {
                let column = (row * heads + head) * width + n * 8 + t * 2;
                out.store(
                    column,
                    [f32_to_bf16(output[n][half * 2] * inverse), f32_to_bf16(output[n][half * 2 + 1] * inverse)],
                );
            }
        }
    }
}

macro_rules! prefill_kernel {
    ($name:ident, $steps:literal, $tiles:literal) => {
        /// Causal attention of `rows` consecutive tokens of one sequence: see [`crate::attention`].
        ///
        /// - `q`: f32 \[rows, q_stride\], query heads from column 0 on, rounded to bf16 here; pages as in
        ///   [`crate::kv_write`], the rows' own keys and values in them; `page_table`: u32, the sequence's;
        ///   `out`: bf16 \[rows, H, D\].
        /// - grid (ceil(rows / 64), H); a warp takes 16 rows, a block stages each span's keys and values in shared memory.
        /// - bytes: 4 D per token of context, KV-head group and tile of 64 rows.
        /// - the caller: row i is at position `first_position` + i; `ratio` = H / G.
        #[kernel(block = 128)]
        pub fn $name(
            q: In<f32>,
            key_pages: In<bf16>,
            value_pages: In<bf16>,
            page_table: In<u32>,
            out: Out<bf16>,
            first_position: u32,
            rows: u32,
            q_stride: u32,
            kv_heads: u32,
            ratio: u32,
            scale: f32,
        ) {
            let key_tile = shared_array!(bf16, SPAN * ($steps * 16 + PAD));
            let value_tile = shared_array!(bf16, $steps * 16 * (SPAN + PAD));
            prefill::<$steps, $tiles>(
                key_tile,
                value_tile,
                q,
                key_pages,
                value_pages,
                page_table,
                out,
                first_position,
                rows,
                q_stride,
                kv_heads,
                ratio,
                scale,
            );
        }
    };
}
prefill_kernel!(attention_prefill_32, 2, 4);
prefill_kernel!(attention_prefill_64, 4, 8);
prefill_kernel!(attention_prefill_96, 6, 12);
prefill_kernel!(attention_prefill_128, 8, 16);
