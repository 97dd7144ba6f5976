//! Devices: memory, launches and linear layers, on CUDA or on the CPU.
//!
//! A [`Device`] is a handle, cheap to clone. Work on it happens in the order of the calls; on CUDA the calls return
//! before the work is done, and an error of the work comes out of a later call. The first such error stops the
//! device: [`Device::is_healthy`] turns false, and every later call repeats the reason.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `buffer` | owned typed memory, and views of it |
//! | `tracker` | who uses how much memory |
//! | `linear` | the types of linear layers and their numeric contract |
//! | `choice` | which algorithm computes a linear layer, by timing |
//! | `pending` | small downloads that are collected later |
//! | `recording` | launches that are started again as a whole |
//! | `stopwatch` | how long the device takes |
//! | `tensor_map` | how a GPU's copy engine sees a matrix |
//! | `ptx` | kernel images: choosing one, checking its parameters |
//! | `error` | typed errors with frozen codes |
//! | `cpu` | the executor's device |
//! | `cuda` | the driver and cuBLASLt; the only files that name cudarc |

use std::sync::Arc;

use cuda_std::Element;
use cuda_std::launch::{Arg, Grid, KernelDesc, Launch, ParamKind};
use half::bf16;

pub use buffer::{Buffer, Slice, SliceMut};
pub use choice::{LINEAR_RUNGS, LinearChoice};
pub use cpu::CpuOptions;
pub use error::{DeviceError, ErrorCode};
pub use linear::{LinearBackend, LinearOutput, OutputType, Weight, contract};
pub use pending::Pending;
pub use ptx::{KernelImage, KernelImages};
pub use recording::Recording;
pub use stopwatch::Stopwatch;
pub use tensor_map::{Dimension, TENSOR_MAP_WORDS};
pub use tracker::{MemoryKind, MemoryRecord, MemoryTracker};

mod buffer;
mod choice;
mod cpu;
mod cuda;
mod error;
mod linear;
mod pending;
mod ptx;
mod recording;
mod stopwatch;
mod tensor_map;
mod tracker;

/// How much memory a device has, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free now.
    pub free_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

/// A device.
#[derive(Clone, Debug)]
pub enum Device {
    /// The CPU, running kernels under the executor.
    Cpu(Arc<cpu::Cpu>),
    /// An NVIDIA GPU.
    Cuda(Arc<cuda::Cuda>),
}

macro_rules! on_device {
    ($device:expr, $inner:ident => $call:expr) => {
        match $device {
            Device::Cpu($inner) => $call,
            Device::Cuda($inner) => $call,
        }
    };
}

impl Device {
    /// The CPU.
    ///
    /// # Errors
    /// The options make no sense.
    pub fn cpu(options: CpuOptions) -> Result<Self, DeviceError> {
        Ok(Self::Cpu(Arc::new(cpu::Cpu::new(options)?)))
    }

