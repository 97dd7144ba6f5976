//! The query, key and value layer of prefills, up to attention, on Hopper: whole heads of 64 elements a tile, where
//! [`crate::wgmma_qkv`] is made for few tokens.
//!
//! A lane has both elements that are rotated together among its sums. The two blocks of a cluster have the same outputs; each asks for
//! half of the weights, and what comes goes to both.

use cuda_std::bulk::Barriers;
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::tensor_copy::{cluster_rank, copy_rows, sync_cluster};
use cuda_std::wgmma::{self, DEPTH as STAGE, Operand, ROWS, Ring, Sums, leave_registers, take_registers};

use crate::kv_write::PAGE;
use crate::tile_qkv::{Heads, rotated};

/// Elements of a head.
pub const WIDTH: usize = 64;

/// Elements of half of a head, in eights.
const EIGHTS: usize = WIDTH / 16;

/// Blocks of a cluster.
pub const CLUSTER: usize = 2;

/// How large a block's tile is, and how deep its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Warpgroups that multiply: each has 64 tokens.
    pub groups: usize,
    /// Heads.
    pub heads: usize,
    /// Slots of the ring: each a stage of tokens and of weights.
    pub slots: usize,
}

impl Layout {
    /// Tokens of a block.
    #[must_use]
    pub const fn tokens(self) -> usize {
        self.groups * ROWS
    }

    /// Rows of a box of the weight's tensor map.
    #[must_use]
    pub const fn box_rows(self) -> usize {
        self.heads * WIDTH / CLUSTER
    }

    const fn slot(self) -> usize {
        (self.tokens() + self.heads * WIDTH) * STAGE
    }

    /// Bytes of dynamic shared memory of a block.
    #[must_use]
    pub const fn shared_bytes(self) -> usize {
        self.slots * (self.slot() * 2 + 16) + self.heads * WIDTH * 4
    }
}

/// The layout of [`wgmma_long_qkv_1()`]: a multiprocessor has two blocks at once.
pub const HEADS_1: Layout = Layout { groups: 2, heads: 1, slots: 4 };
/// The layout of [`wgmma_long_qkv_3()`].
pub const HEADS_3: Layout = Layout { groups: 3, heads: 3, slots: 4 };

