//! A whole decode step of one token in one kernel: a block on each multiprocessor, which all run from the embedding to the head.
//!
//! Such a step reads every weight once and computes little. Between two kernels memory idles; inside one, a warp of each
//! block streams the block's weights through shared memory ([`crate::weight_ring`]) without ever waiting for a value, as much
//! as a layer ahead. What is left is the way of the values from layer to layer. Blocks hand them to each other as tagged
//! words ([`cuda_std::tagged`]): who finds a value's tag has the value, so that no block waits for a flag, and none for a
//! block whose values it does not need.
//!
//! The bits are those of the separate operations: the chains of [`crate::linear`], the reduction tree of [`crate::rms_norm`],
//! the spans of [`crate::attention`], the same arithmetic and rounding around them.
//!
//! Phases of a layer (a group is the outputs that a block computes together; groups go round the blocks, phase after phase, so
//! that all stream the same amount):
//!
//! | phase | group | from | to |
//! | --- | --- | --- | --- |
//! | QKV | 8 outputs of a head's first half and their partners | residual stream | queries; key and value, also in pages |
//! | attention | the query heads of a KV head | queries, newest key and value, pages | attended values |
//! | output | 8 outputs | attended values | residual stream |
//! | gate and up | 8 gates and their ups | residual stream | gated values |
//! | down | 8 outputs | gated values | residual stream |
//!
//! A word is overwritten a layer later. By then nobody reads it: what is written depends on values of every block that
//! read it, since each phase needs all values of the phase before.
//!
//! What counts here is how long a lone warp takes from one value to the next. So nothing may be spilled to local memory, which is
//! behind a first-level cache that shared memory leaves no room for, and what every phase needs is looked up in shared memory.

use cuda_std::prelude::*;
use cuda_std::tagged::Tagged;
use cuda_std::{bulk, shared};

use crate::attention_decode::MAX_RATIO;
use crate::attention_decode_short::{Inputs, Task, apart_bytes, attend, warps};
use crate::kv_write::PAGE;
use crate::rank;
use crate::rms_norm::REDUCTION_LANES;
use crate::silu_mul::gated;
use crate::weight_ring::{CONTROL_BYTES, Filler, PAD, Ring};

/// Warps that compute; one more streams weights.
pub const WARPS: u32 = 7;

/// Threads that compute.
const THREADS: u32 = WARPS * 32;

/// Words of a layer in the table of layers: the addresses of its first norm's gain, QKV weight, bias (0: none), output weight,
/// second norm's gain, gate and up weight, down weight, key pages and value pages.
pub const LAYER_WORDS: usize = 9;

/// Phases of a layer.
const PHASES: u32 = 5;

/// Inputs (k) that a warp has in registers at a time. K, and a segment of it, is a multiple.
pub const STAGE: u32 = 64;

/// Most columns C of the residual stream: 8 for each lane of the reduction.
pub const MOST_HIDDEN: u32 = REDUCTION_LANES as u32 * 8;

/// Where things are in dynamic shared memory, in bytes: the ring's barriers first.
mod place {
    use super::*;

    /// Sums of squares of a row's four parts.
    pub(super) const SQUARES: usize = CONTROL_BYTES;
    /// The token's position, its page table, and the page that it is in.
    pub(super) const TOKEN: usize = SQUARES + 16;
    /// [`Phase`]s of a layer, and of the head.
    pub(super) const PHASES: usize = TOKEN + 4 * 4;
    /// Maxima and sums of spans.
    pub(super) const STATISTICS: usize = PHASES + (super::PHASES as usize + 1) * Phase::WORDS * 4;
    /// Sums of segments.
    pub(super) const PARTIALS: usize = STATISTICS + 4 * MAX_RATIO * 2 * 4;
    /// Of each thread, its best token.
    pub(super) const BEST: usize = PARTIALS + THREADS as usize * 4;
    /// A record for each layer: its addresses, then the block's groups in each phase; then one for the head.
    pub(super) const LAYERS: usize = (BEST + THREADS as usize * 8).next_multiple_of(16);
    /// Bytes of a record.
    pub(super) const LAYER_BYTES: usize = LAYER_WORDS * 8 + super::PHASES as usize * 8;
}

/// What comes behind, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    /// Normalised inputs, \[C + [`PAD`]\].
    pub normed: u32,
    /// Inputs of the down projection and the attention output layer, \[K + [`PAD`]\].
    pub collected: u32,
    /// The ring of weights.
    pub ring: u32,
}

/// A model's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The residual stream's width C.
    pub hidden: u32,
    /// Query heads H.
    pub heads: u32,
    /// KV heads G.
    pub kv_heads: u32,
    /// Width D of a head.
    pub head_width: u32,
    /// Feed-forward width F.
    pub ffn: u32,
    /// Segments of K of the attention output layer are 2 to the power of this.
    pub output_halvings: u32,
    /// The same of the down projection.
    pub down_halvings: u32,
    /// Tokens V of the vocabulary.
    pub vocab: u32,
}

