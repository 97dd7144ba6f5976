//! Attention of one new token per sequence over a short cached context: one block for all spans of a row and KV head. A warp
//! has a span to itself, so that between the queries and the merge no thread waits for another warp.

use cuda_std::cp_async;
use cuda_std::prelude::*;
use cuda_std::shared;

use crate::attention::{
    Merged, PAD, SPAN, TOKEN_TILES, combine, maximum, output, probabilities_of, scale, scores, sum,
};
use crate::attention_decode::{MAX_RATIO, NO_ROW};

/// Warps of a block, and spans at once. Four spans of wider heads would be more shared memory than smaller GPUs allow.
#[must_use]
pub const fn warps(width: usize) -> usize {
    if width > 64 { 2 } else { 4 }
}

/// Elements of a span's keys in shared memory, \[SPAN, D + PAD\]; its values, \[D, SPAN + PAD\], follow.
pub(crate) const fn key_elements(width: usize) -> usize {
    SPAN * (width + PAD)
}

/// Bytes of a warp's span.
#[must_use]
pub const fn span_bytes(width: usize) -> usize {
    (key_elements(width) + width * (SPAN + PAD)) * size_of::<bf16>()
}

/// Bytes of dynamic shared memory that a block needs for heads of `width` elements.
#[must_use]
pub const fn shared_bytes(width: usize) -> usize {
    warps(width) * span_bytes(width)
}

/// Blocks of [`attention_decode_short_64()`] that a multiprocessor has at once.
pub const LARGE_AT_ONCE: usize = 3;

/// Bytes of dynamic shared memory that a block of [`attention_decode_short_two_64()`] needs.
pub const TWO_SPANS_BYTES: usize = 2 * span_bytes(64);

/// A span's place in shared memory and where it is in the pages.
#[derive(Clone, Copy)]
struct Loader<'a> {
    keys: Shared<bf16>,
    values: Shared<bf16>,
    key_pages: In<'a, bf16>,
    value_pages: In<'a, bf16>,
    width: usize,
    lane: usize,
}

impl Loader<'_> {
    /// Starts to copy the keys of `count` tokens of the page at `start`; those of tokens from `absent` on become zeros.
    #[inline(always)]
    fn keys<const COPIES: usize>(&self, start: usize, count: usize, absent: usize) {
        self.key_pages.check(start, SPAN * self.width);
        let lane = thread::thread_idx_x_anew() as usize % 32;
        for i in 0..COPIES {
            let chunk = lane + i * 32;
            let token = chunk / (self.width / 8);
            let to = token * (self.width + PAD) + chunk % (self.width / 8) * 8;
            if token < count {
                // SAFETY: chunk < SPAN * width / 8, and the page was checked above; both sides are multiples of 16 bytes.
                unsafe { cp_async::copy_unchecked::<_, 8>(&self.keys, to, &self.key_pages, start + chunk * 8) };
            } else if token >= absent {
                self.keys.store(to, [bf16::ZERO; 8]);
            }
        }
        cp_async::commit_group();
    }

    /// The same of values; those of all further tokens become zeros. Memory that nobody wrote is not read.
    #[inline(always)]
    fn values<const COPIES: usize>(&self, start: usize, count: usize) {
        self.value_pages.check(start, SPAN * self.width);
        // A lane copies the same 8 tokens of many columns.
        let lane = thread::thread_idx_x_anew() as usize % 32;
        let token = lane % (SPAN / 8) * 8;
        for i in 0..COPIES {
            let chunk = lane + i * 32;
            let to = chunk / (SPAN / 8) * (SPAN + PAD) + token;
            if token + 8 <= count {
                // SAFETY: as above.
                unsafe { cp_async::copy_unchecked::<_, 8>(&self.values, to, &self.value_pages, start + chunk * 8) };
            } else if token >= count {
                self.values.store(to, [bf16::ZERO; 8]);
            }
        }
        cp_async::commit_group();
        if !count.is_multiple_of(8) {
            let first = count / 8 * 8;
            for i in 0..self.width / 32 {
                let column = lane + i * 32;
                let mut tokens = [bf16::ZERO; 8];
                for j in 0..7 {
                    if first + j < count {
                        // SAFETY: column < width and the token is in the span; the page was checked above.
                        tokens[j] = unsafe { self.value_pages.get_unchecked(start + column * SPAN + first + j) };
                    }
                }
                self.values.store(column * (SPAN + PAD) + first, tokens);
            }
        }
    }

    /// Puts them behind those that were copied.
    #[inline(always)]
    fn append<const STEPS: usize>(&self, index: usize, (key, values): ([bf16; 8], [bf16; STEPS])) {
        if self.lane < self.width / 8 {
            self.keys.store(index * (self.width + PAD) + self.lane * 8, key);
        }
        for i in 0..STEPS / 2 {
            self.values.set((self.lane + i * 32) * (SPAN + PAD) + index, values[i]);
        }
    }
}

