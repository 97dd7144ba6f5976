//! Linear layers of few tokens (at most [`FEW`]), fused with what stands before and after them: a decode step of a small
//! batch, which is bound by reading each weight once.
//!
//! The bits are those of the separate operations: the same k16 chain as [`crate::linear`], the same reduction tree as
//! [`crate::rms_norm`], the same arithmetic and rounding around them. Only where values wait between the operations differs
//! (in registers and shared memory instead of device memory).
//!
//! A warp owns strips of 16 outputs and streams their weights through a ring in shared memory with asynchronous copies.
//! Weights depend on no other kernel, so the ring is filled before the kernel waits for its predecessors (programmatic
//! dependent launch), and each kernel asks for the weights of a later one (`ahead`) to be brought into the second-level
//! cache: memory does not rest while kernels wait for each other.

use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

use crate::kv_write::PAGE;
use crate::rank;
use crate::rms_norm::REDUCTION_LANES;
use crate::silu_mul::gated;

/// Most tokens: the columns of one tensor-core product.
pub const FEW: usize = 8;

/// Inputs (k) of a stage of the ring: 128 bytes of a weight's row. K is a multiple of it.
pub const STAGE: usize = 64;

/// Elements after each row in shared memory: 16 bytes put the eight rows that a fragment reads into different banks.
const PAD: usize = 8;

/// Elements of a row of a stage.
const ROW: usize = STAGE + PAD;

/// Bytes of shared memory in front of the rings: a row of bf16 for each token.
#[must_use]
pub const fn input_bytes(tokens: usize, width: usize) -> usize {
    (tokens * (width + PAD) * 2).next_multiple_of(128)
}

/// Bytes of the rings of a block.
#[must_use]
pub const fn ring_bytes(layout: Layout) -> usize {
    layout.warps * layout.depth * 16 * ROW * 2
}

/// How a kernel's block is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Warps that compute chains.
    pub warps: usize,
    /// Stages of a warp's ring.
    pub depth: usize,
}

/// Of [`few_qkv()`] and [`few_qkv_wide()`].
pub const QKV: Layout = Layout { warps: 2, depth: 16 };
/// Of [`few_gate_up()`] and [`few_gate_up_wide()`]: small models have a block for each multiprocessor of a large GPU, with
/// room beside it for the kernel before and the kernel after.
pub const GATE_UP: Layout = Layout { warps: 5, depth: 12 };
/// Of the residual kernels, by the segments of K.
#[must_use]
pub const fn residual_layout(segments: usize) -> Layout {
    Layout { warps: segments, depth: if segments == 4 { 8 } else { 16 } }
}
/// Of [`few_logits()`].
pub const LOGITS: Layout = Layout { warps: 4, depth: 8 };

/// Most tokens for which a block of [`few_qkv()`] or [`few_gate_up()`] has no warps but those of the chains. The `wide` kernels
/// have a warp for each token, to normalise all of them at once.
pub const NARROW: usize = 2;

/// Elements that a thread asks for at once: 4 KiB.
const AHEAD: usize = 2048;

/// Asks for all of `ahead` to be in the second-level cache soon. The threads of the grid share the work.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn ask_ahead(ahead: In<bf16>) {
    let threads = (thread::grid_dim_x() * thread::block_dim_x()) as usize;
    let mut first = thread::index_1d() as usize * AHEAD;
    while first < ahead.len() {
        let left = ahead.len() - first;
        ahead.prefetch(first, if left < AHEAD { left } else { AHEAD });
        first += threads * AHEAD;
    }
}

