//! The tensor-core product of a warp: fragments in, fragments out.
//!
//! For each element, products are exact in f32 and are added to `c` in the order of k, each step one fused
//! multiply-add. Two implementations give the same bits; the vector one runs where the processor has AVX2 and FMA.

/// The operands of a warp, stored so that a row of A, B or C is contiguous.
#[repr(align(64))]
pub(super) struct Fragments {
    /// Register r of the lanes: words `4g..4g+4` are 8 elements of a row of A.
    a: [[u32; 32]; 4],
    /// Register r of the lanes, transposed: words `8t..8t+8` are rows 2t (low halves) and 2t+1 of B.
    b: [[u32; 32]; 2],
    /// C, then D, by rows.
    c: [[f32; 8]; 16],
}

impl Fragments {
    pub(super) const ZERO: Self = Self { a: [[0; 32]; 4], b: [[0; 32]; 2], c: [[0.0; 8]; 16] };

    /// Stores the operands of a lane.
    #[inline(always)]
    pub(super) fn deposit(&mut self, lane: usize, a: [u32; 4], b: [u32; 2], c: [f32; 4]) {
        let (g, t) = ((lane >> 2) & 7, lane & 3);
        for (register, value) in self.a.iter_mut().zip(a) {
            register[lane & 31] = value;
        }
        for (register, value) in self.b.iter_mut().zip(b) {
            register[t * 8 + g] = value;
        }
        self.c[g][2 * t] = c[0];
        self.c[g][2 * t + 1] = c[1];
        self.c[g + 8][2 * t] = c[2];
        self.c[g + 8][2 * t + 1] = c[3];
    }

    /// The result of a lane.
    #[inline(always)]
    pub(super) fn result(&self, lane: usize) -> [f32; 4] {
        let (g, t) = ((lane >> 2) & 7, lane & 3);
        [self.c[g][2 * t], self.c[g][2 * t + 1], self.c[g + 8][2 * t], self.c[g + 8][2 * t + 1]]
    }

    /// C becomes A B + C.
    pub(super) fn multiply(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has both features.
            unsafe { self.multiply_avx2() };
            return;
        }
        self.multiply_portable();
    }

    fn unpack(&self) -> ([[f32; 16]; 16], [[f32; 8]; 16]) {
        let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
        let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        for (register, words) in self.a.iter().enumerate() {
            let (row, column) = (register % 2 * 8, register / 2 * 8);
            for (lane, &word) in words.iter().enumerate() {
                let at = column + lane % 4 * 2;
                [a[row + lane / 4][at], a[row + lane / 4][at + 1]] = halves(word);
            }
        }
        for (register, words) in self.b.iter().enumerate() {
            for (index, &word) in words.iter().enumerate() {
                let row = register * 8 + index / 8 * 2;
                [b[row][index % 8], b[row + 1][index % 8]] = halves(word);
            }
        }
        (a, b)
    }

    fn multiply_portable(&mut self) {
        let (a, b) = self.unpack();
        for (d, a) in self.c.iter_mut().zip(&a) {
            for (&a, b) in a.iter().zip(&b) {
                for (d, &b) in d.iter_mut().zip(b) {
                    *d = a.mul_add(b, *d);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn multiply_avx2(&mut self) {
        use core::arch::x86_64::{
            _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
        };
        let (a, b) = self.unpack();
        for (d, a) in self.c.as_chunks_mut::<8>().0.iter_mut().zip(a.as_chunks::<8>().0) {
            let mut sums = [_mm256_setzero_ps(); 8];
            for (sum, row) in sums.iter_mut().zip(d.iter()) {
                // SAFETY: a row is 8 floats.
                *sum = unsafe { _mm256_loadu_ps(row.as_ptr()) };
            }
            for (k, row) in b.iter().enumerate() {
                // SAFETY: as above.
                let b = unsafe { _mm256_loadu_ps(row.as_ptr()) };
                for (sum, a) in sums.iter_mut().zip(a) {
                    *sum = _mm256_fmadd_ps(_mm256_set1_ps(a[k]), b, *sum);
                }
            }
            for (sum, row) in sums.iter().zip(d.iter_mut()) {
                // SAFETY: as above.
                unsafe { _mm256_storeu_ps(row.as_mut_ptr(), *sum) };
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cpu::random::Random;

    /// Operands of every exponent from tiny to huge; no infinities, whose NaN results have no defined bits.
    fn fragments(random: &mut Random) -> Fragments {
        let mut fragments = Fragments::ZERO;
        let mut half = || {
            let bits = random.next_u64();
            let exponent = 64 + (bits >> 32) as u32 % 127;
            (bits as u32 & 0x807f) | (exponent << 7)
        };
        for lane in 0..32 {
            let a = core::array::from_fn(|_| half() | (half() << 16));
            let b = core::array::from_fn(|_| half() | (half() << 16));
            let c = core::array::from_fn(|_| f32::from_bits((half() << 16) | half()));
            fragments.deposit(lane, a, b, c);
        }
        fragments
    }

    #[test]
    fn vector_and_portable_products_have_the_same_bits() {
        assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), "this test needs AVX2 and FMA");
        let mut random = Random::new(7);
        for round in 0..200 {
            let mut vector = fragments(&mut random);
            let mut portable = Fragments { a: vector.a, b: vector.b, c: vector.c };
            let before = vector.c;
            // SAFETY: asserted above.
            unsafe { vector.multiply_avx2() };
            portable.multiply_portable();
            let bits = |c: &[[f32; 8]; 16]| c.map(|row| row.map(f32::to_bits));
            assert_eq!(bits(&vector.c), bits(&portable.c), "round {round}");
            assert_ne!(bits(&before), bits(&vector.c));
        }
    }
}