/// The lane's part of the key and value of token `index` of the page at `start`.
#[inline(always)]
fn newest_in_pages<const STEPS: usize>(
    key_pages: In<bf16>,
    value_pages: In<bf16>,
    width: usize,
    start: usize,
    index: usize,
) -> ([bf16; 8], [bf16; STEPS]) {
    let lane = thread::lane_id() as usize;
    let mut key = [bf16::ZERO; 8];
    if lane < width / 8 {
        key = key_pages.load(start + index * width + lane * 8);
    }
    let mut values = [bf16::ZERO; STEPS];
    for i in 0..STEPS / 2 {
        values[i] = value_pages.get(start + (lane + i * 32) * SPAN + index);
    }
    (key, values)
}

/// A lane's share of what attention waits for: its queries as operands, and of the newest token's key and values its part, where
/// its warp has the last span.
pub(crate) type Inputs<const STEPS: usize> = ([[u32; 4]; STEPS], ([bf16; 8], [bf16; STEPS]));

/// The query heads of one row and KV head, in the pages of a layer.
#[derive(Clone, Copy)]
pub(crate) struct Task<'a> {
    pub(crate) key_pages: In<'a, bf16>,
    pub(crate) value_pages: In<'a, bf16>,
    /// Of the row's token.
    pub(crate) position: usize,
    /// Query heads.
    pub(crate) ratio: usize,
    /// Of the scores.
    pub(crate) factor: f32,
}

/// One block. `STEPS` = D / 16; `TILES` = D / 8, the tiles of 8 columns; `COPIES` = 2 D / 8, of 16 bytes, that a lane makes of
/// a span's keys; a thread merges four columns of `ITEMS` query heads.
#[inline(always)]
fn decode<const WARPS: usize, const STEPS: usize, const TILES: usize, const COPIES: usize, const ITEMS: usize>(
    statistics: Shared<f32>,
    q: In<f32>,
    key_pages: In<bf16>,
    value_pages: In<bf16>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    out: Out<bf16>,
    q_stride: u32,
    kv_heads: u32,
    ratio: u32,
    factor: f32,
) {
    let width = STEPS * 16;
    let (kv_heads, ratio) = (kv_heads as usize, ratio as usize);
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let (kv_head, row) = (thread::block_idx_x() as usize, thread::block_idx_y() as usize);
    thread::allow_successor();

    let position = positions.get(row);
    if position == NO_ROW {
        // A launch must not end before the one ahead of it, or what follows would not wait for that one.
        thread::wait_for_predecessors();
        return;
    }
    let (position, table) = (position as usize, row_tables.get(row) as usize);
    let place = |span: usize| (page_tables.get(table + span) as usize * kv_heads + kv_head) * SPAN * width;
    let newest_start = place(position / SPAN);
    let first_head = row * kv_heads * ratio + kv_head * ratio;
    attend::<WARPS, STEPS, TILES, COPIES, ITEMS, false>(
        thread::thread_idx_x() as usize,
        statistics,
        0,
        Task { key_pages, value_pages, position, ratio, factor },
        place,
        |has_span, has_last| {
            thread::wait_for_predecessors();
            // All ways to memory and back at once.
            let mut newest = ([bf16::ZERO; 8], [bf16::ZERO; STEPS]);
            if has_last {
                newest = newest_in_pages(key_pages, value_pages, width, newest_start, position % SPAN);
            }
            let mut queries = [[0u32; 4]; STEPS];
            let first = row * q_stride as usize + kv_head * ratio * width + t * 2;
            for half in 0..2 {
                let head = g + half * 8;
                if has_span && head < ratio {
                    for i in 0..2 * STEPS {
                        let [low, high] = q.load::<2>(first + head * width + i * 8);
                        queries[i / 2][i % 2 * 2 + half] = bf16_pair(low, high);
                    }
                }
            }
            (queries, newest)
        },
        thread::sync_threads,
        |head, column, values| out.store((first_head + head) * width + column, values.map(f32_to_bf16)),
    );
}

/// Attention of a [`Task`] by the first `WARPS` warps of a block, in the dynamic shared memory from byte `base` on.
///
/// - `place(span)` is where a span's page starts.
/// - `inputs(has_span, has_last)` waits for what this step computes. It returns the lane's queries, where its warp has a span,
///   and its part of the newest token, where it has the last one.
/// - `sync` is a barrier of these warps.
/// - `emit(head, column, values)` gets four columns of the result.
#[inline(always)]
pub(crate) fn attend<
    const WARPS: usize,
    const STEPS: usize,
    const TILES: usize,
    const COPIES: usize,
    const ITEMS: usize,
    const APART: bool,
