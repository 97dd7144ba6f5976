//! The one definition of attention, which the prefill and the decode kernel both meet bit for bit.
//!
//! The context is cut into spans of [`SPAN`] tokens at absolute positions. For a query and a span:
//!
//! 1. scores: q k, a chain of k16 tensor-core products over the head width from 0; times `scale` = log2(e) / sqrt(D),
//!    rounded to f32 ([`scores`], [`scale`]);
//! 2. the maximum over the span's visible tokens ([`maximum`]);
//! 3. p = 2^(score - maximum), 0 for tokens that are not visible, rounded to bf16 ([`probabilities`]);
//! 4. the sum of p: lane t of four adds the tokens j with (j mod 8) / 2 = t in order of j; then (s0 + s1) + (s2 + s3)
//!    ([`sum`]);
//! 5. output: p V, a chain of k16 tensor-core products over the span's tokens from 0 ([`output`]).
//!
//! Spans are merged from the first to the last ([`Merged::add`]), and the merged output is multiplied by 1 / sum and
//! rounded to bf16. A token that is not visible or not there contributes exact zeros, so a span gives the same bits
//! whether it is half filled or half masked. Rows of a tile never touch each other.
//!
//! A warp has 16 rows; a lane holds rows g and g + 8 (g = lane / 4), of scores the tokens 8n + 2t and 8n + 2t + 1 of tile n
//! (t = lane mod 4): the layout of a tensor-core result, and of the operand that the next product takes. Every function
//! here is called by whole warps.

use cuda_std::prelude::*;

/// Tokens in a span. With 64, a context of 4096 gives one sequence's decode step enough blocks to fill a large GPU, and a
/// warp's tile of scores still fits its registers.
pub const SPAN: usize = 64;

/// Tiles of 8 tokens in a span.
pub const TOKEN_TILES: usize = SPAN / 8;

/// Steps of 16 tokens in a span.
pub const TOKEN_STEPS: usize = SPAN / 16;

/// Elements after each row of a tile in shared memory: they put the eight rows that `ldmatrix` reads at once into
/// different banks.
pub const PAD: usize = 8;

/// The products of `ROWS` times 16 queries with `N` tiles of 8 keys. `STEPS` = D / 16.
///
/// - `queries(r, s)`: rows 16 r to 16 r + 15 as the 16-row operand, columns 16 s to 16 s + 15.
/// - `keys(m, s)`: tiles 2m and 2m + 1 as 8-column operands, elements 16 s to 16 s + 15.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn scores<const STEPS: usize, const N: usize, const ROWS: usize>(
    queries: impl Fn(usize, usize) -> [u32; 4],
    keys: impl Fn(usize, usize) -> [[u32; 2]; 2],
) -> [[[f32; 4]; N]; ROWS] {
    let mut scores = [[[0.0f32; 4]; N]; ROWS];
    for s in 0..STEPS {
        let mut query = [[0; 4]; ROWS];
        for r in 0..ROWS {
            query[r] = queries(r, s);
        }
        for pair in 0..N / 2 {
            let [even, odd] = keys(pair, s);
            for r in 0..ROWS {
                scores[r][pair * 2] = mma::m16n8k16_bf16(query[r], even, scores[r][pair * 2]);
                scores[r][pair * 2 + 1] = mma::m16n8k16_bf16(query[r], odd, scores[r][pair * 2 + 1]);
            }
        }
    }
    scores
}

