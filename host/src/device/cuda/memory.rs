//! Device memory: plain `cuMemAlloc`, copies, and the check that it is where it should be.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cuda_std::launch::{BufferArg, Grid, ReadBuffer, WriteBuffer};
use cudarc::driver::sys::{self, CUmemorytype_enum, CUpointer_attribute_enum as PointerAttribute, CUresult};
use kernels_gpu::copy_words;

use super::context::Context;
use super::events::Event;
use super::module::Module;
use crate::device::buffer::DeviceId;
use crate::device::cpu::Fill;
use crate::device::{DeviceError, MemoryKind, MemoryRecord};

/// An allocation.
pub(in crate::device) struct Memory {
    address: u64,
    context: Arc<Context>,
}

impl Memory {
    /// `bytes` bytes, more than 0.
    pub(super) fn new(
        context: &Arc<Context>,
        bytes: usize,
        fill_with: Fill,
        kind: MemoryKind,
        label: &str,
    ) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut address = 0;
        let result = if bytes as u64 > context.total_bytes() {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY
        } else {
            // SAFETY: writes one address; freed in `drop`.
            unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }
        };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(DeviceError::OutOfMemory {
                requested_bytes: bytes as u64,
                free_bytes: context.memory_info().map_or(0, |info| info.free_bytes),
                kind,
                label: label.to_owned(),
                breakdown: context.tracker().breakdown(),
            });
        }
        context.check(result, DeviceError::InferenceFailed, &format!("{bytes} bytes for {label}"))?;
        let memory = Self { address, context: Arc::clone(context) };
        context.tracker().record(MemoryRecord { address, bytes: bytes as u64, kind, label: label.to_owned() });
        let byte = match fill_with {
            Fill::Zero => 0,
            Fill::Poison => 0xff,
        };
        // SAFETY: just allocated, with this size.
        unsafe { fill(context, address, bytes, byte)? };
        Ok(memory)
    }

    pub(in crate::device) fn device(&self) -> DeviceId {
        self.context.id()
    }

    pub(in crate::device) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _frees = self.context.hold_frees();
        self.context.tracker().forget(self.address);
        // SAFETY: allocated in `new`, freed once; work on the stream that may still use it is awaited first.
        unsafe {
            let _ = self.context.make_current();
            let _ = sys::cuStreamSynchronize(self.context.stream());
            let _ = sys::cuMemFree_v2(self.address);
        }
    }
}

/// Writes `byte` to every byte.
///
/// # Safety
/// The range is live memory of the device that nobody else uses.
pub(super) unsafe fn fill(context: &Context, address: u64, bytes: usize, byte: u8) -> Result<(), DeviceError> {
    context.enter()?;
    // SAFETY: this function's contract.
    let result = unsafe { sys::cuMemsetD8Async(address, byte, bytes, context.stream()) };
    context.check(result, DeviceError::InferenceFailed, "memory cannot be filled")
}

/// Copies within the device.
///
/// # Safety
/// Both ranges are live memory of the device, they do not overlap, and nobody else uses the destination.
pub(super) unsafe fn copy(
    context: &Context,
    module: &Module,
    source: u64,
    destination: u64,
    bytes: usize,
) -> Result<(), DeviceError> {
    context.enter()?;
    // SAFETY: this function's contract.
    if unsafe { copy_by_kernel(module, source, destination, bytes)? } {
        return Ok(());
    }
    // SAFETY: this function's contract.
    let result = unsafe { sys::cuMemcpyDtoDAsync_v2(destination, source, bytes, context.stream()) };
    context.check(result, DeviceError::InferenceFailed, "a copy on the device failed")
}

/// Copies of at most this many bytes are a kernel's, where the device has it: three of the driver's copies between two steps cost
/// 34 us on an H100 with 8 rows, 52 with 64 (`benches/results/2026-11-23-h100-replicas.md`).
const KERNEL_BYTES: usize = 64 * 1024;

/// Words as an argument of a launch.
struct Words {
    address: u64,
    count: usize,
}

impl Words {
    fn arg(&self) -> BufferArg {
        BufferArg { address: self.address, length: self.count as u64, shadow: std::ptr::null(), shadow_offset: 0 }
    }
}

// SAFETY: whoever makes one vouches for its memory, in `copy_by_kernel`.
unsafe impl ReadBuffer<u32> for Words {
    fn read_arg(&self) -> BufferArg {
        self.arg()
    }
}

// SAFETY: as above.
unsafe impl WriteBuffer<u32> for Words {
    fn write_arg(&mut self) -> BufferArg {
        self.arg()
    }
}

