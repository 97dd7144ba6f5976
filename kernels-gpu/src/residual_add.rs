//! Adds a layer's output to the residual stream.

use cuda_std::prelude::*;

/// residual\[i\] += x\[i\].
///
/// - `residual`, `x`: f32, the same length.
/// - a thread adds 4 consecutive elements; the grid covers the length.
/// - bytes: 12 per element.
/// - the caller: equal lengths, a multiple of 4, addresses multiples of 16.
#[kernel(block = 256)]
pub fn residual_add(residual: InOut<f32>, x: In<f32>) {
    let index = thread::index_1d() as usize * 4;
    thread::allow_successor();
    thread::wait_for_predecessors();
    if index < residual.len() {
        let [a, b, c, d]: [f32; 4] = residual.load(index);
        let [e, f, g, h]: [f32; 4] = x.load(index);
        residual.store(index, [a + e, b + f, c + g, d + h]);
    }
}
