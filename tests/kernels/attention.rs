//! Attention over a paged cache: against the definition in f64, and the equalities of bits that it promises.

use cuda_std::math;
use half::bf16;
use host::ops::{
    self, DecodeBlocks, DecodeScratch, HeadShape, Mapped, NO_ROW, PAGE, Pages, PrefillTiles, Segment, TensorMaps,
};
use host::testing::{TestRng, Tolerance, assert_close};

use crate::compare::assert_same;
use crate::rig::{Bits, Guarded, Rig};

/// Queries, keys and values of the tokens of a sequence, all exact in bf16.
struct Sequence {
    heads: HeadShape,
    qkv: Vec<f32>,
}

impl Sequence {
    fn new(rng: &mut TestRng, heads: HeadShape, tokens: usize) -> Self {
        let stride = heads.qkv_width();
        let mut qkv: Vec<f32> = rng.bf16s(tokens * stride).iter().map(|value| value.to_f32()).collect();
        for row in qkv.chunks_mut(stride) {
            // Scores that differ enough for some tokens to matter much more than others; a power of 2 stays exact.
            row[..heads.query_width()].iter_mut().for_each(|value| *value *= 8.0);
        }
        Self { heads, qkv }
    }

    fn tokens(&self) -> usize {
        self.qkv.len() / self.heads.qkv_width()
    }

    fn row(&self, position: usize) -> &[f32] {
        &self.qkv[position * self.heads.qkv_width()..][..self.heads.qkv_width()]
    }

    fn query(&self, position: usize, head: usize) -> &[f32] {
        &self.row(position)[head * self.heads.width..][..self.heads.width]
    }

    fn key(&self, position: usize, head: usize) -> &[f32] {
        &self.row(position)[self.heads.query_width() + head * self.heads.width..][..self.heads.width]
    }

    fn value(&self, position: usize, head: usize) -> &[f32] {
        let start = self.heads.query_width() + (self.heads.kv_heads + head) * self.heads.width;
        &self.row(position)[start..][..self.heads.width]
    }

    /// Attention of the token at `position` in f64, all heads: by the definition with probabilities rounded to bf16
    /// relative to their span's maximum, or plain softmax.
    fn attend(&self, position: usize, rounded: bool) -> Vec<f64> {
        let HeadShape { query_heads, kv_heads, width } = self.heads;
        let mut out = Vec::new();
        for head in 0..query_heads {
            let kv_head = head / (query_heads / kv_heads);
            let query = self.query(position, head);
            let scores: Vec<f64> = (0..=position)
                .map(|token| {
                    let products = query.iter().zip(self.key(token, kv_head));
                    products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>() / (width as f64).sqrt()
                })
                .collect();
            let whole_max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (mut sum, mut sums) = (0.0, vec![0.0; width]);
            for (span, scores) in scores.chunks(64).enumerate() {
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                for (index, score) in scores.iter().enumerate() {
                    let p = (score - max).exp();
                    let p = if rounded { bf16::from_f64(p).to_f64() } else { p } * (max - whole_max).exp();
                    sum += p;
                    for (column, &value) in sums.iter_mut().zip(self.value(span * 64 + index, kv_head)) {
                        *column += p * f64::from(value);
                    }
                }
            }
            out.extend(sums.iter().map(|column| column / sum));
        }
        out
    }

