//! The tile that the `wgmma_*` kernels share: some outputs of a linear layer for 64, 128 or 256 tokens. They are the linear layers of
//! decode steps of many tokens on Hopper, with what stands behind them.
//!
//! Every block needs all of its tokens' inputs and few of the weights, so with many tokens it is the inputs whose way from the
//! second-level cache takes longest. The blocks of a cluster have the same tokens: each asks for its part of them, and what comes goes
//! to all.
//!
//! One warp asks for the copies; they go round a ring of slots, each of a stage of tokens and of weights. Weights depend on no other
//! kernel, so the first ones are asked for before the kernel waits for its predecessors. A warpgroup has 64 tokens, and all of the
//! block's outputs.
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

/// How large a block's tile is, and how deep its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Warpgroups that multiply: each has 64 tokens.
    pub groups: usize,
    /// Outputs of a block, a multiple of 8.
    pub outputs: usize,
    /// Slots of the ring.
    pub depth: usize,
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

    const fn slot_bytes(self) -> usize {
        (self.tokens() + self.outputs) * ROW_BYTES
    }

    /// Bytes of dynamic shared memory of a block.
    #[must_use]
    pub const fn ring_bytes(self) -> usize {
        self.depth * (self.slot_bytes() + 16)
    }
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
/// `finish` gets each tile's sums. All blocks of a cluster have the same tokens and as many tiles.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn compute<
    const GROUPS: usize,
    const OUTPUTS: usize,
    const DEPTH: usize,
    const CLUSTER: usize,
    const COUNT: usize,
>(
    x_map: In<u64>,
    first_token: u32,
    first: u32,
    stages: u32,
    tiles: Tiles,
    copy_weights: impl Fn(u32, u32, Place),
    mut finish: impl FnMut(u32, &[f32; COUNT]),
) where
    [f32; COUNT]: Sums,
{
    let tokens = GROUPS * wgmma::ROWS;
    let box_rows = wgmma::ROWS / CLUSTER;
    let slot_elements = (tokens + OUTPUTS) * STAGE;
    const { assert!(COUNT * 2 == OUTPUTS && OUTPUTS.is_multiple_of(8) && wgmma::ROWS.is_multiple_of(8 * CLUSTER)) };
    thread::allow_successor();
    let ring: Shared<bf16> = shared::dynamic(0, DEPTH * slot_elements);
    let barriers = Barriers::new(shared::dynamic(DEPTH * slot_elements * 2, 2 * DEPTH));
    let (warp, lane) = (thread::warp_id() as usize, thread::lane_id());
    // The first DEPTH say that a slot is full, the others that nobody in the cluster reads it any more.
    if thread::thread_idx_x() == 0 {
        for slot in 0..DEPTH {
            barriers.init(slot, 1);
            barriers.init(DEPTH + slot, (CLUSTER * GROUPS * 4) as u32);
        }
        Barriers::publish();
    }
    sync_cluster();
    let copies = warp == GROUPS * 4 && lane == 0;
    let rank = cluster_rank();
    let total = tiles.count * stages;
    let ask_for_weights = |at: u32, slot: usize| {
        barriers.arrive_and_expect(slot, (slot_elements * 2) as u32);
        let place = Place { memory: ring, start: slot * slot_elements + tokens * STAGE, barriers, barrier: slot };
        copy_weights(tiles.first + at / stages * tiles.step, first + at % stages * STAGE as u32, place);
    };
    let ask_for_tokens = |at: u32, slot: usize| {
        for group in 0..GROUPS {
            let row = (group * CLUSTER) as u32 * box_rows as u32 + rank * box_rows as u32;
            let to = slot * slot_elements + row as usize * STAGE;
            let column = first + at % stages * STAGE as u32;
            let blocks = if CLUSTER > 1 { Some((1 << CLUSTER) - 1) } else { None };
            // SAFETY: the map is of boxes of so many rows (the caller of the kernel); the slot is one of the ring, and nobody reads
            // it in any block of the cluster.
            unsafe { copy_rows(&ring, to, &x_map, column, first_token + row, &barriers, slot, blocks) };
        }
    };
    let early = if total < DEPTH as u32 { total } else { DEPTH as u32 };
    if copies {
        for at in 0..early {
            ask_for_weights(at, at as usize);
        }
    }
    thread::wait_for_predecessors();
    if copies {
        for at in 0..early {
            ask_for_tokens(at, at as usize);
        }
        let (mut slot, mut parity) = (0, 0);
        for at in early..total {
            barriers.wait(DEPTH + slot, parity);
            ask_for_weights(at, slot);
            ask_for_tokens(at, slot);
            slot += 1;
            if slot == DEPTH {
                (slot, parity) = (0, parity ^ 1);
            }
        }
    } else if warp < GROUPS * 4 {
        let (mut slot, mut parity) = (0, 0);
        for tile in 0..tiles.count {
            let mut sums = [0.0; COUNT];
            for _ in 0..stages {
                barriers.wait(slot, parity);
                warp::sync_warp();
                let start = slot * slot_elements;
                let a = Operand::new(&ring, start + warp / 4 * wgmma::ROWS * STAGE);
                sums.add(a, Operand::new(&ring, start + tokens * STAGE));
                if lane < CLUSTER as u32 {
                    arrive_at(&barriers, DEPTH + slot, lane);
                }
                slot += 1;
                if slot == DEPTH {
                    (slot, parity) = (0, parity ^ 1);
                }
            }
            finish(tiles.first + tile * tiles.step, &sums);
        }
    }
    // A block's memory has to be there as long as others copy into it or arrive at its barriers.
    sync_cluster();
}