/// Scales products, and takes tokens away that a row does not see: of the first tile's first token on, each of the lane's
/// rows sees `visible`. With none, both see all.
#[inline(always)]
pub fn scale<const N: usize>(scores: &mut [[f32; 4]; N], scale: f32, visible: Option<[u32; 2]>) {
    let t = thread::lane_id() % 4;
    for n in 0..N {
        for element in 0..4 {
            scores[n][element] *= scale;
        }
    }
    if let Some(visible) = visible {
        for n in 0..N {
            for element in 0..4 {
                let token = n as u32 * 8 + t * 2 + element as u32 % 2;
                if token >= visible[element / 2] {
                    scores[n][element] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// The largest of these scores of each row; negative infinity where none is visible. (`f32::max` is one instruction, unlike
/// `math::max`; it may take either of two zeros, which no probability shows.)
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn maximum<const N: usize>(scores: &[[f32; 4]; N]) -> [f32; 2] {
    // With many scores in four chains rather than two: each link waits for the one before.
    let mut most = [f32::NEG_INFINITY; 4];
    for n in 0..N {
        for element in 0..4 {
            let chain = if N < 4 { element / 2 * 2 } else { element };
            most[chain] = most[chain].max(scores[n][element]);
        }
    }
    let mut max = if N < 4 { [most[0], most[2]] } else { [most[0].max(most[1]), most[2].max(most[3])] };
    for row in 0..2 {
        max[row] = max[row].max(warp::shuffle_xor_f32(max[row], 1));
        max[row] = max[row].max(warp::shuffle_xor_f32(max[row], 2));
    }
    max
}

/// Probabilities relative to the span's maximum, as operands: of tile n the pair of row g, then of row g + 8.
#[inline(always)]
#[must_use]
pub fn probabilities<const N: usize>(scores: &[[f32; 4]; N], max: [f32; 2]) -> [[u32; 2]; N] {
    probabilities_of(scores, max, 16)
}

/// [`probabilities`] of the first `rows` of 16 rows; those of further ones are 0 where `rows` is at most 8, else any.
#[inline(always)]
#[must_use]
pub fn probabilities_of<const N: usize>(scores: &[[f32; 4]; N], max: [f32; 2], rows: usize) -> [[u32; 2]; N] {
    let base = base(max);
    let mut pairs = [[0u32; 2]; N];
    for row in 0..2 {
        if row == 1 && rows <= 8 {
            continue;
        }
        for n in 0..N {
            pairs[n][row] = probability_pair([scores[n][row * 2], scores[n][row * 2 + 1]], base[row]);
        }
    }
    pairs
}

/// What the probabilities of rows with these maxima are relative to. Where no token is visible every score is negative
/// infinity: 0 is subtracted instead, so that p is 0, not NaN.
#[inline(always)]
#[must_use]
pub fn base(max: [f32; 2]) -> [f32; 2] {
    max.map(|max| if max == f32::NEG_INFINITY { 0.0 } else { max })
}

/// The probabilities of two neighbours, for which [`base`] stands.
#[inline(always)]
#[must_use]
pub fn probability_pair(scores: [f32; 2], base: f32) -> u32 {
    let [low, high] = scores.map(|score| math::exp2_of_negative(score - base));
    bf16_pair(low, high)
}

/// The sum of the whole span's probabilities of each row.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sum(pairs: &[[u32; 2]; TOKEN_TILES]) -> [f32; 2] {
    let mut sum = [0.0f32; 2];
    for n in 0..TOKEN_TILES {
        for row in 0..2 {
            sum[row] = add_pair(sum[row], pairs[n][row]);
        }
    }
    sum_of_lanes(sum)
}

/// A lane's sum with two further probabilities.
#[inline(always)]
#[must_use]
pub fn add_pair(sum: f32, pair: u32) -> f32 {
    let (low, high) = unpack_bf16_pair(pair);
    sum + low + high
}

/// The sums of the rows from those of their lanes.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sum_of_lanes(mut sum: [f32; 2]) -> [f32; 2] {
    for row in 0..2 {
        sum[row] += warp::shuffle_xor_f32(sum[row], 1);
        sum[row] += warp::shuffle_xor_f32(sum[row], 2);
    }
    sum
}

/// Probabilities times 8 columns of the values: `values[s]` are tokens 16 s to 16 s + 15 as an 8-column operand, zero for
/// tokens that are not there.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn output(pairs: &[[u32; 2]; TOKEN_TILES], values: [[u32; 2]; TOKEN_STEPS]) -> [f32; 4] {
    let mut out = [0.0f32; 4];
    for s in 0..TOKEN_STEPS {
        let (low, high) = (pairs[2 * s], pairs[2 * s + 1]);
        out = mma::m16n8k16_bf16([low[0], low[1], high[0], high[1]], values[s], out);
    }
    out
}

/// The factors that bring what is merged so far and a further span to their common maximum.
#[derive(Clone, Copy)]
pub struct Rescale {
    /// For what is merged so far.
    pub before: f32,
    /// For the span.
    pub span: f32,
}

impl Rescale {
    /// The factors for a span with maximum `max`, where it was `before` and is `common` with it. A span without visible
    /// tokens changes nothing.
    #[inline(always)]
    #[must_use]
    pub fn new(before: f32, max: f32, common: f32) -> Self {
        if max == f32::NEG_INFINITY {
            // The product with the span's zeros is -0, which leaves even a -0 as it is.
            return Self { before: 1.0, span: -0.0 };
        }
        // One of the two is the common maximum, whose factor is 2^0 = 1.
        let smaller = math::exp2_of_negative(before.min(max) - common);
        if max > before { Self { before: smaller, span: 1.0 } } else { Self { before: 1.0, span: smaller } }
    }
}

/// One row's maximum and sum over the spans merged so far.
#[derive(Clone, Copy)]
pub struct Merged {
    /// The largest score.
    pub max: f32,
    /// The sum of the probabilities relative to it.
    pub sum: f32,
}

impl Merged {
    /// Nothing merged.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Merges a span, and returns the factors for [`combine`].
    #[inline(always)]
    pub fn add(&mut self, max: f32, sum: f32) -> Rescale {
        let common = self.max.max(max);
        let rescale = Rescale::new(self.max, max, common);
        self.max = common;
        self.sum = combine(rescale, self.sum, sum);
        rescale
    }
}

/// `before * rescale.before + span * rescale.span`: the product with the span's factor is rounded first.
#[inline(always)]
#[must_use]
pub fn combine(rescale: Rescale, before: f32, span: f32) -> f32 {
    math::fma(before, rescale.before, span * rescale.span)
}
