//! The inputs of a linear layer on their way from tagged words into shared memory.

use cuda_std::prelude::*;

use super::lookup::Phase;
use super::{Step, THREADS, lane_and_warp, map, sync};
use crate::rms_norm::REDUCTION_LANES;
use crate::weight_ring::{PAD, Ring};

/// Most columns C of the residual stream: 8 for each lane of the reduction.
pub const MOST_HIDDEN: u32 = REDUCTION_LANES as u32 * 8;

/// Brings a linear layer's inputs into shared memory. `tag` is the layer's. `idle`: the block took no part in the phase before.
#[inline(always)]
pub(super) fn bring_inputs(step: &Step<'_>, ring: Ring, unit: u32, phase: Phase, normed: bool, tag: u32, idle: bool) {
    let [early, early_lag] = phase.early;
    // The first phase of all has nothing before it.
    if idle && tag - early_lag > step.tag {
        // Who is early waits for one value of the phase before: waiting for all of this one costs memory more.
        // One warp does, and the others wait for it: a word that many ask for is late for those who need it.
        if lane_and_warp().1 == 0 {
            // SAFETY: the first word of a phase.
            let _ = unsafe { step.words.wait(early, tag - early_lag) };
        }
        sync();
    }
    let [from, lag] = phase.from;
    if !normed {
        collect(step, phase.inputs, from, phase.width, tag - lag);
    } else {
        normalise(step, phase.inputs, ring, unit, from, tag - lag);
    }
}

/// Normalises the residual stream into shared memory: the arithmetic of [`crate::rms_norm`], by four warps, each of them 32 of the
/// reduction's lanes. The stream is in the words from `start` on, the gain is a unit.
#[inline(always)]
fn normalise(step: &Step<'_>, inputs: u32, ring: Ring, unit: u32, start: u32, tag: u32) {
    const PARTS: u32 = REDUCTION_LANES as u32 / 32;
    let width = step.shape.hidden;
    let (lane, part) = lane_and_warp();
    if part >= PARTS {
        return;
    }
    let input: Shared<bf16> = step.memory.part(inputs as usize, (width + PAD) as usize);
    let squares: Shared<f32> = step.memory.part(map::SQUARES, 4);
    let gain: Shared<bf16> = step.memory.part(ring.wait(unit) as usize, width as usize);
    let column = (part * 32 + lane) * 8;
    let has = column < width;
    let column = if has { column } else { 0 };
    let gains: [bf16; 8] = gain.load(column as usize);
    let pairs = step.words.gather(tag, |words| {
        let mut pairs = [[0; 2]; 4];
        for i in 0..4 {
            // SAFETY: words of the row, which starts evenly.
            pairs[i] = unsafe { words.pair(start + column + i as u32 * 2, true) };
        }
        pairs
    });
    let mut sum = 0.0;
    for i in 0..8 {
        let value = f32::from_bits(pairs[i / 2][i % 2]);
        sum = math::fma(value, value, sum);
    }
    warp::sync_warp();
    let sum = warp::sum_f32(if has { sum } else { 0.0 });
    if lane == 0 {
        squares.set(part as usize, sum);
    }
    thread::sync_some::<3, { PARTS * 32 }>();
    let [a, b, c, d]: [f32; 4] = squares.load(0);
    let scale = 1.0 / math::sqrt(((a + b) + (c + d)) / width as f32 + step.eps);
    if has {
        let mut normed = [bf16::ZERO; 8];
        for i in 0..8 {
            normed[i] = f32_to_bf16(f32::from_bits(pairs[i / 2][i % 2]) * scale * bf16_to_f32(gains[i]));
        }
        input.store(column as usize, normed);
    }
}

/// Brings pairs of bf16 \[width / 2\] into shared memory, from the words from `start` on.
#[inline(always)]
fn collect(step: &Step<'_>, inputs: u32, start: u32, width: u32, tag: u32) {
    const AT_ONCE: usize = 6;
    let input: Shared<u32> = step.memory.part(inputs as usize, ((width + PAD) / 2) as usize);
    let total = width / 4;
    let mut base = thread::thread_idx_x_anew();
    while base < total {
        let pairs = step.words.gather(tag, |words| {
            let mut pairs = [[0; 2]; AT_ONCE];
            for i in 0..AT_ONCE {
                let place = base + i as u32 * THREADS;
                // SAFETY: words of the row, which has `total` pairs and starts evenly.
                pairs[i] = unsafe { words.pair(start + place * 2, place < total) };
            }
            pairs
        });
        for i in 0..AT_ONCE {
            let place = base + i as u32 * THREADS;
            if place < total {
                input.store(place as usize * 2, pairs[i]);
            }
        }
        base += AT_ONCE as u32 * THREADS;
    }
}
