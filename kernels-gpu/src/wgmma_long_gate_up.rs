//! The gate and up layer of prefills with its activation, on Hopper: tiles for throughput, where [`crate::wgmma_gate_up`] is made for
//! few tokens, whose weights' way from memory takes longest.
//!
//! A block has 128 tokens and 256 outputs at a time, which is what keeps tensor cores busy with what one multiprocessor gets from the
//! second-level cache, and goes from tile to tile: while it computes activations, the copy engine fetches what the next tile begins
//! with. The two blocks of a cluster have the same outputs; each asks for half of the weights, and what comes goes to both.

use cuda_std::bulk::Barriers;
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::tensor_copy::{cluster_rank, copy_rows, copy_woven, sync_cluster};
use cuda_std::wgmma::{DEPTH as STAGE, Operand, Place, ROWS, Ring, Sums};

use crate::silu_mul::{gated, gated_ordinary, is_ordinary};

/// Warpgroups that multiply: each has 64 tokens.
const GROUPS: usize = 2;

/// Tokens of a block's tile.
pub const TOKENS: usize = GROUPS * ROWS;

/// Elements of the feed-forward width in a tile: as many gates and as many ups.
pub const WIDTH: usize = 128;

/// Blocks of a cluster.
pub const CLUSTER: usize = 2;

/// Slots of the ring: each a stage of tokens and of weights.
const SLOTS: usize = 4;

const SLOT: usize = (TOKENS + 2 * WIDTH) * STAGE;

/// Elements of the feed-forward width that are woven: of 32 a lane has 8 neighbours, which it stores at once.
pub const WOVEN: usize = 32;

/// Bytes of dynamic shared memory of a block.
#[must_use]
pub const fn ring_bytes() -> usize {
    SLOTS * (SLOT * 2 + 16)
}

/// Activations of pairs of gates and their ups, at once and without a branch, or each would wait for the one before it. Gates that
/// this does not suit, hardly ever any, are computed again. (In pairs, because a conversion of one takes as long as a division.)
#[inline(always)]
fn activated<const N: usize>(gates: [u32; N], ups: [u32; N]) -> [u32; N] {
    let split = |pair: u32| [bf16::from_bits(pair as u16), bf16::from_bits((pair >> 16) as u16)];
    let mut values = [[0.0f32; 2]; N];
    let mut all_ordinary = true;
    for n in 0..N {
        let (gates, ups) = (split(gates[n]), split(ups[n]));
        for i in 0..2 {
            values[n][i] = gated_ordinary(gates[i], ups[i]);
            all_ordinary &= is_ordinary(gates[i]);
        }
    }
    if !all_ordinary {
        for n in 0..N {
            let (gates, ups) = (split(gates[n]), split(ups[n]));
            for i in 0..2 {
                if !is_ordinary(gates[i]) {
                    values[n][i] = gated(gates[i], ups[i]);
                }
            }
        }
    }
    values.map(|[low, high]| bf16_pair(low, high))
}

