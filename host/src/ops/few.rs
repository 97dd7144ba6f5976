//! The linear layers of few tokens, fused with their neighbours: what a decode step of a small batch launches. Each gives the
//! bits of the separate operations on a GPU.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::{few, few_gate_up, few_logits, few_qkv, few_residual};

use super::attention::PagesMut;
use super::{HeadShape, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut, Weight, contract};

pub use kernels_gpu::few::FEW;

/// Where the new tokens of a step stand: positions \[T\] (`u32::MAX` for a row that is padding), where each row's page table
/// starts \[T\], and the tables.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// Positions.
    pub positions: Slice<'a, u32>,
    /// Starts of page tables.
    pub row_tables: Slice<'a, u32>,
    /// Page tables.
    pub page_tables: Slice<'a, u32>,
}

/// The norm in front of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// \[C\].
    pub gain: Slice<'a, bf16>,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// Elements of the head's scratch: [`few_logits()`]'s `best`.
#[must_use]
pub fn best_len(device: &Device) -> usize {
    logits_blocks(device) * FEW
}

/// Two blocks for each multiprocessor: each streams its share of the vocabulary.
fn logits_blocks(device: &Device) -> usize {
    2 * device.multiprocessors()
}

/// Whether the kernels of this file take a model's shapes on this device, at [`FEW`] tokens.
#[must_use]
pub fn few_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize) -> bool {
    let (attended, down) = (heads.query_width(), contract::segments(hidden, ffn));
    let output = contract::segments(hidden, attended);
    let residual = |width, segments| shared_bytes(FEW, width, few_residual::residual_layout(segments)) + segments * 512;
    let most = [
        shared_bytes(FEW, hidden, few_qkv::QKV),
        shared_bytes(FEW, hidden, few_gate_up::GATE_UP),
        residual(attended, output),
        residual(ffn, down),
        shared_bytes(FEW, hidden, few_logits::LOGITS) + 256,
    ];
    hidden.is_multiple_of(few::STAGE)
        && attended.is_multiple_of(few::STAGE * output)
        && ffn.is_multiple_of(few::STAGE * down)
        && heads.width.is_multiple_of(32)
        && most.into_iter().all(|bytes| bytes <= device.shared_bytes_per_block())
}

fn shared_bytes(tokens: usize, width: usize, layout: few::Layout) -> usize {
    few::input_bytes(tokens, width) + few::ring_bytes(layout)
}

fn grid(name: &str, blocks: usize, tokens: usize, width: usize, layout: few::Layout) -> Result<Grid, DeviceError> {
    let bytes = shared_bytes(tokens, width, layout);
    Ok(Grid { blocks: [size(name, blocks)?, 1, 1], dynamic_shared_bytes: size(name, bytes)? })
}

fn check(name: &str, tokens: usize, width: usize) -> Result<(), DeviceError> {
    expect((1..=FEW).contains(&tokens) && width.is_multiple_of(few::STAGE) && width > 0, name, || {
        format!("{tokens} tokens of {width}: at most {FEW} of a multiple of {} are supported", few::STAGE)
    })
}

/// Normalises `residual` \[T, C\], computes queries, keys and values, rotates them (pairs i and i + D/2), leaves the queries in
/// `queries` \[T, (H + 2 G) D\] and stores keys and values in their pages.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn few_qkv(
    device: &Device,
    residual: &Slice<'_, f32>,
    norm: Norm<'_>,
    weight: &Weight,
    bias: Option<&Slice<'_, bf16>>,
    rope_table: &Slice<'_, f32>,
    places: Places<'_>,
    queries: &mut SliceMut<'_, f32>,
    pages: &mut PagesMut<'_>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    const NAME: &str = "few_qkv";
    let (tokens, width, outputs) = (places.positions.len(), weight.k(), heads.qkv_width());
    check(NAME, tokens, width)?;
    let shaped = residual.len() == tokens * width
        && norm.gain.len() == width
        && weight.n() == outputs
        && bias.is_none_or(|bias| bias.len() == outputs)
        && places.row_tables.len() == tokens
        && queries.len() == tokens * outputs
        && heads.width.is_multiple_of(32)
        && pages.keys.len() == pages.values.len();
    expect(shaped, NAME, || {
        format!(
            "residual {} and queries {} of {tokens} tokens, weight {} x {width}, {heads:?}",
            residual.len(),
            queries.len(),
            weight.n()
        )
    })?;
    let none = norm.gain.slice(..0)?;
    let grid = grid(NAME, (outputs / 16).div_ceil(few_qkv::QKV.warps), tokens, width, few_qkv::QKV)?;
    let kernel = if tokens <= few::NARROW { few_qkv::few_qkv::launch } else { few_qkv::few_qkv_wide::launch };
    device.launch(
        kernel(
            residual,
            &norm.gain,
            &weight.rows()?.as_slice(),
            bias.unwrap_or(&none),
            rope_table,
            &places.positions,
            &places.row_tables,
            &places.page_tables,
            queries,
            &mut pages.keys,
            &mut pages.values,
            size(NAME, tokens)?,
            size(NAME, width)?,
            size(NAME, heads.query_heads)?,
            size(NAME, heads.kv_heads)?,
            size(NAME, heads.width)?,
            norm.eps,
        ),
        grid,
    )
}

