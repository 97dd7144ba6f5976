//! The layers of prefills whose outputs are added to the residual stream, on Hopper, with the sum of their segments: where
//! [`crate::wgmma_parts`] leaves each segment's sums in memory, here a block computes all segments of its tile one after the other, so
//! that none of them does.
//!
//! A thread has the sums of one segment, and the total of those before, in registers as far as there are any and in shared memory.
//! The two blocks of a cluster have the same outputs; each asks for half of the weights, and what comes goes to both.

use cuda_std::bulk::Barriers;
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::tensor_copy::{cluster_rank, copy_rows, sync_cluster};
use cuda_std::wgmma::{DEPTH as STAGE, Operand, Place, ROWS, Ring, Sums, leave_registers, take_registers};

/// Warpgroups that multiply: each has 64 tokens.
const GROUPS: usize = 2;

/// Tokens of a block's tile.
pub const TOKENS: usize = GROUPS * ROWS;

/// Blocks of a cluster.
pub const CLUSTER: usize = 2;

/// Outputs, in eights, whose residual a thread reads at once. A multiple of them is in a tile.
const AT_ONCE: usize = 14;

/// What a block's tile has of the outputs, and how deep its ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Outputs of a block.
    pub outputs: usize,
    /// Totals of a thread in registers, of half as many as there are outputs. A multiple of 4.
    pub kept: usize,
    /// Slots of the ring: each a stage of tokens and of weights.
    pub slots: usize,
}

impl Layout {
    /// Rows of a box of the weight's tensor map.
    #[must_use]
    pub const fn box_rows(self) -> usize {
        self.outputs / CLUSTER
    }

    const fn slot(self) -> usize {
        (TOKENS + self.outputs) * STAGE
    }

    /// Bytes of the ring.
    const fn ring(self) -> usize {
        self.slots * self.slot() * size_of::<bf16>()
    }

    /// Totals of a block in shared memory.
    const fn shared_totals(self) -> usize {
        (self.outputs / 2 - self.kept) * GROUPS * 128
    }

    /// Bytes of dynamic shared memory of a block.
    #[must_use]
    pub const fn shared_bytes(self) -> usize {
        self.ring() + self.shared_totals() * size_of::<f32>() + 2 * self.slots * size_of::<u64>()
    }
}

/// The layout of [`wgmma_long_residual_112()`].
pub const OUTPUTS_112: Layout = Layout { outputs: 112, kept: 56, slots: 7 };
/// The layout of [`wgmma_long_residual_224()`].
pub const OUTPUTS_224: Layout = Layout { outputs: 224, kept: 108, slots: 5 };

