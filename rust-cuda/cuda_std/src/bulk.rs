//! Bulk copies from global to shared memory, made by the copy engine of a multiprocessor, and the barriers in shared memory
//! that tell of their arrival (compute capability 9.0 and later).
//!
//! A barrier goes from phase to phase. A phase is over when as many arrivals have been made as [`Barriers::init`] said and
//! all bytes that were announced have landed. Whoever waits names the parity of the phase that it waits for: 0 for the first.
//!
//! Blocks of kernels that use these wait for each other, which the executor does not do: on the CPU such a kernel ends with a
//! fault that says so, and so it does on a GPU without the instructions.

use crate::{Element, In, Shared};

/// Barriers in shared memory.
#[derive(Clone, Copy)]
pub struct Barriers(Shared<u64>);

#[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90a")))]
#[cold]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn unsupported() -> ! {
    #[cfg(target_arch = "nvptx64")]
    crate::trap();
    #[cfg(not(target_arch = "nvptx64"))]
    crate::cpu::gpu_only()
}

impl Barriers {
    /// As many as the array is long. They are to be initialised.
    #[inline(always)]
    #[must_use]
    pub fn new(memory: Shared<u64>) -> Self {
        Self(memory)
    }

    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    #[inline(always)]
    pub(crate) fn address_of(&self, index: usize) -> u32 {
        self.0.address_of(index)
    }

    /// Initialises one: its phases are over after so many arrivals. For one thread; [`publish`](Self::publish) and a barrier of the block follow
    /// before anybody uses it.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn init(&self, index: usize, arrivals: u32) {
        #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
        // SAFETY: a barrier's 8 bytes, inside the array (the kernel's duty).
        unsafe {
            core::arch::asm!("mbarrier.init.shared::cta.b64 [{}], {};",
                in(reg32) self.0.address_of(index), in(reg32) arrivals, options(nostack));
        }
        #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
        {
            let _ = (self.0, index, arrivals);
            unsupported()
        }
    }

    /// Makes initialised barriers known to the copy engine.
    #[inline(always)]
    pub fn publish() {
        #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
        // SAFETY: a fence.
        unsafe {
            core::arch::asm!(
                "fence.mbarrier_init.release.cluster;",
                "fence.proxy.async.shared::cta;",
                options(nostack)
            );
        }
    }

    /// Arrives. What the thread did before is seen by those who wait for the phase.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn arrive(&self, index: usize) {
        #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
        // SAFETY: as in `init`.
        unsafe {
            core::arch::asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) self.0.address_of(index), options(nostack));
        }
        #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
        {
            let _ = index;
            unsupported()
        }
    }

    /// Arrives, and announces so many bytes of copies: the phase is not over before they have landed.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn arrive_and_expect(&self, index: usize, bytes: u32) {
        #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
        // SAFETY: as in `init`.
        unsafe {
            core::arch::asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};",
                in(reg32) self.0.address_of(index), in(reg32) bytes, options(nostack));
        }
        #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
        {
            let _ = (index, bytes);
            unsupported()
        }
    }

    /// Waits until the phase of this parity is over. What was copied, and what was done before the arrivals, is visible then.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn wait(&self, index: usize, parity: u32) {
        #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
        loop {
            let over: u32;
            // SAFETY: as in `init`.
            unsafe {
                core::arch::asm!(
                    "{{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [{}], {}; selp.b32 {}, 1, 0, over; }}",
                    in(reg32) self.0.address_of(index), in(reg32) parity, out(reg32) over, options(nostack));
            }
            if over != 0 {
                break;
            }
        }
        #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
        {
            let _ = (index, parity);
            unsupported()
        }
    }
}

/// Starts to copy `count` elements from `source[from..]` to `destination[to..]`, of which barrier `index` tells. Both
/// addresses and the bytes are multiples of 16.
///
/// # Safety
/// `from + count <= source.len()`; nobody touches the destination until the barrier's phase is over, and what was
/// done to it before is ordered before this call (for writes with [`release_to_copies`]).
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn copy_unchecked<T: Element>(
    destination: &Shared<T>,
    to: usize,
    source: &In<'_, T>,
    from: usize,
    count: usize,
    barriers: &Barriers,
    index: usize,
) {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: the source is inside its buffer (this function's contract), the destination and the barrier inside their
    // arrays (the kernel's duty).
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
            in(reg32) destination.address_of(to), in(reg64) source.address_unchecked(from),
            in(reg32) (count * size_of::<T>()) as u32, in(reg32) barriers.0.address_of(index), options(nostack));
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
    {
        let _ = (destination, to, source, from, count, barriers, index);
        unsupported()
    }
}

/// Orders what the thread did in shared memory before later bulk copies into it.
#[inline(always)]
pub fn release_to_copies() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: a fence.
    unsafe {
        core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack));
    }
}
