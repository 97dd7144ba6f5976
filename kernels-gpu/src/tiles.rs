//! The tile that the `tile_*` kernels share: some outputs of a linear layer for some tokens. They are the linear layers of
//! decode steps beyond [`crate::few::FEW`] rows, with what stands behind them.
//!
//! The bits are those of [`crate::linear`] and of the operation behind it: each output is the same k16 chain, whatever the
//! tile's size. Weights and tokens stream through one ring in shared memory with asynchronous copies. Weights depend on no
//! other kernel, so the ring is filled with them before the kernel waits for its predecessors.

use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

/// Inputs (k) of a stage of the ring: 128 bytes of a row. K is a multiple of it.
pub const STAGE: usize = 64;

/// Products in a row of a stage.
const STEPS: usize = STAGE / 16;

/// Elements of a row of a stage: 16 bytes behind it put the eight rows that a fragment reads into different banks.
const ROW: usize = STAGE + 8;

/// Most 16-byte pieces of a stage that a thread copies of the weights, or of the tokens.
const MOST_PIECES: usize = 8;

/// How a block's tile is made of its warps' and how deep its ring is. A product gives 16 outputs for 8 tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Warps side by side along the outputs.
    pub output_warps: usize,
    /// Warps side by side along the tokens.
    pub token_warps: usize,
    /// Groups of 16 outputs of a warp.
    pub groups: usize,
    /// Pairs of 8 tokens of a warp.
    pub pairs: usize,
    /// Stages of the ring.
    pub depth: usize,
}

impl Layout {
    /// Threads of a block.
    #[must_use]
    pub const fn threads(self) -> usize {
        self.output_warps * self.token_warps * 32
    }

    /// Outputs of a block.
    #[must_use]
    pub const fn outputs(self) -> usize {
        self.output_warps * self.groups * 16
    }

    /// Tokens of a block.
    #[must_use]
    pub const fn tokens(self) -> usize {
        self.token_warps * self.pairs * 16
    }

    /// Bytes of dynamic shared memory of a block.
    #[must_use]
    pub const fn ring_bytes(self) -> usize {
        self.depth * (self.outputs() + self.tokens()) * ROW * 2
    }
}

/// A linear layer, or a segment of its K.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    /// \[M, K\].
    pub(crate) x: In<'a, bf16>,
    /// \[N, K\].
    pub(crate) weight: In<'a, bf16>,
    /// M.
    pub(crate) tokens: u32,
    /// N.
    pub(crate) outputs: u32,
    /// K.
    pub(crate) width: u32,
    /// The segment's first k.
    pub(crate) first: u32,
    /// The segment's inputs.
    pub(crate) part: u32,
}

/// The tiles of a block: `first`, `first + step`, ..., of the same tokens.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    pub(crate) first: u32,
    pub(crate) step: u32,
    /// How many, at least one.
    pub(crate) count: u32,
}

/// A warp's sums, in the fragment layout of a product: \[group of 16 outputs\]\[pair\]\[8 tokens of it\]\[element\]. Elements 0 and
/// 1 are output g of the group (g = lane / 4), elements 2 and 3 are output g + 8; see [`token`] for their tokens.
pub(crate) type Sums<const GROUPS: usize, const PAIRS: usize> = [[[[f32; 4]; 2]; PAIRS]; GROUPS];

/// Which of the block's groups of 16 outputs is a warp's `group`.
#[inline(always)]
pub(crate) fn block_group<const OUTPUT_WARPS: usize, const GROUPS: usize>(group: usize) -> u32 {
    thread::warp_id() % OUTPUT_WARPS as u32 * GROUPS as u32 + group as u32
}

/// Which of the block's tokens is that of a lane's element (0 or 1; 2 and 3 have the same ones).
#[inline(always)]
pub(crate) fn token<const OUTPUT_WARPS: usize, const PAIRS: usize>(pair: usize, eight: usize, element: usize) -> u32 {
    let first = thread::warp_id() / OUTPUT_WARPS as u32 * PAIRS as u32 * 16 + thread::lane_id() % 4 * 2;
    first + (pair * 16 + eight * 8 + element) as u32
}

/// The stages of a block's tiles, one after the other.
#[derive(Clone, Copy)]
struct Cursor {
    tile: u32,
    stage: u32,
    /// Stages from here to the end, this one included.
    left: u32,
}

