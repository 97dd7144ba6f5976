//! The fused layers of few tokens against the separate operations, bit by bit.

use half::bf16;
use host::device::{MemoryKind, Weight};
use host::ops::{self, DecodeBlocks, DecodeScratch, HeadShape, Norm, PAGE, Pages, PagesMut, Pairing, Places};
use host::testing::TestRng;

use crate::compare::assert_same;
use crate::rig::{Guarded, Rig};

const EPS: f32 = 1e-6;

/// A model's sizes.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    hidden: usize,
    heads: HeadShape,
    ffn: usize,
    vocab: usize,
    bias: bool,
}

fn cases(rig: &Rig) -> Vec<Sizes> {
    let small = Sizes {
        tokens: 3,
        hidden: 128,
        heads: HeadShape { query_heads: 2, kv_heads: 1, width: 32 },
        ffn: 64,
        vocab: 50,
        bias: true,
    };
    let heads = |query_heads, kv_heads, width| HeadShape { query_heads, kv_heads, width };
    rig.pick(
        vec![small, Sizes { tokens: 1, bias: false, ..small }],
        vec![
            Sizes { tokens: 1, hidden: 896, heads: heads(14, 2, 64), ffn: 1216, vocab: 5000, bias: true },
            Sizes { tokens: 2, hidden: 192, heads: heads(2, 2, 96), ffn: 512, vocab: 333, bias: false },
            Sizes { tokens: 5, hidden: 1088, heads: heads(4, 1, 128), ffn: 4864, vocab: 1111, bias: true },
            Sizes { tokens: 8, hidden: 896, heads: heads(14, 2, 64), ffn: 2432, vocab: 2049, bias: true },
        ],
    )
}

fn weight(rig: &Rig, rng: &mut TestRng, outputs: usize, inputs: usize) -> Weight {
    let rows: Vec<bf16> =
        rng.bf16s(outputs * inputs).into_iter().map(|value| bf16::from_f32(value.to_f32() * 0.1)).collect();
    let buffer = rig.device.alloc_from(&rows, MemoryKind::Weights, "weight").unwrap();
    rig.device.prepare_weight(buffer, outputs, inputs, true).unwrap()
}

/// The tensor-core chain as its own operation.
fn linear(rig: &Rig, x: &Guarded<bf16>, weight: &Weight, tokens: usize) -> Guarded<f32> {
    let mut out = rig.unwritten(tokens * weight.n());
    let rows = weight.rows().unwrap();
    ops::linear_kernel(&rig.device, &x.view(), &rows.as_slice(), &mut out.view_mut(), weight.k()).unwrap();
    out
}

fn normed(rig: &Rig, residual: &Guarded<f32>, gain: &Guarded<bf16>, len: usize) -> Guarded<bf16> {
    let mut out = rig.unwritten(len);
    ops::rms_norm(&rig.device, &residual.view(), &gain.view(), &mut out.view_mut(), EPS).unwrap();
    out
}