/// Normalises `residual` \[T, C\], computes gate and up, and leaves silu(gate) * up in `out` \[T, F\].
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn few_gate_up(
    device: &Device,
    residual: &Slice<'_, f32>,
    norm: Norm<'_>,
    weight: &Weight,
    out: &mut SliceMut<'_, bf16>,
) -> Result<(), DeviceError> {
    const NAME: &str = "few_gate_up";
    let (width, ffn) = (weight.k(), weight.n() / 2);
    let tokens = residual.len() / width;
    check(NAME, tokens, width)?;
    let shaped = residual.len() == tokens * width
        && norm.gain.len() == width
        && weight.n() == 2 * ffn
        && ffn.is_multiple_of(16)
        && out.len() == tokens * ffn;
    expect(shaped, NAME, || {
        format!("residual {}, weight {} x {width}, out {}", residual.len(), weight.n(), out.len())
    })?;
    let grid = grid(NAME, (ffn / 8).div_ceil(few_gate_up::GATE_UP.warps), tokens, width, few_gate_up::GATE_UP)?;
    let kernel =
        if tokens <= few::NARROW { few_gate_up::few_gate_up::launch } else { few_gate_up::few_gate_up_wide::launch };
    device.launch(
        kernel(
            residual,
            &norm.gain,
            &weight.rows()?.as_slice(),
            out,
            size(NAME, tokens)?,
            size(NAME, width)?,
            size(NAME, ffn)?,
            norm.eps,
        ),
        grid,
    )
}

/// `residual` \[T, C\] += `x` \[T, K\] times the weight, whose K is cut as the contract says.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn few_residual(
    device: &Device,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    residual: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    few_residual_in(device, contract::segments(weight.n(), weight.k()), x, weight, residual)
}

/// As [`few_residual()`], with K in 1, 2 or 4 segments.
///
/// # Errors
/// As for that.
pub fn few_residual_in(
    device: &Device,
    segments: usize,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    residual: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "few_residual";
    let (width, outputs) = (weight.k(), weight.n());
    let tokens = x.len() / width;
    check(NAME, tokens, width)?;
    let kernel = match segments {
        1 => few_residual::few_residual_1::launch,
        2 => few_residual::few_residual_2::launch,
        4 => few_residual::few_residual_4::launch,
        _ => return Err(DeviceError::InvalidParameter(format!("{NAME}: 1, 2 or 4 segments, not {segments}"))),
    };
    let shaped =
        x.len() == tokens * width && residual.len() == tokens * outputs && width.is_multiple_of(few::STAGE * segments);
    expect(shaped, NAME, || format!("x {}, weight {outputs} x {width}, residual {}", x.len(), residual.len()))?;
    let grid = grid(NAME, outputs.div_ceil(16), tokens, width, few_residual::residual_layout(segments))?;
    let (tokens, outputs, width) = (size(NAME, tokens)?, size(NAME, outputs)?, size(NAME, width)?);
    device.launch(kernel(x, &weight.rows()?.as_slice(), residual, tokens, outputs, width), grid)
}

/// Normalises `residual` \[T, C\] and computes the head: `logits` \[T, V\] where given, and the token that
/// [`argmax`](super::argmax) would choose of each row in `ids` \[T\]. `best` has [`best_len`] elements.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn few_logits(
    device: &Device,
    residual: &Slice<'_, f32>,
    norm: Norm<'_>,
    weight: &Weight,
    logits: &mut SliceMut<'_, f32>,
    best: &mut SliceMut<'_, u64>,
    ids: &mut SliceMut<'_, u32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "few_logits";
    let (width, vocab) = (weight.k(), weight.n());
    let tokens = residual.len() / width;
    check(NAME, tokens, width)?;
    let blocks = logits_blocks(device);
    let shaped = residual.len() == tokens * width
        && norm.gain.len() == width
        && (logits.is_empty() || logits.len() == tokens * vocab)
        && best.len() == blocks * FEW
        && ids.len() == tokens;
    expect(shaped, NAME, || {
        format!("residual {}, weight {vocab} x {width}, logits {}, ids {}", residual.len(), logits.len(), ids.len())
    })?;
    let grid = grid(NAME, blocks, tokens, width, few_logits::LOGITS)?;
    device.launch(
        few_logits::few_logits::launch(
            residual,
            &norm.gain,
            &weight.rows()?.as_slice(),
            logits,
            best,
            size(NAME, tokens)?,
            size(NAME, width)?,
            size(NAME, vocab)?,
            norm.eps,
        ),
        grid,
    )?;
    device.launch(
        few_logits::few_argmax::launch(&best.as_slice(), ids, size(NAME, FEW)?),
        Grid::new_1d(size(NAME, tokens)?),
    )
}