    /// The definition of `kernels_gpu::attention` in plain loops, with the CPU's products (a chain of fused multiply-adds):
    /// the bits of the token at `position`, all heads.
    fn bits_of(&self, position: usize) -> Vec<bf16> {
        let HeadShape { query_heads, kv_heads, width } = self.heads;
        let scale = (std::f64::consts::LOG2_E / (width as f64).sqrt()) as f32;
        let mut out = Vec::new();
        for head in 0..query_heads {
            let kv_head = head / (query_heads / kv_heads);
            let (mut max, mut sum, mut values) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; width]);
            for start in (0..=position).step_by(64) {
                let tokens = start..(start + 64).min(position + 1);
                let score = |token: usize| {
                    let products = self.query(position, head).iter().zip(self.key(token, kv_head));
                    products.fold(0.0f32, |chain, (&q, &k)| q.mul_add(k, chain)) * scale
                };
                let scores: Vec<f32> = tokens.clone().map(score).collect();
                let span_max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let p: Vec<f32> =
                    scores.iter().map(|score| bf16::from_f32(math::exp2(score - span_max)).to_f32()).collect();
                let mut sums = [0.0f32; 4];
                p.iter().enumerate().for_each(|(j, p)| sums[j % 8 / 2] += p);
                let span_sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                let common = max.max(span_max);
                let (before, span) = (math::exp2(max - common), math::exp2(span_max - common));
                sum = sum.mul_add(before, span_sum * span);
                for (column, value) in values.iter_mut().enumerate() {
                    let products = p.iter().zip(tokens.clone());
                    let chain =
                        products.fold(0.0f32, |chain, (p, token)| p.mul_add(self.value(token, kv_head)[column], chain));
                    *value = value.mul_add(before, chain * span);
                }
                max = common;
            }
            out.extend(values.iter().map(|value| bf16::from_f32(value * (1.0 / sum))));
        }
        out
    }

    /// Panics unless `actual` has the definition's bits at these positions. A GPU rounds products as it likes.
    #[track_caller]
    fn check_bits(&self, rig: &Rig, actual: &[bf16], positions: impl IntoIterator<Item = usize>) {
        if !rig.device.is_cuda() {
            let expected: Vec<bf16> = positions.into_iter().flat_map(|position| self.bits_of(position)).collect();
            assert_same(actual, &expected, "the definition");
        }
    }

    /// Panics unless `actual` is the output of these positions.
    #[track_caller]
    fn check(&self, actual: &[bf16], positions: impl IntoIterator<Item = usize>) {
        let positions: Vec<usize> = positions.into_iter().collect();
        let expect = |rounded: bool| -> Vec<f64> {
            positions.iter().flat_map(|&position| self.attend(position, rounded)).collect()
        };
        // Probabilities that fall on the other side of a rounding boundary are rare, and cost less than this.
        assert_close(actual, &expect(true), Tolerance { absolute: 2e-3, relative: 1.05 / 256.0 });
        // Rounding probabilities costs 2^-9 of each in numerator and denominator; values are below 1.
        assert_close(actual, &expect(false), Tolerance { absolute: 1.0 / 256.0, relative: 1.05 / 256.0 });
    }
}

/// A cache with the keys and values of sequences in shuffled pages; unused pages and tails are NaN.
struct Cache {
    keys: Guarded<bf16>,
    values: Guarded<bf16>,
    tables: Guarded<u32>,
    /// Where each sequence's table starts.
    places: Vec<usize>,
}

impl Cache {
    fn new(rig: &Rig, sequences: &[&Sequence], seed: u64) -> Self {
        let heads = sequences[0].heads;
        let used: usize = sequences.iter().map(|sequence| sequence.tokens().div_ceil(PAGE)).sum();
        let pages = used + 3;
        let mut order: Vec<u32> = (0..pages as u32).collect();
        let mut rng = TestRng::new(seed);
        for index in (1..pages).rev() {
            order.swap(index, rng.below(index as u64 + 1) as usize);
        }
        // The tables do not start at 0.
        let mut tables = vec![u32::MAX; 3];
        let (mut places, mut qkv, mut positions, mut starts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for sequence in sequences {
            let count = sequence.tokens().div_ceil(PAGE);
            places.push(tables.len());
            qkv.extend_from_slice(&sequence.qkv);
            positions.extend(0..sequence.tokens() as u32);
            starts.extend(std::iter::repeat_n(tables.len() as u32, sequence.tokens()));
            tables.extend(order.drain(..count));
        }
        let tables = rig.filled(&tables);
        let mut keys = rig.unwritten::<bf16>(pages * heads.page_elements());
        let mut values = rig.unwritten::<bf16>(pages * heads.page_elements());
        ops::kv_write(
            &rig.device,
            &rig.filled(&qkv).view(),
            &rig.filled(&positions).view(),
            &rig.filled(&starts).view(),
            &tables.view(),
            &mut keys.view_mut(),
            &mut values.view_mut(),
            heads,
        )
        .unwrap();
        Self { keys, values, tables, places }
    }

    fn pages(&self) -> Pages<'_> {
        Pages { keys: self.keys.view(), values: self.values.view() }
    }

