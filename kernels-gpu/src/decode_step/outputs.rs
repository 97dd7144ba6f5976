//! The sums of a linear layer on their way out: what they meet, and where they go.

use cuda_std::prelude::*;

use super::lookup::Phase;
use super::plan::Linear;
use super::{Step, WARPS, lane_and_warp, sync};
use crate::kv_write::PAGE;
use crate::rank;
use crate::silu_mul::gated;

/// What a lane's sums meet on their way out.
#[derive(Clone, Copy)]
pub(super) struct Epilogue {
    /// Of QKV.
    bias: [bf16; 2],
    /// Of QKV: cosine and sine.
    rotation: [f32; 2],
    /// Of output and down: the residual stream.
    pub(super) residual: f32,
}

impl Epilogue {
    pub(super) const EMPTY: Self = Self { bias: [bf16::ZERO; 2], rotation: [0.0; 2], residual: 0.0 };

    /// Of a lane's row of a group. Everything is older than the phase's inputs. `seen`: the block had the residual stream
    /// behind attention as inputs of the phase before.
    #[inline(always)]
    pub(super) fn read(
        step: &Step<'_>,
        linear: Linear,
        phase: Phase,
        layer: u32,
        group: u32,
        g: u32,
        seen: bool,
    ) -> Self {
        let shape = step.shape;
        let mut one = Self::EMPTY;
        match linear {
            Linear::Qkv => {
                let (half, per_head) = (shape.head_width / 2, shape.head_width / 16);
                let (head, i) = (group / per_head, group % per_head * 8 + g);
                if step.address(layer, 2) != 0 {
                    let bias = step.buffer(layer, 2, shape.qkv_width());
                    let first = (head * shape.head_width + i) as usize;
                    one.bias = [bias.get(first), bias.get(first + half as usize)];
                }
                if head < shape.heads + shape.kv_heads {
                    one.rotation = step.rope_table.load((step.token()[0] * half + i) as usize * 2);
                }
            }
            Linear::Output => {
                let word = phase.residual + group * 8 + g;
                // SAFETY: a word of the residual stream.
                one.residual = f32::from_bits(unsafe { step.words.wait(word, step.layer_tag(layer) - 1) });
            }
            Linear::Down => {
                let word = phase.residual + group * 8 + g;
                // SAFETY: as above. A block that has seen all of the row does not wait again, and the value comes later.
                one.residual = f32::from_bits(unsafe {
                    if seen { step.words.peek(word) } else { step.words.wait(word, step.layer_tag(layer)) }
                });
            }
            Linear::GateUp | Linear::Head => {}
        }
        one
    }
}

/// Queries, keys and values: of one head, element i of its first half and of its second. Where blocks share spans (`LONG`), in the
/// lane's replica, else by one lane of four.
#[inline(always)]
pub(super) fn put_qkv<const LONG: bool>(
    step: &Step<'_>,
    layer: u32,
    group: u32,
    [mut a, mut b]: [f32; 2],
    epilogue: Epilogue,
) {
    let (lane, _) = lane_and_warp();
    let (g, t) = (lane / 4, lane % 4);
    let shape = step.shape;
    let (width, half, per_head) = (shape.head_width, shape.head_width / 2, shape.head_width / 16);
    let (head, i) = (group / per_head, group % per_head * 8 + g);
    let Epilogue { bias, rotation: [cos, sin], .. } = epilogue;
    if step.address(layer, 2) != 0 {
        a += bf16_to_f32(bias[0]);
        b += bf16_to_f32(bias[1]);
    }
    if head < shape.heads + shape.kv_heads {
        (a, b) = (math::fma(a, cos, -(b * sin)), math::fma(b, cos, a * sin));
    }
    let (mut first, mut second) = (a.to_bits(), b.to_bits());
    let (low, high) = (f32_to_bf16(a), f32_to_bf16(b));
    if head >= shape.heads {
        (first, second) = (u32::from(low.to_bits()), u32::from(high.to_bits()));
    }
    let words = shape.words();
    let word = words.qkv + if LONG { t * words.replica } else { 0 } + head * width + i;
    // SAFETY: words of the token's queries, keys and values.
    unsafe {
        step.words.store(word, first, step.layer_tag(layer));
        step.words.store(word + half, second, step.layer_tag(layer));
    }
    if head >= shape.heads && t == 0 {
        let is_key = head < shape.heads + shape.kv_heads;
        let [position, _, page, _] = step.token();
        let slot = position % PAGE as u32;
        let start = (page * shape.kv_heads + (head - shape.heads) % shape.kv_heads) as usize * PAGE * width as usize;
        let (place, step_to) =
            if is_key { (slot * width + i, half) } else { (i * PAGE as u32 + slot, half * PAGE as u32) };
        let address = step.address(layer, if is_key { 7 } else { 8 });
        // SAFETY: the address of the layer's pages. Of them only the step's own token is written, by one warp. What this launch
        // reads there, where it copies the whole page, counts for nothing.
        let pages: Out<bf16> = unsafe { Out::at_address(address, step.page_elements) };
        pages.set(start + place as usize, low);
        pages.set(start + (place + step_to) as usize, high);
    }
}

/// The gated activation of a group's 8 gates and ups.
#[inline(always)]
pub(super) fn put_gated(step: &Step<'_>, phase: Phase, tag: u32, group: u32, sums: [f32; 2]) {
    let (lane, _) = lane_and_warp();
    let (g, t) = (lane / 4, lane % 4);
    let own = gated(f32_to_bf16(sums[0]), f32_to_bf16(sums[1]));
    // A word has two neighbours.
    let other = f32::from_bits(warp::shuffle_xor_u32(own.to_bits(), 4));
    if g % 2 == 0 {
        let word = phase.to + group * 4 + g / 2;
        // SAFETY: a word of the gated values in the lane's replica.
        unsafe { step.words.store(word + t * phase.replica, bf16_pair(own, other), tag) };
    }
}

/// The first token in the order of [`crate::rank`] among the block's, of which each thread has its own best.
#[inline(always)]
pub(super) fn put_best(bests: Shared<u64>, best: Out<u64>) {
    sync();
    let (lane, warp) = lane_and_warp();
    if warp > 0 {
        return;
    }
    let mut key = 0;
    for warp in 0..WARPS {
        let other = bests.get((warp * 32 + lane) as usize);
        key = if other > key { other } else { key };
    }
    let key = rank::warp_max(key, 1);
    if lane == 0 {
        best.set(thread::block_idx_x() as usize, key);
    }
}
