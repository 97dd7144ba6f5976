//! NVIDIA GPUs, through the driver and cuBLASLt. Only the files of this folder name cudarc.
//!
//! One primary context and one stream per device. Weights, KV cache and activations are plain device memory; the one
//! exception are small pinned buffers through which token ids go up and come down.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `context` | finding the driver and the device, the stream, errors that stop the device |
//! | `memory` | allocations, copies, the residency check |
//! | `module` | loading kernels, launching them |
//! | `linear` | cuBLASLt |
//! | `tensor_map` | matrices as the copy engine sees them |
//! | `recording` | CUDA graphs |
//! | `events` | points in the stream and the time between them |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cuda_std::Element;
use cuda_std::launch::{Grid, KernelDesc, Launch};
use cudarc::driver::sys;
use half::bf16;

pub(super) use context::device_count;
pub(super) use events::Events;
pub(super) use memory::Memory;

use super::buffer::DeviceId;
use super::cpu::Fill;
use super::{
    DeviceError, Dimension, KernelImages, LinearBackend, LinearChoice, LinearOutput, MemoryInfo, MemoryKind,
    MemoryTracker, OutputType, Slice, SliceMut, TENSOR_MAP_WORDS, Weight,
};
use context::Context;
use linear::{CublasLt, Multiply};
use memory::Staging;
use module::Module;
pub(super) use recording::Graph;

mod context;
mod events;
mod linear;
mod memory;
mod module;
mod recording;
mod tensor_map;
#[cfg(test)]
mod tests;
#[cfg(feature = "timeline")]
mod timeline;

/// A GPU. The fields are dropped in this order: what needs the context goes before it.
pub struct Cuda {
    module: Module,
    /// `None` when the library is not installed: then the Rust kernel serves.
    cublaslt: Option<CublasLt>,
    staging: Staging,
    linear_by_kernel: AtomicBool,
    context: Arc<Context>,
}

impl Cuda {
    pub(super) fn new(
        ordinal: i32,
        images: &KernelImages<'_>,
        kernels: &[&'static KernelDesc],
    ) -> Result<Self, DeviceError> {
        let context = Arc::new(Context::new(ordinal)?);
        let module = Module::new(&context, images, kernels)?;
        let cublaslt = CublasLt::new(&context)?;
        let staging = Staging::new(&context)?;
        let linear_by_kernel = AtomicBool::new(cublaslt.is_none());
        Ok(Self { module, cublaslt, staging, linear_by_kernel, context })
    }

    pub(super) fn id(&self) -> DeviceId {
        self.context.id()
    }

    pub(super) fn name(&self) -> String {
        self.context.name().to_owned()
    }

    pub(super) fn compute_capability(&self) -> u32 {
        self.context.capability()
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.context.multiprocessors()
    }

    pub(super) fn kernel_image(&self) -> &str {
        self.module.image()
    }

    pub(super) fn tensor_map(
        &self,
        address: u64,
        dimensions: &[Dimension],
    ) -> Result<[u64; TENSOR_MAP_WORDS], DeviceError> {
        tensor_map::encode(&self.context, address, dimensions)
    }

    pub(super) fn driver(&self) -> Option<String> {
        let version = context::driver_version();
        (version > 0).then(|| format!("CUDA {}.{}", version / 1000, version % 1000 / 10))
    }

    pub(super) fn events(&self) -> Result<Events, DeviceError> {
        Events::new(&self.context)
    }

    pub(super) fn tracker(&self) -> &MemoryTracker {
        self.context.tracker()
    }

    pub(super) fn memory_info(&self) -> Result<MemoryInfo, DeviceError> {
        self.context.memory_info()
    }

    pub(super) fn failure(&self) -> Option<DeviceError> {
        self.context.failure()
    }

    pub(super) fn verify_residency(&self) -> Result<(), DeviceError> {
        memory::verify_residency(&self.context)
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.context.synchronize()
    }

    pub(super) fn profile(&self, on: bool) {
        if self.context.enter().is_ok() {
            // SAFETY: no arguments; the context is current. Without a profiler both fail, which is of no concern.
            let _ = unsafe { if on { sys::cuProfilerStart() } else { sys::cuProfilerStop() } };
        }
    }

    pub(super) fn alloc(&self, bytes: usize, fill: Fill, kind: MemoryKind, label: &str) -> Result<Memory, DeviceError> {
        Memory::new(&self.context, bytes, fill, kind, label)
    }

    pub(super) fn upload<T: Element>(
        &self,
        destination: &mut SliceMut<'_, T>,
        source: &[T],
    ) -> Result<(), DeviceError> {
        // SAFETY: the view lies in live memory of this device and borrows it exclusively; elements have no padding.
        unsafe {
            let bytes = std::slice::from_raw_parts(source.as_ptr().cast::<u8>(), size_of_val(source));
            self.staging.upload(&self.context, &self.module, destination.address(), bytes)
        }
    }

    pub(super) fn download<T: Element>(&self, source: Slice<'_, T>, destination: &mut [T]) -> Result<(), DeviceError> {
        // SAFETY: the view lies in live memory of this device; all bits are values of an element.
        unsafe {
            let bytes =
                std::slice::from_raw_parts_mut(destination.as_mut_ptr().cast::<u8>(), size_of_val::<[T]>(destination));
            self.staging.download(&self.context, source.address(), bytes)
        }
    }

    pub(super) fn begin_download<T: Element>(&self, source: Slice<'_, T>) -> Result<u64, DeviceError> {
        // SAFETY: the view lies in live memory of this device, and freeing it waits for the stream.
        unsafe {
            let bytes = source.len() * size_of::<T>();
            self.staging.begin_download(&self.context, &self.module, source.address(), bytes)
        }
    }

    pub(super) fn collect_download<T: Element>(&self, number: u64, destination: &mut [T]) -> Result<(), DeviceError> {
        // SAFETY: all bits are values of an element.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(destination.as_mut_ptr().cast::<u8>(), size_of_val::<[T]>(destination))
        };
        self.staging.collect_download(number, bytes)
    }

