//! Buffers in device memory, as a kernel sees them.
//!
//! A buffer knows its length. An index outside it ends the kernel with a fault on every device; the `_unchecked`
//! forms leave the check to the caller. On the CPU each access is also shown to the executor, which in checked mode
//! looks for races and for reads of memory that nobody wrote.

use core::marker::PhantomData;

use crate::Element;
#[cfg(not(target_arch = "nvptx64"))]
use crate::{cpu, launch::BufferArg};

macro_rules! buffer_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name<'a, T: Element> {
            pointer: *mut T,
            length: usize,
            #[cfg(not(target_arch = "nvptx64"))]
            shadow: *const cpu::Shadow,
            #[cfg(not(target_arch = "nvptx64"))]
            shadow_offset: usize,
            _memory: PhantomData<&'a T>,
        }

        impl<T: Element> $name<'_, T> {
            /// The buffer at `pointer` of `length` elements. Called by the code that `#[kernel]` generates.
            ///
            /// # Safety
            /// `pointer` is valid device memory for `length` elements while the kernel runs, and no other buffer of
            /// the kernel through which it is written overlaps it.
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            pub unsafe fn from_raw(pointer: *mut T, length: usize) -> Self {
                Self { pointer, length, _memory: PhantomData }
            }

            /// The buffer that a launch passes. Called by the code that `#[kernel]` generates.
            ///
            /// # Safety
            /// As for a launch: the memory is valid while the kernel runs.
            #[cfg(not(target_arch = "nvptx64"))]
            #[must_use]
            pub unsafe fn from_arg(arg: &BufferArg) -> Self {
                Self {
                    pointer: arg.address as *mut T,
                    length: arg.length as usize,
                    shadow: cpu::active_shadow(arg.shadow),
                    shadow_offset: arg.shadow_offset as usize,
                    _memory: PhantomData,
                }
            }

            /// The buffer of `length` elements at a device address that the kernel has read: for buffers of which there are too
            /// many for parameters. Nothing about it is checked on the CPU.
            ///
            /// # Safety
            /// As for a parameter: the memory is valid while the kernel runs, and no other buffer of the kernel through
            /// which it is written overlaps it.
            #[inline(always)]
            #[must_use]
            pub unsafe fn at_address(address: u64, length: usize) -> Self {
                Self {
                    pointer: address as *mut T,
                    length,
                    #[cfg(not(target_arch = "nvptx64"))]
                    shadow: core::ptr::null(),
                    #[cfg(not(target_arch = "nvptx64"))]
                    shadow_offset: 0,
                    _memory: PhantomData,
                }
            }

            /// Elements in the buffer.
            #[inline(always)]
            #[must_use]
            pub fn len(&self) -> usize {
                self.length
            }

            /// True when there are none.
            #[inline(always)]
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.length == 0
            }

            /// Ends the kernel unless `count` elements from `index` on are inside: one check before many accesses by the
            /// `_unchecked` forms.
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn check(&self, index: usize, count: usize) {
                if index.saturating_add(count) > self.length {
                    #[cfg(target_arch = "nvptx64")]
                    crate::trap();
                    #[cfg(not(target_arch = "nvptx64"))]
                    cpu::out_of_bounds(cpu::Space::Global, index, count, self.length);
                }
            }
        }

        // SAFETY: on the CPU a kernel's blocks run on several threads over the same buffers; elements are plain bits
        // and the launch promises that the memory outlives the kernel.
        unsafe impl<T: Element> Send for $name<'_, T> {}
        // SAFETY: as above.
        unsafe impl<T: Element> Sync for $name<'_, T> {}
    };
}

macro_rules! readable {
    ($name:ident, $vector_load:ident) => {
        impl<T: Element> $name<'_, T> {
            /// Element `index`.
            #[inline(always)]
            #[must_use]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn get(&self, index: usize) -> T {
                self.check(index, 1);
                // SAFETY: checked just above.
                unsafe { self.get_unchecked(index) }
            }

            /// Element `index`, which the caller has checked.
            ///
            /// # Safety
            /// `index < self.len()`.
            #[inline(always)]
            #[must_use]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub unsafe fn get_unchecked(&self, index: usize) -> T {
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    self.check(index, 1);
                    cpu::global_read(self.shadow, self.shadow_offset + index * size_of::<T>(), size_of::<T>());
                }
                // SAFETY: inside the buffer, by this function's contract; valid by the constructor's.
                unsafe { self.pointer.add(index).read() }
            }

            /// `N` elements from `index` on, in one access of 4, 8 or 16 bytes to an address that is a multiple of it.
            #[inline(always)]
            #[must_use]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn load<const N: usize>(&self, index: usize) -> [T; N] {
                self.check(index, N);
                // SAFETY: checked just above; alignment is this function's contract and faults on the device.
                unsafe { self.load_unchecked(index) }
            }

            /// [`load`](Self::load) of elements that the caller has checked.
            ///
            /// # Safety
            /// `index + N <= self.len()`, and the address is a multiple of the access's bytes.
            #[inline(always)]
            #[must_use]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub unsafe fn load_unchecked<const N: usize>(&self, index: usize) -> [T; N] {
                const { assert!(matches!(N * size_of::<T>(), 4 | 8 | 16)) };
                #[cfg(target_arch = "nvptx64")]
                // SAFETY: inside the buffer by this function's contract.
                unsafe {
                    $vector_load(self.pointer.add(index))
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    self.check(index, N);
                    let bytes = N * size_of::<T>();
                    // SAFETY: inside the buffer; the address is only compared.
                    cpu::check_alignment(unsafe { self.pointer.add(index) } as usize, bytes);
                    cpu::global_read(self.shadow, self.shadow_offset + index * size_of::<T>(), bytes);
                    // SAFETY: inside the buffer, by the check above.
                    unsafe { self.pointer.add(index).cast::<[T; N]>().read_unaligned() }
                }
            }
        }
    };
}