    /// Prefill of `rows` tokens of a sequence from position `first` on.
    fn prefill(&self, rig: &mut Rig, index: usize, sequence: &Sequence, first: usize, rows: usize) -> Vec<bf16> {
        self.prefills(rig, &[sequence], &[(index, first, rows)], rows.is_multiple_of(2))
    }

    /// Prefill of several chunks in one launch: of each which sequence, its first position and its rows. Rows of others
    /// stand before each chunk.
    fn prefills(
        &self,
        rig: &mut Rig,
        sequences: &[&Sequence],
        chunks: &[(usize, usize, usize)],
        short: bool,
    ) -> Vec<bf16> {
        let heads = sequences[0].heads;
        let stride = heads.qkv_width();
        let (mut qkv, mut segments) = (Vec::new(), Vec::new());
        for (sequence, &(index, first, rows)) in sequences.iter().zip(chunks) {
            qkv.extend(std::iter::repeat_n(f32::NAN, stride));
            let first_row = qkv.len() / stride;
            qkv.extend_from_slice(&sequence.qkv[first * stride..(first + rows) * stride]);
            segments.push(Segment { first_row, rows, first_position: first, table_start: self.places[index] });
        }
        let narrow = PrefillTiles::sized(segments.iter().copied(), short, heads).unwrap();
        let answer = self.prefills_in(rig, heads, &qkv, &segments, short, &narrow, None, None);
        if narrow.has_wide_warps(heads) {
            let wide = narrow.clone().with_wide_warps(true);
            let again =
                self.prefills_in(rig, heads, &qkv, &segments, short, &wide, Some("attention_prefill_wide_64"), None);
            assert_same(&again, &answer, "warps of 32 rows");
        }
        let filled = narrow.clone().filled_up_to(narrow.count() + 3);
        let again = self.prefills_in(rig, heads, &qkv, &segments, short, &filled, None, None);
        assert_same(&again, &answer, "with tiles without rows");
        if ops::wgmma_attends(&rig.device, heads) {
            let halves = [Mapped::Pages(self.keys.view()), Mapped::Pages(self.values.view())];
            let maps = TensorMaps::new(&rig.device, halves).unwrap();
            let name = if short { "attention_groups_short_64" } else { "attention_groups_64" };
            for tiles in [&narrow, &filled] {
                let again = self.prefills_in(rig, heads, &qkv, &segments, short, tiles, Some(name), Some(&maps));
                assert_same(&again, &answer, "by warpgroups");
            }
        }
        answer
    }

    /// The same with these tiles; `kernel` computes them, or the one that has no other name.
    fn prefills_in(
        &self,
        rig: &mut Rig,
        heads: HeadShape,
        qkv: &[f32],
        segments: &[Segment],
        short: bool,
        tiles: &PrefillTiles,
        kernel: Option<&'static str>,
        maps: Option<&TensorMaps>,
    ) -> Vec<bf16> {
        let (stride, width) = (heads.qkv_width(), heads.query_width());
        let mut out = rig.unwritten::<bf16>(qkv.len() / stride * width);
        ops::attention_prefill(
            &rig.device,
            &rig.filled(qkv).view(),
            self.pages(),
            maps,
            &self.tables.view(),
            tiles,
            &rig.filled(&tiles.numbers).view(),
            &mut out.view_mut(),
            heads,
        )
        .unwrap();
        let kernel = kernel.unwrap_or(match (heads.width, short) {
            (32, false) => "attention_prefill_32",
            (64, false) => "attention_prefill_64",
            (96, false) => "attention_prefill_96",
            (32, true) => "attention_prefill_short_32",
            (64, true) => "attention_prefill_short_64",
            (96, true) => "attention_prefill_short_96",
            _ => "attention_prefill_short_128",
        });
        for segment in segments {
            let other = &rig.download(&out)[(segment.first_row - 1) * width..][..width];
            assert!(other.iter().all(|value| value.bits() == bf16::UNWRITTEN), "a row of no segment was written");
        }
        let all = rig.read(kernel, &out);
        segments.iter().flat_map(|segment| all[segment.first_row * width..][..segment.rows * width].to_vec()).collect()
    }

