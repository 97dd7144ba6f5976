//! The tile that the `wgmma_*` kernels share: some outputs of a linear layer for 64, 128 or 256 tokens. They are the linear layers of
//! decode steps of many tokens on Hopper, with what stands behind them.
//!
//! One warp asks for the copies; they go round two rings of slots, each of a stage of tokens or of weights. Weights depend on no other
//! kernel, so the first ones are asked for before the kernel waits for its predecessors. How many is a matter of measuring: weights that
//! come early are not waited for, but memory that is busy with them makes late what the kernels ahead hand to each other. A
//! warpgroup has 64 tokens, and all of the block's outputs; a stage's products run while the next stage's are started.
//!
//! The blocks of a cluster have the same tokens: each asks for its part of them, and what comes goes to all. Only the head gains from that.
//!
//! The bits are those of [`crate::linear`] and of the operation behind it: a product of 16 k by `wgmma` has those of `mma`, whichever
//! side the weights are on (the self-test and the tests of the kernels compare them).

use cuda_std::bulk::Barriers;
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::tensor_copy::{arrive_at, cluster_rank, copy_rows, sync_cluster};
use cuda_std::wgmma::{self, Operand, Sums};

use crate::tiles::Tiles;

/// Inputs (k) of a stage of the ring. K is a multiple of it.
pub const STAGE: usize = wgmma::DEPTH;

/// Bytes of a row of a stage.
const ROW_BYTES: usize = STAGE * 2;

/// How large a block's tile is, and how deep its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Warpgroups that multiply: each has 64 tokens.
    pub groups: usize,
    /// Outputs of a block, a multiple of 8.
    pub outputs: usize,
    /// Slots of the tokens' ring.
    pub depth: usize,
    /// Slots of the weights' ring.
    pub ahead: usize,
    /// Blocks of a cluster.
    pub cluster: usize,
}

impl Layout {
    /// Threads of a block: a warp that copies is one more.
    #[must_use]
    pub const fn threads(self) -> usize {
        self.groups * 128 + 32
    }

    /// Tokens of a block.
    #[must_use]
    pub const fn tokens(self) -> usize {
        self.groups * wgmma::ROWS
    }

    /// Rows of a box of the tokens' tensor map.
    #[must_use]
    pub const fn box_rows(self) -> usize {
        wgmma::ROWS / self.cluster
    }

    /// Bytes of dynamic shared memory of a block.
    #[must_use]
    pub const fn ring_bytes(self) -> usize {
        self.depth * (self.tokens() * ROW_BYTES + 16) + self.ahead * (self.outputs * ROW_BYTES + 8)
    }
}

/// A stage of a tile.
#[derive(Clone, Copy)]
struct At {
    tile: u32,
    stage: u32,
}

impl At {
    /// The one behind it.
    #[inline(always)]
    fn step(&mut self, stages: u32, tiles: u32) {
        self.stage += 1;
        if self.stage == stages {
            *self = Self { tile: self.tile + tiles, stage: 0 };
        }
    }
}

/// A slot of a ring of `DEPTH`, and the parity of the phase in which it is waited for.
#[derive(Clone, Copy)]
struct Slot<const DEPTH: usize> {
    slot: usize,
    parity: u32,
}

impl<const DEPTH: usize> Slot<DEPTH> {
    const FIRST: Self = Self { slot: 0, parity: 0 };

    /// The next one.
    #[inline(always)]
    fn step(&mut self) {
        self.slot += 1;
        if self.slot == DEPTH {
            *self = Self { slot: 0, parity: self.parity ^ 1 };
        }
    }

    /// The number of the one before it.
    #[inline(always)]
    fn before(self) -> usize {
        if self.slot == 0 { DEPTH - 1 } else { self.slot - 1 }
    }
}

/// How many of `total` stages a ring of `DEPTH` slots takes at first.
#[inline(always)]
fn first_of<const DEPTH: usize>(total: u32) -> usize {
    if total < DEPTH as u32 { total as usize } else { DEPTH }
}

/// Where copies of weights go.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) memory: Shared<bf16>,
    /// The first element.
    pub(crate) start: usize,
    pub(crate) barriers: Barriers,
    /// The barrier that is told.
    pub(crate) barrier: usize,
}

/// The column of a block's tile of the first of the two outputs, neighbours, that elements 4 i and 4 i + 1 (or 4 i + 2 and 4 i + 3) of
/// a lane's sums are of.
#[inline(always)]
pub(crate) fn column(i: usize) -> u32 {
    i as u32 * 8 + thread::lane_id() % 4 * 2
}

/// Which of the block's tokens those elements are of: the first two with `half` 0, the others with 1.
#[inline(always)]
pub(crate) fn token(half: usize) -> u32 {
    thread::warp_id() * 16 + thread::lane_id() / 4 + half as u32 * 8
}

/// Computes a block's tiles of `stages` stages from input `first` on, for the tokens from `first_token` on. `GROUPS` to `CLUSTER` are
/// a [`Layout`], `COUNT` is half of `OUTPUTS`. `copy_weights(tile, k, place)` starts to copy the weights of a stage, `OUTPUTS` rows;
/// `early` runs before the kernel waits for its predecessors; `finish` gets each tile's sums. All blocks of a cluster have the same tokens and as many tiles.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn compute<
    const GROUPS: usize,
    const OUTPUTS: usize,
    const DEPTH: usize,
    const AHEAD: usize,
    const CLUSTER: usize,
    const COUNT: usize,
    R,