>(
    thread: usize,
    statistics: Shared<f32>,
    base: usize,
    task: Task<'_>,
    place: impl Fn(usize) -> usize,
    inputs: impl FnOnce(bool, bool) -> Inputs<STEPS>,
    sync: impl Fn(),
    emit: impl Fn(usize, usize, [f32; 4]),
) {
    let Task { key_pages, value_pages, position, ratio, factor } = task;
    let width = STEPS * 16;
    let (key_row, value_row, part_row) = (width + PAD, SPAN + PAD, width + PAD);
    let (warp, lane) = (thread / 32, thread % 32);
    let spans = position / SPAN + 1;
    let loader = Loader {
        keys: shared::dynamic(base + warp * span_bytes(width), key_elements(width)),
        values: shared::dynamic(base + warp * span_bytes(width) + key_elements(width) * 2, width * value_row),
        key_pages,
        value_pages,
        width,
        lane,
    };

    // What earlier steps wrote is loaded before the wait.
    let last = |span: usize| span + 1 == spans;
    let absent = |span: usize| if last(span) { position % SPAN + 1 } else { SPAN };
    let old = |span: usize| if last(span) { position % SPAN } else { SPAN };
    // Later turns find the newest token in the pages, unless this launch makes it.
    let later = |span: usize| if APART { old(span) } else { absent(span) };
    if warp < spans {
        let start = place(warp);
        loader.keys::<COPIES>(start, old(warp), absent(warp));
        loader.values::<COPIES>(start, old(warp));
    }
    let (queries, newest) = inputs(warp < spans, if APART { (spans - 1) % WARPS == warp } else { last(warp) });
    let append = || {
        // Zeros of other lanes are where the newest value goes.
        warp::sync_warp();
        loader.append(position % SPAN, newest);
    };
    if last(warp) {
        append();
    }

    let mut merged = [Merged::EMPTY; ITEMS];
    let mut values = [[0.0f32; 4]; ITEMS];
    let mut first = 0;
    while first < spans {
        let span = first + warp;
        let next = span + WARPS;
        let mut next_start = 0;
        if span < spans {
            if next < spans {
                next_start = place(next);
            }
            let visible = absent(span);
            cp_async::wait_group::<1>();
            warp::sync_warp();
            let keys = mma::ReadBColumns::new(&loader.keys, 0, key_row);
            let [mut tile] =
                scores::<STEPS, TOKEN_TILES, 1>(|_, s| queries[s], |pair, s| keys.load(pair * 16 * key_row + s * 16));
            // The keys' place is free: the next span's come while this one's probabilities are computed.
            warp::sync_warp();
            if next < spans {
                loader.keys::<COPIES>(next_start, later(next), absent(next));
            } else {
                cp_async::commit_group();
            }
            scale(&mut tile, factor, if visible < SPAN { Some([visible as u32; 2]) } else { None });
            let max = maximum(&tile);
            let pairs = probabilities_of(&tile, max, if APART { ratio } else { MAX_RATIO });
            cp_async::wait_group::<1>();
            warp::sync_warp();
            let tokens = mma::ReadBSteps::new(&loader.values, 0, value_row);
            let lane = thread::thread_idx_x_anew() as usize % 32;
            let (g, t) = (lane / 4, lane % 4);
            let outputs = outputs::<WARPS, APART>(base, width, warp);
            let put = |n: usize, part: [f32; 4]| {
                for half in 0..2 {
                    let head = g + half * 8;
                    if head < ratio {
                        outputs.store(head * part_row + n * 8 + t * 2, [part[half * 2], part[half * 2 + 1]]);
                    }
                }
            };
            let mut parts = [[0.0f32; 4]; TILES];
            for n in 0..TILES {
                let [first, second] = tokens.load(n * 8 * value_row);
                let [third, fourth] = tokens.load(n * 8 * value_row + SPAN / 2);
                parts[n] = output(&pairs, [first, second, third, fourth]);
                if APART {
                    put(n, parts[n]);
                }
            }
            let span_sum = sum(&pairs);
            if !APART {
                // The values' place is free: the outputs go there.
                warp::sync_warp();
                for n in 0..TILES {
                    put(n, parts[n]);
                }
            }
            for half in 0..2 {
                let head = g + half * 8;
                if head < ratio && t == 0 {
                    statistics.store((warp * MAX_RATIO + head) * 2, [max[half], span_sum[half]]);
                }
            }
        }
        sync();
        let thread = thread::thread_idx_x_anew() as usize;
        for item in 0..ITEMS {
            let place = thread + item * WARPS * 32;
            let (head, column) = (place / (width / 4), place % (width / 4) * 4);
            if head < ratio {
                for other in 0..WARPS {
                    if first + other < spans {
                        let [max, span_sum] = statistics.load((other * MAX_RATIO + head) * 2);
                        let part = outputs::<WARPS, APART>(base, width, other).load::<4>(head * part_row + column);
                        let rescale = merged[item].add(max, span_sum);
                        for i in 0..4 {
                            values[item][i] = combine(rescale, values[item][i], part[i]);
                        }
                    }
                }
            }
        }
        first += WARPS;
        if first < spans {
            sync();
            if next < spans {
                loader.values::<COPIES>(next_start, later(next));
                if APART && last(next) {
                    append();
                }
            }
        }
    }
    for item in 0..ITEMS {
        let place = thread + item * WARPS * 32;
        let (head, column) = (place / (width / 4), place % (width / 4) * 4);
        if head < ratio {
            let inverse = 1.0 / merged[item].sum;
            emit(head, column, values[item].map(|value| value * inverse));
        }
    }
}

