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
    load_a_of(tile, start, stride, 16)
}

/// [`load_a`] of a tile that has only its first `rows` rows, 8 or 16: 8 stand for the other 8 as well.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_a_of(tile: &Shared<bf16>, start: usize, stride: usize, rows: usize) -> [u32; 4] {
    let lane = crate::thread::lane_id() as usize;
    #[cfg(target_arch = "nvptx64")]
    {
        ldmatrix(tile.address_of(start + (lane % 16 & (rows - 1)) * stride + lane / 16 * 8))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = start + lane / 4 * stride + lane % 4 * 2;
        let below = at + 8 % rows * stride;
        [pair(tile, at), pair(tile, below), pair(tile, at + 8), pair(tile, below + 8)]
    }
}

/// Two 16 x 8 operands B that lie side by side: columns 0 to 7 and 8 to 15, of which each is a row of the tile (`start`,
/// `start + stride`, ...) with k running along it. One `ldmatrix.x4`, as [`load_a`].
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_b_columns(tile: &Shared<bf16>, start: usize, stride: usize) -> [[u32; 2]; 2] {
    #[cfg(target_arch = "nvptx64")]
    {
        let lane = crate::thread::lane_id() as usize;
        let row = lane % 8 + lane / 16 * 8;
        let [a, b, c, d] = ldmatrix(tile.address_of(start + row * stride + lane / 8 % 2 * 8));
        [[a, b], [c, d]]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let lane = crate::thread::lane_id() as usize;
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

macro_rules! operand_reader {
    ($(#[$doc:meta])* $name:ident, $load:ident, $words:ty, $rows:literal, $address:ident, |$raw:ident| $operands:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name {
            #[cfg(target_arch = "nvptx64")]
            address: u32,
            #[cfg(not(target_arch = "nvptx64"))]
            tile: Shared<bf16>,
            #[cfg(not(target_arch = "nvptx64"))]
            start: usize,
            #[cfg(not(target_arch = "nvptx64"))]
            stride: usize,
            #[cfg(not(target_arch = "nvptx64"))]
            rows: usize,
        }

        impl $name {
            /// Reads from `start` on, in rows `stride` elements apart.
            #[inline(always)]
            #[must_use]
            pub fn new(tile: &Shared<bf16>, start: usize, stride: usize) -> Self {
                Self::of(tile, start, stride, $rows)
            }

            /// The same of a tile that has only its first `rows` rows.
            #[inline(always)]
            #[must_use]
            pub fn of(tile: &Shared<bf16>, start: usize, stride: usize, rows: usize) -> Self {
                #[cfg(target_arch = "nvptx64")]
                {
                    let address = tile.address_of(start + $address(stride as u32, rows as u32) as usize);
                    let opaque: u32;
                    // SAFETY: a move between registers. It hides how the address was made from the compiler, which would
                    // else make each of many of them anew.
                    unsafe {
                        core::arch::asm!("mov.b32 {}, {};", out(reg32) opaque, in(reg32) address,
                            options(pure, nomem, nostack));
                    }
                    Self { address: opaque }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                Self { tile: *tile, start, stride, rows }
            }

            /// The operand `offset` elements further (a multiple of 8).
            #[inline(always)]
            #[must_use]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            pub fn load(&self, offset: usize) -> $words {
                #[cfg(target_arch = "nvptx64")]
                {
                    let $raw = ldmatrix(self.address + offset as u32 * 2);
                    $operands
                }
                #[cfg(not(target_arch = "nvptx64"))]
                $load(&self.tile, self.start + offset, self.stride, self.rows)
            }
        }
    };
}
operand_reader!(
    /// [`load_a`] at many places of a tile: a lane's address is made once, constant offsets are part of the instruction.
    ReadA, load_a_of, [u32; 4], 16, lane_a, |words| words
);
operand_reader!(
    /// [`load_b_columns`] at many places of a tile, as [`ReadA`].
    ReadBColumns, load_b_columns_of, [[u32; 2]; 2], 16, lane_b_columns, |words| [[words[0], words[1]], [words[2], words[3]]]
);
operand_reader!(
    /// [`load_b_steps`] at many places of a tile, as [`ReadA`].
    ReadBSteps, load_b_steps_of, [[u32; 2]; 2], 8, lane_b_steps, |words| [[words[0], words[1]], [words[2], words[3]]]
);

/// Where a lane's 8 elements are from the start of the operand that [`load_a_of`] reads.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn lane_a(stride: u32, rows: u32) -> u32 {
    let lane = crate::thread::lane_id();
    (lane % 16 & (rows - 1)) * stride + lane / 16 * 8
}

/// The same of [`load_b_columns`].
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn lane_b_columns(stride: u32, _: u32) -> u32 {
    let lane = crate::thread::lane_id();
    (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8
}

/// The same of [`load_b_steps_of`].
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn lane_b_steps(stride: u32, rows: u32) -> u32 {
    let lane = crate::thread::lane_id();
    let row = if lane % 8 < rows { lane % 8 } else { rows - 1 };
    row * stride + lane / 8 * 8
}

/// [`load_b_columns`], of which all rows are there.
#[cfg(not(target_arch = "nvptx64"))]
#[track_caller]
fn load_b_columns_of(tile: &Shared<bf16>, start: usize, stride: usize, _: usize) -> [[u32; 2]; 2] {
    load_b_columns(tile, start, stride)
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