macro_rules! writable {
    ($name:ident) => {
        impl<T: Element> $name<'_, T> {
            /// Writes element `index`.
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn set(&self, index: usize, value: T) {
                self.check(index, 1);
                // SAFETY: checked just above.
                unsafe { self.set_unchecked(index, value) }
            }

            /// Writes element `index`, which the caller has checked.
            ///
            /// # Safety
            /// `index < self.len()`.
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub unsafe fn set_unchecked(&self, index: usize, value: T) {
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    self.check(index, 1);
                    cpu::global_write(self.shadow, self.shadow_offset + index * size_of::<T>(), size_of::<T>());
                }
                // SAFETY: inside the buffer, by this function's contract; valid by the constructor's.
                unsafe { self.pointer.add(index).write(value) }
            }

            /// Writes `N` elements from `index` on, in one access of 4, 8 or 16 bytes to an address that is a
            /// multiple of it.
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn store<const N: usize>(&self, index: usize, values: [T; N]) {
                const { assert!(matches!(N * size_of::<T>(), 4 | 8 | 16)) };
                self.check(index, N);
                #[cfg(target_arch = "nvptx64")]
                // SAFETY: checked just above.
                unsafe {
                    ptx::store(self.pointer.add(index), values);
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let bytes = N * size_of::<T>();
                    // SAFETY: inside the buffer; the address is only compared.
                    cpu::check_alignment(unsafe { self.pointer.add(index) } as usize, bytes);
                    cpu::global_write(self.shadow, self.shadow_offset + index * size_of::<T>(), bytes);
                    // SAFETY: inside the buffer, by the check above.
                    unsafe { self.pointer.add(index).cast::<[T; N]>().write_unaligned(values) }
                }
            }
        }
    };
}

buffer_type!(
    /// A buffer that the kernel only reads and that nobody writes while it runs.
    In
);
buffer_type!(
    /// A buffer that the kernel only writes.
    Out
);
buffer_type!(
    /// A buffer that the kernel reads and writes.
    InOut
);

#[cfg(target_arch = "nvptx64")]
use ptx::{load_coherent, load_read_only};
readable!(In, load_read_only);
readable!(InOut, load_coherent);
writable!(Out);
writable!(InOut);

impl<T: Element> In<'_, T> {
    /// The generic address of element `index`, for asynchronous copies.
    ///
    /// # Safety
    /// `index < self.len()`.
    #[inline(always)]
    #[cfg(target_arch = "nvptx64")]
    pub(crate) unsafe fn address_unchecked(&self, index: usize) -> *const T {
        // SAFETY: inside the buffer by this function's contract.
        unsafe { self.pointer.add(index) }
    }

    /// As `load`, but marked as streaming: the lines are not kept in the first-level cache. For weights, which a
    /// step reads once.
    ///
    /// # Safety
    /// As for [`load_unchecked`](Self::load_unchecked).
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn load_streaming_unchecked<const N: usize>(&self, index: usize) -> [T; N] {
        #[cfg(target_arch = "nvptx64")]
        {
            const { assert!(N * size_of::<T>() == 16) };
            // SAFETY: inside the buffer by this function's contract.
            unsafe { ptx::load_streaming(self.pointer.add(index)) }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        // SAFETY: the same contract.
        unsafe {
            self.load_unchecked(index)
        }
    }
}

impl InOut<'_, u64> {
    /// The generic address of element `index`.
    ///
    /// # Safety
    /// `index < self.len()`.
    #[inline(always)]
    #[cfg(target_arch = "nvptx64")]
    pub(crate) unsafe fn address_unchecked(&self, index: usize) -> *mut u64 {
        // SAFETY: inside the buffer by this function's contract.
        unsafe { self.pointer.add(index) }
    }
}