/// `OUTPUTS`, `KEPT` and `SLOTS` are a [`Layout`], `COUNT` is half of `OUTPUTS`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn long_residual<const OUTPUTS: usize, const KEPT: usize, const SLOTS: usize, const COUNT: usize>(
    x_map: In<u64>,
    weight_map: In<u64>,
    residual: InOut<f32>,
    tokens: u32,
    outputs: u32,
    part: u32,
    segments: u32,
) where
    [f32; COUNT]: Sums,
{
    const { assert!(COUNT * 2 == OUTPUTS && KEPT <= COUNT && KEPT.is_multiple_of(4) && COUNT.is_multiple_of(4)) };
    const { assert!(OUTPUTS.is_multiple_of(8 * AT_ONCE)) };
    let layout = const { Layout { outputs: OUTPUTS, kept: KEPT, slots: SLOTS } };
    let (slot_elements, box_rows) = (layout.slot(), layout.box_rows());
    thread::allow_successor();
    let ring: Shared<bf16> = shared::dynamic(0, SLOTS * slot_elements);
    let barriers = Barriers::new(shared::dynamic(layout.ring(), 2 * SLOTS));
    let shared_totals: Shared<f32> = shared::dynamic(layout.ring() + 2 * SLOTS * 8, layout.shared_totals());
    let (thread, warp, lane) = (thread::thread_idx_x(), thread::warp_id() as usize, thread::lane_id());
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
    let first_token = thread::block_idx_x() * TOKENS as u32;
    let first_output = thread::block_idx_y() * OUTPUTS as u32;
    // Outputs of the tile that there are.
    let there = if outputs - first_output < OUTPUTS as u32 { outputs - first_output } else { OUTPUTS as u32 };
    let stages = part / STAGE as u32;

    // The other lanes of the warp that asks have nothing to wait for. No block ends before its other threads have waited.
    if warp >= GROUPS * 4 {
        leave_registers::<24>();
        if warp == GROUPS * 4 && lane == 0 {
            let total = stages * segments;
            let ask_for_weights = |stage: u32, slot: usize| {
                barriers.arrive_and_expect(slot, (slot_elements * 2) as u32);
                let of_rank = rank as usize * box_rows;
                let (to, row) = (slot * slot_elements + (TOKENS + of_rank) * STAGE, first_output + of_rank as u32);
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
            let early = if total < SLOTS as u32 { total } else { SLOTS as u32 };
            for stage in 0..early {
                ask_for_weights(stage, stage as usize);
            }
            thread::wait_for_predecessors();
            for stage in 0..early {
                ask_for_tokens(stage, stage as usize);
            }
            let (mut slot, mut parity) = (0, 0);
            for stage in early..total {
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
        take_registers::<240>();
        thread::wait_for_predecessors();
        let stages_of_both = Ring {
            a: Operand::new(&ring, warp / 4 * ROWS * STAGE),
            b: Operand::new(&ring, TOKENS * STAGE),
            slot_bytes: (slot_elements * 2) as u32,
            slots: SLOTS as u32,
            barriers,
            cluster: CLUSTER as u32,
        };
        let mut place = Place::FIRST;
        // What added to anything leaves it as it is.
        let mut totals = [-0.0f32; KEPT];
        // Of four of a thread's totals, those of all threads lie side by side.
        let shared_total = |four: usize| (four * GROUPS * 128 + thread as usize) * 4;
        for four in 0..(COUNT - KEPT) / 4 {
            shared_totals.store(shared_total(four), [-0.0f32; 4]);
        }
        for _ in 0..segments {
            let mut sums = [0.0; COUNT];
            sums.add_stages(&stages_of_both, &mut place, stages);
            for at in 0..KEPT {
                totals[at] += sums[at];
            }
            for four in 0..(COUNT - KEPT) / 4 {
                let mut values: [f32; 4] = shared_totals.load(shared_total(four));
                for at in 0..4 {
                    values[at] += sums[KEPT + four * 4 + at];
                }
                shared_totals.store(shared_total(four), values);
            }
        }
        for half in 0..2 {
            let token = first_token + warp as u32 * 16 + lane / 4 + half as u32 * 8;
            if token >= tokens {
                continue;
            }
            let start = token as usize * outputs as usize + first_output as usize;
            residual.check(start, there as usize);
            let place =
                |eight: usize| ((eight as u32 * 8) < there).then_some(start + eight * 8 + lane as usize % 4 * 2);
            for first in (0..OUTPUTS / 8).step_by(AT_ONCE) {
                // All of these are on their way before the first is there.
                let mut before = [[0.0f32; 2]; AT_ONCE];
                for next in 0..AT_ONCE {
                    if let Some(place) = place(first + next) {
                        // SAFETY: in the row (checked above, once, so that no load waits for another), at a multiple of 8 bytes.
                        before[next] = unsafe { residual.load_unchecked(place) };
                    }
                }
                for next in 0..AT_ONCE {
                    let at = (first + next) * 4 + half * 2;
                    let [low, high] = if at < KEPT {
                        [totals[at], totals[at + 1]]
                    } else {
                        shared_totals.load(shared_total((at - KEPT) / 4) + half * 2)
                    };
                    if let Some(place) = place(first + next) {
                        residual.store(place, [low + before[next][0], high + before[next][1]]);
                    }
                }
            }
        }
    }
    // A block's memory has to be there as long as the other copies into it or arrives at its barriers.
    sync_cluster();
}

macro_rules! long_residual_kernel {
    ($name:ident, $layout:ident) => {
        /// A linear layer with K in equal, consecutive segments, added to the residual stream: residual\[m, n\] += the sums of
        /// the segments, each the chain of [`crate::linear`] from 0, added in order. The bits of [`crate::linear::linear_f32()`] of each
        /// segment followed by [`crate::residual_add`].
        ///
        /// - `x_map`: the tensor map of x, bf16 \[M, K\], in boxes of 64 of k and 128 rows; `weight_map`: that of the weight, bf16
        ///   \[N, K\], in boxes of 64 of k and half of the layout's outputs; `residual`: f32 \[M, N\].
        /// - grid (2 ceil(M / 256), ceil(N / outputs)); a block makes 128 tokens' sums of the layout's outputs.
        /// - bytes: 2 (N K + M K) + 8 M N, with weights once per 256 tokens and tokens once per tile of the outputs.
        /// - the caller: `part` = K / `segments` is a multiple of 64, N of 8; [`Layout::shared_bytes`] of dynamic shared memory; an
        ///   `sm_90a` image. The weight is read before the kernels ahead have ended.
        #[kernel(block = 384, min_blocks = 1, cluster = 2)]
        pub fn $name(
            x_map: In<u64>,
            weight_map: In<u64>,
            residual: InOut<f32>,
            tokens: u32,
            outputs: u32,
            part: u32,
            segments: u32,
        ) {
            long_residual::<{ $layout.outputs }, { $layout.kept }, { $layout.slots }, { $layout.outputs / 2 }>(
                x_map, weight_map, residual, tokens, outputs, part, segments,
            );
        }
    };
}
long_residual_kernel!(wgmma_long_residual_112, OUTPUTS_112);
long_residual_kernel!(wgmma_long_residual_224, OUTPUTS_224);
