//! Counts the elements of two buffers whose bits differ: what the self-test compares results with, without moving them.

use cuda_std::prelude::*;

/// Adds the lane's count to `count[0]`, one atomic addition per warp.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn add(count: InOut<u32>, differing: u32) {
    let sum = warp::sum_u32(differing);
    if thread::lane_id() == 0 && sum > 0 {
        count.atomic_add(0, sum);
    }
}

/// count\[0\] += the number of i with bits of a\[i\] and b\[i\] not equal.
///
/// - `a`, `b`: f32, the same length; `count`: u32 \[1\].
/// - any grid; a thread compares every (grid x 256)-th element.
/// - bytes: 8 per element.
/// - the caller: equal lengths below 2^32.
#[kernel(block = 256)]
pub fn differing_f32(a: In<f32>, b: In<f32>, count: InOut<u32>) {
    let stride = thread::grid_dim_x() as usize * 256;
    let mut index = thread::index_1d() as usize;
    let mut differing = 0;
    while index < a.len() {
        differing += u32::from(a.get(index).to_bits() != b.get(index).to_bits());
        index += stride;
    }
    add(count, differing);
}

/// [`differing_f32()`] for bf16.
#[kernel(block = 256)]
pub fn differing_bf16(a: In<bf16>, b: In<bf16>, count: InOut<u32>) {
    let stride = thread::grid_dim_x() as usize * 256;
    let mut index = thread::index_1d() as usize;
    let mut differing = 0;
    while index < a.len() {
        differing += u32::from(a.get(index).to_bits() != b.get(index).to_bits());
        index += stride;
    }
    add(count, differing);
}