/// Copies few whole words between places that the device reaches: its own memory, or the staging's pinned memory, which has the same
/// address there. False where it does not: then the driver has to copy.
///
/// # Safety
/// Both ranges are such memory, do not overlap, and stay so until the stream has passed this point; nobody else uses the destination
/// until then.
unsafe fn copy_by_kernel(module: &Module, source: u64, destination: u64, bytes: usize) -> Result<bool, DeviceError> {
    let whole = |value: u64| value.is_multiple_of(4);
    let suits = bytes <= KERNEL_BYTES && whole(bytes as u64) && whole(source) && whole(destination);
    if !suits || !module.has(copy_words::copy_words::KERNEL) {
        return Ok(false);
    }
    let count = bytes / 4;
    let (from, mut to) = (Words { address: source, count }, Words { address: destination, count });
    let blocks = count.div_ceil(copy_words::THREADS as usize) as u32;
    module.launch_copy(&copy_words::copy_words::launch(&from, &mut to), Grid::new_1d(blocks))?;
    Ok(true)
}

/// True when the address is plain memory of this device: not the host's, not managed.
pub(super) fn is_device_memory(context: &Context, address: u64) -> bool {
    if address == 0 || context.make_current().is_err() {
        return false;
    }
    // The attributes are ints of 1 or 4 bytes; a zeroed word holds either, in the low bytes.
    let attribute = |attribute| {
        let mut value = 0_u64;
        // SAFETY: writes at most 8 bytes for these attributes; any address may be asked about.
        let result = unsafe { sys::cuPointerGetAttribute((&raw mut value).cast::<c_void>(), attribute, address) };
        (result == CUresult::CUDA_SUCCESS).then_some(value)
    };
    attribute(PointerAttribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        == Some(CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as u64)
        && attribute(PointerAttribute::CU_POINTER_ATTRIBUTE_IS_MANAGED) == Some(0)
        && attribute(PointerAttribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
            == Some(u64::from(context.ordinal().unsigned_abs()))
}

/// Checks the first and the last byte of every tracked allocation.
pub(super) fn verify_residency(context: &Context) -> Result<(), DeviceError> {
    context.enter()?;
    // What is on record stays allocated while this looks.
    let _frees = context.hold_frees();
    let records = context.tracker().records();
    let foreign: Vec<_> = records
        .iter()
        .filter(|record| {
            let last = record.address + record.bytes.saturating_sub(1);
            !is_device_memory(context, record.address) || !is_device_memory(context, last)
        })
        .map(|record| format!("{} ({}, {} bytes at {:#x})", record.label, record.kind, record.bytes, record.address))
        .collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let error = DeviceError::ResidencyFailed(format!(
        "{} of {} allocations are not plain memory of GPU {}: {}; restart the process",
        foreign.len(),
        records.len(),
        context.ordinal(),
        foreign.join(", ")
    ));
    context.fail(&error);
    Err(error)
}

/// Four small pinned buffers. Small uploads return without waiting for the device; small downloads skip the driver's
/// own staging; the smallest of both are copied by a kernel. Larger copies, such as weights, go directly and wait.
pub(super) struct Staging {
    up: Mutex<Ring>,
    down: Mutex<Pinned>,
    later: Mutex<Later>,
}

/// Copies of at most this many bytes are staged.
const STAGED_BYTES: usize = 256 * 1024;
/// How much may be on its way up before an upload waits.
const RING_BYTES: usize = 4 * STAGED_BYTES;

struct Ring {
    pinned: Pinned,
    used: usize,
}

/// Page-locked memory of the host.
struct Pinned {
    pointer: *mut u8,
    context: Arc<Context>,
}

// SAFETY: the memory is owned and belongs to no thread.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut pointer = std::ptr::null_mut();
        // SAFETY: writes one pointer; freed in `drop`.
        let result = unsafe { sys::cuMemAllocHost_v2(&raw mut pointer, bytes) };
        context.check(result, DeviceError::InvalidDevice, "no pinned memory for token ids")?;
        Ok(Self { pointer: pointer.cast(), context: Arc::clone(context) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once; copies that use it are awaited first.
        unsafe {
            let _ = self.context.make_current();
            let _ = sys::cuStreamSynchronize(self.context.stream());
            let _ = sys::cuMemFreeHost(self.pointer.cast());
        }
    }
}

/// Downloads that are collected later, in turn.
struct Later {
    turns: [(Pinned, Event); LATER],
    /// How many were begun; the next one's number.
    begun: u64,
}

/// How many downloads may be on their way down at once.
const LATER: usize = 2;

/// Bytes of each at most.
const LATER_BYTES: usize = 16 * 1024;

impl Staging {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let up = Ring { pinned: Pinned::new(context, RING_BYTES)?, used: 0 };
        let turn = || Ok::<_, DeviceError>((Pinned::new(context, LATER_BYTES)?, Event::new(context)?));
        Ok(Self {
            up: Mutex::new(up),
            down: Mutex::new(Pinned::new(context, STAGED_BYTES)?),
            later: Mutex::new(Later { turns: [turn()?, turn()?], begun: 0 }),
        })
    }

    /// Begins a copy from the device, after all work before it, and returns its number. It is lost when [`LATER`] others
    /// were begun after it.
    ///
    /// # Safety
    /// The source is live memory of the device for as many bytes, and stays so until the work before this point is done.
    pub(super) unsafe fn begin_download(
        &self,
        context: &Context,
        module: &Module,
        source: u64,
        bytes: usize,
    ) -> Result<u64, DeviceError> {
        context.enter()?;
        if bytes > LATER_BYTES {
            return Err(DeviceError::InvalidParameter(format!("{bytes} bytes for later; {LATER_BYTES} fit")));
        }
        let mut later = self.later.lock().unwrap_or_else(PoisonError::into_inner);
        let number = later.begun;
        later.begun += 1;
        let (pinned, event) = &mut later.turns[number as usize % LATER];
        // SAFETY: the buffer has `LATER_BYTES` bytes, is read under the lock only, and an earlier copy into it is done
        // before this one by the order of the stream.
        if !unsafe { copy_by_kernel(module, source, pinned.pointer as u64, bytes)? } {
            // SAFETY: as above.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(pinned.pointer.cast(), source, bytes, context.stream()) };
            context.check(result, DeviceError::InferenceFailed, "a download failed")?;
        }
        event.record()?;
        Ok(number)
    }

    /// Waits for the copy with this number.
    pub(super) fn collect_download(&self, number: u64, destination: &mut [u8]) -> Result<(), DeviceError> {
        let later = self.later.lock().unwrap_or_else(PoisonError::into_inner);
        if number + (LATER as u64) < later.begun || destination.len() > LATER_BYTES {
            return Err(DeviceError::InvalidParameter(format!("download {number} was not collected in time")));
        }
        let (pinned, event) = &later.turns[number as usize % LATER];
        event.wait()?;
        // SAFETY: the copy into the buffer is over, and no other was begun (checked above, under the lock).
        unsafe { destination.as_mut_ptr().copy_from_nonoverlapping(pinned.pointer, destination.len()) };
        Ok(())
    }

    /// Copies to the device; the source is free when this returns.
    ///
    /// # Safety
    /// The destination is live memory of the device for as many bytes, which nobody else uses.
    pub(super) unsafe fn upload(
        &self,
        context: &Context,
        module: &Module,
        destination: u64,
        source: &[u8],
    ) -> Result<(), DeviceError> {
        const FAULT: &str = "an upload failed";
        context.enter()?;
        if source.len() > STAGED_BYTES {
            // SAFETY: this function's contract; the source is borrowed until the wait is over.
            let result = unsafe {
                sys::cuMemcpyHtoDAsync_v2(destination, source.as_ptr().cast(), source.len(), context.stream())
            };
            // Wait even if the copy did not start: the source must not be in use when this returns.
            let waited = context.synchronize();
            context.check(result, DeviceError::InferenceFailed, FAULT)?;
            return waited;
        }
        let mut ring = self.up.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.used + source.len() > RING_BYTES {
            // Everything staged so far has left when the stream is idle.
            context.synchronize()?;
            ring.used = 0;
        }
        let offset = ring.used;
        ring.used += source.len().next_multiple_of(64);
        // SAFETY: the bytes from `offset` on are inside the ring and no copy reads them.
        let staged = unsafe {
            let staged = ring.pinned.pointer.add(offset);
            staged.copy_from_nonoverlapping(source.as_ptr(), source.len());
            staged
        };
        // SAFETY: the staged bytes stay until the stream has passed this point (above); the destination by contract.
        if unsafe { copy_by_kernel(module, staged as u64, destination, source.len())? } {
            return Ok(());
        }
        // SAFETY: as above.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(destination, staged.cast(), source.len(), context.stream()) };
        context.check(result, DeviceError::InferenceFailed, FAULT)
    }

    /// Copies from the device, after all work before it.
    ///
    /// # Safety
    /// The source is live memory of the device for as many bytes.
    pub(super) unsafe fn download(
        &self,
        context: &Context,
        source: u64,
        destination: &mut [u8],
    ) -> Result<(), DeviceError> {
        const FAULT: &str = "a download failed";
        context.enter()?;
        let bytes = destination.len();
        if bytes > STAGED_BYTES {
            // SAFETY: this function's contract; the destination is borrowed until the wait is over.
            let result =
                unsafe { sys::cuMemcpyDtoHAsync_v2(destination.as_mut_ptr().cast(), source, bytes, context.stream()) };
            let waited = context.synchronize();
            context.check(result, DeviceError::InferenceFailed, FAULT)?;
            return waited;
        }
        let pinned = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the buffer has `STAGED_BYTES` bytes, and the lock keeps it for this copy.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(pinned.pointer.cast(), source, bytes, context.stream()) };
        context.check(result, DeviceError::InferenceFailed, FAULT)?;
        context.synchronize()?;
        // SAFETY: the copy into the buffer is over.
        unsafe { destination.as_mut_ptr().copy_from_nonoverlapping(pinned.pointer, bytes) };
        Ok(())
    }
}
