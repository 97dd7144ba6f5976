//! Linear layers: out \[M, N\] = x \[M, K\] weight \[N, K\]^T.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::linear::{BLOCK_OUTPUTS, BLOCK_TOKENS};

use super::{blocks, expect, size};
use crate::device::{Device, DeviceError, LinearBackend, LinearOutput, Slice, SliceMut, Weight, contract};

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

/// The parts of a linear layer: its chain over each of S equal, consecutive segments of K, from 0, into `parts` \[S, M, N\].
/// S follows from the lengths. [`residual_norm`](super::residual_norm) and [`residual_add`](super::residual_add) add them.
///
/// # Errors
/// A shape that does not fit, or the device's error.
pub fn linear_parts(
    device: &Device,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    parts: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    match device.linear_backend() {
        LinearBackend::CublasLt => {
            let (k, rows) = (weight.k(), weight.n() * weight.k());
            let [_, _, segments] = part_shape("linear_parts", x.len(), rows, parts.len(), k)?;
            device.linear_parts(*x, weight, segments, parts.slice_mut(..)?)
        }
        LinearBackend::Kernel => linear_parts_kernel(device, x, &weight.rows()?.as_slice(), parts, weight.k()),
    }
}

/// [`linear_parts`] of a layer whose output is added to the residual stream, in as many segments as the contract says, at the
/// start of `scratch`. The parts are returned.
///
/// # Errors
/// A scratch that is too short, a shape that does not fit, or the device's error.
pub fn linear_to_residual<'a>(
    device: &Device,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    scratch: &'a mut SliceMut<'_, f32>,
) -> Result<Slice<'a, f32>, DeviceError> {
    let (n, k) = (weight.n(), weight.k());
    let len = contract::segments(n, k) * (x.len() / k) * n;
    linear_parts(device, x, weight, &mut scratch.slice_mut(..len)?)?;
    scratch.as_slice().slice(..len)
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
        device.launch(kernels_gpu::linear::linear_f32::launch(x, rows, self, m, n, k, k), grid)
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
    const NAME: &str = "linear_kernel";
    let [tokens, outputs, _] = shape(NAME, x, rows, out.len(), width)?;
    expect(width.is_multiple_of(16), NAME, || format!("K = {width} is no multiple of 16"))?;
    let grid = Grid::new_2d(blocks(NAME, outputs, BLOCK_OUTPUTS)?, blocks(NAME, tokens, BLOCK_TOKENS)?);
    out.launch_chain(device, x, rows, [size(NAME, tokens)?, size(NAME, outputs)?, size(NAME, width)?], grid)
}

/// [`linear_parts`] by our own kernel: a segment is a multiple of 16.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn linear_parts_kernel(
    device: &Device,
    x: &Slice<'_, bf16>,
    rows: &Slice<'_, bf16>,
    parts: &mut SliceMut<'_, f32>,
    width: usize,
) -> Result<(), DeviceError> {
    const NAME: &str = "linear_parts_kernel";
    let [tokens, outputs, segments] = part_shape(NAME, x.len(), rows.len(), parts.len(), width)?;
    let part = width / segments;
    expect(part.is_multiple_of(16), NAME, || format!("K = {width} in {segments} segments of no multiple of 16"))?;
    let blocks = [blocks(NAME, outputs, BLOCK_OUTPUTS)?, blocks(NAME, tokens, BLOCK_TOKENS)?, size(NAME, segments)?];
    let [m, n, k, part] = [size(NAME, tokens)?, size(NAME, outputs)?, size(NAME, width)?, size(NAME, part)?];
    let launch = kernels_gpu::linear::linear_f32::launch(x, rows, parts, m, n, k, part);
    device.launch(launch, Grid { blocks, dynamic_shared_bytes: 0 })
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
    shape("linear_plain", x, rows, out.len(), width)?;
    linear_parts_plain(device, x, rows, out, width)
}

/// [`linear_parts`] by the plain chain.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn linear_parts_plain(
    device: &Device,
    x: &Slice<'_, bf16>,
    rows: &Slice<'_, bf16>,
    parts: &mut SliceMut<'_, f32>,
    width: usize,
) -> Result<(), DeviceError> {
    const NAME: &str = "linear_parts_plain";
    let [tokens, outputs, segments] = part_shape(NAME, x.len(), rows.len(), parts.len(), width)?;
    let blocks = [blocks(NAME, outputs, 128)?, size(NAME, tokens)?, size(NAME, segments)?];
    let [m, n, k] = [size(NAME, tokens)?, size(NAME, outputs)?, size(NAME, width)?];
    let launch = kernels_gpu::linear::linear_plain::launch(x, rows, parts, m, n, k, size(NAME, width / segments)?);
    device.launch(launch, Grid { blocks, dynamic_shared_bytes: 0 })
}

/// M and N, where the lengths fit, and 1.
fn shape(
    operation: &str,
    x: &Slice<'_, bf16>,
    rows: &Slice<'_, bf16>,
    out: usize,
    width: usize,
) -> Result<[usize; 3], DeviceError> {
    let shape = part_shape(operation, x.len(), rows.len(), out, width)?;
    expect(shape[2] == 1, operation, || format!("out of {out}, which is [M, N] {} times", shape[2]))?;
    Ok(shape)
}

/// M, N and S, where the lengths fit.
fn part_shape(operation: &str, x: usize, rows: usize, out: usize, width: usize) -> Result<[usize; 3], DeviceError> {
    let shaped = width > 0 && x.is_multiple_of(width) && rows.is_multiple_of(width);
    let (tokens, outputs) = if shaped { (x / width, rows / width) } else { (0, 0) };
    let segments = out.checked_div(tokens * outputs).unwrap_or(0);
    let divided = segments > 0 && out == segments * tokens * outputs && width.is_multiple_of(segments);
    expect(divided, operation, || {
        format!(
            "x [M, {width}] of {x}, weight [N, {width}] of {rows}, out [S, M, N] of {out} with S a divisor of {width}"
        )
    })?;
    Ok([tokens, outputs, segments])
}
