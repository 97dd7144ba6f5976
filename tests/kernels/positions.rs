//! Rotary embedding, and the pages of the KV cache.

use half::bf16;
use host::ops::{self, HeadShape, NO_ROW, PAGE, PagesMut, Pairing, Places};
use host::testing::{TestRng, Tolerance, assert_close};

use crate::compare::assert_same;
use crate::rig::{Guarded, Rig};

/// The elements of pair `i` of a head of width `width`.
fn pair(pairing: Pairing, width: usize, i: usize) -> (usize, usize) {
    match pairing {
        Pairing::Halves => (i, i + width / 2),
        Pairing::Adjacent => (2 * i, 2 * i + 1),
    }
}

/// Rotates the rows on the device.
fn rotate(
    rig: &mut Rig,
    qkv: &[f32],
    positions: &[u32],
    table: &[f32],
    heads: HeadShape,
    pairing: Pairing,
) -> Vec<f32> {
    let mut out = rig.filled(qkv);
    let (position_buffer, table_buffer) = (rig.filled(positions), rig.filled(table));
    ops::rotary(&rig.device, &mut out.view_mut(), &position_buffer.view(), &table_buffer.view(), heads, pairing)
        .unwrap();
    rig.read("rotary", &out)
}

/// Cosines and sines of positions 0 to `positions` - 1 with base 10000.
fn angles(positions: usize, width: usize) -> Vec<f32> {
    let angle = |index: usize| {
        let (position, i) = (index / (width / 2), index % (width / 2));
        position as f64 * 10000.0_f64.powf(-2.0 * i as f64 / width as f64)
    };
    (0..positions * width / 2).flat_map(|index| [angle(index).cos() as f32, angle(index).sin() as f32]).collect()
}

pub(crate) fn rotary(rig: &mut Rig) {
    let shapes = [(2, 2, 32, 3), (14, 2, 64, 9), (7, 1, 96, 5), (8, 1, 128, 33), (1, 1, 64, 1)];
    for &(query_heads, kv_heads, width, rows) in rig.pick(&shapes[..1], &shapes) {
        for pairing in [Pairing::Halves, Pairing::Adjacent] {
            let heads = HeadShape { query_heads, kv_heads, width };
            let stride = heads.qkv_width();
            let mut rng = TestRng::new(21);
            let qkv = rng.f32s(rows * stride);
            let longest = rig.pick(40, 1000);
            let mut positions: Vec<u32> = (0..rows).map(|_| rng.below(longest as u64) as u32).collect();
            positions[0] = longest as u32 - 1;
            let table = angles(longest, width);
            let result = rotate(rig, &qkv, &positions, &table, heads, pairing);

            let mut expected: Vec<f64> = qkv.iter().map(|&value| f64::from(value)).collect();
            let rotated = query_heads + kv_heads;
            for (row, &position) in positions.iter().enumerate() {
                for head in 0..rotated {
                    let start = row * stride + head * width;
                    for i in 0..width / 2 {
                        let (first, second) = pair(pairing, width, i);
                        let angle = f64::from(position) * 10000.0_f64.powf(-2.0 * i as f64 / width as f64);
                        let (a, b) = (f64::from(qkv[start + first]), f64::from(qkv[start + second]));
                        expected[start + first] = a * angle.cos() - b * angle.sin();
                        expected[start + second] = b * angle.cos() + a * angle.sin();
                        let norm = f64::from(result[start + first]).hypot(f64::from(result[start + second]));
                        assert_close(&[norm], &[a.hypot(b)], Tolerance { absolute: 3e-7, relative: 0.0 });
                    }
                }
                // Values are not rotated.
                let values = row * stride + rotated * width..(row + 1) * stride;
                assert_same(&result[values.clone()], &qkv[values], "values");
            }
            assert_close(&result, &expected, Tolerance { absolute: 4e-7, relative: 0.0 });
        }
    }
    quarter_turns(rig);
    relative_positions(rig);
}

/// Turns whose cosine and sine are 0, 1 and -1 give exact values.
fn quarter_turns(rig: &mut Rig) {
    let heads = HeadShape { query_heads: 2, kv_heads: 1, width: 32 };
    let stride = heads.qkv_width();
    let table: Vec<f32> =
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]].iter().flat_map(|turn| turn.repeat(16)).collect();
    let qkv = TestRng::new(22).f32s(4 * stride);
    for pairing in [Pairing::Halves, Pairing::Adjacent] {
        let result = rotate(rig, &qkv, &[3, 1, 0, 2], &table, heads, pairing);
        let mut expected = qkv.clone();
        for (row, turns) in [3, 1, 0, 2].into_iter().enumerate() {
            for head in 0..3 {
                let start = row * stride + head * 32;
                for i in 0..16 {
                    let (first, second) = pair(pairing, 32, i);
                    for _ in 0..turns {
                        let (a, b) = (expected[start + first], expected[start + second]);
                        (expected[start + first], expected[start + second]) = (-b, a);
                    }
                }
            }
        }
        assert_close(&result, &expected, Tolerance::EXACT);
    }
}

