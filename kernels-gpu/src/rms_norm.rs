//! Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467).

use cuda_std::prelude::*;

/// Threads that take part in the reduction: part of the definition, see [`rms_norm()`].
pub const REDUCTION_LANES: usize = 128;

/// out\[t, c\] = x\[t, c\] / sqrt(mean_c(x\[t, c\]^2) + eps) * weight\[c\], rounded to bf16 once, at the end.
///
/// - `x`: f32 \[T, C\]; `weight`: bf16 \[C\]; `out`: bf16 \[T, C\].
/// - a block does one row. The sum of squares has one fixed tree, whatever the device or a fusion: lane t of 128 adds
///   the squares of the elements c with (c / 8) mod 128 = t by fused multiply-add in order of c; the 32 lanes of a warp
///   are added at distances 16, 8, 4, 2, 1; then (w0 + w1) + (w2 + w3).
/// - bytes: 6 per element (the second read of x comes from cache).
/// - the caller: `width` = C is a multiple of 8, addresses are multiples of 16.
#[kernel(block = 128)]
pub fn rms_norm(x: In<f32>, weight: In<bf16>, out: Out<bf16>, width: u32, eps: f32) {
    let warp_sums = shared_array!(f32, 4);
    let thread = thread::thread_idx_x() as usize;
    let width = width as usize;
    let row = thread::block_idx_x() as usize * width;

    let mut sum = 0.0;
    let mut column = thread * 8;
    while column < width {
        let low: [f32; 4] = x.load(row + column);
        let high: [f32; 4] = x.load(row + column + 4);
        for value in low {
            sum = math::fma(value, value, sum);
        }
        for value in high {
            sum = math::fma(value, value, sum);
        }
        column += REDUCTION_LANES * 8;
    }
    let sum = warp::sum_f32(sum);
    if thread::lane_id() == 0 {
        warp_sums.set(thread::warp_id() as usize, sum);
    }
    thread::sync_threads();
    let [a, b, c, d]: [f32; 4] = warp_sums.load(0);
    let scale = 1.0 / math::sqrt(((a + b) + (c + d)) / width as f32 + eps);

    let mut column = thread * 8;
    while column < width {
        let low: [f32; 4] = x.load(row + column);
        let high: [f32; 4] = x.load(row + column + 4);
        let gain: [bf16; 8] = weight.load(column);
        let normed = |index: usize, value: f32| value * scale * bf16_to_f32(gain[index]);
        out.store(
            row + column,
            [
                f32_to_bf16(normed(0, low[0])),
                f32_to_bf16(normed(1, low[1])),
                f32_to_bf16(normed(2, low[2])),
                f32_to_bf16(normed(3, low[3])),
                f32_to_bf16(normed(4, high[0])),
                f32_to_bf16(normed(5, high[1])),
                f32_to_bf16(normed(6, high[2])),
                f32_to_bf16(normed(7, high[3])),
            ],
        );
        column += REDUCTION_LANES * 8;
    }
}
