//! Attention of one new token per sequence over its cached context: a block per span; the block that ends last merges.

use cuda_std::cp_async;
use cuda_std::prelude::*;

use crate::attention::{
    Merged, PAD, Rescale, SPAN, TOKEN_STEPS, TOKEN_TILES, combine, maximum, output, probabilities, scale, scores, sum,
};

/// The position of a row that is only padding: it is neither read nor written.
pub const NO_ROW: u32 = u32::MAX;

/// Warps of a block. Each takes 16 of a span's tokens for the scores and a quarter of the columns for the output.
const WARPS: usize = 4;
const THREADS: usize = WARPS * 32;
const _: () = assert!(WARPS == TOKEN_STEPS);

/// Query heads that share a KV head, at most: the rows of a tile.
pub const MAX_RATIO: usize = 16;

/// Query heads that a block merges at once: a thread has four columns of one. More than 8 would not fit the registers.
const fn merged_heads(width: usize) -> usize {
    if width < 64 { 8 } else { THREADS * 4 / width }
}

/// Spans whose factors are computed at once: some for each lane of a warp.
const SCAN: usize = 96;

/// Spans whose outputs a thread that merges has under way.
const AHEAD: usize = 16;
const _: () = assert!(SCAN.is_multiple_of(AHEAD));

/// Elements from a head's factors to the next one's, which are in other banks.
const FACTOR_ROW: usize = (SCAN + 1) * 4;

/// Shared memory of a block.
#[derive(Clone, Copy)]
struct Tiles {
    /// \[16, D + PAD\].
    queries: Shared<bf16>,
    /// \[SPAN, D + PAD\].
    keys: Shared<bf16>,
    /// \[D, SPAN + PAD\].
    values: Shared<bf16>,
    /// \[warps, 16\]: the largest score of a row among a warp's tokens.
    maxima: Shared<f32>,
    /// \[warps, 32, 4\]: each warp's probabilities as operands.
    pairs: Shared<u32>,
    /// How many blocks of the row and KV head had ended before this one.
    arrived: Shared<u32>,
    /// \[merged heads, SCAN + 1, 4\]: what a head's spans are rescaled by, and their sums.
    factors: Shared<f32>,
}

/// Where the partials of a span are: `parts` spans of all rows and heads, first the outputs, then maximum and sum.
#[derive(Clone, Copy)]
struct Partials<'a> {
    memory: InOut<'a, f32>,
    width: usize,
    spans: usize,
    parts: usize,
}

impl Partials<'_> {
    fn output(&self, part: usize, column: usize) -> usize {
        part * self.width + column
    }

    fn maximum_and_sum(&self, part: usize) -> usize {
        self.parts * self.width + part * 2
    }
}

