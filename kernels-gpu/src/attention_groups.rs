//! [`crate::attention_prefill`] by warpgroups on Hopper, for heads of 64 elements: tensor cores read keys and values from shared memory
//! themselves, where the copy engine puts whole pages. Half of what a warp does otherwise is to bring and to load them.
//!
//! A warpgroup has 64 rows. It waits for its products; meanwhile the multiprocessor's other warpgroups compute probabilities, and
//! nothing but a page's arrival and departure makes one wait for another.

use cuda_std::bulk::Barriers;
use cuda_std::prelude::*;
use cuda_std::tensor_copy::{copy_rows, prefetch_map};
use cuda_std::{shared, wgmma};

use crate::attention::{
    Merged, SPAN, TOKEN_STEPS, TOKEN_TILES, add_pair, combine, maximum, probabilities, scale, sum_of_lanes,
};
use crate::attention_prefill::{TILE_FIELDS, mask};

/// Elements of a head.
const WIDTH: usize = 64;

/// Rows of a warpgroup.
const GROUP_ROWS: u32 = 64;

/// bf16 elements of a span's keys and values in shared memory.
const SLOT: usize = 2 * wgmma::TILE;

const _: () = assert!(SPAN == wgmma::DEPTH && WIDTH == wgmma::DEPTH && TOKEN_STEPS == 4);

/// Spans in shared memory.
const SLOTS: usize = 4;

/// Spans that are on their way while one is computed, where a warp that computes asks for them: two warpgroups may then be apart by
/// one. A warp of its own asks as far ahead as there are slots.
const AHEAD: u32 = 2;

/// Bytes of dynamic shared memory of a block.
#[must_use]
pub const fn shared_bytes() -> usize {
    SLOTS * (SLOT * size_of::<bf16>() + 16)
}

