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
//! that all stream the same amount; but where few blocks attend, they do nothing else):
//!
//! | phase | group | from | to |
//! | --- | --- | --- | --- |
//! | QKV | 8 outputs of a head's first half and their partners | residual stream | queries; key and value, also in pages |
//! | attention | the query heads of a KV head; in long contexts these over a span, then 16 columns of a query head | queries, newest key and value, pages | attended values |
//! | output | 8 outputs | attended values | residual stream |
//! | gate and up | 8 gates and their ups | residual stream | gated values |
//! | down | 8 outputs | gated values | residual stream |
//!
//! A line of the second-level cache answers one reader after the other, and a hundred blocks ask for the same words again and again.
//! So there are four replicas of them, each for a quarter of the blocks, a word is asked for by one thread of a block, and who comes
//! a phase early asks for one word only.
//!
//! There are two kernels. In the one for short contexts a block computes and merges all spans of a KV head. In that for long ones
//! (`decode_step::spans`) all blocks share the spans, which is one more hand-off: at 65 to 128 tokens it is 3 % slower, at 257 15 % faster, and a
//! span more costs each block next to nothing until there are more than blocks.
//!
//! A word is overwritten a layer later. By then nobody reads it: what is written depends on values of every block that
//! read it, since each phase needs all values of the phase before.
//!
//! What counts here is how long a lone warp takes from one value to the next. So nothing may be spilled to local memory, which is
//! behind a first-level cache that shared memory leaves no room for, and what every phase needs is looked up in shared memory.

mod attention;
mod chain;
mod inputs;
mod lookup;
mod map;
mod outputs;
mod plan;
mod spans;
mod stream;

use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::tagged::Tagged;

use self::attention::{AT_ONCE, attention};
use self::chain::Chain;
use self::inputs::bring_inputs;
use self::lookup::{Phase, Share, deal};
use self::outputs::{Epilogue, put_best, put_gated, put_qkv};
use self::plan::{ATTENTION, Cut, Linear, REPLICAS};
use self::stream::stream;
use crate::attention_decode::MAX_RATIO;
use crate::attention_decode_short::warps;
use crate::kv_write::PAGE;
use crate::rank;
use crate::weight_ring::{PAD, Ring};

pub use self::chain::STAGE;
pub use self::inputs::MOST_HIDDEN;
pub use self::map::Front;
pub use self::plan::{Partials, Shape, Words};

/// Warps that compute; one more streams weights.
pub const WARPS: u32 = 7;

/// Threads that compute.
const THREADS: u32 = WARPS * 32;

/// Words of a layer in the table of layers: the addresses of its first norm's gain, QKV weight, bias (0: none), output weight,
/// second norm's gain, gate and up weight, down weight, key pages and value pages.
pub const LAYER_WORDS: usize = 9;

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
    /// Most spans of a context whose spans blocks share: there are words for so many.
    most_spans: u32,
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
        let at = map::LAYERS as u32 + layer * map::LAYER_BYTES as u32 + place * 8;
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
    fn share<const LONG: bool>(&self, layer: u32, phase: u32) -> Share {
        Share::read::<LONG>(self.memory, self.shape, layer, phase)
    }

    /// The token's position, its page table, and the page that it is in.
    #[inline(always)]
    fn token(&self) -> [u32; 4] {
        self.memory.part::<u32>(map::TOKEN, 4).load(0)
    }

    /// Of a layer's pages, the keys (7) or the values (8).
    #[inline(always)]
    fn pages(&self, layer: u32, place: u32) -> In<'a, bf16> {
        // SAFETY: the addresses of the layer's pages; what is read of them was written before this launch, or counts for nothing.
        unsafe { In::at_address(self.address(layer, place), self.page_elements) }
    }

    /// Scratch memory of spans that blocks share.
    #[inline(always)]
    fn scratch(&self) -> Shared<u8> {
        self.memory.part(self.shape.front(self.layers, true).scratch as usize, spans::SCRATCH_BYTES)
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

/// The lane and the warp, as [`Shape::anew`].
#[inline(always)]
fn lane_and_warp() -> (u32, u32) {
    let thread = thread::thread_idx_x_anew();
    (thread % 32, thread / 32)
}

/// The barrier of the warps that compute.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn sync() {
    thread::sync_some::<1, THREADS>();
}