impl InOut<'_, u32> {
    /// Adds to element `index` as one indivisible step, modulo 2^32; returns what was there.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn atomic_add(&self, index: usize, value: u32) -> u32 {
        self.check(index, 1);
        #[cfg(target_arch = "nvptx64")]
        {
            let old: u32;
            // SAFETY: checked just above.
            unsafe {
                core::arch::asm!("atom.relaxed.gpu.global.add.u32 {}, [{}], {};",
                    out(reg32) old, in(reg64) self.pointer.add(index), in(reg32) value, options(nostack));
            }
            old
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            cpu::global_atomic(self.shadow, self.shadow_offset + index * 4, 4);
            // SAFETY: inside the buffer; all concurrent accesses to it are atomic by the kernel's contract.
            unsafe { core::sync::atomic::AtomicU32::from_ptr(self.pointer.add(index)) }
                .fetch_add(value, core::sync::atomic::Ordering::Relaxed)
        }
    }

    /// Counts an arrival: adds 1 to element `index`, or sets it to 0 where it has reached `last`, as one indivisible step;
    /// returns what was there. So `last + 1` arrivals leave the counter as it was before the first, and the one that is
    /// told `last` knows that all others have arrived.
    ///
    /// Memory order: acquire and release, on the whole device. What a thread (or, over a barrier, its block) did before its
    /// arrival is seen by whoever is told of a later arrival at the same counter, and after a barrier by its block. Reads
    /// of what others wrote go through [`InOut`], never [`In`].
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn arrive(&self, index: usize, last: u32) -> u32 {
        self.check(index, 1);
        #[cfg(target_arch = "nvptx64")]
        {
            let old: u32;
            // SAFETY: checked just above; the default memory clobber keeps the surrounding accesses on their side.
            unsafe {
                core::arch::asm!("atom.acq_rel.gpu.global.inc.u32 {}, [{}], {};",
                    out(reg32) old, in(reg64) self.pointer.add(index), in(reg32) last, options(nostack));
            }
            old
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            use core::sync::atomic::{AtomicU32, Ordering};
            cpu::global_arrival(self.shadow, self.shadow_offset + index * 4, 4);
            // SAFETY: inside the buffer; all concurrent accesses to it are atomic by the kernel's contract.
            let counter = unsafe { AtomicU32::from_ptr(self.pointer.add(index)) };
            let next = |old| Some(if old >= last { 0 } else { old + 1 });
            counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).unwrap_or_else(|old| old)
        }
    }
}

#[cfg(target_arch = "nvptx64")]
mod ptx {
    //! Vector accesses. The space is global: every buffer is device memory.
    use core::arch::asm;
    use core::mem::transmute_copy;

    macro_rules! load_function {
        ($(#[$doc:meta])* $name:ident, $qualifier:literal, [$($option:ident),*]) => {
            $(#[$doc])*
            #[inline(always)]
            pub(super) unsafe fn $name<T: Copy, const N: usize>(pointer: *const T) -> [T; N] {
                // SAFETY: the caller's pointer is valid and aligned for N elements of T, which are plain bits; the
                // word arrays have exactly the size of [T; N].
                unsafe {
                    match N * size_of::<T>() {
                        16 => {
                            let (a, b, c, d): (u32, u32, u32, u32);
                            asm!(concat!("ld.global", $qualifier, ".v4.b32 {{{}, {}, {}, {}}}, [{}];"),
                                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) pointer,
                                options(nostack $(, $option)*));
                            transmute_copy(&[a, b, c, d])
                        }
                        8 => {
                            let (a, b): (u32, u32);
                            asm!(concat!("ld.global", $qualifier, ".v2.b32 {{{}, {}}}, [{}];"),
                                out(reg32) a, out(reg32) b, in(reg64) pointer, options(nostack $(, $option)*));
                            transmute_copy(&[a, b])
                        }
                        _ => {
                            let a: u32;
                            asm!(concat!("ld.global", $qualifier, ".b32 {}, [{}];"),
                                out(reg32) a, in(reg64) pointer, options(nostack $(, $option)*));
                            transmute_copy(&[a])
                        }
                    }
                }
            }
        };
    }

    // Not `.nc`: with programmatic dependent launch, an earlier kernel may still write the buffer when this one starts.
    load_function!(load_read_only, "", [pure, readonly]);
    load_function!(load_coherent, "", [readonly]);
    load_function!(load_streaming, ".nc.L1::no_allocate", [pure, readonly]);

    #[inline(always)]
    pub(super) unsafe fn store<T: Copy, const N: usize>(pointer: *mut T, values: [T; N]) {
        // SAFETY: as for the loads.
        unsafe {
            match N * size_of::<T>() {
                16 => {
                    let [a, b, c, d]: [u32; 4] = transmute_copy(&values);
                    asm!("st.global.v4.b32 [{}], {{{}, {}, {}, {}}};",
                        in(reg64) pointer, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
                }
                8 => {
                    let [a, b]: [u32; 2] = transmute_copy(&values);
                    asm!("st.global.v2.b32 [{}], {{{}, {}}};",
                        in(reg64) pointer, in(reg32) a, in(reg32) b, options(nostack));
                }
                _ => {
                    let [a]: [u32; 1] = transmute_copy(&values);
                    asm!("st.global.b32 [{}], {};", in(reg64) pointer, in(reg32) a, options(nostack));
                }
            }
        }
    }
}