    /// Decode of a batch: (which sequence, position) of each row.
    fn decode(&self, rig: &mut Rig, sequences: &[&Sequence], rows: &[(usize, usize)]) -> Vec<bf16> {
        self.decode_padded(rig, sequences, rows, 0, 0)
    }

    /// The same with `padding` rows that are none before the last row, and `more` tokens of context than there are, in both
    /// layouts.
    fn decode_padded(
        &self,
        rig: &mut Rig,
        sequences: &[&Sequence],
        rows: &[(usize, usize)],
        padding: usize,
        more: usize,
    ) -> Vec<bf16> {
        let alone = self.decode_in(rig, sequences, rows, padding, more, DecodeBlocks::PerContext);
        let shared = self.decode_in(rig, sequences, rows, padding, more, DecodeBlocks::PerSpan);
        assert_same(&alone, &shared, "a block per context and a block per span");
        if sequences[0].heads.width == 64 {
            let twos = self.decode_in(rig, sequences, rows, padding, more, DecodeBlocks::PerContextInTwos);
            assert_same(&twos, &shared, "a small block per context and a block per span");
        }
        shared
    }

    fn decode_in(
        &self,
        rig: &mut Rig,
        sequences: &[&Sequence],
        rows: &[(usize, usize)],
        padding: usize,
        more: usize,
        blocks: DecodeBlocks,
    ) -> Vec<bf16> {
        let heads = sequences[0].heads;
        let mut qkv = Vec::new();
        let (mut positions, mut starts) = (Vec::new(), Vec::new());
        for (place, &(index, position)) in rows.iter().enumerate() {
            if place + 1 == rows.len() {
                qkv.extend(std::iter::repeat_n(f32::NAN, padding * heads.qkv_width()));
                positions.extend(std::iter::repeat_n(NO_ROW, padding));
                starts.extend(std::iter::repeat_n(u32::MAX, padding));
            }
            qkv.extend_from_slice(sequences[index].row(position));
            positions.push(position as u32);
            starts.push(self.places[index] as u32);
        }
        let longest = rows.iter().map(|&(_, position)| position + 1).max().unwrap() + more;
        let mut partials = rig.unwritten::<f32>(ops::partials_len(heads, positions.len(), longest.div_ceil(PAGE)));
        let mut counters = rig.filled(&vec![0u32; ops::counters_len(heads, positions.len())]);
        let mut out = rig.unwritten::<bf16>(positions.len() * heads.query_width());
        let mut scratch = DecodeScratch { partials: partials.view_mut(), counters: counters.view_mut() };
        // Twice with the same counters, as the layers of a step use them.
        for _ in 0..2 {
            ops::attention_decode(
                &rig.device,
                blocks,
                &rig.filled(&qkv).view(),
                self.pages(),
                &rig.filled(&positions).view(),
                &rig.filled(&starts).view(),
                &self.tables.view(),
                &mut scratch,
                &mut out.view_mut(),
                heads,
                longest,
            )
            .unwrap();
        }
        rig.download(&partials);
        assert!(rig.download(&counters).iter().all(|&count| count == 0), "counters are 0 again");
        let kernel = match (heads.width, blocks) {
            (32, DecodeBlocks::PerSpan) => "attention_decode_32",
            (64, DecodeBlocks::PerSpan) => "attention_decode_64",
            (96, DecodeBlocks::PerSpan) => "attention_decode_96",
            (_, DecodeBlocks::PerSpan) => "attention_decode_128",
            (32, DecodeBlocks::PerContext) => "attention_decode_short_32",
            (64, DecodeBlocks::PerContext) => "attention_decode_short_64",
            (64, DecodeBlocks::PerContextInTwos) => "attention_decode_short_two_64",
            (32, DecodeBlocks::PerContextInTwos) => "attention_decode_short_32",
            (96, _) => "attention_decode_short_96",
            (_, _) => "attention_decode_short_128",
        };
        let width = heads.query_width();
        let mut values = rig.download(&out);
        let none: Vec<bf16> = values.drain((rows.len() - 1) * width..(rows.len() - 1 + padding) * width).collect();
        assert!(none.iter().all(|value| value.bits() == bf16::UNWRITTEN), "a row of padding was written");
        let real = rig.filled(&values);
        rig.read(kernel, &real)
    }
}

