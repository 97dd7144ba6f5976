//! Copies from global to shared memory that run while the thread goes on (`cp.async`).
//!
//! A thread issues copies, closes them into groups with [`commit_group`], and waits for its own groups with
//! [`wait_group`]; a barrier after the wait makes them visible to the block.

use crate::{Element, In, Shared};

/// Starts copying `N` elements (4, 8 or 16 bytes) from `source[from..]` to `destination[to..]`. Both addresses are
/// multiples of the bytes copied.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn copy<T: Element, const N: usize>(destination: &Shared<T>, to: usize, source: &In<'_, T>, from: usize) {
    #[cfg(target_arch = "nvptx64")]
    source.check(from, N);
    // SAFETY: checked just above (on the CPU by the copy itself).
    unsafe { copy_unchecked::<T, N>(destination, to, source, from) }
}

/// [`copy`] from elements that the caller has checked.
///
/// # Safety
/// `from + N <= source.len()`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn copy_unchecked<T: Element, const N: usize>(
    destination: &Shared<T>,
    to: usize,
    source: &In<'_, T>,
    from: usize,
) {
    const { assert!(matches!(N * size_of::<T>(), 4 | 8 | 16)) };
    #[cfg(target_arch = "nvptx64")]
    {
        let to = destination.address_of(to);
        // SAFETY: the source is inside its buffer (this function's contract), the destination inside its array (the
        // kernel's duty).
        unsafe {
            let from = source.address_unchecked(from);
            match N * size_of::<T>() {
                16 => {
                    core::arch::asm!("cp.async.cg.shared.global [{}], [{}], 16;", in(reg32) to, in(reg64) from, options(nostack))
                }
                8 => {
                    core::arch::asm!("cp.async.ca.shared.global [{}], [{}], 8;", in(reg32) to, in(reg64) from, options(nostack))
                }
                _ => {
                    core::arch::asm!("cp.async.ca.shared.global [{}], [{}], 4;", in(reg32) to, in(reg64) from, options(nostack))
                }
            }
        }
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let values = source.load::<N>(from);
        let offset = destination.offset_of(to, N);
        crate::cpu::check_alignment(offset, N * size_of::<T>());
        crate::cpu::async_copy(offset, values);
    }
}

/// Closes the copies issued since the last call into a group.
#[inline(always)]
pub fn commit_group() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands; the default memory clobber keeps the order.
    unsafe {
        core::arch::asm!("cp.async.commit_group;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    crate::cpu::async_commit();
}

/// Waits until at most `PENDING` of the thread's groups are still under way.
#[inline(always)]
pub fn wait_group<const PENDING: usize>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("cp.async.wait_group {};", const PENDING, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    crate::cpu::async_wait(PENDING);
}