/// Where the words of each phase start, and how many there are in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// \[(H + 2 G) D\]: queries f32, keys and values bf16.
    pub qkv: u32,
    /// \[H D / 2\]: pairs of bf16.
    pub attended: u32,
    /// \[C\]: the residual stream behind attention, f32.
    pub after_output: u32,
    /// \[F / 2\]: pairs of bf16.
    pub gated: u32,
    /// \[C\]: the residual stream behind the layer, f32.
    pub after_down: u32,
    /// Words.
    pub len: u32,
}

impl Shape {
    /// The same, of which nothing has been computed yet: each phase computes what it needs, rather than hold it in registers.
    #[inline(always)]
    fn anew(self) -> Self {
        let anew = thread::number_anew;
        Self {
            hidden: anew(self.hidden),
            heads: anew(self.heads),
            kv_heads: anew(self.kv_heads),
            head_width: self.head_width,
            ffn: anew(self.ffn),
            output_halvings: anew(self.output_halvings),
            down_halvings: anew(self.down_halvings),
            vocab: anew(self.vocab),
        }
    }

    /// H D.
    #[must_use]
    pub const fn query_width(self) -> u32 {
        self.heads * self.head_width
    }

    /// (H + 2 G) D.
    #[must_use]
    pub const fn qkv_width(self) -> u32 {
        (self.heads + 2 * self.kv_heads) * self.head_width
    }

    /// What a block has in dynamic shared memory, with a model of so many layers.
    #[must_use]
    pub const fn front(self, layers: u32) -> Front {
        let widest = if self.query_width() > self.ffn { self.query_width() } else { self.ffn };
        let normed = (place::LAYERS as u32 + (layers + 1) * place::LAYER_BYTES as u32).next_multiple_of(128);
        let collected = normed + ((self.hidden + PAD) * 2).next_multiple_of(128);
        Front { normed, collected, ring: collected + ((widest + PAD) * 2).next_multiple_of(128) }
    }

    /// Groups of a phase of a layer; of the head, where the phase is [`PHASES`].
    #[inline(always)]
    fn groups(self, phase: u32) -> u32 {
        match phase {
            0 => self.linear(Linear::Qkv).groups,
            1 => self.kv_heads,
            2 => self.linear(Linear::Output).groups,
            3 => self.linear(Linear::GateUp).groups,
            4 => self.linear(Linear::Down).groups,
            _ => self.linear(Linear::Head).groups,
        }
    }

    /// Where words are.
    #[must_use]
    pub const fn words(self) -> Words {
        let attended = self.qkv_width();
        let after_output = attended + self.query_width() / 2;
        let gated = after_output + self.hidden;
        let after_down = gated + self.ffn / 2;
        Words { qkv: 0, attended, after_output, gated, after_down, len: after_down + self.hidden }
    }

    /// A linear layer.
    #[inline(always)]
    fn linear(self, linear: Linear) -> Cut {
        match linear {
            Linear::Qkv => Cut { groups: self.qkv_width() / 16, rows: 16, width: self.hidden, halvings: 0 },
            Linear::Output => {
                Cut { groups: self.hidden / 8, rows: 8, width: self.query_width(), halvings: self.output_halvings }
            }
            Linear::GateUp => Cut { groups: self.ffn / 8, rows: 16, width: self.hidden, halvings: 0 },
            Linear::Down => Cut { groups: self.hidden / 8, rows: 8, width: self.ffn, halvings: self.down_halvings },
            Linear::Head => Cut { groups: self.vocab.div_ceil(16), rows: 16, width: self.hidden, halvings: 0 },
        }
    }
}

/// The phases that read weights.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Linear {
    Qkv,
    Output,
    GateUp,
    Down,
    Head,
}

impl Linear {
    /// Its number among a layer's phases; of the head that of a further layer's first.
    #[inline(always)]
    fn phase(self) -> u32 {
        match self {
            Self::Qkv | Self::Head => 0,
            Self::Output => 2,
            Self::GateUp => 3,
            Self::Down => 4,
        }
    }

    /// The phase behind it, and its layer.
    #[inline(always)]
    fn next(self, layer: u32, layers: u32) -> (Self, u32) {
        match self {
            Self::Qkv => (Self::Output, layer),
            Self::Output => (Self::GateUp, layer),
            Self::GateUp => (Self::Down, layer),
            Self::Down | Self::Head if layer + 1 < layers => (Self::Qkv, layer + 1),
            Self::Down | Self::Head => (Self::Head, layer + 1),
        }
    }
}

/// How a linear layer is cut: into groups of so many rows, each of these into segments of K.
#[derive(Clone, Copy)]
struct Cut {
    groups: u32,
    rows: u32,
    /// K.
    width: u32,
    /// Segments of K are 2 to the power of this.
    halvings: u32,
}

impl Cut {
    /// Whether inputs are the normalised residual stream: then the first unit of a block is the gain.
    #[inline(always)]
    fn has_gain(linear: Linear) -> bool {
        !matches!(linear, Linear::Output | Linear::Down)
    }
}

