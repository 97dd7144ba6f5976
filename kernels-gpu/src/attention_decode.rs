//! Attention of one new token per sequence over its cached context: a block per span, then a merge.

use cuda_std::prelude::*;

use crate::attention::{Merged, SPAN, combine, span};

/// One warp: the `ratio` query heads that share a KV head, over one span.
///
/// Partials of a (row, head, span) are `D + 2` f32: the output, then the maximum, then the sum.
#[inline(always)]
fn decode_span<const STEPS: usize, const TILES: usize>(
    q: In<f32>,
    key_pages: In<bf16>,
    value_pages: In<bf16>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    partials: Out<f32>,
    q_stride: u32,
    kv_heads: u32,
    ratio: u32,
    max_spans: u32,
    scale: f32,
) {
    let width = STEPS * 16;
    let (span_index, kv_head, row) =
        (thread::block_idx_x() as usize, thread::block_idx_y() as usize, thread::block_idx_z() as usize);
    if positions.get(row) == u32::MAX {
        return;
    }
    let context = positions.get(row) as usize + 1;
    if span_index * SPAN >= context {
        return;
    }
    let present = if context - span_index * SPAN < SPAN { (context - span_index * SPAN) as u32 } else { SPAN as u32 };
    let page = page_tables.get(row_tables.get(row) as usize + span_index) as usize;
    let page_start = (page * kv_heads as usize + kv_head) * SPAN * width;
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let ratio = ratio as usize;

    let load_query = |head: usize, column: usize| {
        if head < ratio {
            let start = row * q_stride as usize + (kv_head * ratio + head) * width + column;
            let [low, high]: [f32; 2] = q.load(start);
            bf16_pair(low, high)
        } else {
            0
        }
    };
    let mut query = [[0u32; 4]; STEPS];
    for s in 0..STEPS {
        let column = s * 16 + t * 2;
        query[s] = [
            load_query(g, column),
            load_query(g + 8, column),
            load_query(g, column + 8),
            load_query(g + 8, column + 8),
        ];
    }

    let load_pair = |pages: &In<bf16>, index: usize| {
        let [low, high]: [bf16; 2] = pages.load(index);
        u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16)
    };
    let key = |n: usize, s: usize| {
        // A token that is not there is never visible; read the first one in its place, which is.
        let token = if ((n * 8 + g) as u32) < present { n * 8 + g } else { 0 };
        let start = page_start + token * width + s * 16 + t * 2;
        [load_pair(&key_pages, start), load_pair(&key_pages, start + 8)]
    };
    let value = |n: usize, s: usize| {
        let start = page_start + (n * 8 + g) * SPAN;
        let token = s * 16 + t * 2;
        [token, token + 8].map(|token| {
            // Loads whole pairs only where both tokens are there; memory that nobody wrote is not read.
            if ((token + 1) as u32) < present {
                load_pair(&value_pages, start + token)
            } else if (token as u32) < present {
                u32::from(value_pages.get(start + token).to_bits())
            } else {
                0
            }
        })
    };
    let result = span::<STEPS, TILES>(&query, key, value, [present, present], scale);

    for half in 0..2 {
        let head = g + half * 8;
        if head < ratio {
            let heads = kv_heads as usize * ratio;
            let partial = ((row * heads + kv_head * ratio + head) * max_spans as usize + span_index) * (width + 2);
            for n in 0..TILES {
                let column = partial + n * 8 + t * 2;
                partials.set(column, result.out[n][half * 2]);
                partials.set(column + 1, result.out[n][half * 2 + 1]);
            }
            if t == 0 {
                partials.set(partial + width, result.max[half]);
                partials.set(partial + width + 1, result.sum[half]);
            }
        }
    }
}

macro_rules! decode_kernel {
    ($name:ident, $steps:literal, $tiles:literal) => {
        /// Attention of one token per row over one span of its context, for every KV head: see [`crate::attention`].
        ///
        /// - `q`: f32 \[T, q_stride\], query heads from column 0 on, rounded to bf16 here; pages as in
        ///   [`crate::kv_write`]; `positions`: u32 \[T\], the position of each row's token, whose key and value are in the
        ///   cache; `partials`: f32 \[T, H, max_spans, D + 2\] (output, maximum, sum).
        /// - grid (spans, G, T); one warp takes the query heads of a KV head over a span; spans beyond a row's context do
        ///   nothing.
        /// - bytes: 4 D per token and KV head.
        /// - the caller: `ratio` = H / G is at most 16; `max_spans` is at least the grid's first dimension.
        #[kernel(block = 32)]
        pub fn $name(
            q: In<f32>,
            key_pages: In<bf16>,
            value_pages: In<bf16>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            partials: Out<f32>,
            q_stride: u32,
            kv_heads: u32,
            ratio: u32,
            max_spans: u32,
            scale: f32,
        ) {
            decode_span::<$steps, $tiles>(
                q,
                key_pages,
                value_pages,
                positions,
                row_tables,
                page_tables,
                partials,
                q_stride,
                kv_heads,
                ratio,
                max_spans,
                scale,
            );
        }
    };
}
decode_kernel!(attention_decode_32, 2, 4);
decode_kernel!(attention_decode_64, 4, 8);
decode_kernel!(attention_decode_96, 6, 12);
decode_kernel!(attention_decode_128, 8, 16);

/// Merges the spans of each (row, head) in order and rounds the output to bf16.
///
/// - `partials`: f32 \[T, H, max_spans, D + 2\]; `positions`: u32 \[T\]; `out`: bf16 \[T, H, D\].
/// - grid (H, T); a thread merges one column (threads beyond D do nothing).
/// - bytes: 4 (D + 2) per span and head.
/// - the caller: `width` = D is at most 128; the spans up to each row's position are in `partials`.
#[kernel(block = 128)]
pub fn attention_merge(partials: In<f32>, positions: In<u32>, out: Out<bf16>, width: u32, max_spans: u32) {
    let column = thread::thread_idx_x() as usize;
    let width = width as usize;
    if column < width {
        let row = thread::block_idx_y() as usize;
        let index = row * thread::grid_dim_x() as usize + thread::block_idx_x() as usize;
        if positions.get(row) == u32::MAX {
            return;
        }
        let spans = positions.get(row) as usize / SPAN + 1;
        let mut merged = Merged::EMPTY;
        let mut value = 0.0;
        for span_index in 0..spans {
            let partial = (index * max_spans as usize + span_index) * (width + 2);
            let rescale = merged.add(partials.get(partial + width), partials.get(partial + width + 1));
            value = combine(rescale, value, partials.get(partial + column));
        }
        out.set(index * width + column, f32_to_bf16(value * (1.0 / merged.sum)));
    }
}
