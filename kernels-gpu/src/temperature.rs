//! Divides logits by each row's temperature.

use cuda_std::prelude::*;

/// logits\[r, v\] /= temperatures\[r\]; rows whose temperature is 0 (greedy) stay as they are.
///
/// - `logits`: f32 \[R, V\]; `temperatures`: f32 \[R\], finite and not negative.
/// - grid (ceil(V / 256), R); a thread divides one element.
/// - bytes: 8 per element.
/// - the caller: `vocab` = V.
#[kernel(block = 256)]
pub fn temperature(logits: InOut<f32>, temperatures: In<f32>, vocab: u32) {
    let token = thread::index_1d() as usize;
    let row = thread::block_idx_y() as usize;
    let divisor = temperatures.get(row);
    if token < vocab as usize && divisor > 0.0 {
        let index = row * vocab as usize + token;
        logits.set(index, logits.get(index) / divisor);
    }
}
