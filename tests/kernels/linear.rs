//! Linear layers: values, and rows whose bits depend on nothing but the row.

use half::bf16;
use host::device::{LinearOutput, MemoryKind, Weight};
use host::ops;
use host::testing::{TestRng, Tolerance, assert_close};

use crate::compare::{assert_rounded, assert_same};
use crate::rig::{Bits, Guarded, Rig};

/// A weight on a device, as rows and as the device's own form.
struct Layer {
    outputs: usize,
    width: usize,
    rows: Guarded<bf16>,
    weight: Weight,
}

impl Layer {
    fn new(rig: &Rig, weight: &[bf16], width: usize) -> Self {
        let outputs = weight.len() / width;
        let buffer = rig.device.alloc_from(weight, MemoryKind::Weights, "weight").unwrap();
        let prepared = rig.device.prepare_weight(buffer, outputs, width, false).unwrap();
        Self { outputs, width, rows: rig.filled(weight), weight: prepared }
    }

    /// The tensor-core kernel with f32 output.
    fn chain(&self, rig: &mut Rig, x: &[bf16]) -> Vec<f32> {
        let mut out = rig.unwritten::<f32>(x.len() / self.width * self.outputs);
        let x = rig.filled(x);
        ops::linear_kernel(&rig.device, &x.view(), &self.rows.view(), &mut out.view_mut(), self.width).unwrap();
        rig.read("linear_f32", &out)
    }

    /// The tensor-core kernel with bf16 output.
    fn chain_bf16(&self, rig: &mut Rig, x: &[bf16]) -> Vec<bf16> {
        let mut out = rig.unwritten::<bf16>(x.len() / self.width * self.outputs);
        let x = rig.filled(x);
        ops::linear_kernel(&rig.device, &x.view(), &self.rows.view(), &mut out.view_mut(), self.width).unwrap();
        rig.read("linear_bf16", &out)
    }

    fn plain(&self, rig: &mut Rig, x: &[bf16]) -> Vec<f32> {
        let mut out = rig.unwritten::<f32>(x.len() / self.width * self.outputs);
        let x = rig.filled(x);
        ops::linear_plain(&rig.device, &x.view(), &self.rows.view(), &mut out.view_mut(), self.width).unwrap();
        rig.read("linear_plain", &out)
    }

    /// The device's own linear layer.
    fn device<O: LinearOutput + Bits>(&self, rig: &mut Rig, x: &[bf16]) -> Vec<O> {
        let mut out = rig.unwritten::<O>(x.len() / self.width * self.outputs);
        let x = rig.filled(x);
        rig.device.linear(x.view(), &self.weight, out.view_mut()).unwrap();
        let values = rig.download(&out);
        rig.spoil(values)
    }

    /// cuBLASLt takes rows whose addresses are multiples of 16 bytes.
    fn suits_device(&self, rig: &Rig) -> bool {
        !rig.device.is_cuda() || (self.outputs.is_multiple_of(8) && self.width.is_multiple_of(8))
    }
}

/// Outputs and inputs of the layers.
fn shapes(rig: &Rig) -> &'static [(usize, usize)] {
    rig.pick(&[(17, 32)], &[(70, 48), (72, 48), (64, 896), (1, 16), (136, 128)])
}

pub(crate) fn values(rig: &mut Rig) {
    for &(outputs, width) in shapes(rig) {
        for &tokens in rig.pick(&[1, 5][..], &[1, 2, 7, 31, 32, 33, 65]) {
            let mut rng = TestRng::new(51);
            let (x, weight) = (rng.bf16s(tokens * width), rng.bf16s(outputs * width));
            let layer = Layer::new(rig, &weight, width);
            let product = |index: usize| {
                let (token, output) = (index / outputs, index % outputs);
                let pairs = x[token * width..][..width].iter().zip(&weight[output * width..][..width]);
                pairs.map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>()
            };
            let expected: Vec<f64> = (0..tokens * outputs).map(product).collect();
            // Partial sums stay below 50; each addition may cut half to one unit of their last place.
            let near = Tolerance { absolute: width as f64 * 1e-6, relative: 0.0 };
            let sums = layer.chain(rig, &x);
            assert_close(&sums, &expected, near);
            let rounded = layer.chain_bf16(rig, &x);
            let once: Vec<bf16> = sums.iter().map(|&sum| bf16::from_f32(sum)).collect();
            assert_same(&rounded, &once, "the rounded chain");
            let plain = layer.plain(rig, &x);
            assert_close(&plain, &expected, near);
            if layer.suits_device(rig) {
                let device: Vec<f32> = layer.device(rig, &x);
                assert_close(&device, &expected, near);
                let rounded: Vec<bf16> = layer.device(rig, &x);
                let exact: Vec<f64> = device.iter().map(|&sum| f64::from(sum)).collect();
                assert_rounded(&rounded, &exact, 0.0);
                if !rig.device.is_cuda() {
                    assert_same(&device, &plain, "the CPU's linear layer and the plain chain");
                }
            }

            // Small integers: every sum is exact, so every order gives exactly this.
            let mut integers =
                |len: usize| -> Vec<bf16> { (0..len).map(|_| bf16::from_f32(rng.below(17) as f32 - 8.0)).collect() };
            let (x, weight) = (integers(tokens * width), integers(outputs * width));
            let layer = Layer::new(rig, &weight, width);
            let expected: Vec<f32> = (0..tokens * outputs)
                .map(|index| {
                    let pairs = x[index / outputs * width..][..width].iter().zip(&weight[index % outputs * width..]);
                    pairs.map(|(a, b)| a.to_f32() * b.to_f32()).sum()
                })
                .collect();
            assert_close(&layer.chain(rig, &x), &expected, Tolerance::EXACT);
            assert_close(&layer.plain(rig, &x), &expected, Tolerance::EXACT);
        }
    }
}

