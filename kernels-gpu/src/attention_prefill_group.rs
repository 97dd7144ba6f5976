//! [`crate::attention_prefill`] by warpgroups, for heads of 64 elements where tensor cores read keys and values from shared
//! memory themselves: half of what a warp does otherwise is to load them.
//!
//! A warpgroup has 64 rows. It waits for its products; meanwhile the multiprocessor's other groups compute probabilities.

use cuda_std::prelude::*;
use cuda_std::{cp_async, shared, wgmma};

use crate::attention::{Merged, SPAN, TOKEN_STEPS, combine, maximum, probabilities, scale, sum};
use crate::attention_prefill::TILE_FIELDS;

/// Elements of a head.
const WIDTH: usize = 64;

/// Rows of a warpgroup.
const GROUP_ROWS: u32 = 64;

/// bf16 elements of a span's keys and values in shared memory.
const STAGE: usize = 2 * wgmma::TILE;

const _: () = assert!(SPAN == wgmma::DEPTH && WIDTH == wgmma::DEPTH && TOKEN_STEPS == 4);

/// Bytes of dynamic shared memory for so many spans at once.
pub const fn shared_bytes(stages: usize) -> usize {
    (stages * STAGE + wgmma::MAX_FIRST_PLACE) * size_of::<bf16>()
}