/// A warp's outputs, \[16, D + PAD\]: in the place of its values, or behind all spans.
#[inline(always)]
fn outputs<const WARPS: usize, const APART: bool>(base: usize, width: usize, warp: usize) -> Shared<f32> {
    const { assert!(MAX_RATIO * (32 + PAD) * 4 <= 32 * (SPAN + PAD) * 2) };
    let place = if APART {
        WARPS * span_bytes(width) + warp * output_bytes(width)
    } else {
        warp * span_bytes(width) + key_elements(width) * 2
    };
    shared::dynamic(base + place, MAX_RATIO * (width + PAD))
}

/// Bytes of a warp's outputs.
const fn output_bytes(width: usize) -> usize {
    MAX_RATIO * (width + PAD) * 4
}

/// Bytes of shared memory for a block whose outputs have a place apart, which takes fewer registers.
#[must_use]
pub const fn apart_bytes(width: usize) -> usize {
    warps(width) * (span_bytes(width) + output_bytes(width))
}

macro_rules! decode_kernel {
    ($name:ident, $width:literal, $warps:literal, $threads:tt, $min_blocks:tt) => {
        /// Attention of one token per row over a context of few spans, for every KV head: the bits of
        /// [`crate::attention_decode`], without its scratch memory.
        ///
        /// - `q`: f32 \[T, q_stride\], query heads from column 0 on, rounded to bf16 here; pages as in
        ///   [`crate::kv_write`]; `positions`: u32 \[T\], the position of each row's token, whose key and value are in the
        ///   cache, or [`NO_ROW`]; `out`: bf16 \[T, H, D\].
        /// - grid (G, T); a block takes the query heads of a KV head over the whole context, two or [`warps`] spans at once, a
        ///   warp one span; then its threads merge these, each some columns of a head. A row [`NO_ROW`] does nothing.
        /// - bytes: 4 D per token and KV head.
        /// - the caller: `ratio` = H / G is at most 16; [`shared_bytes`] of dynamic shared memory; `q` and pages are multiples
        ///   of 16 bytes. Read before the kernels ahead have ended: as in [`crate::attention_decode`].
        #[kernel(block = $threads, min_blocks = $min_blocks)]
        pub fn $name(
            q: In<f32>,
            key_pages: In<bf16>,
            value_pages: In<bf16>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            out: Out<bf16>,
            q_stride: u32,
            kv_heads: u32,
            ratio: u32,
            scale: f32,
        ) {
            const WARPS: usize = $warps;
            const { assert!(WARPS * 32 == $threads) };
            decode::<WARPS, { $width / 16 }, { $width / 8 }, { $width / 4 }, { MAX_RATIO * $width / 4 / $threads }>(
                shared_array!(f32, WARPS * MAX_RATIO * 2),
                q,
                key_pages,
                value_pages,
                positions,
                row_tables,
                page_tables,
                out,
                q_stride,
                kv_heads,
                ratio,
                scale,
            );
        }
    };
}
decode_kernel!(attention_decode_short_32, 32, 4, 128, 3);
decode_kernel!(attention_decode_short_64, 64, 4, 128, 3);
decode_kernel!(attention_decode_short_two_64, 64, 2, 64, 6);
decode_kernel!(attention_decode_short_96, 96, 2, 64, 1);
decode_kernel!(attention_decode_short_128, 128, 2, 64, 1);
