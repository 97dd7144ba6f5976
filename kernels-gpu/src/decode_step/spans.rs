//! Attention of long contexts, whose spans are shared among all blocks: a block computes a span of a KV head, and puts what it found
//! into tagged words as soon as the layer's queries are there; blocks that each have some columns of a query head merge the spans.
//!
//! Keys and values come through the ring, as weights do: all but the newest token's are old, so they are there before the queries.
//! A span is a task for four warps, as in [`crate::attention_decode`]: each scores 16 tokens and weighs a quarter of the columns.

use cuda_std::bulk;
use cuda_std::prelude::*;

use super::lookup::Phase;
use super::plan::{Linear, REPLICAS};
use super::{Step, THREADS, lane_and_warp, sync};
use crate::attention::{
    PAD, Rescale, SPAN, TOKEN_STEPS, TOKEN_TILES, combine, maximum, output, probabilities_of, scale, scores, sum,
};
use crate::attention_decode::MAX_RATIO;
use crate::attention_decode_short::key_elements;
use crate::kv_write::PAGE;
use crate::weight_ring::Ring;

/// Columns of a query head that a block merges.
pub(super) const COLUMNS: u32 = 16;

/// Spans that it merges at once: one for each pair of lanes of a warp, which computes their factors.
pub(super) const AT_ONCE: usize = 64;

/// Spans whose partial results a thread that merges reads together.
const TOGETHER: usize = 16;
const _: () = assert!(AT_ONCE.is_multiple_of(TOGETHER));

/// Pairs of queries that a thread brings, at most.
const MOST_PAIRS: usize = 3;

/// The same, of heads of 16 times `steps` elements.
const fn pairs_of(steps: usize) -> usize {
    (MAX_RATIO * steps * 8).div_ceil(THREADS as usize)
}

/// Warps that compute a span.
const WARPS: usize = TOKEN_STEPS;

/// Where a span's computation has its values in a block's scratch memory, in bytes: queries \[16, D + PAD\] first.
const MAXIMA: usize = MAX_RATIO * (64 + PAD) * 2;
const PAIRS: usize = MAXIMA + WARPS * MAX_RATIO * 4;
const SPAN_END: usize = PAIRS + WARPS * 32 * 4 * 4;

/// Where merging has: partial results \[`AT_ONCE`, `COLUMNS`\] first, then factors \[`AT_ONCE`, 4\].
const FACTORS: usize = AT_ONCE * COLUMNS as usize * 4;
const MERGE_END: usize = FACTORS + AT_ONCE * 4 * 4;

/// Bytes of scratch memory. Merging and computing a span take turns in it.
pub(super) const SCRATCH_BYTES: usize = if SPAN_END > MERGE_END { SPAN_END } else { MERGE_END }.next_multiple_of(128);

/// A block's tasks: pairs of a KV head and a span, dealt round the blocks from the last one on.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    /// The first, or the one that comes next.
    pub(super) task: u32,
    end: u32,
    kv_heads: u32,
}

impl Tasks {
    #[inline(always)]
    pub(super) fn new(kv_heads: u32, spans: u32) -> Self {
        Self { task: thread::grid_dim_x() - 1 - thread::block_idx_x(), end: kv_heads * spans, kv_heads }
    }

    #[inline(always)]
    pub(super) fn left(self) -> bool {
        self.task < self.end
    }

    #[inline(always)]
    pub(super) fn kv_head(self) -> u32 {
        self.task % self.kv_heads
    }

    #[inline(always)]
    pub(super) fn span(self) -> u32 {
        self.task / self.kv_heads
    }

    /// So many further.
    #[inline(always)]
    pub(super) fn after(self, turns: u32) -> Self {
        Self { task: self.task + turns * thread::grid_dim_x(), ..self }
    }
}

/// Spans of a context.
#[inline(always)]
pub(super) fn spans(step: &Step<'_>, position: u32) -> u32 {
    let spans = position / PAGE as u32 + 1;
    // Never beyond the words, whatever the position is.
    if spans < step.most_spans { spans } else { step.most_spans }
}

