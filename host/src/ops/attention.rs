//! Rotary embedding, the KV cache's pages, and attention.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::attention::SPAN;
use kernels_gpu::attention_decode as decode;
pub use kernels_gpu::attention_decode::NO_ROW;
use kernels_gpu::attention_decode_short as short;
use kernels_gpu::attention_groups as groups;
use kernels_gpu::attention_prefill as prefill;
use kernels_gpu::rotary_kv_write as fused;

use super::{PAGE, Pairing, Places, TensorMaps, blocks, expect, size};
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
    pub(super) fn scale(&self) -> f32 {
        (std::f64::consts::LOG2_E / (self.width as f64).sqrt()) as f32
    }

    pub(super) fn check(&self, operation: &str) -> Result<(), DeviceError> {
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

/// Everything between the QKV layer and attention: adds `bias` \[(H + 2 G) D\] (or none, where it is empty) to each row of
/// `qkv` \[T, (H + 2 G) D\], rotates queries and keys by their positions' angles (pairs i and i + D/2), leaves the queries
/// where they are and stores keys and values in the pages. A row at position [`NO_ROW`] is padding: nothing of it is stored.
///
/// # Errors
/// A shape that does not fit, or the launch's error. A page beyond the cache or a position beyond the table stops the device.
pub fn rotary_kv_write(
    device: &Device,
    qkv: &mut SliceMut<'_, f32>,
    bias: &Slice<'_, bf16>,
    table: &Slice<'_, f32>,
    places: Places<'_>,
    pages: &mut PagesMut<'_>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    const NAME: &str = "rotary_kv_write";
    heads.check(NAME)?;
    let (rows, stride) = (places.positions.len(), heads.qkv_width());
    let shaped = rows > 0
        && places.row_tables.len() == rows
        && qkv.len() == rows * stride
        && (bias.is_empty() || bias.len() == stride)
        && pages.keys.len() == pages.values.len()
        && pages.keys.len() / heads.page_elements() < 1 << 26;
    expect(shaped, NAME, || {
        format!(
            "qkv [{rows}, {stride}] of {}, bias {}, row tables {}, pages {} and {}",
            qkv.len(),
            bias.len(),
            places.row_tables.len(),
            pages.keys.len(),
            pages.values.len()
        )
    })?;
    let rotated = rows.div_ceil(fused::ROTATED_ROWS) * (heads.query_heads + heads.kv_heads) * heads.width;
    size(NAME, rotated)?;
    let columns = rows.div_ceil(fused::GROUP) * heads.kv_heads * heads.width;
    let grid = Grid::new_1d(blocks(NAME, rotated / 8, fused::THREADS)? + blocks(NAME, columns, fused::THREADS)?);
    device.launch(
        fused::rotary_kv_write::launch(
            qkv,
            bias,
            table,
            &places.positions,
            &places.row_tables,
            &places.page_tables,
            &mut pages.keys,
            &mut pages.values,
            size(NAME, heads.query_heads)?,
            size(NAME, heads.kv_heads)?,
            size(NAME, heads.width)?,
        ),
        grid,
    )
}

/// f32 elements that [`attention_decode`] needs as scratch for `rows` rows of contexts up to `spans` spans.
#[must_use]
pub fn partials_len(heads: HeadShape, rows: usize, spans: usize) -> usize {
    rows * heads.query_heads * spans * (heads.width + 2)
}

/// Counters that [`attention_decode`] needs for `rows` rows. They are 0 before the first call, and after every call again.
#[must_use]
pub fn counters_len(heads: HeadShape, rows: usize) -> usize {
    rows * heads.kv_heads
}

/// The scratch memory of [`attention_decode`].
#[derive(Debug)]
pub struct DecodeScratch<'a> {
    /// At least [`partials_len`] elements; their contents are of no concern.
    pub partials: SliceMut<'a, f32>,
    /// At least [`counters_len`] elements, all 0.
    pub counters: SliceMut<'a, u32>,
}

/// How [`attention_decode`] shares its work out. It changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeBlocks {
    /// A block for all spans of a row and KV head, which needs no scratch memory.
    PerContext,
    /// The same by blocks of two spans at once, where others take four: of these a multiprocessor has twice as many.
    PerContextInTwos,
    /// A block for each span; the last one to end merges them.
    PerSpan,
}