/// One block: the `ratio` query heads that share a KV head, over one span. `STEPS` = D / 16; `OWN` = D / 32, the tiles of
/// 8 columns that a warp takes of the output; `SHARE` as in [`merge`].
#[inline(always)]
fn decode<const STEPS: usize, const OWN: usize, const SHARE: usize>(
    tiles: Tiles,
    q: In<f32>,
    key_pages: In<bf16>,
    value_pages: In<bf16>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    partials: InOut<f32>,
    counters: InOut<u32>,
    out: Out<bf16>,
    q_stride: u32,
    kv_heads: u32,
    ratio: u32,
    factor: f32,
) {
    let width = STEPS * 16;
    let (key_row, value_row) = (width + PAD, SPAN + PAD);
    let (kv_heads, ratio) = (kv_heads as usize, ratio as usize);
    let thread = thread::thread_idx_x() as usize;
    let warp = thread::warp_id() as usize;
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let (span_index, kv_head, row) =
        (thread::block_idx_x() as usize, thread::block_idx_y() as usize, thread::block_idx_z() as usize);
    thread::allow_successor();

    let position = positions.get(row);
    let spans = position as usize / SPAN + 1;
    if position == NO_ROW || span_index >= spans {
        if span_index == 0 {
            // A launch must not end before the one ahead of it, or what follows would not wait for that one.
            thread::wait_for_predecessors();
        }
        return;
    }
    let page = page_tables.get(row_tables.get(row) as usize + span_index) as usize;
    let page_start = (page * kv_heads + kv_head) * SPAN * width;
    key_pages.check(page_start, SPAN * width);
    value_pages.check(page_start, SPAN * width);

    // Tokens of the span that earlier steps wrote, and then the row's own where this is the last span. The others become
    // zeros: memory that nobody wrote is not read.
    let context = position as usize - span_index * SPAN;
    let (old, present) = if context < SPAN { (context, context + 1) } else { (SPAN, SPAN) };
    for i in 0..SPAN * width / 8 / THREADS {
        let chunk = thread + i * THREADS;
        let token = chunk / (width / 8);
        let to = token * key_row + chunk % (width / 8) * 8;
        if token < old {
            // SAFETY: chunk < SPAN * width / 8, and the page was checked above; both sides are multiples of 16 bytes.
            unsafe { cp_async::copy_unchecked::<_, 8>(&tiles.keys, to, &key_pages, page_start + chunk * 8) };
        } else if token > old {
            tiles.keys.store(to, [bf16::ZERO; 8]);
        }
    }
    for i in 0..SPAN * width / 8 / THREADS {
        let chunk = thread + i * THREADS;
        let token = chunk % (SPAN / 8) * 8;
        let to = chunk / (SPAN / 8) * value_row + token;
        if token + 8 <= old {
            // SAFETY: as above.
            unsafe { cp_async::copy_unchecked::<_, 8>(&tiles.values, to, &value_pages, page_start + chunk * 8) };
        } else if token > old {
            tiles.values.store(to, [bf16::ZERO; 8]);
        }
    }

    thread::wait_for_predecessors();
    if old < SPAN {
        if thread < width / 8 {
            let from = page_start + old * width + thread * 8;
            // SAFETY: old < SPAN, as above.
            unsafe { cp_async::copy_unchecked::<_, 8>(&tiles.keys, old * key_row + thread * 8, &key_pages, from) };
        }
        if thread < width {
            let first = old / 8 * 8;
            let mut tokens = [bf16::ZERO; 8];
            for i in 0..8 {
                if first + i < present {
                    // SAFETY: thread < width and the token is in the span; the page was checked above.
                    tokens[i] = unsafe { value_pages.get_unchecked(page_start + thread * SPAN + first + i) };
                }
            }
            tiles.values.store(thread * value_row + first, tokens);
        }
    }
    for i in 0..MAX_RATIO * width / 4 / THREADS {
        let chunk = thread + i * THREADS;
        let (head, column) = (chunk / (width / 4), chunk % (width / 4) * 4);
        let mut values = [bf16::ZERO; 4];
        if head < ratio {
            let from = row * q_stride as usize + (kv_head * ratio + head) * width + column;
            values = q.load::<4>(from).map(f32_to_bf16);
        }
        tiles.queries.store(head * key_row + column, values);
    }
    cp_async::commit_group();
    cp_async::wait_group::<0>();
    thread::sync_threads();

    let queries = mma::ReadA::new(&tiles.queries, 0, key_row);
    let keys = mma::ReadBColumns::new(&tiles.keys, warp * 16 * key_row, key_row);
    let [mut tile] = scores::<STEPS, 2, 1>(|_, s| queries.load(s * 16), |_, s| keys.load(s * 16));
    let visible = present.saturating_sub(warp * 16) as u32;
    scale(&mut tile, factor, Some([visible; 2]));
    let own = maximum(&tile);
    if t == 0 {
        tiles.maxima.set(warp * 16 + g, own[0]);
        tiles.maxima.set(warp * 16 + g + 8, own[1]);
    }
    thread::sync_threads();
    let mut max = [f32::NEG_INFINITY; 2];
    for other in 0..WARPS {
        max[0] = max[0].max(tiles.maxima.get(other * 16 + g));
        max[1] = max[1].max(tiles.maxima.get(other * 16 + g + 8));
    }
    let [low, high] = probabilities(&tile, max);
    tiles.pairs.store(thread * 4, [low[0], low[1], high[0], high[1]]);
    thread::sync_threads();
    let mut pairs = [[0u32; 2]; TOKEN_TILES];
    for s in 0..TOKEN_STEPS {
        let [low0, low1, high0, high1] = tiles.pairs.load((s * 32 + thread % 32) * 4);
        pairs[2 * s] = [low0, low1];
        pairs[2 * s + 1] = [high0, high1];
    }
    // Every warp could, but only those that use it do.
    let span_sum = if spans == 1 || warp == 0 { sum(&pairs) } else { [0.0; 2] };

    let heads = kv_heads * ratio;
    let first_head = row * heads + kv_head * ratio;
    let memory = Partials {
        memory: partials,
        width,
        spans: thread::grid_dim_x() as usize,
        parts: positions.len() * heads * thread::grid_dim_x() as usize,
    };
    // The only span of a context is merged with nothing, here.
    let (mut rescale, mut inverse) = ([Rescale { before: 1.0, span: 0.0 }; 2], [0.0; 2]);
    if spans == 1 {
        for half in 0..2 {
            let mut merged = Merged::EMPTY;
            rescale[half] = merged.add(max[half], span_sum[half]);
            inverse[half] = 1.0 / merged.sum;
        }
    }
    let values = mma::ReadBSteps::new(&tiles.values, warp * OWN * 8 * value_row, value_row);
    for n in 0..OWN {
        let column = (warp * OWN + n) * 8;
        let [first, second] = values.load(n * 8 * value_row);
        let [third, fourth] = values.load(n * 8 * value_row + 32);
        let part = output(&pairs, [first, second, third, fourth]);
        for half in 0..2 {
            let head = g + half * 8;
            if head < ratio {
                let values = [part[half * 2], part[half * 2 + 1]];
                let column = column + t * 2;
                if spans == 1 {
                    let values = values.map(|value| f32_to_bf16(combine(rescale[half], 0.0, value) * inverse[half]));
                    out.store((first_head + head) * width + column, values);
                } else {
                    let part = (first_head + head) * memory.spans + span_index;
                    partials.store(memory.output(part, column), values);
                }
            }
        }
    }
    if spans == 1 {
        return;
    }
    for half in 0..2 {
        let head = g + half * 8;
        if warp == 0 && t == 0 && head < ratio {
            let part = (first_head + head) * memory.spans + span_index;
            partials.store(memory.maximum_and_sum(part), [max[half], span_sum[half]]);
        }
    }
    thread::sync_threads();
    if thread == 0 {
        tiles.arrived.set(0, counters.arrive(row * kv_heads + kv_head, spans as u32 - 1));
    }
    thread::sync_threads();
    if tiles.arrived.get(0) as usize == spans - 1 {
        merge::<SHARE>(memory, tiles.factors, out, first_head, ratio, spans);
    }
}

