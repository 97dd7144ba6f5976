//! What every phase looks up in shared memory: its numbers, and which of its groups are the block's.

use cuda_std::prelude::*;

use super::LAYER_WORDS;
use super::map::{self, Front};
use super::plan::{ATTENTION, Cut, Linear, PHASES, REPLICAS, Shape};

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
    /// The first of the words that it makes, in the first replica.
    pub(super) to: u32,
    /// The first word of the residual stream that its outputs are added to.
    pub(super) residual: u32,
    /// Words from a replica to the next.
    pub(super) replica: u32,
}

impl Phase {
    /// Words of one in shared memory.
    pub(super) const WORDS: usize = 12;

    /// Puts a layer's phases, and the head, into shared memory: a thread each.
    #[inline(always)]
    pub(super) fn put_all<const LONG: bool>(memory: Shared<u8>, shape: Shape, front: Front, most_spans: u32) {
        let memory: Shared<u32> = memory.part(map::PHASES, (PHASES as usize + 1) * Self::WORDS);
        let words = shape.words();
        // The replica that the block reads.
        let replica = thread::block_idx_x() % REPLICAS * words.replica;
        let [attended, gated] = [words.attended + replica, words.gated + replica];
        let [after_output, after_down] = [words.after_output + replica, words.after_down + replica];
        // A word of the phase before attention's result.
        let attending =
            if LONG { shape.partials(most_spans).started + thread::block_idx_x() % REPLICAS * 16 } else { words.qkv };
        let number = thread::thread_idx_x();
        let (linear, early, from, to, residual) = match number {
            0 => (Linear::Qkv, [gated, 1], [after_down, 1], words.qkv, 0),
            2 => (Linear::Output, [attending, 0], [attended, 0], words.after_output, after_down),
            3 => (Linear::GateUp, [attended, 0], [after_output, 0], words.gated, 0),
            4 => (Linear::Down, [after_output, 0], [gated, 0], words.after_down, after_output),
            5 => (Linear::Head, [gated, 1], [after_down, 1], 0, 0),
            _ => return,
        };
        let cut = shape.linear(linear);
        let inputs = if Cut::has_gain(linear) { front.normed } else { front.collected };
        let at = number as usize * Self::WORDS;
        memory.store(at, [cut.rows, cut.width, cut.halvings, inputs]);
        memory.store(at + 4, [early[0], early[1], from[0], from[1]]);
        memory.store(at + 8, [to, residual, words.replica, 0]);
    }

    #[inline(always)]
    pub(super) fn read(memory: Shared<u8>, linear: Linear) -> Self {
        let memory: Shared<u32> = memory.part(map::PHASES, (PHASES as usize + 1) * Self::WORDS);
        let at = linear.phase() as usize * Self::WORDS;
        let [rows, width, halvings, inputs] = memory.load(at);
        let [early, early_lag, from, from_lag] = memory.load(at + 4);
        let [to, residual, replica, _] = memory.load(at + 8);
        Self { rows, width, halvings, inputs, early: [early, early_lag], from: [from, from_lag], to, residual, replica }
    }
}

/// The groups of a block in a phase: `first`, and then every so many as there are blocks in it.
#[derive(Clone, Copy)]
pub(super) struct Share {
    first: u32,
    pub(super) count: u32,
    blocks: u32,
}

/// Blocks that take part in a phase of a layer, or in the head. Where few blocks attend, those do nothing else in a layer: the room for
/// keys and values that they hold free is room for weights with the others. Where blocks share spans (`LONG`), all take part in all.
#[inline(always)]
fn blocks<const LONG: bool>(shape: Shape, phase: u32) -> u32 {
    let grid = thread::grid_dim_x();
    let all = LONG || matches!(phase, ATTENTION | PHASES) || shape.kv_heads * LEAST_BLOCKS_FOR_EACH > grid;
    if all { grid } else { grid - shape.kv_heads }
}

/// Blocks for each that attends, with which those that attend do nothing else.
const LEAST_BLOCKS_FOR_EACH: u32 = 32;

impl Share {
    /// Where a block's groups in a phase are.
    #[inline(always)]
    fn place(memory: Shared<u8>, layer: u32, phase: u32) -> Shared<u32> {
        let at = layer * map::LAYER_BYTES as u32 + phase % PHASES * 8;
        memory.part(map::LAYERS + LAYER_WORDS * 8 + at as usize, 2)
    }

    /// The block's groups in a phase of a layer; of the head, where the phase is [`PHASES`].
    #[inline(always)]
    pub(super) fn read<const LONG: bool>(memory: Shared<u8>, shape: Shape, layer: u32, phase: u32) -> Self {
        let [first, count] = Self::place(memory, layer, phase).load(0);
        Self { first, count, blocks: blocks::<LONG>(shape, phase) }
    }

    /// The block's group number `turn`.
    #[inline(always)]
    pub(super) fn group(self, turn: u32) -> u32 {
        self.first + turn * self.blocks
    }
}

/// Deals the groups of all phases round the blocks, and puts the block's into shared memory, as [`Share`]s. Attention is always the
/// last blocks': its code is long, and a multiprocessor that runs it once in many layers would fetch it each time.
#[inline(always)]
pub(super) fn deal<const LONG: bool>(shape: Shape, layers: u32, memory: Shared<u8>) {
    let block = thread::block_idx_x();
    let mut before = 0;
    let mut in_layer = 0;
    for phase in (0..PHASES).filter(|&phase| phase != ATTENTION) {
        in_layer += shape.groups(phase);
    }
    for phase in 0..=PHASES {
        let (groups, blocks) = (shape.groups(phase), blocks::<LONG>(shape, phase));
        let mut layer = if phase < PHASES { thread::thread_idx_x() } else { layers };
        while layer < layers || (phase == PHASES && layer == layers) {
            let start = if phase < PHASES { layer * in_layer + before } else { layers * in_layer } % blocks;
            let first = match phase {
                ATTENTION => blocks - 1 - block,
                _ if block >= start => block - start,
                _ => block + blocks - start,
            };
            let count = if block < blocks && first < groups { (groups - first - 1) / blocks + 1 } else { 0 };
            Share::place(memory, layer, phase).store(0, [first, count]);
            layer += thread::block_dim_x();
        }
        if phase != ATTENTION {
            before += groups;
        }
    }
}