/// The phase: the block's spans, then the columns that it merges. Returns how many units it took, and whether it had any part.
/// `STEPS` = D / 16; `OWN` = D / 32, tiles of 8 columns of a warp. `busy`: the block took part in QKV.
#[inline(always)]
pub(super) fn attention<const STEPS: usize, const OWN: usize>(
    step: &Step<'_>,
    ring: Ring,
    layer: u32,
    unit: u32,
    busy: bool,
) -> (u32, bool) {
    let [position, ..] = step.token();
    let spans = spans(step, position);
    let tasks = Tasks::new(step.shape.kv_heads, spans);
    if !busy && tasks.left() {
        // As in `bring_inputs`: who is early waits for what the phase before starts from.
        let [early, lag] = Phase::read(step.memory, Linear::Qkv).from;
        wait_for_one(step, early, step.layer_tag(layer) - lag);
    }
    // The KV head whose queries are in scratch memory.
    let mut held = u32::MAX;
    let mut turns = 0;
    while tasks.after(turns).left() {
        let task = tasks.after(turns);
        let kv_head = task.kv_head();
        let known = held == kv_head;
        span::<STEPS, OWN>(step, ring, layer, [kv_head, task.span(), position], unit + turns, known);
        (held, turns) = (kv_head, turns + 1);
    }
    let items = step.shape.query_width() / COLUMNS;
    let mut item = thread::block_idx_x();
    let merges = item < items;
    if turns == 0 && merges {
        let words = step.shape.words();
        let replica = thread::block_idx_x() % REPLICAS * words.replica;
        wait_for_one(step, words.qkv + replica, step.layer_tag(layer));
    }
    while item < items {
        merge(step, layer, item, spans);
        item += thread::grid_dim_x();
    }
    (turns, turns > 0 || merges)
}

/// Waits for a word, by one warp.
#[inline(always)]
fn wait_for_one(step: &Step<'_>, word: u32, tag: u32) {
    if lane_and_warp().1 == 0 {
        // SAFETY: a word of a phase (the caller's).
        let _ = unsafe { step.words.wait(word, tag) };
    }
    sync();
}

