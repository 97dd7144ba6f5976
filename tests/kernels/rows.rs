//! Embedding, gathering, normalisation.

use cuda_std::launch::Grid;
use half::bf16;
use host::ops;
use host::testing::TestRng;
use kernels_gpu::copy_words;

use crate::compare::{assert_rounded, assert_same};
use crate::elementwise::{in_order, rounding};
use crate::rig::Rig;

pub(crate) fn embedding(rig: &mut Rig) {
    let full = [(5, 1, 8), (7, 3, 40), (300, 17, 1024), (300, 5, 1032), (64, 33, 2056), (11, 2, 896)];
    for &(vocab, tokens, width) in rig.pick(&[(5, 1, 8), (7, 3, 40), (4, 2, 1032)][..], &full) {
        let mut rng = TestRng::new(1);
        let table = rng.bf16s(vocab * width);
        let mut ids: Vec<u32> = (0..tokens).map(|_| rng.below(vocab as u64) as u32).collect();
        ids[tokens - 1] = vocab as u32 - 1;
        let (id_buffer, table_buffer) = (rig.filled(&ids), rig.filled(&table));
        let mut out = rig.unwritten::<f32>(tokens * width);
        ops::embedding(&rig.device, &id_buffer.view(), &table_buffer.view(), &mut out.view_mut(), width).unwrap();
        let expected: Vec<f32> =
            ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).map(|value| value.to_f32()).collect();
        assert_same(&rig.read("embedding", &out), &expected, "embedding");
    }
}

pub(crate) fn copy_words(rig: &mut Rig) {
    for &count in rig.pick(&[1, 256, 257][..], &[1, 31, 256, 257, 1000, 16_384]) {
        let from: Vec<u32> = TestRng::new(9).f32s(count).into_iter().map(f32::to_bits).collect();
        let buffer = rig.filled(&from);
        let mut to = rig.unwritten::<u32>(count);
        let blocks = count.div_ceil(copy_words::THREADS as usize) as u32;
        let mut view = to.view_mut();
        rig.device.launch(copy_words::copy_words::launch(&buffer.view(), &mut view), Grid::new_1d(blocks)).unwrap();
        assert_same(&rig.read("copy_words", &to), &from, "copy_words");
    }
}

pub(crate) fn gather_rows(rig: &mut Rig) {
    let full = [(1, 1, 4), (5, 3, 36), (40, 40, 516), (9, 21, 1024), (200, 1, 2052)];
    for &(rows, chosen, width) in rig.pick(&[(1, 1, 4), (5, 3, 36), (3, 2, 516)][..], &full) {
        let mut rng = TestRng::new(2);
        let x = rng.f32s(rows * width);
        let mut indices: Vec<u32> = (0..chosen).map(|_| rng.below(rows as u64) as u32).collect();
        indices[0] = rows as u32 - 1;
        let (x_buffer, index_buffer) = (rig.filled(&x), rig.filled(&indices));
        let mut out = rig.unwritten::<f32>(chosen * width);
        ops::gather_rows(&rig.device, &x_buffer.view(), &index_buffer.view(), &mut out.view_mut(), width).unwrap();
        let expected: Vec<f32> = indices.iter().flat_map(|&row| x[row as usize * width..][..width].to_vec()).collect();
        assert_same(&rig.read("gather_rows", &out), &expected, "gather_rows");
    }
}

