//! Tensor-core products, and their operands from shared memory.
//!
//! A tile in shared memory has its rows `stride` elements apart. The reads are without bank conflicts where 16-byte
//! pieces of 8 consecutive rows lie in different banks: a stride of 16 modulo 128 bytes does that.

use half::bf16;

use crate::Shared;

/// One `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`: D = A B + C for the whole warp.
///
/// With `g = lane / 4` and `t = lane % 4` (PTX ISA, "Matrix Fragments for mma.m16n8k16"), a lane holds:
///
/// - `a`: A is 16 x 16. `a[0]` = row g, columns 2t, 2t+1; `a[1]` = row g+8, the same columns; `a[2]`, `a[3]` = rows g
///   and g+8, columns 2t+8, 2t+9. Two bf16 a word, the lower column in the lower half.
/// - `b`: B is 16 x 8. `b[0]` = rows 2t, 2t+1 of column g; `b[1]` = rows 2t+8, 2t+9 of column g.
/// - `c` and the result: 16 x 8. `[0]`, `[1]` = row g, columns 2t, 2t+1; `[2]`, `[3]` = row g+8, the same columns.
///
/// Rounding: on a GPU the hardware's own. On the CPU, for each element, products are exact and added to `c` one at a
/// time in the order of k, each sum rounded to nearest (a chain of fused multiply-adds); so the two differ in the
/// last bits.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn m16n8k16_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    #[cfg(target_arch = "nvptx64")]
    {
        let [mut d0, mut d1, mut d2, mut d3] = c;
        // SAFETY: all 32 lanes take part, as in `warp`; registers only.
        unsafe {
            core::arch::asm!(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
                inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
                in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
                in(reg32) b[0], in(reg32) b[1],
                options(pure, nomem, nostack));
        }
        [d0, d1, d2, d3]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    crate::cpu::mma_m16n8k16_bf16(a, b, c)
}

/// The 16 x 16 operand A (see [`m16n8k16_bf16`]) of rows `start`, `start + stride`, ...: one `ldmatrix.x4` for the
/// whole warp. `start` and `stride` are multiples of 8 elements and the same in all lanes.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_a(tile: &Shared<bf16>, start: usize, stride: usize) -> [u32; 4] {
    let lane = crate::thread::lane_id() as usize;
    #[cfg(target_arch = "nvptx64")]
    {
        ldmatrix(tile.address_of(start + lane % 16 * stride + lane / 16 * 8))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = start + lane / 4 * stride + lane % 4 * 2;
        [pair(tile, at), pair(tile, at + 8 * stride), pair(tile, at + 8), pair(tile, at + 8 * stride + 8)]
    }
}

/// Two 16 x 8 operands B that lie side by side: columns 0 to 7 and 8 to 15, of which each is a row of the tile (`start`,
/// `start + stride`, ...) with k running along it. One `ldmatrix.x4`, as [`load_a`].
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_b_columns(tile: &Shared<bf16>, start: usize, stride: usize) -> [[u32; 2]; 2] {
    let lane = crate::thread::lane_id() as usize;
    #[cfg(target_arch = "nvptx64")]
    {
        let row = lane % 8 + lane / 16 * 8;
        let [a, b, c, d] = ldmatrix(tile.address_of(start + row * stride + lane / 8 % 2 * 8));
        [[a, b], [c, d]]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = start + lane / 4 * stride + lane % 4 * 2;
        [[pair(tile, at), pair(tile, at + 8)], [pair(tile, at + 8 * stride), pair(tile, at + 8 * stride + 8)]]
    }
}

/// Two 16 x 8 operands B that follow each other in k: rows 0 to 15 and 16 to 31 of the same 8 columns, each of which is a
/// row of the tile. One `ldmatrix.x4`, as [`load_a`].
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_b_steps(tile: &Shared<bf16>, start: usize, stride: usize) -> [[u32; 2]; 2] {
    load_b_steps_of(tile, start, stride, 8)
}

/// [`load_b_steps`] of a tile that has only `rows` rows: the last one stands for those that are not there.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_b_steps_of(tile: &Shared<bf16>, start: usize, stride: usize, rows: usize) -> [[u32; 2]; 2] {
    let lane = crate::thread::lane_id() as usize;
    #[cfg(target_arch = "nvptx64")]
    {
        let row = if lane % 8 < rows { lane % 8 } else { rows - 1 };
        let [a, b, c, d] = ldmatrix(tile.address_of(start + row * stride + lane / 8 * 8));
        [[a, b], [c, d]]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let row = if lane / 4 < rows { lane / 4 } else { rows - 1 };
        let at = start + row * stride + lane % 4 * 2;
        [[pair(tile, at), pair(tile, at + 8)], [pair(tile, at + 16), pair(tile, at + 24)]]
    }
}

/// Four 8 x 8 tiles: lane l has the address of row l % 8 of tile l / 8.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn ldmatrix(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: all 32 lanes take part; the addresses are inside the array, as the executor checks.
    unsafe {
        core::arch::asm!(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
    }
    [a, b, c, d]
}

/// Two neighbours as an operand's word. On the CPU each lane reads its own share: the same words, and the same bytes of
/// the tile in all.
#[cfg(not(target_arch = "nvptx64"))]
#[track_caller]
fn pair(tile: &Shared<bf16>, index: usize) -> u32 {
    let [low, high]: [bf16; 2] = tile.load(index);
    u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16)
}