/// What a block has in shared memory: the tokens' inputs, then a ring for each warp.
#[derive(Clone, Copy)]
struct Arena {
    input: Shared<bf16>,
    ring: Shared<bf16>,
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn arena(tokens: usize, width: usize, layout: Layout) -> Arena {
    let start = input_bytes(tokens, width);
    Arena { input: shared::dynamic(0, tokens * (width + PAD)), ring: shared::dynamic(start, ring_bytes(layout) / 2) }
}

/// The strips of a warp: `first`, `first + step`, ... below `end`.
#[derive(Clone, Copy)]
struct Strips {
    first: usize,
    step: usize,
    end: usize,
}

/// The segment of k that a warp computes.
#[derive(Clone, Copy)]
struct Segment {
    first: usize,
    width: usize,
}

/// Stages that are waited for, and whose room is filled again, at once.
const CHUNK: usize = 4;

/// The operands of a stage.
#[derive(Clone, Copy)]
struct Fragments {
    weight: [[u32; 4]; STAGE / 16],
    input: [[u32; 2]; STAGE / 16],
}

/// Where the lane's eight elements of each fourth row of a strip start.
#[inline(always)]
fn sources(first_row: impl Fn(usize) -> usize, last_row: usize, width: usize, first: usize) -> [usize; 4] {
    let lane = thread::lane_id() as usize;
    let mut from = [0; 4];
    for part in 0..4 {
        let row = first_row(part / 2) + part % 2 * 4 + lane / 8;
        from[part] = (if row < last_row { row } else { last_row }) * width + first + lane % 8 * 8;
    }
    from
}

/// The chains of a warp's strips. A strip is 8 consecutive rows of the weight and 8 more; `first_row(strip, half)` is the
/// first of each (rows beyond the last repeat it). `inputs` waits for the predecessors and fills `arena.input`, for the whole
/// block, while the ring fills; what it returns goes to `finish`, which gets each strip's sums, in the fragment layout of a
/// product: row g of the first half, then of the second, tokens 2t and 2t + 1. A warp without strips only takes part in
/// `inputs`.
///
/// The ring has `DEPTH` stages in `DEPTH / CHUNK` chunks; `PENDING` is two chunks less. A product waits for the one before it
/// (some 35 cycles), so what else there is to do, reading the next operands and filling the ring, goes in between, and is
/// kept to few instructions.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn chains<const DEPTH: usize, const PENDING: usize, R>(
    weight: In<bf16>,
    arena: Arena,
    tokens: usize,
    width: usize,
    segment: Segment,
    strips: Strips,
    ahead: In<bf16>,
    first_row: impl Fn(usize, usize) -> usize,
    inputs: impl FnOnce() -> R,
    mut finish: impl FnMut(usize, [f32; 4], &R),
) {
    const { assert!(DEPTH.is_multiple_of(CHUNK) && (PENDING + 2) * CHUNK == DEPTH) };
    // Elements of a stage.
    const SLOT: usize = 16 * ROW;
    let lane = thread::lane_id() as usize;
    let ring_start = thread::warp_id() as usize * DEPTH * SLOT;
    let last_row = weight.len() / width - 1;
    let stages = (segment.width / STAGE) as u32;

    let target = ring_start + lane / 8 * ROW + lane % 8 * 8;
    let fill = |from: &[usize; 4], stage: u32, slot: u32| {
        let to = target + slot as usize * SLOT;
        for part in 0..4 {
            let from = from[part] + stage as usize * STAGE;
            // SAFETY: the row is one of the weight's, and the stage one of the segment's.
            unsafe { cp_async::copy_unchecked::<bf16, 8>(&arena.ring, to + part * 4 * ROW, &weight, from) };
        }
    };
    let next_chunk = |slot: u32| if slot + CHUNK as u32 == DEPTH as u32 { 0 } else { slot + CHUNK as u32 };

    // What is to be filled next: a chunk of a strip's stages, and where it goes.
    let (mut fill_strip, mut fill_stage, mut fill_slot) = (strips.first, 0u32, 0u32);
    let mut from = {
        let strip = if fill_strip < strips.end { fill_strip } else { 0 };
        sources(|part| first_row(strip, part), last_row, width, segment.first)
    };
    for _ in 0..DEPTH / CHUNK {
        if fill_strip < strips.end {
            for stage in 0..CHUNK as u32 {
                if fill_stage + stage < stages {
                    fill(&from, fill_stage + stage, fill_slot + stage);
                }
            }
            fill_slot = next_chunk(fill_slot);
            fill_stage += CHUNK as u32;
            if fill_stage >= stages {
                fill_stage = 0;
                fill_strip += strips.step;
                if fill_strip < strips.end {
                    from = sources(|part| first_row(fill_strip, part), last_row, width, segment.first);
                }
            }
        }
        cp_async::commit_group();
    }
    thread::allow_successor();
    ask_ahead(ahead);
    let ready = inputs();

    let fragments = |slot: u32, stage: u32| {
        let at = ring_start + slot as usize * SLOT;
        let k = segment.first + stage as usize * STAGE;
        let mut loaded = Fragments { weight: [[0; 4]; STAGE / 16], input: [[0; 2]; STAGE / 16] };
        for step in 0..STAGE / 16 {
            if step % 2 == 0 {
                let pair = mma::load_b_steps_of(&arena.input, k + step * 16, width + PAD, tokens);
                loaded.input[step] = pair[0];
                loaded.input[step + 1] = pair[1];
            }
            loaded.weight[step] = mma::load_a(&arena.ring, at + step * 16, ROW);
        }
        loaded
    };
    let mut slot = 0u32;
    let mut strip = strips.first;
    // The ring is full, and nothing of it has been read.
    let mut full = true;
    while strip < strips.end {
        let mut sums = [0.0f32; 4];
        let mut product = |operands: &Fragments| {
            for step in 0..STAGE / 16 {
                sums = mma::m16n8k16_bf16(operands.weight[step], operands.input[step], sums);
            }
        };
        let mut stage = 0u32;
        while stage < stages {
            // The chunk has landed for all lanes, and all have read the one before, whose room is filled again.
            cp_async::wait_group::<PENDING>();
            warp::sync_warp();
            let fills = !full && fill_strip < strips.end;
            if stage + CHUNK as u32 <= stages {
                let mut operands = fragments(slot, stage);
                for part in 0..CHUNK as u32 {
                    if fills && fill_stage + part < stages {
                        fill(&from, fill_stage + part, fill_slot + part);
                    }
                    let next =
                        if part + 1 < CHUNK as u32 { fragments(slot + part + 1, stage + part + 1) } else { operands };
                    product(&operands);
                    operands = next;
                }
            } else {
                for part in 0..CHUNK as u32 {
                    if fills && fill_stage + part < stages {
                        fill(&from, fill_stage + part, fill_slot + part);
                    }
                    if stage + part < stages {
                        product(&fragments(slot + part, stage + part));
                    }
                }
            }
            if !full {
                cp_async::commit_group();
            }
            full = false;
            slot = next_chunk(slot);
            stage += CHUNK as u32;
            if fills {
                fill_slot = next_chunk(fill_slot);
                fill_stage += CHUNK as u32;
                if fill_stage >= stages {
                    fill_stage = 0;
                    fill_strip += strips.step;
                    if fill_strip < strips.end {
                        from = sources(|part| first_row(fill_strip, part), last_row, width, segment.first);
                    }
                }
            }
        }
        finish(strip, sums, &ready);
        strip += strips.step;
    }
}

