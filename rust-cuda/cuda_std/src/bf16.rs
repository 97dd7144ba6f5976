//! Conversions between `f32` and `bf16`, rounding to nearest, ties to even; a NaN becomes `0x7fff`.

use half::bf16;

/// Rounds to `bf16`.
#[inline(always)]
#[must_use]
pub fn f32_to_bf16(x: f32) -> bf16 {
    #[cfg(target_arch = "nvptx64")]
    {
        let bits: u16;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!("cvt.rn.bf16.f32 {}, {};", out(reg16) bits, in(reg32) x, options(pure, nomem, nostack));
        }
        bf16::from_bits(bits)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        if x.is_nan() {
            return bf16::from_bits(0x7fff);
        }
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        bf16::from_bits((rounded >> 16) as u16)
    }
}

/// Widens to `f32`, exactly.
#[inline(always)]
#[must_use]
pub fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds two values into one word, `low` in the lower half: what tensor-core operands are made of.
#[inline(always)]
#[must_use]
pub fn bf16_pair(low: f32, high: f32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let bits: u32;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!("cvt.rn.bf16x2.f32 {}, {}, {};",
                out(reg32) bits, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
        }
        bits
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        u32::from(f32_to_bf16(low).to_bits()) | (u32::from(f32_to_bf16(high).to_bits()) << 16)
    }
}

/// The two values of a word that [`bf16_pair`] made.
#[inline(always)]
#[must_use]
pub fn unpack_bf16_pair(pair: u32) -> (f32, f32) {
    (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000))
}