/// A linear layer's phase, as the warps that compute find it in shared memory: reading it costs less than computing it, or
/// than registers that hold it through attention.
#[derive(Clone, Copy)]
struct Phase {
    /// Rows of a group.
    rows: u32,
    /// K.
    width: u32,
    /// Segments of K are 2 to the power of this.
    halvings: u32,
    /// Where its inputs are in dynamic shared memory, in bytes: \[width + PAD\].
    inputs: u32,
    /// A word of the phase before, and how far its tag is behind the layer's.
    early: [u32; 2],
    /// The first of the words that are its inputs, and how far their tags are behind the layer's.
    from: [u32; 2],
    /// The first of the words that it makes.
    to: u32,
}

impl Phase {
    /// Words of one in shared memory.
    const WORDS: usize = 12;

    /// Puts a layer's phases, and the head, into shared memory: a thread each.
    #[inline(always)]
    fn put_all(memory: Shared<u8>, shape: Shape, front: Front) {
        let memory: Shared<u32> = memory.part(place::PHASES, (PHASES as usize + 1) * Self::WORDS);
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
    fn read(memory: Shared<u8>, linear: Linear) -> Self {
        let memory: Shared<u32> = memory.part(place::PHASES, (PHASES as usize + 1) * Self::WORDS);
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
struct Share {
    first: u32,
    count: u32,
}

impl Share {
    /// The block's group number `turn`.
    #[inline(always)]
    fn group(self, turn: u32) -> u32 {
        self.first + turn * thread::grid_dim_x()
    }
}

/// Where a block's groups in a phase are.
#[inline(always)]
fn share_place(memory: Shared<u8>, layer: u32, phase: u32) -> Shared<u32> {
    let at = layer * place::LAYER_BYTES as u32 + phase * 8;
    memory.part(place::LAYERS + LAYER_WORDS * 8 + at as usize, 2)
}

/// Deals the groups of all phases round the blocks, and puts the block's into shared memory: its first, and how many, above.
#[inline(always)]
fn deal(shape: Shape, layers: u32, memory: Shared<u8>) {
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
            share_place(memory, layer, phase % PHASES).store(0, [first, count]);
            layer += thread::block_dim_x();
        }
        before += groups;
    }
}

/// What all of a launch's threads know.
#[derive(Clone, Copy)]
struct Step<'a> {
    shape: Shape,
    ids: In<'a, u32>,
    embedding: In<'a, bf16>,
    /// The block's dynamic shared memory.
    memory: Shared<u8>,
    layers: u32,
    final_gain: In<'a, bf16>,
    head: In<'a, bf16>,
    rope_table: In<'a, f32>,
    page_tables: In<'a, u32>,
    words: Tagged<'a>,
    page_elements: usize,
    tag: u32,
    eps: f32,
    scale: f32,
}

impl<'a> Step<'a> {
    /// As [`Shape::anew`].
    #[inline(always)]
    fn anew(self) -> Self {
        Self { shape: self.shape.anew(), memory: self.memory.anew(), ..self }
    }

    /// The address of number `place` of a layer's buffers.
    #[inline(always)]
    fn address(&self, layer: u32, place: u32) -> u64 {
        let at = place::LAYERS as u32 + layer * place::LAYER_BYTES as u32 + place * 8;
        self.memory.part::<u64>(at as usize, 1).get(0)
    }

    /// Number `place` of a layer's buffers, of `length` elements.
    #[inline(always)]
    fn buffer(&self, layer: u32, place: u32, length: u32) -> In<'a, bf16> {
        // SAFETY: the table has the addresses of buffers of these lengths, which live while the step runs (the caller's duty).
        unsafe { In::at_address(self.address(layer, place), length as usize) }
    }

    /// The block's groups in a phase.
    #[inline(always)]
    fn share(&self, layer: u32, phase: u32) -> Share {
        let [first, count] = share_place(self.memory, layer, phase).load(0);
        Share { first, count }
    }

    /// The token's position, its page table, and the page that it is in.
    #[inline(always)]
    fn token(&self) -> [u32; 4] {
        self.memory.part::<u32>(place::TOKEN, 4).load(0)
    }

    /// The gain in front of a linear layer.
    #[inline(always)]
    fn gain(&self, linear: Linear, layer: u32) -> In<'a, bf16> {
        match linear {
            Linear::Qkv => self.buffer(layer, 0, self.shape.hidden),
            Linear::GateUp => self.buffer(layer, 4, self.shape.hidden),
            _ => self.final_gain,
        }
    }

    /// A linear layer's weight.
    #[inline(always)]
    fn weight(&self, linear: Linear, layer: u32) -> In<'a, bf16> {
        let shape = self.shape;
        let (place, rows, width) = match linear {
            Linear::Qkv => (1, shape.qkv_width(), shape.hidden),
            Linear::Output => (3, shape.hidden, shape.query_width()),
            Linear::GateUp => (5, 2 * shape.ffn, shape.hidden),
            Linear::Down => (6, shape.hidden, shape.ffn),
            Linear::Head => return self.head,
        };
        self.buffer(layer, place, rows * width)
    }

    /// The tag of what a layer computes. The one before is that of what it starts from.
    #[inline(always)]
    fn layer_tag(&self, layer: u32) -> u32 {
        self.tag.wrapping_add(1 + layer)
    }
}

