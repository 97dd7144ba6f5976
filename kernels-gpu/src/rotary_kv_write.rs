//! Everything between the QKV layer and attention: bias, rotary embedding, and the new entries of the KV cache's pages.

use cuda_std::prelude::*;

use crate::kv_write::PAGE;

/// Threads of a block.
pub const THREADS: usize = 128;

/// Rows of which a thread rotates the same pairs. Their loads are under way together, and they share bias and indices.
pub const ROTATED_ROWS: usize = 2;

/// Rows whose values a thread stores, one column of each. As many as 16 bytes hold.
pub const GROUP: usize = 8;

/// Queries stay where they are, biased and rotated; keys, biased and rotated, and values, biased, go to their pages, rounded
/// to bf16. Pairs are i and i + D/2. The bits are those of [`crate::bias_add`], [`crate::rotary`] and [`crate::kv_write`].
///
/// - `qkv`: f32 \[T, (H + 2 G) D\], of which the query columns are written; `bias`: bf16 \[(H + 2 G) D\] or empty; `table`:
///   f32 \[positions, D/2, 2\]; `positions`, `row_tables`: u32 \[T\]; `page_tables`: u32; pages as in [`crate::kv_write`].
/// - grid: blocks for ceil(T / 2) (H + G) D/8 threads, then blocks for ceil(T / 8) G D threads. One of the former rotates 4
///   pairs of 2 rows. One of the latter stores a column of the values of 8 rows, because a page has the tokens of a column side by
///   side: where 8 rows are the tokens of an aligned eighth of a page, they are one store.
/// - bytes: 8 per element of a query, 6 of a key or a value, and 4 D per row of the table.
/// - the caller: D is a multiple of 32, H + 2 G heads in a row, addresses are multiples of 16; T (H + G) D fits 32 bits; the
///   pages of every position are in the tables, no two rows share a position of a sequence; pages are fewer
///   than 2^26. A row whose position is
///   `u32::MAX` is padding: nothing of it is stored, and its row table is any number. Read before the kernels ahead have ended: all but `qkv`.
#[kernel(block = 128, min_blocks = 6)]
pub fn rotary_kv_write(
    qkv: InOut<f32>,
    bias: In<bf16>,
    table: In<f32>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    key_pages: Out<bf16>,
    value_pages: Out<bf16>,
    heads: u32,
    kv_heads: u32,
    head_width: u32,
) {
    let pages = Pages { positions, row_tables, page_tables, kv_heads, head_width };
    let rotated = positions.len().div_ceil(ROTATED_ROWS) as u32 * (heads + kv_heads) * (head_width / 8);
    let rotated_blocks = rotated.div_ceil(THREADS as u32);
    let (block, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    thread::allow_successor();
    if block < rotated_blocks {
        rotate(qkv, bias, table, pages, key_pages, heads, block * THREADS as u32 + thread);
    } else {
        write_values(qkv, bias, pages, value_pages, heads, (block - rotated_blocks) * THREADS as u32 + thread);
    }
}

/// Where tokens are in the pages.
#[derive(Clone, Copy)]
struct Pages<'a> {
    positions: In<'a, u32>,
    row_tables: In<'a, u32>,
    page_tables: In<'a, u32>,
    kv_heads: u32,
    head_width: u32,
}

impl Pages<'_> {
    /// Where the entries of a KV head of a page start.
    #[inline(always)]
    fn start(&self, page: u32, kv_head: u32) -> usize {
        (page as usize * self.kv_heads as usize + kv_head as usize) * PAGE * self.head_width as usize
    }
}

/// Four pairs of a query or a key of [`ROTATED_ROWS`] rows: those of the thread `index` among all that rotate.
///
/// What a step costs here is one trip to memory after another, so there are as few as can be: positions and starts of
/// tables; then angles and pages; queries and keys come beside the latter.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn rotate(qkv: InOut<f32>, bias: In<bf16>, table: In<f32>, pages: Pages, key_pages: Out<bf16>, heads: u32, index: u32) {
    let Pages { positions, row_tables, page_tables, kv_heads, head_width } = pages;
    let per_head = head_width / 8;
    let half = (head_width / 2) as usize;
    let (head, i) = (index / per_head, (index % per_head * 4) as usize);
    let (first_row, head) = ((head / (heads + kv_heads)) as usize * ROTATED_ROWS, head % (heads + kv_heads));
    let column = (head * head_width) as usize + i;
    let rows = positions.len();
    let is_key = head >= heads;

    let mut position = [u32::MAX; ROTATED_ROWS];
    let mut start = [0; ROTATED_ROWS];
    for r in 0..ROTATED_ROWS {
        if first_row + r < rows {
            position[r] = positions.get(first_row + r);
            if is_key {
                start[r] = row_tables.get(first_row + r);
            }
        }
    }
    let mut offsets = [[0.0f32; 4]; 2];
    if !bias.is_empty() && first_row < rows {
        offsets = [bias.load::<4>(column).map(bf16_to_f32), bias.load::<4>(column + half).map(bf16_to_f32)];
    }
    let mut turns = [[[0.0f32; 4]; 2]; ROTATED_ROWS];
    let mut page = [0; ROTATED_ROWS];
    for r in 0..ROTATED_ROWS {
        if position[r] != u32::MAX {
            let angles = (position[r] as usize * half + i) * 2;
            turns[r] = [table.load(angles), table.load(angles + 4)];
            if is_key {
                page[r] = page_tables.get(start[r] as usize + position[r] as usize / PAGE);
            }
        }
    }

    thread::wait_for_predecessors();
    let first = first_row * ((heads + 2 * kv_heads) * head_width) as usize + column;
    let next = ((heads + 2 * kv_heads) * head_width) as usize;
    let mut pairs = [[[0.0f32; 4]; 2]; ROTATED_ROWS];
    for r in 0..ROTATED_ROWS {
        if position[r] != u32::MAX {
            pairs[r] = [qkv.load(first + r * next), qkv.load(first + r * next + half)];
        }
    }
    for r in 0..ROTATED_ROWS {
        if position[r] == u32::MAX {
            continue;
        }
        let [mut a, mut b] = pairs[r];
        for pair in 0..4 {
            if !bias.is_empty() {
                a[pair] += offsets[0][pair];
                b[pair] += offsets[1][pair];
            }
            let (cos, sin) = (turns[r][pair / 2][pair % 2 * 2], turns[r][pair / 2][pair % 2 * 2 + 1]);
            (a[pair], b[pair]) = (math::fma(a[pair], cos, -(b[pair] * sin)), math::fma(b[pair], cos, a[pair] * sin));
        }
        if is_key {
            let key = pages.start(page[r], head - heads) + position[r] as usize % PAGE * head_width as usize + i;
            key_pages.store(key, a.map(f32_to_bf16));
            key_pages.store(key + half, b.map(f32_to_bf16));
        } else {
            qkv.store(first + r * next, a);
            qkv.store(first + r * next + half, b);
        }
    }
}

