//! Float functions and conversions, against the standard library in f64 and against `half`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use cuda_std::bf16::{bf16_pair, bf16_to_f32, f32_to_bf16, unpack_bf16_pair};
use cuda_std::math;
use half::bf16;

/// The distance between `result` and the exact value, in units of the last place of an f32 of that size.
fn ulps(result: f32, exact: f64) -> f64 {
    let exponent = exact.abs().log2().floor().max(-126.0);
    let distance = (f64::from(result) - exact).abs() / (exponent - 23.0).exp2();
    if distance.is_nan() { f64::INFINITY } else { distance }
}

/// Evenly spaced points and their neighbours in the last bits.
fn sweep(low: f32, high: f32, count: u32) -> impl Iterator<Item = f32> {
    (0..=count)
        .flat_map(move |i| {
            let x = (f64::from(low) + (f64::from(high) - f64::from(low)) * f64::from(i) / f64::from(count)) as f32;
            [x, f32::from_bits(x.to_bits() ^ 1), f32::from_bits(x.to_bits() ^ 5)]
        })
        .filter(move |x| (low..=high).contains(x))
}

/// Floats of every exponent and sign, about `1 / step` of all.
fn every_size(step: usize) -> impl Iterator<Item = f32> {
    (0..=u32::MAX).step_by(step).map(f32::from_bits)
}

fn worst(points: impl Iterator<Item = f32>, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> (f64, f32) {
    points.map(|x| (ulps(f(x), exact(f64::from(x))), x)).fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a })
}

#[test]
fn the_ruler_measures() {
    assert_eq!(ulps(1.0, 1.0), 0.0);
    assert_eq!(ulps(1.0 + f32::EPSILON, 1.0), 1.0);
    assert_eq!(ulps(f32::from_bits(0x3f7f_ffff), 1.0), 0.5);
    assert_eq!(ulps(f32::NAN, 1.0), f64::INFINITY);
    let (distance, at) = worst(sweep(-1.0, 1.0, 1000), |x| x.exp2() * 1.000_001, f64::exp2);
    assert!(distance > 5.0, "{distance} at {at}");
}

#[test]
fn exp2_of_negative_has_the_bits_of_exp2() {
    // Floats of every size from -0 to negative infinity, and all between -127 and -124.9.
    let (zero, infinity) = ((-0.0f32).to_bits(), f32::NEG_INFINITY.to_bits());
    let points = (zero..=infinity).step_by(97).chain([infinity]).chain((-124.9f32).to_bits()..=(-127.0f32).to_bits());
    for x in points.map(f32::from_bits).chain([0.0, f32::from_bits(1)]) {
        assert_eq!(math::exp2_of_negative(x).to_bits(), math::exp2(x).to_bits(), "{x}");
    }
    let nan = math::exp2_of_negative(f32::NAN);
    assert!(nan.is_nan() || f32_to_bf16(nan).is_infinite());
}

#[test]
fn exp2_is_within_one_unit() {
    let points = sweep(-125.0, 127.999, 400_000).chain(sweep(-1.0, 1.0, 400_000));
    let (distance, at) = worst(points, math::exp2, f64::exp2);
    assert!(distance <= 1.0, "{distance} at {at}");
    for (x, y) in [(0.0, 1.0), (-0.0, 1.0), (1.0, 2.0), (-125.0, (-125f32).exp2()), (127.0, 127f32.exp2())] {
        assert_eq!(math::exp2(x), y, "{x}");
    }
    for x in [-125.001, -150.0, -1e30, f32::MIN, f32::NEG_INFINITY] {
        assert_eq!(math::exp2(x), 0.0, "{x}");
    }
    for x in [128.0, 200.0, 1e30, f32::MAX, f32::INFINITY] {
        assert_eq!(math::exp2(x), f32::INFINITY, "{x}");
    }
    assert!(math::exp2(f32::NAN).is_nan());
}