/// Every head width with ratios 1, 2, 7, 8, and 14 heads on 2.
fn shapes() -> Vec<HeadShape> {
    let heads = [(2, 2), (4, 2), (7, 1), (8, 1), (14, 2)];
    let shape = |width: usize, (query_heads, kv_heads): (usize, usize)| HeadShape { query_heads, kv_heads, width };
    [32, 64, 96, 128].into_iter().flat_map(|width| heads.map(|heads| shape(width, heads))).collect()
}

/// A shape of each width, with one ratio each, for checked mode and the heavier tests.
fn few_shapes() -> Vec<HeadShape> {
    [(2, 2, 32), (14, 2, 64), (7, 1, 96), (2, 1, 128)]
        .map(|(query_heads, kv_heads, width)| HeadShape { query_heads, kv_heads, width })
        .to_vec()
}

pub(crate) fn oracle(rig: &mut Rig) {
    let contexts = rig.pick(&[1, 65][..], &[1, 63, 64, 65, 127, 128, 200, 1100]);
    let chunks = rig.pick(
        &[(0, 17), (61, 4)][..],
        &[(0, 1), (0, 63), (0, 64), (0, 65), (1, 130), (37, 91), (63, 2), (127, 1), (199, 1), (0, 200)],
    );
    for heads in rig.pick(few_shapes(), shapes()) {
        let mut rng = TestRng::new(31);
        let sequences: Vec<Sequence> = contexts.iter().map(|&tokens| Sequence::new(&mut rng, heads, tokens)).collect();
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let cache = Cache::new(rig, &sequences, 32);
        let rows: Vec<(usize, usize)> = contexts.iter().map(|&context| context - 1).enumerate().collect();
        let width = heads.query_width();
        let batch = cache.decode(rig, &sequences, &rows);
        for (&(index, position), result) in rows.iter().zip(batch.chunks(width)) {
            sequences[index].check(result, std::iter::once(position));
            sequences[index].check_bits(rig, result, std::iter::once(position));
            // Alone, a row gives the bits that it gives in the batch.
            let alone = cache.decode(rig, &sequences, &[(index, position)]);
            assert_same(&alone, result, "a row alone");
        }
        // Chunks of one sequence, whose pages hold later tokens already.
        let longest = rig.pick(1, 6);
        for &(first, rows) in chunks {
            let result = cache.prefill(rig, longest, sequences[longest], first, rows);
            sequences[longest].check(&result, first..first + rows);
            sequences[longest].check_bits(rig, &result, first..first + rows);
        }
    }
    if rig.pick(false, true) {
        let heads = HeadShape { query_heads: 2, kv_heads: 1, width: 64 };
        let sequence = Sequence::new(&mut TestRng::new(33), heads, 1000);
        let cache = Cache::new(rig, &[&sequence], 34);
        let result = cache.prefill(rig, 0, &sequence, 0, 1000);
        let width = heads.query_width();
        for position in (0..1000).step_by(37).chain([999]) {
            sequence.check(&result[position * width..][..width], std::iter::once(position));
        }
    }
}

