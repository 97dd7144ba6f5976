//! Memory shared by the threads of a block: fixed arrays ([`shared_array!`](crate::shared_array)) and the block's
//! dynamic part ([`dynamic`]), whose size the launch chooses.
//!
//! On a GPU indices are not checked here; the executor checks every one of them.

use core::marker::PhantomData;

use crate::Element;
#[cfg(not(target_arch = "nvptx64"))]
use crate::cpu;

/// An array in shared memory.
#[derive(Clone, Copy)]
pub struct Shared<T: Element> {
    /// GPU: the address in the shared window. CPU: the offset in the block's arena.
    address: u32,
    length: u32,
    _element: PhantomData<*mut T>,
}

/// A shared array of `$n` elements, the same one for every thread of the block, aligned to 16 bytes. Its contents
/// start undefined.
///
/// Call it once per array, at the top level of a kernel: each place it is written is one array.
#[macro_export]
macro_rules! shared_array {
    ($t:ty, $n:expr) => {{
        const LENGTH: usize = $n;
        #[cfg(target_arch = "nvptx64")]
        {
            let address: u32;
            // SAFETY: declares an array and takes its address; touches no memory.
            unsafe {
                core::arch::asm!(
                    "{{ .shared .align 16 .b8 lockstep_shared[{bytes}]; mov.u32 {address}, lockstep_shared; }}",
                    address = out(reg32) address,
                    bytes = const LENGTH * size_of::<$t>(),
                    options(nomem, nostack),
                );
            }
            // SAFETY: the address is that of LENGTH elements.
            unsafe { $crate::Shared::<$t>::from_raw(address, LENGTH as u32) }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            // Its address tells this array from others, also from those of the same macro expansion, whose source
            // location is the same.
            static SITE: u8 = 0;
            $crate::Shared::<$t>::static_array(&SITE, LENGTH)
        }
    }};
}

#[cfg(target_arch = "nvptx64")]
core::arch::global_asm!(".extern .shared .align 1024 .b8 lockstep_dynamic_shared[];");

/// The part of the block's dynamic shared memory that starts at `byte_offset` (a multiple of 16).
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn dynamic<T: Element>(byte_offset: usize, length: usize) -> Shared<T> {
    #[cfg(target_arch = "nvptx64")]
    {
        let base: u32;
        // SAFETY: takes an address; touches no memory.
        unsafe {
            core::arch::asm!("mov.u32 {}, lockstep_dynamic_shared;", out(reg32) base, options(pure, nomem, nostack));
        }
        Shared { address: base + byte_offset as u32, length: length as u32, _element: PhantomData }
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let address = cpu::dynamic_shared(byte_offset, length * size_of::<T>());
        Shared { address, length: length as u32, _element: PhantomData }
    }
}

impl<T: Element> Shared<T> {
    /// The array at `address`. Called by [`shared_array!`](crate::shared_array).
    ///
    /// # Safety
    /// `length` elements of shared memory start at `address`.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    #[must_use]
    pub unsafe fn from_raw(address: u32, length: u32) -> Self {
        Self { address, length, _element: PhantomData }
    }

    /// The array that belongs to `site`, a static of its own. Called by [`shared_array!`](crate::shared_array).
    #[cfg(not(target_arch = "nvptx64"))]
    #[must_use]
    #[track_caller]
    pub fn static_array(site: &'static u8, length: usize) -> Self {
        Self {
            address: cpu::static_shared(site, length * size_of::<T>()),
            length: length as u32,
            _element: PhantomData,
        }
    }

    /// `length` elements from byte `offset` on, a multiple of their size: for a block that lays its memory out itself.
    #[inline(always)]
    #[must_use]
    pub fn part<U: Element>(&self, offset: usize, length: usize) -> Shared<U> {
        #[cfg(not(target_arch = "nvptx64"))]
        assert!(
            offset + length * size_of::<U>() <= self.len() * size_of::<T>(),
            "a part of a shared array is inside it"
        );
        Shared { address: self.address + offset as u32, length: length as u32, _element: PhantomData }
    }

    /// The same array, of whose addresses nothing has been computed yet: see [`crate::thread::number_anew`].
    #[inline(always)]
    #[must_use]
    pub fn anew(self) -> Self {
        Self { address: crate::thread::number_anew(self.address), ..self }
    }

    /// Elements in the array.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// True when there are none.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The address of element `index` in the shared window.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    pub(crate) fn address_of(&self, index: usize) -> u32 {
        self.address + (index * size_of::<T>()) as u32
    }

    /// The arena offset of `count` elements from `index` on, checked.
    #[cfg(not(target_arch = "nvptx64"))]
    #[track_caller]
    pub(crate) fn offset_of(&self, index: usize, count: usize) -> usize {
        if index.saturating_add(count) > self.length as usize {
            cpu::out_of_bounds(cpu::Space::Shared, index, count, self.length as usize);
        }
        self.address as usize + index * size_of::<T>()
    }

    /// Element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn get(&self, index: usize) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the kernel keeps inside the array (the executor checks it); T is plain bits of that size.
        unsafe {
            ptx::load(self.address_of(index))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        cpu::shared_read(self.offset_of(index, 1))
    }

    /// Writes element `index`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn set(&self, index: usize, value: T) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as in `get`.
        unsafe {
            ptx::store(self.address_of(index), value);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        cpu::shared_write(self.offset_of(index, 1), value);
    }

    /// `N` elements from `index` on, in one access of 4, 8 or 16 bytes to an address that is a multiple of it.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn load<const N: usize>(&self, index: usize) -> [T; N] {
        const { assert!(matches!(N * size_of::<T>(), 4 | 8 | 16)) };
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as in `get`.
        unsafe {
            ptx::load(self.address_of(index))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let offset = self.offset_of(index, N);
            cpu::check_alignment(offset, N * size_of::<T>());
            cpu::shared_read(offset)
        }
    }

    /// Writes `N` elements from `index` on, in one access of 4, 8 or 16 bytes to an address that is a multiple of it.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn store<const N: usize>(&self, index: usize, values: [T; N]) {
        const { assert!(matches!(N * size_of::<T>(), 4 | 8 | 16)) };
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as in `get`.
        unsafe {
            ptx::store(self.address_of(index), values);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let offset = self.offset_of(index, N);
            cpu::check_alignment(offset, N * size_of::<T>());
            cpu::shared_write(offset, values);
        }
    }
}