/// Eight consecutive elements of a row of the residual stream.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn eight(x: In<f32>, index: usize) -> [f32; 8] {
    let [a, b, c, d]: [f32; 4] = x.load(index);
    let [e, f, g, h]: [f32; 4] = x.load(index + 4);
    [a, b, c, d, e, f, g, h]
}

/// Waits for the predecessors and puts the normalised rows into shared memory: the arithmetic of [`crate::rms_norm`], a
/// row per warp, each lane in the place of four of its reduction's lanes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn normalised<const THREADS: usize>(
    input: &Shared<bf16>,
    x: In<f32>,
    gain: In<bf16>,
    tokens: usize,
    width: usize,
    eps: f32,
) {
    const PARTS: usize = REDUCTION_LANES / 32;
    const TURN: usize = REDUCTION_LANES * 8;
    let lane = thread::lane_id() as usize;
    // The first 1024 elements, which are all of a small model's, stay in registers between the two passes. The gains are
    // weights, and are read while the predecessors still run.
    let mut gains = [[bf16::ZERO; 8]; PARTS];
    for part in 0..PARTS {
        let column = (part * 32 + lane) * 8;
        if column < width {
            gains[part] = gain.load(column);
        }
    }
    thread::wait_for_predecessors();
    let mut token = thread::warp_id() as usize;
    while token < tokens {
        let row = token * width;
        let mut first = [[0.0f32; 8]; PARTS];
        for part in 0..PARTS {
            let column = (part * 32 + lane) * 8;
            if column < width {
                first[part] = eight(x, row + column);
            }
        }
        let mut sums = [0.0f32; PARTS];
        for part in 0..PARTS {
            for value in first[part] {
                sums[part] = math::fma(value, value, sums[part]);
            }
            let mut column = TURN + (part * 32 + lane) * 8;
            while column < width {
                for value in eight(x, row + column) {
                    sums[part] = math::fma(value, value, sums[part]);
                }
                column += TURN;
            }
        }
        for part in 0..PARTS {
            sums[part] = warp::sum_f32(sums[part]);
        }
        let [a, b, c, d] = sums;
        let scale = 1.0 / math::sqrt(((a + b) + (c + d)) / width as f32 + eps);
        let store = |column: usize, values: [f32; 8], gains: [bf16; 8]| {
            let mut normed = [bf16::ZERO; 8];
            for index in 0..8 {
                normed[index] = f32_to_bf16(values[index] * scale * bf16_to_f32(gains[index]));
            }
            input.store(token * (width + PAD) + column, normed);
        };
        for part in 0..PARTS {
            let mut column = (part * 32 + lane) * 8;
            if column < width {
                store(column, first[part], gains[part]);
            }
            column += TURN;
            while column < width {
                store(column, eight(x, row + column), gain.load(column));
                column += TURN;
            }
        }
        token += THREADS / 32;
    }
    thread::sync_threads();
}