/// One block of `GROUPS` warpgroups and, where `ASKS`, a warp that asks for pages and does nothing else.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn attention<const GROUPS: usize, const ASKS: bool>(
    q: In<f32>,
    key_map: In<u64>,
    value_map: In<u64>,
    page_tables: In<u32>,
    tiles: In<u32>,
    out: Out<bf16>,
    q_stride: u32,
    pages: u32,
    kv_heads: u32,
    ratio: u32,
    factor: f32,
) {
    const { assert!(GROUPS <= 2 && SLOTS > AHEAD as usize && AHEAD == 2) };
    let memory: Shared<bf16> = shared::dynamic(0, SLOTS * SLOT);
    // The first ones say that a slot is full, the others that no warp reads it any more.
    let barriers = Barriers::new(shared::dynamic(SLOTS * SLOT * 2, 2 * SLOTS));
    let thread = thread::thread_idx_x();
    thread::allow_successor();
    if thread == 0 {
        for slot in 0..SLOTS {
            barriers.init(slot, 1);
            barriers.init(SLOTS + slot, (GROUPS * 4) as u32);
        }
        Barriers::publish();
    }
    thread::sync_threads();

    // What a step's indices say is known before the kernels ahead have ended.
    let entry = thread::block_idx_y() as usize * TILE_FIELDS;
    let (first_row, rows) = (tiles.get(entry), tiles.get(entry + 1));
    let (first_position, table) = (tiles.get(entry + 2), tiles.get(entry + 3));
    let head = thread::block_idx_x();
    let heads = thread::grid_dim_x();
    let kv_head = head / ratio;
    let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
    let group = thread::warp_id() / 4;
    let group_row = group * GROUP_ROWS;
    let warp_row = thread::warp_id() * 16;
    let end = first_position + rows;
    // A tile without rows has none.
    let spans = if rows > 0 { end.div_ceil(SPAN as u32) } else { 0 };

    let page = |span: u32| if span < spans { page_tables.get((table + span) as usize) } else { 0 };
    // Starts a span's keys and values on their way to its slot: for one thread.
    let fetch = |span: u32, page: u32| {
        if page >= pages {
            // Stops the device.
            page_tables.check(usize::MAX, 1);
        }
        let slot = span as usize % SLOTS;
        let (to, row) = (slot * SLOT, (page * kv_heads + kv_head) * SPAN as u32);
        barriers.arrive_and_expect(slot, (SLOT * 2) as u32);
        // SAFETY: the maps are of boxes of a page of a head (the kernel's contract); nobody reads the slot.
        unsafe {
            copy_rows(&memory, to, &key_map, 0, row, &barriers, slot, None);
            copy_rows(&memory, to + wgmma::TILE, &value_map, 0, row, &barriers, slot, None);
        }
    };
    // Always one page ahead of the copies, so that nothing waits for a page's number.
    let mut next_page = 0;
    if ASKS {
        if thread::warp_id() as usize == GROUPS * 4 {
            if thread::lane_id() == 0 {
                prefetch_map(&key_map);
                prefetch_map(&value_map);
                next_page = page(0);
                thread::wait_for_predecessors();
                for span in 0..spans {
                    let this_page = next_page;
                    next_page = page(span + 1);
                    if span >= SLOTS as u32 {
                        barriers.wait(SLOTS + span as usize % SLOTS, (span / SLOTS as u32 + 1) % 2);
                    }
                    fetch(span, this_page);
                }
            }
            // Who asked does not wait for what comes: all of it is waited for by others before they end, as are the kernels ahead.
            return;
        }
        thread::wait_for_predecessors();
    } else if thread == 0 {
        prefetch_map(&key_map);
        prefetch_map(&value_map);
        let first = [0, 1].map(page);
        next_page = page(AHEAD);
        thread::wait_for_predecessors();
        for span in 0..AHEAD {
            if span < spans {
                fetch(span, first[span as usize]);
            }
        }
    } else {
        thread::wait_for_predecessors();
    }
    warp::sync_warp();

    // The queries, as operands. Rows that are not there are zeros.
    let mut loaded = [[[0.0f32; 2]; WIDTH / 8]; 2];
    for half in 0..2 {
        let row = warp_row + g + half as u32 * 8;
        if row < rows {
            let from = (first_row + row) as usize * q_stride as usize + (head * WIDTH as u32) as usize;
            q.check(from, WIDTH);
            for n in 0..WIDTH / 8 {
                // SAFETY: inside the head (checked above, once, so that no load waits for another); two of its elements, whose
                // number is a multiple of 2.
                loaded[half][n] = unsafe { q.load_unchecked(from + n * 8 + t as usize * 2) };
            }
        }
    }
    let mut query = [[0u32; 4]; WIDTH / 16];
    for half in 0..2 {
        for s in 0..WIDTH / 16 {
            let pair = |n: usize| bf16_pair(loaded[half][n][0], loaded[half][n][1]);
            (query[s][half], query[s][2 + half]) = (pair(s * 2), pair(s * 2 + 1));
        }
    }

    let mut merged = [Merged::EMPTY; 2];
    let mut sums = [[0.0f32; 4]; WIDTH / 8];
    // One past the last position that a row of this group has; nothing for a group without rows.
    let last_row = if group_row + GROUP_ROWS <= rows { group_row + GROUP_ROWS } else { rows };
    let group_end = if group_row < rows { first_position + last_row } else { 0 };
    let mut span = 0;
    while span < spans {
        let next = span + AHEAD;
        if !ASKS && thread == 0 && next < spans {
            if next >= SLOTS as u32 {
                barriers.wait(SLOTS + next as usize % SLOTS, (next / SLOTS as u32 + 1) % 2);
            }
            fetch(next, next_page);
            next_page = page(next + 1);
        }
        let slot = span as usize % SLOTS;
        barriers.wait(slot, span / SLOTS as u32 % 2);
        warp::sync_warp();
        let span_start = span * SPAN as u32;
        if span_start < group_end {
            let keys = slot * SLOT;
            let values = keys + wgmma::TILE;
            let present = end - span_start;
            if present < SPAN as u32 {
                // Tokens that are not there have weight 0, but memory that nobody wrote may be NaN. Each warpgroup makes zeros of
                // it, so that none waits for the other.
                let (row, first) = (thread as usize % 128 / 2, thread as usize % 2 * 32);
                for column in (first..first + 32).step_by(2) {
                    if column as u32 + 2 > present {
                        let at = values + wgmma::place(row, column);
                        let [even, _] = memory.load::<2>(at);
                        memory.store(at, [if column as u32 >= present { bf16::ZERO } else { even }, bf16::ZERO]);
                    }
                }
                wgmma::publish();
                if group == 0 {
                    thread::sync_some::<1, 128>();
                } else {
                    thread::sync_some::<2, 128>();
                }
            }
            let mut tile = wgmma::products(&query, &memory, keys);
            scale(&mut tile, factor, None);
            // Only the spans on the diagonal have tokens that some row does not see.
            let first_seen = first_position + warp_row + 1;
            if span_start + SPAN as u32 > first_seen {
                mask(&mut tile, [0, 8].map(|offset| (first_seen + g + offset).saturating_sub(span_start)), t);
            }
            let max = maximum(&tile);
            let pairs = probabilities(&tile, max);
            let weights = [0, 1, 2, 3].map(|s| {
                let (low, high) = (pairs[2 * s], pairs[2 * s + 1]);
                [low[0], low[1], high[0], high[1]]
            });
            let mut lane_sums = [0.0f32; 2];
            for n in 0..TOKEN_TILES {
                for row in 0..2 {
                    lane_sums[row] = add_pair(lane_sums[row], pairs[n][row]);
                }
            }
            let parts = wgmma::products(&weights, &memory, values);
            let span_sum = sum_of_lanes(lane_sums);
            let rescale = [merged[0].add(max[0], span_sum[0]), merged[1].add(max[1], span_sum[1])];
            for n in 0..WIDTH / 8 {
                for element in 0..4 {
                    sums[n][element] = combine(rescale[element / 2], sums[n][element], parts[n][element]);
                }
            }
        }
        if thread::lane_id() == 0 {
            barriers.arrive(SLOTS + slot);
        }
        span += 1;
    }

    // Read again rather than kept in registers over the loop.
    let (first_row, rows) = (tiles.get(entry), tiles.get(entry + 1));
    for half in 0..2 {
        let row = warp_row + g + half as u32 * 8;
        if row < rows {
            let inverse = 1.0 / merged[half].sum;
            let part = ((first_row + row) * heads + head) as usize;
            for n in 0..WIDTH / 8 {
                // In pairs: a conversion of one takes as long as a division.
                let [low, high] = [half * 2, half * 2 + 1].map(|element| sums[n][element] * inverse);
                let pair = bf16_pair(low, high);
                let values = [pair as u16, (pair >> 16) as u16].map(bf16::from_bits);
                out.store(part * WIDTH + n * 8 + t as usize * 2, values);
            }
        }
    }
}