impl Cursor {
    /// Goes on. True where another tile begins.
    #[inline(always)]
    fn advance(&mut self, tiles: Tiles, stages: u32) -> bool {
        self.left -= 1;
        self.stage += 1;
        if self.stage < stages {
            return false;
        }
        self.stage = 0;
        self.tile += tiles.step;
        true
    }
}

/// The operands of a warp's products of 16 k.
#[derive(Clone, Copy)]
struct Operands<const GROUPS: usize, const PAIRS: usize> {
    weight: [[u32; 4]; GROUPS],
    tokens: [[[u32; 2]; 2]; PAIRS],
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn multiply<const GROUPS: usize, const PAIRS: usize>(
    sums: &mut Sums<GROUPS, PAIRS>,
    operands: &Operands<GROUPS, PAIRS>,
) {
    for group in 0..GROUPS {
        for pair in 0..PAIRS {
            for eight in 0..2 {
                let sum = &mut sums[group][pair][eight];
                *sum = mma::m16n8k16_bf16(operands.weight[group], operands.tokens[pair][eight], *sum);
            }
        }
    }
}

/// Computes a block's tiles; `OUTPUT_WARPS` to `DEPTH` are a [`Layout`], `PENDING` is `DEPTH - 2`, and without `MANY` there is
/// one tile. `row(tile, r)` is the weight's row that stands in row `r` of a tile (rows beyond the last repeat it). `early`
/// runs before the kernel waits for its predecessors. `finish` gets each tile's sums.
///
/// Each stage has one barrier, before its last products: by then all warps have the operands of that stage in registers, so
/// its room is filled again, and the first operands of the next stage are read while products still run.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn compute<
    const OUTPUT_WARPS: usize,
    const TOKEN_WARPS: usize,
    const GROUPS: usize,
    const PAIRS: usize,
    const DEPTH: usize,
    const PENDING: usize,
    const MANY: bool,
    R,
>(
    layer: Layer,
    first_token: u32,
    tiles: Tiles,
    row: impl Fn(u32, u32) -> u32,
    early: impl FnOnce() -> R,
    mut finish: impl FnMut(u32, &Sums<GROUPS, PAIRS>, &R),
) {
    let (outputs, tokens) = (OUTPUT_WARPS * GROUPS * 16, TOKEN_WARPS * PAIRS * 16);
    // A thread's pieces of a stage are this many rows apart.
    let apart = OUTPUT_WARPS * TOKEN_WARPS * 4;
    const {
        let (outputs, tokens, apart) =
            (OUTPUT_WARPS * GROUPS * 16, TOKEN_WARPS * PAIRS * 16, OUTPUT_WARPS * TOKEN_WARPS * 4);
        assert!(DEPTH >= 2 && PENDING + 2 == DEPTH);
        assert!(outputs.is_multiple_of(apart) && outputs / apart <= MOST_PIECES);
        assert!(tokens.is_multiple_of(apart) && tokens / apart <= MOST_PIECES);
    }
    thread::allow_successor();
    let Layer { x, weight, width, .. } = layer;
    let stages = layer.part / STAGE as u32;
    let slot_elements = (outputs + tokens) * ROW;
    let ring: Shared<bf16> = shared::dynamic(0, DEPTH * slot_elements);
    let thread = thread::thread_idx_x();
    let (piece_row, piece_k) = (thread / 8, thread % 8 * 8);
    weight.check(0, layer.outputs as usize * width as usize);
    x.check(0, layer.tokens as usize * width as usize);

    // Where a thread's pieces start, and where they go: slots are counted in elements.
    let target = piece_row * ROW as u32 + piece_k;
    // Where the thread's part of a row of a matrix of `rows` rows starts; the last one stands for those beyond it.
    let source = |row: u32, rows: u32| {
        let row = if row < rows { row } else { rows - 1 };
        row as usize * width as usize + (layer.first + piece_k) as usize
    };
    let weight_sources = |tile: u32| {
        let mut from = [0; MOST_PIECES];
        for piece in 0..outputs / apart {
            from[piece] = source(row(tile, (piece * apart) as u32 + piece_row), layer.outputs);
        }
        from
    };
    let mut token_sources = [0; MOST_PIECES];
    for piece in 0..tokens / apart {
        token_sources[piece] = source(first_token + (piece * apart) as u32 + piece_row, layer.tokens);
    }
    let copy_weights = |from: &[usize; MOST_PIECES], stage: u32, slot: u32| {
        for piece in 0..outputs / apart {
            let to = (slot + target) as usize + piece * apart * ROW;
            // SAFETY: the row is below the number of outputs, whose rows are there (checked above), and the stage is one of
            // the segment's.
            unsafe { cp_async::copy_unchecked::<_, 8>(&ring, to, &weight, from[piece] + stage as usize * STAGE) };
        }
    };
    let copy_tokens = |stage: u32, slot: u32| {
        for piece in 0..tokens / apart {
            let to = (slot + target) as usize + (outputs + piece * apart) * ROW;
            let from = token_sources[piece] + stage as usize * STAGE;
            // SAFETY: the row is below the number of tokens, whose rows are there (checked above), and the stage is one of
            // the segment's.
            unsafe { cp_async::copy_unchecked::<_, 8>(&ring, to, &x, from) };
        }
    };

    let left = if MANY { tiles.count * stages } else { stages };
    let start = Cursor { tile: tiles.first, stage: 0, left };
    let mut ahead = start;
    let mut from = weight_sources(tiles.first);
    for slot in 0..DEPTH {
        if ahead.left > 0 {
            copy_weights(&from, ahead.stage, (slot * slot_elements) as u32);
            if ahead.advance(tiles, stages) && MANY {
                from = weight_sources(ahead.tile);
            }
        }
    }
    let ready = early();
    thread::wait_for_predecessors();
    let mut behind = start;
    for slot in 0..DEPTH {
        if behind.left > 0 {
            copy_tokens(behind.stage, (slot * slot_elements) as u32);
            behind.advance(tiles, stages);
        }
        cp_async::commit_group();
    }

    let warp = thread::warp_id() as usize;
    let (output_warp, token_warp) = (warp % OUTPUT_WARPS, warp / OUTPUT_WARPS);
    let weights = mma::ReadA::new(&ring, output_warp * GROUPS * 16 * ROW, ROW);
    let columns = mma::ReadBColumns::new(&ring, (outputs + token_warp * PAIRS * 16) * ROW, ROW);
    let read = |slot: u32, step: usize| {
        let at = slot as usize + step * 16;
        let mut operands = Operands::<GROUPS, PAIRS> { weight: [[0; 4]; GROUPS], tokens: [[[0; 2]; 2]; PAIRS] };
        for group in 0..GROUPS {
            operands.weight[group] = weights.load(at + group * 16 * ROW);
        }
        for pair in 0..PAIRS {
            operands.tokens[pair] = columns.load(at + pair * 16 * ROW);
        }
        operands
    };
    cp_async::wait_group::<PENDING>();
    thread::sync_threads();
    let mut slot = 0u32;
    let mut now = start;
    let mut operands = read(slot, 0);
    while now.left > 0 {
        let tile = now.tile;
        let mut sums = [[[[0.0f32; 4]; 2]; PAIRS]; GROUPS];
        loop {
            for step in 1..STEPS {
                let next = read(slot, step);
                multiply(&mut sums, &operands);
                operands = next;
            }
            // The next stage has landed for all lanes, and all have read this one.
            cp_async::wait_group::<PENDING>();
            thread::sync_threads();
            let following = if slot == ((DEPTH - 1) * slot_elements) as u32 { 0 } else { slot + slot_elements as u32 };
            // Behind the last stage its own operands are read once more: nothing is there to fill its room.
            let next = read(if now.left > 1 { following } else { slot }, 0);
            multiply(&mut sums, &operands);
            operands = next;
            if ahead.left > 0 {
                copy_weights(&from, ahead.stage, slot);
                copy_tokens(ahead.stage, slot);
                if ahead.advance(tiles, stages) && MANY {
                    from = weight_sources(ahead.tile);
                }
            }
            cp_async::commit_group();
            slot = following;
            if now.advance(tiles, stages) {
                break;
            }
        }
        finish(tile, &sums, &ready);
        if !MANY {
            break;
        }
    }
}
