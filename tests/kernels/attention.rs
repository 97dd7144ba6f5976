//! Attention over a paged cache: against the definition in f64, and the equalities of bits that it promises.

use cuda_std::launch::Grid;
use half::bf16;
use host::ops::{self, HeadShape, PAGE, Pages};
use host::testing::{TestRng, Tolerance, assert_close};
use kernels_gpu::attention_decode::attention_merge;

use crate::compare::{assert_rounded, assert_same};
use crate::rig::{Guarded, Rig};

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
    /// Where each sequence's table starts, and its pages.
    places: Vec<(usize, usize)>,
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
            places.push((tables.len(), count));
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
        let heads = sequence.heads;
        let stride = heads.qkv_width();
        let (start, count) = self.places[index];
        let qkv = rig.filled(&sequence.qkv[first * stride..(first + rows) * stride]);
        let table = self.tables.view().slice(start..start + count).unwrap();
        let mut out = rig.unwritten::<bf16>(rows * heads.query_width());
        ops::attention_prefill(&rig.device, &qkv.view(), self.pages(), &table, &mut out.view_mut(), heads, first)
            .unwrap();
        let kernel = match heads.width {
            32 => "attention_prefill_32",
            64 => "attention_prefill_64",
            96 => "attention_prefill_96",
            _ => "attention_prefill_128",
        };
        rig.read(kernel, &out)
    }

    /// Decode of a batch: (which sequence, position) of each row.
    fn decode(&self, rig: &mut Rig, sequences: &[&Sequence], rows: &[(usize, usize)]) -> Vec<bf16> {
        let heads = sequences[0].heads;
        let qkv: Vec<f32> =
            rows.iter().flat_map(|&(index, position)| sequences[index].row(position).to_vec()).collect();
        let positions: Vec<u32> = rows.iter().map(|&(_, position)| position as u32).collect();
        let starts: Vec<u32> = rows.iter().map(|&(index, _)| self.places[index].0 as u32).collect();
        let longest = rows.iter().map(|&(_, position)| position + 1).max().unwrap();
        let spans = longest.div_ceil(PAGE);
        let mut partials = rig.unwritten::<f32>(ops::partials_len(heads, rows.len(), spans));
        let mut out = rig.unwritten::<bf16>(rows.len() * heads.query_width());
        ops::attention_decode(
            &rig.device,
            &rig.filled(&qkv).view(),
            self.pages(),
            &rig.filled(&positions).view(),
            &rig.filled(&starts).view(),
            &self.tables.view(),
            &mut partials.view_mut(),
            &mut out.view_mut(),
            heads,
            longest,
        )
        .unwrap();
        rig.download(&partials);
        let kernel = match heads.width {
            32 => "attention_decode_32",
            64 => "attention_decode_64",
            96 => "attention_decode_96",
            _ => "attention_decode_128",
        };
        rig.read(kernel, &out)
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
    let contexts = rig.pick(&[1, 65][..], &[1, 63, 64, 65, 127, 128, 200, 1000]);
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
            // Alone, a row gives the bits that it gives in the batch.
            let alone = cache.decode(rig, &sequences, &[(index, position)]);
            assert_same(&alone, result, "a row alone");
        }
        // Chunks of one sequence, whose pages hold later tokens already.
        let longest = rig.pick(1, 6);
        for &(first, rows) in chunks {
            let result = cache.prefill(rig, longest, sequences[longest], first, rows);
            sequences[longest].check(&result, first..first + rows);
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

pub(crate) fn merge(rig: &mut Rig) {
    let full = [(32, 3, 4), (64, 14, 7), (96, 2, 5), (128, 8, 16)];
    for &(width, heads, max_spans) in rig.pick(&full[..1], &full) {
        let positions: Vec<u32> = [0, 63, 64, 130, max_spans * 64 - 1].map(|position| position as u32).to_vec();
        let rows = positions.len();
        let mut rng = TestRng::new(40);
        let size = width + 2;
        // Spans beyond a row's position are NaN.
        let mut partials = vec![f32::NAN; rows * heads * max_spans * size];
        let mut expected = Vec::new();
        for (index, spans) in partials.chunks_mut(max_spans * size).enumerate() {
            let visible = positions[index / heads] as usize / PAGE + 1;
            for span in spans.chunks_mut(size).take(visible) {
                let (out, rest) = span.split_at_mut(width);
                out.iter_mut().for_each(|value| *value = rng.next_f32() * 20.0);
                rest[0] = rng.next_f32() * 12.0;
                rest[1] = rng.next_f32() * 8.0 + 9.0;
            }
            let spans: Vec<&[f32]> = spans.chunks(size).take(visible).collect();
            let max = spans.iter().map(|span| f64::from(span[width])).fold(f64::NEG_INFINITY, f64::max);
            let weight = |span: &[f32]| (f64::from(span[width]) - max).exp2();
            let sum: f64 = spans.iter().map(|span| weight(span) * f64::from(span[width + 1])).sum();
            expected.extend(
                (0..width)
                    .map(|column| spans.iter().map(|span| weight(span) * f64::from(span[column])).sum::<f64>() / sum),
            );
        }
        let (partial_buffer, position_buffer) = (rig.filled(&partials), rig.filled(&positions));
        let mut out = rig.unwritten::<bf16>(rows * heads * width);
        let mut view = out.view_mut();
        let (partial_view, position_view) = (partial_buffer.view(), position_buffer.view());
        let launch = attention_merge::launch(&partial_view, &position_view, &mut view, width as u32, max_spans as u32);
        rig.device.launch(launch, Grid::new_2d(heads as u32, rows as u32)).unwrap();
        let result = rig.read("attention_merge", &out);
        // Sums of terms of both signs cancel: judge by the size of the terms as well.
        assert_close(&result, &expected, Tolerance { absolute: 3e-6, relative: 1.01 / 256.0 });
        // Where one span is all there is, nothing cancels.
        assert_rounded(&result[..heads * width], &expected[..heads * width], 1e-6);
    }
}