macro_rules! attention_kernel {
    ($name:ident, $threads:tt, $min_blocks:tt) => {
        /// Causal attention of consecutive tokens of any number of sequences: the bits of
        /// [`attention_prefill_64`](crate::attention_prefill::attention_prefill_64()).
        ///
        /// - `q`, `page_tables`, `tiles`, `out`: as there; `key_map`, `value_map`: the tensor maps of the cache's `pages` pages as
        ///   bf16 \[pages G 64, 64\], in boxes of 64 rows.
        /// - grid (H, tiles), the longest contexts first; a warpgroup takes 64 rows.
        /// - bytes: 4 D per token of context, query head and tile.
        /// - the caller: D = 64; a tile has at most 64 rows per warpgroup of the block; `ratio` = H / G; [`shared_bytes`] of dynamic
        ///   shared memory; an `sm_90a` image. Maps, `page_tables` and `tiles` are read before the kernels ahead have ended.
        #[kernel(block = $threads, min_blocks = $min_blocks)]
        pub fn $name(
            q: In<f32>,
            key_map: In<u64>,
            value_map: In<u64>,
            page_tables: In<u32>,
            tiles: In<u32>,
            out: Out<bf16>,
            q_stride: u32,
            pages: u32,
            kv_heads: u32,
            ratio: u32,
            scale: f32,
        ) {
            attention::<{ $threads / 128 }, { $threads % 128 > 0 }>(
                q,
                key_map,
                value_map,
                page_tables,
                tiles,
                out,
                q_stride,
                pages,
                kv_heads,
                ratio,
                scale,
            );
        }
    };
}
// Blocks on a multiprocessor at once: as many as leave 128 registers to a thread. Beside four warpgroups there are none for a warp more.
attention_kernel!(attention_groups_64, 256, 2);
attention_kernel!(attention_groups_short_64, 160, 3);