impl DecodeBlocks {
    /// The layout for `rows` contexts of `total` spans together, `longest` the longest of them. A block of its own takes a context's
    /// spans one round after the other; blocks for each span hand their parts over to the last one, and share the
    /// multiprocessors. So one context of more than a round is taken apart, many of about one length are not (measured on an
    /// H100: `attention::speed`). Blocks are small where there are more than the device has at once of the large ones.
    #[must_use]
    pub fn for_contexts(device: &Device, heads: HeadShape, rows: usize, longest: usize, total: usize) -> Self {
        Self::on(device.multiprocessors(), heads, rows, longest, total)
    }

    fn on(multiprocessors: usize, heads: HeadShape, rows: usize, longest: usize, total: usize) -> Self {
        let shared = 12 * heads.kv_heads * total / (5 * multiprocessors.max(1));
        if longest > short::warps(heads.width) + shared {
            Self::PerSpan
        } else if heads.width == 64 && rows * heads.kv_heads > short::LARGE_AT_ONCE * multiprocessors {
            Self::PerContextInTwos
        } else {
            Self::PerContext
        }
    }
}

/// Attention of one token per row over its sequence's pages, up to and including its own position.
///
/// `qkv` \[T, (H + 2 G) D\] holds the queries; `out` is \[T, H, D\]. `longest` is the largest context (position + 1) of the
/// rows, or more: what is more costs blocks that end at once, and no bit. A row at position [`NO_ROW`] is padding: nothing
/// of it is read or written.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn attention_decode(
    device: &Device,
    blocks: DecodeBlocks,
    qkv: &Slice<'_, f32>,
    pages: Pages<'_>,
    positions: &Slice<'_, u32>,
    row_tables: &Slice<'_, u32>,
    page_tables: &Slice<'_, u32>,
    scratch: &mut DecodeScratch<'_>,
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
    let (partials, counters) = (partials_len(heads, rows, spans), counters_len(heads, rows));
    expect(scratch.partials.len() >= partials && scratch.counters.len() >= counters, NAME, || {
        format!(
            "{partials} partials and {counters} counters, not {} and {}",
            scratch.partials.len(),
            scratch.counters.len()
        )
    })?;
    let (stride, kv_heads) = (size(NAME, stride)?, size(NAME, heads.kv_heads)?);
    let ratio = size(NAME, heads.query_heads / heads.kv_heads)?;
    if blocks != DecodeBlocks::PerSpan {
        let two = blocks == DecodeBlocks::PerContextInTwos && heads.width == 64;
        let shared_bytes = if two { short::TWO_SPANS_BYTES } else { short::shared_bytes(heads.width) };
        let shared_bytes = size(NAME, shared_bytes)?;
        let grid = Grid { blocks: [kv_heads, size(NAME, rows)?, 1], dynamic_shared_bytes: shared_bytes };
        let kernel = match heads.width {
            32 => short::attention_decode_short_32::launch,
            64 if two => short::attention_decode_short_two_64::launch,
            64 => short::attention_decode_short_64::launch,
            96 => short::attention_decode_short_96::launch,
            _ => short::attention_decode_short_128::launch,
        };
        let (keys, values) = (&pages.keys, &pages.values);
        let scale = heads.scale();
        return device.launch(
            kernel(qkv, keys, values, positions, row_tables, page_tables, out, stride, kv_heads, ratio, scale),
            grid,
        );
    }
    let grid = Grid { blocks: [size(NAME, spans)?, kv_heads, size(NAME, rows)?], dynamic_shared_bytes: 0 };
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
            &mut scratch.partials,
            &mut scratch.counters,
            out,
            stride,
            kv_heads,
            ratio,
            heads.scale(),
        ),
        grid,
    )
}

/// Some rows of a step that are consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Their first row in the step.
    pub first_row: usize,
    /// How many.
    pub rows: usize,
    /// The first one's position in its sequence.
    pub first_position: usize,
    /// Where their sequence's page table starts in the step's.
    pub table_start: usize,
}

/// Which kernel computes tiles. It changes no bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileKind {
    short: bool,
    wide_warps: bool,
}

impl TileKind {
    /// Rows that a tile has at most.
    #[must_use]
    pub fn rows(self) -> usize {
        if self.short { prefill::SHORT_BLOCK_ROWS } else { prefill::BLOCK_ROWS }
    }
}