pub(crate) fn qkv(rig: &mut Rig) {
    for Sizes { tokens, hidden, heads, bias, .. } in cases(rig) {
        let mut rng = TestRng::new(91);
        let width = heads.qkv_width();
        let layer = weight(rig, &mut rng, width, hidden);
        let residual = rig.filled(&rng.f32s(tokens * hidden));
        let gain = rig.filled(&rng.bf16s(hidden));
        let bias = bias.then(|| rig.filled(&rng.bf16s(width)));
        let contexts = 3 * PAGE;
        let table = rig.filled(&rng.f32s(contexts * heads.width));
        // The last of several rows is padding.
        let positions: Vec<u32> = (0..tokens)
            .map(|row| if row > 0 && row + 1 == tokens { u32::MAX } else { rng.below(contexts as u64) as u32 })
            .collect();
        let page_count = 3 * tokens + 1;
        let mut pages: Vec<u32> = (0..page_count as u32).collect();
        for index in (1..page_count).rev() {
            pages.swap(index, rng.below(index as u64 + 1) as usize);
        }
        let row_tables: Vec<u32> = (0..tokens as u32).map(|row| row * 3).collect();
        let (positions, row_tables, page_tables) =
            (rig.filled(&positions), rig.filled(&row_tables), rig.filled(&pages));
        let page_elements = page_count * heads.page_elements();
        let empty = vec![bf16::NAN; page_elements];

        let x = normed(rig, &residual, &gain, tokens * hidden);
        let mut expected = linear(rig, &x, &layer, tokens);
        let device = rig.device.clone();
        if let Some(bias) = &bias {
            ops::bias_add(&device, &mut expected.view_mut(), &bias.view()).unwrap();
        }
        ops::rotary(&device, &mut expected.view_mut(), &positions.view(), &table.view(), heads, Pairing::Halves)
            .unwrap();
        let (mut keys, mut values) = (rig.filled(&empty), rig.filled(&empty));
        ops::kv_write(
            &device,
            &expected.view(),
            &positions.view(),
            &row_tables.view(),
            &page_tables.view(),
            &mut keys.view_mut(),
            &mut values.view_mut(),
            heads,
        )
        .unwrap();

        let mut queries = rig.filled(&vec![f32::NAN; tokens * width]);
        let (mut new_keys, mut new_values) = (rig.filled(&empty), rig.filled(&empty));
        ops::few_qkv(
            &device,
            &residual.view(),
            Norm { gain: gain.view(), eps: EPS },
            &layer,
            bias.as_ref().map(Guarded::view).as_ref(),
            &table.view(),
            Places { positions: positions.view(), row_tables: row_tables.view(), page_tables: page_tables.view() },
            &mut queries.view_mut(),
            &mut PagesMut { keys: new_keys.view_mut(), values: new_values.view_mut() },
            heads,
        )
        .unwrap();
        let what = format!("{tokens} tokens of {hidden}, {heads:?}");
        let (expected, positions) = (rig.download(&expected), rig.download(&positions));
        let queries = rig.read(if tokens <= kernels_gpu::few::NARROW { "few_qkv" } else { "few_qkv_wide" }, &queries);
        for row in 0..tokens {
            let (found, wanted) = (&queries[row * width..][..width], &expected[row * width..][..width]);
            let (found, rest) = found.split_at(heads.query_width());
            if positions[row] == u32::MAX {
                assert!(found.iter().all(|value| value.is_nan()), "padding was written");
            } else {
                assert_same(found, &wanted[..heads.query_width()], &what);
            }
            assert!(rest.iter().all(|value| value.is_nan()), "keys and values are not left here");
        }
        let (keys, values) = (rig.download(&keys), rig.download(&values));
        assert_same(
            &rig.read(if tokens <= kernels_gpu::few::NARROW { "few_qkv" } else { "few_qkv_wide" }, &new_keys),
            &keys,
            &what,
        );
        assert_same(
            &rig.read(if tokens <= kernels_gpu::few::NARROW { "few_qkv" } else { "few_qkv_wide" }, &new_values),
            &values,
            &what,
        );
    }
}