/// Prefill of n tokens, in one chunk or several, and decode of each of them give the same bits.
pub(crate) fn bits(rig: &mut Rig) {
    let tokens = rig.pick(67, 200);
    let cuts = rig.pick(vec![0, 3, 67], vec![0, 37, 38, 131, 200]);
    for heads in rig.pick(few_shapes(), shapes()) {
        let mut rng = TestRng::new(35);
        let other = Sequence::new(&mut rng, heads, 70);
        let sequence = Sequence::new(&mut rng, heads, tokens);
        let sequences = [&other, &sequence];
        let cache = Cache::new(rig, &sequences, 36);
        let whole = cache.prefill(rig, 1, &sequence, 0, tokens);
        sequence.check(&whole[..heads.query_width()], std::iter::once(0));

        let mut chunked = Vec::new();
        for cut in cuts.windows(2) {
            chunked.extend(cache.prefill(rig, 1, &sequence, cut[0], cut[1] - cut[0]));
        }
        assert_same(&chunked, &whole, "chunks");

        // The rows of another sequence between them, and in falling order.
        let positions: Vec<usize> = (0..tokens).rev().step_by(rig.pick(13, 1)).collect();
        let mut rows = vec![(0, 69)];
        rows.extend(positions.iter().map(|&position| (1, position)));
        let decoded = cache.decode(rig, &sequences, &rows);
        for (&position, result) in positions.iter().zip(decoded.chunks(heads.query_width()).skip(1)) {
            assert_same(result, &whole[position * heads.query_width()..][..heads.query_width()], "decode and prefill");
        }

        // In other pages the bits are the same.
        let moved = Cache::new(rig, &[&sequence], 37).prefill(rig, 0, &sequence, 0, tokens);
        assert_same(&moved, &whole, "other pages");
    }
}

/// Contexts of one span to more than are merged at once, ending at odd places, in ratios from 1 to 16: both layouts of decode
/// give the bits of the definition (on a GPU, of prefill).
pub(crate) fn spans(rig: &mut Rig) {
    let contexts = rig.pick(
        &[1, 8, 64, 130, 330][..],
        &[1, 7, 9, 57, 64, 65, 131, 193, 256, 257, 319, 449, 512, 577, 1025, 2200, 4097, 6144, 6145, 6500],
    );
    // One shape merges more spans than have their factors computed at once (96, of 64 tokens).
    let shapes = rig.pick(
        vec![(16, 1, 64, 330), (3, 1, 128, 330)],
        vec![
            (14, 2, 64, 6500),
            (1, 1, 64, 600),
            (16, 1, 64, 600),
            (16, 1, 32, 1025),
            (7, 1, 96, 600),
            (8, 2, 128, 600),
            (16, 1, 128, 600),
        ],
    );
    for (query_heads, kv_heads, width, longest) in shapes {
        let heads = HeadShape { query_heads, kv_heads, width };
        let contexts: Vec<usize> = contexts.iter().copied().filter(|&context| context <= longest).collect();
        let mut rng = TestRng::new(43);
        let tokens = *contexts.iter().max().unwrap();
        let sequence = Sequence::new(&mut rng, heads, tokens);
        // The pages hold later tokens already: none of them may be seen.
        let cache = Cache::new(rig, &[&sequence], 44);
        for batch in contexts.chunks(6) {
            let rows: Vec<(usize, usize)> = batch.iter().map(|&context| (0, context - 1)).collect();
            let decoded = cache.decode(rig, &[&sequence], &rows);
            for (&(_, position), result) in rows.iter().zip(decoded.chunks(heads.query_width())) {
                sequence.check_bits(rig, result, std::iter::once(position));
                let filled = cache.prefill(rig, 0, &sequence, position, 1);
                assert_same(result, &filled, "decode and prefill");
            }
        }
        // Pages that end with the row's own token, and NaN behind it.
        for &context in contexts.iter().filter(|&&context| context < 600) {
            let sequence = Sequence { heads, qkv: sequence.qkv[..context * heads.qkv_width()].to_vec() };
            let cache = Cache::new(rig, &[&sequence], 45);
            let result = cache.decode_padded(rig, &[&sequence], &[(0, context - 1)], 1, 64);
            sequence.check_bits(rig, &result, std::iter::once(context - 1));
        }
    }
}

