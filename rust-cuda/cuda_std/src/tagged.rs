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
            // SAFETY: this function's contract.
            unsafe { read(&self.0, index) as u32 }
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
        // SAFETY: this function's contract.
        self.gather(tag, |words| unsafe { words.one(index) })
    }

    /// Reads some words, all at once, again and again until every one of them has the tag.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn gather<R>(&self, tag: u32, mut read: impl FnMut(&mut Gather<'a>) -> R) -> R {
        #[cfg(target_arch = "nvptx64")]
        {
            let mut readings = 0;
            loop {
                let mut words = Gather { words: self.0, tag, strangers: 0 };
                let values = read(&mut words);
                if words.strangers == 0 {
                    return values;
                }
                count(&mut readings);
            }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (tag, &mut read);
            crate::cpu::gpu_only()
        }
    }
}

/// A reading of words that may not have their tag yet: see [`Tagged::gather`].
pub struct Gather<'a> {
    #[cfg_attr(not(target_arch = "nvptx64"), expect(dead_code, reason = "no word is read on a CPU"))]
    words: InOut<'a, u64>,
    #[cfg_attr(not(target_arch = "nvptx64"), expect(dead_code, reason = "no word is read on a CPU"))]
    tag: u32,
    /// 0 while all words had the tag.
    #[cfg_attr(not(target_arch = "nvptx64"), expect(dead_code, reason = "no word is read on a CPU"))]
    strangers: u32,
}

impl Gather<'_> {
    /// The value of word `index`.
    ///
    /// # Safety
    /// As for [`Tagged::store`].
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn one(&mut self, index: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            // SAFETY: this function's contract.
            let found = unsafe { read(&self.words, index) };
            self.strangers |= (found >> 32) as u32 ^ self.tag;
            found as u32
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = index;
            crate::cpu::gpu_only()
        }
    }

    /// The values of words `index` and `index + 1` where they are `wanted`, else any.
    ///
    /// # Safety
    /// As for [`Tagged::store_pair`] where they are wanted.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn pair(&mut self, index: u32, wanted: bool) -> [u32; 2] {
        #[cfg(target_arch = "nvptx64")]
        {
            let own = word(0, self.tag);
            let (mut first, mut second) = (own, own);
            // SAFETY: inside the buffer, by this function's contract; what is not wanted is not read.
            unsafe {
                asm!("{{ .reg .pred wanted;", "setp.ne.u32 wanted, {}, 0;",
                    "@wanted ld.relaxed.gpu.global.v2.b64 {{{}, {}}}, [{}]; }}",
                    in(reg32) u32::from(wanted), inout(reg64) first, inout(reg64) second,
                    in(reg64) self.words.address_unchecked(index as usize), options(nostack));
            }
            self.strangers |= ((first >> 32) as u32 ^ self.tag) | ((second >> 32) as u32 ^ self.tag);
            [first as u32, second as u32]
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (index, wanted);
            crate::cpu::gpu_only()
        }
    }
}

/// Word `index`, whatever its tag.
///
/// # Safety
/// It is inside the buffer.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
unsafe fn read(words: &InOut<'_, u64>, index: u32) -> u64 {
    let found: u64;
    // SAFETY: this function's contract.
    unsafe {
        asm!("ld.relaxed.gpu.global.b64 {}, [{}];",
            out(reg64) found, in(reg64) words.address_unchecked(index as usize), options(nostack));
    }
    found
}

#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn word(value: u32, tag: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
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
