//! The CPU as a device: memory of this process, kernels under the SIMT executor, its own linear layers.

use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cuda_std::Element;
use cuda_std::cpu::Executor;
use cuda_std::launch::{Arg, Grid, Launch, ParamKind};
use half::bf16;

pub(super) use linear::PackedWeight;
pub(super) use memory::{Fill, Memory};

use super::buffer::DeviceId;
use super::{
    Buffer, DeviceError, LinearBackend, LinearOutput, MemoryInfo, MemoryKind, MemoryTracker, Slice, SliceMut, Weight,
};

mod linear;
mod memory;

/// How the CPU device works. `Default` is what a server wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads that compute; 0 takes one per core.
    pub threads: usize,
    /// The most memory that may be allocated, in bytes; `None` takes what the machine has.
    pub memory_limit_bytes: Option<u64>,
    /// Look for races, divergent barriers and reads of memory that nobody wrote. Many times slower.
    pub checked: bool,
    /// Of the order in which checked mode runs threads.
    pub seed: u64,
    /// Compute linear layers as a GPU does, by the tensor-core kernels, whose products the executor imitates. For tests of
    /// what only GPUs do otherwise: many times slower.
    pub tensor_cores: bool,
}

/// A guard against a mistyped number.
const MOST_THREADS: usize = 1024;

/// The CPU device.
pub struct Cpu {
    shared: Arc<Shared>,
    executor: Executor,
    failure: Mutex<Option<DeviceError>>,
    /// The input of a linear layer as f32.
    scratch: Mutex<Vec<f32>>,
    tensor_cores: bool,
    /// Linear layers by the tensor-core kernel, where there are tensor cores.
    own_kernel: AtomicBool,
}

/// What memory needs of its device.
pub(super) struct Shared {
    tracker: MemoryTracker,
    memory_limit_bytes: Option<u64>,
    checked: bool,
}

impl Shared {
    fn new(memory_limit_bytes: Option<u64>, checked: bool) -> Self {
        Self { tracker: MemoryTracker::default(), memory_limit_bytes, checked }
    }

    fn id(self: &Arc<Self>) -> DeviceId {
        Arc::as_ptr(self).addr()
    }

    fn memory_info(&self) -> MemoryInfo {
        let used = self.tracker.total_bytes();
        match self.memory_limit_bytes {
            Some(limit) => MemoryInfo { free_bytes: limit.saturating_sub(used), total_bytes: limit },
            None => {
                let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
                let bytes = |name| meminfo_bytes(&text, name).unwrap_or(u64::MAX);
                MemoryInfo { free_bytes: bytes("MemAvailable:"), total_bytes: bytes("MemTotal:") }
            }
        }
    }
}

/// A line such as `MemTotal:  16318412 kB`.
fn meminfo_bytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

