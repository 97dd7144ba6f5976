//! Adds a layer's output to the residual stream and normalises what comes of it, for the next layer.

use cuda_std::prelude::*;

use crate::rms_norm::{eight, normalise};

/// `PLACES` are the residual and the parts.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn add_and_normalise<const PLACES: usize>(
    warp_sums: Shared<f32>,
    residual: InOut<f32>,
    parts: In<f32>,
    weight: In<bf16>,
    out: Out<bf16>,
    width: usize,
    eps: f32,
) {
    let (row, len) = (thread::block_idx_x() as usize * width, residual.len());
    thread::allow_successor();
    let load = |column: usize| eight(|index| residual.load(index), row + column);
    normalise::<PLACES>(
        warp_sums,
        weight,
        out,
        width,
        eps,
        |column| {
            let mut loaded = [[0.0f32; 8]; PLACES];
            loaded[0] = load(column);
            for place in 1..PLACES {
                loaded[place] = eight(|index| parts.load(index), (place - 1) * len + row + column);
            }
            loaded
        },
        |column, loaded| {
            let mut sum = loaded[1];
            for place in 2..PLACES {
                for index in 0..8 {
                    sum[index] += loaded[place][index];
                }
            }
            for index in 0..8 {
                sum[index] += loaded[0][index];
            }
            let [a, b, c, d, e, f, g, h] = sum;
            residual.store(row + column, [a, b, c, d]);
            residual.store(row + column + 4, [e, f, g, h]);
            sum
        },
        load,
    );
}

macro_rules! residual_norm {
    ($name:ident, $places:literal) => {
        /// residual\[t, c\] += the parts\[s, t, c\], added in order of s before; out = the normalised residual: the bits of
        /// [`crate::residual_add`] with as many parts followed by [`crate::rms_norm`].
        ///
        /// - `residual`: f32 \[T, C\]; `parts`: f32 \[S, T, C\] with S in the name, or 1; `weight`: bf16 \[C\]; `out`:
        ///   bf16 \[T, C\].
        /// - a block does one row, with the reduction tree of [`crate::rms_norm`].
        /// - bytes: 10 + 4 S per element, where the two kernels move 14 + 4 S.
        /// - the caller: `width` = C is a multiple of 8, addresses are multiples of 16. `weight` is read before the kernels
        ///   ahead have ended.
        #[kernel(block = 128)]
        pub fn $name(residual: InOut<f32>, parts: In<f32>, weight: In<bf16>, out: Out<bf16>, width: u32, eps: f32) {
            let warp_sums = shared_array!(f32, 4);
            add_and_normalise::<$places>(warp_sums, residual, parts, weight, out, width as usize, eps);
        }
    };
}
residual_norm!(residual_norm, 2);
residual_norm!(residual_norm_2, 3);
residual_norm!(residual_norm_4, 5);