/// A query and a key, rotated, have a product that depends on the distance of their positions alone.
fn relative_positions(rig: &mut Rig) {
    let heads = HeadShape { query_heads: 1, kv_heads: 1, width: 64 };
    let row = TestRng::new(23).f32s(heads.qkv_width());
    let positions = [0_u32, 5, 17, 22, 100, 105];
    let table = angles(128, 64);
    for pairing in [Pairing::Halves, Pairing::Adjacent] {
        let result = rotate(rig, &row.repeat(positions.len()), &positions, &table, heads, pairing);
        let product = |query: usize, key: usize| -> f64 {
            (0..64).map(|i| f64::from(result[query * 192 + i]) * f64::from(result[key * 192 + 64 + i])).sum()
        };
        let near = Tolerance { absolute: 2e-5, relative: 0.0 };
        for (earlier, later) in [(2, 3), (4, 5)] {
            assert_close(&[product(later, earlier)], &[product(1, 0)], near);
            assert_close(&[product(earlier, later)], &[product(0, 1)], near);
        }
        assert!((product(1, 0) - product(2, 0)).abs() > 0.01, "the distance matters");
    }
}

pub(crate) fn kv_write(rig: &mut Rig) {
    let shapes = [(2, 2, 32), (4, 1, 64), (14, 2, 64), (2, 1, 96), (8, 4, 128)];
    for &(query_heads, kv_heads, width) in rig.pick(&shapes[..2], &shapes) {
        let heads = HeadShape { query_heads, kv_heads, width };
        let stride = heads.qkv_width();
        let mut rng = TestRng::new(24);
        // Two sequences: their tables start at 1 and 4, their pages are 5, 0, 3 and 2, 6; pages 1 and 4 are others'.
        let page_tables = [u32::MAX, 5, 0, 3, 2, 6];
        let writes: [(u32, u32); 9] =
            [(1, 0), (1, 63), (4, 0), (1, 64), (4, 127), (1, 129), (1, 191), (4, 64), (4, 17)];
        let (rows, pages) = (writes.len(), 7);
        // Not bf16 values: the kernel rounds.
        let qkv = rng.f32s(rows * stride);
        let mut keys = rig.unwritten::<bf16>(pages * heads.page_elements());
        let mut values = rig.unwritten::<bf16>(pages * heads.page_elements());
        let (qkv_buffer, tables) = (rig.filled(&qkv), rig.filled(&page_tables));
        let starts = rig.filled(&writes.map(|(start, _)| start));
        let positions = rig.filled(&writes.map(|(_, position)| position));
        ops::kv_write(
            &rig.device,
            &qkv_buffer.view(),
            &positions.view(),
            &starts.view(),
            &tables.view(),
            &mut keys.view_mut(),
            &mut values.view_mut(),
            heads,
        )
        .unwrap();

        let nobody = bf16::from_bits(0xffff);
        let mut expected_keys = vec![nobody; pages * heads.page_elements()];
        let mut expected_values = expected_keys.clone();
        for (row, (start, position)) in writes.into_iter().enumerate() {
            let page = page_tables[start as usize + position as usize / PAGE] as usize;
            let token = position as usize % PAGE;
            for g in 0..kv_heads {
                for d in 0..width {
                    let key = qkv[row * stride + (query_heads + g) * width + d];
                    let value = qkv[row * stride + (query_heads + kv_heads + g) * width + d];
                    let head = (page * kv_heads + g) * PAGE * width;
                    expected_keys[head + token * width + d] = bf16::from_f32(key);
                    expected_values[head + d * PAGE + token] = bf16::from_f32(value);
                }
            }
        }
        assert_same(&rig.read("kv_write", &keys), &expected_keys, "keys");
        assert_same(&rig.read("kv_write", &values), &expected_values, "values");
    }
}

