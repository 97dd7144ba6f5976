//! Which logits are among the first of some, roughly, in one pass: a histogram of their distances from the greatest. Digits of a
//! key say little at first, because likely tokens share sign and exponent; distances tell them apart at once.

use cuda_std::prelude::*;

use crate::rank;

/// Bins. Distances of 32 and more share the last one.
pub const BINS: usize = 256;

/// A bin per 32nd of an octave: what of a distance's bits is left out.
const SHIFT: u32 = 18;

/// The bits of the distances of the first bin, 2^-3 and less.
const FIRST: u32 = (127 - 3) << 5;

/// The bin of a logit, of `max` or less: the further below, the greater.
#[inline(always)]
#[must_use]
pub fn bin(max: f32, logit: f32) -> usize {
    // The difference of two infinities is NaN.
    let distance = if logit == max { 0 } else { (max - logit).to_bits() >> SHIFT };
    let bin = distance.saturating_sub(FIRST);
    if bin < BINS as u32 { bin as usize } else { BINS - 1 }
}

/// A key that every logit in a bin up to `bin`, which is not the last one, reaches, and few others do.
#[inline(always)]
#[must_use]
pub fn floor(max: f32, bin: u32) -> u64 {
    // The distances of these bins are below one that is a float. So the logits are above the exact difference, and not
    // below the rounded one.
    u64::from(rank::logit_key(max - f32::from_bits((FIRST + bin + 1) << SHIFT))) << 32
}

/// The first bin such that it and those before it count at least `wanted`, and how many they count; [`BINS`] where all count
/// fewer. What was counted need not be behind a barrier. `chosen` holds two elements.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn first_bins(histogram: &Shared<u32>, wanted: u32, chosen: &Shared<u32>) -> (u32, u32) {
    thread::sync_threads();
    // The first warp walks the bins, 8 to a lane.
    if thread::warp_id() == 0 {
        let first = thread::lane_id() as usize * 8;
        let mut own = 0;
        for i in 0..8 {
            own += histogram.get(first + i);
        }
        let upto = rank::inclusive_scan_u32(own);
        let mut before = upto - own;
        if thread::lane_id() == 31 && upto < wanted {
            chosen.set(0, BINS as u32);
            chosen.set(1, upto);
        }
        if before < wanted && wanted <= upto {
            for i in 0..8 {
                let here = histogram.get(first + i);
                if before < wanted && wanted <= before + here {
                    chosen.set(0, (first + i) as u32);
                    chosen.set(1, before + here);
                }
                before += here;
            }
        }
    }
    thread::sync_threads();
    (chosen.get(0), chosen.get(1))
}

#[cfg(all(test, not(target_arch = "nvptx64")))]
mod tests {
    use super::*;

    #[test]
    fn bins_rise_with_the_distance_and_floors_are_below_them() {
        let logits = [f32::INFINITY, 3.4e38, 900.0, 20.0, 1.0, 0.125, 1e-30, 0.0, -0.3, -7.7, -3.4e38];
        for max in logits {
            let mut last = 0;
            let steps = (0..40_000_u32).map(|step| f32::from_bits(step * 30_000)).filter(|step| step.is_finite());
            for logit in steps.map(|step| max - step).filter(|&logit| logit > f32::NEG_INFINITY) {
                if logit.is_nan() {
                    continue;
                }
                let bin = bin(max, logit);
                assert!(bin >= last && bin < BINS, "{max} {logit}");
                last = bin;
                if bin < BINS - 1 {
                    assert!(rank::rank_key(logit, 1 << 18) >= floor(max, bin as u32), "{max} {logit} {bin}");
                }
            }
            assert!(bin(max, max) == 0);
        }
        // Likely tokens are told apart.
        assert!(bin(20.0, 17.0) < bin(20.0, 16.8) && bin(20.0, -13.0) == BINS - 1);
        assert!(floor(20.0, 100) > floor(20.0, 101));
    }
}
