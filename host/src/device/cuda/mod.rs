//! NVIDIA GPUs, through the driver and cuBLASLt. Only the files of this folder name cudarc.

use cuda_std::Element;
use cuda_std::launch::{Grid, KernelDesc, Launch};
use half::bf16;

use super::buffer::DeviceId;
use super::cpu::Fill;
use super::{
    DeviceError, KernelImages, LinearBackend, LinearOutput, MemoryInfo, MemoryKind, MemoryTracker, OutputType, Slice,
    SliceMut, Weight,
};

pub(super) struct Memory(Never);
#[derive(Debug)]
pub struct Cuda(Never);
#[derive(Debug)]
enum Never {}

pub(super) fn device_count() -> Result<usize, DeviceError> {
    Ok(0)
}

impl Memory {
    pub(super) fn device(&self) -> DeviceId {
        match self.0 {}
    }
    pub(super) fn address(&self) -> u64 {
        match self.0 {}
    }
}

#[allow(unused_variables)]
impl Cuda {
    pub(super) fn new(
        ordinal: i32,
        images: &KernelImages<'_>,
        kernels: &[&'static KernelDesc],
    ) -> Result<Self, DeviceError> {
        Err(DeviceError::DeviceNotFound("not there yet".to_owned()))
    }
    pub(super) fn id(&self) -> DeviceId {
        match self.0 {}
    }
    pub(super) fn name(&self) -> String {
        match self.0 {}
    }
    pub(super) fn compute_capability(&self) -> u32 {
        match self.0 {}
    }
    pub(super) fn multiprocessors(&self) -> usize {
        match self.0 {}
    }
    pub(super) fn kernel_image(&self) -> &str {
        match self.0 {}
    }
    pub(super) fn tracker(&self) -> &MemoryTracker {
        match self.0 {}
    }
    pub(super) fn memory_info(&self) -> Result<MemoryInfo, DeviceError> {
        match self.0 {}
    }
    pub(super) fn failure(&self) -> Option<DeviceError> {
        match self.0 {}
    }
    pub(super) fn verify_residency(&self) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn alloc(&self, bytes: usize, fill: Fill, kind: MemoryKind, label: &str) -> Result<Memory, DeviceError> {
        match self.0 {}
    }
    pub(super) fn upload<T: Element>(&self, destination: SliceMut<'_, T>, source: &[T]) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn download<T: Element>(&self, source: Slice<'_, T>, destination: &mut [T]) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn copy<T: Element>(
        &self,
        source: Slice<'_, T>,
        destination: SliceMut<'_, T>,
    ) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn fill_zero<T: Element>(&self, destination: SliceMut<'_, T>) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn launch(&self, launch: &Launch<'_>, grid: Grid) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn linear<O: LinearOutput>(
        &self,
        x: Slice<'_, bf16>,
        m: usize,
        weight: &Weight,
        out: SliceMut<'_, O>,
        algorithm: Option<usize>,
    ) -> Result<(), DeviceError> {
        match self.0 {}
    }
    pub(super) fn linear_algorithms(
        &self,
        n: usize,
        k: usize,
        m: usize,
        output: OutputType,
    ) -> Result<Vec<String>, DeviceError> {
        match self.0 {}
    }
    pub(super) fn linear_backend(&self) -> LinearBackend {
        match self.0 {}
    }
    pub(super) fn set_linear_backend(&self, backend: LinearBackend) {
        match self.0 {}
    }
}
