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
        let (residual, x) = (rounding(&mut rng, len), rng.f32s(len));
        let mut out = rig.filled(&residual);
        let x_buffer = rig.filled(&x);
        ops::residual_add(&rig.device, &mut out.view_mut(), &x_buffer.view()).unwrap();
        let expected: Vec<f32> = residual.iter().zip(&x).map(|(&a, &b)| sum(a, b)).collect();
        assert_same(&rig.read("residual_add", &out), &expected, "residual_add");

        for (count, name) in [(2, "residual_add_2"), (4, "residual_add_4")] {
            let parts = rounding(&mut rng, count * len);
            let mut out = rig.filled(&residual);
            let buffer = rig.filled(&parts);
            ops::residual_add(&rig.device, &mut out.view_mut(), &buffer.view()).unwrap();
            let expected = in_order(&residual, &parts);
            assert_same(&rig.read(name, &out), &expected, name);
            // The planted faults: parts in another order, or each added to the residual by itself.
            if len > 4 {
                let backwards: Vec<f32> = parts.chunks(len).rev().flatten().copied().collect();
                let one_by_one = parts.chunks(len).fold(residual.clone(), |sums, part| in_order(&sums, part));
                assert!(count == 2 || in_order(&residual, &backwards) != expected);
                assert_ne!(one_by_one, expected);
            }
        }
    }
    // Parts that are not 1, 2 or 4 whole ones.
    let (mut out, parts) = (rig.filled(&[0.0_f32; 8]), rig.filled(&[0.0_f32; 32]));
    for len in [0, 4, 12, 24, 28] {
        let parts = parts.view().slice(..len).unwrap();
        assert!(ops::residual_add(&rig.device, &mut out.view_mut(), &parts).is_err(), "{len}");
    }
}

/// Values of many magnitudes, whose sums are rounded: those of the generator are multiples of one number, and a few of them
/// add without rounding in any order.
pub(crate) fn rounding(rng: &mut TestRng, len: usize) -> Vec<f32> {
    rng.f32s(len).into_iter().map(|value| value * value * value).collect()
}

/// residual + (((p0 + p1) + p2) + p3), each sum rounded once.
pub(crate) fn in_order(residual: &[f32], parts: &[f32]) -> Vec<f32> {
    let len = residual.len();
    let of_one = |index: usize| parts[index..].iter().step_by(len).copied().reduce(sum).unwrap();
    (0..len).map(|index| sum(residual[index], of_one(index))).collect()
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