/// A block. The numbers are those of [`attention()`] and [`spans::attention`]. `LONG`: blocks share the spans of the context.
#[inline(always)]
fn run<
    const LONG: bool,
    const STEPS: usize,
    const OWN: usize,
    const TILES: usize,
    const COPIES: usize,
    const ITEMS: usize,
>(
    step: Step<'_>,
    layers: In<u64>,
    [positions, row_tables]: [In<u32>; 2],
    logits: Out<f32>,
    best: Out<u64>,
    shared_bytes: u32,
    ahead: u32,
    pace: u32,
) {
    thread::allow_successor();
    // What is old is made ready before the wait.
    let front = step.shape.front(step.layers, LONG);
    let memory = step.memory;
    deal::<LONG>(step.shape, step.layers, memory);
    Phase::put_all::<LONG>(memory, step.shape, front, step.most_spans);
    let mut entry = thread::thread_idx_x() as usize;
    while entry < layers.len() {
        let at = map::LAYERS + entry / LAYER_WORDS * map::LAYER_BYTES + entry % LAYER_WORDS * 8;
        memory.part::<u64>(at, 1).set(0, layers.get(entry));
        entry += thread::block_dim_x() as usize;
    }
    let ring = Ring::new(memory, front.ring, shared_bytes - front.ring);
    thread::wait_for_predecessors();
    if thread::warp_id() == WARPS {
        stream::<LONG>(&step, [positions, row_tables], ring, ahead, pace);
        return;
    }
    if thread::thread_idx_x() == 0 {
        let (position, table) = (positions.get(0), row_tables.get(0));
        let page = step.page_tables.get(table as usize + position as usize / PAGE);
        memory.part::<u32>(map::TOKEN, 4).store(0, [position, table, page, 0]);
    }
    embed(&step);
    sync();
    let layers = step.layers;
    let mut unit = 0u32;
    // Whether the block took part in the linear layer before this one, and in attention where that stands between the two.
    let (mut busy, mut attended) = (false, false);
    let (mut linear, mut layer) = (Linear::Qkv, 0);
    let own = thread::thread_idx_x() as usize;
    memory.part::<u64>(map::BEST, THREADS as usize).set(own, 0);
    loop {
        let (step, ring) = (step.anew(), ring.anew());
        if linear == Linear::Output && LONG {
            let (units, part) = spans::attention::<STEPS, OWN>(&step, ring, layer, unit, busy);
            unit += units;
            attended = part;
        } else if linear == Linear::Output {
            let share = step.share::<LONG>(layer, ATTENTION);
            for turn in 0..share.count {
                if thread::thread_idx_x_anew() < AT_ONCE as u32 * 32 {
                    let group = share.group(turn);
                    let step = step.anew();
                    attention::<STEPS, TILES, COPIES, ITEMS>(&step, ring, layer, group, unit + turn);
                }
            }
            unit += share.count;
            attended = share.count > 0;
        }
        let phase = Phase::read(step.memory, linear);
        let share = step.share::<LONG>(layer, linear.phase());
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
            let (lane, warp) = lane_and_warp();
            let (g, t) = (lane / 4, lane % 4);
            let turn = first + warp;
            let (has, segment) = (warp < at_once && turn < units, turn & ((1 << phase.halvings) - 1));
            let group = share.group(turn >> phase.halvings);
            let mut epilogue = Epilogue::EMPTY;
            if has && segment == 0 && (LONG || t == 0 || linear != Linear::Qkv) {
                epilogue = Epilogue::read(&step, linear, phase, layer, group, g, busy);
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
                let partials: Shared<f32> = step.memory.part(map::PARTIALS, THREADS as usize);
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
                Linear::GateUp => put_gated(&step, phase, tag, group, sums),
                Linear::Qkv if LONG || t == 0 => put_qkv::<LONG>(&step, layer, group, sums, epilogue),
                Linear::Head if t == 0 => {
                    for half in 0..2 {
                        let id = group * 16 + g + half as u32 * 8;
                        if id < step.shape.vocab {
                            if !logits.is_empty() {
                                logits.set(id as usize, sums[half]);
                            }
                            let bests: Shared<u64> = step.memory.part(map::BEST, THREADS as usize);
                            let key = rank::rank_key(sums[half], id as usize);
                            let held = bests.get(own);
                            bests.set(own, if key > held { key } else { held });
                        }
                    }
                }
                Linear::Output | Linear::Down => {
                    let value = epilogue.residual + sums[0];
                    let word = phase.to + group * 8 + g;
                    // SAFETY: a word of the residual stream in the lane's replica.
                    unsafe { step.words.store(word + t * phase.replica, value.to_bits(), tag) };
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
    put_best(memory.part(map::BEST, THREADS as usize), best);
}

/// The token's embedding: where the residual stream starts. Each block has its part.
#[inline(always)]
fn embed(step: &Step<'_>) {
    let shape = step.shape;
    let words = shape.words();
    let start = words.after_down;
    let id = step.ids.get(0);
    let mut place = thread::block_idx_x() * THREADS + thread::thread_idx_x();
    while place < shape.hidden {
        let mut value = 0.0;
        // A step that is computed ahead may stand behind a row that chose nothing.
        if id != u32::MAX {
            value = bf16_to_f32(step.embedding.get(id as usize * shape.hidden as usize + place as usize));
        }
        for replica in 0..REPLICAS {
            // SAFETY: a word of a replica of the residual stream.
            unsafe { step.words.store(start + replica * words.replica + place, value.to_bits(), step.tag) };
        }
        place += thread::grid_dim_x() * THREADS;
    }
}

macro_rules! step_kernel {
    ($name:ident, $width:literal, $long:literal) => {
        /// Logits, and for each block the first of its tokens in the order of [`crate::rank`], of a token that continues a sequence.
        ///
        /// - `ids`: u32 \[1\], `u32::MAX` for zeros; `embedding`, `head`: bf16 \[V, C\]; `layers`: u64 \[L,
        ///   [`LAYER_WORDS`]\], addresses; `final_gain`: bf16 \[C\]; `rope_table`: f32 \[positions, D/2, 2\]; `positions`,
        ///   `row_tables`: u32 \[1\]; `words`: u64 \[[`Words::len`], in kernels of long contexts
        ///   [`Partials::len`]\], tagged words; `logits`: f32 \[V\] or empty; `best`: u64
        ///   \[blocks\]; weights of a layer as in [`crate::few_qkv`], [`crate::few_residual`] and [`crate::few_gate_up`].
        /// - grid: at most as many blocks as run at once; each has [`WARPS`] warps that compute and one that streams.
        /// - bytes: 2 per weight; the values between phases, 4 to 8 bytes each, are read by up to all blocks.
        /// - the caller: K of every layer is a multiple of [`STAGE`] times its segments (2 to the power of `halvings`: of
        ///   the attention output layer, and from bit 8 on of the down projection), C of 64 and at most [`MOST_HIDDEN`], F of 16,
        ///   D as the name says, H / G at most 16; `shared_bytes` of dynamic shared memory, in which [`Front`] and the
        ///   largest units fit. `tag` to `tag` + L are on no word; the position is not `u32::MAX`. Pages hold `page_elements`
        ///   keys or values in each layer. Long contexts have at most as many spans as `halvings` says from bit 16 on, and 32
        ///   tasks for each block. `ahead`: units of weights on their way at once; `pace`: clock cycles for each KiB.
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
            const { assert!(warps($width) == AT_ONCE) };
            let hidden = final_gain.len() as u32;
            let most_spans = halvings >> 16;
            let shape = Shape {
                hidden,
                heads,
                kv_heads,
                head_width: $width,
                ffn,
                output_halvings: halvings & 0xff,
                down_halvings: halvings >> 8 & 0xff,
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
                words: Tagged::new(words, if $long { shape.partials(most_spans).len } else { shape.words().len }),
                page_elements: page_elements as usize,
                most_spans,
                tag,
                eps,
                scale,
            };
            run::<
                $long,
                { $width / 16 },
                { $width / 32 },
                { $width / 8 },
                { $width / 4 },
                { MAX_RATIO * $width / 4 / (AT_ONCE * 32) },
            >(step, layers, [positions, row_tables], logits, best, shared_bytes, ahead, pace);
        }
    };
}
step_kernel!(decode_step_32, 32, false);
step_kernel!(decode_step_64, 64, false);
step_kernel!(decode_step_long_32, 32, true);
step_kernel!(decode_step_long_64, 64, true);