/// Rows of a step as (sequence, position), by what they put to the stores of values: those of eight tokens at once, and those
/// of one.
fn arrangements() -> Vec<Vec<(usize, u32)>> {
    let run = |sequence: usize, from: u32, count: u32| (from..from + count).map(move |at| (sequence, at));
    let nobody = (0, NO_ROW);
    let mut mixed: Vec<_> = vec![(0, 5), (1, 63), nobody, (2, 8)];
    mixed.extend(run(3, 0, 21).chain(run(4, 61, 40)));
    mixed.push(nobody);
    // Eighths whose ends fit, but not what is between them; one of two sequences; one that is short by a row.
    let mut broken: Vec<_> = run(0, 0, 8).collect();
    broken.swap(3, 4);
    broken.extend(run(1, 8, 3).chain(run(2, 11, 5)).chain(run(3, 16, 7)).chain(run(4, 0, 16)).chain(run(1, 16, 8)));
    broken.swap(20, 21);
    vec![
        vec![(0, 70)],
        vec![(0, 1), nobody, (2, 64)],
        run(0, 0, 8).collect(),
        (0..9).map(|row| (row % 5, 17 * row as u32)).collect(),
        run(0, 56, 80).collect(),
        mixed,
        broken,
        run(1, 3, 150).chain([(0, 191)]).collect(),
    ]
}

/// Bit by bit what bias, rotation and the stores to the pages give as operations of their own.
pub(crate) fn rotary_kv_write(rig: &mut Rig) {
    const SEQUENCES: usize = 5;
    const CONTEXT: usize = 3 * PAGE;
    let full = [(2, 2, 32, true), (4, 1, 64, false), (14, 2, 64, true), (3, 1, 96, true), (8, 4, 128, false)];
    for &(query_heads, kv_heads, width, biased) in rig.pick(&full[..2], &full) {
        let heads = HeadShape { query_heads, kv_heads, width };
        let stride = heads.qkv_width();
        for rows in rig.pick(&arrangements()[1..7], &arrangements()) {
            let mut rng = TestRng::new(25);
            let mut qkv = rng.f32s(rows.len() * stride);
            // What adding no bias must keep.
            let last = qkv.len() - 1;
            qkv[last] = -0.0;
            let bias = rig.filled(&rng.bf16s(if biased { stride } else { 0 }));
            let table = rig.filled(&angles(CONTEXT, width));
            let mut pages: Vec<u32> = (0..(SEQUENCES * 3) as u32).collect();
            for index in (1..pages.len()).rev() {
                pages.swap(index, rng.below(index as u64 + 1) as usize);
            }
            let positions = rig.filled(&rows.iter().map(|&(_, position)| position).collect::<Vec<_>>());
            let starts = rig.filled(&rows.iter().map(|&(sequence, _)| sequence as u32 * 3).collect::<Vec<_>>());
            let tables = rig.filled(&pages);
            let elements = pages.len() * heads.page_elements();
            let device = rig.device.clone();

            let mut expected = rig.filled(&qkv);
            if biased {
                ops::bias_add(&device, &mut expected.view_mut(), &bias.view()).unwrap();
            }
            let (at, angles) = (positions.view(), table.view());
            ops::rotary(&device, &mut expected.view_mut(), &at, &angles, heads, Pairing::Halves).unwrap();
            let (mut keys, mut values) = (rig.unwritten::<bf16>(elements), rig.unwritten::<bf16>(elements));
            let (keys_out, values_out) = (&mut keys.view_mut(), &mut values.view_mut());
            let from = &expected.view();
            ops::kv_write(&device, from, &at, &starts.view(), &tables.view(), keys_out, values_out, heads).unwrap();

            let mut out = rig.filled(&qkv);
            let fresh = || rig.unwritten::<bf16>(elements);
            let (mut new_keys, mut new_values): (Guarded<bf16>, Guarded<bf16>) = (fresh(), fresh());
            let places = Places { positions: at, row_tables: starts.view(), page_tables: tables.view() };
            let mut new_pages = PagesMut { keys: new_keys.view_mut(), values: new_values.view_mut() };
            ops::rotary_kv_write(&device, &mut out.view_mut(), &bias.view(), &angles, places, &mut new_pages, heads)
                .unwrap();

            let what = format!("{heads:?}, {rows:?}");
            // Queries are changed, of rows that are not padding; keys and values stay as they were.
            let mut kept = qkv;
            let rotated = rig.download(&expected);
            for (row, &(_, position)) in rows.iter().enumerate() {
                if position != NO_ROW {
                    let queries = row * stride..row * stride + heads.query_width();
                    kept[queries.clone()].copy_from_slice(&rotated[queries]);
                }
            }
            assert_same(&rig.read("rotary_kv_write", &out), &kept, &what);
            let (keys, values) = (rig.download(&keys), rig.download(&values));
            assert_same(&rig.read("rotary_kv_write", &new_keys), &keys, &what);
            assert_same(&rig.read("rotary_kv_write", &new_values), &values, &what);
        }
    }
}
