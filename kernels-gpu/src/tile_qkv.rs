//! The query, key and value layer of many tokens, up to attention: see [`crate::tiles`].

use cuda_std::prelude::*;

use crate::kv_write::PAGE;
use crate::tiles::{self, Layer, Layout, Tiles};

/// The layout of [`tile_qkv_16()`].
pub const QKV_16: Layout = Layout { output_warps: 2, token_warps: 1, groups: 1, pairs: 1, depth: 14 };
/// The layout of [`tile_qkv_32()`].
pub const QKV_32: Layout = Layout { output_warps: 2, token_warps: 2, groups: 1, pairs: 1, depth: 12 };
/// The layout of [`tile_qkv_64()`].
pub const QKV_64: Layout = Layout { output_warps: 2, token_warps: 2, groups: 1, pairs: 2, depth: 8 };

/// Where tokens are, and how their heads are laid out.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) bias: In<'a, bf16>,
    pub(crate) table: In<'a, f32>,
    pub(crate) positions: In<'a, u32>,
    pub(crate) row_tables: In<'a, u32>,
    pub(crate) page_tables: In<'a, u32>,
    pub(crate) queries: Out<'a, f32>,
    pub(crate) key_pages: Out<'a, bf16>,
    pub(crate) value_pages: Out<'a, bf16>,
    pub(crate) query_heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) width: u32,
}

/// Two outputs that are rotated together: element `i` of the first half of a head, and its partner in the second.
#[derive(Clone, Copy)]
pub(crate) struct Partners {
    pub(crate) head: u32,
    pub(crate) i: u32,
}

/// What the sums of partners meet on their way out, for a token.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// `u32::MAX` where nothing is stored.
    pub(crate) position: u32,
    /// Cosine and sine.
    pub(crate) rotation: [f32; 2],
    /// The page of a key or a value.
    pub(crate) page: u32,
}

impl Heads<'_> {
    /// Heads that are rotated.
    #[inline(always)]
    pub(crate) fn rotated(&self) -> u32 {
        self.query_heads + self.kv_heads
    }

    /// Outputs of the layer.
    #[inline(always)]
    pub(crate) fn outputs(&self) -> u32 {
        (self.rotated() + self.kv_heads) * self.width
    }

    /// Partners by number, the last ones for all numbers beyond.
    #[inline(always)]
    pub(crate) fn partners(&self, index: u32) -> Partners {
        let (half, count) = (self.width / 2, self.outputs() / 2);
        let index = if index < count { index } else { count - 1 };
        Partners { head: index / half, i: index % half }
    }

    /// The output of the first one.
    #[inline(always)]
    pub(crate) fn first(&self, partners: Partners) -> u32 {
        partners.head * self.width + partners.i
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn offsets(&self, partners: Partners) -> [f32; 2] {
        if self.bias.is_empty() {
            return [0.0; 2];
        }
        let first = self.first(partners);
        [first, first + self.width / 2].map(|output| bf16_to_f32(self.bias.get(output as usize)))
    }

    /// Where the entries of a KV head of a page start.
    #[inline(always)]
    pub(crate) fn entries(&self, page: u32, kv_head: u32) -> usize {
        (page as usize * self.kv_heads as usize + kv_head as usize) * (PAGE * self.width as usize)
    }
}

/// Rotates partners.
#[inline(always)]
pub(crate) fn rotated([a, b]: [f32; 2], [cos, sin]: [f32; 2]) -> [f32; 2] {
    [math::fma(a, cos, -(b * sin)), math::fma(b, cos, a * sin)]
}

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn tile_qkv<
    const OUTPUT_WARPS: usize,
    const TOKEN_WARPS: usize,
    const PAIRS: usize,
    const DEPTH: usize,
    const PENDING: usize,