/// Copies a segment of the rows of `x` into shared memory, for the calling warp, which does it alone.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn copied(input: &Shared<bf16>, x: In<bf16>, tokens: usize, width: usize, segment: Segment) {
    x.check(0, tokens * width);
    for token in 0..tokens {
        let mut column = segment.first + thread::lane_id() as usize * 8;
        while column < segment.first + segment.width {
            // SAFETY: checked above.
            unsafe {
                cp_async::copy_unchecked::<bf16, 8>(input, token * (width + PAD) + column, &x, token * width + column);
            }
            column += 32 * 8;
        }
    }
    cp_async::commit_group();
    cp_async::wait_group::<0>();
    warp::sync_warp();
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn qkv<const THREADS: usize>(
    residual: In<f32>,
    gain: In<bf16>,
    weight: In<bf16>,
    bias: In<bf16>,
    ahead: In<bf16>,
    table: In<f32>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    queries: Out<f32>,
    key_pages: Out<bf16>,
    value_pages: Out<bf16>,
    tokens: u32,
    width: u32,
    heads: u32,
    kv_heads: u32,
    head_width: u32,
    eps: f32,
) {
    let (tokens, width) = (tokens as usize, width as usize);
    let (heads, kv_heads, head_width) = (heads as usize, kv_heads as usize, head_width as usize);
    let (half, per_head) = (head_width / 2, head_width / 16);
    let all_heads = heads + 2 * kv_heads;
    let arena = arena(tokens, width, QKV);
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let strips = all_heads * per_head;
    let strip = own_strip(QKV, strips);
    let head = strip / per_head;
    // The lane's place in the head's first half, and its tokens.
    let i = strip % per_head * 8 + g;
    let own = [t * 2, t * 2 + 1];
    chains::<{ QKV.depth }, { QKV.depth / CHUNK - 2 }, _>(
        weight,
        arena,
        tokens,
        width,
        Segment { first: 0, width },
        Strips { first: strip, step: strips, end: strips },
        ahead,
        |strip, part| strip / per_head * head_width + part * half + strip % per_head * 8,
        || {
            // What the epilogue needs is older than the predecessors.
            let mut ready = [Epilogue::EMPTY; 2];
            for index in 0..2 {
                let token = own[index];
                if token < tokens && strip < strips {
                    let position = positions.get(token);
                    let mut one = Epilogue { position, ..Epilogue::EMPTY };
                    if position != u32::MAX {
                        if !bias.is_empty() {
                            let first = head * head_width + i;
                            one.bias = [bf16_to_f32(bias.get(first)), bf16_to_f32(bias.get(first + half))];
                        }
                        if head < heads + kv_heads {
                            one.rotation = table.load((position as usize * half + i) * 2);
                        }
                        if head >= heads {
                            one.page = page_tables.get(row_tables.get(token) as usize + position as usize / PAGE);
                        }
                    }
                    ready[index] = one;
                }
            }
            normalised::<THREADS>(&arena.input, residual, gain, tokens, width, eps);
            ready
        },
        |_, sums, ready| {
            for index in 0..2 {
                let token = own[index];
                let Epilogue { position, bias: offsets, rotation: [cos, sin], page } = ready[index];
                if position == u32::MAX {
                    continue;
                }
                let (first, second) = (head * head_width + i, head * head_width + half + i);
                let (mut a, mut b) = (sums[index], sums[index + 2]);
                if !bias.is_empty() {
                    a += offsets[0];
                    b += offsets[1];
                }
                if head < heads + kv_heads {
                    (a, b) = (math::fma(a, cos, -(b * sin)), math::fma(b, cos, a * sin));
                }
                if head < heads {
                    let row = token * all_heads * head_width;
                    queries.set(row + first, a);
                    queries.set(row + second, b);
                    continue;
                }
                let slot = position as usize % PAGE;
                let kv_head = (head - heads) % kv_heads;
                let start = (page as usize * kv_heads + kv_head) * PAGE * head_width;
                if head < heads + kv_heads {
                    key_pages.set(start + slot * head_width + i, f32_to_bf16(a));
                    key_pages.set(start + slot * head_width + half + i, f32_to_bf16(b));
                } else {
                    value_pages.set(start + i * PAGE + slot, f32_to_bf16(a));
                    value_pages.set(start + (half + i) * PAGE + slot, f32_to_bf16(b));
                }
            }
        },
    );
}