/// A column of the values of [`GROUP`] rows: those of the thread `index` among all that do this.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn write_values(qkv: InOut<f32>, bias: In<bf16>, pages: Pages, value_pages: Out<bf16>, heads: u32, index: u32) {
    const NOWHERE: u32 = u32::MAX;
    let Pages { positions, row_tables, page_tables, kv_heads, head_width } = pages;
    let kv_width = kv_heads * head_width;
    let (first_row, column) = ((index / kv_width) as usize * GROUP, index % kv_width);
    let (kv_head, d) = (column / head_width, (column % head_width) as usize);
    let rows = positions.len();

    // Where each row's entries go, a page and a token of it in one number, or nowhere; and which of the thread's rows is the
    // first of an aligned eighth of a page whose tokens are all there, one after the other. Each row belongs to one such
    // eighth or goes alone. The eighth that starts among the thread's rows is the thread's.
    let place = |position: u32, page: u32| page * PAGE as u32 + position % PAGE as u32;
    let mut places = [NOWHERE; GROUP];
    let mut whole = 0;
    if rows < GROUP {
        for i in 0..GROUP {
            if first_row + i < rows {
                let (position, start) = (positions.get(first_row + i), row_tables.get(first_row + i));
                if position != u32::MAX {
                    places[i] = place(position, page_tables.get(start as usize + position as usize / PAGE));
                }
            }
        }
    } else {
        // The rows around the thread's own, one for each lane, whose first eight stand before them: which ones follow the
        // row before them, and which ones start an eighth. A warp has one set of rows, because rows of values are multiples
        // of 32. Each lane looks up its own row's page, so that the warp makes two trips to memory and not three for each
        // row.
        let lane = thread::lane_id() as usize;
        let row = (first_row + lane).wrapping_sub(GROUP);
        let (position, start) = if row < rows { (positions.get(row), row_tables.get(row)) } else { (u32::MAX, 0) };
        let present = position != u32::MAX;
        let own =
            if present { place(position, page_tables.get(start as usize + position as usize / PAGE)) } else { NOWHERE };
        // The first lane has nobody before it, and nobody asks whether it follows.
        let (before, start_before) =
            (warp::shuffle_u32(position, lane as u32 + 31), warp::shuffle_u32(start, lane as u32 + 31));
        let follows = warp::ballot(
            present && lane > 0 && before.wrapping_add(1) == position && position > 0 && start == start_before,
        );
        whole = warp::ballot(
            present
                && (position as usize).is_multiple_of(GROUP)
                && lane < 3 * GROUP
                && (follows >> (lane + 1)) & 0x7f == 0x7f,
        );
        for i in 0..GROUP {
            places[i] = warp::shuffle_u32(own, (GROUP + i) as u32);
        }
    }
    let target = |place: u32| pages.start(place / PAGE as u32, kv_head) + d * PAGE + place as usize % PAGE;
    let own = (whole >> GROUP) & 0xff;
    let group_index = own.trailing_zeros() as usize % GROUP;
    let mut group = NOWHERE;
    for i in 0..GROUP {
        if own != 0 && i == group_index {
            group = places[i];
        }
        if (whole >> (i + 1)) & 0xff != 0 {
            places[i] = NOWHERE;
        }
    }
    let value_column = ((heads + kv_heads) * head_width + column) as usize;
    let offset = if bias.is_empty() || first_row >= rows { 0.0 } else { bf16_to_f32(bias.get(value_column)) };

    thread::wait_for_predecessors();
    let load = |row: usize| qkv.get(row * ((heads + 2 * kv_heads) * head_width) as usize + value_column);
    let rounded = |value: f32| f32_to_bf16(if bias.is_empty() { value } else { value + offset });
    // All loads before the first use of one.
    let mut values = [0.0f32; GROUP];
    if group != NOWHERE {
        for i in 0..GROUP {
            values[i] = load(first_row + group_index + i);
        }
        value_pages.store(target(group), values.map(rounded));
    }
    for i in 0..GROUP {
        if places[i] != NOWHERE {
            values[i] = load(first_row + i);
        }
    }
    for i in 0..GROUP {
        if places[i] != NOWHERE {
            value_pages.set(target(places[i]), rounded(values[i]));
        }
    }
}