/// One block of `GROUPS` warpgroups, with `STAGES` spans in shared memory, of which `PENDING` = `STAGES` - 2 are on their way
/// while one is computed and one is waited for.
#[inline(always)]
pub fn prefill<const GROUPS: usize, const STAGES: usize, const PENDING: usize>(
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
    let memory: Shared<bf16> = shared::dynamic(0, STAGES * STAGE + wgmma::MAX_FIRST_PLACE);
    let first_stage = wgmma::first_place(&memory);
    let thread = thread::thread_idx_x() as usize;
    let threads = GROUPS * 128;
    thread::allow_successor();
    thread::wait_for_predecessors();

    let entry = thread::block_idx_y() as usize * TILE_FIELDS;
    let (first_row, rows) = (tiles.get(entry), tiles.get(entry + 1));
    let (first_position, table) = (tiles.get(entry + 2), tiles.get(entry + 3));
    let head = thread::block_idx_x();
    let heads = thread::grid_dim_x();
    let kv_head = head / ratio;
    let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
    let group_row = thread::warp_id() / 4 * GROUP_ROWS;
    let warp_row = thread::warp_id() * 16;
    let end = first_position + rows;
    let spans = end.div_ceil(SPAN as u32);

    value_pages.check(0, key_pages.len());

    // A thread's 16-byte pieces of a page are `threads / 8` rows apart, a multiple of 8: all are permuted alike.
    let first_piece = wgmma::place(thread / 8, thread % 8 * 8);
    // Starts a span's keys and values on their way to its stage.
    let fetch = |span: u32, page: u32| {
        let page_start = (page as usize * kv_heads as usize + kv_head as usize) * wgmma::TILE;
        key_pages.check(page_start, wgmma::TILE);
        let keys = first_stage + span as usize % STAGES * STAGE;
        let values = keys + wgmma::TILE;
        let present = end - span * SPAN as u32;
        if present >= SPAN as u32 {
            let from = page_start + thread * 8;
            for i in 0..wgmma::TILE / 8 / threads {
                let (piece, from) = (first_piece + i * threads * 8, from + i * threads * 8);
                // SAFETY: the pieces are those of the page, which is in the cache (checked above; there are as many values
                // as keys, checked at the start); both sides are multiples of 16 bytes.
                unsafe {
                    cp_async::copy_unchecked::<_, 8>(&memory, keys + piece, &key_pages, from);
                    cp_async::copy_unchecked::<_, 8>(&memory, values + piece, &value_pages, from);
                }
            }
        } else {
            // Tokens that are not there become zeros: memory that nobody wrote is not read.
            let mut piece = thread;
            while piece < wgmma::TILE / 8 {
                let (row, column) = (piece / 8, piece % 8 * 8);
                let to = wgmma::place(row, column);
                if (row as u32) < present {
                    cp_async::copy::<_, 8>(&memory, keys + to, &key_pages, page_start + piece * 8);
                } else {
                    memory.store(keys + to, [bf16::ZERO; 8]);
                }
                if column as u32 + 8 <= present {
                    cp_async::copy::<_, 8>(&memory, values + to, &value_pages, page_start + piece * 8);
                } else {
                    let mut tokens = [bf16::ZERO; 8];
                    for i in 0..8 {
                        if ((column + i) as u32) < present {
                            tokens[i] = value_pages.get(page_start + piece * 8 + i);
                        }
                    }
                    memory.store(values + to, tokens);
                }
                piece += threads;
            }
        }
    };
    let page = |span: u32| if span < spans { page_tables.get((table + span) as usize) } else { 0 };
    for span in 0..STAGES as u32 - 1 {
        if span < spans {
            fetch(span, page(span));
        }
        cp_async::commit_group();
    }
    // Always one page ahead of the copies, so that nothing waits for a page's number.
    let mut next_page = page(STAGES as u32 - 1);

    // The queries, as operands. Rows that are not there are zeros.
    let mut query = [[0u32; 4]; WIDTH / 16];
    for half in 0..2 {
        let row = warp_row + g + half as u32 * 8;
        if row < rows {
            let from = (first_row + row) as usize * q_stride as usize + (head * WIDTH as u32 + t * 2) as usize;
            for s in 0..WIDTH / 16 {
                let [low, high] = q.load::<2>(from + s * 16);
                query[s][half] = bf16_pair(low, high);
                let [low, high] = q.load::<2>(from + s * 16 + 8);
                query[s][2 + half] = bf16_pair(low, high);
            }
        }
    }

    let mut merged = [Merged::EMPTY; 2];
    let mut sums = [[0.0f32; 4]; WIDTH / 8];
    // One past the last position that a row of this group has; nothing for a group without rows.
    let last_row = if group_row + GROUP_ROWS <= rows { group_row + GROUP_ROWS } else { rows };
    let group_end = if group_row < rows { first_position + last_row } else { 0 };
    let mut span = 0;
    while span < spans {
        cp_async::wait_group::<PENDING>();
        wgmma::publish();
        // This span has landed for all, and all have left the one before it, whose stage the next one takes.
        thread::sync_threads();
        let next = span + STAGES as u32 - 1;
        if next < spans {
            fetch(next, next_page);
            next_page = page(next + 1);
        }
        cp_async::commit_group();
        let span_start = span * SPAN as u32;
        let keys = first_stage + span as usize % STAGES * STAGE;
        span += 1;
        if span_start >= group_end {
            continue;
        }

        let mut tile = wgmma::products(&query, &memory, keys);
        // Only the spans on the diagonal have tokens that some row does not see.
        let first_seen = first_position + warp_row + 1;
        let visible = if span_start + SPAN as u32 > first_seen {
            Some([0, 8].map(|offset| (first_seen + g + offset).saturating_sub(span_start)))
        } else {
            None
        };
        scale(&mut tile, factor, visible);
        let max = maximum(&tile);
        let pairs = probabilities(&tile, max);
        let weights = [0, 1, 2, 3].map(|s| {
            let (low, high) = (pairs[2 * s], pairs[2 * s + 1]);
            [low[0], low[1], high[0], high[1]]
        });
        let parts = wgmma::products(&weights, &memory, keys + wgmma::TILE);
        let span_sum = sum(&pairs);
        let rescale = [merged[0].add(max[0], span_sum[0]), merged[1].add(max[1], span_sum[1])];
        for n in 0..WIDTH / 8 {
            for element in 0..4 {
                sums[n][element] = combine(rescale[element / 2], sums[n][element], parts[n][element]);
            }
        }
    }

    // Read again rather than kept in registers over the loop.
    let (first_row, rows) = (tiles.get(entry), tiles.get(entry + 1));
    for half in 0..2 {
        let row = warp_row + g + half as u32 * 8;
        if row < rows {
            let inverse = 1.0 / merged[half].sum;
            let part = ((first_row + row) * heads + head) as usize;
            for n in 0..WIDTH / 8 {
                out.store(
                    part * WIDTH + n * 8 + t as usize * 2,
                    [half * 2, half * 2 + 1].map(|element| f32_to_bf16(sums[n][element] * inverse)),
                );
            }
        }
    }
}
