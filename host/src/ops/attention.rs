//! Rotary embedding, the KV cache's pages, and attention.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::attention::SPAN;
use kernels_gpu::attention_decode as decode;
use kernels_gpu::attention_prefill as prefill;

use super::{PAGE, Pairing, blocks, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut};

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// H.
    pub query_heads: usize,
    /// G; divides H.
    pub kv_heads: usize,
    /// D: 32, 64, 96 or 128.
    pub width: usize,
}

impl HeadShape {
    /// Elements of a row of queries, keys and values: (H + 2 G) D.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.query_heads + 2 * self.kv_heads) * self.width
    }

    /// Elements of a row of queries: H D.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.query_heads * self.width
    }

    /// bf16 elements of a page's keys (and as many of its values): G `PAGE` D.
    #[must_use]
    pub fn page_elements(&self) -> usize {
        self.kv_heads * PAGE * self.width
    }

    /// What scores are multiplied by: log2(e) / sqrt(D), so that probabilities are powers of 2.
    fn scale(&self) -> f32 {
        (std::f64::consts::LOG2_E / (self.width as f64).sqrt()) as f32
    }

    fn check(&self, operation: &str) -> Result<(), DeviceError> {
        let heads = self.kv_heads > 0 && self.query_heads.is_multiple_of(self.kv_heads);
        let ratio = if heads { self.query_heads / self.kv_heads } else { 0 };
        expect(matches!(self.width, 32 | 64 | 96 | 128) && (1..=16).contains(&ratio), operation, || {
            format!("{self:?}: widths 32, 64, 96 and 128 and 1 to 16 query heads per KV head are supported")
        })
    }
}

/// One layer's pages of a KV cache: keys \[pages, G, PAGE, D\], values \[pages, G, D, PAGE\].
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// Keys.
    pub keys: Slice<'a, bf16>,
    /// Values.
    pub values: Slice<'a, bf16>,
}

/// One layer's pages, to write.
#[derive(Debug)]
pub struct PagesMut<'a> {
    /// Keys.
    pub keys: SliceMut<'a, bf16>,
    /// Values.
    pub values: SliceMut<'a, bf16>,
}

/// Rotates queries and keys of each row of `qkv` \[T, (H + 2 G) D\] in place by its position's angles; `table` is
/// \[positions, D / 2, 2\].
///
/// # Errors
/// A shape that does not fit, or the launch's error. Positions beyond the table stop the device.
pub fn rotary(
    device: &Device,
    qkv: &mut SliceMut<'_, f32>,
    positions: &Slice<'_, u32>,
    table: &Slice<'_, f32>,
    heads: HeadShape,
    pairing: Pairing,
) -> Result<(), DeviceError> {
    heads.check("rotary")?;
    let stride = heads.qkv_width();
    expect(!positions.is_empty() && qkv.len() == positions.len() * stride, "rotary", || {
        format!("qkv [{}, {stride}] of {}", positions.len(), qkv.len())
    })?;
    let half = heads.width / 2;
    let rotated = heads.query_heads + heads.kv_heads;
    let grid = Grid::new_2d(blocks("rotary", rotated * half, 128)?, size("rotary", positions.len())?);
    let adjacent = u32::from(pairing == Pairing::Adjacent);
    let (stride, rotated, half) = (size("rotary", stride)?, size("rotary", rotated)?, size("rotary", half)?);
    device.launch(kernels_gpu::rotary::rotary::launch(qkv, positions, table, stride, rotated, half, adjacent), grid)
}

/// Stores keys and values of each row of `qkv` \[T, (H + 2 G) D\] at its position, rounded to bf16.
///
/// `row_tables` \[T\] says where in `page_tables` the row's sequence starts to list its pages.
///
/// # Errors
/// A shape that does not fit, or the launch's error. A page beyond the cache stops the device.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn kv_write(
    device: &Device,
    qkv: &Slice<'_, f32>,
    positions: &Slice<'_, u32>,
    row_tables: &Slice<'_, u32>,
    page_tables: &Slice<'_, u32>,
    keys: &mut SliceMut<'_, bf16>,
    values: &mut SliceMut<'_, bf16>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    heads.check("kv_write")?;
    let (rows, stride) = (positions.len(), heads.qkv_width());
    let shaped = rows > 0 && row_tables.len() == rows && qkv.len() == rows * stride && keys.len() == values.len();
    expect(shaped, "kv_write", || {
        format!(
            "qkv [{rows}, {stride}] of {}, row tables {}, pages {} and {}",
            qkv.len(),
            row_tables.len(),
            keys.len(),
            values.len()
        )
    })?;
    let kv_width = heads.kv_heads * heads.width;
    let grid = Grid::new_2d(blocks("kv_write", kv_width, 128)?, size("kv_write", rows)?);
    device.launch(
        kernels_gpu::kv_write::kv_write::launch(
            qkv,
            positions,
            row_tables,
            page_tables,
            keys,
            values,
            size("kv_write", stride)?,
            size("kv_write", heads.query_width())?,
            size("kv_write", heads.kv_heads)?,
            size("kv_write", heads.width)?,
        ),
        grid,
    )
}