/// The strip of the calling warp, or `strips` where it has none.
#[inline(always)]
fn own_strip(layout: Layout, strips: usize) -> usize {
    let warp = thread::warp_id() as usize;
    let strip = thread::block_idx_x() as usize * layout.warps + warp;
    if warp < layout.warps && strip < strips { strip } else { strips }
}

macro_rules! qkv_kernel {
    ($name:ident, $threads:tt) => {
        /// RMSNorm, the query, key and value layer, bias, rotary embedding (pairs i and i + D/2), and the KV cache's new entries.
        ///
        /// - `residual`: f32 \[T, C\]; `gain`: bf16 \[C\]; `weight`: bf16 \[(H + 2 G) D, C\]; `bias`: bf16 \[(H + 2 G) D\] or empty;
        ///   `ahead`: bf16, weights to bring into the cache for a later kernel, or empty; `table`: f32 \[positions, D/2, 2\]; `queries`: f32 \[T, (H + 2 G) D\], of which the query columns are written; pages as in
        ///   [`crate::kv_write`].
        /// - grid: blocks of [`QKV`]'s warps for (H + 2 G) D / 16 strips; a warp makes 8 outputs of the first half of a head and
        ///   their 8 partners of the second.
        /// - bytes: 2 N C, and 4 T C for each block.
        /// - the caller: T is at most [`FEW`], C a multiple of 64, D of 32; a row whose position is `u32::MAX` stores nothing;
        ///   dynamic shared memory as [`input_bytes`] and [`ring_bytes`] say.
        #[kernel(block = $threads, min_blocks = 1)]
        pub fn $name(
            residual: In<f32>,
            gain: In<bf16>,
            weight: In<bf16>,
            bias: In<bf16>,
            ahead: In<bf16>,
            table: In<f32>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            queries: Out<f32>,
            key_pages: Out<bf16>,
            value_pages: Out<bf16>,
            tokens: u32,
            width: u32,
            heads: u32,
            kv_heads: u32,
            head_width: u32,
            eps: f32,
        ) {
            qkv::<$threads>(
                residual,
                gain,
                weight,
                bias,
                ahead,
                table,
                positions,
                row_tables,
                page_tables,
                queries,
                key_pages,
                value_pages,
                tokens,
                width,
                heads,
                kv_heads,
                head_width,
                eps,
            );
        }
    };
}
qkv_kernel!(few_qkv, 64);
qkv_kernel!(few_qkv_wide, 256);

