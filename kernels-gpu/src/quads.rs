//! Reading rows of logits four at a time, many loads at once: a thread that waits for one load after the other reads a small
//! part of what the memory can give.

use cuda_std::prelude::*;

/// `N` times four logits, from the ids `first(0)`, `first(1)`, ... on, each a multiple of 4; negative infinity beyond the row.
/// All loads are on their way before the first is waited for. Rows whose length is no multiple of 4 are read one by one.
///
/// The caller: `start` is the row's first element, and a multiple of 16 bytes where `vocab` is a multiple of 4.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load<const N: usize>(
    logits: &In<f32>,
    start: usize,
    vocab: usize,
    first: impl Fn(usize) -> usize,
) -> [[f32; 4]; N] {
    let mut quads = [[f32::NEG_INFINITY; 4]; N];
    if vocab.is_multiple_of(4) {
        logits.check(start, vocab);
        for i in 0..N {
            let id = first(i);
            // SAFETY: the row was checked just above; beyond it its last four are read, and then forgotten.
            quads[i] = unsafe { logits.load_unchecked(start + if id < vocab { id } else { vocab - 4 }) };
        }
        for i in 0..N {
            if first(i) >= vocab {
                quads[i] = [f32::NEG_INFINITY; 4];
            }
        }
    } else {
        for i in 0..N {
            let id = first(i);
            for j in 0..4 {
                if id + j < vocab {
                    quads[i][j] = logits.get(start + id + j);
                }
            }
        }
    }
    quads
}
