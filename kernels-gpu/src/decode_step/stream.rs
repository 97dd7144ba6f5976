//! The warp that streams the block's weights through the ring, ahead of those who compute.

use cuda_std::prelude::*;

use super::Step;
use super::plan::{ATTENTION, Cut, Linear};
use crate::attention_decode_short::apart_bytes;
use crate::weight_ring::{Filler, Ring};

/// Streams the block's weights, in the order of the phases.
#[inline(always)]
pub(super) fn stream(step: &Step<'_>, ring: Ring, ahead: u32, pace: u32) {
    let mut filler = Filler::new(ring, ahead, pace);
    let (mut linear, mut layer) = (Linear::Qkv, 0);
    let layers = step.layers;
    loop {
        let shape = step.shape;
        if linear == Linear::Output {
            for _ in 0..step.share(layer, ATTENTION).count {
                let width = shape.head_width as usize;
                filler.reserve(apart_bytes(width) as u32);
            }
        }
        if linear == Linear::Head {
            filler.pace = 0;
        }
        let cut = shape.linear(linear);
        let share = step.share(layer, linear.phase());
        let weight = step.weight(linear, layer);
        let part = cut.width >> cut.halvings;
        if share.count > 0 && Cut::has_gain(linear) {
            filler.fill(step.gain(linear, layer), 1, 0, 0, shape.hidden);
        }
        for turn in 0..share.count {
            let group = share.group(turn);
            // The first row, and how far from it the ninth is.
            let (row, jump) = match linear {
                Linear::Qkv => {
                    let per_head = shape.head_width / 16;
                    (group / per_head * shape.head_width + group % per_head * 8, shape.head_width / 2)
                }
                Linear::Output | Linear::Down => (group * 8, 0),
                Linear::GateUp => (group * 8, shape.ffn),
                Linear::Head => (group * 16, 8),
            };
            let lane = thread::lane_id();
            let row = row + lane % 8 + lane / 8 * jump;
            // The vocabulary may end before its last group.
            let row = if linear == Linear::Head && row >= shape.vocab { shape.vocab - 1 } else { row };
            for segment in 0..1 << cut.halvings {
                filler.fill(weight, cut.rows, row as usize * cut.width as usize, segment * part, part);
            }
        }
        if linear == Linear::Head {
            break;
        }
        (linear, layer) = linear.next(layer, layers);
    }
}
