//! The query, key and value layer of few tokens, up to attention: see [`crate::few`].

use cuda_std::prelude::*;

use crate::few::{AT_ONCE, CHUNK, Layout, Segment, Strips, arena, chains, normalised, own_strip};
use crate::kv_write::PAGE;

/// Of [`few_qkv()`] and [`few_qkv_wide()`].
pub const QKV: Layout = Layout { warps: 2, depth: 16 };

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn qkv<const THREADS: usize>(
    residual: In<f32>,
    gain: In<bf16>,
    weight: In<bf16>,
    bias: In<bf16>,
    table: In<f32>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    queries: Out<f32>,
    key_pages: Out<bf16>,
    value_pages: Out<bf16>,
    tokens: u32,
    width: u32,
    heads: u32,
    kv_heads: u32,
    head_width: u32,
    eps: f32,
) {
    let (tokens, width) = (tokens as usize, width as usize);
    let (heads, kv_heads, head_width) = (heads as usize, kv_heads as usize, head_width as usize);
    let (half, per_head) = (head_width / 2, head_width / 16);
    let all_heads = heads + 2 * kv_heads;
    let arena = arena(tokens, width, QKV);
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let strips = all_heads * per_head;
    let strip = own_strip(QKV, strips);
    let head = strip / per_head;
    // The lane's place in the head's first half, and its tokens.
    let i = strip % per_head * 8 + g;
    let own = [t * 2, t * 2 + 1];
    chains::<{ QKV.depth }, { QKV.depth / CHUNK - 2 }, AT_ONCE, _>(
        weight,
        arena,
        tokens,
        width,
        Segment { first: 0, width },
        Strips { first: strip, step: strips, end: strips },
        |strip, part| strip / per_head * head_width + part * half + strip % per_head * 8,
        || {
            // What the epilogue needs is older than the predecessors.
            let mut ready = [Epilogue::EMPTY; 2];
            for index in 0..2 {
                let token = own[index];
                if token < tokens && strip < strips {
                    let position = positions.get(token);
                    let mut one = Epilogue { position, ..Epilogue::EMPTY };
                    if position != u32::MAX {
                        if !bias.is_empty() {
                            let first = head * head_width + i;
                            one.bias = [bf16_to_f32(bias.get(first)), bf16_to_f32(bias.get(first + half))];
                        }
                        if head < heads + kv_heads {
                            one.rotation = table.load((position as usize * half + i) * 2);
                        }
                        if head >= heads {
                            one.page = page_tables.get(row_tables.get(token) as usize + position as usize / PAGE);
                        }
                    }
                    ready[index] = one;
                }
            }
            normalised::<THREADS>(&arena.input, residual, gain, tokens, width, eps);
            ready
        },
        |_, sums, ready| {
            for index in 0..2 {
                let token = own[index];
                let Epilogue { position, bias: offsets, rotation: [cos, sin], page } = ready[index];
                if position == u32::MAX {
                    continue;
                }
                let (first, second) = (head * head_width + i, head * head_width + half + i);
                let (mut a, mut b) = (sums[index], sums[index + 2]);
                if !bias.is_empty() {
                    a += offsets[0];
                    b += offsets[1];
                }
                if head < heads + kv_heads {
                    (a, b) = (math::fma(a, cos, -(b * sin)), math::fma(b, cos, a * sin));
                }
                if head < heads {
                    let row = token * all_heads * head_width;
                    queries.set(row + first, a);
                    queries.set(row + second, b);
                    continue;
                }
                let slot = position as usize % PAGE;
                let kv_head = (head - heads) % kv_heads;
                let start = (page as usize * kv_heads + kv_head) * PAGE * head_width;
                if head < heads + kv_heads {
                    key_pages.set(start + slot * head_width + i, f32_to_bf16(a));
                    key_pages.set(start + slot * head_width + half + i, f32_to_bf16(b));
                } else {
                    value_pages.set(start + i * PAGE + slot, f32_to_bf16(a));
                    value_pages.set(start + (half + i) * PAGE + slot, f32_to_bf16(b));
                }
            }
        },
    );
}

macro_rules! qkv_kernel {
    ($name:ident, $threads:tt) => {
        /// RMSNorm, the query, key and value layer, bias, rotary embedding (pairs i and i + D/2), and the KV cache's new entries.
        ///
        /// - `residual`: f32 \[T, C\]; `gain`: bf16 \[C\]; `weight`: bf16 \[(H + 2 G) D, C\]; `bias`: bf16 \[(H + 2 G) D\] or empty;
        ///   `table`: f32 \[positions, D/2, 2\]; `queries`: f32 \[T, (H + 2 G) D\], of which the query columns are written; pages
        ///   as in [`crate::kv_write`].
        /// - grid: blocks of [`QKV`]'s warps for (H + 2 G) D / 16 strips; a warp makes 8 outputs of the first half of a head and
        ///   their 8 partners of the second.
        /// - bytes: 2 N C, and 4 T C for each block.
        /// - the caller: T is at most [`FEW`](crate::few::FEW), C a multiple of 64, D of 32; a row whose position is `u32::MAX` stores nothing;
        ///   dynamic shared memory as [`input_bytes`](crate::few::input_bytes) and [`ring_bytes`](crate::few::ring_bytes) say.
        #[kernel(block = $threads, min_blocks = 1)]
        pub fn $name(
            residual: In<f32>,
            gain: In<bf16>,
            weight: In<bf16>,
            bias: In<bf16>,
            table: In<f32>,
            positions: In<u32>,
            row_tables: In<u32>,
            page_tables: In<u32>,
            queries: Out<f32>,
            key_pages: Out<bf16>,
            value_pages: Out<bf16>,
            tokens: u32,
            width: u32,
            heads: u32,
            kv_heads: u32,
            head_width: u32,
            eps: f32,
        ) {
            qkv::<$threads>(
                residual,
                gain,
                weight,
                bias,
                table,
                positions,
                row_tables,
                page_tables,
                queries,
                key_pages,
                value_pages,
                tokens,
                width,
                heads,
                kv_heads,
                head_width,
                eps,
            );
        }
    };
}
qkv_kernel!(few_qkv, 64);
qkv_kernel!(few_qkv_wide, 256);

/// What one pair of sums of [`few_qkv()`] meets on its way out.
#[derive(Clone, Copy)]
struct Epilogue {
    /// `u32::MAX` where nothing is stored.
    position: u32,
    bias: [f32; 2],
    /// Cosine and sine.
    rotation: [f32; 2],
    page: u32,
}

impl Epilogue {
    const EMPTY: Self = Self { position: u32::MAX, bias: [0.0; 2], rotation: [0.0; 2], page: 0 };
}