/// The parts of a layer: each is the layer of its own columns, bit by bit, and their sum is the product.
pub(crate) fn parts(rig: &mut Rig) {
    let full = &[(70, 96, 2), (72, 192, 4), (896, 256, 4), (1, 32, 2), (136, 144, 3)][..];
    for &(outputs, width, segments) in rig.pick(&[(17, 64, 4), (8, 32, 2)][..], full) {
        for &tokens in rig.pick(&[1, 5][..], &[1, 2, 33, 65]) {
            let mut rng = TestRng::new(53);
            let (x, weight) = (rng.bf16s(tokens * width), rng.bf16s(outputs * width));
            let layer = Layer::new(rig, &weight, width);
            let part = width / segments;
            let columns = |values: &[bf16], first: usize| -> Vec<bf16> {
                values.chunks(width).flat_map(|row| &row[first..first + part]).copied().collect()
            };
            let (mut chain, mut plain) = (Vec::new(), Vec::new());
            for segment in 0..segments {
                let alone = Layer::new(rig, &columns(&weight, segment * part), part);
                let x = columns(&x, segment * part);
                chain.extend(alone.chain(rig, &x));
                plain.extend(alone.plain(rig, &x));
            }
            let (device, what) = (rig.device.clone(), format!("{tokens} x {outputs} x {width} in {segments}"));
            let input = rig.filled(&x);
            let mut out = rig.unwritten::<f32>(segments * tokens * outputs);
            ops::linear_parts_kernel(&device, &input.view(), &layer.rows.view(), &mut out.view_mut(), width).unwrap();
            let found = rig.read("linear_f32", &out);
            assert_same(&found, &chain, &what);
            for index in 0..tokens * outputs {
                let (token, output) = (index / outputs, index % outputs);
                let pairs = x[token * width..][..width].iter().zip(&weight[output * width..][..width]);
                let exact: f64 = pairs.map(|(a, b)| a.to_f64() * b.to_f64()).sum();
                let sum: f32 = found[index..].iter().step_by(tokens * outputs).sum();
                let near = Tolerance { absolute: width as f64 * 1e-6, relative: 0.0 };
                assert_close(&[sum], &[exact], near);
            }
            let mut out = rig.unwritten::<f32>(segments * tokens * outputs);
            ops::linear_parts_plain(&device, &input.view(), &layer.rows.view(), &mut out.view_mut(), width).unwrap();
            assert_same(&rig.read("linear_plain", &out), &plain, &what);
            if layer.suits_device(rig) {
                let mut out = rig.unwritten::<f32>(segments * tokens * outputs);
                ops::linear_parts(&device, &input.view(), &layer.weight, &mut out.view_mut()).unwrap();
                let values = rig.download(&out);
                let values = rig.spoil(values);
                assert_same(&values, if device.is_cuda() { &chain } else { &plain }, &what);
            }
            // The planted fault: the order of the segments is seen.
            let backwards: Vec<f32> = chain.chunks(tokens * outputs).rev().flatten().copied().collect();
            assert_ne!(chain, backwards);
        }
    }
}

/// Whatever the number of rows and a row's place among them, its bits are those it has alone.
pub(crate) fn rows(rig: &mut Rig) {
    let most = rig.pick(9, 130);
    let counts: Vec<usize> = rig.pick(vec![2, 5], (2..=40).chain([64, 65, 127]).collect());
    for &(outputs, width) in shapes(rig) {
        let mut rng = TestRng::new(52);
        let (x, weight) = (rng.bf16s(most * width), rng.bf16s(outputs * width));
        let layer = Layer::new(rig, &weight, width);
        let row = |index: usize| &x[index * width..][..width];
        let chain: Vec<f32> = (0..most).flat_map(|index| layer.chain(rig, row(index))).collect();
        let rounded: Vec<bf16> = (0..most).flat_map(|index| layer.chain_bf16(rig, row(index))).collect();
        let plain: Vec<f32> = (0..most).flat_map(|index| layer.plain(rig, row(index))).collect();
        let device: Vec<f32> = if layer.suits_device(rig) {
            (0..most).flat_map(|index| layer.device::<f32>(rig, row(index))).collect()
        } else {
            Vec::new()
        };
        // All of them at once are right.
        let expected: Vec<f64> = (0..most * outputs)
            .map(|index| {
                let pairs = row(index / outputs).iter().zip(&weight[index % outputs * width..]);
                pairs.map(|(a, b)| a.to_f64() * b.to_f64()).sum()
            })
            .collect();
        let near = Tolerance { absolute: width as f64 * 1e-6, relative: 0.0 };
        assert_close(&chain, &expected, near);
        assert_close(&plain, &expected, near);

        for &count in &counts {
            for shift in [0, 3] {
                let x = &x[shift * width..(shift + count) * width];
                let part = shift * outputs..(shift + count) * outputs;
                let what = format!("{count} rows of {outputs} x {width} from {shift}");
                assert_same(&layer.chain(rig, x), &chain[part.clone()], &what);
                assert_same(&layer.chain_bf16(rig, x), &rounded[part.clone()], &what);
                assert_same(&layer.plain(rig, x), &plain[part.clone()], &what);
                if layer.suits_device(rig) {
                    assert_same(&layer.device::<f32>(rig, x), &device[part], &format!("device: {what}"));
                }
            }
        }
    }
}
