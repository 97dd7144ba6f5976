//! Memory of the CPU device: aligned, tracked, poisoned until written.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use cuda_std::cpu::Shadow;

use super::Shared;
use crate::device::{DeviceError, MemoryKind, MemoryRecord, buffer::DeviceId};

/// What fresh memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Fill {
    /// Zeros.
    Zero,
    /// Bytes of 0xff: a NaN in every float type, so that reading what nobody wrote is noticed.
    Poison,
}

/// An allocation.
pub(in crate::device) struct Memory {
    pointer: NonNull<u8>,
    layout: Layout,
    /// In checked mode.
    shadow: Option<Arc<Shadow>>,
    shared: Arc<Shared>,
}

// SAFETY: the pointer is owned, and nothing about it belongs to a thread.
unsafe impl Send for Memory {}
// SAFETY: reading the address is all that a shared reference allows.
unsafe impl Sync for Memory {}

/// A cache line, and the widest vector.
const ALIGNMENT: usize = 64;

impl Memory {
    /// `bytes` bytes, at an address that is a multiple of 64.
    pub(in crate::device) fn new(
        shared: &Arc<Shared>,
        bytes: usize,
        fill: Fill,
        kind: MemoryKind,
        label: &str,
    ) -> Result<Self, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory {
            requested_bytes: bytes as u64,
            free_bytes: shared.memory_info().free_bytes,
            kind,
            label: label.to_owned(),
            breakdown: shared.tracker.breakdown(),
        };
        let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| out_of_memory())?;
        if bytes as u64 > shared.memory_info().free_bytes {
            return Err(out_of_memory());
        }
        // SAFETY: the callers refuse 0 bytes.
        let pointer = unsafe {
            match fill {
                Fill::Zero => alloc_zeroed(layout),
                Fill::Poison => alloc(layout),
            }
        };
        let pointer = NonNull::new(pointer).ok_or_else(out_of_memory)?;
        if fill == Fill::Poison {
            // SAFETY: `bytes` bytes were just allocated there.
            unsafe { pointer.write_bytes(0xff, bytes) };
        }
        let shadow = shared.checked.then(|| Shadow::new(bytes));
        if let (Some(shadow), Fill::Zero) = (&shadow, fill) {
            shadow.mark_initialised(0..bytes);
        }
        let memory = Self { pointer, layout, shadow, shared: Arc::clone(shared) };
        shared.tracker.record(MemoryRecord {
            address: memory.address(),
            bytes: bytes as u64,
            kind,
            label: label.to_owned(),
        });
        Ok(memory)
    }

    pub(in crate::device) fn address(&self) -> u64 {
        self.pointer.as_ptr().expose_provenance() as u64
    }

    /// The memory as words; the rest after the last whole word is left out.
    pub(super) fn words(&self) -> &[u32] {
        // SAFETY: owned, aligned to 64, initialised by `new`; borrowed shared.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr().cast(), self.layout.size() / size_of::<u32>()) }
    }

    /// The memory as words, to write.
    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above; borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr().cast(), self.layout.size() / size_of::<u32>()) }
    }

    pub(in crate::device) fn device(&self) -> DeviceId {
        self.shared.id()
    }

    pub(in crate::device) fn shadow(&self) -> *const Shadow {
        self.shadow.as_ref().map_or(std::ptr::null(), Arc::as_ptr)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.shared.tracker.forget(self.address());
        // SAFETY: allocated with this layout in `new`, freed once, here.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) };
    }
}