/// Merges the spans of `ratio` heads from `first_head` on, in order. Of [`SCAN`] spans at a time the factors are computed in
/// parallel over heads and spans (a running maximum is the same in any order), then the sums in parallel over heads and
/// columns. The outputs of [`AHEAD`] spans are always under way: what bounds it is the way from the cache into one
/// multiprocessor. `SHARE` heads are a warp's, for the factors.
#[inline(always)]
fn merge<const SHARE: usize>(
    partials: Partials,
    factors: Shared<f32>,
    out: Out<bf16>,
    first_head: usize,
    ratio: usize,
    spans: usize,
) {
    let (width, heads) = (partials.width, merged_heads(partials.width));
    let thread = thread::thread_idx_x() as usize;
    let (warp, lane) = (thread::warp_id() as usize, thread::lane_id() as usize);
    let (summed, column) = (thread / (width / 4), thread % (width / 4) * 4);
    let mut done = 0;
    while done < ratio {
        let left = if ratio - done < heads { ratio - done } else { heads };
        // Threads without a head of their own read along with the last one's, and write nothing.
        let summed_head = if summed < left { summed } else { left - 1 };
        let summed_part = (first_head + done + summed_head) * partials.spans;
        let outputs = partials.output(summed_part, column);
        partials.memory.check(partials.output(summed_part, 0), spans * width);
        // SAFETY: for a span below `spans`: checked above, and column + 4 <= width; 4 columns are 16 bytes.
        let load = |span: usize| unsafe { partials.memory.load_unchecked::<4>(outputs + span * width) };
        let mut ahead = [[0.0f32; 4]; AHEAD];
        for i in 0..AHEAD {
            if i < spans {
                ahead[i] = load(i);
            }
        }
        let mut before = [f32::NEG_INFINITY; SHARE];
        let mut sums = Sums { sum: 0.0, values: [0.0; 4] };
        let mut first = 0;
        while first < spans {
            let mut statistics = [[[f32::NEG_INFINITY, 0.0]; SCAN / 32]; SHARE];
            for share in 0..SHARE {
                let head = warp + share * WARPS;
                for turn in 0..SCAN / 32 {
                    let span = first + turn * 32 + lane;
                    if head < left && span < spans {
                        let part = (first_head + done + head) * partials.spans + span;
                        statistics[share][turn] = partials.memory.load(partials.maximum_and_sum(part));
                    }
                }
            }
            for share in 0..SHARE {
                let head = warp + share * WARPS;
                for turn in 0..SCAN / 32 {
                    let [max, span_sum] = statistics[share][turn];
                    let mut common = before[share].max(max);
                    let mut distance = 1;
                    while distance < 32 {
                        let earlier = warp::shuffle_f32(common, (lane as u32).wrapping_sub(distance as u32));
                        if lane >= distance {
                            common = common.max(earlier);
                        }
                        distance *= 2;
                    }
                    let previous = warp::shuffle_f32(common, (lane as u32).wrapping_sub(1));
                    let rescale = Rescale::new(if lane == 0 { before[share] } else { previous }, max, common);
                    before[share] = warp::shuffle_f32(common, 31);
                    if head < left {
                        let to = head * FACTOR_ROW + (turn * 32 + lane) * 4;
                        factors.store(to, [rescale.before, rescale.span, span_sum, 0.0]);
                    }
                }
            }
            thread::sync_threads();
            let end = if spans < first + SCAN { spans } else { first + SCAN };
            let mut base = first;
            while base < end {
                let from = summed_head * FACTOR_ROW + (base - first) * 4;
                if base + 2 * AHEAD <= spans {
                    for i in 0..AHEAD {
                        sums.add(factors.load(from + i * 4), ahead[i]);
                        ahead[i] = load(base + AHEAD + i);
                    }
                } else {
                    for i in 0..AHEAD {
                        if base + i < spans {
                            sums.add(factors.load(from + i * 4), ahead[i]);
                        }
                        if base + AHEAD + i < spans {
                            ahead[i] = load(base + AHEAD + i);
                        }
                    }
                }
                base += AHEAD;
            }
            first += SCAN;
            if first < spans || done + heads < ratio {
                thread::sync_threads();
            }
        }
        if summed < left {
            let inverse = 1.0 / sums.sum;
            let values = sums.values.map(|value| f32_to_bf16(value * inverse));
            out.store((first_head + done + summed) * width + column, values);
        }
        done += heads;
    }
}

