//! The warp that streams the block's weights through the ring, ahead of those who compute.

use cuda_std::prelude::*;

use super::Step;
use super::plan::{ATTENTION, Cut, Linear};
use super::spans::{self, Tasks};
use crate::attention::SPAN;
use crate::attention_decode_short::apart_bytes;
use crate::weight_ring::{Filler, Ring};

/// Streams the block's weights, in the order of the phases.
#[inline(always)]
pub(super) fn stream<const LONG: bool>(
    step: &Step<'_>,
    [positions, row_tables]: [In<u32>; 2],
    ring: Ring,
    ahead: u32,
    pace: u32,
) {
    let mut spans = LONG.then(|| Spans::new(step, positions, row_tables));
    let mut filler = Filler::new(ring, ahead, pace);
    let (mut linear, mut layer) = (Linear::Qkv, 0);
    let layers = step.layers;
    loop {
        let shape = step.shape;
        if linear == Linear::Output
            && let Some(spans) = &mut spans
        {
            spans.fill(step, &mut filler, layer);
        } else if linear == Linear::Output {
            for _ in 0..step.share::<LONG>(layer, ATTENTION).count {
                let width = shape.head_width as usize;
                filler.reserve(apart_bytes(width) as u32);
            }
        }
        if linear == Linear::Head {
            filler.pace = 0;
        }
        let cut = shape.linear(linear);
        let share = step.share::<LONG>(layer, linear.phase());
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

/// The block's spans of the context, and where they are.
struct Spans {
    tasks: Tasks,
    /// The token's page table.
    table: u32,
    /// Of each lane, the page and KV head of the task of this turn.
    place: u32,
}

impl Spans {
    #[inline(always)]
    fn new(step: &Step<'_>, positions: In<u32>, row_tables: In<u32>) -> Self {
        let (position, table) = (positions.get(0), row_tables.get(0));
        Self { tasks: Tasks::new(step.shape.kv_heads, spans::spans(step, position)), table, place: 0 }
    }

    /// Streams the keys and values of a layer.
    #[inline(always)]
    fn fill(&mut self, step: &Step<'_>, filler: &mut Filler, layer: u32) {
        let (shape, tasks) = (step.shape, self.tasks);
        if layer == 0 {
            // Not before the first weights are on their way.
            let own = tasks.after(thread::lane_id());
            if own.left() {
                let page = step.page_tables.get((self.table + own.span()) as usize);
                self.place = page * shape.kv_heads + own.kv_head();
            }
        }
        let mut turn = 0;
        while tasks.after(turn).left() {
            let first = warp::shuffle_u32(self.place, turn) as usize * (SPAN as u32 * shape.head_width) as usize;
            let [keys, values] = [7, 8].map(|place| step.pages(layer, place));
            filler.fill_span(keys, values, first, shape.head_width);
            turn += 1;
        }
    }
}
