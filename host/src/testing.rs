//! What tests compare with: one comparator, in which a NaN never passes. No part of the public interface.

/// How far a value may be from the expected one: `absolute + relative * |expected|`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// In the values' own unit.
    pub absolute: f64,
    /// Of the expected value.
    pub relative: f64,
}

impl Tolerance {
    /// Equal values only; 0.0 and -0.0 are equal.
    pub const EXACT: Self = Self { absolute: 0.0, relative: 0.0 };

    /// Half a step of bf16 (8 significant bits, so at most 2^-8 of the value), with a little more for the f32 sums.
    pub const BF16: Self = Self { absolute: 1e-6, relative: 1.05 / 256.0 };
}

/// Panics unless the lengths are equal and every `|actual - expected| <= tolerance`. A NaN on either side fails.
///
/// # Panics
/// That is its purpose; the message has the count, the first and the worst place.
#[track_caller]
pub fn assert_close<A, E>(actual: &[A], expected: &[E], tolerance: Tolerance)
where
    A: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    assert_eq!(actual.len(), expected.len(), "lengths");
    let mut faults = 0;
    let mut first = None;
    let mut worst = (0, -1.0);
    for (index, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let (a, e): (f64, f64) = (a.into(), e.into());
        let difference = (a - e).abs();
        // Written so that a NaN is a fault: no comparison with it is true.
        if difference <= tolerance.absolute + tolerance.relative * e.abs() {
            continue;
        }
        faults += 1;
        first.get_or_insert((index, a, e));
        let size = if difference.is_nan() { f64::INFINITY } else { difference };
        if size > worst.1 {
            worst = (index, size);
        }
    }
    if let Some((index, a, e)) = first {
        panic!(
            "{faults} of {} values differ by more than {tolerance:?}; the first at {index}: {a} instead of {e}; \
             the worst at {}, by {}",
            actual.len(),
            worst.0,
            worst.1
        );
    }
}

/// Panics unless both have the same bits.
///
/// # Panics
/// That is its purpose.
#[track_caller]
pub fn assert_bits(actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "lengths");
    let differing: Vec<_> =
        (0..actual.len()).filter(|&index| actual[index].to_bits() != expected[index].to_bits()).collect();
    if let Some(&index) = differing.first() {
        panic!(
            "{} of {} values have other bits; the first at {index}: {:e} ({:#010x}) instead of {:e} ({:#010x})",
            differing.len(),
            actual.len(),
            actual[index],
            actual[index].to_bits(),
            expected[index],
            expected[index].to_bits()
        );
    }
}

/// Random numbers for test inputs: the same on every machine (SplitMix64).
#[derive(Clone, Debug)]
pub struct TestRng(u64);

impl TestRng {
    /// A stream of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub fn next_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Uniform in 0..`end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }

    /// `len` f32 in -1..1.
    pub fn f32s(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next_f32()).collect()
    }

    /// `len` bf16 in -1..1.
    pub fn bf16s(&mut self, len: usize) -> Vec<half::bf16> {
        (0..len).map(|_| half::bf16::from_f32(self.next_f32())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOSE: Tolerance = Tolerance { absolute: 0.5, relative: 0.0 };

    #[test]
    fn close_values_pass() {
        assert_close(&[1.0_f32, -0.0], &[1.25_f64, 0.0], LOOSE);
        assert_close(&[1.0_f32, 2.0], &[1.0_f32, 2.0], Tolerance::EXACT);
        assert_close(&[100.5_f64], &[100.0_f64], Tolerance { absolute: 0.0, relative: 0.01 });
    }

    #[test]
    #[should_panic(expected = "the first at 1: NaN")]
    fn a_nan_result_fails() {
        assert_close(&[1.0_f32, f32::NAN], &[1.0_f32, 2.0], LOOSE);
    }

    #[test]
    #[should_panic(expected = "instead of NaN")]
    fn a_nan_on_both_sides_fails() {
        assert_close(&[f32::NAN], &[f32::NAN], LOOSE);
    }

    #[test]
    #[should_panic(expected = "2 of 3 values")]
    fn zeros_fail() {
        assert_close(&[0.0_f32; 3], &[1.0_f32, 0.0, -2.0], LOOSE);
    }

    #[test]
    #[should_panic(expected = "1 of 1 values")]
    fn infinity_fails() {
        assert_close(&[f32::INFINITY], &[1.0_f32], LOOSE);
    }

    #[test]
    #[should_panic(expected = "lengths")]
    fn a_missing_value_fails() {
        assert_close(&[0.0_f32; 3], &[0.0_f32; 4], LOOSE);
    }

    #[test]
    #[should_panic(expected = "other bits")]
    fn bits_tell_the_zeros_apart() {
        assert_bits(&[0.0], &[-0.0]);
    }

    #[test]
    fn bits_compare_nans() {
        assert_bits(&[f32::NAN, 1.5], &[f32::NAN, 1.5]);
    }

    #[test]
    fn the_random_numbers_are_frozen() {
        // The first value of SplitMix64 with seed 0 in its author's published code.
        assert_eq!(TestRng::new(0).next_u64(), 0xe220_a839_7b1d_cdaf);
        let mut rng = TestRng::new(1);
        let values = rng.f32s(1000);
        assert!(values.iter().all(|value| (-1.0..1.0).contains(value)));
        assert!(values.iter().any(|&value| value < -0.9) && values.iter().any(|&value| value > 0.9));
    }
}
