//! Accesses to memory. In fast mode they cost a test; in checked mode each is looked at.

use std::panic::Location;

use super::block::{raise, running};
use super::fault::{Action, FaultKind};
use super::fiber::current;
use super::{Shadow, Space};

/// Bytes of shared memory that a block may have, as on a current GPU.
pub(super) const SHARED_LIMIT: usize = 227 * 1024;
const DYNAMIC_ALIGNMENT: usize = 128;

/// What fresh shared memory holds: a NaN in every float type.
const FRESH: u8 = 0xff;

#[derive(Clone, Copy)]
#[repr(align(128))]
#[expect(dead_code, reason = "used through pointers")]
struct Line([u8; DYNAMIC_ALIGNMENT]);

struct StaticArray {
    /// Told apart by address.
    site: &'static u8,
    offset: usize,
}

/// The shared memory of a block: the dynamic part, then the static arrays as they are first asked for.
pub(super) struct Arena {
    memory: Box<[Line]>,
    dynamic_bytes: usize,
    used: usize,
    arrays: Vec<StaticArray>,
}

impl Arena {
    pub(super) fn new() -> Self {
        let memory = vec![Line([FRESH; DYNAMIC_ALIGNMENT]); SHARED_LIMIT.div_ceil(DYNAMIC_ALIGNMENT)];
        Self { memory: memory.into_boxed_slice(), dynamic_bytes: 0, used: 0, arrays: Vec::new() }
    }

    pub(super) fn pointer(&mut self) -> *mut u8 {
        self.memory.as_mut_ptr().cast()
    }

    /// Empties it for the next block. The dynamic part is inside the limit.
    pub(super) fn begin(&mut self, dynamic_bytes: usize) {
        self.dynamic_bytes = dynamic_bytes;
        self.used = dynamic_bytes.next_multiple_of(16);
        self.arrays.clear();
        self.refresh(0, dynamic_bytes);
    }

    fn refresh(&mut self, start: usize, bytes: usize) {
        // SAFETY: inside the arena, which both callers check.
        unsafe { self.pointer().add(start).write_bytes(FRESH, bytes) };
    }

