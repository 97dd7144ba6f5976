//! Operations on elements: bias, residual, gate.

use cuda_std::launch::Grid;
use half::bf16;

use super::{blocks, expect, part_count, size};
use crate::device::{Device, DeviceError, Slice, SliceMut};

/// Adds `bias` \[N\] to each row of `x` \[T, N\].
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn bias_add(device: &Device, x: &mut SliceMut<'_, f32>, bias: &Slice<'_, bf16>) -> Result<(), DeviceError> {
    let width = bias.len();
    let shaped = width > 0 && width.is_multiple_of(4) && !x.is_empty() && x.len().is_multiple_of(width);
    expect(shaped, "bias_add", || format!("x [T, {width}] of {}, N a multiple of 4", x.len()))?;
    let grid = Grid::new_2d(blocks("bias_add", width, 1024)?, size("bias_add", x.len() / width)?);
    device.launch(kernels_gpu::bias_add::bias_add::launch(x, bias, size("bias_add", width)?), grid)
}

/// Adds 1, 2 or 4 `parts` of the length of `residual`, summed in order, to `residual`: see
/// [`linear_parts`](super::linear_parts).
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn residual_add(
    device: &Device,
    residual: &mut SliceMut<'_, f32>,
    parts: &Slice<'_, f32>,
) -> Result<(), DeviceError> {
    use kernels_gpu::residual_add as kernels;
    let len = residual.len();
    expect(len > 0 && len.is_multiple_of(4), "residual_add", || format!("length {len}, a multiple of 4"))?;
    let kernel = match part_count("residual_add", parts.len(), len)? {
        1 => kernels::residual_add::launch,
        2 => kernels::residual_add_2::launch,
        _ => kernels::residual_add_4::launch,
    };
    device.launch(kernel(residual, parts), Grid::new_1d(blocks("residual_add", len, 1024)?))
}

/// silu(gate) * up for `x` \[T, 2 F\] (gate, then up) into `out` \[T, F\].
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn silu_mul(
    device: &Device,
    x: &Slice<'_, bf16>,
    out: &mut SliceMut<'_, bf16>,
    width: usize,
) -> Result<(), DeviceError> {
    let shaped = width > 0 && width.is_multiple_of(4) && !out.is_empty() && out.len().is_multiple_of(width);
    expect(shaped && x.len() == 2 * out.len(), "silu_mul", || {
        format!("x [T, 2 x {width}] of {}, out [T, {width}] of {}", x.len(), out.len())
    })?;
    let grid = Grid::new_2d(blocks("silu_mul", width, 1024)?, size("silu_mul", out.len() / width)?);
    device.launch(kernels_gpu::silu_mul::silu_mul::launch(x, out, size("silu_mul", width)?), grid)
}