/// Streams the block's weights, in the order of the phases.
#[inline(always)]
fn stream(step: &Step<'_>, ring: Ring, ahead: u32, pace: u32) {
    let mut filler = Filler::new(ring, ahead, pace);
    let (mut linear, mut layer) = (Linear::Qkv, 0);
    let layers = step.layers;
    loop {
        let shape = step.shape;
        if linear == Linear::Output {
            for _ in 0..step.share(layer, 1).count {
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

/// The lane and the warp, as [`Shape::anew`].
#[inline(always)]
fn place() -> (u32, u32) {
    let thread = thread::thread_idx_x_anew();
    (thread % 32, thread / 32)
}

/// The barrier of the warps that compute.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn sync() {
    thread::sync_some::<1, THREADS>();
}

/// The weights of a stage, and its inputs.
type Weights = [[u32; 4]; STAGE as usize / 16];
type InputPairs = [[[u32; 2]; 2]; STAGE as usize / 32];

/// The chain of a unit: some rows (8 or 16) of a weight, and some of its columns.
#[derive(Clone, Copy)]
struct Chain {
    weights: mma::ReadA,
    /// Of the first stage.
    first: Weights,
    width: u32,
}

impl Chain {
    /// Waits for the unit.
    #[inline(always)]
    fn begin(memory: Shared<u8>, ring: Ring, unit: u32, rows: u32, width: u32) -> Self {
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
    fn sums(self, ring: Ring, unit: u32, input: Shared<bf16>, length: u32, first: u32) -> [f32; 2] {
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

/// Normalises the residual stream into shared memory: the arithmetic of [`crate::rms_norm`], by four warps, each of them 32 of the
/// reduction's lanes. The stream is in the words from `start` on, the gain is a unit.
#[inline(always)]
fn normalise(step: &Step<'_>, inputs: u32, ring: Ring, unit: u32, start: u32, tag: u32) {
    const PARTS: u32 = REDUCTION_LANES as u32 / 32;
    let width = step.shape.hidden;
    let (lane, part) = place();
    if part >= PARTS {
        return;
    }
    let input: Shared<bf16> = step.memory.part(inputs as usize, (width + PAD) as usize);
    let squares: Shared<f32> = step.memory.part(place::SQUARES, 4);
    let gain: Shared<bf16> = step.memory.part(ring.wait(unit) as usize, width as usize);
    let column = (part * 32 + lane) * 8;
    let has = column < width;
    let column = if has { column } else { 0 };
    let gains: [bf16; 8] = gain.load(column as usize);
    // SAFETY: words of the row, which starts evenly.
    let [pairs] = unsafe { step.words.wait_pairs::<1, 4, 2>([start + column], tag) };
    let mut sum = 0.0;
    for i in 0..8 {
        let value = f32::from_bits(pairs[i / 2][i % 2]);
        sum = math::fma(value, value, sum);
    }
    warp::sync_warp();
    let sum = warp::sum_f32(if has { sum } else { 0.0 });
    if lane == 0 {
        squares.set(part as usize, sum);
    }
    thread::sync_some::<3, { PARTS * 32 }>();
    let [a, b, c, d]: [f32; 4] = squares.load(0);
    let scale = 1.0 / math::sqrt(((a + b) + (c + d)) / width as f32 + step.eps);
    if has {
        let mut normed = [bf16::ZERO; 8];
        for i in 0..8 {
            normed[i] = f32_to_bf16(f32::from_bits(pairs[i / 2][i % 2]) * scale * bf16_to_f32(gains[i]));
        }
        input.store(column as usize, normed);
    }
}

/// Brings pairs of bf16 \[width / 2\] into shared memory, from the words from `start` on.
#[inline(always)]
fn collect(step: &Step<'_>, inputs: u32, start: u32, width: u32, tag: u32) {
    const AT_ONCE: usize = 6;
    let input: Shared<u32> = step.memory.part(inputs as usize, ((width + PAD) / 2) as usize);
    let total = width / 4;
    let mut base = thread::thread_idx_x_anew();
    while base < total {
        let count = (total - base).div_ceil(THREADS);
        // SAFETY: words of the row, of which `total` pairs are left from this one on; pairs start evenly.
        let pairs =
            unsafe { step.words.wait_some_pairs::<AT_ONCE, { THREADS as usize * 2 }>(start + base * 2, count, tag) };
        for i in 0..AT_ONCE {
            let place = base + i as u32 * THREADS;
            if place < total {
                input.store(place as usize * 2, pairs[i]);
            }
        }
        base += AT_ONCE as u32 * THREADS;
    }
}

/// What a lane's sums meet on their way out.
#[derive(Clone, Copy)]
struct Epilogue {
    /// Of QKV.
    bias: [bf16; 2],
    /// Of QKV: cosine and sine.
    rotation: [f32; 2],
    /// Of output and down: the residual stream.
    residual: f32,
}

impl Epilogue {
    const EMPTY: Self = Self { bias: [bf16::ZERO; 2], rotation: [0.0; 2], residual: 0.0 };

    /// Of a lane's row of a group. Everything is older than the phase's inputs. `seen`: the block had the residual stream
    /// behind attention as inputs of the phase before.
    #[inline(always)]
    fn read(step: &Step<'_>, linear: Linear, layer: u32, group: u32, g: u32, seen: bool) -> Self {
        let shape = step.shape;
        let mut one = Self::EMPTY;
        match linear {
            Linear::Qkv => {
                let (half, per_head) = (shape.head_width / 2, shape.head_width / 16);
                let (head, i) = (group / per_head, group % per_head * 8 + g);
                if step.address(layer, 2) != 0 {
                    let bias = step.buffer(layer, 2, shape.qkv_width());
                    let first = (head * shape.head_width + i) as usize;
                    one.bias = [bias.get(first), bias.get(first + half as usize)];
                }
                if head < shape.heads + shape.kv_heads {
                    one.rotation = step.rope_table.load((step.token()[0] * half + i) as usize * 2);
                }
            }
            Linear::Output => {
                let word = shape.words().after_down + group * 8 + g;
                // SAFETY: a word of the residual stream.
                one.residual = f32::from_bits(unsafe { step.words.wait(word, step.layer_tag(layer) - 1) });
            }
            Linear::Down => {
                let word = shape.words().after_output + group * 8 + g;
                // SAFETY: as above. A block that has seen all of the row does not wait again, and the value comes later.
                one.residual = f32::from_bits(unsafe {
                    if seen { step.words.peek(word) } else { step.words.wait(word, step.layer_tag(layer)) }
                });
            }
            Linear::GateUp | Linear::Head => {}
        }
        one
    }
}

/// Queries, keys and values: of one head, element i of its first half and of its second.
#[inline(always)]
fn put_qkv(step: &Step<'_>, layer: u32, group: u32, g: u32, [mut a, mut b]: [f32; 2], epilogue: Epilogue) {
    let shape = step.shape;
    let (width, half, per_head) = (shape.head_width, shape.head_width / 2, shape.head_width / 16);
    let (head, i) = (group / per_head, group % per_head * 8 + g);
    let Epilogue { bias, rotation: [cos, sin], .. } = epilogue;
    if step.address(layer, 2) != 0 {
        a += bf16_to_f32(bias[0]);
        b += bf16_to_f32(bias[1]);
    }
    if head < shape.heads + shape.kv_heads {
        (a, b) = (math::fma(a, cos, -(b * sin)), math::fma(b, cos, a * sin));
    }
    let (mut first, mut second) = (a.to_bits(), b.to_bits());
    if head >= shape.heads {
        let (a, b) = (f32_to_bf16(a), f32_to_bf16(b));
        (first, second) = (u32::from(a.to_bits()), u32::from(b.to_bits()));
        let is_key = head < shape.heads + shape.kv_heads;
        let [position, _, page, _] = step.token();
        let slot = position % PAGE as u32;
        let start = (page * shape.kv_heads + (head - shape.heads) % shape.kv_heads) as usize * PAGE * width as usize;
        let (place, step_to) =
            if is_key { (slot * width + i, half) } else { (i * PAGE as u32 + slot, half * PAGE as u32) };
        let address = step.address(layer, if is_key { 7 } else { 8 });
        // SAFETY: the address of the layer's pages. Of them only the step's own token is written, by one warp, and it is
        // not read as a page in this launch.
        let pages: Out<bf16> = unsafe { Out::at_address(address, step.page_elements) };
        pages.set(start + place as usize, a);
        pages.set(start + (place + step_to) as usize, b);
    }
    let word = shape.words().qkv + head * width + i;
    // SAFETY: words of the token's queries, keys and values.
    unsafe {
        step.words.store(word, first, step.layer_tag(layer));
        step.words.store(word + half, second, step.layer_tag(layer));
    }
}

/// Attention of the query heads of a KV head, by the first `AT_ONCE` warps. `STEPS` and so on as in [`attend`].
#[inline(always)]
fn attention<const AT_ONCE: usize, const STEPS: usize, const TILES: usize, const COPIES: usize, const ITEMS: usize>(
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
    let (lane, _) = place();
    let (g, t) = (lane / 4, lane % 4);
    let [position, table, ..] = step.token();
    // SAFETY: the addresses of the layer's pages; what is read of them was written before this launch.
    let pages = |place: u32| unsafe { In::at_address(step.address(layer, place), step.page_elements) };
    let base = ring.wait(unit);
    let word = words.qkv;
    let sync = || {
        if AT_ONCE == 4 { thread::sync_some::<2, 128>() } else { thread::sync_some::<2, 64>() }
    };
    attend::<AT_ONCE, STEPS, TILES, COPIES, ITEMS, true>(
        thread::thread_idx_x_anew() as usize,
        step.memory.part(place::STATISTICS, AT_ONCE * MAX_RATIO * 2),
        base as usize,
        Task {
            key_pages: pages(7),
            value_pages: pages(8),
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
            if has_last {
                let key = word + (shape.heads + kv_head) * width;
                let value = key + shape.kv_heads * width;
                if lane < width / 8 {
                    // SAFETY: words of the token's keys; a lane's are even.
                    let [pairs] = unsafe { step.words.wait_pairs::<1, 4, 2>([key + lane * 8], tag) };
                    for i in 0..8 {
                        inputs.1.0[i] = bits(pairs[i / 2][i % 2]);
                    }
                }
                for i in 0..STEPS / 2 {
                    // SAFETY: words of the token's values.
                    inputs.1.1[i] = bits(unsafe { step.words.wait(value + lane + i as u32 * 32, tag) });
                }
            }
            for half in 0..2 {
                let head = g + half as u32 * 8;
                if has_span && head < ratio {
                    let query = word + (kv_head * ratio + head) * width + t * 2;
                    // SAFETY: words of the token's queries; a lane's are even.
                    let [pairs] = unsafe { step.words.wait_pairs::<1, TILES, 8>([query], tag) };
                    for i in 0..TILES {
                        let [low, high] = pairs[i].map(f32::from_bits);
                        inputs.0[i / 2][i % 2 * 2 + half] = bf16_pair(low, high);
                    }
                }
            }
            warp::sync_warp();
            inputs
        },
        sync,
        |head, column, [a, b, c, d]| {
            let to = words.attended + ((kv_head * ratio + head as u32) * width + column as u32) / 2;
            // SAFETY: words of the row's attended values; columns are multiples of 4.
            unsafe { step.words.store_pair(to, [bf16_pair(a, b), bf16_pair(c, d)], tag) };
        },
    );
    bulk::release_to_copies();
    sync();
    if thread::thread_idx_x() == 0 {
        ring.free(unit);
    }
}

/// Brings a linear layer's inputs into shared memory. `tag` is the layer's. `idle`: the block took no part in the phase before.
#[inline(always)]
fn bring_inputs(step: &Step<'_>, ring: Ring, unit: u32, phase: Phase, normed: bool, tag: u32, idle: bool) {
    let [early, early_lag] = phase.early;
    // The first phase of all has nothing before it.
    if idle && tag - early_lag > step.tag {
        // Who is early waits for one value of the phase before: waiting for all of this one costs memory more.
        // SAFETY: the first word of a phase.
        let _ = unsafe { step.words.wait(early, tag - early_lag) };
    }
    let [from, lag] = phase.from;
    if !normed {
        collect(step, phase.inputs, from, phase.width, tag - lag);
    } else {
        normalise(step, phase.inputs, ring, unit, from, tag - lag);
    }
}

/// A block. The numbers are those of [`attend`].
#[inline(always)]
fn run<const AT_ONCE: usize, const STEPS: usize, const TILES: usize, const COPIES: usize, const ITEMS: usize>(
    step: Step<'_>,
    layers: In<u64>,
    [positions, row_tables]: [In<u32>; 2],
    logits: Out<f32>,
    best: Out<u64>,
    shared_bytes: u32,
    ahead: u32,
    pace: u32,
) {
    thread::wait_for_predecessors();
    let front = step.shape.front(step.layers);
    let memory = step.memory;
    deal(step.shape, step.layers, memory);
    Phase::put_all(memory, step.shape, front);
    let mut entry = thread::thread_idx_x() as usize;
    while entry < layers.len() {
        let at = place::LAYERS + entry / LAYER_WORDS * place::LAYER_BYTES + entry % LAYER_WORDS * 8;
        memory.part::<u64>(at, 1).set(0, layers.get(entry));
        entry += thread::block_dim_x() as usize;
    }
    if thread::thread_idx_x() == 0 {
        let (position, table) = (positions.get(0), row_tables.get(0));
        let page = step.page_tables.get(table as usize + position as usize / PAGE);
        memory.part::<u32>(place::TOKEN, 4).store(0, [position, table, page, 0]);
    }
    let ring = Ring::new(memory, front.ring, shared_bytes - front.ring);
    if thread::warp_id() == WARPS {
        stream(&step, ring, ahead, pace);
        return;
    }
    embed(&step);
    let layers = step.layers;
    let mut unit = 0u32;
    // The phase before in which the block took part: a linear layer's, attention's.
    let (mut busy, mut attended) = (false, false);
    let (mut linear, mut layer) = (Linear::Qkv, 0);
    let own = thread::thread_idx_x() as usize;
    memory.part::<u64>(place::BEST, THREADS as usize).set(own, 0);
    loop {
        let (step, ring) = (step.anew(), ring.anew());
        if linear == Linear::Output {
            let share = step.share(layer, 1);
            for turn in 0..share.count {
                if thread::thread_idx_x_anew() < AT_ONCE as u32 * 32 {
                    let group = share.group(turn);
                    let step = step.anew();
                    attention::<AT_ONCE, STEPS, TILES, COPIES, ITEMS>(&step, ring, layer, group, unit + turn);
                }
            }
            unit += share.count;
            attended = share.count > 0;
        }
        let phase = Phase::read(step.memory, linear);
        let share = step.share(layer, linear.phase());
        let tag = step.layer_tag(layer);
        let normed = Cut::has_gain(linear);
        let units = share.count << phase.halvings;
        let part = phase.width >> phase.halvings;
        let gain_unit = unit;
        if normed && units > 0 {
            unit += 1;
        }
        // Segments of a group are computed at once: there are 1, 2 or 4.
        let at_once = if phase.halvings > 0 { 4 } else { WARPS };
        let mut first = 0;
        while first < units {
            let (lane, warp) = place();
            let (g, t) = (lane / 4, lane % 4);
            let turn = first + warp;
            let (has, segment) = (warp < at_once && turn < units, turn & ((1 << phase.halvings) - 1));
            let group = share.group(turn >> phase.halvings);
            let mut epilogue = Epilogue::EMPTY;
            if has && segment == 0 && t == 0 {
                epilogue = Epilogue::read(&step, linear, layer, group, g, busy);
            }
            if first == 0 {
                // Inputs of this place are those of every other phase. The barrier of the one between, if the block was in it,
                // says that all have read them.
                if !busy {
                    sync();
                }
                bring_inputs(&step, ring, gain_unit, phase, normed, tag, !busy && !attended);
            }
            if first == 0 || phase.halvings > 0 {
                // Inputs are there; or all have read the partial sums of the turn before.
                sync();
            }
            if first == 0 && normed && thread::thread_idx_x() == 0 {
                ring.free(gain_unit);
            }
            let mut sums = [0.0f32; 2];
            if has {
                // Not earlier: units that do not fit the ring together must not wait for each other.
                let chain = Chain::begin(step.memory, ring, unit + turn, phase.rows, part);
                let inputs = step.memory.part(phase.inputs as usize, (phase.width + PAD) as usize);
                sums = chain.sums(ring, unit + turn, inputs, phase.width, segment * part);
            }
            if phase.halvings > 0 {
                let partials: Shared<f32> = step.memory.part(place::PARTIALS, THREADS as usize);
                if has && segment > 0 {
                    partials.set((warp * 32 + lane) as usize, sums[0]);
                }
                sync();
                if has && segment == 0 {
                    for other in 1..1 << phase.halvings {
                        sums[0] += partials.get(((warp + other) * 32 + lane) as usize);
                    }
                }
            }
            first += at_once;
            if !has || segment > 0 {
                continue;
            }
            match linear {
                Linear::GateUp => put_gated(&step, phase.to, tag, group, sums),
                Linear::Qkv if t == 0 => put_qkv(&step, layer, group, g, sums, epilogue),
                Linear::Head if t == 0 => {
                    for half in 0..2 {
                        let id = group * 16 + g + half as u32 * 8;
                        if id < step.shape.vocab {
                            if !logits.is_empty() {
                                logits.set(id as usize, sums[half]);
                            }
                            let bests: Shared<u64> = step.memory.part(place::BEST, THREADS as usize);
                            let key = rank::rank_key(sums[half], id as usize);
                            let held = bests.get(own);
                            bests.set(own, if key > held { key } else { held });
                        }
                    }
                }
                Linear::Output | Linear::Down if t == 0 => {
                    let value = epilogue.residual + sums[0];
                    // SAFETY: a word of the residual stream.
                    unsafe { step.words.store(phase.to + group * 8 + g, value.to_bits(), tag) };
                }
                _ => {}
            }
        }
        unit += units;
        (busy, attended) = (units > 0, false);
        if linear == Linear::Head {
            break;
        }
        (linear, layer) = linear.next(layer, layers);
    }
    put_best(memory.part(place::BEST, THREADS as usize), best);
}

/// The token's embedding: where the residual stream starts. Each block has its part.
#[inline(always)]
fn embed(step: &Step<'_>) {
    let shape = step.shape;
    let start = shape.words().after_down;
    let id = step.ids.get(0);
    let mut place = thread::block_idx_x() * THREADS + thread::thread_idx_x();
    while place < shape.hidden {
        let mut value = 0.0;
        // A step that is computed ahead may stand behind a row that chose nothing.
        if id != u32::MAX {
            value = bf16_to_f32(step.embedding.get(id as usize * shape.hidden as usize + place as usize));
        }
        // SAFETY: a word of the residual stream.
        unsafe { step.words.store(start + place, value.to_bits(), step.tag) };
        place += thread::grid_dim_x() * THREADS;
    }
}

/// The gated activation of a group's 8 gates and ups.
#[inline(always)]
fn put_gated(step: &Step<'_>, start: u32, tag: u32, group: u32, sums: [f32; 2]) {
    let (lane, _) = place();
    let (g, t) = (lane / 4, lane % 4);
    let own = gated(f32_to_bf16(sums[0]), f32_to_bf16(sums[1]));
    // A word has two neighbours.
    let other = f32::from_bits(warp::shuffle_xor_u32(own.to_bits(), 4));
    if t == 0 && g % 2 == 0 {
        // SAFETY: a word of the gated values.
        unsafe { step.words.store(start + group * 4 + g / 2, bf16_pair(own, other), tag) };
    }
}

/// The first token in the order of [`crate::rank`] among the block's, of which each thread has its own best.
#[inline(always)]
fn put_best(bests: Shared<u64>, best: Out<u64>) {
    sync();
    let (lane, warp) = place();
    if warp > 0 {
        return;
    }
    let mut key = 0;
    for warp in 0..WARPS {
        let other = bests.get((warp * 32 + lane) as usize);
        key = if other > key { other } else { key };
    }
    let mut distance = 1;
    while distance < 32 {
        let other = rank::shuffle_xor(key, distance);
        key = if other > key { other } else { key };
        distance *= 2;
    }
    if lane == 0 {
        best.set(thread::block_idx_x() as usize, key);
    }
}

macro_rules! step_kernel {
    ($name:ident, $width:literal) => {
        /// Logits, and for each block the first of its tokens in the order of [`crate::rank`], of a token that continues a sequence.
        ///
        /// - `ids`: u32 \[1\], `u32::MAX` for zeros; `embedding`, `head`: bf16 \[V, C\]; `layers`: u64 \[L,
        ///   [`LAYER_WORDS`]\], addresses; `final_gain`: bf16 \[C\]; `rope_table`: f32 \[positions, D/2, 2\]; `positions`,
        ///   `row_tables`: u32 \[1\]; `words`: u64 \[[`Words::len`]\], tagged words; `logits`: f32 \[V\] or empty; `best`: u64
        ///   \[blocks\]; weights of a layer as in [`crate::few_qkv`], [`crate::few_residual`] and [`crate::few_gate_up`].
        /// - grid: at most as many blocks as run at once; each has [`WARPS`] warps that compute and one that streams.
        /// - bytes: 2 per weight; the values between phases, 4 to 8 bytes each, are read by up to all blocks.
        /// - the caller: K of every layer is a multiple of [`STAGE`] times its segments (2 to the power of `halvings`: of
        ///   the attention output layer, and from bit 8 on of the down projection), C of 64 and at most [`MOST_HIDDEN`], F of 16,
        ///   D as the name says, H / G at most 16; `shared_bytes` of dynamic shared memory, in which [`Front`] and the
        ///   largest units fit. `tag` to `tag` + L are on no word; the position is not `u32::MAX`. Pages hold `page_elements`
        ///   keys or values in each layer. `ahead`: units of weights on their way at once; `pace`: clock cycles for each KiB.
        #[kernel(block = 256, min_blocks = 1)]
        pub fn $name(
            ids: In<u32>,
            embedding: In<bf16>,
            layers: In<u64>,
            final_gain: In<bf16>,
            head: In<bf16>,
            rope_table: In<f32>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            words: InOut<u64>,
            logits: Out<f32>,
            best: Out<u64>,
            heads: u32,
            kv_heads: u32,
            ffn: u32,
            vocab: u32,
            page_elements: u64,
            halvings: u32,
            shared_bytes: u32,
            ahead: u32,
            pace: u32,
            tag: u32,
            eps: f32,
            scale: f32,
        ) {
            const AT_ONCE: usize = warps($width);
            let hidden = final_gain.len() as u32;
            let shape = Shape {
                hidden,
                heads,
                kv_heads,
                head_width: $width,
                ffn,
                output_halvings: halvings & 0xff,
                down_halvings: halvings >> 8,
                vocab,
            };
            let step = Step {
                shape,
                ids,
                embedding,
                memory: shared::dynamic(0, shared_bytes as usize),
                layers: (layers.len() / LAYER_WORDS) as u32,
                final_gain,
                head,
                rope_table,
                page_tables,
                words: Tagged::new(words, shape.words().len),
                page_elements: page_elements as usize,
                tag,
                eps,
                scale,
            };
            run::<AT_ONCE, { $width / 16 }, { $width / 8 }, { $width / 4 }, { MAX_RATIO * $width / 4 / (AT_ONCE * 32) }>(
                step,
                layers,
                [positions, row_tables],
                logits,
                best,
                shared_bytes,
                ahead,
                pace,
            );
        }
    };
}
step_kernel!(decode_step_32, 32);
step_kernel!(decode_step_64, 64);
