//! A unit of weights times its inputs, by one warp: a chain of tensor-core products, as [`crate::linear`] has it.

use cuda_std::prelude::*;

use crate::weight_ring::{PAD, Ring};

/// Inputs (k) that a warp has in registers at a time. K, and a segment of it, is a multiple.
pub const STAGE: u32 = 64;

/// The weights of a stage, and its inputs.
type Weights = [[u32; 4]; STAGE as usize / 16];
type InputPairs = [[[u32; 2]; 2]; STAGE as usize / 32];

/// The chain of a unit: some rows (8 or 16) of a weight, and some of its columns.
#[derive(Clone, Copy)]
pub(super) struct Chain {
    weights: mma::ReadA,
    /// Of the first stage.
    first: Weights,
    width: u32,
}

impl Chain {
    /// Waits for the unit.
    #[inline(always)]
    pub(super) fn begin(memory: Shared<u8>, ring: Ring, unit: u32, rows: u32, width: u32) -> Self {
        let at = ring.wait(unit);
        let row = (width + PAD) as usize;
        let weight: Shared<bf16> = memory.part(at as usize, rows as usize * row);
        let weights = mma::ReadA::of(&weight, 0, row, rows as usize);
        Self { weights, first: Self::stage(&weights, 0), width }
    }

    #[inline(always)]
    fn stage(weights: &mma::ReadA, k: u32) -> Weights {
        let mut stage = [[0; 4]; STAGE as usize / 16];
        for s in 0..STAGE as usize / 16 {
            stage[s] = weights.load(k as usize + s * 16);
        }
        stage
    }

    /// The chain with inputs \[length + PAD\] from column `first` on; frees the unit. A lane has the sums of row g of the
    /// first 8 rows, and of the other 8.
    #[inline(always)]
    pub(super) fn sums(self, ring: Ring, unit: u32, input: Shared<bf16>, length: u32, first: u32) -> [f32; 2] {
        let inputs = mma::ReadBSteps::of(&input, first as usize, (length + PAD) as usize, 1);
        let stage = |k: u32| {
            let mut pairs: InputPairs = [[[0; 2]; 2]; STAGE as usize / 32];
            for s in 0..STAGE as usize / 32 {
                pairs[s] = inputs.load(k as usize + s * 32);
            }
            pairs
        };
        let mut sums = [0.0f32; 4];
        // A product waits for the one before it; what the next stage needs is read in between.
        let mut half = |weight: &Weights, input: &InputPairs, next: u32| {
            let mut after = ([[0; 4]; STAGE as usize / 16], [[[0; 2]; 2]; STAGE as usize / 32]);
            for s in 0..STAGE as usize / 16 {
                sums = mma::m16n8k16_bf16(weight[s], input[s / 2][s % 2], sums);
                after.0[s] = self.weights.load(next as usize + s * 16);
                if s % 2 == 0 {
                    after.1[s / 2] = inputs.load(next as usize + s * 16);
                }
            }
            after
        };
        let (mut weight, mut input) = (self.first, stage(0));
        let mut k = 0;
        while k + STAGE < self.width {
            let after = half(&weight, &input, k + STAGE);
            let next = if k + 2 * STAGE < self.width { k + 2 * STAGE } else { 0 };
            (weight, input) = half(&after.0, &after.1, next);
            k += 2 * STAGE;
        }
        if k < self.width {
            for s in 0..STAGE as usize / 16 {
                sums = mma::m16n8k16_bf16(weight[s], input[s / 2][s % 2], sums);
            }
        }
        warp::sync_warp();
        if thread::lane_id() == 0 {
            ring.free(unit);
        }
        // Every column of the product is this one token.
        [sums[0], sums[2]]
    }
}
