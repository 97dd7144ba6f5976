//! Linear layers on the CPU: each output is a chain of f32 FMA over k, in order, from 0.
//!
//! A row's chain does not know of other rows, so its bits do not depend on the batch, and every path below computes
//! the same chain, so they do not depend on the processor either. K may be cut in segments with a chain and an output
//! each.
//!
//! The weight is packed once, in blocks of 16 output features. For each k a block has 8 words; word `j` holds the
//! weight of feature `j` in its low half and of feature `j + 8` in its high half. So one vector load, one shift and
//! one mask give 16 f32 weights without a shuffle. The last block is filled up with zeros, which costs at most 15 rows
//! of memory.

use std::ops::Range;
use std::sync::Arc;

use cuda_std::bf16::bf16_to_f32;
use cuda_std::cpu::Executor;
use half::bf16;

use super::Shared;
use super::memory::{Fill, Memory};
use crate::device::buffer::DeviceId;
use crate::device::{DeviceError, LinearOutput, MemoryKind};

/// Output features in a block.
const BLOCK: usize = 16;
/// Words of a block for one k.
const WORDS: usize = BLOCK / 2;
/// Blocks that one task takes: 8 accumulators hide the latency of FMA when there is a single row.
const TASK_BLOCKS: usize = 4;

/// A weight in blocks of 16 output features.
pub(in crate::device) struct PackedWeight {
    memory: Memory,
    n: usize,
    k: usize,
}

/// How the chains are computed. The bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Path {
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return Self::Avx2;
        }
        Self::Portable
    }
}

/// Where tasks write: each its own columns of every row of a segment.
struct Output<O> {
    pointer: *mut O,
    n: usize,
}

// SAFETY: tasks on several threads write disjoint elements, which belong to the caller of `multiply`.
unsafe impl<O: LinearOutput> Sync for Output<O> {}

impl<O: LinearOutput> Output<O> {
    /// The output from a row on.
    ///
    /// # Safety
    /// The row is there.
    unsafe fn at_row(&self, row: usize) -> Self {
        // SAFETY: inside the output by contract.
        Self { pointer: unsafe { self.pointer.add(row * self.n) }, n: self.n }
    }

    /// Writes the sums of a block, as many as are features.
    ///
    /// # Safety
    /// `row` is a row of the output, and no other thread writes the block's columns.
    unsafe fn store(&self, row: usize, block: usize, sums: &[f32; BLOCK]) {
        let first = block * BLOCK;
        for (index, &sum) in sums.iter().enumerate().take(self.n - first) {
            // SAFETY: inside the row by the bound, the row by contract.
            unsafe { self.pointer.add(row * self.n + first + index).write(O::from_sum(sum)) };
        }
    }
}

impl PackedWeight {
    /// Packs `rows`, `[n, k]` row-major.
    pub(super) fn new(shared: &Arc<Shared>, rows: &[bf16], n: usize, k: usize) -> Result<Self, DeviceError> {
        let bytes = n.div_ceil(BLOCK) * k * WORDS * size_of::<u32>();
        let mut memory = Memory::new(shared, bytes, Fill::Zero, MemoryKind::Weights, "packed weight")?;
        let words = memory.words_mut();
        for (feature, row) in rows.chunks_exact(k).enumerate() {
            let (block, lane) = (feature / BLOCK, feature % BLOCK);
            let shift = if lane < WORDS { 0 } else { 16 };
            let lane_words = words[block * k * WORDS..].iter_mut().skip(lane % WORDS).step_by(WORDS);
            for (word, value) in lane_words.zip(row) {
                *word |= u32::from(value.to_bits()) << shift;
            }
        }
        Ok(Self { memory, n, k })
    }

    pub(in crate::device) fn device(&self) -> DeviceId {
        self.memory.device()
    }

    /// `out[m, n] = x[m, k] * weight[n, k]` transposed, for each of the segments of k one after the other. `scratch` is kept
    /// between calls to spare allocations.
    pub(super) fn multiply<O: LinearOutput>(
        &self,
        executor: &Executor,
        scratch: &mut Vec<f32>,
        x: &[bf16],
        m: usize,
        segments: usize,
        out: &mut [O],
    ) {
        self.multiply_by(Path::detect(), executor, scratch, x, m, segments, out);
    }

