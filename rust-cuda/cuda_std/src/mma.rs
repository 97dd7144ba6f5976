//! Tensor-core products.

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