/// The query heads of a KV head over one span, whose keys and values are a unit. `known`: the queries are in
/// scratch memory.
#[inline(always)]
fn span<const STEPS: usize, const OWN: usize>(
    step: &Step<'_>,
    ring: Ring,
    layer: u32,
    [kv_head, span, position]: [u32; 3],
    unit: u32,
    known: bool,
) {
    const { assert!(pairs_of(STEPS) <= MOST_PAIRS) };
    let shape = step.shape;
    let width = STEPS as u32 * 16;
    let (key_row, value_row) = (STEPS * 16 + PAD, SPAN + PAD);
    let words = shape.words();
    let tag = step.layer_tag(layer);
    let ratio = shape.heads / shape.kv_heads;
    let thread = thread::thread_idx_x_anew();
    let context = position - span * SPAN as u32;
    let has_newest = context < SPAN as u32;
    let scratch = step.scratch();

    let at = ring.wait(unit) as usize;
    let keys: Shared<bf16> = step.memory.part(at, key_elements(STEPS * 16));
    let values: Shared<bf16> = step.memory.part(at + key_elements(STEPS * 16) * 2, STEPS * 16 * value_row);
    if has_newest {
        // Values that nobody wrote become zeros. (Scores of such keys count for nothing.)
        let mut chunk = thread;
        while chunk < width * (SPAN as u32 / 8) {
            let (column, token) = (chunk / (SPAN as u32 / 8), chunk % (SPAN as u32 / 8) * 8);
            let to = column as usize * value_row + token as usize;
            if token > context {
                values.store(to, [bf16::ZERO; 8]);
            } else if token + 8 > context {
                for i in 1..8 {
                    if token + i > context {
                        values.set(to + i as usize, bf16::ZERO);
                    }
                }
            }
            chunk += THREADS;
        }
    }

    if !known || has_newest {
        // Queries, and the newest token's key and values, everything at once.
        let from = words.qkv + thread::block_idx_x() % REPLICAS * words.replica;
        let first_query = from + kv_head * ratio * width;
        let first_key = from + (shape.heads + kv_head) * width;
        let total = ratio * width / 2;
        let newest = if thread < width / 2 { thread * 2 } else { (shape.kv_heads - 1) * width + thread * 2 };
        let (pairs, new) = step.words.gather(tag, |words| {
            let mut pairs = [[0; 2]; MOST_PAIRS];
            for i in 0..pairs_of(STEPS) {
                let place = thread + i as u32 * THREADS;
                // SAFETY: words of the token's queries, which start evenly.
                pairs[i] = unsafe { words.pair(first_query + place * 2, place < total) };
            }
            // SAFETY: words of the token's keys, and behind those of all KV heads of its values.
            (pairs, unsafe { words.pair(first_key + newest, has_newest && thread < width) })
        });
        let queries: Shared<u32> = scratch.part(0, MAX_RATIO * key_row / 2);
        for i in 0..pairs_of(STEPS) {
            let place = thread + i as u32 * THREADS;
            if place < total {
                let [low, high] = pairs[i].map(f32::from_bits);
                let (row, column) = (place / (width / 2), place % (width / 2));
                queries.set(row as usize * key_row / 2 + column as usize, bf16_pair(low, high));
            }
        }
        if has_newest && thread < width {
            let [first, second] = new.map(|bits| bf16::from_bits(bits as u16));
            if thread < width / 2 {
                keys.store(context as usize * key_row + thread as usize * 2, [first, second]);
            } else {
                let column = (thread - width / 2) as usize * 2;
                values.set(column * value_row + context as usize, first);
                values.set((column + 1) * value_row + context as usize, second);
            }
        }
    }
    sync();

    let (lane, warp) = lane_and_warp();
    if warp < WARPS as u32 {
        let (g, t) = (lane / 4, lane % 4);
        let warp = warp as usize;
        let some = || thread::sync_some::<2, { WARPS as u32 * 32 }>();
        let queries: Shared<bf16> = scratch.part(0, MAX_RATIO * key_row);
        let queries = mma::ReadA::new(&queries, 0, key_row);
        let tokens = mma::ReadBColumns::new(&keys, warp * 16 * key_row, key_row);
        let [mut tile] = scores::<STEPS, 2, 1>(|_, s| queries.load(s * 16), |_, s| tokens.load(s * 16));
        let columns = mma::ReadBSteps::new(&values, warp * OWN * 8 * value_row, value_row);
        let mut operands = [[[0u32; 2]; TOKEN_STEPS]; OWN];
        for n in 0..OWN {
            let [first, second] = columns.load(n * 8 * value_row);
            let [third, fourth] = columns.load(n * 8 * value_row + SPAN / 2);
            operands[n] = [first, second, third, fourth];
        }
        let present = if has_newest { context + 1 } else { SPAN as u32 };
        scale(&mut tile, step.scale, Some([present.saturating_sub(warp as u32 * 16); 2]));
        let own = maximum(&tile);
        let maxima: Shared<f32> = scratch.part(MAXIMA, WARPS * MAX_RATIO);
        if t == 0 {
            maxima.set(warp * MAX_RATIO + g as usize, own[0]);
            maxima.set(warp * MAX_RATIO + g as usize + 8, own[1]);
        }
        some();
        let mut max = [f32::NEG_INFINITY; 2];
        for other in 0..WARPS {
            max[0] = max[0].max(maxima.get(other * MAX_RATIO + g as usize));
            max[1] = max[1].max(maxima.get(other * MAX_RATIO + g as usize + 8));
        }
        let [low, high] = probabilities_of(&tile, max, ratio as usize);
        let exchanged: Shared<u32> = scratch.part(PAIRS, WARPS * 32 * 4);
        exchanged.store((warp * 32 + lane as usize) * 4, [low[0], low[1], high[0], high[1]]);
        some();
        let mut pairs = [[0u32; 2]; TOKEN_TILES];
        for s in 0..TOKEN_STEPS {
            let [low0, low1, high0, high1] = exchanged.load((s * 32 + lane as usize) * 4);
            pairs[2 * s] = [low0, low1];
            pairs[2 * s + 1] = [high0, high1];
        }
        let partials = shape.partials(step.most_spans);
        for n in 0..OWN {
            let part = output(&pairs, operands[n]);
            let column = (warp * OWN + n) as u32 * 8;
            for half in 0..2 {
                let head = g + half * 8;
                if head < ratio {
                    let item = (kv_head * ratio + head) * (width / COLUMNS) + column / COLUMNS;
                    let to = partials.outputs + (item * step.most_spans + span) * COLUMNS + column % COLUMNS + t * 2;
                    let half = half as usize * 2;
                    // SAFETY: words of the span's partial results.
                    unsafe { step.words.store_pair(to, [part[half].to_bits(), part[half + 1].to_bits()], tag) };
                }
            }
        }
        if warp == 0 {
            let span_sum = sum(&pairs);
            for half in 0..2 {
                let head = g + half * 8;
                if t == 0 && head < ratio {
                    let to = partials.statistics + ((kv_head * ratio + head) * step.most_spans + span) * 2;
                    let half = half as usize;
                    // SAFETY: as above.
                    unsafe { step.words.store_pair(to, [max[half].to_bits(), span_sum[half].to_bits()], tag) };
                }
            }
            if kv_head == 0 && span == 0 && lane < REPLICAS {
                // SAFETY: a word for each replica.
                unsafe { step.words.store(partials.started + lane * 16, 0, tag) };
            }
        }
    }
    if has_newest {
        bulk::release_to_copies();
    }
    sync();
    if thread::thread_idx_x() == 0 {
        ring.free(unit);
    }
}

