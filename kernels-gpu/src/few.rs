//! Linear layers of few tokens (at most [`FEW`]), fused with what stands before and after them: a decode step of a small
//! batch, which is bound by reading each weight once.
//!
//! The bits are those of the separate operations: the same k16 chain as [`crate::linear`], the same reduction tree as
//! [`crate::rms_norm`], the same arithmetic and rounding around them. Only where values wait between the operations differs
//! (in registers and shared memory instead of device memory).
//!
//! A warp owns strips of 16 outputs and streams their weights through a ring in shared memory with asynchronous copies.
//! Weights depend on no other kernel, so the ring is filled before the kernel waits for its predecessors (programmatic
//! dependent launch), and a kernel lets its successor start first of all: where shared memory and registers have room, the
//! blocks of a whole layer wait with their weights for the values of the layer before. Filling the rings of a large layer
//! would keep memory so busy that the few values which the kernels hand to each other come late; it is spread over the time
//! that there is (`PACE`).

use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

use crate::rms_norm::REDUCTION_LANES;

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

/// Most tokens for which a block of [`few_qkv`](crate::few_qkv) or [`few_gate_up`](crate::few_gate_up) has no warps but those of the chains. The `wide` kernels
/// have a warp for each token, to normalise all of them at once.
pub const NARROW: usize = 2;

/// What a block has in shared memory: the tokens' inputs, then a ring for each warp.
#[derive(Clone, Copy)]
pub(crate) struct Arena {
    pub(crate) input: Shared<bf16>,
    pub(crate) ring: Shared<bf16>,
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn arena(tokens: usize, width: usize, layout: Layout) -> Arena {
    let start = input_bytes(tokens, width);
    Arena { input: shared::dynamic(0, tokens * (width + PAD)), ring: shared::dynamic(start, ring_bytes(layout) / 2) }
}

/// The strips of a warp: `first`, `first + step`, ... below `end`.
#[derive(Clone, Copy)]
pub(crate) struct Strips {
    pub(crate) first: usize,
    pub(crate) step: usize,
    pub(crate) end: usize,
}

/// The segment of k that a warp computes.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) first: usize,
    pub(crate) width: usize,
}

/// Stages that are waited for, and whose room is filled again, at once.
pub(crate) const CHUNK: usize = 4;

/// A ring that is filled as fast as memory gives.
pub(crate) const AT_ONCE: usize = usize::MAX;

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
/// The ring has `DEPTH` stages in `DEPTH / CHUNK` chunks; `PENDING` is two chunks less. While it fills for the first time, a
/// warp waits for all but its last `PACE` stages before it asks for another; [`AT_ONCE`] is without waiting. A product waits for the one before it
/// (some 35 cycles), so what else there is to do, reading the next operands and filling the ring, goes in between, and is
/// kept to few instructions.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn chains<const DEPTH: usize, const PENDING: usize, const PACE: usize, R>(
    weight: In<bf16>,
    arena: Arena,
    tokens: usize,
    width: usize,
    segment: Segment,
    strips: Strips,
    first_row: impl Fn(usize, usize) -> usize,
    inputs: impl FnOnce() -> R,
    mut finish: impl FnMut(usize, [f32; 4], &R),
) {
    const { assert!(DEPTH.is_multiple_of(CHUNK) && (PENDING + 2) * CHUNK == DEPTH && (PACE < CHUNK || PACE == AT_ONCE)) };
    // Elements of a stage.
    const SLOT: usize = 16 * ROW;
    thread::allow_successor();
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
                    if PACE != AT_ONCE {
                        // Groups of one stage instead of a chunk: those of the last chunk are complete when it is waited for.
                        cp_async::commit_group();
                        cp_async::wait_group::<PACE>();
                    }
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
pub(crate) fn normalised<const THREADS: usize>(
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
pub(crate) fn copied(input: &Shared<bf16>, x: In<bf16>, tokens: usize, width: usize, segment: Segment) {
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

/// The strip of the calling warp, or `strips` where it has none.
#[inline(always)]
pub(crate) fn own_strip(layout: Layout, strips: usize) -> usize {
    let warp = thread::warp_id() as usize;
    let strip = thread::block_idx_x() as usize * layout.warps + warp;
    if warp < layout.warps && strip < strips { strip } else { strips }
}