>(
    x_map: In<u64>,
    first_token: u32,
    first: u32,
    stages: u32,
    tiles: Tiles,
    copy_weights: impl Fn(u32, u32, Place),
    early: impl FnOnce() -> R,
    mut finish: impl FnMut(u32, &[f32; COUNT], &R),
) where
    [f32; COUNT]: Sums,
{
    let tokens = GROUPS * wgmma::ROWS;
    let box_rows = wgmma::ROWS / CLUSTER;
    let (token_elements, weight_elements) = (tokens * STAGE, OUTPUTS * STAGE);
    const { assert!(COUNT * 2 == OUTPUTS && OUTPUTS.is_multiple_of(8) && wgmma::ROWS.is_multiple_of(8 * CLUSTER)) };
    thread::allow_successor();
    let weights_start = DEPTH * token_elements;
    let elements = weights_start + AHEAD * weight_elements;
    let ring: Shared<bf16> = shared::dynamic(0, elements);
    let barriers = Barriers::new(shared::dynamic(elements * 2, 2 * DEPTH + AHEAD));
    let (warp, lane) = (thread::warp_id() as usize, thread::lane_id());
    // The first DEPTH say that a slot of tokens is full, the next that nobody in the cluster reads it, and what was multiplied
    // with it, any more; the others that a slot of weights is full.
    const fn weights<const DEPTH: usize>(slot: usize) -> usize {
        2 * DEPTH + slot
    }
    if thread::thread_idx_x() == 0 {
        for slot in 0..DEPTH {
            barriers.init(slot, 1);
            barriers.init(DEPTH + slot, (CLUSTER * GROUPS * 4) as u32);
        }
        for slot in 0..AHEAD {
            barriers.init(weights::<DEPTH>(slot), 1);
        }
        Barriers::publish();
    }
    if CLUSTER > 1 {
        sync_cluster();
    } else {
        thread::sync_threads();
    }
    let copies = warp == GROUPS * 4 && lane == 0;
    let rank = cluster_rank();
    let total = tiles.count * stages;
    let ask_for_weights = |at: At, slot: usize| {
        let barrier = weights::<DEPTH>(slot);
        barriers.arrive_and_expect(barrier, (weight_elements * 2) as u32);
        let place = Place { memory: ring, start: weights_start + slot * weight_elements, barriers, barrier };
        copy_weights(at.tile, first + at.stage * STAGE as u32, place);
    };
    let ask_for_tokens = |at: At, slot: usize| {
        barriers.arrive_and_expect(slot, (token_elements * 2) as u32);
        for group in 0..GROUPS {
            let row = (group * CLUSTER) as u32 * box_rows as u32 + rank * box_rows as u32;
            let to = slot * token_elements + row as usize * STAGE;
            let column = first + at.stage * STAGE as u32;
            let blocks = if CLUSTER > 1 { Some((1 << CLUSTER) - 1) } else { None };
            // SAFETY: the map is of boxes of so many rows (the caller of the kernel); the slot is one of the ring, and nobody reads
            // it in any block of the cluster.
            unsafe { copy_rows(&ring, to, &x_map, column, first_token + row, &barriers, slot, blocks) };
        }
    };
    let start = At { tile: tiles.first, stage: 0 };
    // What is asked for next of both.
    let (mut of_weights, mut of_tokens) = (start, start);
    if copies {
        for slot in 0..first_of::<AHEAD>(total) {
            ask_for_weights(of_weights, slot);
            of_weights.step(stages, tiles.step);
        }
    }
    let ready = if warp < GROUPS * 4 { Some(early()) } else { None };
    thread::wait_for_predecessors();
    if copies {
        for slot in 0..first_of::<DEPTH>(total) {
            ask_for_tokens(of_tokens, slot);
            of_tokens.step(stages, tiles.step);
        }
        // Each stage that has been multiplied makes room for one of both.
        let fewest = if AHEAD < DEPTH { AHEAD } else { DEPTH } as u32;
        let (mut tokens, mut weights) = (Slot::<DEPTH>::FIRST, Slot::<AHEAD>::FIRST);
        let mut multiplied = 0;
        while multiplied + fewest < total {
            barriers.wait(DEPTH + tokens.slot, tokens.parity);
            if multiplied + (AHEAD as u32) < total {
                ask_for_weights(of_weights, weights.slot);
                of_weights.step(stages, tiles.step);
            }
            if multiplied + (DEPTH as u32) < total {
                ask_for_tokens(of_tokens, tokens.slot);
                of_tokens.step(stages, tiles.step);
            }
            tokens.step();
            weights.step();
            multiplied += 1;
        }
    } else if let Some(ready) = ready {
        let (mut of_tokens, mut of_weights) = (Slot::<DEPTH>::FIRST, Slot::<AHEAD>::FIRST);
        let free = |slot: usize| {
            if lane < CLUSTER as u32 {
                arrive_at(&barriers, DEPTH + slot, lane);
            }
        };
        for tile in 0..tiles.count {
            let mut sums = [0.0; COUNT];
            for stage in 0..stages {
                barriers.wait(weights::<DEPTH>(of_weights.slot), of_weights.parity);
                barriers.wait(of_tokens.slot, of_tokens.parity);
                warp::sync_warp();
                let a = Operand::new(&ring, of_tokens.slot * token_elements + warp / 4 * wgmma::ROWS * STAGE);
                sums.add(a, Operand::new(&ring, weights_start + of_weights.slot * weight_elements));
                // A stage is under way while the next one is started.
                wgmma::wait::<1>();
                if stage > 0 {
                    free(of_tokens.before());
                }
                of_tokens.step();
                of_weights.step();
            }
            sums.settle();
            free(of_tokens.before());
            finish(tiles.first + tile * tiles.step, &sums, &ready);
        }
    }
    if CLUSTER > 1 {
        // A block's memory has to be there as long as others copy into it or arrive at its barriers.
        sync_cluster();
    }
}