    /// The NVIDIA GPU with this ordinal, with these kernels loaded. Every kernel of `kernels` must be in the image
    /// with the parameters that its descriptor names.
    ///
    /// # Errors
    /// There is no driver or no such device, or the kernels cannot be loaded.
    pub fn cuda(ordinal: i32, images: &KernelImages<'_>, kernels: &[&'static KernelDesc]) -> Result<Self, DeviceError> {
        Ok(Self::Cuda(Arc::new(cuda::Cuda::new(ordinal, images, kernels)?)))
    }

    /// How many NVIDIA GPUs there are; 0 without a driver.
    #[must_use]
    pub fn cuda_count() -> usize {
        cuda::device_count().unwrap_or(0)
    }

    /// What it is, for people and for fingerprints.
    #[must_use]
    pub fn name(&self) -> String {
        on_device!(self, device => device.name())
    }

    /// True for a GPU.
    #[must_use]
    pub fn is_cuda(&self) -> bool {
        matches!(self, Self::Cuda(_))
    }

    /// Compute capability as major * 10 + minor; `None` on the CPU.
    #[must_use]
    pub fn compute_capability(&self) -> Option<u32> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(device) => Some(device.compute_capability()),
        }
    }

    /// The most shared memory that a block may have, in bytes. The executor's limit is that of an H100.
    #[must_use]
    pub fn shared_bytes_per_block(&self) -> usize {
        match self {
            Self::Cpu(_) => 227 * 1024,
            Self::Cuda(device) => device.shared_bytes_per_block() as usize,
        }
    }

    /// Multiprocessors of a GPU, threads of the CPU device: for choosing grids that change no bits.
    #[must_use]
    pub fn multiprocessors(&self) -> usize {
        on_device!(self, device => device.multiprocessors())
    }

    /// Which kernel image runs, such as `sm_90a`; `None` on the CPU.
    #[must_use]
    pub fn kernel_image(&self) -> Option<&str> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(device) => Some(device.kernel_image()),
        }
    }

    /// The newest CUDA version that the driver serves, such as `CUDA 13.0`; `None` on the CPU.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(device) => device.driver(),
        }
    }

    /// A stopwatch for work on this device.
    ///
    /// # Errors
    /// The device has failed.
    pub fn stopwatch(&self) -> Result<Stopwatch, DeviceError> {
        Stopwatch::new(self)
    }

    /// Its memory.
    ///
    /// # Errors
    /// The device has failed.
    pub fn memory_info(&self) -> Result<MemoryInfo, DeviceError> {
        on_device!(self, device => device.memory_info())
    }

    /// Who uses its memory.
    #[must_use]
    pub fn tracker(&self) -> &MemoryTracker {
        on_device!(self, device => device.tracker())
    }

    /// False after an error that no later call can recover from.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        on_device!(self, device => device.failure().is_none())
    }

    /// The error that made it unhealthy.
    #[must_use]
    pub fn failure(&self) -> Option<DeviceError> {
        on_device!(self, device => device.failure())
    }

    /// Checks that every tracked allocation is plain device memory: not managed, not the host's. On failure the device
    /// is unhealthy. Any thread may call it, also on a timer.
    ///
    /// # Errors
    /// Some allocation is not; the message names it.
    pub fn verify_residency(&self) -> Result<(), DeviceError> {
        on_device!(self, device => device.verify_residency())
    }

    /// Memory for `len` elements, zeroed. `label` is for people.
    ///
    /// # Errors
    /// `len` is 0, or it does not fit.
    pub fn alloc<T: Element>(&self, len: usize, kind: MemoryKind, label: &str) -> Result<Buffer<T>, DeviceError> {
        self.alloc_filled(len, cpu::Fill::Zero, kind, label)
    }

    /// Memory for `len` elements that the caller writes before it reads: bytes of 0xff, a NaN in every float type.
    ///
    /// # Errors
    /// `len` is 0, or it does not fit.
    pub fn alloc_unwritten<T: Element>(
        &self,
        len: usize,
        kind: MemoryKind,
        label: &str,
    ) -> Result<Buffer<T>, DeviceError> {
        self.alloc_filled(len, cpu::Fill::Poison, kind, label)
    }

    fn alloc_filled<T: Element>(
        &self,
        len: usize,
        fill: cpu::Fill,
        kind: MemoryKind,
        label: &str,
    ) -> Result<Buffer<T>, DeviceError> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes > 0).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("{len} elements of {} for {label}: allocate at least one", T::NAME))
        })?;
        let memory = match self {
            Self::Cpu(device) => buffer::Memory::Cpu(device.alloc(bytes, fill, kind, label)?),
            Self::Cuda(device) => buffer::Memory::Cuda(device.alloc(bytes, fill, kind, label)?),
        };
        Ok(Buffer::new(memory, len))
    }

    /// Memory that holds `values`.
    ///
    /// # Errors
    /// There are none, or they do not fit.
    pub fn alloc_from<T: Element>(
        &self,
        values: &[T],
        kind: MemoryKind,
        label: &str,
    ) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = self.alloc_unwritten(values.len(), kind, label)?;
        self.upload(&mut buffer, values)?;
        Ok(buffer)
    }

    /// Copies from the host. `source` may be changed as soon as this returns.
    ///
    /// # Errors
    /// The lengths differ, or the copy fails.
    pub fn upload<'a, T: Element>(
        &self,
        destination: impl Into<SliceMut<'a, T>>,
        source: &[T],
    ) -> Result<(), DeviceError> {
        let mut destination = destination.into();
        self.check_view(destination.device())?;
        same_length(destination.len(), source.len())?;
        if source.is_empty() {
            return Ok(());
        }
        on_device!(self, device => device.upload(&mut destination, source))
    }

    /// Copies to the host, after everything before it.
    ///
    /// # Errors
    /// The lengths differ, or the copy or earlier work fails.
    pub fn download_into<'a, T: Element>(
        &self,
        source: impl Into<Slice<'a, T>>,
        destination: &mut [T],
    ) -> Result<(), DeviceError> {
        let source = source.into();
        self.check_view(source.device())?;
        same_length(destination.len(), source.len())?;
        if destination.is_empty() {
            return self.synchronize();
        }
        on_device!(self, device => device.download(source, destination))
    }

    /// Copies to the host, after everything before it.
    ///
    /// # Errors
    /// The copy or earlier work fails.
    pub fn download<'a, T: Element>(&self, source: impl Into<Slice<'a, T>>) -> Result<Vec<T>, DeviceError> {
        let source = source.into();
        // SAFETY: all bits are values of an element, zeros too.
        let mut values = vec![unsafe { std::mem::zeroed() }; source.len()];
        self.download_into(source, &mut values)?;
        Ok(values)
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// The lengths differ, or the copy fails.
    pub fn copy<'a, 'b, T: Element>(
        &self,
        source: impl Into<Slice<'a, T>>,
        destination: impl Into<SliceMut<'b, T>>,
    ) -> Result<(), DeviceError> {
        let (source, mut destination) = (source.into(), destination.into());
        self.check_view(source.device())?;
        self.check_view(destination.device())?;
        same_length(destination.len(), source.len())?;
        if source.is_empty() {
            return Ok(());
        }
        on_device!(self, device => device.copy(source, &mut destination))
    }

    /// Writes zeros.
    ///
    /// # Errors
    /// The device has failed.
    pub fn fill_zero<'a, T: Element>(&self, destination: impl Into<SliceMut<'a, T>>) -> Result<(), DeviceError> {
        let mut destination = destination.into();
        self.check_view(destination.device())?;
        if destination.is_empty() {
            return Ok(());
        }
        on_device!(self, device => device.fill_zero(&mut destination))
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// The grid is not possible, the kernel is not loaded, or the device has failed. A fault inside the kernel comes
    /// out here on the CPU, and out of a later call on CUDA.
    #[expect(clippy::needless_pass_by_value, reason = "a launch is used once")]
    pub fn launch(&self, launch: Launch<'_>, grid: Grid) -> Result<(), DeviceError> {
        self.launch_kernel(&launch, grid, false)
    }

    /// [`launch`](Self::launch) of a kernel that may start before uploads and copies just ahead of it have ended, because it waits
    /// before it reads anything that they write. A kernel that it lets start early has to do the same.
    ///
    /// # Errors
    /// As for `launch`.
    #[expect(clippy::needless_pass_by_value, reason = "a launch is used once")]
    pub fn launch_behind_copies(&self, launch: Launch<'_>, grid: Grid) -> Result<(), DeviceError> {
        self.launch_kernel(&launch, grid, true)
    }

    fn launch_kernel(&self, launch: &Launch<'_>, grid: Grid, behind_copies: bool) -> Result<(), DeviceError> {
        check_arguments(launch)?;
        if grid.blocks.contains(&0) {
            return Err(DeviceError::InvalidParameter(format!(
                "{}: the grid {:?} has a 0; launch nothing instead",
                launch.kernel().name,
                grid.blocks
            )));
        }
        on_device!(self, device => device.launch(launch, grid, behind_copies))
    }

    /// Takes a weight, `[n, k]` row-major, into the form that this device computes with. On CUDA that is the buffer
    /// itself; on the CPU it is a packed copy, and the rows are freed unless `keep_rows`, which an embedding tied to
    /// the output head needs.
    ///
    /// # Errors
    /// The shape is not the buffer's, or memory is short.
    pub fn prepare_weight(
        &self,
        rows: Buffer<bf16>,
        n: usize,
        k: usize,
        keep_rows: bool,
    ) -> Result<Weight, DeviceError> {
        self.check_view(rows.as_slice().device())?;
        if n == 0 || k == 0 || n.checked_mul(k) != Some(rows.len()) {
            return Err(DeviceError::InvalidParameter(format!(
                "{n} x {k} is not the shape of {} elements",
                rows.len()
            )));
        }
        match self {
            Self::Cpu(device) => {
                let packed = device.pack(&rows, n, k)?;
                let keep_rows = keep_rows || device.tensor_cores();
                Ok(Weight { n, k, rows: keep_rows.then_some(rows), packed: Some(packed) })
            }
            Self::Cuda(_) => Ok(Weight { n, k, rows: Some(rows), packed: None }),
        }
    }

    /// A linear layer: `out[m, n] = x[m, k] * weight[n, k]` transposed, all row-major, with f32 sums in the order of
    /// the numeric contract; `m` follows from the lengths. A row's bits do not depend on the other rows or on `m`.
    ///
    /// On CUDA this is cuBLASLt, whatever [`linear_backend`](Self::linear_backend) says: the caller asks it first.
    ///
    /// # Errors
    /// The shapes do not fit, or cuBLASLt has no algorithm that keeps the contract.
    pub fn linear<'a, 'b, O: LinearOutput>(
        &self,
        x: impl Into<Slice<'a, bf16>>,
        weight: &Weight,
        out: impl Into<SliceMut<'b, O>>,
    ) -> Result<(), DeviceError> {
        let (x, mut out) = (x.into(), out.into());
        let m = self.check_linear(&x, weight, 1, &out)?;
        match self {
            Self::Cpu(device) => device.linear(x, m, weight, 1, &mut out),
            Self::Cuda(device) => device.linear(x, m, weight, O::TYPE, &mut out, None),
        }
    }

    /// The parts of a linear layer: [`linear`](Self::linear) over each of so many equal, consecutive segments of k, into
    /// `out[s, m, n]`.
    ///
    /// # Errors
    /// As for `linear`.
    pub fn linear_parts<'a, 'b>(
        &self,
        x: impl Into<Slice<'a, bf16>>,
        weight: &Weight,
        segments: usize,
        out: impl Into<SliceMut<'b, f32>>,
    ) -> Result<(), DeviceError> {
        self.parts(x.into(), weight, segments, &mut out.into(), None)
    }

    /// [`linear_parts`](Self::linear_parts) with one of the [`linear_algorithms`](Self::linear_algorithms) for
    /// [`OutputType::Parts`].
    ///
    /// # Errors
    /// As for `linear`, and when there is no such algorithm.
    pub fn linear_parts_with_algorithm<'a, 'b>(
        &self,
        index: usize,
        x: impl Into<Slice<'a, bf16>>,
        weight: &Weight,
        segments: usize,
        out: impl Into<SliceMut<'b, f32>>,
    ) -> Result<(), DeviceError> {
        self.parts(x.into(), weight, segments, &mut out.into(), Some(index))
    }

    fn parts(
        &self,
        x: Slice<'_, bf16>,
        weight: &Weight,
        segments: usize,
        out: &mut SliceMut<'_, f32>,
        algorithm: Option<usize>,
    ) -> Result<(), DeviceError> {
        let m = self.check_linear(&x, weight, segments, out)?;
        match self {
            Self::Cpu(device) => {
                one_algorithm(algorithm)?;
                device.linear(x, m, weight, segments, out)
            }
            Self::Cuda(device) => device.linear(x, m, weight, OutputType::Parts(segments), out, algorithm),
        }
    }

    /// [`linear`](Self::linear) with one of the [`linear_algorithms`](Self::linear_algorithms).
    ///
    /// # Errors
    /// As for `linear`, and when there is no such algorithm.
    pub fn linear_with_algorithm<'a, 'b, O: LinearOutput>(
        &self,
        index: usize,
        x: impl Into<Slice<'a, bf16>>,
        weight: &Weight,
        out: impl Into<SliceMut<'b, O>>,
    ) -> Result<(), DeviceError> {
        let (x, mut out) = (x.into(), out.into());
        let m = self.check_linear(&x, weight, 1, &out)?;
        match self {
            Self::Cpu(device) => {
                one_algorithm(Some(index))?;
                device.linear(x, m, weight, 1, &mut out)
            }
            Self::Cuda(device) => device.linear(x, m, weight, O::TYPE, &mut out, Some(index)),
        }
    }

    /// The algorithms that may compute a linear layer of this shape under the contract, the preferred first.
    ///
    /// # Errors
    /// cuBLASLt cannot be asked.
    pub fn linear_algorithms(
        &self,
        n: usize,
        k: usize,
        m: usize,
        output: OutputType,
    ) -> Result<Vec<String>, DeviceError> {
        match self {
            Self::Cpu(_) => Ok(vec!["f32 FMA in the order of k".to_owned()]),
            Self::Cuda(device) => device.linear_algorithms(n, k, m, output),
        }
    }

    /// Times the algorithms of [`linear`](Self::linear), or of [`linear_parts`](Self::linear_parts) in this many segments, for the rows of `x`, one of [`LINEAR_RUNGS`], on weights of one shape, and
    /// keeps the fastest for these rows and for those down to the rung below. It changes no bits. `out` is overwritten. `None`
    /// where there is nothing to choose; on the CPU always.
    ///
    /// # Errors
    /// The shapes do not fit, or the device's error.
    pub fn choose_linear_algorithm<'a, 'b, O: LinearOutput>(
        &self,
        x: impl Into<Slice<'a, bf16>>,
        weights: &[&Weight],
        segments: usize,
        out: impl Into<SliceMut<'b, O>>,
    ) -> Result<Option<LinearChoice>, DeviceError> {
        let (x, mut out) = (x.into(), out.into());
        let mut m = 0;
        for weight in weights {
            m = self.check_linear(&x, weight, segments, &out)?;
        }
        match self {
            Self::Cpu(_) => Ok(None),
            Self::Cuda(device) => {
                let output = if segments == 1 { O::TYPE } else { OutputType::Parts(segments) };
                device.choose_linear_algorithm(x, m, weights, output, &mut out)
            }
        }
    }

    /// The library behind [`linear`](Self::linear), with its version: part of a fingerprint.
    #[must_use]
    pub fn linear_library(&self) -> String {
        match self {
            Self::Cpu(_) => "f32 FMA chain".to_owned(),
            Self::Cuda(device) => device.linear_library(),
        }
    }

    /// Whether linear layers are the tensor-core chain here: on every GPU, and on a CPU that was told to imitate one.
    #[must_use]
    pub fn tensor_cores(&self) -> bool {
        match self {
            Self::Cpu(device) => device.tensor_cores(),
            Self::Cuda(_) => true,
        }
    }

    /// Who computes linear layers on CUDA; [`LinearBackend::CublasLt`] stands for `Device::linear` on the CPU.
    #[must_use]
    pub fn linear_backend(&self) -> LinearBackend {
        match self {
            Self::Cpu(device) => device.linear_backend(),
            Self::Cuda(device) => device.linear_backend(),
        }
    }

    /// Chooses it: the self-test's verdict. Nothing on a CPU without tensor cores.
    pub fn set_linear_backend(&self, backend: LinearBackend) {
        on_device!(self, device => device.set_linear_backend(backend));
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// Some work failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        on_device!(self, device => device.synchronize())
    }

    /// Profilers that wait to be told (`ncu --profile-from-start off`) record from here on, or no more. Nothing without one.
    pub fn profile(&self, on: bool) {
        if let Self::Cuda(device) = self {
            device.profile(on);
        }
    }

    fn id(&self) -> buffer::DeviceId {
        on_device!(self, device => device.id())
    }

    fn check_view(&self, device: buffer::DeviceId) -> Result<(), DeviceError> {
        if device == self.id() {
            Ok(())
        } else {
            Err(DeviceError::InvalidParameter("the memory belongs to another device".to_owned()))
        }
    }

    fn check_linear<O: LinearOutput>(
        &self,
        x: &Slice<'_, bf16>,
        weight: &Weight,
        segments: usize,
        out: &SliceMut<'_, O>,
    ) -> Result<usize, DeviceError> {
        self.check_view(x.device())?;
        self.check_view(out.device())?;
        linear::check_shapes(x.len(), weight, segments, out.len())
    }
}