    pub(super) fn copy<T: Element>(
        &self,
        source: Slice<'_, T>,
        destination: &mut SliceMut<'_, T>,
    ) -> Result<(), DeviceError> {
        // SAFETY: both views lie in live memory of this device, and the destination is borrowed exclusively, so they
        // do not overlap.
        unsafe {
            let bytes = source.len() * size_of::<T>();
            memory::copy(&self.context, &self.module, source.address(), destination.address(), bytes)
        }
    }

    pub(super) fn fill_zero<T: Element>(&self, destination: &mut SliceMut<'_, T>) -> Result<(), DeviceError> {
        // SAFETY: the view lies in live memory of this device and borrows it exclusively.
        unsafe { memory::fill(&self.context, destination.address(), destination.len() * size_of::<T>(), 0) }
    }

    pub(super) fn launch(&self, launch: &Launch<'_>, grid: Grid, behind_copies: bool) -> Result<(), DeviceError> {
        self.module.launch(launch, grid, behind_copies)
    }

    /// What `work` launches, without running it. `None` where the driver cannot record it.
    pub(super) fn record(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<Option<Graph>, DeviceError> {
        Graph::record(&self.context, work)
    }

    pub(super) fn shared_bytes_per_block(&self) -> u32 {
        self.context.shared_bytes_per_block()
    }

    pub(super) fn linear<O: LinearOutput>(
        &self,
        x: Slice<'_, bf16>,
        m: usize,
        weight: &Weight,
        output: OutputType,
        out: &mut SliceMut<'_, O>,
        algorithm: Option<usize>,
    ) -> Result<(), DeviceError> {
        let multiply = self.multiply(&x, m, weight, output, out)?;
        // SAFETY: `check_shapes` has compared the lengths of the views with the shape, and with the segments where `output`
        // is parts; else `output` is the view's own type. They lie in live memory of this device, and the output is borrowed
        // exclusively.
        unsafe { self.cublaslt()?.multiply(&multiply, algorithm) }
    }

    /// Times the algorithms for `m` rows on these weights, all of one shape, and keeps the fastest.
    pub(super) fn choose_linear_algorithm<O: LinearOutput>(
        &self,
        x: Slice<'_, bf16>,
        m: usize,
        weights: &[&Weight],
        output: OutputType,
        out: &mut SliceMut<'_, O>,
    ) -> Result<Option<LinearChoice>, DeviceError> {
        let Some(cublaslt) = &self.cublaslt else { return Ok(None) };
        let layers: Vec<Multiply> =
            weights.iter().map(|weight| self.multiply(&x, m, weight, output, out)).collect::<Result<_, _>>()?;
        // SAFETY: as in `linear`, for each weight.
        unsafe { cublaslt.choose(&layers) }
    }

    /// A linear layer by its addresses.
    fn multiply<O: LinearOutput>(
        &self,
        x: &Slice<'_, bf16>,
        m: usize,
        weight: &Weight,
        output: OutputType,
        out: &SliceMut<'_, O>,
    ) -> Result<Multiply, DeviceError> {
        let rows = weight.rows()?.as_slice();
        if rows.device() != self.id() {
            return Err(DeviceError::InvalidParameter("the weight was prepared for another device".to_owned()));
        }
        Ok(Multiply {
            n: weight.n(),
            k: weight.k(),
            m,
            output,
            weight: rows.address(),
            x: x.address(),
            out: out.address(),
        })
    }

    pub(super) fn linear_algorithms(
        &self,
        n: usize,
        k: usize,
        m: usize,
        output: OutputType,
    ) -> Result<Vec<String>, DeviceError> {
        self.cublaslt()?.algorithms(n, k, m, output)
    }

    pub(super) fn linear_library(&self) -> String {
        self.cublaslt.as_ref().map_or_else(|| "no cuBLASLt".to_owned(), CublasLt::description)
    }

    fn cublaslt(&self) -> Result<&CublasLt, DeviceError> {
        self.cublaslt.as_ref().ok_or_else(|| {
            DeviceError::KernelLaunchFailed(
                "cuBLASLt was not found at start-up: install CUDA's libcublasLt.so.13 or .so.12 and put its folder into \
                 LD_LIBRARY_PATH, or use the kernel backend"
                    .to_owned(),
            )
        })
    }

    pub(super) fn linear_backend(&self) -> LinearBackend {
        if self.linear_by_kernel.load(Ordering::Relaxed) { LinearBackend::Kernel } else { LinearBackend::CublasLt }
    }

    pub(super) fn set_linear_backend(&self, backend: LinearBackend) {
        self.linear_by_kernel.store(backend == LinearBackend::Kernel, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.context.name())
    }
}