/// What one pair of sums of [`few_qkv()`] meets on its way out.
#[derive(Clone, Copy)]
struct Epilogue {
    /// `u32::MAX` where nothing is stored.
    position: u32,
    bias: [f32; 2],
    /// Cosine and sine.
    rotation: [f32; 2],
    page: u32,
}

impl Epilogue {
    const EMPTY: Self = Self { position: u32::MAX, bias: [0.0; 2], rotation: [0.0; 2], page: 0 };
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn gate_up<const THREADS: usize>(
    residual: In<f32>,
    gain: In<bf16>,
    weight: In<bf16>,
    ahead: In<bf16>,
    out: Out<bf16>,
    tokens: u32,
    width: u32,
    ffn: u32,
    eps: f32,
) {
    let (tokens, width, ffn) = (tokens as usize, width as usize, ffn as usize);
    let arena = arena(tokens, width, GATE_UP);
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let strips = ffn / 8;
    chains::<{ GATE_UP.depth }, { GATE_UP.depth / CHUNK - 2 }, _>(
        weight,
        arena,
        tokens,
        width,
        Segment { first: 0, width },
        Strips { first: own_strip(GATE_UP, strips), step: strips, end: strips },
        ahead,
        |strip, part| part * ffn + strip * 8,
        || normalised::<THREADS>(&arena.input, residual, gain, tokens, width, eps),
        |strip, sums, ()| {
            for index in 0..2 {
                let token = t * 2 + index;
                if token < tokens {
                    let value = gated(f32_to_bf16(sums[index]), f32_to_bf16(sums[index + 2]));
                    out.set(token * ffn + strip * 8 + g, f32_to_bf16(value));
                }
            }
        },
    );
}

macro_rules! gate_up_kernel {
    ($name:ident, $threads:tt) => {
        /// RMSNorm, the gate and up layer, and the gated activation.
        ///
        /// - `residual`: f32 \[T, C\]; `gain`: bf16 \[C\]; `weight`: bf16 \[2 F, C\], gate then up; `ahead` as in
        ///   [`few_qkv()`]; `out`: bf16 \[T, F\].
        /// - grid: blocks of [`GATE_UP`]'s warps for F / 8 strips; a warp makes 8 gates and their 8 ups.
        /// - bytes: 4 F C, and 4 T C for each block.
        /// - the caller: T is at most [`FEW`], C a multiple of 64, F of 16; dynamic shared memory as in [`few_qkv()`].
        #[kernel(block = $threads, min_blocks = 1)]
        pub fn $name(
            residual: In<f32>,
            gain: In<bf16>,
            weight: In<bf16>,
            ahead: In<bf16>,
            out: Out<bf16>,
            tokens: u32,
            width: u32,
            ffn: u32,
            eps: f32,
        ) {
            gate_up::<$threads>(residual, gain, weight, ahead, out, tokens, width, ffn, eps);
        }
    };
}
gate_up_kernel!(few_gate_up, 160);
gate_up_kernel!(few_gate_up_wide, 256);

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn few_residual<const SEGMENTS: usize, const DEPTH: usize, const PENDING: usize>(
    x: In<bf16>,
    weight: In<bf16>,
    ahead: In<bf16>,
    residual: InOut<f32>,
    partials: Shared<f32>,
    tokens: usize,
    outputs: usize,
    width: usize,
) {
    let arena = arena(tokens, width, residual_layout(SEGMENTS));
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let warp = thread::warp_id() as usize;
    let part = width / SEGMENTS;
    let segment = Segment { first: warp * part, width: part };
    // The token and the output of each of the lane's four sums.
    let place = |element: usize| (t * 2 + element % 2, thread::block_idx_x() as usize * 16 + g + element / 2 * 8);
    chains::<DEPTH, PENDING, _>(
        weight,
        arena,
        tokens,
        width,
        segment,
        Strips { first: thread::block_idx_x() as usize, step: outputs, end: outputs.div_ceil(16) },
        ahead,
        |strip, part| strip * 16 + part * 8,
        || {
            thread::wait_for_predecessors();
            // Read early: the way to memory and back is longer than an addition.
            let mut before = [0.0; 4];
            for element in 0..4 {
                let (token, output) = place(element);
                if token < tokens && output < outputs && warp == 0 {
                    before[element] = residual.get(token * outputs + output);
                }
            }
            copied(&arena.input, x, tokens, width, segment);
            before
        },
        |_, mut sums, before| {
            if SEGMENTS > 1 {
                if warp > 0 {
                    partials.store(((warp - 1) * 32 + lane) * 4, sums);
                }
                thread::sync_threads();
                if warp > 0 {
                    return;
                }
                for segment in 1..SEGMENTS {
                    let more: [f32; 4] = partials.load(((segment - 1) * 32 + lane) * 4);
                    for element in 0..4 {
                        sums[element] += more[element];
                    }
                }
            }
            for element in 0..4 {
                let (token, output) = place(element);
                if token < tokens && output < outputs {
                    residual.set(token * outputs + output, before[element] + sums[element]);
                }
            }
        },
    );
}

macro_rules! residual_kernel {
    ($name:ident, $segments:literal, $threads:tt) => {
        /// A linear layer whose output is added to the residual stream, with K in this many segments
        /// (see [`crate::linear`]).
        ///
        /// - `x`: bf16 \[T, K\]; `weight`: bf16 \[C, K\]; `ahead` as in [`few_qkv()`]; `residual`: f32 \[T, C\].
        /// - grid: ceil(C / 16) blocks of a warp per segment; a block makes 16 outputs.
        /// - bytes: 2 C K, and 2 T K for each block.
        /// - the caller: T is at most [`FEW`], K a multiple of 64 times the segments; dynamic shared memory as in
        ///   [`few_qkv()`].
        #[kernel(block = $threads, min_blocks = 1)]
        pub fn $name(
            x: In<bf16>,
            weight: In<bf16>,
            ahead: In<bf16>,
            residual: InOut<f32>,
            tokens: u32,
            outputs: u32,
            width: u32,
        ) {
            const DEPTH: usize = residual_layout($segments).depth;
            let partials = shared_array!(f32, 128 * $segments);
            few_residual::<$segments, DEPTH, { DEPTH / CHUNK - 2 }>(
                x,
                weight,
                ahead,
                residual,
                partials,
                tokens as usize,
                outputs as usize,
                width as usize,
            );
        }
    };
}
residual_kernel!(few_residual_1, 1, 32);
residual_kernel!(few_residual_2, 2, 64);
residual_kernel!(few_residual_4, 4, 128);

/// RMSNorm and the head. Logits are written where wanted, and each block's first token of the order of [`crate::rank`] in
/// any case, for [`few_argmax()`].
///
/// - `residual`: f32 \[T, C\]; `gain`: bf16 \[C\]; `weight`: bf16 \[V, C\]; `logits`: f32 \[T, V\], or empty;
///   `best`: u64 \[blocks, [`FEW`]\].
/// - any grid of blocks of [`LOGITS`]'s warps; a warp takes every so many strips of 16 outputs.
/// - bytes: 2 V C, 4 T V if logits are wanted, and 4 T C for each block.
/// - the caller: T is at most [`FEW`], C a multiple of 64; dynamic shared memory as in [`few_qkv()`].
#[kernel(block = 128, min_blocks = 1)]
pub fn few_logits(
    residual: In<f32>,
    gain: In<bf16>,
    weight: In<bf16>,
    logits: Out<f32>,
    best: Out<u64>,
    tokens: u32,
    width: u32,
    vocab: u32,
    eps: f32,
) {
    let block_best = shared_array!(u64, LOGITS.warps * FEW);
    let (tokens, width, vocab) = (tokens as usize, width as usize, vocab as usize);
    let arena = arena(tokens, width, LOGITS);
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let (block, warp) = (thread::block_idx_x() as usize, thread::warp_id() as usize);
    let mut warp_best = [0u64; 2];
    chains::<{ LOGITS.depth }, { LOGITS.depth / CHUNK - 2 }, _>(
        weight,
        arena,
        tokens,
        width,
        Segment { first: 0, width },
        Strips {
            first: block * LOGITS.warps + warp,
            step: thread::grid_dim_x() as usize * LOGITS.warps,
            end: vocab.div_ceil(16),
        },
        weight.none(),
        |strip, part| strip * 16 + part * 8,
        || normalised::<{ LOGITS.warps * 32 }>(&arena.input, residual, gain, tokens, width, eps),
        |strip, sums, ()| {
            for element in 0..4 {
                let (token, id) = (t * 2 + element % 2, strip * 16 + g + element / 2 * 8);
                if token < tokens && id < vocab {
                    if !logits.is_empty() {
                        logits.set(token * vocab + id, sums[element]);
                    }
                    let key = rank::rank_key(sums[element], id);
                    let held = &mut warp_best[element % 2];
                    *held = if key > *held { key } else { *held };
                }
            }
        },
    );
    for column in 0..2 {
        let mut key = warp_best[column];
        let mut distance = 4;
        while distance < 32 {
            let other = rank::shuffle_xor(key, distance);
            key = if other > key { other } else { key };
            distance *= 2;
        }
        if g == 0 {
            block_best.set(warp * FEW + t * 2 + column, key);
        }
    }
    thread::sync_threads();
    let thread = thread::thread_idx_x() as usize;
    if thread < FEW {
        let mut key = 0;
        for warp in 0..LOGITS.warps {
            let other = block_best.get(warp * FEW + thread);
            key = if other > key { other } else { key };
        }
        best.set(block * FEW + thread, key);
    }
}

/// ids\[t\] = the token of the greatest of `best`\[.., t\], as [`crate::argmax`] has it.
///
/// - `best`: u64 \[blocks, columns\], of [`few_logits()`], where `columns` is [`FEW`], or of [`crate::tile_logits`], where it
///   is T; `ids`: u32 \[T\].
/// - a block does one token.
/// - bytes: 8 per block of the head and token.
#[kernel(block = 512)]
pub fn few_argmax(best: In<u64>, ids: Out<u32>, columns: u32) {
    let scratch = shared_array!(u64, rank::WARPS);
    let token = thread::block_idx_x() as usize;
    thread::wait_for_predecessors();
    let mut key = 0;
    let columns = columns as usize;
    let mut index = thread::thread_idx_x() as usize * columns + token;
    while index < best.len() {
        let other = best.get(index);
        key = if other > key { other } else { key };
        index += rank::THREADS * columns;
    }
    let key = rank::block_max(key, &scratch);
    if thread::thread_idx_x() == 0 {
        ids.set(token, rank::id_of(key));
    }
}
