//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

use cuda_std::prelude::*;

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// i and i + D/2: GPT-NeoX's, which Hugging Face checkpoints of Qwen2 and Llama use.
    Halves,
    /// 2i and 2i + 1: the paper's, which original Llama weights and some GGUF files use.
    Adjacent,
}

/// Rotates the first `heads` heads of each row in place by the angle of the row's position:
/// (a, b) becomes (a cos - b sin, b cos + a sin) for each pair.
///
/// Models launch [`crate::rotary_kv_write`], which gives these bits; this is the definition that tests compare it with.
///
/// - `x`: f32 \[T, stride\], heads of width D from column 0 on (queries, then keys); `positions`: u32 \[T\];
///   `table`: f32 \[positions, D/2, 2\], cosine then sine.
/// - grid (ceil(heads D/2 / 128), T); a thread rotates one pair.
/// - bytes: 16 per pair, and 8 of the table.
/// - the caller: `half` = D/2; `adjacent` is 1 for [`Pairing::Adjacent`], else 0; positions are inside the table, or `u32::MAX` for a row that is padding and
///   stays as it is.
#[kernel(block = 128)]
pub fn rotary(x: InOut<f32>, positions: In<u32>, table: In<f32>, stride: u32, heads: u32, half: u32, adjacent: u32) {
    let pair = thread::index_1d() as usize;
    let half = half as usize;
    let row = thread::block_idx_y() as usize;
    let position = positions.get(row);
    if pair < heads as usize * half && position != u32::MAX {
        let (head, i) = (pair / half, pair % half);
        let start = row * stride as usize + head * 2 * half;
        let (first, second) =
            if adjacent != 0 { (start + 2 * i, start + 2 * i + 1) } else { (start + i, start + i + half) };
        let [cos, sin]: [f32; 2] = table.load((position as usize * half + i) * 2);
        let (a, b) = (x.get(first), x.get(second));
        x.set(first, math::fma(a, cos, -(b * sin)));
        x.set(second, math::fma(b, cos, a * sin));
    }
}
