//! The gate of a feed-forward layer: SiLU of one half times the other (SwiGLU, Shazeer 2020, arXiv 2002.05202).

use cuda_std::prelude::*;

/// silu(g) * u with silu(g) = g / (1 + e^-g), in f32.
#[inline(always)]
pub(crate) fn gated(gate: bf16, up: bf16) -> f32 {
    let gate = bf16_to_f32(gate);
    gate / (1.0 + math::exp(-gate)) * bf16_to_f32(up)
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
