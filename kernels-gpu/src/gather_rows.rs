//! Copies chosen rows of the residual stream: those whose logits somebody needs.

use cuda_std::prelude::*;

/// out\[r\] = x\[rows\[r\]\].
///
/// - `x`: f32 \[T, C\]; `rows`: u32 \[R\]; `out`: f32 \[R, C\].
/// - a block copies one row; a thread 4 consecutive elements at a time.
/// - bytes: 8 per element of `out`.
/// - the caller: `width` = C is a multiple of 4; every row is below T.
#[kernel(block = 128)]
pub fn gather_rows(x: In<f32>, rows: In<u32>, out: Out<f32>, width: u32) {
    let row = thread::block_idx_x() as usize;
    let width = width as usize;
    thread::allow_successor();
    thread::wait_for_predecessors();
    let source = rows.get(row) as usize * width;
    let mut column = thread::thread_idx_x() as usize * 4;
    while column < width {
        out.store::<4>(row * width + column, x.load(source + column));
        column += 128 * 4;
    }
}
