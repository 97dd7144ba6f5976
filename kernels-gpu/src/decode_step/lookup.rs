//! What every phase looks up in shared memory: its numbers, and which of its groups are the block's.

use cuda_std::prelude::*;

use super::LAYER_WORDS;
use super::map::{self, Front};
use super::plan::{Cut, Linear, PHASES, Shape};

/// A linear layer's phase, as the warps that compute find it in shared memory: reading it costs less than computing it, or
/// than registers that hold it through attention.
#[derive(Clone, Copy)]
pub(super) struct Phase {
    /// Rows of a group.
    pub(super) rows: u32,
    /// K.
    pub(super) width: u32,
    /// Segments of K are 2 to the power of this.
    pub(super) halvings: u32,
    /// Where its inputs are in dynamic shared memory, in bytes: \[width + PAD\].
    pub(super) inputs: u32,
    /// A word of the phase before, and how far its tag is behind the layer's.
    pub(super) early: [u32; 2],
    /// The first of the words that are its inputs, and how far their tags are behind the layer's.
    pub(super) from: [u32; 2],
    /// The first of the words that it makes.
    pub(super) to: u32,
}

impl Phase {
    /// Words of one in shared memory.
    pub(super) const WORDS: usize = 12;

    /// Puts a layer's phases, and the head, into shared memory: a thread each.
    #[inline(always)]
    pub(super) fn put_all(memory: Shared<u8>, shape: Shape, front: Front) {
        let memory: Shared<u32> = memory.part(map::PHASES, (PHASES as usize + 1) * Self::WORDS);
        let words = shape.words();
        let number = thread::thread_idx_x();
        let (linear, early, from, to) = match number {
            0 => (Linear::Qkv, [words.gated, 1], [words.after_down, 1], words.qkv),
            2 => (Linear::Output, [words.qkv, 0], [words.attended, 0], words.after_output),
            3 => (Linear::GateUp, [words.attended, 0], [words.after_output, 0], words.gated),
            4 => (Linear::Down, [words.after_output, 0], [words.gated, 0], words.after_down),
            5 => (Linear::Head, [words.gated, 1], [words.after_down, 1], 0),
            _ => return,
        };
        let cut = shape.linear(linear);
        let inputs = if Cut::has_gain(linear) { front.normed } else { front.collected };
        let at = number as usize * Self::WORDS;
        memory.store(at, [cut.rows, cut.width, cut.halvings, inputs]);
        memory.store(at + 4, [early[0], early[1], from[0], from[1]]);
        memory.set(at + 8, to);
    }

    #[inline(always)]
    pub(super) fn read(memory: Shared<u8>, linear: Linear) -> Self {
        let memory: Shared<u32> = memory.part(map::PHASES, (PHASES as usize + 1) * Self::WORDS);
        let number = if linear == Linear::Head { PHASES } else { linear.phase() };
        let at = number as usize * Self::WORDS;
        let [rows, width, halvings, inputs] = memory.load(at);
        let [early, early_lag, from, from_lag] = memory.load(at + 4);
        Self {
            rows,
            width,
            halvings,
            inputs,
            early: [early, early_lag],
            from: [from, from_lag],
            to: memory.get(at + 8),
        }
    }
}

/// The groups of a block in a phase: `first`, and then every so many as there are blocks.
#[derive(Clone, Copy)]
pub(super) struct Share {
    first: u32,
    pub(super) count: u32,
}

impl Share {
    /// Where a block's groups in a phase are.
    #[inline(always)]
    fn place(memory: Shared<u8>, layer: u32, phase: u32) -> Shared<u32> {
        let at = layer * map::LAYER_BYTES as u32 + phase * 8;
        memory.part(map::LAYERS + LAYER_WORDS * 8 + at as usize, 2)
    }

    /// The block's groups in a phase.
    #[inline(always)]
    pub(super) fn read(memory: Shared<u8>, layer: u32, phase: u32) -> Self {
        let [first, count] = Self::place(memory, layer, phase).load(0);
        Self { first, count }
    }

    /// The block's group number `turn`.
    #[inline(always)]
    pub(super) fn group(self, turn: u32) -> u32 {
        self.first + turn * thread::grid_dim_x()
    }
}

/// Deals the groups of all phases round the blocks, and puts the block's into shared memory, as [`Share`]s.
#[inline(always)]
pub(super) fn deal(shape: Shape, layers: u32, memory: Shared<u8>) {
    let (grid, block) = (thread::grid_dim_x(), thread::block_idx_x());
    let mut before = 0;
    let mut in_layer = 0;
    for phase in 0..PHASES {
        in_layer += shape.groups(phase);
    }
    for phase in 0..=PHASES {
        let groups = shape.groups(phase);
        let mut layer = if phase < PHASES { thread::thread_idx_x() } else { layers };
        while layer < layers || (phase == PHASES && layer == layers) {
            let start = if phase < PHASES { layer * in_layer + before } else { layers * in_layer } % grid;
            let first = if block >= start { block - start } else { block + grid - start };
            let count = if first < groups { (groups - first - 1) / grid + 1 } else { 0 };
            Share::place(memory, layer, phase % PHASES).store(0, [first, count]);
            layer += thread::block_dim_x();
        }
        before += groups;
    }
}
