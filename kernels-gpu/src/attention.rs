//! The one definition of attention, which the prefill and the decode kernel both meet bit for bit.
//!
//! The context is cut into spans of [`SPAN`] tokens at absolute positions. For a query and a span:
//!
//! 1. scores: q k, a chain of k16 tensor-core products over the head width from 0; times `scale` = log2(e) / sqrt(D),
//!    rounded to f32;
//! 2. the maximum over the span's visible tokens;
//! 3. p = 2^(score - maximum), 0 for tokens that are not visible, rounded to bf16;
//! 4. the sum of p: lane t of four adds the tokens j with (j mod 8) / 2 = t in order of j; then (s0 + s1) + (s2 + s3);
//! 5. output: p V, a chain of k16 tensor-core products over the span's tokens from 0.
//!
//! Spans are merged from the first to the last ([`Merged::add`]), and the merged output is multiplied by 1 / sum and
//! rounded to bf16. A token that is not visible or not there contributes exact zeros, so a span gives the same bits
//! whether it is half filled or half masked. Rows of a tile never touch each other.

use cuda_std::prelude::*;

/// Tokens in a span. With 64, a context of 4096 gives one sequence's decode step enough blocks to fill a large GPU, and a
/// warp's tile of scores still fits its registers.
pub const SPAN: usize = 64;

/// Tiles of 8 tokens in a span.
const TOKEN_TILES: usize = SPAN / 8;

/// Steps of 16 tokens in a span.
const TOKEN_STEPS: usize = SPAN / 16;

/// What a span gives for the two rows that a lane holds (rows g and g + 8 of the tile, g = lane / 4): `out[n]` is in the
/// fragment layout of a tensor-core result, columns 8n + 2t and 8n + 2t + 1.
#[derive(Clone, Copy)]
pub struct Span<const TILES: usize> {
    /// The largest visible score of each row; negative infinity where none is visible.
    pub max: [f32; 2],
    /// The sum of the probabilities of each row, relative to the maximum.
    pub sum: [f32; 2],
    /// Probabilities times values.
    pub out: [[f32; 4]; TILES],
}

/// Attention of a tile of 16 query rows over one span. `STEPS` = D / 16, `TILES` = D / 8.
///
/// - `query[s]`: the tile's rows as the 16-row operand, columns 16 s to 16 s + 15.
/// - `key(n, s)`: tokens 8n to 8n+7 of the span as the 8-column operand, elements 16 s to 16 s + 15.
/// - `value(n, s)`: elements 8n to 8n+7 as the 8-column operand, tokens 16 s to 16 s + 15 of the span; zero for tokens
///   that are not there.
/// - `visible`: how many tokens of the span each of the lane's two rows sees.
///
/// Called by whole warps.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn span<const STEPS: usize, const TILES: usize>(
    query: &[[u32; 4]; STEPS],
    key: impl Fn(usize, usize) -> [u32; 2],
    value: impl Fn(usize, usize) -> [u32; 2],
    visible: [u32; 2],
    scale: f32,
) -> Span<TILES> {
    let t = thread::lane_id() % 4;
    let mut scores = [[0.0f32; 4]; TOKEN_TILES];
    for n in 0..TOKEN_TILES {
        for s in 0..STEPS {
            scores[n] = mma::m16n8k16_bf16(query[s], key(n, s), scores[n]);
        }
    }

    let mut max = [f32::NEG_INFINITY; 2];
    for n in 0..TOKEN_TILES {
        for element in 0..4 {
            let (row, token) = (element / 2, n as u32 * 8 + t * 2 + element as u32 % 2);
            let score = if token < visible[row] { scores[n][element] * scale } else { f32::NEG_INFINITY };
            scores[n][element] = score;
            max[row] = math::max(max[row], score);
        }
    }
    for row in 0..2 {
        max[row] = math::max(max[row], warp::shuffle_xor_f32(max[row], 1));
        max[row] = math::max(max[row], warp::shuffle_xor_f32(max[row], 2));
    }

    // Where no token is visible every score is negative infinity: subtract 0 instead, so that p is 0, not NaN.
    let base = [finite_or_zero(max[0]), finite_or_zero(max[1])];
    let mut sum = [0.0f32; 2];
    let mut probabilities = [[0u32; 2]; TOKEN_TILES];
    for n in 0..TOKEN_TILES {
        for row in 0..2 {
            let pair =
                bf16_pair(math::exp2(scores[n][row * 2] - base[row]), math::exp2(scores[n][row * 2 + 1] - base[row]));
            let (low, high) = unpack_bf16_pair(pair);
            sum[row] += low;
            sum[row] += high;
            probabilities[n][row] = pair;
        }
    }
    for row in 0..2 {
        sum[row] += warp::shuffle_xor_f32(sum[row], 1);
        sum[row] += warp::shuffle_xor_f32(sum[row], 2);
    }

    let mut out = [[0.0f32; 4]; TILES];
    for n in 0..TILES {
        for s in 0..TOKEN_STEPS {
            let (low, high) = (probabilities[2 * s], probabilities[2 * s + 1]);
            out[n] = mma::m16n8k16_bf16([low[0], low[1], high[0], high[1]], value(n, s), out[n]);
        }
    }
    Span { max, sum, out }
}

#[inline(always)]
fn finite_or_zero(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// The factors that bring what is merged so far and a further span to their common maximum.
#[derive(Clone, Copy)]
pub struct Rescale {
    /// For what is merged so far.
    pub before: f32,
    /// For the span.
    pub span: f32,
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

    /// Merges a span, and returns the factors for [`combine`]. A span without visible tokens changes nothing.
    #[inline(always)]
    pub fn add(&mut self, max: f32, sum: f32) -> Rescale {
        if max == f32::NEG_INFINITY {
            return Rescale { before: 1.0, span: 0.0 };
        }
        let common = math::max(self.max, max);
        let rescale = Rescale { before: math::exp2(self.max - common), span: math::exp2(max - common) };
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
