//! One safe function per kernel: it checks the shapes, chooses the grid and launches. Nothing above knows grids, nothing
//! below knows what an operation means.
//!
//! Every function returns [`DeviceError::InvalidParameter`] when a shape does not fit, before anything is launched,
//! and otherwise the launch's own error. The letters of the shapes are those of the crate `kernels_gpu`.

mod attention;
mod decode_step;
mod differing;
mod elementwise;
mod few;
mod linear;
mod rows;
mod sampling;
mod tensor_maps;
mod tiles;
mod wgmma;
mod wgmma_long;

pub use attention::{
    DecodeBlocks, DecodeScratch, HeadShape, NO_ROW, Pages, PagesMut, PrefillTiles, Segment, TileKind, attention_decode,
    attention_prefill, counters_len, kv_write, partials_len, rotary, rotary_kv_write,
};
pub use decode_step::{StepEnds, StepLayer, StepMemory, decode_step, decode_step_context, decode_step_fits};
pub use differing::{Comparable, differing};
pub use elementwise::{bias_add, residual_add, silu_mul};
pub use few::{FEW, Norm, Places, best_len, few_fits, few_gate_up, few_logits, few_qkv, few_residual, few_residual_in};
pub use kernels_gpu::kv_write::PAGE;
pub use kernels_gpu::penalties::ENTRY as PENALTY_ENTRY;
pub use kernels_gpu::rotary::Pairing;
pub use kernels_gpu::row_parameters::{RowParameters, WORDS as ROW_WORDS};
pub use linear::{
    LinearTarget, linear, linear_kernel, linear_parts, linear_parts_kernel, linear_parts_plain, linear_plain,
    linear_to_residual,
};
pub use rows::{embedding, gather_rows, residual_norm, rms_norm};
pub use sampling::{
    LogProbs, SampleParams, argmax, log_probs, penalties, sample, sample_scratch_len, spare_for_choosing,
};
pub use tensor_maps::{Mapped, TensorMaps};
pub use tiles::{BlockTokens, tile_best_len, tile_gate_up, tile_logits, tile_parts, tile_qkv, tiles_fits};
pub use wgmma::{QkvBlocks, wgmma_best_len, wgmma_fits, wgmma_gate_up, wgmma_logits, wgmma_parts, wgmma_qkv};
pub use wgmma_long::{
    BlockHeads, BlockOutputs, wgmma_attends, wgmma_long_fits, wgmma_long_gate_up, wgmma_long_qkv, wgmma_long_qkv_fits,
    wgmma_long_residual, wgmma_long_residual_pays,
};

use crate::device::DeviceError;

/// An error unless `holds`, which says what was expected of which operation.
fn expect(holds: bool, operation: &str, expected: impl FnOnce() -> String) -> Result<(), DeviceError> {
    if holds { Ok(()) } else { Err(DeviceError::InvalidParameter(format!("{operation}: {}", expected()))) }
}

/// How many parts of a layer's output lie in `parts`, for a residual of `len`: 1, 2 or 4.
fn part_count(operation: &str, parts: usize, len: usize) -> Result<usize, DeviceError> {
    let count = parts.checked_div(len).unwrap_or(0);
    expect(count * len == parts && matches!(count, 1 | 2 | 4), operation, || {
        format!("parts of {parts}: 1, 2 or 4 of the residual's {len}")
    })?;
    Ok(count)
}

/// A size as a kernel's parameter.
fn size(operation: &str, value: usize) -> Result<u32, DeviceError> {
    u32::try_from(value).map_err(|_| DeviceError::InvalidParameter(format!("{operation}: {value} exceeds 2^32 - 1")))
}

/// Blocks of `per_block` that cover `count`.
fn blocks(operation: &str, count: usize, per_block: usize) -> Result<u32, DeviceError> {
    size(operation, count.div_ceil(per_block))
}