    #[expect(clippy::too_many_arguments, reason = "the path beside the arguments of `multiply`")]
    fn multiply_by<O: LinearOutput>(
        &self,
        path: Path,
        executor: &Executor,
        scratch: &mut Vec<f32>,
        x: &[bf16],
        m: usize,
        segments: usize,
        out: &mut [O],
    ) {
        let part = self.k / segments;
        let whole = x.len() == m * self.k && out.len() == segments * m * self.n && part * segments == self.k;
        assert!(whole, "the shapes were checked");
        scratch.clear();
        scratch.extend(x.iter().map(|&value| bf16_to_f32(value)));
        let x = scratch.as_slice();
        let all = Output { pointer: out.as_mut_ptr(), n: self.n };
        let blocks = self.n.div_ceil(BLOCK);
        let tasks = blocks.div_ceil(TASK_BLOCKS);
        executor.for_each(tasks * segments, &|task| {
            let (segment, first) = (task / tasks, task % tasks * TASK_BLOCKS);
            let last = (first + TASK_BLOCKS).min(blocks);
            // SAFETY: the output has a matrix of `m` rows for each segment.
            let output = unsafe { all.at_row(segment * m) };
            // SAFETY: the task's blocks of its segment are its own, and `x` has `m` rows of `k`.
            unsafe { self.task(path, first..last, segment * part..(segment + 1) * part, x, m, &output) };
        });
    }

    /// The words of a block for some k.
    fn block(&self, block: usize, span: &Range<usize>) -> &[u32] {
        &self.memory.words()[(block * self.k + span.start) * WORDS..][..span.len() * WORDS]
    }

    /// All rows of some blocks, over some k.
    ///
    /// # Safety
    /// No other thread writes these blocks' columns; `x` has `m` rows of `k`.
    unsafe fn task<O: LinearOutput>(
        &self,
        path: Path,
        blocks: Range<usize>,
        span: Range<usize>,
        x: &[f32],
        m: usize,
        output: &Output<O>,
    ) {
        match path {
            // SAFETY: the path is taken only where these instructions are; the rest by contract.
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => unsafe { self.task_avx2(blocks, &span, x, m, output) },
            Path::Portable => {
                for block in blocks {
                    let weight = self.block(block, &span);
                    for (row, x) in x.chunks_exact(self.k).enumerate() {
                        // SAFETY: by contract.
                        unsafe { output.store(row, block, &chain(weight, &x[span.clone()])) };
                    }
                }
            }
        }
    }

    /// Several rows share each load of a weight; a single row takes several blocks at once.
    ///
    /// # Safety
    /// As for `task`, and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn task_avx2<O: LinearOutput>(
        &self,
        blocks: Range<usize>,
        span: &Range<usize>,
        x: &[f32],
        m: usize,
        output: &Output<O>,
    ) {
        const ROWS: usize = 6;
        let whole = m - m % ROWS;
        for block in blocks.clone() {
            for row in (0..whole).step_by(ROWS) {
                // SAFETY: by contract.
                unsafe { self.tile::<ROWS, 1, O>(block, span, x, row, output) };
            }
        }
        macro_rules! rest {
            ($rows:literal, $at_once:literal) => {{
                let mut block = blocks.start;
                while blocks.end - block >= $at_once {
                    // SAFETY: by contract.
                    unsafe { self.tile::<$rows, $at_once, O>(block, span, x, whole, output) };
                    block += $at_once;
                }
                while block < blocks.end {
                    // SAFETY: by contract.
                    unsafe { self.tile::<$rows, 1, O>(block, span, x, whole, output) };
                    block += 1;
                }
            }};
        }
        match m % ROWS {
            1 => rest!(1, 4),
            2 => rest!(2, 2),
            3 => rest!(3, 2),
            4 => rest!(4, 1),
            5 => rest!(5, 1),
            _ => {}
        }
    }

    /// `R` rows from `row` on times `B` blocks from `block` on, with `2 * R * B` accumulators in registers.
    ///
    /// # Safety
    /// As for `task_avx2`; the rows and the blocks are there.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn tile<const R: usize, const B: usize, O: LinearOutput>(
        &self,
        block: usize,
        span: &Range<usize>,
        x: &[f32],
        row: usize,
        output: &Output<O>,
    ) {
        use std::arch::x86_64::{
            __m256, _mm256_and_si256, _mm256_broadcast_ss, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_load_si256,
            _mm256_set1_epi32, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
        };
        let k = span.len();
        let weights: [&[u32]; B] = std::array::from_fn(|b| self.block(block + b, span));
        let rows: [&[f32]; R] = std::array::from_fn(|r| &x[(row + r) * self.k + span.start..][..k]);
        let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        let mut sums: [[[__m256; 2]; B]; R] = [[[_mm256_setzero_ps(); 2]; B]; R];
        for index in 0..k {
            let mut weight = [[_mm256_setzero_ps(); 2]; B];
            for b in 0..B {
                // SAFETY: 8 words from `index * 8` are inside the block, which starts at a multiple of 32 bytes for every k.
                let words = unsafe { _mm256_load_si256(weights[b].as_ptr().add(index * WORDS).cast()) };
                weight[b] = [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)),
                    _mm256_castsi256_ps(_mm256_and_si256(words, high)),
                ];
            }
            for r in 0..R {
                // SAFETY: each row has `k` elements.
                let value = _mm256_broadcast_ss(unsafe { rows[r].get_unchecked(index) });
                for b in 0..B {
                    for half in 0..2 {
                        sums[r][b][half] = _mm256_fmadd_ps(value, weight[b][half], sums[r][b][half]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (b, [low, high]) in sums.iter().enumerate() {
                let mut values = [0.0_f32; BLOCK];
                // SAFETY: room for two vectors of 8; the output by contract.
                unsafe {
                    _mm256_storeu_ps(values.as_mut_ptr(), *low);
                    _mm256_storeu_ps(values.as_mut_ptr().add(WORDS), *high);
                    output.store(row + r, block + b, &values);
                }
            }
        }
    }
}

/// The 16 chains of one row and one block: what every path computes.
fn chain(weight: &[u32], x: &[f32]) -> [f32; BLOCK] {
    let mut sums = [0.0_f32; BLOCK];
    for (words, &value) in weight.chunks_exact(WORDS).zip(x) {
        for (lane, &word) in words.iter().enumerate() {
            sums[lane] = value.mul_add(f32::from_bits(word << 16), sums[lane]);
            sums[lane + WORDS] = value.mul_add(f32::from_bits(word & 0xffff_0000), sums[lane + WORDS]);
        }
    }
    sums
}

impl std::fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedWeight[{} x {}]", self.n, self.k)
    }
}

