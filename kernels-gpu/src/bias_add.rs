//! Adds a bias to every row of a linear layer's output.

use cuda_std::prelude::*;

/// x\[t, n\] += bias\[n\], in f32.
///
/// Models launch [`crate::rotary_kv_write`], which gives these bits; this is the definition that tests compare it with.
///
/// - `x`: f32 \[T, N\]; `bias`: bf16 \[N\].
/// - grid (ceil(N / 1024), T); a thread adds 4 consecutive elements.
/// - bytes: 8 per element.
/// - the caller: `width` = N is a multiple of 4, addresses are multiples of 16.
#[kernel(block = 256)]
pub fn bias_add(x: InOut<f32>, bias: In<bf16>, width: u32) {
    let column = thread::index_1d() as usize * 4;
    let width = width as usize;
    if column < width {
        let index = thread::block_idx_y() as usize * width + column;
        let [a, b, c, d]: [f32; 4] = x.load(index);
        let [e, f, g, h]: [bf16; 4] = bias.load(column);
        x.store(index, [a + bf16_to_f32(e), b + bf16_to_f32(f), c + bf16_to_f32(g), d + bf16_to_f32(h)]);
    }
}