impl Cpu {
    pub(super) fn new(options: CpuOptions) -> Result<Self, DeviceError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if options.threads == 0 { cores } else { options.threads };
        if threads > MOST_THREADS {
            return Err(DeviceError::InvalidDevice(format!("{threads} threads; the CPU device takes {MOST_THREADS}")));
        }
        let executor = if options.checked { Executor::checked(options.seed) } else { Executor::new(threads) };
        let shared = Arc::new(Shared::new(options.memory_limit_bytes, options.checked));
        let (failure, scratch) = (Mutex::new(None), Mutex::new(Vec::new()));
        Ok(Self {
            shared,
            executor,
            failure,
            scratch,
            tensor_cores: options.tensor_cores,
            own_kernel: AtomicBool::new(options.tensor_cores),
        })
    }

    pub(super) fn id(&self) -> DeviceId {
        self.shared.id()
    }

    pub(super) fn name(&self) -> String {
        format!("CPU, {} threads", self.executor.threads())
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.executor.threads()
    }

    pub(super) fn tensor_cores(&self) -> bool {
        self.tensor_cores
    }

    /// `CublasLt` stands for this device's own linear layer.
    pub(super) fn linear_backend(&self) -> LinearBackend {
        if self.own_kernel.load(Ordering::Relaxed) { LinearBackend::Kernel } else { LinearBackend::CublasLt }
    }

    pub(super) fn set_linear_backend(&self, backend: LinearBackend) {
        self.own_kernel.store(self.tensor_cores && backend == LinearBackend::Kernel, Ordering::Relaxed);
    }

    pub(super) fn tracker(&self) -> &MemoryTracker {
        &self.shared.tracker
    }

    pub(super) fn memory_info(&self) -> Result<MemoryInfo, DeviceError> {
        Ok(self.shared.memory_info())
    }

    pub(super) fn failure(&self) -> Option<DeviceError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn healthy(&self) -> Result<(), DeviceError> {
        self.failure().map_or(Ok(()), Err)
    }

    /// Stops the device: a kernel that failed leaves anything in its outputs, as on a GPU.
    fn fail(&self, error: DeviceError) -> DeviceError {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error).clone()
    }

    /// This process's memory is where this device computes, so there is nothing to find.
    pub(super) fn verify_residency(&self) -> Result<(), DeviceError> {
        self.healthy()
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.healthy()
    }

    pub(super) fn alloc(&self, bytes: usize, fill: Fill, kind: MemoryKind, label: &str) -> Result<Memory, DeviceError> {
        Memory::new(&self.shared, bytes, fill, kind, label)
    }

    pub(super) fn upload<T: Element>(
        &self,
        destination: &mut SliceMut<'_, T>,
        source: &[T],
    ) -> Result<(), DeviceError> {
        self.healthy()?;
        mark_written(destination);
        values_mut(destination).copy_from_slice(source);
        Ok(())
    }

    pub(super) fn download<T: Element>(&self, source: Slice<'_, T>, destination: &mut [T]) -> Result<(), DeviceError> {
        self.healthy()?;
        destination.copy_from_slice(values(source));
        Ok(())
    }

    pub(super) fn copy<T: Element>(
        &self,
        source: Slice<'_, T>,
        destination: &mut SliceMut<'_, T>,
    ) -> Result<(), DeviceError> {
        self.healthy()?;
        if let (Some((from, read)), Some((to, written))) = (source.shadow(), destination.shadow()) {
            for offset in (0..read.len()).step_by(size_of::<T>()) {
                let element = |start: usize| start + offset..start + offset + size_of::<T>();
                if from.is_initialised(element(read.start)) {
                    to.mark_initialised(element(written.start));
                } else {
                    to.mark_uninitialised(element(written.start));
                }
            }
        }
        values_mut(destination).copy_from_slice(values(source));
        Ok(())
    }

    pub(super) fn fill_zero<T: Element>(&self, destination: &mut SliceMut<'_, T>) -> Result<(), DeviceError> {
        self.healthy()?;
        mark_written(destination);
        let values = values_mut(destination);
        // SAFETY: zeros are a value of every element, and the slice is exclusively borrowed.
        unsafe { values.as_mut_ptr().write_bytes(0, values.len()) };
        Ok(())
    }

    pub(super) fn launch(&self, launch: &Launch<'_>, grid: Grid, _behind_copies: bool) -> Result<(), DeviceError> {
        self.healthy()?;
        self.check_memory(launch)?;
        self.executor.run(launch, grid).map_err(|fault| self.fail(DeviceError::KernelLaunchFailed(fault.to_string())))
    }

    /// Checks that every buffer is live memory of this device: a foreign address would be read as one of this process.
    fn check_memory(&self, launch: &Launch<'_>) -> Result<(), DeviceError> {
        for (arg, param) in launch.args().iter().zip(launch.kernel().params) {
            let (Arg::Buffer(buffer), ParamKind::Buffer { element, .. }) = (arg, param.kind) else { continue };
            let bytes = buffer.length.saturating_mul(element_bytes(element));
            if !self.shared.tracker.contains(buffer.address, bytes) {
                return Err(DeviceError::InvalidParameter(format!(
                    "{}: the buffer {} is not memory of this device",
                    launch.kernel().name,
                    param.name
                )));
            }
        }
        Ok(())
    }

    pub(super) fn pack(&self, rows: &Buffer<bf16>, n: usize, k: usize) -> Result<PackedWeight, DeviceError> {
        PackedWeight::new(&self.shared, values(rows.as_slice()), n, k)
    }

    pub(super) fn linear<O: LinearOutput>(
        &self,
        x: Slice<'_, bf16>,
        m: usize,
        weight: &Weight,
        segments: usize,
        out: &mut SliceMut<'_, O>,
    ) -> Result<(), DeviceError> {
        self.healthy()?;
        let packed =
            weight.packed.as_ref().filter(|packed| packed.device() == self.id()).ok_or_else(|| {
                DeviceError::InvalidParameter("the weight was prepared for another device".to_owned())
            })?;
        if let Some((shadow, bytes)) = x.shadow()
            && !shadow.is_initialised(bytes)
        {
            let text =
                format!("a linear layer of {} x {} reads inputs that nobody has written", weight.n(), weight.k());
            return Err(self.fail(DeviceError::KernelLaunchFailed(text)));
        }
        mark_written(out);
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        packed.multiply(&self.executor, &mut scratch, values(x), m, segments, values_mut(out));
        Ok(())
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

/// Tells checked mode that the host has written the view.
fn mark_written<T: Element>(slice: &SliceMut<'_, T>) {
    if let Some((shadow, bytes)) = slice.shadow() {
        shadow.mark_initialised(bytes);
    }
}

/// The bytes of an element by its name.
fn element_bytes(name: &str) -> u64 {
    match name {
        "u8" => 1,
        "u16" | "bf16" => 2,
        "u64" => 8,
        _ => 4,
    }
}

/// The elements of a view of this device's memory.
fn values<T: Element>(slice: Slice<'_, T>) -> &[T] {
    // SAFETY: the view lies in an allocation whose provenance is exposed, which the borrow keeps alive and unwritten;
    // its bytes were initialised when it was allocated, and all bits are values of an element.
    unsafe { std::slice::from_raw_parts(with_exposed_provenance(slice.address() as usize), slice.len()) }
}

/// The elements of a writable view of this device's memory.
fn values_mut<'a, T: Element>(slice: &'a mut SliceMut<'_, T>) -> &'a mut [T] {
    // SAFETY: as for `values`, and the view borrows its part exclusively.
    unsafe { std::slice::from_raw_parts_mut(with_exposed_provenance_mut(slice.address() as usize), slice.len()) }
}