pub(crate) fn gate_up(rig: &mut Rig) {
    for Sizes { tokens, hidden, ffn, .. } in cases(rig) {
        let mut rng = TestRng::new(92);
        let layer = weight(rig, &mut rng, 2 * ffn, hidden);
        let residual = rig.filled(&rng.f32s(tokens * hidden));
        let gain = rig.filled(&rng.bf16s(hidden));
        let x = normed(rig, &residual, &gain, tokens * hidden);
        let mut both = rig.unwritten::<bf16>(tokens * 2 * ffn);
        let device = rig.device.clone();
        let rows = layer.rows().unwrap();
        ops::linear_kernel(&device, &x.view(), &rows.as_slice(), &mut both.view_mut(), hidden).unwrap();
        let mut expected = rig.unwritten::<bf16>(tokens * ffn);
        ops::silu_mul(&device, &both.view(), &mut expected.view_mut(), ffn).unwrap();

        let mut out = rig.unwritten::<bf16>(tokens * ffn);
        let norm = Norm { gain: gain.view(), eps: EPS };
        ops::few_gate_up(&device, &residual.view(), norm, &layer, &mut out.view_mut()).unwrap();
        let expected = rig.download(&expected);
        assert_same(
            &rig.read(if tokens <= kernels_gpu::few::NARROW { "few_gate_up" } else { "few_gate_up_wide" }, &out),
            &expected,
            &format!("{tokens} tokens of {hidden} x {ffn}"),
        );
    }
}

pub(crate) fn residual(rig: &mut Rig) {
    for Sizes { tokens, hidden, .. } in cases(rig) {
        for (segments, name) in [(1, "few_residual_1"), (2, "few_residual_2"), (4, "few_residual_4")] {
            // Each segment has its own number of stages; the ring has 14.
            let part = rig.pick(64, 64 * (tokens + 10));
            let width = part * segments;
            let mut rng = TestRng::new(93);
            let rows: Vec<bf16> = rng.bf16s(hidden * width);
            let buffer = rig.device.alloc_from(&rows, MemoryKind::Weights, "weight").unwrap();
            let layer = rig.device.prepare_weight(buffer, hidden, width, true).unwrap();
            let x = rng.bf16s(tokens * width);
            let before = rng.f32s(tokens * hidden);
            let device = rig.device.clone();

            // Each segment's chain as an operation of its own, added in order.
            let mut expected = vec![0.0f32; tokens * hidden];
            for segment in 0..segments {
                let columns = |values: &[bf16]| -> Vec<bf16> {
                    values.chunks(width).flat_map(|row| &row[segment * part..][..part]).copied().collect()
                };
                let (x, rows) = (rig.filled(&columns(&x)), rig.filled(&columns(&rows)));
                let mut out = rig.unwritten(tokens * hidden);
                ops::linear_kernel(&device, &x.view(), &rows.view(), &mut out.view_mut(), part).unwrap();
                for (sum, more) in expected.iter_mut().zip(rig.download(&out)) {
                    *sum = if segment == 0 { more } else { *sum + more };
                }
            }
            let expected: Vec<f32> = before.iter().zip(&expected).map(|(before, sum)| before + sum).collect();

            // The same through the operations of many rows.
            let (x, mut out) = (rig.filled(&x), rig.filled(&before));
            let mut parts = rig.unwritten(segments * tokens * hidden);
            let rows = rig.filled(&rows);
            ops::linear_parts_kernel(&device, &x.view(), &rows.view(), &mut parts.view_mut(), width).unwrap();
            let (mut stream, mut out_norm) = (rig.filled(&before), rig.unwritten::<bf16>(tokens * hidden));
            let gain = rig.filled(&rng.bf16s(hidden));
            let (residual, rounded) = (&mut stream.view_mut(), &mut out_norm.view_mut());
            ops::residual_norm(&device, residual, &parts.view(), &gain.view(), rounded, EPS).unwrap();
            assert_same(&rig.download(&stream), &expected, "residual_norm of parts");

            ops::few_residual_in(&device, segments, &x.view(), &layer, &mut out.view_mut()).unwrap();
            let what = format!("{tokens} tokens of {width} x {hidden} in {segments} segments");
            assert_same(&rig.read(name, &out), &expected, &what);
            let fused = normed(rig, &out, &gain, tokens * hidden);
            assert_same(&rig.download(&out_norm), &rig.download(&fused), &what);
        }
    }
}

