//! Float functions that give the same bits on every device.
//!
//! Add, multiply, divide, square root and fused multiply-add are correctly rounded everywhere (IEEE 754); the
//! others are built from them. `+`, `-`, `*` and `/` in a kernel are never contracted to fused operations.

/// `a * b + c`, rounded once.
#[inline(always)]
#[must_use]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: f32;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!("fma.rn.f32 {}, {}, {}, {};",
                out(reg32) result, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    a.mul_add(b, c)
}

/// The square root, correctly rounded.
#[inline(always)]
#[must_use]
pub fn sqrt(x: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: f32;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!("sqrt.rn.f32 {}, {};", out(reg32) result, in(reg32) x, options(pure, nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    x.sqrt()
}

/// The larger of two; where one is NaN, the other.
#[inline(always)]
#[must_use]
pub fn max(a: f32, b: f32) -> f32 {
    if a > b || b.is_nan() { a } else { b }
}

/// The smaller of two; where one is NaN, the other.
#[inline(always)]
#[must_use]
pub fn min(a: f32, b: f32) -> f32 {
    if a < b || b.is_nan() { a } else { b }
}

/// Adding and subtracting this rounds |x| < 2^22 to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;

/// 2^f for f in [-0.5, 0.5], by a polynomial of degree 6 (near minimax, relative error below 4e-9).
#[inline(always)]
fn exp2_reduced(f: f32) -> f32 {
    let mut p = fma(1.523_800_6e-4, f, 1.339_113_7e-3);
    p = fma(p, f, 9.618_841e-3);
    p = fma(p, f, 5.550_359_2e-2);
    p = fma(p, f, 2.402_264_5e-1);
    p = fma(p, f, core::f32::consts::LN_2);
    fma(p, f, 1.0)
}

/// `p * 2^n` for n in -125 to 128, in two steps so that 2^128 does not overflow early.
#[inline(always)]
fn scale_by_power(p: f32, rounded: f32) -> f32 {
    // The integer sits in the low bits of the float that was rounded with ROUND.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let half_scale = f32::from_bits(n.wrapping_add(126) << 23);
    p * half_scale * 2.0
}

/// 2^x, to about one unit in the last place. Results below 2^-125 are 0; from x = 128 on it is infinite.
#[inline(always)]
#[must_use]
pub fn exp2(x: f32) -> f32 {
    let rounded = x + ROUND;
    let f = x - (rounded - ROUND);
    let y = scale_by_power(exp2_reduced(f), rounded);
    if x < -125.0 {
        0.0
    } else if x >= 128.0 {
        f32::INFINITY
    } else {
        y
    }
}

/// 2^x of x <= 0 for kernels whose bits differ between devices anyway: on a GPU the hardware's approximation (PTX
/// `ex2.approx.ftz`, off by at most two units in the last place, one instruction instead of a dozen), else [`exp2`]. 0 for results
/// below the normal numbers.
#[inline(always)]
#[must_use]
pub fn exp2_of_negative(x: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: f32;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!("ex2.approx.ftz.f32 {}, {};", out(reg32) result, in(reg32) x, options(pure, nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    exp2(x)
}

/// e^x for x from -86.6 to 88.72: the bits of [`exp`], without its choices.
#[inline(always)]
#[must_use]
pub fn exp_within(x: f32) -> f32 {
    // ln 2 in two parts, the first with few enough bits that n * LN_2_HIGH is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let rounded = fma(x, core::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma(n, -LN_2_LOW, fma(n, -LN_2_HIGH, x));
    let mut p = fma(1.374_532_6e-3, r, 8.368_947e-3);
    p = fma(p, r, 4.166_965e-2);
    p = fma(p, r, 1.666_651_8e-1);
    p = fma(p, r, 4.999_998_8e-1);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    scale_by_power(p, rounded)
}

/// e^x, to about two units in the last place. Below x = -86.6 it is 0; from x = 88.73 on it is infinite.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    let y = exp_within(x);
    if x < -86.6 {
        0.0
    } else if x > 88.722_83 {
        f32::INFINITY
    } else {
        y
    }
}

/// About 1 / x, for results that are made exact afterwards: on a GPU the hardware's approximation (PTX `rcp.approx.ftz`, off by
/// at most one unit in the last place), else the quotient.
#[inline(always)]
#[must_use]
pub fn reciprocal_approx(x: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: f32;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!("rcp.approx.ftz.f32 {}, {};", out(reg32) result, in(reg32) x, options(pure, nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        1.0 / x
    }
}

/// The natural logarithm, to about two units in the last place. 0 gives negative infinity, less gives NaN.
#[inline(always)]
#[must_use]
pub fn ln(x: f32) -> f32 {
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s) with s = (m - 1) / (m + 1).
    let subnormal = x < f32::MIN_POSITIVE;
    let normal = if subnormal { x * 8_388_608.0 } else { x };
    let shifted = normal.to_bits().wrapping_sub(0x3f35_04f3); // sqrt(1/2)
    let e = (shifted as i32) >> 23;
    let m = f32::from_bits(normal.to_bits().wrapping_sub((e as u32) << 23));
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let mut r = fma(0.222_222_22, z, 0.285_714_3);
    r = fma(r, z, 0.4);
    r = fma(r, z, 0.666_666_7);
    let exponent = (e - if subnormal { 23 } else { 0 }) as f32;
    let ln_m = fma(s * z, r, 2.0 * s);
    let y = fma(exponent, 0.693_359_4, fma(exponent, -2.121_944_4e-4, ln_m));
    if x == 0.0 {
        f32::NEG_INFINITY
    } else if x < 0.0 || x.is_nan() {
        f32::NAN
    } else if x == f32::INFINITY {
        x
    } else {
        y
    }
}
