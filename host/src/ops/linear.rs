//! Linear layers: out \[M, N\] = x \[M, K\] weight \[N, K\]^T.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::linear::{BLOCK_OUTPUTS, BLOCK_TOKENS};

use super::{blocks, expect, size};
use crate::device::{Device, DeviceError, LinearBackend, LinearOutput, OutputType, Slice, SliceMut, Weight};

/// The linear layer as the device's contract defines it: the k16 tensor-core chain on a GPU (through cuBLASLt, or our own
/// kernel where the self-test found that cuBLASLt differs), the plain chain on the CPU. `O` is f32, or bf16 rounded once.
///
/// # Errors
/// A shape that does not fit, or the device's error.
pub fn linear<O: LinearOutput>(
    device: &Device,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    out: &mut SliceMut<'_, O>,
) -> Result<(), DeviceError>
where
    for<'a> SliceMut<'a, O>: LinearTarget,
{
    match device.linear_backend() {
        LinearBackend::CublasLt => device.linear(*x, weight, out.slice_mut(..)?),
        LinearBackend::Kernel => linear_kernel(device, x, &weight.rows()?.as_slice(), out, weight.k()),
    }
}

/// An output that the tensor-core kernel can write.
pub trait LinearTarget {
    /// Launches the kernel for this output type.
    ///
    /// # Errors
    /// The launch's error.
    fn launch_chain(
        &mut self,
        device: &Device,
        x: &Slice<'_, bf16>,
        rows: &Slice<'_, bf16>,
        sizes: [u32; 3],
        grid: Grid,
    ) -> Result<(), DeviceError>;
}

impl LinearTarget for SliceMut<'_, f32> {
    fn launch_chain(
        &mut self,
        device: &Device,
        x: &Slice<'_, bf16>,
        rows: &Slice<'_, bf16>,
        [m, n, k]: [u32; 3],
        grid: Grid,
    ) -> Result<(), DeviceError> {
        device.launch(kernels_gpu::linear::linear_f32::launch(x, rows, self, m, n, k), grid)
    }
}

impl LinearTarget for SliceMut<'_, bf16> {
    fn launch_chain(
        &mut self,
        device: &Device,
        x: &Slice<'_, bf16>,
        rows: &Slice<'_, bf16>,
        [m, n, k]: [u32; 3],
        grid: Grid,
    ) -> Result<(), DeviceError> {
        device.launch(kernels_gpu::linear::linear_bf16::launch(x, rows, self, m, n, k), grid)
    }
}

/// The tensor-core chain by our own kernel, at any M. `rows` is the weight \[N, K\], `width` = K a multiple of 16.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn linear_kernel<O: LinearOutput>(
    device: &Device,
    x: &Slice<'_, bf16>,
    rows: &Slice<'_, bf16>,
    out: &mut SliceMut<'_, O>,
    width: usize,
) -> Result<(), DeviceError>
where
    for<'a> SliceMut<'a, O>: LinearTarget,
{
    let (tokens, outputs) = shape("linear_kernel", x, rows, out.len(), width)?;
    expect(width.is_multiple_of(16), "linear_kernel", || format!("K = {width} is no multiple of 16"))?;
    debug_assert!(matches!(O::TYPE, OutputType::F32 | OutputType::Bf16));
    let grid =
        Grid::new_2d(blocks("linear_kernel", outputs, BLOCK_OUTPUTS)?, blocks("linear_kernel", tokens, BLOCK_TOKENS)?);
    let sizes = [size("linear_kernel", tokens)?, size("linear_kernel", outputs)?, size("linear_kernel", width)?];
    out.launch_chain(device, x, rows, sizes, grid)
}

/// The plain chain: f32 fused multiply-adds in order of K. `rows` is the weight \[N, K\], `width` = K.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn linear_plain(
    device: &Device,
    x: &Slice<'_, bf16>,
    rows: &Slice<'_, bf16>,
    out: &mut SliceMut<'_, f32>,
    width: usize,
) -> Result<(), DeviceError> {
    let (tokens, outputs) = shape("linear_plain", x, rows, out.len(), width)?;
    let grid = Grid::new_2d(blocks("linear_plain", outputs, 128)?, size("linear_plain", tokens)?);
    let (outputs, width) = (size("linear_plain", outputs)?, size("linear_plain", width)?);
    device.launch(kernels_gpu::linear::linear_plain::launch(x, rows, out, outputs, width), grid)
}

/// M and N, where the lengths fit.
fn shape(
    operation: &str,
    x: &Slice<'_, bf16>,
    rows: &Slice<'_, bf16>,
    out: usize,
    width: usize,
) -> Result<(usize, usize), DeviceError> {
    let shaped = width > 0 && x.len().is_multiple_of(width) && rows.len().is_multiple_of(width);
    let (tokens, outputs) = if shaped { (x.len() / width, rows.len() / width) } else { (0, 0) };
    expect(tokens > 0 && outputs > 0 && out == tokens * outputs, operation, || {
        format!("x [M, {width}] of {}, weight [N, {width}] of {}, out of {out}", x.len(), rows.len())
    })?;
    Ok((tokens, outputs))
}