/// f32 elements that [`attention_decode`] needs as scratch for `rows` rows of contexts up to `spans` spans.
#[must_use]
pub fn partials_len(heads: HeadShape, rows: usize, spans: usize) -> usize {
    rows * heads.query_heads * spans * (heads.width + 2)
}

/// Attention of one token per row over its sequence's pages, up to and including its own position.
///
/// `qkv` \[T, (H + 2 G) D\] holds the queries; `out` is \[T, H, D\]; `longest` is the largest context (position + 1) of
/// the rows; `partials` has at least [`partials_len`] elements for it.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn attention_decode(
    device: &Device,
    qkv: &Slice<'_, f32>,
    pages: Pages<'_>,
    positions: &Slice<'_, u32>,
    row_tables: &Slice<'_, u32>,
    page_tables: &Slice<'_, u32>,
    partials: &mut SliceMut<'_, f32>,
    out: &mut SliceMut<'_, bf16>,
    heads: HeadShape,
    longest: usize,
) -> Result<(), DeviceError> {
    const NAME: &str = "attention_decode";
    heads.check(NAME)?;
    let (rows, stride, spans) = (positions.len(), heads.qkv_width(), longest.div_ceil(SPAN));
    let shaped = rows > 0 && row_tables.len() == rows && qkv.len() == rows * stride && longest > 0;
    expect(shaped && out.len() == rows * heads.query_width(), NAME, || {
        format!("qkv [{rows}, {stride}] of {}, out of {}, longest context {longest}", qkv.len(), out.len())
    })?;
    let needed = partials_len(heads, rows, spans);
    expect(partials.len() >= needed, NAME, || format!("{needed} partials, not {}", partials.len()))?;
    let grid =
        Grid { blocks: [size(NAME, spans)?, size(NAME, heads.kv_heads)?, size(NAME, rows)?], dynamic_shared_bytes: 0 };
    let kernel = match heads.width {
        32 => decode::attention_decode_32::launch,
        64 => decode::attention_decode_64::launch,
        96 => decode::attention_decode_96::launch,
        _ => decode::attention_decode_128::launch,
    };
    device.launch(
        kernel(
            qkv,
            &pages.keys,
            &pages.values,
            positions,
            row_tables,
            page_tables,
            partials,
            size(NAME, stride)?,
            size(NAME, heads.kv_heads)?,
            size(NAME, heads.query_heads / heads.kv_heads)?,
            size(NAME, spans)?,
            heads.scale(),
        ),
        grid,
    )?;
    device.launch(
        decode::attention_merge::launch(
            &partials.as_slice(),
            positions,
            out,
            size(NAME, heads.width)?,
            size(NAME, spans)?,
        ),
        Grid::new_2d(size(NAME, heads.query_heads)?, size(NAME, rows)?),
    )
}

/// Causal attention of consecutive tokens of one sequence, at positions `first_position` on, over the sequence's
/// pages, their own keys and values included. `qkv` is \[T, (H + 2 G) D\], `out` \[T, H, D\], `page_table` the sequence's.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn attention_prefill(
    device: &Device,
    qkv: &Slice<'_, f32>,
    pages: Pages<'_>,
    page_table: &Slice<'_, u32>,
    out: &mut SliceMut<'_, bf16>,
    heads: HeadShape,
    first_position: usize,
) -> Result<(), DeviceError> {
    const NAME: &str = "attention_prefill";
    heads.check(NAME)?;
    let stride = heads.qkv_width();
    let rows = qkv.len() / stride;
    let shaped = rows > 0 && qkv.len() == rows * stride && out.len() == rows * heads.query_width();
    expect(shaped && page_table.len() * PAGE >= first_position + rows, NAME, || {
        format!(
            "qkv [T, {stride}] of {}, out of {}, {} pages for {} tokens",
            qkv.len(),
            out.len(),
            page_table.len(),
            first_position + rows
        )
    })?;
    let grid = Grid::new_2d(blocks(NAME, rows, prefill::BLOCK_ROWS)?, size(NAME, heads.query_heads)?);
    let kernel = match heads.width {
        32 => prefill::attention_prefill_32::launch,
        64 => prefill::attention_prefill_64::launch,
        96 => prefill::attention_prefill_96::launch,
        _ => prefill::attention_prefill_128::launch,
    };
    device.launch(
        kernel(
            qkv,
            &pages.keys,
            &pages.values,
            page_table,
            out,
            size(NAME, first_position)?,
            size(NAME, rows)?,
            size(NAME, stride)?,
            size(NAME, heads.kv_heads)?,
            size(NAME, heads.query_heads / heads.kv_heads)?,
            heads.scale(),
        ),
        grid,
    )
}
