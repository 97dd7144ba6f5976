//! The gate of a feed-forward layer: SiLU of one half times the other (SwiGLU, Shazeer 2020, arXiv 2002.05202).

use cuda_std::prelude::*;

/// silu(g) * u with silu(g) = g / (1 + e^-g), in f32.
#[inline(always)]
pub(crate) fn gated(gate: bf16, up: bf16) -> f32 {
    let gate = bf16_to_f32(gate);
    gate / (1.0 + math::exp(-gate)) * bf16_to_f32(up)
}

/// The least magnitude of an ordinary gate, 2^-20.
pub(crate) const LEAST: u16 = 0x3580;
/// The greatest one, 40.
pub(crate) const MOST: u16 = 0x4220;

/// Whether [`gated_ordinary`] takes this gate.
#[inline(always)]
pub(crate) fn is_ordinary(gate: bf16) -> bool {
    (gate.to_bits() & 0x7fff).wrapping_sub(LEAST) <= MOST - LEAST
}

/// [`gated`] of a gate that [`is_ordinary`], and something else of any other: its bits without a branch, so that a thread
/// computes many at once.
#[inline(always)]
pub(crate) fn gated_ordinary(gate: bf16, up: bf16) -> f32 {
    silu_ordinary(gate) * bf16_to_f32(up)
}

/// silu(g) of a gate that [`is_ordinary`].
#[inline(always)]
pub(crate) fn silu_ordinary(gate: bf16) -> f32 {
    let gate = bf16_to_f32(gate);
    let divisor = 1.0 + math::exp_within(-gate);
    divided(gate, divisor, math::reciprocal_approx(divisor))
}

/// a / b, where `reciprocal` is close to 1 / b: a Newton step, then the quotient and its correction by what it leaves (Markstein
/// 1990, doi 10.1147/rd.341.0111). There are only 2 * 3233 ordinary gates; the test below tries all.
#[inline(always)]
fn divided(a: f32, b: f32, reciprocal: f32) -> f32 {
    let reciprocal = math::fma(math::fma(-b, reciprocal, 1.0), reciprocal, reciprocal);
    let quotient = a * reciprocal;
    math::fma(math::fma(-b, quotient, a), reciprocal, quotient)
}

/// out\[t, f\] = silu(x\[t, f\]) * x\[t, F + f\], rounded to bf16 once, at the end.
///
/// - `x`: bf16 \[T, 2 F\], gate then up; `out`: bf16 \[T, F\].
/// - grid (ceil(F / 1024), T); a thread makes 4 consecutive elements.
/// - bytes: 6 per element of `out`.
/// - the caller: `width` = F is a multiple of 4, addresses are multiples of 8.
#[kernel(block = 256)]
pub fn silu_mul(x: In<bf16>, out: Out<bf16>, width: u32) {
    let column = thread::index_1d() as usize * 4;
    let width = width as usize;
    thread::allow_successor();
    thread::wait_for_predecessors();
    if column < width {
        let row = thread::block_idx_y() as usize;
        let [g0, g1, g2, g3]: [bf16; 4] = x.load(row * 2 * width + column);
        let [u0, u1, u2, u3]: [bf16; 4] = x.load(row * 2 * width + width + column);
        out.store(
            row * width + column,
            [
                f32_to_bf16(gated(g0, u0)),
                f32_to_bf16(gated(g1, u1)),
                f32_to_bf16(gated(g2, u2)),
                f32_to_bf16(gated(g3, u3)),
            ],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_gate_is_divided_exactly_however_far_its_reciprocal_is_off() {
        let mut gates = 0;
        for gate in (0..=u16::MAX).map(bf16::from_bits).filter(|&gate| is_ordinary(gate)) {
            let magnitude = bf16_to_f32(gate).abs();
            assert!((2.0f32.powi(-20)..=40.0).contains(&magnitude));
            gates += 1;
            let gate = bf16_to_f32(gate);
            let divisor = 1.0 + math::exp(-gate);
            let nearest = (1.0 / divisor).to_bits();
            for off in -3i32..=3 {
                let reciprocal = f32::from_bits(nearest.wrapping_add_signed(off));
                assert_eq!(divided(gate, divisor, reciprocal).to_bits(), (gate / divisor).to_bits(), "{gate}, {off}");
            }
            let (gate, up) = (bf16::from_f32(gate), bf16::from_f32(-0.3));
            assert_eq!(gated_ordinary(gate, up).to_bits(), gated(gate, up).to_bits());
        }
        assert_eq!(gates, 2 * 3233);
        assert!(!is_ordinary(bf16::ZERO) && !is_ordinary(bf16::NAN) && !is_ordinary(bf16::INFINITY));
        // A reciprocal that is far off shows.
        assert_ne!(divided(1.0, 3.0, 0.3), 1.0 / 3.0);
    }
}
