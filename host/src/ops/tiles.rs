//! The linear layers of decode steps beyond [`FEW`](super::FEW) rows, with what stands behind them. Each gives the bits of the
//! separate operations on a GPU; how many tokens a block takes changes none.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::tiles::{Layout, STAGE};
use kernels_gpu::{few_logits, tile_gate_up, tile_logits, tile_parts, tile_qkv};

use super::attention::PagesMut;
use super::few::Places;
use super::{HeadShape, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut, Weight, contract};

/// Layouts for 16, 32 and 64 tokens.
type Layouts = [Layout; 3];

const QKV: Layouts = [tile_qkv::QKV_16, tile_qkv::QKV_32, tile_qkv::QKV_64];
const PARTS: Layouts = [tile_parts::PARTS_16, tile_parts::PARTS_32, tile_parts::PARTS_64];
const GATE_UP: Layouts = [tile_gate_up::GATE_UP_16, tile_gate_up::GATE_UP_32, tile_gate_up::GATE_UP_64];
const LOGITS: Layouts = [tile_logits::LOGITS_16, tile_logits::LOGITS_32, tile_logits::LOGITS_64];

/// Blocks of a multiprocessor: what their layouts leave room for.
const BLOCKS: usize = 2;

/// Whether the kernels of this file take a model's shapes on this device.
#[must_use]
pub fn tiles_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize) -> bool {
    let most = [QKV, PARTS, GATE_UP, LOGITS].into_iter().flatten().map(Layout::ring_bytes).max().unwrap_or(0);
    let parted = |n, k: usize| k.is_multiple_of(STAGE * contract::segments(n, k));
    hidden.is_multiple_of(STAGE)
        && parted(hidden, heads.query_width())
        && parted(hidden, ffn)
        && heads.width.is_multiple_of(32)
        && most + STATIC_BYTES <= device.shared_bytes_per_block()
}

/// What [`tile_logits()`] has in shared memory besides its ring, at most.
const STATIC_BYTES: usize = 1024;

/// Elements of the scratch of [`tile_logits()`], for any number of rows.
#[must_use]
pub fn tile_best_len(device: &Device) -> usize {
    // A block has at most 64 tokens.
    BLOCKS * device.multiprocessors() * 64
}

/// How many tokens a block takes: what the operations of this file make of the shapes, or a number of the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockTokens {
    /// The most tokens (a weight is read once for each block of them) with which the blocks still keep the device busy, and
    /// that leave less than half a block empty.
    Chosen,
    /// 16, 32 or 64.
    Of(usize),
}

impl BlockTokens {
    /// Which of the layouts, for a layer of so many rows and outputs.
    fn layout(
        self,
        name: &str,
        device: &Device,
        layouts: &Layouts,
        rows: usize,
        outputs: usize,
    ) -> Result<usize, DeviceError> {
        let Self::Of(tokens) = self else {
            let suits = |layout: &Layout| {
                let blocks = outputs.div_ceil(layout.outputs()) * rows.div_ceil(layout.tokens());
                layout.tokens() < 2 * rows.next_multiple_of(16) && blocks * 4 >= device.multiprocessors() * 3
            };
            return Ok(layouts.iter().rposition(suits).unwrap_or(0));
        };
        layouts.iter().position(|layout| layout.tokens() == tokens).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("{name}: a block takes 16, 32 or 64 tokens, not {tokens}"))
        })
    }
}

fn grid(name: &str, layout: Layout, rows: usize, blocks: usize, segments: usize) -> Result<Grid, DeviceError> {
    Ok(Grid {
        blocks: [size(name, rows.div_ceil(layout.tokens()))?, size(name, blocks)?, size(name, segments)?],
        dynamic_shared_bytes: size(name, layout.ring_bytes())?,
    })
}

/// M of `x` \[M, K\], where K suits.
fn rows(name: &str, x: &Slice<'_, bf16>, width: usize, segments: usize) -> Result<usize, DeviceError> {
    let shaped = width > 0 && width.is_multiple_of(STAGE * segments) && !x.is_empty() && x.len().is_multiple_of(width);
    expect(shaped, name, || format!("x [M, {width}] of {}, K a multiple of {}", x.len(), STAGE * segments))?;
    Ok(x.len() / width)
}

/// Queries, keys and values of `x` \[M, K\], rotated (pairs i and i + D/2): the queries are left in `queries`
/// \[M, (H + 2 G) D\], keys and values are stored in their pages. The bits of [`linear`](super::linear) and
/// [`rotary_kv_write`](super::rotary_kv_write).
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn tile_qkv(
    device: &Device,
    block: BlockTokens,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    bias: &Slice<'_, bf16>,
    rope_table: &Slice<'_, f32>,
    places: Places<'_>,
    queries: &mut SliceMut<'_, f32>,
    pages: &mut PagesMut<'_>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    const NAME: &str = "tile_qkv";
    let (width, outputs) = (weight.k(), heads.qkv_width());
    let tokens = rows(NAME, x, width, 1)?;
    let shaped = weight.n() == outputs
        && (bias.is_empty() || bias.len() == outputs)
        && places.positions.len() == tokens
        && places.row_tables.len() == tokens
        && queries.len() == tokens * outputs
        && heads.width.is_multiple_of(32)
        && pages.keys.len() == pages.values.len();
    expect(shaped, NAME, || {
        format!(
            "x of {tokens} rows, {} positions, queries {}, weight {} x {width}, {heads:?}",
            places.positions.len(),
            queries.len(),
            weight.n()
        )
    })?;
    let chosen = block.layout(NAME, device, &QKV, tokens, outputs)?;
    let layout = QKV[chosen];
    let kernel = match chosen {
        0 => tile_qkv::tile_qkv_16::launch,
        1 => tile_qkv::tile_qkv_32::launch,
        _ => tile_qkv::tile_qkv_64::launch,
    };
    device.launch(
        kernel(
            x,
            &weight.rows()?.as_slice(),
            bias,
            rope_table,
            &places.positions,
            &places.row_tables,
            &places.page_tables,
            queries,
            &mut pages.keys,
            &mut pages.values,
            size(NAME, width)?,
            size(NAME, heads.query_heads)?,
            size(NAME, heads.kv_heads)?,
            size(NAME, heads.width)?,
        ),
        grid(NAME, layout, tokens, outputs.div_ceil(layout.outputs()), 1)?,
    )
}