#[test]
fn exp_is_within_two_units() {
    let points = sweep(-86.6, 88.722, 400_000).chain(sweep(-1.0, 1.0, 400_000));
    let (distance, at) = worst(points, math::exp, f64::exp);
    assert!(distance <= 2.0, "{distance} at {at}");
    assert_eq!(math::exp(0.0), 1.0);
    for x in [-86.61, -150.0, f32::MIN, f32::NEG_INFINITY] {
        assert_eq!(math::exp(x), 0.0, "{x}");
    }
    for x in [88.73, 200.0, f32::MAX, f32::INFINITY] {
        assert_eq!(math::exp(x), f32::INFINITY, "{x}");
    }
    assert!(math::exp(f32::NAN).is_nan());
}

#[test]
fn ln_is_within_two_units() {
    let positive = every_size(2003).filter(|x| *x > 0.0 && x.is_finite());
    let points = positive.chain(sweep(0.5, 2.0, 400_000)).filter(|&x| x != 1.0);
    let (distance, at) = worst(points, math::ln, f64::ln);
    assert!(distance <= 2.0, "{distance} at {at}");
    assert_eq!(math::ln(1.0), 0.0);
    for zero in [0.0, -0.0] {
        assert_eq!(math::ln(zero), f32::NEG_INFINITY);
    }
    assert_eq!(math::ln(f32::INFINITY), f32::INFINITY);
    for x in [-1.0, -1e-40, f32::NEG_INFINITY, f32::NAN] {
        assert!(math::ln(x).is_nan(), "{x}");
    }
    let smallest = f32::from_bits(1);
    assert!(ulps(math::ln(smallest), f64::from(smallest).ln()) <= 2.0);
}

#[test]
fn arithmetic_is_correctly_rounded() {
    // In f64 the product is exact and these sums are too.
    let (a, b, c) = (1.0 + f32::EPSILON, 1.0 - f32::EPSILON / 2.0, -1.0);
    assert_eq!(math::fma(a, b, c), (f64::from(a) * f64::from(b) - 1.0) as f32);
    assert_ne!(math::fma(a, b, c), a * b + c);
    for x in every_size(100_003).filter(|x| *x >= 0.0) {
        assert_eq!(math::sqrt(x), f64::from(x).sqrt() as f32, "{x}");
    }
    for (a, b, larger, smaller) in [(1.0, 2.0, 2.0, 1.0), (-1.0, -2.0, -1.0, -2.0), (3.0, f32::NAN, 3.0, 3.0)] {
        assert_eq!((math::max(a, b), math::min(a, b)), (larger, smaller));
        assert_eq!((math::max(b, a), math::min(b, a)), (larger, smaller));
    }
    assert!(math::max(f32::NAN, f32::NAN).is_nan() && math::min(f32::NAN, f32::NAN).is_nan());
}

#[test]
fn all_bf16_widen_exactly_and_come_back() {
    for bits in 0..=u16::MAX {
        let x = bf16::from_bits(bits);
        let wide = bf16_to_f32(x);
        if x.is_nan() {
            assert!(wide.is_nan());
            assert_eq!(f32_to_bf16(wide).to_bits(), 0x7fff);
        } else {
            assert_eq!(f64::from(wide), x.to_f64(), "{bits:#x}");
            assert_eq!(f32_to_bf16(wide).to_bits(), bits);
        }
    }
}

#[test]
fn rounding_to_bf16_is_to_nearest_even() {
    let halves = (0..=u16::MAX)
        .flat_map(|bits| [0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(bits) << 16 | low)));
    for x in every_size(4099).chain(halves) {
        let (rounded, expected) = (f32_to_bf16(x), bf16::from_f32(x));
        if x.is_nan() {
            assert_eq!(rounded.to_bits(), 0x7fff, "{:#x}", x.to_bits());
        } else {
            assert_eq!(rounded.to_bits(), expected.to_bits(), "{x} {:#x}", x.to_bits());
        }
    }
}

#[test]
fn pairs_have_the_lower_element_in_the_lower_half() {
    let pair = bf16_pair(1.0, -2.0);
    assert_eq!(pair, 0xc000_3f80);
    assert_eq!(unpack_bf16_pair(pair), (1.0, -2.0));
    assert_eq!(bf16_pair(f32::NAN, 0.0), 0x7fff);
}
