//! Looks up the rows of the embedding table that belong to token ids.

use cuda_std::prelude::*;

/// out\[t\] = table\[ids\[t\]\].
///
/// - `ids`: u32 \[T\]; `table`: bf16 \[V, C\]; `out`: f32 \[T, C\], the start of the residual stream (exact, no rounding).
/// - a block copies one row; a thread 8 consecutive elements at a time.
/// - bytes: 6 per element of `out`.
/// - the caller: `width` = C is a multiple of 8; every id is below V (one that is not ends the launch with a fault), or
///   `u32::MAX`, of which the row is zeros: a step that is computed ahead may stand behind a row that chose nothing.
///
/// It is the fence between two steps, and therefore neither waits for its predecessors by itself nor lets its successor start
/// early: it starts when everything before it has ended, and what is behind it starts when it has ended. So the kernels of a
/// step may read the step's indices, and the pages that earlier steps wrote, before they wait.
#[kernel(block = 128)]
pub fn embedding(ids: In<u32>, table: In<bf16>, out: Out<f32>, width: u32) {
    let row = thread::block_idx_x() as usize;
    let width = width as usize;
    let id = ids.get(row);
    if id == u32::MAX {
        let mut column = thread::thread_idx_x() as usize * 4;
        while column < width {
            out.store(row * width + column, [0.0f32; 4]);
            column += 128 * 4;
        }
        return;
    }
    let source = id as usize * width;
    let mut column = thread::thread_idx_x() as usize * 8;
    while column < width {
        let values: [bf16; 8] = table.load(source + column);
        let to = row * width + column;
        out.store(to, [bf16_to_f32(values[0]), bf16_to_f32(values[1]), bf16_to_f32(values[2]), bf16_to_f32(values[3])]);
        out.store(
            to + 4,
            [bf16_to_f32(values[4]), bf16_to_f32(values[5]), bf16_to_f32(values[6]), bf16_to_f32(values[7])],
        );
        column += 128 * 8;
    }
}