/// What comes later changes no bit.
pub(crate) fn causality(rig: &mut Rig) {
    let (tokens, seen) = rig.pick((20, 14), (150, 95));
    for heads in few_shapes() {
        let mut rng = TestRng::new(38);
        let sequence = Sequence::new(&mut rng, heads, tokens);
        let mut changed = Sequence { heads, qkv: sequence.qkv.clone() };
        for value in &mut changed.qkv[seen * heads.qkv_width()..] {
            *value = bf16::from_f32(rng.next_f32() * 1000.0).to_f32();
        }
        let both = [&sequence, &changed];
        let cache = Cache::new(rig, &both, 39);
        let width = heads.query_width();
        let before = cache.prefill(rig, 0, &sequence, 0, tokens);
        let after = cache.prefill(rig, 1, &changed, 0, tokens);
        sequence.check(&before, 0..tokens);
        assert_same(&after[..seen * width], &before[..seen * width], "prefill");
        assert_ne!(after[seen * width..], before[seen * width..], "the change is seen where it is visible");
        let rows = |index: usize| [(index, seen - 1), (index, 0), (index, seen / 2)];
        assert_same(&cache.decode(rig, &both, &rows(1)), &cache.decode(rig, &both, &rows(0)), "decode");
    }
}

/// Chunks of several sequences in one launch, and decode among rows of padding with blocks to spare.
pub(crate) fn company(rig: &mut Rig) {
    let tokens = rig.pick([5, 70, 18], [130, 300, 77]);
    let chunks = rig.pick([(0, 0, 5), (1, 62, 8), (2, 17, 1)], [(0, 1, 129), (1, 0, 300), (2, 60, 17)]);
    for heads in few_shapes() {
        let mut rng = TestRng::new(41);
        let sequences = tokens.map(|tokens| Sequence::new(&mut rng, heads, tokens));
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let cache = Cache::new(rig, &sequences, 42);
        let width = heads.query_width();
        for short in [false, true] {
            let all = cache.prefills(rig, &sequences, &chunks, short);
            let mut start = 0;
            for (sequence, (index, first, rows)) in sequences.iter().zip(chunks) {
                let part = &all[start..start + rows * width];
                start += rows * width;
                sequence.check(part, first..first + rows);
                sequence.check_bits(rig, part, first..first + rows);
                let alone = cache.prefills(rig, &[sequence], &[(index, first, rows)], !short);
                assert_same(part, &alone, "a chunk alone, in tiles of the other size");
            }
        }
        let rows = [(1, tokens[1] - 1), (0, 0), (2, tokens[2] - 1), (1, 63)];
        let plain = cache.decode(rig, &sequences, &rows);
        let padded = cache.decode_padded(rig, &sequences, &rows, 2, 200);
        assert_same(&padded, &plain, "rows of padding, and more blocks than spans");
        for (&(index, position), result) in rows.iter().zip(plain.chunks(width)) {
            sequences[index].check(result, std::iter::once(position));
            sequences[index].check_bits(rig, result, std::iter::once(position));
        }
    }
}

