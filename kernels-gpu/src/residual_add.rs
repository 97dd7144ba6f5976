//! Adds a layer's output to the residual stream.

use cuda_std::prelude::*;

#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn add<const PARTS: usize>(residual: InOut<f32>, parts: In<f32>) {
    let index = thread::index_1d() as usize * 4;
    thread::allow_successor();
    thread::wait_for_predecessors();
    let len = residual.len();
    if index < len {
        // All loads are under way before the first sum.
        let before: [f32; 4] = residual.load(index);
        let mut loaded = [[0.0f32; 4]; PARTS];
        for part in 0..PARTS {
            loaded[part] = parts.load(part * len + index);
        }
        let mut sums = loaded[0];
        for part in 1..PARTS {
            for element in 0..4 {
                sums[element] += loaded[part][element];
            }
        }
        for element in 0..4 {
            sums[element] += before[element];
        }
        residual.store(index, sums);
    }
}

/// residual\[i\] += parts\[i\].
///
/// - `residual`, `parts`: f32, the same length.
/// - a thread adds 4 consecutive elements; the grid covers the length.
/// - bytes: 12 per element.
/// - the caller: equal lengths, a multiple of 4, addresses multiples of 16.
#[kernel(block = 256)]
pub fn residual_add(residual: InOut<f32>, parts: In<f32>) {
    add::<1>(residual, parts);
}

macro_rules! residual_add_parts {
    ($name:ident, $parts:literal) => {
        /// residual\[i\] += the sum of the parts at i, added in order before they are added to the residual: a layer whose
        /// K is in this many segments (see [`crate::linear`]).
        ///
        /// - `residual`: f32; `parts`: f32, as many arrays of that length, one after the other.
        /// - a thread adds 4 consecutive elements; the grid covers the length.
        /// - bytes: 8 per element, and 4 per part.
        /// - the caller: lengths as above, a multiple of 4, addresses multiples of 16.
        #[kernel(block = 256)]
        pub fn $name(residual: InOut<f32>, parts: In<f32>) {
            add::<$parts>(residual, parts);
        }
    };
}
residual_add_parts!(residual_add_2, 2);
residual_add_parts!(residual_add_4, 4);