/// `GROUPS`, `HEADS` and `SLOTS` are a [`Layout`], `COUNT` is half of its outputs.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn long_qkv<const GROUPS: usize, const HEADS: usize, const SLOTS: usize, const COUNT: usize>(
    x_map: In<u64>,
    weight_map: In<u64>,
    heads: Heads,
    width: u32,
) where
    [f32; COUNT]: Sums,
{
    const { assert!(COUNT * 2 == HEADS * WIDTH) };
    let layout = const { Layout { groups: GROUPS, heads: HEADS, slots: SLOTS } };
    let (slot_elements, tile_tokens, box_rows) = (layout.slot(), layout.tokens(), layout.box_rows());
    thread::allow_successor();
    let ring: Shared<bf16> = shared::dynamic(0, SLOTS * slot_elements);
    let barriers = Barriers::new(shared::dynamic(SLOTS * slot_elements * 2, 2 * SLOTS));
    let offsets: Shared<f32> = shared::dynamic(SLOTS * (slot_elements * 2 + 16), HEADS * WIDTH);
    let (thread, warp, lane) = (thread::thread_idx_x() as usize, thread::warp_id() as usize, thread::lane_id());
    // The first ones say that a slot is full, the others that nobody in the cluster reads it any more.
    if thread == 0 {
        for slot in 0..SLOTS {
            barriers.init(slot, 1);
            barriers.init(SLOTS + slot, (CLUSTER * GROUPS * 4) as u32);
        }
        Barriers::publish();
    }
    sync_cluster();
    let rank = cluster_rank();
    let tokens = heads.positions.len() as u32;
    let first_token = thread::block_idx_x() * tile_tokens as u32;
    let first_head = thread::block_idx_y() * HEADS as u32;
    let stages = width / STAGE as u32;

    // The other lanes of the warp that asks have nothing to wait for. No block ends before its other threads have waited.
    if warp >= GROUPS * 4 {
        if GROUPS > 2 {
            leave_registers::<24>();
        }
        if warp == GROUPS * 4 && lane == 0 {
            let ask_for_weights = |stage: u32, slot: usize| {
                barriers.arrive_and_expect(slot, (slot_elements * 2) as u32);
                let of_rank = rank as usize * box_rows;
                let row = first_head * WIDTH as u32 + of_rank as u32;
                let to = slot * slot_elements + (tile_tokens + of_rank) * STAGE;
                // SAFETY: the map is of boxes of half of the outputs (the kernel's contract); the slot is one of the ring, and nobody
                // reads it in either block.
                unsafe { copy_rows(&ring, to, &weight_map, stage * STAGE as u32, row, &barriers, slot, Some(0b11)) };
            };
            let ask_for_tokens = |stage: u32, slot: usize| {
                let (to, k) = (slot * slot_elements, stage * STAGE as u32);
                // SAFETY: as above, of boxes of a block's tokens.
                unsafe { copy_rows(&ring, to, &x_map, k, first_token, &barriers, slot, None) };
            };
            // Weights depend on no other kernel.
            let early = if stages < SLOTS as u32 { stages } else { SLOTS as u32 };
            for stage in 0..early {
                ask_for_weights(stage, stage as usize);
            }
            thread::wait_for_predecessors();
            for stage in 0..early {
                ask_for_tokens(stage, stage as usize);
            }
            let (mut slot, mut parity) = (0, 0);
            for stage in early..stages {
                barriers.wait(SLOTS + slot, parity);
                ask_for_weights(stage, slot);
                ask_for_tokens(stage, slot);
                slot += 1;
                if slot == SLOTS {
                    (slot, parity) = (0, parity ^ 1);
                }
            }
        }
    } else {
        if GROUPS > 2 {
            take_registers::<160>();
        }
        // What the sums meet is older than the predecessors. First both positions, then all that follows from them: loads wait for each
        // other twice, not once for each token.
        let token = |half: usize| first_token + warp as u32 * 16 + lane / 4 + half as u32 * 8;
        let (mut positions, mut row_tables) = ([u32::MAX; 2], [0u32; 2]);
        for half in 0..2 {
            if token(half) < tokens {
                positions[half] = heads.positions.get(token(half) as usize);
                row_tables[half] = heads.row_tables.get(token(half) as usize);
            }
        }
        if !heads.bias.is_empty() && thread < HEADS * WIDTH {
            let output = first_head as usize * WIDTH + thread;
            let there = output < heads.outputs() as usize;
            offsets.set(thread, if there { bf16_to_f32(heads.bias.get(output)) } else { 0.0 });
        }
        let mut pages = [0u32; 2];
        for half in 0..2 {
            if positions[half] != u32::MAX && first_head + HEADS as u32 > heads.query_heads {
                let entry = row_tables[half] as usize + positions[half] as usize / PAGE;
                pages[half] = heads.page_tables.get(entry);
            }
        }
        // Cosines and sines of two neighbours of each eight: all heads have the same.
        let rotations = |position: u32| {
            let mut rotations = [[0.0f32; 4]; EIGHTS];
            if position != u32::MAX && first_head < heads.rotated() {
                for eight in 0..EIGHTS {
                    let i = eight * 8 + lane as usize % 4 * 2;
                    rotations[eight] = heads.table.load((position as usize * (WIDTH / 2) + i) * 2);
                }
            }
            rotations
        };
        // Beside the sums of many heads there are no registers for them.
        let early = GROUPS <= 2;
        let kept = if early { positions.map(rotations) } else { [[[0.0; 4]; EIGHTS]; 2] };
        if GROUPS > 2 {
            thread::sync_some::<1, 384>();
        } else {
            thread::sync_some::<1, 256>();
        }
        thread::wait_for_predecessors();
        let stages_of_both = Ring {
            a: Operand::new(&ring, warp / 4 * ROWS * STAGE),
            b: Operand::new(&ring, tile_tokens * STAGE),
            slot_bytes: (slot_elements * 2) as u32,
            slots: SLOTS as u32,
            barriers,
            cluster: CLUSTER as u32,
        };
        let mut place = wgmma::Place::FIRST;
        let mut sums = [0.0; COUNT];
        if stages > 0 {
            sums.add_stages(&stages_of_both, &mut place, stages);
        }
        for half in 0..2 {
            let (position, page) = (positions[half], pages[half]);
            if position == u32::MAX {
                continue;
            }
            let turns = if early { kept[half] } else { rotations(position) };
            let slot = position as usize % PAGE;
            for own in 0..HEADS {
                let head = first_head + own as u32;
                if head >= heads.rotated() + heads.kv_heads {
                    continue;
                }
                for eight in 0..EIGHTS {
                    let i = eight * 8 + lane as usize % 4 * 2;
                    // Neighbours, and their partners.
                    let mut pairs = [[0.0f32; 2]; 2];
                    let mut added = [[0.0f32; 2]; 2];
                    if !heads.bias.is_empty() {
                        added = [offsets.load(own * WIDTH + i), offsets.load(own * WIDTH + WIDTH / 2 + i)];
                    }
                    for element in 0..2 {
                        let at = (own * 2 * EIGHTS + eight) * 4 + half * 2 + element;
                        let mut pair = [sums[at], sums[at + EIGHTS * 4]];
                        if !heads.bias.is_empty() {
                            pair = [pair[0] + added[0][element], pair[1] + added[1][element]];
                        }
                        if head < heads.rotated() {
                            let turn = turns[eight];
                            pair = rotated(pair, [turn[element * 2], turn[element * 2 + 1]]);
                        }
                        (pairs[0][element], pairs[1][element]) = (pair[0], pair[1]);
                    }
                    if head < heads.query_heads {
                        let first = token(half) as usize * heads.outputs() as usize + head as usize * WIDTH + i;
                        heads.queries.store(first, pairs[0]);
                        heads.queries.store(first + WIDTH / 2, pairs[1]);
                    } else if head < heads.rotated() {
                        let start = heads.entries(page, head - heads.query_heads) + slot * WIDTH + i;
                        heads.key_pages.store(start, pairs[0].map(f32_to_bf16));
                        heads.key_pages.store(start + WIDTH / 2, pairs[1].map(f32_to_bf16));
                    } else {
                        let start = heads.entries(page, head - heads.rotated()) + slot + i * PAGE;
                        for element in 0..2 {
                            let start = start + element * PAGE;
                            heads.value_pages.set(start, f32_to_bf16(pairs[0][element]));
                            heads.value_pages.set(start + WIDTH / 2 * PAGE, f32_to_bf16(pairs[1][element]));
                        }
                    }
                }
            }
        }
    }
    // A block's memory has to be there as long as the other copies into it or arrives at its barriers.
    sync_cluster();
}