pub(crate) fn logits(rig: &mut Rig) {
    for Sizes { tokens, hidden, vocab, .. } in cases(rig) {
        let mut rng = TestRng::new(94);
        let layer = weight(rig, &mut rng, vocab, hidden);
        let residual = rig.filled(&rng.f32s(tokens * hidden));
        let gain = rig.filled(&rng.bf16s(hidden));
        let x = normed(rig, &residual, &gain, tokens * hidden);
        let logits = linear(rig, &x, &layer, tokens);
        let mut ids = rig.unwritten::<u32>(tokens);
        let device = rig.device.clone();
        ops::argmax(&device, &logits.view(), &mut ids.view_mut()).unwrap();
        let (logits, ids) = (rig.download(&logits), rig.download(&ids));

        for wanted in [tokens * vocab, 0] {
            let mut found = rig.unwritten::<f32>(wanted);
            let mut best = rig.unwritten::<u64>(ops::best_len(&device));
            let mut chosen = rig.unwritten::<u32>(tokens);
            let norm = Norm { gain: gain.view(), eps: EPS };
            ops::few_logits(
                &device,
                &residual.view(),
                norm,
                &layer,
                &mut found.view_mut(),
                &mut best.view_mut(),
                &mut chosen.view_mut(),
            )
            .unwrap();
            let what = format!("{tokens} tokens of {hidden} x {vocab}");
            assert_same(&rig.read("few_logits", &found), &logits[..wanted], &what);
            assert_same(&rig.read("few_argmax", &chosen), &ids, &what);
        }
    }
}

