//! Bias, residual, gate.

use half::bf16;
use host::ops;
use host::testing::TestRng;

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