pub(crate) fn rms_norm(rig: &mut Rig) {
    let full = [(1, 8), (3, 64), (17, 896), (2, 1024), (5, 1032), (2, 2056), (2, 4096), (40, 24)];
    for &(rows, width) in rig.pick(&[(1, 8), (3, 64), (2, 1032)][..], &full) {
        for (magnitude, eps) in [(1.0, 1e-6), (300.0, 1e-5), (1e-4, 1e-6)] {
            let mut rng = TestRng::new(3);
            let mut x: Vec<f32> = rng.f32s(rows * width).iter().map(|value| value * magnitude).collect();
            // An outlier, as residual streams have them.
            x[width / 2] *= 50.0;
            let weight = rng.bf16s(width);
            let (x_buffer, weight_buffer) = (rig.filled(&x), rig.filled(&weight));
            let mut out = rig.unwritten::<bf16>(rows * width);
            ops::rms_norm(&rig.device, &x_buffer.view(), &weight_buffer.view(), &mut out.view_mut(), eps).unwrap();
            let mut expected = Vec::new();
            for row in x.chunks(width) {
                let mean = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + f64::from(eps)).sqrt();
                expected.extend(row.iter().zip(&weight).map(|(&value, gain)| f64::from(value) * scale * gain.to_f64()));
            }
            let result = rig.read("rms_norm", &out);
            assert_rounded(&result, &expected, 2e-6);

            // The last row alone gives the bits that it gives in the batch.
            let last = rig.filled(&x[(rows - 1) * width..]);
            let mut alone = rig.unwritten::<bf16>(width);
            ops::rms_norm(&rig.device, &last.view(), &weight_buffer.view(), &mut alone.view_mut(), eps).unwrap();
            assert_same(&rig.read("rms_norm", &alone), &result[(rows - 1) * width..], "a row alone");
        }
    }
}

/// Bit by bit what the two operations give, and sums in the order of the parts.
/// A kernel that reads a weight before it waits for the work ahead sees an upload just ahead of it.
pub(crate) fn early_reads_see_uploads(rig: &mut Rig) {
    let (rows, width) = rig.pick((2, 64), (64, 896));
    let mut rng = TestRng::new(12);
    let (x, device) = (rig.filled(&rng.f32s(rows * width)), rig.device.clone());
    let gains: Vec<Vec<bf16>> = (0..16).map(|_| rng.bf16s(width)).collect();
    let apart: Vec<Vec<bf16>> = gains
        .iter()
        .map(|gain| {
            let (gain, mut out) = (rig.filled(gain), rig.unwritten::<bf16>(rows * width));
            device.synchronize().unwrap();
            ops::rms_norm(&device, &x.view(), &gain.view(), &mut out.view_mut(), 1e-6).unwrap();
            rig.download(&out)
        })
        .collect();
    let mut gain = rig.filled(&gains[0]);
    let mut outs: Vec<_> = gains.iter().map(|_| rig.unwritten::<bf16>(rows * width)).collect();
    device.synchronize().unwrap();
    // Nothing is waited for in between.
    for (value, out) in gains.iter().zip(&mut outs) {
        device.upload(gain.view_mut(), value).unwrap();
        ops::rms_norm(&device, &x.view(), &gain.view(), &mut out.view_mut(), 1e-6).unwrap();
    }
    for (out, expected) in outs.iter().zip(&apart) {
        assert_same(&rig.read("rms_norm", out), expected, "an upload just ahead");
    }
}

pub(crate) fn residual_norm(rig: &mut Rig) {
    let full = [(1, 8), (3, 64), (33, 896), (2, 1024), (5, 1032), (2, 2048), (3, 2056), (2, 4096), (1, 5000)];
    for &(rows, width) in rig.pick(&[(1, 8), (3, 64), (2, 2056)][..], &full) {
        for (count, name) in [(1, "residual_norm"), (2, "residual_norm_2"), (4, "residual_norm_4")] {
            let mut rng = TestRng::new(4);
            let (residual, parts) = (rounding(&mut rng, rows * width), rounding(&mut rng, count * rows * width));
            let sums = in_order(&residual, &parts);
            let (gain, parts) = (rig.filled(&rng.bf16s(width)), rig.filled(&parts));
            let device = rig.device.clone();

            let mut sum = rig.filled(&residual);
            ops::residual_add(&device, &mut sum.view_mut(), &parts.view()).unwrap();
            let mut expected = rig.unwritten::<bf16>(rows * width);
            ops::rms_norm(&device, &sum.view(), &gain.view(), &mut expected.view_mut(), 1e-6).unwrap();

            let mut residual = rig.filled(&residual);
            let mut out = rig.unwritten::<bf16>(rows * width);
            let (stream, normed) = (&mut residual.view_mut(), &mut out.view_mut());
            ops::residual_norm(&device, stream, &parts.view(), &gain.view(), normed, 1e-6).unwrap();
            let (expected, what) = (rig.download(&expected), format!("{rows} x {width}, {count} parts"));
            assert_same(&rig.read(name, &residual), &sums, &what);
            assert_same(&rig.read(name, &out), &expected, &what);
        }
    }
}
