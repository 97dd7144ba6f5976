//! Copies few words, between kernels: there a copy of the driver's takes longer than the kernel that does the same.

use cuda_std::prelude::*;

/// Threads of a block.
pub const THREADS: u32 = 256;

/// to\[i\] = from\[i\].
///
/// - `from`, `to`: u32 \[N\].
/// - grid ceil(N / 256); a thread copies one word.
/// - bytes: 8 per word.
#[kernel(block = 256)]
pub fn copy_words(from: In<u32>, to: Out<u32>) {
    let place = thread::index_1d() as usize;
    thread::allow_successor();
    thread::wait_for_predecessors();
    if place < to.len() {
        to.set(place, from.get(place));
    }
}
