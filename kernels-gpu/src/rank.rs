//! The one order of tokens: by falling logit, ties by rising id. Every selection uses it, so there are no ties left.

use cuda_std::prelude::*;

/// Threads of a block that ranks a row.
pub const THREADS: usize = 512;

/// Warps of such a block.
pub const WARPS: usize = THREADS / 32;

/// A key that grows with the logit: unsigned, in the order of floats. 0 for what cannot be chosen: NaN and negative
/// infinity. Both zeros are one value.
#[inline(always)]
#[must_use]
pub fn logit_key(logit: f32) -> u32 {
    if logit.is_nan() || logit == f32::NEG_INFINITY {
        return 0;
    }
    let bits = (logit + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

/// The logit of a [`logit_key`] that is not 0; of both zeros the positive one.
#[inline(always)]
#[must_use]
pub fn logit_of_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & 0x7fff_ffff } else { !key })
}

/// A key that grows with the rank of (logit, id): the greatest is the first token. 0 for what cannot be chosen.
#[inline(always)]
#[must_use]
pub fn rank_key(logit: f32, id: usize) -> u64 {
    rank_of(logit_key(logit), id)
}

/// The [`rank_key`] of a token whose [`logit_key`] is known.
#[inline(always)]
#[must_use]
pub fn rank_of(key: u32, id: usize) -> u64 {
    if key == 0 { 0 } else { (u64::from(key) << 32) | u64::from(!(id as u32)) }
}

/// The id in a [`rank_key`]; `u32::MAX` for 0.
#[inline(always)]
#[must_use]
pub fn id_of(rank: u64) -> u32 {
    !(rank as u32)
}

/// The logit in a [`rank_key`] that is not 0; of both zeros the positive one.
#[inline(always)]
#[must_use]
pub fn logit_of(rank: u64) -> f32 {
    logit_of_key((rank >> 32) as u32)
}

/// The value of the lane whose index differs by `mask`.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn shuffle_xor(value: u64, mask: u32) -> u64 {
    let high = warp::shuffle_xor_u32((value >> 32) as u32, mask);
    let low = warp::shuffle_xor_u32(value as u32, mask);
    (u64::from(high) << 32) | u64::from(low)
}

/// The greatest of the values of the lanes whose indices differ from this one's in multiples of `from`, a power of two: 1 for
/// the whole warp.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn warp_max(value: u64, from: u32) -> u64 {
    let mut max = value;
    let mut distance = from;
    while distance < 32 {
        let other = shuffle_xor(max, distance);
        max = if other > max { other } else { max };
        distance *= 2;
    }
    max
}

/// The greatest of the block's values, in every thread. `scratch` holds one element per warp.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn block_max(value: u64, scratch: &Shared<u64>) -> u64 {
    let mut max = value;
    let mut distance = 16;
    while distance > 0 {
        let other = shuffle_xor(max, distance);
        max = if other > max { other } else { max };
        distance >>= 1;
    }
    thread::sync_threads();
    if thread::lane_id() == 0 {
        scratch.set(thread::warp_id() as usize, max);
    }
    thread::sync_threads();
    let mut max = 0;
    for warp in 0..scratch.len() {
        let other = scratch.get(warp);
        max = if other > max { other } else { max };
    }
    max
}

/// The sum over the lanes below this one and this one.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn inclusive_scan(value: u64) -> u64 {
    let lane = thread::lane_id();
    let mut sum = value;
    let mut distance = 1;
    while distance < 32 {
        let source = lane.wrapping_sub(distance);
        let high = warp::shuffle_u32((sum >> 32) as u32, source);
        let low = warp::shuffle_u32(sum as u32, source);
        if lane >= distance {
            sum += (u64::from(high) << 32) | u64::from(low);
        }
        distance <<= 1;
    }
    sum
}

/// [`inclusive_scan`] of smaller values, in half the time.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn inclusive_scan_u32(value: u32) -> u32 {
    let lane = thread::lane_id();
    let mut sum = value;
    let mut distance = 1;
    while distance < 32 {
        let before = warp::shuffle_u32(sum, lane.wrapping_sub(distance));
        if lane >= distance {
            sum += before;
        }
        distance <<= 1;
    }
    sum
}

/// The sum of the values of the block's threads before this one, and that of all.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn block_scan(value: u64, scratch: &Shared<u64>) -> (u64, u64) {
    let upto = inclusive_scan(value);
    thread::sync_threads();
    let own_warp = thread::warp_id() as usize;
    if thread::lane_id() == 31 {
        scratch.set(own_warp, upto);
    }
    thread::sync_threads();
    let (mut before, mut total) = (upto - value, 0);
    for warp in 0..WARPS {
        let sum = scratch.get(warp);
        if warp < own_warp {
            before += sum;
        }
        total += sum;
    }
    (before, total)
}
