//! Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467).

use cuda_std::prelude::*;

/// Threads that take part in the reduction: part of the definition, see [`rms_norm()`].
pub const REDUCTION_LANES: usize = 128;

/// Elements that all lanes take at once.
const TURN: usize = REDUCTION_LANES * 8;

/// Turns whose elements stay in registers between the two passes: rows of up to 2048 elements are read once. Twice as many
/// would halve the blocks that a multiprocessor has at once, which a prefill of narrower rows needs.
const KEPT: usize = 2;

/// Eight consecutive elements.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn eight(load: impl Fn(usize) -> [f32; 4], index: usize) -> [f32; 8] {
    let [a, b, c, d] = load(index);
    let [e, f, g, h] = load(index + 4);
    [a, b, c, d, e, f, g, h]
}

/// A block's row, whose elements come from `PARTS` places: `load` reads eight of each place from a column on, `settle` makes
/// the row's elements of them, once each, and `again` reads those a second time where they were not kept. All loads of the
/// kept turns are under way before the first value is used. The gains are weights, and are read while the predecessors run.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn normalise<const PARTS: usize>(
    warp_sums: Shared<f32>,
    gain: In<bf16>,
    out: Out<bf16>,
    width: usize,
    eps: f32,
    load: impl Fn(usize) -> [[f32; 8]; PARTS],
    settle: impl Fn(usize, [[f32; 8]; PARTS]) -> [f32; 8],
    again: impl Fn(usize) -> [f32; 8],
) {
    let thread = thread::thread_idx_x() as usize;
    let row = thread::block_idx_x() as usize * width;
    let column = |turn: usize| turn * TURN + thread * 8;

    let mut gains = [[bf16::ZERO; 8]; KEPT];
    for turn in 0..KEPT {
        if column(turn) < width {
            gains[turn] = gain.load(column(turn));
        }
    }
    thread::wait_for_predecessors();
    let mut loaded = [[[0.0f32; 8]; PARTS]; KEPT];
    for turn in 0..KEPT {
        if column(turn) < width {
            loaded[turn] = load(column(turn));
        }
    }
    let mut sum = 0.0;
    let mut kept = [[0.0f32; 8]; KEPT];
    for turn in 0..KEPT {
        if column(turn) < width {
            kept[turn] = settle(column(turn), loaded[turn]);
            for value in kept[turn] {
                sum = math::fma(value, value, sum);
            }
        }
    }
    let mut turn = KEPT;
    while column(turn) < width {
        for value in settle(column(turn), load(column(turn))) {
            sum = math::fma(value, value, sum);
        }
        turn += 1;
    }

    let sum = warp::sum_f32(sum);
    if thread::lane_id() == 0 {
        warp_sums.set(thread::warp_id() as usize, sum);
    }
    thread::sync_threads();
    let [a, b, c, d]: [f32; 4] = warp_sums.load(0);
    let scale = 1.0 / math::sqrt(((a + b) + (c + d)) / width as f32 + eps);

    let store = |column: usize, values: [f32; 8], gains: [bf16; 8]| {
        let mut normed = [bf16::ZERO; 8];
        for index in 0..8 {
            normed[index] = f32_to_bf16(values[index] * scale * bf16_to_f32(gains[index]));
        }
        out.store(row + column, normed);
    };
    for turn in 0..KEPT {
        if column(turn) < width {
            store(column(turn), kept[turn], gains[turn]);
        }
    }
    let mut turn = KEPT;
    while column(turn) < width {
        store(column(turn), again(column(turn)), gain.load(column(turn)));
        turn += 1;
    }
}

/// out\[t, c\] = x\[t, c\] / sqrt(mean_c(x\[t, c\]^2) + eps) * weight\[c\], rounded to bf16 once, at the end.
///
/// - `x`: f32 \[T, C\]; `weight`: bf16 \[C\]; `out`: bf16 \[T, C\].
/// - a block does one row. The sum of squares has one fixed tree, whatever the device or a fusion: lane t of 128 adds
///   the squares of the elements c with (c / 8) mod 128 = t by fused multiply-add in order of c; the 32 lanes of a warp
///   are added at distances 16, 8, 4, 2, 1; then (w0 + w1) + (w2 + w3).
/// - bytes: 6 per element (beyond 2048 of a row a second read comes from cache).
/// - the caller: `width` = C is a multiple of 8, addresses are multiples of 16. `weight` is read before the kernels ahead
///   have ended.
#[kernel(block = 128)]
pub fn rms_norm(x: In<f32>, weight: In<bf16>, out: Out<bf16>, width: u32, eps: f32) {
    let warp_sums = shared_array!(f32, 4);
    let width = width as usize;
    let row = thread::block_idx_x() as usize * width;
    thread::allow_successor();
    let load = |column: usize| eight(|index| x.load(index), row + column);
    normalise::<1>(warp_sums, weight, out, width, eps, |column| [load(column)], |_, [values]| values, load);
}
