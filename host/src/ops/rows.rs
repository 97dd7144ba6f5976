//! Operations on whole rows: embedding, gathering, normalisation by itself and of a sum.

use cuda_std::launch::Grid;
use half::bf16;

use super::{expect, part_count, size};
use crate::device::{Device, DeviceError, Slice, SliceMut};

/// Rows of `table` \[V, C\] for `ids` \[T\] into `out` \[T, C\] (f32). Ids must be below V: one that is not stops the device.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn embedding(
    device: &Device,
    ids: &Slice<'_, u32>,
    table: &Slice<'_, bf16>,
    out: &mut SliceMut<'_, f32>,
    width: usize,
) -> Result<(), DeviceError> {
    let shaped = width > 0 && width.is_multiple_of(8) && table.len().is_multiple_of(width);
    expect(shaped && !ids.is_empty() && out.len() == ids.len() * width, "embedding", || {
        format!("ids [{}], table [V, {width}], out [{} x {width}] of {}", ids.len(), ids.len(), out.len())
    })?;
    let grid = Grid::new_1d(size("embedding", ids.len())?);
    device.launch(kernels_gpu::embedding::embedding::launch(ids, table, out, size("embedding", width)?), grid)
}

/// Rows `rows` \[R\] of `x` \[T, C\] into `out` \[R, C\].
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn gather_rows(
    device: &Device,
    x: &Slice<'_, f32>,
    rows: &Slice<'_, u32>,
    out: &mut SliceMut<'_, f32>,
    width: usize,
) -> Result<(), DeviceError> {
    let shaped = width > 0 && width.is_multiple_of(4) && x.len().is_multiple_of(width);
    expect(shaped && !rows.is_empty() && out.len() == rows.len() * width, "gather_rows", || {
        format!("x [T, {width}] of {}, rows [{}], out of {}", x.len(), rows.len(), out.len())
    })?;
    let grid = Grid::new_1d(size("gather_rows", rows.len())?);
    device.launch(kernels_gpu::gather_rows::gather_rows::launch(x, rows, out, size("gather_rows", width)?), grid)
}

/// Normalises each row of `x` \[T, C\] by its root mean square, times `weight` \[C\], into `out` \[T, C\] (bf16).
///
/// # Errors
/// A shape that does not fit, an `eps` that is not positive, or the launch's error.
pub fn rms_norm(
    device: &Device,
    x: &Slice<'_, f32>,
    weight: &Slice<'_, bf16>,
    out: &mut SliceMut<'_, bf16>,
    eps: f32,
) -> Result<(), DeviceError> {
    let width = weight.len();
    let shaped = width > 0 && width.is_multiple_of(8) && !x.is_empty() && x.len().is_multiple_of(width);
    expect(shaped && out.len() == x.len() && eps > 0.0, "rms_norm", || {
        format!("x [T, {width}] of {}, out of {}, eps {eps} > 0", x.len(), out.len())
    })?;
    let rows = size("rms_norm", x.len() / width)?;
    // A fault for the tests to find: a row's result depends on how many rows there are. See `Cargo.toml`.
    #[cfg(feature = "planted-batch-dependence")]
    let eps = eps + 1e-6 * rows as f32;
    let grid = Grid::new_1d(rows);
    device.launch(kernels_gpu::rms_norm::rms_norm::launch(x, weight, out, size("rms_norm", width)?, eps), grid)
}

/// Adds `parts` \[S, T, C\] (1, 2 or 4: see [`linear_parts`](super::linear_parts)), summed in order, to `residual` \[T, C\],
/// and normalises what comes of it, as [`rms_norm`] does, into `out` \[T, C\].
///
/// # Errors
/// A shape that does not fit, an `eps` that is not positive, or the launch's error.
pub fn residual_norm(
    device: &Device,
    residual: &mut SliceMut<'_, f32>,
    parts: &Slice<'_, f32>,
    weight: &Slice<'_, bf16>,
    out: &mut SliceMut<'_, bf16>,
    eps: f32,
) -> Result<(), DeviceError> {
    use kernels_gpu::residual_norm as kernels;
    let (width, len) = (weight.len(), residual.len());
    let shaped = width > 0 && width.is_multiple_of(8) && len > 0 && len.is_multiple_of(width);
    expect(shaped && out.len() == len && eps > 0.0, "residual_norm", || {
        format!("residual [T, {width}] of {len}, out of {}, eps {eps} > 0", out.len())
    })?;
    let kernel = match part_count("residual_norm", parts.len(), len)? {
        1 => kernels::residual_norm::launch,
        2 => kernels::residual_norm_2::launch,
        _ => kernels::residual_norm_4::launch,
    };
    let grid = Grid::new_1d(size("residual_norm", len / width)?);
    let width = size("residual_norm", width)?;
    device.launch(kernel(residual, parts, weight, out, width, eps), grid)
}