/// Microseconds of each layer of a model of Qwen2.5-0.5B's shape, with more weights than the cache holds.
#[test]
#[ignore = "a measurement; needs a GPU"]
fn speed() {
    use std::time::Instant;
    const LAYERS: usize = 24;
    let rig = Rig::cuda();
    let device = rig.device.clone();
    let heads = HeadShape { query_heads: 14, kv_heads: 2, width: 64 };
    let (hidden, ffn, vocab) = (896, 4864, 151_936);
    let mut rng = TestRng::new(1);
    let mut weights = |outputs: usize, inputs: usize, count: usize| -> Vec<Weight> {
        (0..count).map(|_| weight(&rig, &mut rng, outputs, inputs)).collect()
    };
    let qkv = weights(heads.qkv_width(), hidden, LAYERS);
    let output = weights(hidden, hidden, LAYERS);
    let gate_up = weights(2 * ffn, hidden, LAYERS);
    let down = weights(hidden, ffn, LAYERS);
    let head = weights(vocab, hidden, 1);
    for tokens in [1, 2, 4, 8] {
        let mut rng = TestRng::new(2);
        let gain = rig.filled(&rng.bf16s(hidden));
        let mut residual = rig.filled(&rng.f32s(tokens * hidden));
        let mut attended = rig.filled(&rng.bf16s(tokens * hidden));
        let mut partials = rig.unwritten::<f32>(ops::partials_len(heads, tokens, 2));
        let mut counters = rig.filled(&vec![0u32; ops::counters_len(heads, tokens)]);
        let mut gated = rig.filled(&rng.bf16s(tokens * ffn));
        let table = rig.filled(&rng.f32s(128 * 64));
        let positions = rig.filled(&vec![100u32; tokens]);
        let row_tables = rig.filled(&(0..tokens as u32).map(|row| 2 * row).collect::<Vec<_>>());
        let page_tables = rig.filled(&(0..2 * tokens as u32).collect::<Vec<_>>());
        let mut keys = rig.unwritten::<bf16>(2 * tokens * heads.page_elements());
        let mut values = rig.unwritten::<bf16>(2 * tokens * heads.page_elements());
        let mut queries = rig.unwritten::<f32>(tokens * heads.qkv_width());
        let mut best = rig.unwritten::<u64>(ops::best_len(&device));
        let mut ids = rig.unwritten::<u32>(tokens);
        let mut logits = rig.unwritten::<f32>(tokens * vocab);
        let norm = Norm { gain: gain.view(), eps: EPS };
        let time = |what: &str, per: usize, work: &mut dyn FnMut()| {
            work();
            let mut best = f64::INFINITY;
            let mut recording = host::device::Recording::default();
            for _ in 0..6 {
                device.synchronize().unwrap();
                let start = Instant::now();
                for _ in 0..4 {
                    device
                        .replay(&mut recording, &mut || {
                            work();
                            Ok(())
                        })
                        .unwrap();
                }
                device.synchronize().unwrap();
                best = best.min(start.elapsed().as_secs_f64() * 1e6 / (4 * per) as f64);
            }
            println!("{tokens} tokens, {what}: {best:.2} us");
        };
        macro_rules! one {
            (attention) => {
                ops::attention_decode(
                    &device,
                    DecodeBlocks::PerContext,
                    &queries.view(),
                    Pages { keys: keys.view(), values: values.view() },
                    &positions.view(),
                    &row_tables.view(),
                    &page_tables.view(),
                    &mut DecodeScratch { partials: partials.view_mut(), counters: counters.view_mut() },
                    &mut attended.view_mut(),
                    heads,
                    2 * PAGE,
                )
                .unwrap()
            };
            (qkv $layer:expr) => {
                ops::few_qkv(
                    &device,
                    &residual.view(),
                    norm,
                    &qkv[$layer],
                    None,
                    &table.view(),
                    Places {
                        positions: positions.view(),
                        row_tables: row_tables.view(),
                        page_tables: page_tables.view(),
                    },
                    &mut queries.view_mut(),
                    &mut PagesMut { keys: keys.view_mut(), values: values.view_mut() },
                    heads,
                )
                .unwrap()
            };
            (output $layer:expr) => {
                ops::few_residual(&device, &attended.view(), &output[$layer], &mut residual.view_mut()).unwrap()
            };
            (gate_up $layer:expr) => {
                ops::few_gate_up(&device, &residual.view(), norm, &gate_up[$layer], &mut gated.view_mut()).unwrap()
            };
            (down $layer:expr, $segments:expr) => {
                ops::few_residual_in(&device, $segments, &gated.view(), &down[$layer], &mut residual.view_mut())
                    .unwrap()
            };
        }
        time("qkv", LAYERS, &mut || (0..LAYERS).for_each(|layer| one!(qkv layer)));
        time("attention output", LAYERS, &mut || (0..LAYERS).for_each(|layer| one!(output layer)));
        time("gate and up", LAYERS, &mut || (0..LAYERS).for_each(|layer| one!(gate_up layer)));
        for segments in [1, 2, 4] {
            time(&format!("down in {segments}"), LAYERS, &mut || {
                (0..LAYERS).for_each(|layer| one!(down layer, segments));
            });
        }
        // The second-level cache holds one layer's weights.
        for (segments, attention, cached) in [
            (1, false, false),
            (2, false, false),
            (4, false, false),
            (4, false, true),
            (4, true, false),
            (4, true, true),
        ] {
            let what = format!(
                "the four layers, down in {segments}{}{}",
                if attention { ", with attention" } else { "" },
                if cached { ", weights in the cache" } else { "" }
            );
            time(&what, LAYERS, &mut || {
                for layer in 0..LAYERS {
                    let layer = if cached { 0 } else { layer };
                    one!(qkv layer);
                    if attention {
                        one!(attention);
                    }
                    one!(output layer);
                    one!(gate_up layer);
                    one!(down layer, segments);
                }
            });
        }
        for len in [0, tokens * vocab] {
            time(if len == 0 { "head" } else { "head with logits" }, 1, &mut || {
                let mut logits = logits.view_mut();
                let mut wanted = logits.slice_mut(..len).unwrap();
                let (mut best, mut ids) = (best.view_mut(), ids.view_mut());
                ops::few_logits(&device, &residual.view(), norm, &head[0], &mut wanted, &mut best, &mut ids).unwrap();
            });
        }
    }
}
