//! Comparisons beyond `host::testing`: values rounded to bf16, and bits of any element.

use half::bf16;
use host::testing::{Tolerance, assert_close};

use crate::rig::Bits;

/// The distance between neighbours of bf16 around a value.
fn step(value: f64) -> f64 {
    (value.abs().max(1e-30).log2().floor() - 7.0).exp2()
}

/// Panics unless every value is the expected one rounded once to bf16: half a step away at most, after a relative error
/// of `error` before the rounding.
#[track_caller]
pub(crate) fn assert_rounded(actual: &[bf16], expected: &[f64], error: f64) {
    assert_eq!(actual.len(), expected.len(), "lengths");
    let in_steps: Vec<f64> = actual.iter().zip(expected).map(|(a, &e)| a.to_f64() / step(e)).collect();
    let expected: Vec<f64> = expected.iter().map(|&e| e / step(e)).collect();
    assert_close(&in_steps, &expected, Tolerance { absolute: 0.5 + 1e-6, relative: error });
}

/// Panics unless both have the same bits.
#[track_caller]
pub(crate) fn assert_same<T: Bits>(actual: &[T], expected: &[T], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let differs = |index: &usize| actual[*index].bits() != expected[*index].bits();
    let faults: Vec<usize> = (0..actual.len()).filter(differs).collect();
    if let Some(&first) = faults.first() {
        panic!(
            "{what}: {} of {} values have other bits; the first at {first}: {:#x} instead of {:#x}",
            faults.len(),
            actual.len(),
            actual[first].bits(),
            expected[first].bits()
        );
    }
}

/// Panics unless the observed counts fit the probabilities: Pearson's chi-square, below a bound that one true sample in
/// ten thousand exceeds (Wilson and Hilferty's approximation). Outcomes of probability 0 must not occur.
#[track_caller]
pub(crate) fn assert_distribution(counts: &[usize], probabilities: &[f64]) {
    assert_eq!(counts.len(), probabilities.len(), "lengths");
    let total: usize = counts.iter().sum();
    let mut statistic = 0.0;
    let mut possible = 0.0;
    for (&count, &probability) in counts.iter().zip(probabilities) {
        if probability == 0.0 {
            assert_eq!(count, 0, "an impossible outcome");
            continue;
        }
        let expected = total as f64 * probability;
        assert!(expected >= 5.0, "too few draws for a probability of {probability}");
        statistic += (count as f64 - expected).powi(2) / expected;
        possible += 1.0;
    }
    let freedom: f64 = possible - 1.0;
    let spread = 2.0 / (9.0 * freedom);
    let bound = freedom * (1.0 - spread + 3.719 * spread.sqrt()).powi(3);
    assert!(statistic < bound, "chi-square {statistic:.1} with {freedom} degrees of freedom, bound {bound:.1}");
}

/// Proof that the comparisons can fail.
mod canary {
    use std::panic::{UnwindSafe, catch_unwind};

    use super::*;

    #[track_caller]
    fn fails(comparison: impl FnOnce() + UnwindSafe) {
        assert!(catch_unwind(comparison).is_err(), "a wrong output passed");
    }

    fn sample() -> (Vec<bf16>, Vec<f64>) {
        let exact: Vec<f64> = (0..24).map(|index| (f64::from(index) - 11.3) * 0.173).collect();
        (exact.iter().map(|&value| bf16::from_f64(value)).collect(), exact)
    }

    #[test]
    fn wrong_roundings_fail() {
        let (right, exact) = sample();
        assert_rounded(&right, &exact, 1e-6);
        let planted = |change: fn(&mut Vec<bf16>)| {
            let mut wrong = right.clone();
            change(&mut wrong);
            let exact = exact.clone();
            fails(move || assert_rounded(&wrong, &exact, 1e-6));
        };
        planted(|values| values.fill(bf16::ZERO));
        planted(|values| values.fill(bf16::NAN));
        planted(|values| values[7] = bf16::NAN);
        planted(|values| values.swap(3, 15));
        planted(|values| values.truncate(23));
        // One step off, either way.
        planted(|values| values[20] = bf16::from_bits(values[20].to_bits() + 1));
        planted(|values| values[20] = bf16::from_bits(values[20].to_bits() - 1));
    }

    #[test]
    fn wrong_bits_fail() {
        let (right, _) = sample();
        assert_same(&right, &right, "same");
        let wrong = |index: usize| {
            let mut values = right.clone();
            values[index] = bf16::from_bits(values[index].to_bits() ^ 1);
            values
        };
        for index in [0, 11, 23] {
            let (right, wrong) = (right.clone(), wrong(index));
            fails(move || assert_same(&wrong, &right, "planted"));
        }
        fails(|| assert_same(&[0.0_f32], &[-0.0], "zeros"));
        fails(|| assert_same(&[1_u32, 2], &[2, 1], "swapped"));
        fails(|| assert_same(&[1_u32], &[1, 2], "missing"));
    }

    #[test]
    fn wrong_distributions_fail() {
        assert_distribution(&[2510, 4970, 2520], &[0.25, 0.5, 0.25]);
        fails(|| assert_distribution(&[0, 0, 0], &[0.25, 0.5, 0.25]));
        fails(|| assert_distribution(&[5000, 2500, 2500], &[0.25, 0.5, 0.25]));
        fails(|| assert_distribution(&[2700, 4800, 2500], &[0.25, 0.5, 0.25]));
        fails(|| assert_distribution(&[2500, 5000, 2500, 1], &[0.25, 0.5, 0.25, 0.0]));
    }
}
