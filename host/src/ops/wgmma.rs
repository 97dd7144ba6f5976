//! The linear layers of decode steps of many rows on Hopper, with what stands behind them. Each gives the bits of the separate operations
//! on a GPU; how many tokens a block takes changes none.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::warpgroup_tiles::{Layout, STAGE};
use kernels_gpu::wgmma_qkv::{QKV, QKV_PAIRED};
use kernels_gpu::{few_logits, wgmma_gate_up, wgmma_logits, wgmma_parts, wgmma_qkv};

use super::attention::PagesMut;
use super::few::Places;
use super::tensor_maps::{Boxes, TensorMaps};
use super::tiles::BlockTokens;
use super::{HeadShape, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut, Weight, contract};

/// Layouts for 64, 128 and 256 tokens.
pub(super) type Layouts = [Layout; 3];

pub(super) const PARTS: Layouts = [wgmma_parts::PARTS_64, wgmma_parts::PARTS_128, wgmma_parts::PARTS_256];
pub(super) const GATE_UP: Layouts = [wgmma_gate_up::GATE_UP_64, wgmma_gate_up::GATE_UP_128, wgmma_gate_up::GATE_UP_256];
pub(super) const LOGITS: Layouts = [wgmma_logits::LOGITS_64, wgmma_logits::LOGITS_128, wgmma_logits::LOGITS_256];

/// The image whose kernels have the instructions: no other GPU has them.
pub(super) const IMAGE: &str = "sm_90a";

/// How many blocks of [`wgmma_qkv()`] a multiprocessor has at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvBlocks {
    /// One, with room for all of its operands, where they leave half of the multiprocessors to the next kernel; or two.
    Chosen,
    /// One.
    One,
    /// Two.
    Two,
}

/// Whether the kernels of this file take a model's shapes on this device.
#[must_use]
pub fn wgmma_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize) -> bool {
    let layouts = [PARTS, GATE_UP, LOGITS].into_iter().flatten().chain([QKV, QKV_PAIRED]);
    let most = layouts.map(Layout::ring_bytes).max().unwrap_or(0);
    device.kernel_image() == Some(IMAGE)
        && most <= device.shared_bytes_per_block()
        && hidden.is_multiple_of(STAGE)
        && ffn.is_multiple_of(STAGE * contract::segments(hidden, ffn))
        && heads.query_width().is_multiple_of(STAGE * contract::segments(hidden, heads.query_width()))
        && heads.width.is_multiple_of(32)
}

/// Elements of the scratch of [`wgmma_logits()`] for `rows` rows.
#[must_use]
pub fn wgmma_best_len(device: &Device, rows: usize) -> usize {
    device.multiprocessors() * rows
}

/// Which of the layouts: the smallest with room for all tokens, or the largest; or the caller's.
fn layout(name: &str, block: BlockTokens, layouts: &Layouts, tokens: usize) -> Result<usize, DeviceError> {
    match block {
        BlockTokens::Chosen => Ok(layouts.iter().position(|layout| tokens <= layout.tokens()).unwrap_or(2)),
        BlockTokens::Of(wanted) => layouts.iter().position(|layout| layout.tokens() == wanted).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("{name}: a block takes 64, 128 or 256 tokens, not {wanted}"))
        }),
    }
}

fn grid(name: &str, layout: Layout, blocks: usize, tokens: usize, segments: usize) -> Result<Grid, DeviceError> {
    Ok(Grid {
        blocks: [
            size(name, blocks.next_multiple_of(layout.cluster))?,
            size(name, tokens.div_ceil(layout.tokens()))?,
            size(name, segments)?,
        ],
        dynamic_shared_bytes: size(name, layout.ring_bytes())?,
    })
}

