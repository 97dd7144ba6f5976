//! The gate and up layer of prefills with its activation, on Hopper: tiles for throughput, where [`crate::wgmma_gate_up`] is made for
//! few tokens, whose weights' way from memory takes longest.
//!
//! A block has 128 tokens and 256 outputs at a time, which is what keeps tensor cores busy with what one multiprocessor gets from the
//! second-level cache (or 160, where so few tiles would leave multiprocessors idle), and goes from tile to tile: while it computes
//! activations, the copy engine fetches what the next tile begins with. The two blocks of a cluster have the same outputs; each asks
//! for half of the weights, and what comes goes to both.

use cuda_std::bulk::Barriers;
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::tensor_copy::{cluster_rank, copy_rows, copy_woven, sync_cluster};
use cuda_std::wgmma::{DEPTH as STAGE, Operand, Place, ROWS, Ring, Sums};

use crate::silu_mul::{gated, is_ordinary};
use crate::silu_table;

/// Warpgroups that multiply: each has 64 tokens.
const GROUPS: usize = 2;

/// Tokens of a block's tile.
pub const TOKENS: usize = GROUPS * ROWS;

/// Blocks of a cluster.
pub const CLUSTER: usize = 2;

/// What a block's tile has of the outputs, and how deep its ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Elements of the feed-forward width: as many gates, and as many ups.
    pub width: usize,
    /// How many of those a lane has side by side, to store them at once.
    pub neighbours: usize,
    /// Slots of the ring: each a stage of tokens and of weights.
    pub slots: usize,
}

impl Layout {
    /// Elements of the feed-forward width that are woven: four lanes' neighbours.
    #[must_use]
    pub const fn woven(self) -> usize {
        4 * self.neighbours
    }

    const fn slot(self) -> usize {
        (TOKENS + 2 * self.width) * STAGE
    }

    /// Bytes of dynamic shared memory of a block.
    #[must_use]
    pub const fn shared_bytes(self) -> usize {
        self.slots * (self.slot() * 2 + 16) + silu_table::LEN * size_of::<f32>()
    }
}

/// The layout of [`wgmma_long_gate_up_160()`].
pub const OUTPUTS_160: Layout = Layout { width: 80, neighbours: 4, slots: 5 };
/// The layout of [`wgmma_long_gate_up_256()`].
pub const OUTPUTS_256: Layout = Layout { width: 128, neighbours: 8, slots: 4 };