#[cfg(test)]
mod tests {
    use cuda_std::bf16::f32_to_bf16;

    use super::*;
    use crate::testing::{TestRng, Tolerance, assert_bits, assert_close};

    struct Case {
        x: Vec<bf16>,
        weight: Vec<bf16>,
        packed: PackedWeight,
        executor: Executor,
        m: usize,
        n: usize,
        k: usize,
    }

    /// Odd sizes: one feature, one k, blocks that are not full, more blocks than a task, every rest of rows.
    const SHAPES: [(usize, usize, usize); 14] = [
        (1, 1, 1),
        (1, 16, 8),
        (1, 17, 3),
        (1, 15, 64),
        (2, 33, 65),
        (3, 64, 31),
        (4, 63, 127),
        (5, 65, 1),
        (6, 129, 40),
        (7, 80, 33),
        (11, 1, 100),
        (13, 31, 77),
        (1, 1000, 130),
        (40, 200, 96),
    ];

    impl Case {
        fn new(m: usize, n: usize, k: usize) -> Self {
            let mut rng = TestRng::new((m * 1_000_003 + n * 1009 + k) as u64);
            let (x, weight) = (rng.bf16s(m * k), rng.bf16s(n * k));
            let shared = Arc::new(Shared::new(None, false));
            let packed = PackedWeight::new(&shared, &weight, n, k).unwrap();
            Self { x, weight, packed, executor: Executor::new(2), m, n, k }
        }

        fn run<O: LinearOutput>(&self, path: Path, rows: std::ops::Range<usize>) -> Vec<O> {
            let nan = O::from_sum(f32::NAN);
            let mut out = vec![nan; rows.len() * self.n];
            let x = &self.x[rows.start * self.k..rows.end * self.k];
            self.packed.multiply_by(path, &self.executor, &mut Vec::new(), x, rows.len(), 1, &mut out);
            out
        }

        /// In f64 from the formula, and the sum of the products' magnitudes, which bounds what rounding can do.
        fn oracle(&self) -> (Vec<f64>, Vec<f64>) {
            let mut sums = Vec::new();
            let mut magnitudes = Vec::new();
            for row in 0..self.m {
                for feature in 0..self.n {
                    let products = (0..self.k).map(|index| {
                        self.x[row * self.k + index].to_f64() * self.weight[feature * self.k + index].to_f64()
                    });
                    sums.push(products.clone().sum());
                    magnitudes.push(products.map(f64::abs).sum());
                }
            }
            (sums, magnitudes)
        }
    }

    #[test]
    fn it_is_the_product() {
        for (m, n, k) in SHAPES {
            let case = Case::new(m, n, k);
            let (sums, magnitudes) = case.oracle();
            for path in [Path::detect(), Path::Portable] {
                let out: Vec<f32> = case.run(path, 0..m);
                for index in 0..sums.len() {
                    // One rounding of at most 2^-24 of the running sum for each k.
                    let absolute = magnitudes[index] * k as f64 / f64::from(1 << 24);
                    assert_close(&out[index..=index], &sums[index..=index], Tolerance { absolute, relative: 0.0 });
                }
            }
        }
    }