/// The tiles of rows that [`attention_prefill`] computes: built once a step, uploaded, used by every layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefillTiles {
    /// The numbers to upload: [`TILE_FIELDS`](prefill::TILE_FIELDS) a tile.
    pub numbers: Vec<u32>,
    kind: TileKind,
}

impl PrefillTiles {
    /// Numbers of so many tiles, which is also how many there are at most for so many rows.
    #[must_use]
    pub fn numbers_of(tiles: usize) -> usize {
        tiles * prefill::TILE_FIELDS
    }

    /// How many tiles there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.numbers.len() / prefill::TILE_FIELDS
    }

    /// Which kernel computes them.
    #[must_use]
    pub fn kind(&self) -> TileKind {
        self.kind
    }

    /// The same tiles, and behind them as many without rows as make up `count`. The blocks of those look up the first page of the
    /// last tile's sequence, read nothing of it, write nothing and end.
    #[must_use]
    pub fn filled_up_to(mut self, count: usize) -> Self {
        let table_start = self.numbers.last().copied().unwrap_or(0);
        for _ in self.count()..count {
            self.numbers.extend([0, 0, 0, table_start]);
        }
        self
    }

    /// Cuts segments into tiles, the longest contexts first: they take the most time. How large the tiles are depends on
    /// how many there would be, and changes no bit.
    ///
    /// # Errors
    /// A number beyond u32.
    pub fn new(
        device: &Device,
        segments: impl Iterator<Item = Segment> + Clone,
        heads: HeadShape,
    ) -> Result<Self, DeviceError> {
        let rows: usize = segments.clone().map(|segment| segment.rows).sum();
        // Two blocks of large tiles fit a multiprocessor at once.
        let few = rows.div_ceil(prefill::BLOCK_ROWS) * heads.query_heads < 2 * device.multiprocessors();
        Self::sized(segments, few, heads)
    }

    /// [`new`](Self::new) with tiles of 64 rows (`short`) or of 128, which heads of 128 elements do not have: their shared
    /// memory would be more than smaller GPUs allow a block.
    ///
    /// # Errors
    /// A number beyond u32.
    pub fn sized(segments: impl Iterator<Item = Segment>, short: bool, heads: HeadShape) -> Result<Self, DeviceError> {
        let short = short || heads.width > 96;
        let kind = TileKind { short, wide_warps: false };
        let tile_rows = kind.rows();
        let mut tiles = Vec::new();
        for Segment { first_row, rows, first_position, table_start } in segments {
            let mut done = 0;
            while done < rows {
                // Up to a multiple of the tile: no tile sees a further span for its last few rows.
                let count = (tile_rows - (first_position + done) % tile_rows).min(rows - done);
                tiles.push([first_row + done, count, first_position + done, table_start]);
                done += count;
            }
        }
        tiles.sort_by_key(|&[_, count, first_position, _]| std::cmp::Reverse((first_position + count).div_ceil(SPAN)));
        let numbers: Result<_, _> =
            tiles.into_iter().flatten().map(|number| size("attention_prefill", number)).collect();
        Ok(Self { numbers: numbers?, kind })
    }

    /// The same tiles, of which each warp takes 32 rows instead of 16 where there is such a kernel. It changes no bit.
    #[must_use]
    pub fn with_wide_warps(mut self, wide: bool) -> Self {
        self.kind.wide_warps = wide;
        self
    }

    /// Whether [`with_wide_warps`](Self::with_wide_warps) makes a difference.
    #[must_use]
    pub fn has_wide_warps(&self, heads: HeadShape) -> bool {
        heads.width == 64 && !self.kind.short
    }
}