/// The order of tiles: the longest contexts first, no tile across a boundary of its size, every row once.
#[test]
fn tiles_cover_every_row_once() {
    let segments = [(3, 1, 0, 7), (4, 300, 100, 9), (304, 64, 64, 20)]
        .map(|(first_row, rows, first_position, table_start)| Segment { first_row, rows, first_position, table_start });
    let heads = HeadShape { query_heads: 2, kv_heads: 1, width: 96 };
    let tiles = |short| PrefillTiles::sized(segments.into_iter(), short, heads).unwrap().numbers;
    let large =
        [[288, 16, 384, 9], [160, 128, 256, 9], [32, 128, 128, 9], [4, 28, 100, 9], [304, 64, 64, 20], [3, 1, 0, 7]];
    assert_eq!(tiles(false), large.as_flattened());
    let mut rows: Vec<u32> = tiles(true).chunks(4).flat_map(|tile| tile[0]..tile[0] + tile[1]).collect();
    rows.sort_unstable();
    assert_eq!(rows, (3..368).collect::<Vec<u32>>());
    let wide = PrefillTiles::sized(segments.into_iter(), false, HeadShape { width: 128, ..heads }).unwrap();
    assert_eq!(wide.numbers, tiles(true));
    let ends: Vec<u32> = tiles(true).chunks(4).map(|tile| (tile[2] + tile[1]).div_ceil(64)).collect();
    assert!(ends.is_sorted_by(|a, b| a >= b), "{ends:?}");

    let filled = PrefillTiles::sized(segments.into_iter(), false, heads).unwrap().filled_up_to(8);
    assert_eq!(filled.count(), 8);
    assert_eq!(filled.numbers[..24], tiles(false), "as they were");
    assert_eq!(filled.numbers[24..], [0, 0, 0, 7].repeat(2), "no rows");
    assert_eq!(filled.clone().filled_up_to(3), filled, "none are taken away");
}

/// Microseconds of attention in both layouts, each layer with pages of its own, as many as a model has.
#[test]
#[ignore = "a measurement; needs a GPU"]
fn speed() {
    use std::time::Instant;
    const LAYERS: usize = 24;
    let rig = Rig::cuda();
    let device = rig.device.clone();
    for width in [64, 128] {
        let heads = HeadShape { query_heads: 14, kv_heads: 2, width };
        for (rows, context) in [
            (1, 100),
            (1, 200),
            (8, 200),
            (64, 200),
            (256, 200),
            (1, 500),
            (8, 500),
            (64, 500),
            (256, 500),
            (1, 1000),
            (8, 1000),
            (64, 1000),
            (1, 4096),
            (8, 4096),
            (1, 32_000),
        ] {
            let spans = usize::div_ceil(context, PAGE);
            let qkv = rig.filled(&TestRng::new(51).f32s(rows * heads.qkv_width()));
            let mut out = rig.unwritten::<bf16>(rows * heads.query_width());
            let positions = rig.filled(&vec![context as u32 - 1; rows]);
            let starts = rig.filled(&(0..rows).map(|row| (row * spans) as u32).collect::<Vec<_>>());
            let tables = rig.filled(&(0..(rows * spans) as u32).collect::<Vec<_>>());
            let mut partials = rig.unwritten::<f32>(ops::partials_len(heads, rows, spans));
            let mut counters = rig.filled(&vec![0u32; ops::counters_len(heads, rows)]);
            let content = TestRng::new(52).bf16s(rows * spans * heads.page_elements());
            let layers: Vec<_> = (0..LAYERS).map(|_| (rig.filled(&content), rig.filled(&content))).collect();
            for blocks in [DecodeBlocks::PerContext, DecodeBlocks::PerContextInTwos, DecodeBlocks::PerSpan] {
                let mut step = || {
                    for (keys, values) in &layers {
                        ops::attention_decode(
                            &device,
                            blocks,
                            &qkv.view(),
                            Pages { keys: keys.view(), values: values.view() },
                            &positions.view(),
                            &starts.view(),
                            &tables.view(),
                            &mut DecodeScratch { partials: partials.view_mut(), counters: counters.view_mut() },
                            &mut out.view_mut(),
                            heads,
                            context,
                        )?;
                    }
                    Ok(())
                };
                let mut recording = host::device::Recording::default();
                let mut best = f64::INFINITY;
                for _ in 0..8 {
                    device.synchronize().unwrap();
                    let start = Instant::now();
                    for _ in 0..4 {
                        device.replay(&mut recording, &mut step).unwrap();
                    }
                    device.synchronize().unwrap();
                    best = best.min(start.elapsed().as_secs_f64() * 1e6 / (4 * LAYERS) as f64);
                }
                let chosen = if DecodeBlocks::for_contexts(&device, heads, rows, spans, rows * spans) == blocks {
                    ", chosen"
                } else {
                    ""
                };
                println!("D {width}, {rows} rows at {context}, {blocks:?}: {best:.2} us{chosen}");
            }
        }
    }
}