/// Merges [`COLUMNS`] columns of a query head over all spans, from the first to the last.
#[inline(always)]
fn merge(step: &Step<'_>, layer: u32, item: u32, spans: u32) {
    let shape = step.shape;
    let tag = step.layer_tag(layer);
    let partials = shape.partials(step.most_spans);
    let head = item / (shape.head_width / COLUMNS);
    let outputs = partials.outputs + item * step.most_spans * COLUMNS;
    let statistics = partials.statistics + head * step.most_spans * 2;
    let scratch = step.scratch();
    let parts: Shared<f32> = scratch.part(0, AT_ONCE * COLUMNS as usize);
    let factors: Shared<f32> = scratch.part(FACTORS, AT_ONCE * 4);
    let (lane, warp) = lane_and_warp();
    let mut before = f32::NEG_INFINITY;
    let (mut span_sums, mut values) = (0.0f32, [0.0f32; 2]);
    let mut first = 0;
    while first < spans {
        if first > 0 || item >= thread::grid_dim_x() {
            // What was merged before has been read.
            sync();
        }
        match warp {
            0..4 => {
                const PAIRS: u32 = COLUMNS / 2;
                let place = |i: usize| {
                    let place = warp * 32 + lane + i as u32 * 128;
                    (place / PAIRS, place % PAIRS * 2)
                };
                let found = step.words.gather(tag, |words| {
                    let mut found = [[0; 2]; 4];
                    for i in 0..4 {
                        let (span, column) = place(i);
                        // SAFETY: words of a span's partial results, where it is one of the context's.
                        found[i] =
                            unsafe { words.pair(outputs + (first + span) * COLUMNS + column, first + span < spans) };
                    }
                    found
                });
                for i in 0..4 {
                    let (span, column) = place(i);
                    let found = if first + span < spans { found[i] } else { [0; 2] };
                    parts.store((span * COLUMNS + column) as usize, found.map(f32::from_bits));
                }
            }
            4 => {
                let found = step.words.gather(tag, |words| {
                    let mut found = [[0; 2]; 2];
                    for turn in 0..2 {
                        let span = first + turn as u32 * 32 + lane;
                        // SAFETY: as above.
                        found[turn] = unsafe { words.pair(statistics + span * 2, span < spans) };
                    }
                    found
                });
                // A span that is not there changes nothing.
                let mut common = [f32::NEG_INFINITY; 2];
                let mut sums = [0.0f32; 2];
                for turn in 0..2 {
                    if first + turn as u32 * 32 + lane < spans {
                        [common[turn], sums[turn]] = found[turn].map(f32::from_bits);
                    }
                }
                let max = common;
                let mut distance = 1;
                while distance < 32 {
                    for turn in 0..2 {
                        let earlier = warp::shuffle_f32(common[turn], lane.wrapping_sub(distance));
                        if lane >= distance {
                            common[turn] = common[turn].max(earlier);
                        }
                    }
                    distance *= 2;
                }
                for turn in 0..2 {
                    let earlier = warp::shuffle_f32(common[turn], lane.wrapping_sub(1));
                    let previous = if lane == 0 { before } else { before.max(earlier) };
                    let rescale = Rescale::new(previous, max[turn], before.max(common[turn]));
                    before = before.max(warp::shuffle_f32(common[turn], 31));
                    let to = (turn * 32 + lane as usize) * 4;
                    factors.store(to, [rescale.before, rescale.span, sums[turn], 0.0]);
                }
            }
            _ => {}
        }
        sync();
        if warp == 0 {
            let left = if spans - first < AT_ONCE as u32 { spans - first } else { AT_ONCE as u32 };
            let column = (lane / REPLICAS * 2) as usize;
            let mut base = 0;
            while base < left as usize {
                let mut read = [([0.0f32; 4], [0.0f32; 2]); TOGETHER];
                for i in 0..TOGETHER {
                    let at = base + i;
                    read[i] = (factors.load(at * 4), parts.load(at * COLUMNS as usize + column));
                }
                for i in 0..TOGETHER {
                    let ([before, span, span_sum, _], part) = read[i];
                    let rescale = Rescale { before, span };
                    span_sums = combine(rescale, span_sums, span_sum);
                    values[0] = combine(rescale, values[0], part[0]);
                    values[1] = combine(rescale, values[1], part[1]);
                }
                base += TOGETHER;
            }
        }
        first += AT_ONCE as u32;
    }
    if warp == 0 {
        const { assert!(COLUMNS / 2 * REPLICAS == 32) };
        let words = shape.words();
        let inverse = 1.0 / span_sums;
        let pair = bf16_pair(values[0] * inverse, values[1] * inverse);
        let to = words.attended + item * (COLUMNS / 2) + lane / REPLICAS + lane % REPLICAS * words.replica;
        // SAFETY: a word of the row's attended values in the lane's replica.
        unsafe { step.words.store(to, pair, tag) };
    }
}