/// The CPU's only algorithm is the first.
fn one_algorithm(index: Option<usize>) -> Result<(), DeviceError> {
    match index {
        None | Some(0) => Ok(()),
        Some(index) => Err(DeviceError::InvalidParameter(format!("the CPU has one algorithm, not {index}"))),
    }
}

fn same_length(a: usize, b: usize) -> Result<(), DeviceError> {
    if a == b {
        Ok(())
    } else {
        Err(DeviceError::InvalidParameter(format!("a copy between {a} and {b} elements: make the lengths equal")))
    }
}

/// Checks that the arguments are what the descriptor names: a `Launch` may also be built by hand.
fn check_arguments(launch: &Launch<'_>) -> Result<(), DeviceError> {
    let (kernel, args) = (launch.kernel(), launch.args());
    let fits = args.len() == kernel.params.len()
        && args.iter().zip(kernel.params).all(|(arg, param)| match (arg, param.kind) {
            (Arg::Buffer(_), ParamKind::Buffer { .. }) => true,
            (Arg::Scalar { bytes, .. }, ParamKind::Scalar { bytes: expected }) => *bytes == expected,
            _ => false,
        });
    if fits {
        Ok(())
    } else {
        Err(DeviceError::InvalidParameter(format!(
            "the arguments are not those of {}: use its own launch function",
            kernel.name
        )))
    }
}

#[cfg(test)]
mod tests;

mod file_map;

pub use file_map::FileMap;
