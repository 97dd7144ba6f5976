//! Bias, residual, gate, the comparison of bits.

use cuda_std::launch::Grid;
use half::bf16;
use host::ops;
use host::testing::TestRng;
use kernels_gpu::differing::{differing_bf16, differing_f32};

use crate::compare::{assert_rounded, assert_same};
use crate::rig::Rig;

/// The sum rounded once: f64 holds enough bits that rounding twice changes nothing.
fn sum(a: f32, b: f32) -> f32 {
    (f64::from(a) + f64::from(b)) as f32
}

pub(crate) fn bias_add(rig: &mut Rig) {
    let full = [(1, 4), (3, 36), (17, 1152), (2, 1024), (5, 1028), (33, 2052)];
    for &(rows, width) in rig.pick(&[(1, 4), (3, 36), (2, 1028)][..], &full) {
        let mut rng = TestRng::new(11);
        let (x, bias) = (rng.f32s(rows * width), rng.bf16s(width));
        let mut out = rig.filled(&x);
        let bias_buffer = rig.filled(&bias);
        ops::bias_add(&rig.device, &mut out.view_mut(), &bias_buffer.view()).unwrap();
        let expected: Vec<f32> =
            x.iter().enumerate().map(|(index, &value)| sum(value, bias[index % width].to_f32())).collect();
        assert_same(&rig.read("bias_add", &out), &expected, "bias_add");
    }
}

pub(crate) fn residual_add(rig: &mut Rig) {
    for &len in rig.pick(&[4, 1028][..], &[4, 1000, 1024, 1028, 33 * 896]) {
        let mut rng = TestRng::new(12);
        let (residual, x) = (rng.f32s(len), rng.f32s(len));
        let mut out = rig.filled(&residual);
        let x_buffer = rig.filled(&x);
        ops::residual_add(&rig.device, &mut out.view_mut(), &x_buffer.view()).unwrap();
        let expected: Vec<f32> = residual.iter().zip(&x).map(|(&a, &b)| sum(a, b)).collect();
        assert_same(&rig.read("residual_add", &out), &expected, "residual_add");
    }
}

pub(crate) fn silu_mul(rig: &mut Rig) {
    let full = [(1, 4), (3, 36), (17, 4864), (2, 1024), (5, 1028)];
    for &(rows, width) in rig.pick(&[(1, 4), (3, 36), (2, 1028)][..], &full) {
        let mut rng = TestRng::new(13);
        let mut x: Vec<bf16> = (0..rows * 2 * width).map(|_| bf16::from_f32(rng.next_f32() * 12.0)).collect();
        for (gate, value) in x.iter_mut().zip([40.0, -40.0, 0.0, -86.0]) {
            *gate = bf16::from_f32(value);
        }
        let x_buffer = rig.filled(&x);
        let mut out = rig.unwritten::<bf16>(rows * width);
        ops::silu_mul(&rig.device, &x_buffer.view(), &mut out.view_mut(), width).unwrap();
        let expected: Vec<f64> = (0..rows * width)
            .map(|index| {
                let start = index / width * 2 * width + index % width;
                let (gate, up) = (x[start].to_f64(), x[start + width].to_f64());
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        assert_rounded(&rig.read("silu_mul", &out), &expected, 2e-6);
    }
    // Where e^-g overflows the gate is closed, not NaN.
    let x: Vec<bf16> = [-100.0, -1e30, 100.0, 1e30, 1.0, 2.0, 3.0, 4.0].map(bf16::from_f32).to_vec();
    let x_buffer = rig.filled(&x);
    let mut out = rig.unwritten::<bf16>(4);
    ops::silu_mul(&rig.device, &x_buffer.view(), &mut out.view_mut(), 4).unwrap();
    let result = rig.read("silu_mul", &out);
    assert_rounded(&result[2..], &[300.0, 4e30], 1e-2);
    assert!(result[..2].iter().all(|value| value.to_f32() == 0.0), "closed gates: {result:?}");
}

pub(crate) fn differing(rig: &mut Rig) {
    for &len in rig.pick(&[1, 300][..], &[1, 255, 257, 5000, 300_001]) {
        let mut rng = TestRng::new(14);
        let mut a = rng.f32s(len);
        // What equality of floats would get wrong: the zeros, and NaN.
        a[len / 2] = f32::NAN;
        let mut b = a.clone();
        for _ in 0..len / 3 {
            let index = rng.below(len as u64) as usize;
            b[index] = f32::from_bits(a[index].to_bits() ^ (1 << rng.below(32)));
        }
        (a[0], b[0]) = (0.0, -0.0);
        let expected = a.iter().zip(&b).filter(|(a, b)| a.to_bits() != b.to_bits()).count() as u32;
        let (a_buffer, b_buffer) = (rig.filled(&a), rig.filled(&b));
        // Fewer blocks than elements / 256: threads take several; and more. It adds to what is there.
        for blocks in [1, 3, 40] {
            let mut count = rig.filled(&[1000_u32]);
            let (a, b, mut out) = (a_buffer.view(), b_buffer.view(), count.view_mut());
            rig.device.launch(differing_f32::launch(&a, &b, &mut out), Grid::new_1d(blocks)).unwrap();
            assert_same(&rig.read("differing_f32", &count), &[1000 + expected], "differing_f32");
        }
        assert_eq!(ops::differing(&rig.device, &a_buffer.view(), &b_buffer.view()).unwrap(), expected);

        let round = |values: &[f32]| -> Vec<bf16> { values.iter().map(|&value| bf16::from_f32(value)).collect() };
        let (a, b) = (round(&a), round(&b));
        let expected = a.iter().zip(&b).filter(|(a, b)| a.to_bits() != b.to_bits()).count() as u32;
        let (a_buffer, b_buffer) = (rig.filled(&a), rig.filled(&b));
        let mut count = rig.filled(&[0_u32]);
        let (a, b, mut out) = (a_buffer.view(), b_buffer.view(), count.view_mut());
        rig.device.launch(differing_bf16::launch(&a, &b, &mut out), Grid::new_1d(2)).unwrap();
        assert_same(&rig.read("differing_bf16", &count), &[expected], "differing_bf16");
        assert_eq!(ops::differing(&rig.device, &a_buffer.view(), &b_buffer.view()).unwrap(), expected);
    }
}