macro_rules! long_qkv_kernel {
    ($name:ident, $threads:tt, $min_blocks:tt, $layout:ident) => {
        /// The query, key and value layer, bias, rotary embedding (pairs i and i + D/2), and the KV cache's new entries: the
        /// bits of [`crate::linear::linear_f32()`] followed by [`crate::rotary_kv_write::rotary_kv_write()`].
        ///
        /// - `x_map`: the tensor map of x, bf16 \[M, K\], in boxes of 64 of k and the layout's tokens; `weight_map`: that of the
        ///   weight, bf16 \[(H + 2 G) D, K\], in boxes of 64 of k and half of the layout's outputs; the rest as in [`crate::tile_qkv`].
        /// - grid (2 ceil(M / (2 tokens)), ceil((H + 2 G) / heads)), tokens and heads of the layout; a block makes that tile.
        /// - bytes: 2 (N K + M K) + 4 M N, with weights once per cluster's tokens and tokens once per block.
        /// - the caller: K is a multiple of 64, D = 64; a row whose position is `u32::MAX` stores nothing;
        ///   [`Layout::shared_bytes`] of dynamic shared memory; an `sm_90a` image. Read before the kernels ahead have ended: all but x, or
        ///   all but x and the table.
        #[kernel(block = $threads, min_blocks = $min_blocks, cluster = 2)]
        pub fn $name(
            x_map: In<u64>,
            weight_map: In<u64>,
            bias: In<bf16>,
            table: In<f32>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            queries: Out<f32>,
            key_pages: Out<bf16>,
            value_pages: Out<bf16>,
            width: u32,
            heads: u32,
            kv_heads: u32,
        ) {
            let heads = Heads {
                bias,
                table,
                positions,
                row_tables,
                page_tables,
                queries,
                key_pages,
                value_pages,
                query_heads: heads,
                kv_heads,
                width: WIDTH as u32,
            };
            long_qkv::<{ $layout.groups }, { $layout.heads }, { $layout.slots }, { $layout.heads * WIDTH / 2 }>(
                x_map, weight_map, heads, width,
            );
        }
    };
}
long_qkv_kernel!(wgmma_long_qkv_1, 288, 2, HEADS_1);
long_qkv_kernel!(wgmma_long_qkv_3, 512, 1, HEADS_3);