/// Activations of pairs of gates and their ups, at once and without a branch, or each would wait for the one before it. Gates that
/// the table does not have, hardly ever any, are computed.
#[inline(always)]
fn activated<const N: usize>(table: &Shared<f32>, gates: [u32; N], ups: [u32; N]) -> [u32; N] {
    let split = |pair: u32| [bf16::from_bits(pair as u16), bf16::from_bits((pair >> 16) as u16)];
    let mut values = [[0.0f32; 2]; N];
    let mut last = 0;
    for n in 0..N {
        let (places, ups) = (silu_table::places(gates[n]), split(ups[n]));
        for i in 0..2 {
            values[n][i] = table.get(places[i] as usize) * bf16_to_f32(ups[i]);
            last = if places[i] > last { places[i] } else { last };
        }
    }
    if last == silu_table::NONE {
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

/// `WIDTH`, `NEIGHBOURS` and `SLOTS` are a [`Layout`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn long_gate_up<const WIDTH: usize, const NEIGHBOURS: usize, const SLOTS: usize>(
    x_map: In<u64>,
    weight_map: In<u64>,
    out: Out<bf16>,
    first_row: u32,
    tokens: u32,
    ffn: u32,
    width: u32,
) where
    [f32; WIDTH]: Sums,
{
    let layout = const { Layout { width: WIDTH, neighbours: NEIGHBOURS, slots: SLOTS } };
    let (slot_elements, woven) = (layout.slot(), layout.woven());
    thread::allow_successor();
    let ring: Shared<bf16> = shared::dynamic(0, SLOTS * slot_elements);
    let barriers = Barriers::new(shared::dynamic(SLOTS * slot_elements * 2, 2 * SLOTS));
    let table: Shared<f32> = shared::dynamic(SLOTS * (slot_elements * 2 + 16), silu_table::LEN);
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

    // The other lanes of the warp that asks have nothing to wait for. No block ends before its other threads have waited.
    if warp == GROUPS * 4 {
        if lane == 0 {
            let ask_for_weights = |tile: u32, stage: u32, slot: usize| {
                barriers.arrive_and_expect(slot, (slot_elements * 2) as u32);
                // Gates are one block's to ask for, their ups the other's.
                let block = tile / pairs * (WIDTH / woven) as u32 + rank * (ffn / woven as u32);
                let to = slot * slot_elements + (TOKENS + rank as usize * WIDTH) * STAGE;
                let k = stage * STAGE as u32;
                // SAFETY: the map is of such boxes (the kernel's contract); the slot is one of the ring, and nobody reads it in
                // either block.
                unsafe { copy_woven(&ring, to, &weight_map, k, 0, 0, 0, block, &barriers, slot, Some(0b11)) };
            };
            let ask_for_tokens = |tile: u32, stage: u32, slot: usize| {
                let (k, row) = (stage * STAGE as u32, first_row + token_of(tile));
                // SAFETY: as above.
                unsafe { copy_rows(&ring, slot * slot_elements, &x_map, k, row, &barriers, slot, None) };
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
        // While the first stages are on their way.
        silu_table::fill(&table, thread::thread_idx_x() as usize, GROUPS * 128);
        thread::sync_some::<1, { GROUPS as u32 * 128 }>();
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
        let mut tile = cluster;
        while tile < tiles {
            let mut sums = [0.0; WIDTH];
            sums.add_stages(&stages_of_both, &mut place, stages);
            let token = token_of(tile) + warp as u32 * 16 + lane / 4;
            let column = tile / pairs * WIDTH as u32 + lane % 4 * NEIGHBOURS as u32;
            for half in 0..2 {
                for block in 0..WIDTH / woven {
                    let (row, at) = (token + half as u32 * 8, column + (block * woven) as u32);
                    // Rows that are not there have gates of 0, which take longest.
                    if row >= tokens || at >= ffn {
                        continue;
                    }
                    // Gates are the first half of the outputs, ups the second.
                    let pair = |eight: usize| {
                        let at = (block * NEIGHBOURS / 2 + eight) * 4 + half * 2;
                        let up = at + WIDTH / 2;
                        (bf16_pair(sums[at], sums[at + 1]), bf16_pair(sums[up], sums[up + 1]))
                    };
                    let mut values = [bf16::ZERO; NEIGHBOURS];
                    for two in 0..NEIGHBOURS / 4 {
                        let [first, second] = [pair(two * 2), pair(two * 2 + 1)];
                        let words = activated(&table, [first.0, second.0], [first.1, second.1]);
                        for n in 0..4 {
                            values[two * 4 + n] = bf16::from_bits((words[n / 2] >> (n % 2 * 16)) as u16);
                        }
                    }
                    out.store(row as usize * ffn as usize + at as usize, values);
                }
            }
            tile += clusters;
        }
    }
    // A block's memory has to be there as long as the other copies into it or arrives at its barriers.
    sync_cluster();
}

macro_rules! long_gate_up_kernel {
    ($name:ident, $layout:ident) => {
        /// The gate and up layer and the gated activation: the bits of [`crate::linear::linear_bf16()`] followed by
        /// [`crate::silu_mul::silu_mul()`].
        ///
        /// - `x_map`: the tensor map of x, bf16 \[rows, K\], in boxes of 64 of k and 128 rows, of which those from `first_row` on are
        ///   meant; `weight_map`: that of the weight, bf16 \[2 F, K\], gate then up, with n the layout's neighbours as
        ///   \[2 F / (4 n)\]\[n / 2\]\[4\]\[2\]\[K\], whose first index steps over 4 n outputs, the next ones over 2, n and 1, in
        ///   boxes of the layout's width of rows and 64 of k; `out`: bf16 \[M, F\].
        /// - grid: any number of clusters of 2, which share the tiles out.
        /// - bytes: 4 F K + 2 M (K + F), with weights once per 256 tokens and tokens once per tile of the width.
        /// - the caller: K is a multiple of 64, F of 4 n; [`Layout::shared_bytes`] of dynamic shared memory; an `sm_90a` image. The
        ///   weight is read before the kernels ahead have ended.
        #[kernel(block = 288, min_blocks = 1, cluster = 2)]
        pub fn $name(
            x_map: In<u64>,
            weight_map: In<u64>,
            out: Out<bf16>,
            first_row: u32,
            tokens: u32,
            ffn: u32,
            width: u32,
        ) {
            long_gate_up::<{ $layout.width }, { $layout.neighbours }, { $layout.slots }>(
                x_map, weight_map, out, first_row, tokens, ffn, width,
            );
        }
    };
}
long_gate_up_kernel!(wgmma_long_gate_up_160, OUTPUTS_160);
long_gate_up_kernel!(wgmma_long_gate_up_256, OUTPUTS_256);