>(
    x: In<bf16>,
    weight: In<bf16>,
    heads: Heads,
    width: u32,
) {
    let tokens = heads.positions.len() as u32;
    let (outputs, half) = (heads.outputs(), heads.width / 2);
    let first_token = thread::block_idx_x() * (TOKEN_WARPS * PAIRS * 16) as u32;
    let tile = thread::block_idx_y();
    // A group is 8 partners in one head: a lane has both sums of its own.
    let group = |group: u32| (tile * OUTPUT_WARPS as u32 + group) * 8;
    let own_group = group(tiles::block_group::<OUTPUT_WARPS, 1>(0));
    let own = heads.partners(own_group + thread::lane_id() / 4);
    let token = |pair: usize, eight: usize, element: usize| {
        first_token + tiles::token::<OUTPUT_WARPS, PAIRS>(pair, eight, element)
    };
    tiles::compute::<OUTPUT_WARPS, TOKEN_WARPS, 1, PAIRS, DEPTH, PENDING, false, _>(
        Layer { x, weight, tokens, outputs, width, first: 0, part: width },
        first_token,
        Tiles { first: tile, step: 1, count: 1 },
        |_, r| heads.first(heads.partners(group(r / 16) + r % 8)) + r % 16 / 8 * half,
        || {
            // What the sums meet is older than the predecessors. First all positions, then all that follows from them: loads
            // wait for each other twice, not once for each token.
            let inside = own_group < outputs / 2;
            let mut places = [[[Place { position: u32::MAX, rotation: [0.0; 2], page: 0 }; 2]; 2]; PAIRS];
            let mut tables = [[[0u32; 2]; 2]; PAIRS];
            for pair in 0..PAIRS {
                for eight in 0..2 {
                    for element in 0..2 {
                        let token = token(pair, eight, element);
                        if inside && token < tokens {
                            places[pair][eight][element].position = heads.positions.get(token as usize);
                            tables[pair][eight][element] = heads.row_tables.get(token as usize);
                        }
                    }
                }
            }
            for pair in 0..PAIRS {
                for eight in 0..2 {
                    for element in 0..2 {
                        let place = &mut places[pair][eight][element];
                        if place.position != u32::MAX {
                            let position = place.position as usize;
                            if own.head < heads.rotated() {
                                let angle = position * half as usize + own.i as usize;
                                place.rotation = heads.table.load(angle * 2);
                            }
                            if own.head >= heads.query_heads {
                                let entry = tables[pair][eight][element] as usize + position / PAGE;
                                place.page = heads.page_tables.get(entry);
                            }
                        }
                    }
                }
            }
            (places, heads.offsets(own))
        },
        |_, sums, (places, offsets)| {
            let biased = |pair: usize, eight: usize, element: usize| {
                let sum: &[f32; 4] = &sums[0][pair][eight];
                let [a, b] = [sum[element], sum[element + 2]];
                if heads.bias.is_empty() { [a, b] } else { [a + offsets[0], b + offsets[1]] }
            };
            let Partners { head, i } = own;
            let (i, half) = (i as usize, half as usize);
            let row_elements = outputs as usize;
            heads.queries.check(0, tokens as usize * row_elements);
            for pair in 0..PAIRS {
                for eight in 0..2 {
                    for element in 0..2 {
                        let Place { position, rotation, page } = places[pair][eight][element];
                        if position == u32::MAX {
                            continue;
                        }
                        let slot = position as usize % PAGE;
                        if head < heads.query_heads {
                            let [a, b] = rotated(biased(pair, eight, element), rotation);
                            let first = token(pair, eight, element) as usize * row_elements + heads.first(own) as usize;
                            // SAFETY: a token with a position is one of the step's, and both outputs are of its row (all
                            // rows are there: checked above).
                            unsafe {
                                heads.queries.set_unchecked(first, a);
                                heads.queries.set_unchecked(first + half, b);
                            }
                        } else if head < heads.rotated() {
                            let [a, b] = rotated(biased(pair, eight, element), rotation).map(f32_to_bf16);
                            let start = heads.entries(page, head - heads.query_heads) + slot * heads.width as usize;
                            heads.key_pages.set(start + i, a);
                            heads.key_pages.set(start + half + i, b);
                        } else {
                            let [a, b] = biased(pair, eight, element).map(f32_to_bf16);
                            let start = heads.entries(page, head - heads.rotated()) + slot;
                            heads.value_pages.set(start + i * PAGE, a);
                            heads.value_pages.set(start + (half + i) * PAGE, b);
                        }
                    }
                }
            }
        },
    );
}

macro_rules! qkv_kernel {
    ($name:ident, $threads:tt, $layout:ident) => {
        /// The query, key and value layer, bias, rotary embedding (pairs i and i + D/2), and the KV cache's new entries: the
        /// bits of [`crate::linear::linear_f32()`] followed by [`crate::rotary_kv_write::rotary_kv_write()`].
        ///
        /// - `x`: bf16 \[M, K\]; `weight`: bf16 \[(H + 2 G) D, K\]; `bias`: bf16 \[(H + 2 G) D\] or empty; `table`: f32
        ///   \[positions, D/2, 2\]; `positions`, `row_tables`: u32 \[M\]; `page_tables`: u32; `queries`: f32
        ///   \[M, (H + 2 G) D\], of which the query columns are written; pages as in [`crate::kv_write`].
        /// - grid (ceil(M / tokens), ceil((H + 2 G) D / outputs)), tokens and outputs of the layout; half of a block's
        ///   outputs are of the first halves of heads, half are their partners.
        /// - bytes: 2 (N K + M K) + 4 M N, with weights once per block of tokens and tokens once per block of outputs.
        /// - the caller: K is a multiple of 64, D of 16; a row whose position is `u32::MAX` stores nothing;
        ///   [`Layout::ring_bytes`] of dynamic shared memory. Read before the kernels ahead have ended: all but `x`.
        #[kernel(block = $threads, min_blocks = 2)]
        pub fn $name(
            x: In<bf16>,
            weight: In<bf16>,
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
            const { assert!($layout.threads() == $threads && $layout.groups == 1) };
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
            tile_qkv::<
                { $layout.output_warps },
                { $layout.token_warps },
                { $layout.pairs },
                { $layout.depth },
                { $layout.depth - 2 },
            >(x, weight, heads, width);
        }
    };
}
qkv_kernel!(tile_qkv_16, 64, QKV_16);
qkv_kernel!(tile_qkv_32, 128, QKV_32);
qkv_kernel!(tile_qkv_64, 128, QKV_64);
