//! Values that blocks of one launch hand to each other while they run.
//!
//! A word holds a value in its low half and a tag in its high half. It is written and read as one indivisible access, so
//! whoever finds the tag has the value: no fence, no flag, no second way to memory. A tag is used once for a word. Words
//! whose values were read are overwritten only by what depends on that reading.
//!
//! All blocks must run at the same time, so these are for launches that fit the GPU at once. The executor runs a block to its
//! end before the next: on the CPU the kernel ends with a fault.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

use crate::InOut;

/// Readings after which a value counts as lost: seconds, on any GPU. A launch that fails beats one that never ends.
#[cfg(target_arch = "nvptx64")]
const MOST_READINGS: u32 = 1 << 25;

/// Tagged words in device memory.
#[derive(Clone, Copy)]
pub struct Tagged<'a>(InOut<'a, u64>);

impl<'a> Tagged<'a> {
    /// The first `length` words of a buffer; fewer end the kernel. Indices are not checked after this.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn new(words: InOut<'a, u64>, length: u32) -> Self {
        words.check(0, length as usize);
        Self(words)
    }

    /// Writes word `index`.
    ///
    /// # Safety
    /// `index` is below the length.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn store(&self, index: u32, value: u32, tag: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: inside the buffer, by this function's contract.
        unsafe {
            asm!("st.relaxed.gpu.global.b64 [{}], {};",
                in(reg64) self.0.address_unchecked(index as usize), in(reg64) word(value, tag), options(nostack));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (self.0, index, value, tag);
            crate::cpu::gpu_only()
        }
    }

    /// Writes words `index` and `index + 1`.
    ///
    /// # Safety
    /// As for [`store`](Self::store); `index` is even.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn store_pair(&self, index: u32, values: [u32; 2], tag: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: inside the buffer, by this function's contract.
        unsafe {
            asm!("st.relaxed.gpu.global.v2.b64 [{}], {{{}, {}}};",
                in(reg64) self.0.address_unchecked(index as usize), in(reg64) word(values[0], tag),
                in(reg64) word(values[1], tag), options(nostack));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (index, values, tag);
            crate::cpu::gpu_only()
        }
    }

    /// The value of word `index`, whatever its tag.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn peek(&self, index: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let found: u64;
            // SAFETY: inside the buffer, by this function's contract.
            unsafe {
                asm!("ld.relaxed.gpu.global.b64 {}, [{}];",
                    out(reg64) found, in(reg64) self.0.address_unchecked(index as usize), options(nostack));
            }
            found as u32
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = index;
            crate::cpu::gpu_only()
        }
    }

    /// Waits until word `index` has the tag, and returns its value.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn wait(&self, index: u32, tag: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let mut readings = 0;
            loop {
                let found: u64;
                // SAFETY: inside the buffer, by this function's contract.
                unsafe {
                    asm!("ld.relaxed.gpu.global.b64 {}, [{}];",
                        out(reg64) found, in(reg64) self.0.address_unchecked(index as usize), options(nostack));
                }
                if (found >> 32) as u32 == tag {
                    return found as u32;
                }
                count(&mut readings);
            }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (index, tag);
            crate::cpu::gpu_only()
        }
    }

    /// Waits until all words of some pairs have the tag, and returns their values: `N` pairs from each of `starts` on,
    /// `STRIDE` words apart. All are read at once, again and again.
    ///
    /// # Safety
    /// As for [`store`](Self::store), for all of these words; a pair's first is even.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn wait_pairs<const M: usize, const N: usize, const STRIDE: usize>(
        &self,
        starts: [u32; M],
        tag: u32,
    ) -> [[[u32; 2]; N]; M] {
        #[cfg(target_arch = "nvptx64")]
        {
            let mut values = [[[0; 2]; N]; M];
            let mut readings = 0;
            loop {
                let mut strangers = 0;
                for m in 0..M {
                    // SAFETY: inside the buffer, by this function's contract.
                    let start = unsafe { self.0.address_unchecked(starts[m] as usize) };
                    for n in 0..N {
                        // SAFETY: as above.
                        let pair = unsafe { read_pair(start.add(n * STRIDE)) };
                        strangers |= stranger(pair, tag);
                        values[m][n] = pair.map(|word| word as u32);
                    }
                }
                if strangers == 0 {
                    return values;
                }
                count(&mut readings);
            }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (starts, tag);
            crate::cpu::gpu_only()
        }
    }

    /// The same of the first `number` of `N` pairs from `start` on, at least one; the others' values are any.
    ///
    /// # Safety
    /// As for [`wait_pairs`](Self::wait_pairs).
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn wait_some_pairs<const N: usize, const STRIDE: usize>(
        &self,
        start: u32,
        number: u32,
        tag: u32,
    ) -> [[u32; 2]; N] {
        #[cfg(target_arch = "nvptx64")]
        {
            let mut values = [[0; 2]; N];
            let mut readings = 0;
            loop {
                let mut strangers = 0;
                for n in 0..N {
                    let place = if (n as u32) < number { start + (n * STRIDE) as u32 } else { start };
                    // SAFETY: inside the buffer, by this function's contract.
                    let pair = unsafe { read_pair(self.0.address_unchecked(place as usize)) };
                    strangers |= stranger(pair, tag);
                    values[n] = pair.map(|word| word as u32);
                }
                if strangers == 0 {
                    return values;
                }
                count(&mut readings);
            }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (start, number, tag);
            crate::cpu::gpu_only()
        }
    }
}

#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn word(value: u32, tag: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
}

/// 0 where both words have the tag.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn stranger([first, second]: [u64; 2], tag: u32) -> u32 {
    ((first >> 32) as u32 ^ tag) | ((second >> 32) as u32 ^ tag)
}

/// Counts a reading that found a stranger.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn count(readings: &mut u32) {
    // Unknown to the assembler, which would unroll a loop that it can count, and need registers for each copy.
    *readings = crate::thread::number_anew(*readings + 1);
    if *readings == MOST_READINGS {
        crate::trap();
    }
}

/// The words at an address.
///
/// # Safety
/// They are a buffer's, and the address is a multiple of 16.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
unsafe fn read_pair(address: *const u64) -> [u64; 2] {
    let (first, second): (u64, u64);
    // SAFETY: this function's contract.
    unsafe {
        asm!("ld.relaxed.gpu.global.v2.b64 {{{}, {}}}, [{}];",
            out(reg64) first, out(reg64) second, in(reg64) address, options(nostack));
    }
    [first, second]
}
