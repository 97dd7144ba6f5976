//! Exchange among the 32 lanes of a warp. Every function here is called by all 32 lanes together.

#[cfg(not(target_arch = "nvptx64"))]
use crate::cpu;

/// Lanes in a warp.
pub const WARP_SIZE: u32 = 32;

/// Each lane gets the value of the lane whose index differs from its own by the bits of `mask`.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn shuffle_xor_u32(value: u32, mask: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: u32;
        // SAFETY: all 32 lanes take part, as the module's contract says; no memory is touched.
        unsafe {
            core::arch::asm!("shfl.sync.bfly.b32 {}, {}, {}, 31, 0xffffffff;",
                out(reg32) result, in(reg32) value, in(reg32) mask, options(nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    cpu::warp_exchange(value, |values, lane| values[(lane ^ mask as usize) & 31])
}

/// [`shuffle_xor_u32`] for `f32`.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn shuffle_xor_f32(value: f32, mask: u32) -> f32 {
    f32::from_bits(shuffle_xor_u32(value.to_bits(), mask))
}

/// Each lane gets the value of lane `source` (taken modulo 32).
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn shuffle_u32(value: u32, source: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: u32;
        // SAFETY: as in `shuffle_xor_u32`.
        unsafe {
            core::arch::asm!("shfl.sync.idx.b32 {}, {}, {}, 31, 0xffffffff;",
                out(reg32) result, in(reg32) value, in(reg32) source, options(nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    cpu::warp_exchange(value, |values, _| values[source as usize & 31])
}

/// [`shuffle_u32`] for `f32`.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn shuffle_f32(value: f32, source: u32) -> f32 {
    f32::from_bits(shuffle_u32(value.to_bits(), source))
}

/// A bit for each lane: did it pass `true`?
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn ballot(predicate: bool) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: u32;
        // SAFETY: all 32 lanes take part; the predicate register is local to the block of instructions.
        unsafe {
            core::arch::asm!(
                "{{ .reg .pred p; setp.ne.u32 p, {1}, 0; vote.sync.ballot.b32 {0}, p, 0xffffffff; }}",
                out(reg32) result, in(reg32) u32::from(predicate), options(nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    cpu::warp_exchange(u32::from(predicate), |values, _| {
        values.iter().enumerate().fold(0, |mask, (lane, &v)| mask | (v << lane))
    })
}

/// Did any lane pass `true`?
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn any(predicate: bool) -> bool {
    ballot(predicate) != 0
}

/// Did every lane pass `true`?
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn all(predicate: bool) -> bool {
    ballot(predicate) == u32::MAX
}

/// The warp's own barrier: orders the shared-memory accesses of its lanes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_warp() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: all 32 lanes take part; the default memory clobber orders the surrounding accesses.
    unsafe {
        core::arch::asm!("bar.warp.sync 0xffffffff;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    cpu::sync_warp();
}

/// The sum over the warp, in every lane. The tree is fixed: partners at distance 16, 8, 4, 2, 1.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sum_f32(value: f32) -> f32 {
    let mut sum = value;
    sum += shuffle_xor_f32(sum, 16);
    sum += shuffle_xor_f32(sum, 8);
    sum += shuffle_xor_f32(sum, 4);
    sum += shuffle_xor_f32(sum, 2);
    sum + shuffle_xor_f32(sum, 1)
}

/// The maximum over the warp, in every lane. NaN counts as absent.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn max_f32(value: f32) -> f32 {
    let mut max = value;
    max = crate::math::max(max, shuffle_xor_f32(max, 16));
    max = crate::math::max(max, shuffle_xor_f32(max, 8));
    max = crate::math::max(max, shuffle_xor_f32(max, 4));
    max = crate::math::max(max, shuffle_xor_f32(max, 2));
    crate::math::max(max, shuffle_xor_f32(max, 1))
}

/// The sum of unsigned words over the warp, modulo 2^32, in every lane.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sum_u32(value: u32) -> u32 {
    let mut sum = value;
    let mut distance = 16;
    while distance > 0 {
        sum = sum.wrapping_add(shuffle_xor_u32(sum, distance));
        distance >>= 1;
    }
    sum
}
