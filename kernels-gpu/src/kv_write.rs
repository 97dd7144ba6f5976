//! Stores the keys and values of a step's tokens in the pages of the KV cache.
//!
//! A page holds [`PAGE`] consecutive tokens of one sequence for every KV head of one layer: keys as \[G, PAGE, D\], values
//! transposed as \[G, D, PAGE\], because a tensor-core product of probabilities and values wants the tokens of one
//! column side by side. A sequence's page table lists its pages in the order of their tokens.

use cuda_std::prelude::*;

/// Tokens in a page. Equal to the span of the attention definition ([`crate::attention::SPAN`]).
pub const PAGE: usize = crate::attention::SPAN;

/// key_pages\[page, g, t, d\] = key and value_pages\[page, g, d, t\] = value of each row, rounded to bf16, where page and t
/// follow from the row's position.
///
/// Models launch [`crate::rotary_kv_write`], which gives these bits; this is the definition that tests compare it with.
///
/// - `qkv`: f32 \[T, stride\], keys from column `key_column` on, \[G, D\], values after them; `positions`: u32 \[T\];
///   `row_tables`: u32 \[T\], where the row's page table starts in `page_tables`; `page_tables`: u32.
/// - grid (ceil(G D / 128), T); a thread stores one key and one value element.
/// - bytes: 12 per element of a key.
/// - a row whose position is `u32::MAX` is padding and stores nothing.
/// - the caller: the pages of every position are in the tables, and no two rows share a position of a sequence.
#[kernel(block = 128)]
pub fn kv_write(
    qkv: In<f32>,
    positions: In<u32>,
    row_tables: In<u32>,
    page_tables: In<u32>,
    key_pages: Out<bf16>,
    value_pages: Out<bf16>,
    stride: u32,
    key_column: u32,
    kv_heads: u32,
    head_width: u32,
) {
    let index = thread::index_1d() as usize;
    let (kv_heads, head_width) = (kv_heads as usize, head_width as usize);
    let kv_width = kv_heads * head_width;
    let row = thread::block_idx_y() as usize;
    let position = positions.get(row) as usize;
    if index < kv_width && position != u32::MAX as usize {
        let page = page_tables.get(row_tables.get(row) as usize + position / PAGE) as usize;
        let token = position % PAGE;
        let (head, d) = (index / head_width, index % head_width);
        let head_start = (page * kv_heads + head) * PAGE * head_width;
        let source = row * stride as usize + key_column as usize + index;
        key_pages.set(head_start + token * head_width + d, f32_to_bf16(qkv.get(source)));
        value_pages.set(head_start + d * PAGE + token, f32_to_bf16(qkv.get(source + kv_width)));
    }
}