/// M of `x` \[M, K\], where K suits and the device has the instructions.
pub(super) fn rows(
    name: &str,
    device: &Device,
    x: &Slice<'_, bf16>,
    width: usize,
    segments: usize,
) -> Result<usize, DeviceError> {
    expect(device.kernel_image() == Some(IMAGE), name, || {
        format!("kernels of an {IMAGE} image; use the separate operations")
    })?;
    let shaped = segments > 0
        && width > 0
        && width.is_multiple_of(STAGE * segments)
        && !x.is_empty()
        && x.len().is_multiple_of(width);
    expect(shaped, name, || format!("x [M, {width}] of {}, K a multiple of {}", x.len(), STAGE * segments))?;
    Ok(x.len() / width)
}

/// Queries, keys and values of `x` \[M, K\], rotated (pairs i and i + D/2): the queries are left in `queries`
/// \[M, (H + 2 G) D\], keys and values are stored in their pages. The bits of [`linear`](super::linear) and
/// [`rotary_kv_write`](super::rotary_kv_write). `maps` has [`Mapped::QkvInput`](super::Mapped::QkvInput) and [`Mapped::Qkv`](super::Mapped::Qkv) of them.
///
/// # Errors
/// As for [`wgmma_parts()`].
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn wgmma_qkv(
    device: &Device,
    at_once: QkvBlocks,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    bias: &Slice<'_, bf16>,
    rope_table: &Slice<'_, f32>,
    places: Places<'_>,
    queries: &mut SliceMut<'_, f32>,
    pages: &mut PagesMut<'_>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_qkv";
    let (width, outputs) = (weight.k(), heads.qkv_width());
    let tokens = rows(NAME, device, x, width, 1)?;
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
    let blocks = wgmma_qkv::blocks(heads.query_heads, heads.kv_heads, heads.width);
    let paired = match at_once {
        // Large blocks on most multiprocessors would keep attention's from starting early.
        QkvBlocks::Chosen => 2 * blocks * tokens.div_ceil(QKV.tokens()) > device.multiprocessors(),
        QkvBlocks::One | QkvBlocks::Two => at_once == QkvBlocks::Two,
    };
    let (layout, kernel) = match paired {
        false => (QKV, wgmma_qkv::wgmma_qkv::launch as fn(_, _, _, _, _, _, _, _, _, _, _, _, _, _) -> _),
        true => (QKV_PAIRED, wgmma_qkv::wgmma_qkv_paired::launch as _),
    };
    let (x_map, weight_map) = (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Partners)?);
    device.launch(
        kernel(
            &x_map,
            &weight_map,
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
        grid(NAME, layout, blocks, tokens, 1)?,
    )
}

/// `x` \[M, K\] times the weight \[N, K\], with K in `segments` equal, consecutive segments: `parts` \[segments, M, N\]. `maps` has
/// [`Mapped::PartsInput`](super::Mapped::PartsInput) and [`Mapped::Parts`](super::Mapped::Parts) of them.
///
/// # Errors
/// A shape that does not fit, a map that is missing, or the launch's error.
pub fn wgmma_parts(
    device: &Device,
    block: BlockTokens,
    maps: &TensorMaps,
    segments: usize,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    parts: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_parts";
    let (width, outputs) = (weight.k(), weight.n());
    let tokens = rows(NAME, device, x, width, segments)?;
    expect(parts.len() == segments * tokens * outputs && outputs.is_multiple_of(8), NAME, || {
        format!("parts of {}, {segments} x {tokens} x {outputs} (a multiple of 8)", parts.len())
    })?;
    // The fewest tokens for which each block has a multiprocessor: its time is that of the tokens' way there.
    let blocks = |layout: Layout| outputs.div_ceil(layout.outputs) * tokens.div_ceil(layout.tokens()) * segments;
    let chosen = match block {
        BlockTokens::Chosen if blocks(PARTS[0]) <= device.multiprocessors() => 0,
        _ => layout(NAME, block, &PARTS, tokens)?,
    };
    let layout = PARTS[chosen];
    let kernel = match chosen {
        0 => wgmma_parts::wgmma_parts_64::launch,
        1 => wgmma_parts::wgmma_parts_128::launch,
        _ => wgmma_parts::wgmma_parts_256::launch,
    };
    let (x_map, weight_map) =
        (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Rows(layout.outputs))?);
    let grid = grid(NAME, layout, outputs.div_ceil(layout.outputs), tokens, segments)?;
    let (tokens, outputs, part) = (size(NAME, tokens)?, size(NAME, outputs)?, size(NAME, width / segments)?);
    device.launch(kernel(&x_map, &weight_map, parts, tokens, outputs, part), grid)
}

