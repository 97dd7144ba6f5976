//! Linear layers: out\[m, n\] = sum over k of x\[m, k\] weight\[n, k\], accumulated in f32.
//!
//! Two definitions, each with one order of k whatever m is:
//!
//! - the tensor-core chain (`linear_f32`, `linear_bf16`): one k16 product after another into the same accumulator, from 0.
//!   On Hopper cuBLASLt without split-K gives the same bits, which the self-test proves on the device at hand;
//! - the plain chain (`linear_plain`): fused multiply-adds one k at a time, from 0. The CPU device's linear layer gives
//!   the same bits.
//!
//! K may be cut in equal, consecutive segments, each a chain from 0 with an output matrix of its own, which whoever reads
//! them adds in order: the parts of a layer.

use cuda_std::prelude::*;

/// Token tiles of 8 that a warp takes.
const TOKEN_TILES: usize = 4;

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = TOKEN_TILES * 8;

/// Outputs of a block: 4 warps of 16.
pub const BLOCK_OUTPUTS: usize = 64;

/// One warp: 16 outputs for 32 tokens. Weights are the 16-row operand, tokens the 8-column operand. The segment of `part` k
/// is the block's z.
#[inline(always)]
fn chain(
    x: In<bf16>,
    weight: In<bf16>,
    tokens: usize,
    outputs: usize,
    width: usize,
    part: usize,
    store: impl Fn(usize, usize, f32),
) {
    let (g, t) = ((thread::lane_id() / 4) as usize, (thread::lane_id() % 4) as usize);
    let output = thread::block_idx_x() as usize * BLOCK_OUTPUTS + thread::warp_id() as usize * 16 + g;
    let token = thread::block_idx_y() as usize * BLOCK_TOKENS;
    // Rows beyond the end repeat the last one; their results are not stored.
    let clamp = |index: usize, end: usize| if index < end { index } else { end - 1 };
    let pair = |buffer: &In<bf16>, index: usize| {
        let [low, high]: [bf16; 2] = buffer.load(index);
        u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16)
    };
    let rows = [clamp(output, outputs) * width + t * 2, clamp(output + 8, outputs) * width + t * 2];
    let mut columns = [0; TOKEN_TILES];
    for n in 0..TOKEN_TILES {
        columns[n] = clamp(token + n * 8 + g, tokens) * width + t * 2;
    }

    thread::allow_successor();
    thread::wait_for_predecessors();
    let mut sums = [[0.0f32; 4]; TOKEN_TILES];
    let mut k = thread::block_idx_z() as usize * part;
    let end = k + part;
    while k < end {
        let a = [
            pair(&weight, rows[0] + k),
            pair(&weight, rows[1] + k),
            pair(&weight, rows[0] + k + 8),
            pair(&weight, rows[1] + k + 8),
        ];
        for n in 0..TOKEN_TILES {
            let b = [pair(&x, columns[n] + k), pair(&x, columns[n] + k + 8)];
            sums[n] = mma::m16n8k16_bf16(a, b, sums[n]);
        }
        k += 16;
    }
    for n in 0..TOKEN_TILES {
        for element in 0..4 {
            let (m, n_out) = (token + n * 8 + t * 2 + element % 2, output + element / 2 * 8);
            if m < tokens && n_out < outputs {
                store(m, n_out, sums[n][element]);
            }
        }
    }
}

/// The tensor-core chain with f32 output, in S segments.
///
/// - `x`: bf16 \[M, K\]; `weight`: bf16 \[N, K\]; `out`: f32 \[S, M, N\].
/// - grid (ceil(N / 64), ceil(M / 32), S); a warp makes 16 outputs of a segment for 32 tokens.
/// - bytes: 2 (N K + M K) + 4 S M N, weights once per 32 tokens.
/// - the caller: `width` = K, `part` = K / S is a multiple of 16.
#[kernel(block = 128, min_blocks = 1)]
pub fn linear_f32(x: In<bf16>, weight: In<bf16>, out: Out<f32>, tokens: u32, outputs: u32, width: u32, part: u32) {
    let (tokens, outputs) = (tokens as usize, outputs as usize);
    let first = thread::block_idx_z() as usize * tokens;
    chain(x, weight, tokens, outputs, width as usize, part as usize, |m, n, sum| {
        out.set((first + m) * outputs + n, sum);
    });
}

/// The tensor-core chain in one segment, with the result rounded to bf16: otherwise as [`linear_f32()`].
#[kernel(block = 128, min_blocks = 1)]
pub fn linear_bf16(x: In<bf16>, weight: In<bf16>, out: Out<bf16>, tokens: u32, outputs: u32, width: u32) {
    chain(x, weight, tokens as usize, outputs as usize, width as usize, width as usize, |m, n, sum| {
        out.set(m * outputs as usize + n, f32_to_bf16(sum));
    });
}

/// The plain chain with f32 output, for any K, in S segments.
///
/// - `x`: bf16 \[M, K\]; `weight`: bf16 \[N, K\]; `out`: f32 \[S, M, N\].
/// - grid (ceil(N / 128), M, S); a thread makes one output of a segment.
/// - bytes: 2 N K per token; slow, and meant for tests.
/// - the caller: `width` = K, `part` = K / S.
#[kernel(block = 128)]
pub fn linear_plain(x: In<bf16>, weight: In<bf16>, out: Out<f32>, tokens: u32, outputs: u32, width: u32, part: u32) {
    let output = thread::index_1d() as usize;
    if output < outputs as usize {
        let (token, width) = (thread::block_idx_y() as usize, width as usize);
        let (segment, part) = (thread::block_idx_z() as usize, part as usize);
        let mut sum = 0.0;
        for k in segment * part..(segment + 1) * part {
            sum = math::fma(bf16_to_f32(x.get(token * width + k)), bf16_to_f32(weight.get(output * width + k)), sum);
        }
        out.set((segment * tokens as usize + token) * outputs as usize + output, sum);
    }
}