/// What is merged so far of a head: its sum, and four columns.
struct Sums {
    sum: f32,
    values: [f32; 4],
}

impl Sums {
    /// Merges a span, whose factors and sum these are.
    #[inline(always)]
    fn add(&mut self, [before, span, span_sum, _]: [f32; 4], output: [f32; 4]) {
        let rescale = Rescale { before, span };
        self.sum = combine(rescale, self.sum, span_sum);
        for column in 0..4 {
            self.values[column] = combine(rescale, self.values[column], output[column]);
        }
    }
}

macro_rules! decode_kernel {
    ($name:ident, $width:literal) => {
        /// Attention of one token per row over its context, for every KV head: see [`crate::attention`].
        ///
        /// - `q`: f32 \[T, q_stride\], query heads from column 0 on, rounded to bf16 here; pages as in
        ///   [`crate::kv_write`]; `positions`: u32 \[T\], the position of each row's token, whose key and value are in the
        ///   cache, or [`NO_ROW`]; `partials`: f32, D + 2 for each row, query head and block in x, scratch; `counters`: u32
        ///   \[T, G\], 0 before and after; `out`: bf16 \[T, H, D\].
        /// - grid (spans, G, T); a block takes the query heads of a KV head over a span. The last of a row's blocks to end
        ///   merges its spans in order. Blocks beyond a row's context, and all of a row [`NO_ROW`], do nothing.
        /// - bytes: 4 D per token and KV head.
        /// - the caller: `ratio` = H / G is at most 16; the grid has a block for each span of the longest context; `q` and
        ///   pages are multiples of 16 bytes. Read before the kernels ahead have ended: `positions`, the tables, and the
        ///   pages' tokens before a row's own, so no kernel that may still run writes these.
        #[kernel(block = 128, min_blocks = 3)]
        pub fn $name(
            q: In<f32>,
            key_pages: In<bf16>,
            value_pages: In<bf16>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            partials: InOut<f32>,
            counters: InOut<u32>,
            out: Out<bf16>,
            q_stride: u32,
            kv_heads: u32,
            ratio: u32,
            scale: f32,
        ) {
            let tiles = Tiles {
                queries: shared_array!(bf16, MAX_RATIO * ($width + PAD)),
                keys: shared_array!(bf16, SPAN * ($width + PAD)),
                values: shared_array!(bf16, $width * (SPAN + PAD)),
                maxima: shared_array!(f32, WARPS * MAX_RATIO),
                pairs: shared_array!(u32, THREADS * 4),
                arrived: shared_array!(u32, 1),
                factors: shared_array!(f32, merged_heads($width) * FACTOR_ROW),
            };
            decode::<{ $width / 16 }, { $width / 32 }, { merged_heads($width).div_ceil(WARPS) }>(
                tiles,
                q,
                key_pages,
                value_pages,
                positions,
                row_tables,
                page_tables,
                partials,
                counters,
                out,
                q_stride,
                kv_heads,
                ratio,
                scale,
            );
        }
    };
}
decode_kernel!(attention_decode_32, 32);
decode_kernel!(attention_decode_64, 64);
decode_kernel!(attention_decode_96, 96);
decode_kernel!(attention_decode_128, 128);