/// The gate and up layer and the gated activation: the bits of [`crate::linear::linear_bf16()`] followed by
/// [`crate::silu_mul::silu_mul()`].
///
/// - `x_map`: the tensor map of x, bf16 \[rows, K\], in boxes of 64 of k and 128 rows, of which those from `first_row` on are meant;
///   `weight_map`: that of the weight, bf16 \[2 F, K\], gate then up, as \[2 F / 32\]\[4\]\[4\]\[2\]\[K\], whose first index steps over
///   32 outputs, the next ones over 2, 8 and 1, in boxes of 4 of the first dimension, all of the next three and 64 of k; `out`: bf16
///   \[M, F\].
/// - grid: any number of clusters of 2, which share the tiles out.
/// - bytes: 4 F K + 2 M (K + F), with weights once per 256 tokens and tokens once per 128 of the width.
/// - the caller: K is a multiple of 64, F of 32; [`ring_bytes`] of dynamic shared memory; an `sm_90a` image. The weight is read
///   before the kernels ahead have ended.
#[kernel(block = 288, min_blocks = 1, cluster = 2)]
pub fn wgmma_long_gate_up(
    x_map: In<u64>,
    weight_map: In<u64>,
    out: Out<bf16>,
    first_row: u32,
    tokens: u32,
    ffn: u32,
    width: u32,
) {
    thread::allow_successor();
    let ring: Shared<bf16> = shared::dynamic(0, SLOTS * SLOT);
    let barriers = Barriers::new(shared::dynamic(SLOTS * SLOT * 2, 2 * SLOTS));
    let (warp, lane) = (thread::warp_id() as usize, thread::lane_id());
    // The first ones say that a slot is full, the others that nobody in the cluster reads it any more.
    if thread::thread_idx_x() == 0 {
        for slot in 0..SLOTS {
            barriers.init(slot, 1);
            barriers.init(SLOTS + slot, (CLUSTER * GROUPS * 4) as u32);
        }
        Barriers::publish();
    }
    sync_cluster();
    let rank = cluster_rank();
    let (cluster, clusters) = (thread::block_idx_x() / CLUSTER as u32, thread::grid_dim_x() / CLUSTER as u32);
    // Tiles of a cluster: those of the same outputs are neighbours, so that at a time few weights are in use.
    let pairs = tokens.div_ceil((CLUSTER * TOKENS) as u32);
    let tiles = pairs * ffn.div_ceil(WIDTH as u32);
    let stages = width / STAGE as u32;
    let token_of = |tile: u32| (tile % pairs * CLUSTER as u32 + rank) * TOKENS as u32;

    if warp == GROUPS * 4 {
        if lane == 0 {
            let ask_for_weights = |tile: u32, stage: u32, slot: usize| {
                barriers.arrive_and_expect(slot, (SLOT * 2) as u32);
                // Gates are one block's to ask for, their ups the other's.
                let block = tile / pairs * (WIDTH / WOVEN) as u32 + rank * (ffn / WOVEN as u32);
                let to = slot * SLOT + (TOKENS + rank as usize * WIDTH) * STAGE;
                let k = stage * STAGE as u32;
                // SAFETY: the map is of such boxes (the kernel's contract); the slot is one of the ring, and nobody reads it in
                // either block.
                unsafe { copy_woven(&ring, to, &weight_map, k, 0, 0, 0, block, &barriers, slot, Some(0b11)) };
            };
            let ask_for_tokens = |tile: u32, stage: u32, slot: usize| {
                let (k, row) = (stage * STAGE as u32, first_row + token_of(tile));
                // SAFETY: as above.
                unsafe { copy_rows(&ring, slot * SLOT, &x_map, k, row, &barriers, slot, None) };
            };
            // Weights depend on no other kernel.
            let mut early = 0;
            while early < SLOTS as u32 && early < stages && cluster < tiles {
                ask_for_weights(cluster, early, early as usize);
                early += 1;
            }
            thread::wait_for_predecessors();
            for stage in 0..early {
                ask_for_tokens(cluster, stage, stage as usize);
            }
            let (mut tile, mut stage, mut asked) = (cluster, early, early);
            while tile < tiles {
                while stage < stages {
                    let slot = asked as usize % SLOTS;
                    if asked >= SLOTS as u32 {
                        barriers.wait(SLOTS + slot, (asked / SLOTS as u32 + 1) % 2);
                    }
                    ask_for_weights(tile, stage, slot);
                    ask_for_tokens(tile, stage, slot);
                    asked += 1;
                    stage += 1;
                }
                stage = 0;
                tile += clusters;
            }
        }
    } else {
        thread::wait_for_predecessors();
        let stages_of_both = Ring {
            a: Operand::new(&ring, warp / 4 * ROWS * STAGE),
            b: Operand::new(&ring, TOKENS * STAGE),
            slot_bytes: (SLOT * 2) as u32,
            slots: SLOTS as u32,
            barriers,
            cluster: CLUSTER as u32,
        };
        let mut place = Place::FIRST;
        let mut tile = cluster;
        while tile < tiles {
            let mut sums = [0.0; WIDTH];
            sums.add_stages(&stages_of_both, &mut place, stages);
            let token = token_of(tile) + warp as u32 * 16 + lane / 4;
            let column = tile / pairs * WIDTH as u32 + lane % 4 * 8;
            for half in 0..2 {
                for block in 0..WIDTH / WOVEN {
                    // Gates are the first half of the outputs, ups the second.
                    let pair = |eight: usize| {
                        let at = (block * 4 + eight) * 4 + half * 2;
                        let up = at + WIDTH / 2;
                        (bf16_pair(sums[at], sums[at + 1]), bf16_pair(sums[up], sums[up + 1]))
                    };
                    let mut values = [bf16::ZERO; 8];
                    for two in 0..2 {
                        let [first, second] = [pair(two * 2), pair(two * 2 + 1)];
                        let words = activated([first.0, second.0], [first.1, second.1]);
                        for n in 0..4 {
                            values[two * 4 + n] = bf16::from_bits((words[n / 2] >> (n % 2 * 16)) as u16);
                        }
                    }
                    let (row, at) = (token + half as u32 * 8, column + (block * WOVEN) as u32);
                    if row < tokens && at < ffn {
                        out.store(row as usize * ffn as usize + at as usize, values);
                    }
                }
            }
            tile += clusters;
        }
    }
    // A block's memory has to be there as long as the other copies into it or arrives at its barriers.
    sync_cluster();
}