    #[test]
    fn it_is_the_chain_bit_for_bit() {
        for (m, n, k) in SHAPES {
            let case = Case::new(m, n, k);
            let mut expected = Vec::new();
            for row in 0..m {
                for feature in 0..n {
                    expected.push((0..k).fold(0.0_f32, |sum, index| {
                        case.x[row * k + index].to_f32().mul_add(case.weight[feature * k + index].to_f32(), sum)
                    }));
                }
            }
            for path in [Path::detect(), Path::Portable] {
                assert_bits(&case.run::<f32>(path, 0..m), &expected);
            }
            let rounded: Vec<u16> = expected.iter().map(|&sum| f32_to_bf16(sum).to_bits()).collect();
            let out: Vec<u16> = case.run::<bf16>(Path::detect(), 0..m).iter().map(|value| value.to_bits()).collect();
            assert_eq!(out, rounded, "{m} x {n} x {k}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_batch() {
        const ROWS: usize = 40;
        let case = Case::new(ROWS, 83, 129);
        let alone: Vec<Vec<f32>> = (0..ROWS).map(|row| case.run(Path::detect(), row..row + 1)).collect();
        for m in 1..=ROWS {
            for start in [0, (ROWS - m) / 2, ROWS - m] {
                let together: Vec<f32> = case.run(Path::detect(), start..start + m);
                assert_bits(&together, &alone[start..start + m].concat());
            }
        }
    }

    #[test]
    fn segments_are_chains_of_their_own() {
        for (m, n, k, segments) in [(1, 17, 8, 4), (3, 64, 30, 2), (6, 33, 66, 3), (7, 129, 128, 4), (40, 31, 5, 1)] {
            let case = Case::new(m, n, k);
            let part = k / segments;
            let (sums, magnitudes) = case.oracle();
            let mut expected = Vec::new();
            for index in 0..segments * m * n {
                let (segment, row, feature) = (index / n / m, index / n % m, index % n);
                expected.push((segment * part..(segment + 1) * part).fold(0.0_f32, |sum, index| {
                    case.x[row * k + index].to_f32().mul_add(case.weight[feature * k + index].to_f32(), sum)
                }));
            }
            for path in [Path::detect(), Path::Portable] {
                let mut out = vec![f32::NAN; segments * m * n];
                let scratch = &mut Vec::new();
                case.packed.multiply_by(path, &case.executor, scratch, &case.x, m, segments, &mut out);
                assert_bits(&out, &expected);
                // All parts together are the product.
                for index in 0..m * n {
                    let sum: f64 = out[index..].iter().step_by(m * n).map(|&part| f64::from(part)).sum();
                    let absolute = magnitudes[index] * k as f64 / f64::from(1 << 24);
                    assert!((sum - sums[index]).abs() <= absolute, "{sum} {}", sums[index]);
                }
            }
        }
    }

    #[test]
    fn the_order_of_k_matters() {
        // The canary: reversing k must change some bit, or the tests above would accept any order.
        let (n, k) = (33, 129);
        let case = Case::new(1, n, k);
        let reversed =
            |values: &[bf16]| -> Vec<bf16> { values.chunks(k).flat_map(|row| row.iter().rev().copied()).collect() };
        let shared = Arc::new(Shared::new(None, false));
        let packed = PackedWeight::new(&shared, &reversed(&case.weight), n, k).unwrap();
        let mut out = vec![f32::NAN; n];
        packed.multiply(&case.executor, &mut Vec::new(), &reversed(&case.x), 1, 1, &mut out);
        assert_ne!(out, case.run::<f32>(Path::detect(), 0..1));
    }

    /// `cargo test --release -- --ignored --nocapture speed`: for people, who judge the numbers.
    #[test]
    #[ignore = "a measurement, not a check"]
    fn speed() {
        for (n, k) in [(256, 256), (1024, 256), (256, 1024), (2048, 256), (896, 896), (4864, 896)] {
            for m in [1, 2, 4, 6, 16, 64] {
                let case = Case::new(m, n, k);
                let mut out = vec![0.0_f32; m * n];
                let mut scratch = Vec::new();
                let mut best = f64::INFINITY;
                for _ in 0..50 {
                    let start = std::time::Instant::now();
                    case.packed.multiply(&case.executor, &mut scratch, &case.x, m, 1, &mut out);
                    best = best.min(start.elapsed().as_secs_f64());
                }
                let rate = 2.0 * (m * n * k) as f64 / best / 1e9;
                println!("n {n:5} k {k:5} m {m:3}: {:9.2} us, {rate:7.1} GFLOP/s", best * 1e6);
            }
        }
    }
}
