//! The query, key and value layer of many tokens, up to attention, on Hopper: see [`crate::warpgroup_tiles`].

use cuda_std::prelude::*;
use cuda_std::tensor_copy::copy_halves;

use crate::kv_write::PAGE;
use crate::tile_qkv::{Heads, Partners, Place, rotated};
use crate::tiles::Tiles;
use crate::warpgroup_tiles::{self, Layout, STAGE};

/// The layout of [`wgmma_qkv()`]: all of a block's operands have room.
pub const QKV: Layout = Layout { groups: 1, outputs: 32, depth: 14, ahead: 14, cluster: 1 };
/// The layout of [`wgmma_qkv_paired()`]: a multiprocessor has two blocks at once.
pub const QKV_PAIRED: Layout = Layout { groups: 1, outputs: 32, depth: 7, ahead: 14, cluster: 1 };

/// Outputs of a block.
const OUTPUTS: usize = QKV.outputs;

/// Blocks that compute the same tile of values, of which each stores its part: the elements of a value are apart in its page, and so
/// many stores of one block would hold up the step.
const VALUE_BLOCKS: u32 = 4;

/// Blocks that the tokens of a block need, of heads of `width` elements, of which the last `kv_heads` are values.
#[must_use]
pub const fn blocks(query_heads: usize, kv_heads: usize, width: usize) -> usize {
    (query_heads + kv_heads + kv_heads * VALUE_BLOCKS as usize) * width / OUTPUTS
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn qkv<const DEPTH: usize, const AHEAD: usize>(x_map: In<u64>, weight_map: In<u64>, heads: Heads, width: u32) {
    const EIGHTS: usize = OUTPUTS / 16;
    let tokens = heads.positions.len() as u32;
    let (outputs, half) = (heads.outputs(), heads.width / 2);
    let first_token = thread::block_idx_y() * QKV.tokens() as u32;
    // A tile is some partners of one head.
    let (block, value_tile) = (thread::block_idx_x(), heads.rotated() * heads.width / OUTPUTS as u32);
    let (mut tile, mut part) = (block, None);
    if block >= value_tile {
        tile = value_tile + (block - value_tile) / VALUE_BLOCKS;
        part = Some((block - value_tile) % VALUE_BLOCKS);
    }
    let Partners { head, i: first } = heads.partners(tile * (OUTPUTS / 2) as u32);
    // A lane has two neighbours of each eight, and their partners.
    let own = |eight: usize| Partners { head, i: first + warpgroup_tiles::column(eight) };
    warpgroup_tiles::compute::<1, OUTPUTS, DEPTH, AHEAD, 1, { OUTPUTS / 2 }, _>(
        x_map,
        first_token,
        0,
        width / STAGE as u32,
        Tiles { first: tile, step: 1, count: 1 },
        |_, k, place| {
            // SAFETY: the map is of boxes of so many rows (the kernel's contract).
            unsafe {
                copy_halves(
                    &place.memory,
                    place.start,
                    &weight_map,
                    k,
                    0,
                    0,
                    first / 8,
                    head,
                    &place.barriers,
                    place.barrier,
                    None,
                );
            };
        },
        || {
            // What the sums meet is older than the predecessors. First both positions, then all that follows from them: loads wait for
            // each other twice, not once for each token.
            let mut places = [[[Place { position: u32::MAX, rotation: [0.0; 2], page: 0 }; 2]; EIGHTS]; 2];
            let (mut positions, mut row_tables) = ([u32::MAX; 2], [0u32; 2]);
            for row in 0..2 {
                let token = first_token + warpgroup_tiles::token(row);
                if token < tokens {
                    positions[row] = heads.positions.get(token as usize);
                    row_tables[row] = heads.row_tables.get(token as usize);
                }
            }
            for row in 0..2 {
                let position = positions[row];
                if position == u32::MAX {
                    continue;
                }
                let page = if head >= heads.query_heads {
                    heads.page_tables.get(row_tables[row] as usize + position as usize / PAGE)
                } else {
                    0
                };
                for eight in 0..EIGHTS {
                    let mut rotations = [0.0f32; 4];
                    if head < heads.rotated() {
                        let angle = position as usize * half as usize + own(eight).i as usize;
                        rotations = heads.table.load(angle * 2);
                    }
                    for element in 0..2 {
                        let rotation = [rotations[element * 2], rotations[element * 2 + 1]];
                        places[row][eight][element] = Place { position, rotation, page };
                    }
                }
            }
            let mut offsets = [[[0.0f32; 2]; 2]; EIGHTS];
            for eight in 0..EIGHTS {
                let Partners { head, i } = own(eight);
                offsets[eight] = [heads.offsets(Partners { head, i }), heads.offsets(Partners { head, i: i + 1 })];
            }
            (places, offsets)
        },
        |_, sums, (places, offsets)| {
            for row in 0..2 {
                let token = first_token + warpgroup_tiles::token(row);
                let position = places[row][0][0].position;
                if position == u32::MAX {
                    continue;
                }
                let slot = position as usize % PAGE;
                for eight in 0..EIGHTS {
                    if part.is_some_and(|part| part != (row * EIGHTS + eight) as u32) {
                        continue;
                    }
                    let own = own(eight);
                    let (i, half) = (own.i as usize, half as usize);
                    // Neighbours, and their partners.
                    let mut pairs = [[0.0f32; 2]; 2];
                    for element in 0..2 {
                        let at = eight * 8 + row * 2 + element;
                        let [a, b] = [sums[at], sums[at + 4]];
                        let [c, d] = offsets[eight][element];
                        let biased = if heads.bias.is_empty() { [a, b] } else { [a + c, b + d] };
                        let turned = rotated(biased, places[row][eight][element].rotation);
                        let pair = if head < heads.rotated() { turned } else { biased };
                        (pairs[0][element], pairs[1][element]) = (pair[0], pair[1]);
                    }
                    let page = places[row][eight][0].page;
                    if head < heads.query_heads {
                        let first = token as usize * outputs as usize + heads.first(own) as usize;
                        heads.queries.store(first, pairs[0]);
                        heads.queries.store(first + half, pairs[1]);
                    } else if head < heads.rotated() {
                        let start = heads.entries(page, head - heads.query_heads) + slot * heads.width as usize;
                        heads.key_pages.store(start + i, pairs[0].map(f32_to_bf16));
                        heads.key_pages.store(start + half + i, pairs[1].map(f32_to_bf16));
                    } else {
                        let start = heads.entries(page, head - heads.rotated()) + slot;
                        for element in 0..2 {
                            heads.value_pages.set(start + (i + element) * PAGE, f32_to_bf16(pairs[0][element]));
                            heads.value_pages.set(start + (half + i + element) * PAGE, f32_to_bf16(pairs[1][element]));
                        }
                    }
                }
            }
        },
    );
}

macro_rules! qkv_kernel {
    ($name:ident, $min_blocks:literal, $layout:ident) => {
        /// The query, key and value layer, bias, rotary embedding (pairs i and i + D/2), and the KV cache's new entries: the
        /// bits of [`crate::linear::linear_f32()`] followed by [`crate::rotary_kv_write::rotary_kv_write()`].
        ///
        /// - `x_map`: the tensor map of x, bf16 \[M, K\], in boxes of 64 of k and 64 rows; `weight_map`: that of the weight,
        ///   bf16 \[(H + 2 G) D, K\], as \[head\]\[D / 16\]\[half\]\[8\]\[K\] in boxes of one head, 2 of the second dimension, all of
        ///   the next two and 64 of k; the rest as in [`crate::tile_qkv`].
        /// - grid ([`blocks`], ceil(M / 64)); half of a block's 32 outputs are of the first half of a head, half are their partners.
        ///   Blocks of values share their tiles' stores.
        /// - bytes: 2 (N K + M K) + 4 M N, with weights once per block of tokens and tokens once per block.
        /// - the caller: K is a multiple of 64, D of 32; a row whose position is `u32::MAX` stores nothing;
        ///   [`Layout::ring_bytes`] of dynamic shared memory; an `sm_90a` image. Read before the kernels ahead have ended: all but x.
        #[kernel(block = 160, min_blocks = $min_blocks)]
        pub fn $name(
            x_map: In<u64>,
            weight_map: In<u64>,
            bias: In<bf16>,
            table: In<f32>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            queries: Out<f32>,
            key_pages: Out<bf16>,
            value_pages: Out<bf16>,
            width: u32,
            heads: u32,
            kv_heads: u32,
            head_width: u32,
        ) {
            const { assert!($layout.threads() == 160 && $layout.groups == 1 && $layout.cluster == 1) };
            const { assert!(VALUE_BLOCKS as usize == OUTPUTS / 8 && $layout.outputs == OUTPUTS) };
            let heads = Heads {
                bias,
                table,
                positions,
                row_tables,
                page_tables,
                queries,
                key_pages,
                value_pages,
                query_heads: heads,
                kv_heads,
                width: head_width,
            };
            qkv::<{ $layout.depth }, { $layout.ahead }>(x_map, weight_map, heads, width);
        }
    };
}
qkv_kernel!(wgmma_qkv, 1, QKV);
qkv_kernel!(wgmma_qkv_paired, 2, QKV_PAIRED);
