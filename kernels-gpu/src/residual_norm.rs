//! Adds a layer's output to the residual stream and normalises what comes of it, for the next layer.

use cuda_std::prelude::*;

use crate::rms_norm::{eight, normalise};

/// residual\[t, c\] += delta\[t, c\]; out = the normalised residual: the bits of [`crate::residual_add`] followed by
/// [`crate::rms_norm`].
///
/// - `residual`, `delta`: f32 \[T, C\]; `weight`: bf16 \[C\]; `out`: bf16 \[T, C\].
/// - a block does one row, with the reduction tree of [`crate::rms_norm`].
/// - bytes: 14 per element, where the two kernels move 18.
/// - the caller: `width` = C is a multiple of 8, addresses are multiples of 16. `weight` is read before the kernels ahead
///   have ended.
#[kernel(block = 128)]
pub fn residual_norm(residual: InOut<f32>, delta: In<f32>, weight: In<bf16>, out: Out<bf16>, width: u32, eps: f32) {
    let warp_sums = shared_array!(f32, 4);
    let width = width as usize;
    let row = thread::block_idx_x() as usize * width;
    thread::allow_successor();
    let load = |column: usize| eight(|index| residual.load(index), row + column);
    normalise::<2>(
        warp_sums,
        weight,
        out,
        width,
        eps,
        |column| [load(column), eight(|index| delta.load(index), row + column)],
        |column, [before, delta]| {
            let mut sum = [0.0f32; 8];
            for index in 0..8 {
                sum[index] = before[index] + delta[index];
            }
            let [a, b, c, d, e, f, g, h] = sum;
            residual.store(row + column, [a, b, c, d]);
            residual.store(row + column + 4, [e, f, g, h]);
            sum
        },
        load,
    );
}