/// Causal attention of consecutive tokens of any number of sequences over their pages, their own keys and values included.
/// `qkv` is \[T, (H + 2 G) D\], `out` \[T, H, D\]; `tiles` says which rows are meant, and `numbers` are its own on the
/// device. Rows in no tile stay as they are. Where `maps` has [`Mapped::Pages`](super::Mapped::Pages) of both keys and values
/// ([`wgmma_attends`](super::wgmma_attends)), warpgroups compute it; it changes no bit.
///
/// # Errors
/// A shape that does not fit, or the launch's error. A row or page that is not there stops the device.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn attention_prefill(
    device: &Device,
    qkv: &Slice<'_, f32>,
    pages: Pages<'_>,
    maps: Option<&TensorMaps>,
    page_tables: &Slice<'_, u32>,
    tiles: &PrefillTiles,
    numbers: &Slice<'_, u32>,
    out: &mut SliceMut<'_, bf16>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    const NAME: &str = "attention_prefill";
    heads.check(NAME)?;
    let stride = heads.qkv_width();
    let rows = qkv.len() / stride;
    let shaped = rows > 0 && qkv.len() == rows * stride && out.len() == rows * heads.query_width();
    let tiled = !tiles.numbers.is_empty() && numbers.len() == tiles.numbers.len();
    expect(shaped && tiled, NAME, || {
        format!(
            "qkv [T, {stride}] of {}, out of {}, {} numbers of tiles of {}",
            qkv.len(),
            out.len(),
            numbers.len(),
            tiles.numbers.len()
        )
    })?;
    let blocks = [size(NAME, heads.query_heads)?, size(NAME, numbers.len() / prefill::TILE_FIELDS)?, 1];
    if let Some(maps) = maps {
        expect(heads.width == 64, NAME, || format!("heads of 64 elements for warpgroups, not {}", heads.width))?;
        let shared_bytes = size(NAME, groups::shared_bytes())?;
        let kernel = match tiles.kind.short {
            true => groups::attention_groups_short_64::launch,
            false => groups::attention_groups_64::launch,
        };
        let (keys, values) = (maps.pages(NAME, &pages.keys)?, maps.pages(NAME, &pages.values)?);
        return device.launch(
            kernel(
                qkv,
                &keys,
                &values,
                page_tables,
                numbers,
                out,
                size(NAME, stride)?,
                size(NAME, pages.keys.len() / heads.page_elements())?,
                size(NAME, heads.kv_heads)?,
                size(NAME, heads.query_heads / heads.kv_heads)?,
                heads.scale(),
            ),
            Grid { blocks, dynamic_shared_bytes: shared_bytes },
        );
    }
    let shared_bytes = prefill::shared_bytes(tiles.kind.rows(), heads.width);
    let grid = Grid { blocks, dynamic_shared_bytes: size(NAME, shared_bytes)? };
    let kernel = match (heads.width, tiles.kind.short) {
        (32, false) => prefill::attention_prefill_32::launch,
        (64, false) if tiles.kind.wide_warps => prefill::attention_prefill_wide_64::launch,
        (64, false) => prefill::attention_prefill_64::launch,
        (96, false) => prefill::attention_prefill_96::launch,
        (32, true) => prefill::attention_prefill_short_32::launch,
        (64, true) => prefill::attention_prefill_short_64::launch,
        (96, true) => prefill::attention_prefill_short_96::launch,
        _ => prefill::attention_prefill_short_128::launch,
    };
    device.launch(
        kernel(
            qkv,
            &pages.keys,
            &pages.values,
            page_tables,
            numbers,
            out,
            size(NAME, stride)?,
            size(NAME, heads.kv_heads)?,
            size(NAME, heads.query_heads / heads.kv_heads)?,
            heads.scale(),
        ),
        grid,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was faster of two layouts on an H100, which has 132 multiprocessors, with 14 heads on 2: rows, and spans of each.
    #[test]
    fn blocks_are_shared_out_as_was_measured() {
        let on = |width, rows, longest, total| {
            DecodeBlocks::on(132, HeadShape { query_heads: 14, kv_heads: 2, width }, rows, longest, total)
        };
        for (rows, spans) in [(1, 2), (1, 4), (8, 4), (64, 4), (128, 4), (64, 8), (64, 16)] {
            assert_eq!(on(64, rows, spans, rows * spans), DecodeBlocks::PerContext, "{rows} rows of {spans} spans");
        }
        for spans in [4, 8] {
            assert_eq!(on(64, 256, spans, 256 * spans), DecodeBlocks::PerContextInTwos, "256 rows of {spans} spans");
        }
        for (rows, spans) in [(1, 8), (8, 8), (1, 16), (8, 16), (1, 64), (8, 64), (1, 500)] {
            assert_eq!(on(64, rows, spans, rows * spans), DecodeBlocks::PerSpan, "{rows} rows of {spans} spans");
        }
        assert_eq!(
            on(64, 64, 500, 500 + 63 * 4),
            DecodeBlocks::PerSpan,
            "one long context does not hold up many short ones"
        );
        assert_eq!(on(128, 1, 4, 4), DecodeBlocks::PerSpan, "wider heads take fewer spans at once");
    }
}
