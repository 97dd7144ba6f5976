//! The attention phase: [`crate::attention_decode_short`] of a KV head, between tagged words.

use cuda_std::bulk;
use cuda_std::prelude::*;

use super::plan::REPLICAS;
use super::{Step, lane_and_warp, map};
use crate::attention_decode::MAX_RATIO;
use crate::attention_decode_short::{Inputs, Task, attend};
use crate::kv_write::PAGE;
use crate::weight_ring::Ring;

/// Warps that attend, and spans at once.
pub(super) const AT_ONCE: usize = 4;

/// Attention of the query heads of a KV head, by the first [`AT_ONCE`] warps. `STEPS` and so on as in [`attend`].
#[inline(always)]
pub(super) fn attention<const STEPS: usize, const TILES: usize, const COPIES: usize, const ITEMS: usize>(
    step: &Step<'_>,
    ring: Ring,
    layer: u32,
    kv_head: u32,
    unit: u32,
) {
    let shape = step.shape;
    let width = shape.head_width;
    let words = shape.words();
    let tag = step.layer_tag(layer);
    let ratio = shape.heads / shape.kv_heads;
    let (lane, _) = lane_and_warp();
    let (g, t) = (lane / 4, lane % 4);
    let [position, table, ..] = step.token();
    let base = ring.wait(unit);
    let word = words.qkv;
    let sync = || thread::sync_some::<2, { AT_ONCE as u32 * 32 }>();
    attend::<AT_ONCE, STEPS, TILES, COPIES, ITEMS, true>(
        thread::thread_idx_x_anew() as usize,
        step.memory.part(map::STATISTICS, AT_ONCE * MAX_RATIO * 2),
        base as usize,
        Task {
            key_pages: step.pages(layer, 7),
            value_pages: step.pages(layer, 8),
            position: position as usize,
            ratio: ratio as usize,
            factor: step.scale,
        },
        |span| {
            let page = step.page_tables.get((table + span as u32) as usize);
            (page * shape.kv_heads + kv_head) as usize * PAGE * width as usize
        },
        |has_span, has_last| {
            let mut inputs: Inputs<STEPS> = ([[0u32; 4]; STEPS], ([bf16::ZERO; 8], [bf16::ZERO; STEPS]));
            let bits = |word: u32| bf16::from_bits(word as u16);
            let key = word + (shape.heads + kv_head) * width;
            let value = key + shape.kv_heads * width;
            let query = |head: u32| word + (kv_head * ratio + head) * width + t * 2;
            let has = |head: u32| has_span && head < ratio;
            // Everything at once: each wait is a way to memory and back.
            let (key_pairs, values, queries) = step.words.gather(tag, |words| {
                let (mut keys, mut values, mut queries) = ([[0; 2]; 4], [0; STEPS], [[0; 2]; TILES]);
                if has_last {
                    for i in 0..4 {
                        // SAFETY: words of the token's keys; a lane's are even.
                        keys[i] = unsafe { words.pair(key + lane * 8 + i as u32 * 2, lane < width / 8) };
                    }
                    for i in 0..STEPS / 2 {
                        // SAFETY: words of the token's values.
                        values[i] = unsafe { words.one(value + lane + i as u32 * 32) };
                    }
                }
                for i in 0..TILES {
                    // SAFETY: words of the token's queries; a lane's are even.
                    queries[i] = unsafe { words.pair(query(g) + i as u32 * 8, has(g)) };
                }
                (keys, values, queries)
            });
            if has_last {
                for i in 0..8 {
                    inputs.1.0[i] = bits(key_pairs[i / 2][i % 2]);
                }
                for i in 0..STEPS / 2 {
                    inputs.1.1[i] = bits(values[i]);
                }
            }
            let mut put = |half: usize, queries: [[u32; 2]; TILES]| {
                for i in 0..TILES {
                    let [low, high] = queries[i].map(f32::from_bits);
                    inputs.0[i / 2][i % 2 * 2 + half] = bf16_pair(low, high);
                }
            };
            put(0, queries);
            if ratio > 8 {
                let queries = step.words.gather(tag, |words| {
                    let mut queries = [[0; 2]; TILES];
                    for i in 0..TILES {
                        // SAFETY: as above.
                        queries[i] = unsafe { words.pair(query(g + 8) + i as u32 * 8, has(g + 8)) };
                    }
                    queries
                });
                put(1, queries);
            }
            warp::sync_warp();
            inputs
        },
        sync,
        |head, column, [a, b, c, d]| {
            let to = words.attended + ((kv_head * ratio + head as u32) * width + column as u32) / 2;
            let pair = [bf16_pair(a, b), bf16_pair(c, d)];
            for replica in 0..REPLICAS {
                // SAFETY: words of a replica of the row's attended values; columns are multiples of 4.
                unsafe { step.words.store_pair(to + replica * words.replica, pair, tag) };
            }
        },
    );
    bulk::release_to_copies();
    sync();
    if thread::thread_idx_x() == 0 {
        ring.free(unit);
    }
}