/// `x` \[M, K\] times the weight \[N, K\], with K in `segments` equal, consecutive segments: `parts` \[segments, M, N\].
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn tile_parts(
    device: &Device,
    block: BlockTokens,
    segments: usize,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    parts: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "tile_parts";
    let (width, outputs) = (weight.k(), weight.n());
    expect(segments > 0, NAME, || "K has no segments".to_owned())?;
    let tokens = rows(NAME, x, width, segments)?;
    expect(parts.len() == segments * tokens * outputs && outputs.is_multiple_of(16), NAME, || {
        format!("parts of {}, {segments} x {tokens} x {outputs} (a multiple of 16)", parts.len())
    })?;
    // A block of a segment works longer than one of a narrow layer: more of them keep the device busy.
    let chosen = block.layout(NAME, device, &PARTS, tokens, outputs * segments.div_ceil(2))?;
    let layout = PARTS[chosen];
    let kernel = match chosen {
        0 => tile_parts::tile_parts_16::launch,
        1 => tile_parts::tile_parts_32::launch,
        _ => tile_parts::tile_parts_64::launch,
    };
    let grid = grid(NAME, layout, tokens, outputs.div_ceil(layout.outputs()), segments)?;
    let (tokens, outputs) = (size(NAME, tokens)?, size(NAME, outputs)?);
    let (width, part) = (size(NAME, width)?, size(NAME, width / segments)?);
    device.launch(kernel(x, &weight.rows()?.as_slice(), parts, tokens, outputs, width, part), grid)
}

/// silu(gate) * up of `x` \[M, K\] into `out` \[M, F\], where the weight \[2 F, K\] has gate, then up. The bits of
/// [`linear`](super::linear) into bf16 and [`silu_mul`](super::silu_mul).
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn tile_gate_up(
    device: &Device,
    block: BlockTokens,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    out: &mut SliceMut<'_, bf16>,
) -> Result<(), DeviceError> {
    const NAME: &str = "tile_gate_up";
    let (width, ffn) = (weight.k(), weight.n() / 2);
    let tokens = rows(NAME, x, width, 1)?;
    let shaped = weight.n() == 2 * ffn && ffn.is_multiple_of(8) && out.len() == tokens * ffn;
    expect(shaped, NAME, || {
        format!("weight {} x {width}, F a multiple of 8, out [{tokens}, {ffn}] of {}", weight.n(), out.len())
    })?;
    let chosen = block.layout(NAME, device, &GATE_UP, tokens, 2 * ffn)?;
    let layout = GATE_UP[chosen];
    let kernel = match chosen {
        0 => tile_gate_up::tile_gate_up_16::launch,
        1 => tile_gate_up::tile_gate_up_32::launch,
        _ => tile_gate_up::tile_gate_up_64::launch,
    };
    let grid = grid(NAME, layout, tokens, (2 * ffn).div_ceil(layout.outputs()), 1)?;
    let (tokens, ffn, width) = (size(NAME, tokens)?, size(NAME, ffn)?, size(NAME, width)?);
    device.launch(kernel(x, &weight.rows()?.as_slice(), out, tokens, ffn, width), grid)
}

/// The head of `x` \[M, K\]: `logits` \[M, V\] where given, and the token that [`argmax`](super::argmax) would choose of each row
/// in `ids` \[M\]. `best` has [`tile_best_len`] elements or more.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn tile_logits(
    device: &Device,
    block: BlockTokens,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    logits: &mut SliceMut<'_, f32>,
    best: &mut SliceMut<'_, u64>,
    ids: &mut SliceMut<'_, u32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "tile_logits";
    let (width, vocab) = (weight.k(), weight.n());
    let tokens = rows(NAME, x, width, 1)?;
    let chosen = block.layout(NAME, device, &LOGITS, tokens, vocab)?;
    let layout = LOGITS[chosen];
    let resident = BLOCKS * device.multiprocessors() / tokens.div_ceil(layout.tokens());
    let blocks = vocab.div_ceil(layout.outputs()).min(resident.max(1));
    let shaped = vocab > 0
        && (logits.is_empty() || logits.len() == tokens * vocab)
        && best.len() >= blocks * tokens
        && ids.len() == tokens;
    expect(shaped, NAME, || {
        format!(
            "x [{tokens}, {width}], weight {vocab} x {width}, logits {}, best {}, ids {}",
            logits.len(),
            best.len(),
            ids.len()
        )
    })?;
    let kernel = match chosen {
        0 => tile_logits::tile_logits_16::launch,
        1 => tile_logits::tile_logits_32::launch,
        _ => tile_logits::tile_logits_64::launch,
    };
    let mut best = best.slice_mut(..blocks * tokens)?;
    let grid = grid(NAME, layout, tokens, blocks, 1)?;
    let (columns, vocab, width) = (size(NAME, tokens)?, size(NAME, vocab)?, size(NAME, width)?);
    device.launch(kernel(x, &weight.rows()?.as_slice(), logits, &mut best, columns, vocab, width), grid)?;
    device.launch(few_logits::few_argmax::launch(&best.as_slice(), ids, columns), Grid::new_1d(columns))
}
