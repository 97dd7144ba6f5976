//! The tiles of linear layers, by warps and by warpgroups, against the separate operations, bit by bit.
//!
//! Only a GPU with `wgmma` runs the kernels of warpgroups; on others their part of a test is left out, which it says.

use half::bf16;
use host::device::{MemoryKind, Weight};
use host::ops::{
    self, BlockHeads, BlockOutputs, BlockTokens, HeadShape, Mapped, PAGE, PagesMut, Places, QkvBlocks, TensorMaps,
};
use host::testing::TestRng;

use crate::compare::assert_same;
use crate::rig::{Guarded, Rig};

/// Tokens of a block, which choose the kernel.
const BLOCKS: [usize; 3] = [16, 32, 64];

/// The kernel of an operation for a number of tokens in a block.
fn kernel(names: [&'static str; 3], block: usize) -> &'static str {
    names[BLOCKS.iter().position(|&tokens| tokens == block).unwrap()]
}

/// Tokens of a block of a warpgroup's kernel, where there are such kernels.
fn warpgroup_blocks(rig: &Rig) -> &'static [usize] {
    if rig.device.kernel_image() == Some("sm_90a") {
        return &[64, 128, 256];
    }
    if rig.device.is_cuda() {
        println!("no wgmma on {}: its kernels are not tested", rig.device.name());
    }
    &[]
}

/// The kernel of warpgroups of an operation for a number of tokens in a block.
fn warpgroup_kernel(names: [&'static str; 3], block: usize) -> &'static str {
    names[[64, 128, 256].iter().position(|&tokens| tokens == block).unwrap()]
}

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

/// Numbers of tokens that fill blocks and that do not; rows longer than a ring and shorter.
fn cases(rig: &Rig) -> Vec<Sizes> {
    let heads = |query_heads, kv_heads, width| HeadShape { query_heads, kv_heads, width };
    let small = Sizes { tokens: 9, hidden: 64, heads: heads(2, 1, 32), ffn: 48, vocab: 300, bias: true };
    let wide = Sizes { tokens: 17, hidden: 1088, heads: heads(4, 2, 96), ffn: 80, vocab: 1111, bias: false };
    let odd = Sizes { tokens: 33, hidden: 320, heads: heads(1, 1, 32), ffn: 144, vocab: 1300, bias: true };
    let mut full = vec![wide, odd, Sizes { tokens: 63, ..small }, Sizes { tokens: 64, ..odd }];
    full.extend([3, 65].map(|tokens| Sizes { tokens, ..small }));
    if rig.device.is_cuda() {
        let real = Sizes { tokens: 64, hidden: 896, heads: heads(14, 2, 64), ffn: 4864, vocab: 151_936, bias: true };
        full.extend([9, 100, 200, 256].map(|tokens| Sizes { tokens, ..wide }));
        full.extend([real, Sizes { tokens: 33, ..real }, Sizes { tokens: 200, vocab: 20_000, ..real }]);
        // More tiles than the GPU has multiprocessors, and widths that end within a tile.
        full.push(Sizes { tokens: 1100, vocab: 1000, ..real });
        full.extend([96, 160].map(|ffn| Sizes { tokens: 400, hidden: 128, ffn, vocab: 500, ..real }));
    } else {
        full.push(Sizes { tokens: 100, ..small });
        full.push(Sizes { tokens: 200, ..small });
        full.push(Sizes { tokens: 20, hidden: 896, heads: heads(14, 2, 64), ffn: 608, vocab: 1000, bias: true });
    }
    rig.pick(vec![small, Sizes { tokens: 17, hidden: 128, bias: false, ..small }], full)
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

/// Numbers below `count` in another order.
fn shuffled(rng: &mut TestRng, count: usize) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..count as u32).collect();
    for index in (1..count).rev() {
        numbers.swap(index, rng.below(index as u64 + 1) as usize);
    }
    numbers
}

pub(crate) fn qkv(rig: &mut Rig) {
    for Sizes { tokens, hidden, heads, bias, .. } in cases(rig) {
        let mut rng = TestRng::new(101);
        let width = heads.qkv_width();
        let layer = weight(rig, &mut rng, width, hidden);
        let x = rig.filled(&rng.bf16s(tokens * hidden));
        let bias = rig.filled(&if bias { rng.bf16s(width) } else { Vec::new() });
        let contexts = 3 * PAGE;
        let table = rig.filled(&rng.f32s(contexts * heads.width));
        // Every seventh row and the last one are padding.
        let positions: Vec<u32> = (0..tokens)
            .map(|row| if row % 7 == 3 || row + 1 == tokens { u32::MAX } else { rng.below(contexts as u64) as u32 })
            .collect();
        let page_count = 3 * tokens + 1;
        let pages = shuffled(&mut rng, page_count);
        let row_tables: Vec<u32> = (0..tokens as u32).map(|row| row * 3).collect();
        let (placed, row_tables, page_tables) = (rig.filled(&positions), rig.filled(&row_tables), rig.filled(&pages));
        let empty = vec![bf16::NAN; page_count * heads.page_elements()];
        let places =
            Places { positions: placed.view(), row_tables: row_tables.view(), page_tables: page_tables.view() };
        let device = rig.device.clone();

        let mut expected = linear(rig, &x, &layer, tokens);
        let (mut keys, mut values) = (rig.filled(&empty), rig.filled(&empty));
        ops::rotary_kv_write(
            &device,
            &mut expected.view_mut(),
            &bias.view(),
            &table.view(),
            places,
            &mut PagesMut { keys: keys.view_mut(), values: values.view_mut() },
            heads,
        )
        .unwrap();
        let (expected, keys, values) = (rig.download(&expected), rig.download(&keys), rig.download(&values));

        for block in BLOCKS {
            let name = kernel(["tile_qkv_16", "tile_qkv_32", "tile_qkv_64"], block);
            let mut queries = rig.filled(&vec![f32::NAN; tokens * width]);
            let (mut new_keys, mut new_values) = (rig.filled(&empty), rig.filled(&empty));
            ops::tile_qkv(
                &device,
                BlockTokens::Of(block),
                &x.view(),
                &layer,
                &bias.view(),
                &table.view(),
                places,
                &mut queries.view_mut(),
                &mut PagesMut { keys: new_keys.view_mut(), values: new_values.view_mut() },
                heads,
            )
            .unwrap();
            let what = format!("{name}, {tokens} tokens of {hidden}, {heads:?}");
            let queries = rig.read(name, &queries);
            for row in 0..tokens {
                let (found, wanted) = (&queries[row * width..][..width], &expected[row * width..][..width]);
                let (found, rest) = found.split_at(heads.query_width());
                if positions[row] == u32::MAX {
                    assert!(found.iter().all(|value| value.is_nan()), "{what}: padding was written");
                } else {
                    assert_same(found, &wanted[..heads.query_width()], &what);
                }
                assert!(rest.iter().all(|value| value.is_nan()), "{what}: keys and values are not left here");
            }
            assert_same(&rig.read(name, &new_keys), &keys, &what);
            assert_same(&rig.read(name, &new_values), &values, &what);
        }
        if !warpgroup_blocks(rig).is_empty() && ops::wgmma_long_qkv_fits(heads) {
            let (queries, keys, values) = (&expected[..], &keys[..], &values[..]);
            let (x, layer, bias, table) = (&x, &layer, &bias, &table);
            let (positions, empty) = (&positions[..], &empty[..]);
            let expected =
                Qkv { tokens, hidden, heads, x, layer, bias, table, positions, places, empty, queries, keys, values };
            long_qkv(rig, &expected);
        }
        let at_once = [(QkvBlocks::One, "wgmma_qkv"), (QkvBlocks::Two, "wgmma_qkv_paired")];
        let count = if warpgroup_blocks(rig).is_empty() { 0 } else { at_once.len() };
        for (at_once, name) in at_once.into_iter().take(count) {
            let maps = [Mapped::QkvInput(x.view(), hidden), Mapped::Qkv(&layer, heads.width)];
            let maps = TensorMaps::new(&device, maps).unwrap();
            let mut queries = rig.filled(&vec![f32::NAN; tokens * width]);
            let (mut new_keys, mut new_values) = (rig.filled(&empty), rig.filled(&empty));
            ops::wgmma_qkv(
                &device,
                at_once,
                &maps,
                &x.view(),
                &layer,
                &bias.view(),
                &table.view(),
                places,
                &mut queries.view_mut(),
                &mut PagesMut { keys: new_keys.view_mut(), values: new_values.view_mut() },
                heads,
            )
            .unwrap();
            let what = format!("{name}, {tokens} tokens of {hidden}, {heads:?}");
            let queries = rig.read(name, &queries);
            for row in 0..tokens {
                let (found, wanted) = (&queries[row * width..][..width], &expected[row * width..][..width]);
                let (found, rest) = found.split_at(heads.query_width());
                if positions[row] == u32::MAX {
                    assert!(found.iter().all(|value| value.is_nan()), "{what}: padding was written");
                } else {
                    assert_same(found, &wanted[..heads.query_width()], &what);
                }
                assert!(rest.iter().all(|value| value.is_nan()), "{what}: keys and values are not left here");
            }
            assert_same(&rig.read(name, &new_keys), &keys, &what);
            assert_same(&rig.read(name, &new_values), &values, &what);
        }
    }
}

/// What [`qkv`] compares.
struct Qkv<'a> {
    tokens: usize,
    hidden: usize,
    heads: HeadShape,
    x: &'a Guarded<bf16>,
    layer: &'a Weight,
    bias: &'a Guarded<bf16>,
    table: &'a Guarded<f32>,
    positions: &'a [u32],
    places: Places<'a>,
    empty: &'a [bf16],
    queries: &'a [f32],
    keys: &'a [bf16],
    values: &'a [bf16],
}

/// The same in tiles for many rows.
fn long_qkv(rig: &mut Rig, expected: &Qkv<'_>) {
    let &Qkv { tokens, hidden, heads, x, layer, .. } = expected;
    let (device, width) = (rig.device.clone(), heads.qkv_width());
    let maps = [Mapped::LongQkvInput(x.view(), hidden), Mapped::LongQkv(layer)];
    let maps = TensorMaps::new(&device, maps).unwrap();
    for (block, name) in [(1, "wgmma_long_qkv_1"), (3, "wgmma_long_qkv_3")] {
        let mut queries = rig.filled(&vec![f32::NAN; tokens * width]);
        let (mut keys, mut values) = (rig.filled(expected.empty), rig.filled(expected.empty));
        ops::wgmma_long_qkv(
            &device,
            BlockHeads::Of(block),
            &maps,
            &x.view(),
            layer,
            &expected.bias.view(),
            &expected.table.view(),
            expected.places,
            &mut queries.view_mut(),
            &mut PagesMut { keys: keys.view_mut(), values: values.view_mut() },
            heads,
        )
        .unwrap();
        let what = format!("{name}, {tokens} tokens of {hidden}, {heads:?}");
        let queries = rig.read(name, &queries);
        for row in 0..tokens {
            let (found, wanted) = (&queries[row * width..][..width], &expected.queries[row * width..][..width]);
            let (found, rest) = found.split_at(heads.query_width());
            if expected.positions[row] == u32::MAX {
                assert!(found.iter().all(|value| value.is_nan()), "{what}: padding was written");
            } else {
                assert_same(found, &wanted[..heads.query_width()], &what);
            }
            assert!(rest.iter().all(|value| value.is_nan()), "{what}: keys and values are not left here");
        }
        assert_same(&rig.read(name, &keys), expected.keys, &what);
        assert_same(&rig.read(name, &values), expected.values, &what);
    }
}

pub(crate) fn parts(rig: &mut Rig) {
    for Sizes { tokens, ffn: outputs, hidden: part, .. } in cases(rig) {
        for segments in rig.pick(&[1, 4][..], &[1, 2, 4]).iter().copied() {
            let width = part * segments;
            let mut rng = TestRng::new(102);
            let rows = rng.bf16s(outputs * width);
            let buffer = rig.device.alloc_from(&rows, MemoryKind::Weights, "weight").unwrap();
            let layer = rig.device.prepare_weight(buffer, outputs, width, true).unwrap();
            let x = rng.bf16s(tokens * width);
            let device = rig.device.clone();

            // Each segment's chain as an operation of its own.
            let mut expected = Vec::new();
            for segment in 0..segments {
                let columns = |values: &[bf16]| -> Vec<bf16> {
                    values.chunks(width).flat_map(|row| &row[segment * part..][..part]).copied().collect()
                };
                let (x, rows) = (rig.filled(&columns(&x)), rig.filled(&columns(&rows)));
                let mut out = rig.unwritten::<f32>(tokens * outputs);
                ops::linear_kernel(&device, &x.view(), &rows.view(), &mut out.view_mut(), part).unwrap();
                expected.extend(rig.download(&out));
            }

            let x = rig.filled(&x);
            for block in BLOCKS {
                let name = kernel(["tile_parts_16", "tile_parts_32", "tile_parts_64"], block);
                let mut out = rig.unwritten::<f32>(segments * tokens * outputs);
                ops::tile_parts(&device, BlockTokens::Of(block), segments, &x.view(), &layer, &mut out.view_mut())
                    .unwrap();
                let what = format!("{name}, {tokens} tokens of {width} x {outputs} in {segments} segments");
                assert_same(&rig.read(name, &out), &expected, &what);
            }
            for &block in warpgroup_blocks(rig) {
                let name = warpgroup_kernel(["wgmma_parts_64", "wgmma_parts_128", "wgmma_parts_256"], block);
                let maps = [Mapped::PartsInput(x.view(), width), Mapped::Parts(&layer)];
                let maps = TensorMaps::new(&device, maps).unwrap();
                let mut out = rig.unwritten::<f32>(segments * tokens * outputs);
                let block = BlockTokens::Of(block);
                ops::wgmma_parts(&device, block, &maps, segments, &x.view(), &layer, &mut out.view_mut()).unwrap();
                let what = format!("{name}, {tokens} tokens of {width} x {outputs} in {segments} segments");
                assert_same(&rig.read(name, &out), &expected, &what);
            }
        }
    }
    long_residual(rig);
}

pub(crate) fn gate_up(rig: &mut Rig) {
    for Sizes { tokens, hidden, ffn, .. } in cases(rig) {
        let mut rng = TestRng::new(103);
        let layer = weight(rig, &mut rng, 2 * ffn, hidden);
        let x = rig.filled(&rng.bf16s(tokens * hidden));
        let mut both = rig.unwritten::<bf16>(tokens * 2 * ffn);
        let device = rig.device.clone();
        let rows = layer.rows().unwrap();
        ops::linear_kernel(&device, &x.view(), &rows.as_slice(), &mut both.view_mut(), hidden).unwrap();
        let mut expected = rig.unwritten::<bf16>(tokens * ffn);
        ops::silu_mul(&device, &both.view(), &mut expected.view_mut(), ffn).unwrap();
        let expected = rig.download(&expected);

        for block in BLOCKS {
            let name = kernel(["tile_gate_up_16", "tile_gate_up_32", "tile_gate_up_64"], block);
            let mut out = rig.unwritten::<bf16>(tokens * ffn);
            ops::tile_gate_up(&device, BlockTokens::Of(block), &x.view(), &layer, &mut out.view_mut()).unwrap();
            assert_same(&rig.read(name, &out), &expected, &format!("{name}, {tokens} tokens of {hidden} x {ffn}"));
        }
        for &block in warpgroup_blocks(rig) {
            let name = warpgroup_kernel(["wgmma_gate_up_64", "wgmma_gate_up_128", "wgmma_gate_up_256"], block);
            let maps =
                TensorMaps::new(&device, [Mapped::GateUpInput(x.view(), hidden), Mapped::GateUp(&layer)]).unwrap();
            let mut out = rig.unwritten::<bf16>(tokens * ffn);
            ops::wgmma_gate_up(&device, BlockTokens::Of(block), &maps, &x.view(), &layer, &mut out.view_mut()).unwrap();
            assert_same(&rig.read(name, &out), &expected, &format!("{name}, {tokens} tokens of {hidden} x {ffn}"));
        }
        for outputs in [160, 256] {
            if warpgroup_blocks(rig).is_empty() || !ffn.is_multiple_of(32) {
                continue;
            }
            let name = if outputs == 160 { "wgmma_long_gate_up_160" } else { "wgmma_long_gate_up_256" };
            let maps = [Mapped::LongGateUpInput(x.view(), hidden), Mapped::LongGateUp(&layer)];
            let maps = TensorMaps::new(&device, maps).unwrap();
            let block = BlockOutputs::Of(outputs);
            // All rows, and some from the middle.
            for rows in [0..tokens, tokens / 3..tokens - tokens / 4] {
                let (x, mut out) = (x.view(), rig.unwritten::<bf16>(rows.len() * ffn));
                ops::wgmma_long_gate_up(&device, block, &maps, &x, rows.clone(), &layer, &mut out.view_mut()).unwrap();
                let what = format!("{name}, {rows:?} of {tokens} tokens of {hidden} x {ffn}");
                assert_same(&rig.read(name, &out), &expected[rows.start * ffn..rows.end * ffn], &what);
            }
        }
    }
}

/// The sums of such parts, added to the residual stream.
fn long_residual(rig: &mut Rig) {
    let device = rig.device.clone();
    if warpgroup_blocks(rig).is_empty() {
        return;
    }
    // Rows and outputs that end within a tile, and rings longer and shorter than a segment.
    for (tokens, outputs, part) in [(1, 8, 64), (129, 112, 128), (300, 232, 1216), (700, 896, 192), (1000, 344, 64)] {
        for segments in [1, 2, 4] {
            let width = part * segments;
            let mut rng = TestRng::new(105);
            let layer = weight(rig, &mut rng, outputs, width);
            let rows = layer.rows().unwrap();
            let x = rig.filled(&rng.bf16s(tokens * width));
            let before = rng.f32s(tokens * outputs);
            let mut parts = rig.unwritten::<f32>(segments * tokens * outputs);
            let (x, rows) = (x.view(), rows.as_slice());
            ops::linear_parts_kernel(&device, &x, &rows, &mut parts.view_mut(), width).unwrap();
            let mut expected = rig.filled(&before);
            ops::residual_add(&device, &mut expected.view_mut(), &parts.view()).unwrap();
            let expected = rig.download(&expected);
            for outputs_of_block in [112, 224] {
                let name = if outputs_of_block == 112 { "wgmma_long_residual_112" } else { "wgmma_long_residual_224" };
                let maps = [Mapped::LongResidualInput(x, width), Mapped::LongResidual(&layer)];
                let maps = TensorMaps::new(&device, maps).unwrap();
                let (block, mut residual) = (BlockOutputs::Of(outputs_of_block), rig.filled(&before));
                ops::wgmma_long_residual(&device, block, &maps, segments, &x, &layer, &mut residual.view_mut())
                    .unwrap();
                let what = format!("{name}, {tokens} tokens of {width} x {outputs} in {segments} segments");
                assert_same(&rig.read(name, &residual), &expected, &what);
            }
        }
    }
}

pub(crate) fn logits(rig: &mut Rig) {
    for Sizes { tokens, hidden, vocab, .. } in cases(rig) {
        let mut rng = TestRng::new(104);
        let mut rows: Vec<bf16> = rng.bf16s(vocab * hidden);
        // Equal logits: the best of a row are often two tokens, far from each other or near, of which the first counts.
        let (half, near) = (vocab / 2 * hidden, hidden);
        rows.copy_within(..half, half);
        rows.copy_within(..near, 8 * near);
        let buffer = rig.device.alloc_from(&rows, MemoryKind::Weights, "weight").unwrap();
        let layer = rig.device.prepare_weight(buffer, vocab, hidden, true).unwrap();
        let mut x = rng.bf16s(tokens * hidden);
        // A row without a token, and one in which all are equal.
        x[hidden..2 * hidden].fill(bf16::NAN);
        x[2 * hidden..3 * hidden].fill(bf16::ZERO);
        let x = rig.filled(&x);
        let logits = linear(rig, &x, &layer, tokens);
        let mut ids = rig.unwritten::<u32>(tokens);
        let device = rig.device.clone();
        ops::argmax(&device, &logits.view(), &mut ids.view_mut()).unwrap();
        let (logits, ids) = (rig.download(&logits), rig.download(&ids));
        assert_eq!((ids[1], ids[2]), (u32::MAX, 0));

        for block in BLOCKS {
            let name = kernel(["tile_logits_16", "tile_logits_32", "tile_logits_64"], block);
            for wanted in [tokens * vocab, 0] {
                let mut found = rig.unwritten::<f32>(wanted);
                let mut best = rig.unwritten::<u64>(ops::tile_best_len(&device));
                let mut chosen = rig.unwritten::<u32>(tokens);
                ops::tile_logits(
                    &device,
                    BlockTokens::Of(block),
                    &x.view(),
                    &layer,
                    &mut found.view_mut(),
                    &mut best.view_mut(),
                    &mut chosen.view_mut(),
                )
                .unwrap();
                let what = format!("{name}, {tokens} tokens of {hidden} x {vocab}");
                assert_same(&rig.read(name, &found), &logits[..wanted], &what);
                assert_same(&rig.read(name, &chosen), &ids, &what);
            }
        }
        for &block in warpgroup_blocks(rig) {
            let name = warpgroup_kernel(["wgmma_logits_64", "wgmma_logits_128", "wgmma_logits_256"], block);
            let maps =
                TensorMaps::new(&device, [Mapped::LogitsInput(x.view(), hidden), Mapped::Logits(&layer)]).unwrap();
            for wanted in [tokens * vocab, 0] {
                let mut found = rig.unwritten::<f32>(wanted);
                let mut best = rig.unwritten::<u64>(ops::wgmma_best_len(&device, tokens));
                let mut chosen = rig.unwritten::<u32>(tokens);
                ops::wgmma_logits(
                    &device,
                    BlockTokens::Of(block),
                    &maps,
                    &x.view(),
                    &layer,
                    &mut found.view_mut(),
                    &mut best.view_mut(),
                    &mut chosen.view_mut(),
                )
                .unwrap();
                let what = format!("{name}, {tokens} tokens of {hidden} x {vocab}");
                assert_same(&rig.read(name, &found), &logits[..wanted], &what);
                assert_same(&rig.read(name, &chosen), &ids, &what);
            }
        }
    }
}

/// Microseconds of each layer of a model of Qwen2.5-0.5B's shape, with more weights than the cache holds, beside the separate
/// operations.
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
    println!("microseconds; blocks of 16, 32 and 64 tokens, the operation's choice, and the separate operations");
    for tokens in [16, 32, 64, 128, 256] {
        let mut rng = TestRng::new(2);
        let x = rig.filled(&rng.bf16s(tokens * hidden));
        let bias = rig.filled(&rng.bf16s(heads.qkv_width()));
        let mut gated = rig.filled(&rng.bf16s(tokens * ffn));
        let mut both = rig.unwritten::<bf16>(tokens * 2 * ffn);
        let table = rig.filled(&rng.f32s(128 * 64));
        let positions = rig.filled(&vec![100u32; tokens]);
        let row_tables = rig.filled(&(0..tokens as u32).map(|row| 2 * row).collect::<Vec<_>>());
        let page_tables = rig.filled(&(0..2 * tokens as u32).collect::<Vec<_>>());
        let mut keys = rig.unwritten::<bf16>(2 * tokens * heads.page_elements());
        let mut values = rig.unwritten::<bf16>(2 * tokens * heads.page_elements());
        let mut queries = rig.unwritten::<f32>(tokens * heads.qkv_width());
        let mut delta = rig.unwritten::<f32>(4 * tokens * hidden);
        let mut best = rig.unwritten::<u64>(ops::tile_best_len(&device));
        let mut ids = rig.unwritten::<u32>(tokens);
        let mut logits = rig.unwritten::<f32>(tokens * vocab);
        let places =
            Places { positions: positions.view(), row_tables: row_tables.view(), page_tables: page_tables.view() };
        let time = |per: usize, work: &mut dyn FnMut()| {
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
            best
        };
        let report = |what: &str, times: [f64; 5]| {
            let [a, b, c, chosen, apart] = times;
            println!("{tokens:4} tokens, {what:16} {a:7.2} {b:7.2} {c:7.2}   {chosen:7.2}   {apart:7.2}");
        };
        let choices = [BlockTokens::Of(16), BlockTokens::Of(32), BlockTokens::Of(64), BlockTokens::Chosen];
        /// The times of a layer in tiles, for each choice, and those of the operations that it replaces.
        macro_rules! measure {
            ($what:expr, $per:expr, |$block:ident, $layer:ident| $tile:expr, |$other:ident| $apart:expr) => {{
                let mut times = [0.0; 5];
                for (slot, $block) in choices.into_iter().enumerate() {
                    times[slot] = time($per, &mut || {
                        for $layer in 0..$per {
                            $tile.unwrap();
                        }
                    });
                }
                times[4] = time($per, &mut || {
                    for $other in 0..$per {
                        $apart;
                    }
                });
                report($what, times);
            }};
        }
        macro_rules! pages {
            () => {
                &mut PagesMut { keys: keys.view_mut(), values: values.view_mut() }
            };
        }
        measure!(
            "qkv",
            LAYERS,
            |block, layer| ops::tile_qkv(
                &device,
                block,
                &x.view(),
                &qkv[layer],
                &bias.view(),
                &table.view(),
                places,
                &mut queries.view_mut(),
                pages!(),
                heads
            ),
            |layer| {
                ops::linear(&device, &x.view(), &qkv[layer], &mut queries.view_mut()).unwrap();
                let queries = &mut queries.view_mut();
                ops::rotary_kv_write(&device, queries, &bias.view(), &table.view(), places, pages!(), heads).unwrap();
            }
        );
        macro_rules! residual {
            ($what:expr, $segments:expr, $x:expr, $weights:expr) => {
                measure!(
                    $what,
                    LAYERS,
                    |block, layer| {
                        let mut delta = delta.view_mut();
                        let mut parts = delta.slice_mut(..$segments * tokens * hidden).unwrap();
                        ops::tile_parts(&device, block, $segments, &$x, &$weights[layer], &mut parts)
                    },
                    |layer| {
                        let mut delta = delta.view_mut();
                        let mut one = delta.slice_mut(..tokens * hidden).unwrap();
                        ops::linear(&device, &$x, &$weights[layer], &mut one).unwrap();
                    }
                )
            };
        }
        residual!("attention output", 1, x.view(), output);
        measure!(
            "gate and up",
            LAYERS,
            |block, layer| ops::tile_gate_up(&device, block, &x.view(), &gate_up[layer], &mut gated.view_mut()),
            |layer| {
                ops::linear(&device, &x.view(), &gate_up[layer], &mut both.view_mut()).unwrap();
                ops::silu_mul(&device, &both.view(), &mut gated.view_mut(), ffn).unwrap();
            }
        );
        for segments in [1, 2, 4] {
            residual!(&format!("down in {segments}"), segments, gated.view(), down);
        }
        for len in [0, tokens * vocab] {
            measure!(
                if len == 0 { "head" } else { "head with logits" },
                1,
                |block, layer| {
                    let mut logits = logits.view_mut();
                    let mut wanted = logits.slice_mut(..len).unwrap();
                    let (mut best, mut ids) = (best.view_mut(), ids.view_mut());
                    ops::tile_logits(&device, block, &x.view(), &head[layer], &mut wanted, &mut best, &mut ids)
                },
                |layer| {
                    ops::linear(&device, &x.view(), &head[layer], &mut logits.view_mut()).unwrap();
                    ops::argmax(&device, &logits.view(), &mut ids.view_mut()).unwrap();
                }
            );
        }
    }
}