/// silu(gate) * up of `x` \[M, K\] into `out` \[M, F\], where the weight \[2 F, K\] has gate, then up. The bits of
/// [`linear`](super::linear) into bf16 and [`silu_mul`](super::silu_mul). `maps` has [`Mapped::GateUpInput`](super::Mapped::GateUpInput) and [`Mapped::GateUp`](super::Mapped::GateUp) of
/// them.
///
/// # Errors
/// As for [`wgmma_parts()`].
pub fn wgmma_gate_up(
    device: &Device,
    block: BlockTokens,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    out: &mut SliceMut<'_, bf16>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_gate_up";
    let (width, ffn) = (weight.k(), weight.n() / 2);
    let tokens = rows(NAME, device, x, width, 1)?;
    let shaped = weight.n() == 2 * ffn && ffn.is_multiple_of(8) && out.len() == tokens * ffn;
    expect(shaped, NAME, || {
        format!("weight {} x {width}, F a multiple of 8, out [{tokens}, {ffn}] of {}", weight.n(), out.len())
    })?;
    let chosen = layout(NAME, block, &GATE_UP, tokens)?;
    let layout = GATE_UP[chosen];
    let kernel = match chosen {
        0 => wgmma_gate_up::wgmma_gate_up_64::launch,
        1 => wgmma_gate_up::wgmma_gate_up_128::launch,
        _ => wgmma_gate_up::wgmma_gate_up_256::launch,
    };
    let (x_map, weight_map) = (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Eights)?);
    let grid = grid(NAME, layout, (2 * ffn).div_ceil(layout.outputs), tokens, 1)?;
    let (tokens, ffn, width) = (size(NAME, tokens)?, size(NAME, ffn)?, size(NAME, width)?);
    device.launch(kernel(&x_map, &weight_map, out, tokens, ffn, width), grid)
}

/// The head of `x` \[M, K\]: `logits` \[M, V\] where given, and the token that [`argmax`](super::argmax) would choose of each row
/// in `ids` \[M\]. `best` has [`wgmma_best_len`] elements or more. `maps` has [`Mapped::LogitsInput`](super::Mapped::LogitsInput) and [`Mapped::Logits`](super::Mapped::Logits) of them.
///
/// # Errors
/// As for [`wgmma_parts()`].
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn wgmma_logits(
    device: &Device,
    block: BlockTokens,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    logits: &mut SliceMut<'_, f32>,
    best: &mut SliceMut<'_, u64>,
    ids: &mut SliceMut<'_, u32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_logits";
    let (width, vocab) = (weight.k(), weight.n());
    let tokens = rows(NAME, device, x, width, 1)?;
    let chosen = layout(NAME, block, &LOGITS, tokens)?;
    let layout = LOGITS[chosen];
    let resident = device.multiprocessors() / tokens.div_ceil(layout.tokens()) / layout.cluster * layout.cluster;
    let blocks = vocab.div_ceil(layout.outputs).next_multiple_of(layout.cluster).min(resident.max(layout.cluster));
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
        0 => wgmma_logits::wgmma_logits_64::launch,
        1 => wgmma_logits::wgmma_logits_128::launch,
        _ => wgmma_logits::wgmma_logits_256::launch,
    };
    let (x_map, weight_map) =
        (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Rows(layout.outputs))?);
    let mut best = best.slice_mut(..blocks * tokens)?;
    let grid = grid(NAME, layout, blocks, tokens, 1)?;
    let (columns, vocab, width) = (size(NAME, tokens)?, size(NAME, vocab)?, size(NAME, width)?);
    device.launch(kernel(&x_map, &weight_map, logits, &mut best, columns, vocab, width), grid)?;
    device.launch(few_logits::few_argmax::launch(&best.as_slice(), ids, columns), Grid::new_1d(columns))
}