    /// Writes inside the arena.
    pub(super) fn write_bytes(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= SHARED_LIMIT);
        // SAFETY: inside the arena, just asserted.
        unsafe { self.pointer().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The array of `bytes` bytes that belongs to this site. Fails with the bytes that the block would need.
    fn static_array(&mut self, site: &'static u8, bytes: usize) -> Result<usize, usize> {
        if let Some(array) = self.arrays.iter().find(|array| std::ptr::eq(array.site, site)) {
            return Ok(array.offset);
        }
        let offset = self.used;
        let end = offset.saturating_add(bytes);
        if end > SHARED_LIMIT {
            return Err(end);
        }
        self.used = end.next_multiple_of(16);
        self.arrays.push(StaticArray { site, offset });
        self.refresh(offset, bytes);
        Ok(offset)
    }
}

#[track_caller]
pub(crate) fn static_shared(site: &'static u8, bytes: usize) -> u32 {
    let at = Location::caller();
    let (_, block) = running();
    // SAFETY: the block of the running thread; no other reference to it is alive.
    match unsafe { (*block).arena.static_array(site, bytes) } {
        Ok(offset) => offset as u32,
        Err(bytes) => raise(FaultKind::SharedMemory { bytes, limit: SHARED_LIMIT, at: Some(at) }),
    }
}

#[track_caller]
pub(crate) fn dynamic_shared(offset: usize, bytes: usize) -> u32 {
    let at = Location::caller();
    let (_, block) = running();
    // SAFETY: as above.
    let limit = unsafe { (*block).arena.dynamic_bytes };
    let end = offset.saturating_add(bytes);
    if end > limit {
        raise(FaultKind::SharedMemory { bytes: end, limit, at: Some(at) });
    }
    check_alignment(offset, 16);
    offset as u32
}

/// What only GPUs do.
#[cold]
#[track_caller]
pub(crate) fn gpu_only() -> ! {
    raise(FaultKind::GpuOnly { at: Location::caller() })
}

#[cold]
#[track_caller]
pub(crate) fn out_of_bounds(space: Space, index: usize, count: usize, length: usize) -> ! {
    raise(FaultKind::OutOfBounds { space, index, count, length, at: Location::caller() })
}

#[inline(always)]
#[track_caller]
pub(crate) fn check_alignment(address: usize, bytes: usize) {
    if !address.is_multiple_of(bytes) {
        raise(FaultKind::Misaligned { address, bytes, at: Location::caller() });
    }
}

/// The shadow that the running launch uses for a buffer: none in fast mode.
#[inline(always)]
pub(crate) fn active_shadow(shadow: *const Shadow) -> *const Shadow {
    if current(|c| c.checked.get()) { shadow } else { std::ptr::null() }
}

#[cold]
fn check_global(shadow: *const Shadow, start: usize, bytes: usize, action: Action, at: &'static Location<'static>) {
    let (thread, block) = running();
    // SAFETY: the block of the running thread; the launch keeps the shadow alive as long as its buffer.
    let result = unsafe {
        let checks = &(*block).checks;
        checks.as_ref().map_or(Ok(()), |checks| checks.global(&*shadow, start, bytes, (thread, action, at)))
    };
    if let Err(kind) = result {
        raise(kind);
    }
}

#[inline(always)]
#[track_caller]
pub(crate) fn global_read(shadow: *const Shadow, offset: usize, bytes: usize) {
    if !shadow.is_null() {
        check_global(shadow, offset, bytes, Action::Read, Location::caller());
    }
}

#[inline(always)]
#[track_caller]
pub(crate) fn global_write(shadow: *const Shadow, offset: usize, bytes: usize) {
    if !shadow.is_null() {
        check_global(shadow, offset, bytes, Action::Write, Location::caller());
    }
}

#[inline(always)]
#[track_caller]
pub(crate) fn global_atomic(shadow: *const Shadow, offset: usize, bytes: usize) {
    if !shadow.is_null() {
        check_global(shadow, offset, bytes, Action::Atomic, Location::caller());
    }
}

#[inline(always)]
#[track_caller]
pub(crate) fn global_arrival(shadow: *const Shadow, offset: usize, bytes: usize) {
    if shadow.is_null() {
        return;
    }
    let at = Location::caller();
    let (thread, block) = running();
    // SAFETY: the block of the running thread, to which nobody else refers; the launch keeps the shadow alive as long as
    // its buffer.
    let result = unsafe {
        let checks = &mut (*block).checks;
        checks.as_mut().map_or(Ok(()), |checks| checks.arrive(&*shadow, offset, bytes, (thread, at)))
    };
    if let Err(kind) = result {
        raise(kind);
    }
}

#[cold]
fn check_shared(start: usize, bytes: usize, action: Action, at: &'static Location<'static>) {
    let (thread, block) = running();
    // SAFETY: the block of the running thread; no other reference to it is alive.
    let result = unsafe {
        let checks = &mut (*block).checks;
        checks.as_mut().map_or(Ok(()), |checks| checks.shared(start, bytes, (thread, action, at)))
    };
    if let Err(kind) = result {
        raise(kind);
    }
}

/// The address of an arena offset, after the check.
#[inline(always)]
#[track_caller]
fn shared_address<V>(offset: usize, action: Action) -> *mut V {
    let (arena, checked) = current(|c| (c.arena.get(), c.checked.get()));
    if checked {
        check_shared(offset, size_of::<V>(), action, Location::caller());
    }
    assert!(!arena.is_null(), "a kernel's functions run under cuda_std::cpu::Executor");
    // SAFETY: `Shared` has checked that the offset is inside one of its arrays, which are inside the arena.
    unsafe { arena.add(offset).cast() }
}

#[inline(always)]
#[track_caller]
pub(crate) fn shared_read<V: Copy>(offset: usize) -> V {
    // SAFETY: inside the arena; V is plain bits; the block's threads share one OS thread.
    unsafe { shared_address::<V>(offset, Action::Read).read_unaligned() }
}

#[inline(always)]
#[track_caller]
pub(crate) fn shared_write<V: Copy>(offset: usize, value: V) {
    // SAFETY: as above.
    unsafe { shared_address::<V>(offset, Action::Write).write_unaligned(value) }
}

#[inline(always)]
#[track_caller]
pub(crate) fn shared_atomic<V: Copy>(offset: usize, update: impl FnOnce(V) -> V) -> V {
    let pointer = shared_address::<V>(offset, Action::Atomic);
    // SAFETY: as above; nothing runs between the read and the write.
    unsafe {
        let old = pointer.read_unaligned();
        pointer.write_unaligned(update(old));
        old
    }
}

#[inline(always)]
#[track_caller]
pub(crate) fn async_copy<V: Copy>(offset: usize, value: V) {
    if !current(|c| c.checked.get()) {
        return shared_write(offset, value);
    }
    let at = Location::caller();
    let (thread, block) = running();
    // SAFETY: V is plain bits without padding; the block is the running thread's and nobody else refers to it.
    let result = unsafe {
        let bytes = std::slice::from_raw_parts((&raw const value).cast::<u8>(), size_of::<V>());
        let checks = &mut (*block).checks;
        checks.as_mut().map_or(Ok(()), |checks| checks.start_copy(offset, bytes, thread, at))
    };
    if let Err(kind) = result {
        raise(kind);
    }
}

#[inline(always)]
pub(crate) fn async_commit() {
    if current(|c| c.checked.get()) {
        let (thread, block) = running();
        // SAFETY: the block of the running thread; no other reference to it is alive.
        if let Some(checks) = unsafe { &mut (*block).checks } {
            checks.commit(thread);
        }
    }
}

#[inline(always)]
pub(crate) fn async_wait(pending: usize) {
    if current(|c| c.checked.get()) {
        let (thread, block) = running();
        // SAFETY: as above.
        let result = unsafe {
            let block = &mut *block;
            let arena = &mut block.arena;
            block.checks.as_mut().map_or(Ok(()), |checks| checks.wait(thread, pending, arena))
        };
        if let Err(kind) = result {
            raise(kind);
        }
    }
}