macro_rules! atomic_functions {
    ($t:ty, $class:ident, $suffix:literal) => {
        impl Shared<$t> {
            /// Adds to element `index` as one indivisible step, modulo its range; returns what was there.
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn atomic_add(&self, index: usize, value: $t) -> $t {
                #[cfg(target_arch = "nvptx64")]
                {
                    let old: $t;
                    // SAFETY: as in `get`.
                    unsafe {
                        core::arch::asm!(concat!("atom.relaxed.cta.shared.add.", $suffix, " {}, [{}], {};"),
                            out($class) old, in(reg32) self.address_of(index), in($class) value, options(nostack));
                    }
                    old
                }
                #[cfg(not(target_arch = "nvptx64"))]
                cpu::shared_atomic(self.offset_of(index, 1), |old: $t| old.wrapping_add(value))
            }

            /// Raises element `index` to at least `value` as one indivisible step; returns what was there.
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn atomic_max(&self, index: usize, value: $t) -> $t {
                #[cfg(target_arch = "nvptx64")]
                {
                    let old: $t;
                    // SAFETY: as in `get`.
                    unsafe {
                        core::arch::asm!(concat!("atom.relaxed.cta.shared.max.", $suffix, " {}, [{}], {};"),
                            out($class) old, in(reg32) self.address_of(index), in($class) value, options(nostack));
                    }
                    old
                }
                #[cfg(not(target_arch = "nvptx64"))]
                cpu::shared_atomic(self.offset_of(index, 1), |old: $t| old.max(value))
            }
        }
    };
}
atomic_functions!(u32, reg32, "u32");
atomic_functions!(u64, reg64, "u64");

#[cfg(target_arch = "nvptx64")]
mod ptx {
    //! Accesses in the shared window, of 1 to 16 bytes.
    use core::arch::asm;
    use core::mem::transmute_copy;

    #[inline(always)]
    pub(super) unsafe fn load<V>(address: u32) -> V {
        // SAFETY: the caller's address holds a V, which is plain bits; the words have exactly its size.
        unsafe {
            match size_of::<V>() {
                16 => {
                    let (a, b, c, d): (u32, u32, u32, u32);
                    asm!("ld.shared.v4.b32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b, out(reg32) c,
                        out(reg32) d, in(reg32) address, options(nostack));
                    transmute_copy(&[a, b, c, d])
                }
                8 => {
                    let a: u64;
                    asm!("ld.shared.b64 {}, [{}];", out(reg64) a, in(reg32) address, options(nostack));
                    transmute_copy(&a)
                }
                4 => {
                    let a: u32;
                    asm!("ld.shared.b32 {}, [{}];", out(reg32) a, in(reg32) address, options(nostack));
                    transmute_copy(&a)
                }
                2 => {
                    let a: u16;
                    asm!("ld.shared.b16 {}, [{}];", out(reg16) a, in(reg32) address, options(nostack));
                    transmute_copy(&a)
                }
                _ => {
                    let a: u16;
                    asm!("ld.shared.u8 {}, [{}];", out(reg16) a, in(reg32) address, options(nostack));
                    transmute_copy(&(a as u8))
                }
            }
        }
    }

    #[inline(always)]
    pub(super) unsafe fn store<V>(address: u32, value: V) {
        // SAFETY: as in `load`.
        unsafe {
            match size_of::<V>() {
                16 => {
                    let [a, b, c, d]: [u32; 4] = transmute_copy(&value);
                    asm!("st.shared.v4.b32 [{}], {{{}, {}, {}, {}}};", in(reg32) address, in(reg32) a, in(reg32) b,
                        in(reg32) c, in(reg32) d, options(nostack));
                }
                8 => {
                    let a: u64 = transmute_copy(&value);
                    asm!("st.shared.b64 [{}], {};", in(reg32) address, in(reg64) a, options(nostack));
                }
                4 => {
                    let a: u32 = transmute_copy(&value);
                    asm!("st.shared.b32 [{}], {};", in(reg32) address, in(reg32) a, options(nostack));
                }
                2 => {
                    let a: u16 = transmute_copy(&value);
                    asm!("st.shared.b16 [{}], {};", in(reg32) address, in(reg16) a, options(nostack));
                }
                _ => {
                    let a: u8 = transmute_copy(&value);
                    asm!("st.shared.u8 [{}], {};", in(reg32) address, in(reg16) u16::from(a), options(nostack));
                }
            }
        }
    }
}
