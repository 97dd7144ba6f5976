//! How long the pieces of a prefill take, in the shape of Qwen2.5-0.5B: a measurement.

use std::time::Instant;

use half::bf16;
use host::device::{Device, LINEAR_RUNGS, LinearOutput, MemoryKind, Recording, SliceMut, Weight, contract};
use host::ops::{
    self, BlockHeads, BlockOutputs, HeadShape, Mapped, PAGE, Pages, PagesMut, Places, PrefillTiles, Segment, TensorMaps,
};
use host::testing::TestRng;

use crate::compare::assert_same;
use crate::rig::{Guarded, Rig};

const EPS: f32 = 1e-6;
const LAYERS: usize = 24;
const HEADS: HeadShape = HeadShape { query_heads: 14, kv_heads: 2, width: 64 };
const HIDDEN: usize = 896;
const FFN: usize = 4864;
/// Segments of K of the down projection.
const DOWN_SEGMENTS: usize = contract::segments(HIDDEN, FFN);

/// More weights than a cache holds.
struct Weights {
    qkv: Vec<Weight>,
    output: Vec<Weight>,
    gate_up: Vec<Weight>,
    down: Vec<Weight>,
}

impl Weights {
    fn new(device: &Device) -> Self {
        let mut rng = TestRng::new(1);
        let mut all = |n: usize, k: usize| -> Vec<Weight> {
            let rows: Vec<bf16> = rng.bf16s(n * k).into_iter().map(|v| bf16::from_f32(v.to_f32() * 0.03)).collect();
            let one = || {
                let buffer = device.alloc_from(&rows, MemoryKind::Weights, "weight").unwrap();
                device.prepare_weight(buffer, n, k, true).unwrap()
            };
            (0..LAYERS).map(|_| one()).collect()
        };
        Self {
            qkv: all(HEADS.qkv_width(), HIDDEN),
            output: all(HIDDEN, HEADS.query_width()),
            gate_up: all(2 * FFN, HIDDEN),
            down: all(HIDDEN, FFN),
        }
    }
}

/// The values of a step of `rows` tokens of one prompt.
struct Values {
    rows: usize,
    gain: Guarded<bf16>,
    bias: Guarded<bf16>,
    table: Guarded<f32>,
    positions: Guarded<u32>,
    row_tables: Guarded<u32>,
    page_tables: Guarded<u32>,
    tiles: PrefillTiles,
    tile_numbers: Guarded<u32>,
    residual: Guarded<f32>,
    normed: Guarded<bf16>,
    qkv: Guarded<f32>,
    keys: Guarded<bf16>,
    values: Guarded<bf16>,
    attended: Guarded<bf16>,
    /// A layer's output, in as many parts as it has segments.
    parts: Guarded<f32>,
    gate_up: Guarded<bf16>,
    gated: Guarded<bf16>,
    /// Where warpgroups multiply.
    maps: Option<TensorMaps>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Piece {
    Qkv,
    RotaryKvWrite,
    Attention,
    /// The same by warps of 32 rows, where there are such.
    WideAttention,
    /// The same by warpgroups.
    GroupAttention,
    Output,
    ResidualNorm,
    /// Gate and up, their product, down, the norm behind them, of so many rows at once.
    FeedForward(usize),
    GateUp,
    SiluMul,
    /// Both at once, by warpgroups in blocks of so many outputs.
    LongGateUp(usize),
    Down,
    /// The same, added to the residual stream, by warpgroups in blocks of so many outputs.
    LongResidual(usize),
    /// What stands behind that.
    RmsNorm,
    /// Queries, keys and values with what stands behind them, by warpgroups in blocks of so many heads.
    LongQkv(usize),
}

impl Values {
    fn new(rig: &Rig, rows: usize) -> Self {
        let mut rng = TestRng::new(2);
        let segment = Segment { first_row: 0, rows, first_position: 0, table_start: 0 };
        let tiles = PrefillTiles::new(&rig.device, [segment].into_iter(), HEADS).unwrap();
        let pages = rows.div_ceil(PAGE);
        let width = HEADS.qkv_width();
        Self {
            rows,
            gain: rig.filled(&rng.bf16s(HIDDEN)),
            bias: rig.filled(&rng.bf16s(width)),
            table: rig.filled(&rng.f32s(rows * HEADS.width)),
            positions: rig.filled(&(0..rows as u32).collect::<Vec<_>>()),
            row_tables: rig.filled(&vec![0u32; rows]),
            page_tables: rig.filled(&(0..pages as u32).rev().collect::<Vec<_>>()),
            tile_numbers: rig.filled(&tiles.numbers),
            tiles,
            residual: rig.filled(&rng.f32s(rows * HIDDEN)),
            normed: rig.filled(&rng.bf16s(rows * HIDDEN)),
            qkv: rig.filled(&rng.f32s(rows * width)),
            keys: rig.filled(&rng.bf16s(pages * HEADS.page_elements())),
            values: rig.filled(&rng.bf16s(pages * HEADS.page_elements())),
            attended: rig.filled(&rng.bf16s(rows * HEADS.query_width())),
            parts: rig.filled(&rng.f32s(DOWN_SEGMENTS * rows * HIDDEN)),
            gate_up: rig.filled(&rng.bf16s(rows * 2 * FFN)),
            gated: rig.filled(&rng.bf16s(rows * FFN)),
            maps: None,
        }
    }

    /// The same with tensor maps of the weights, where the device has warpgroups.
    fn mapped(self, device: &Device, weights: &Weights) -> Self {
        if !ops::wgmma_long_fits(device, HEADS, HIDDEN, FFN) {
            return self;
        }
        let values = [
            Mapped::LongGateUpInput(self.normed.view(), HIDDEN),
            Mapped::LongQkvInput(self.normed.view(), HIDDEN),
            Mapped::LongResidualInput(self.gated.view(), FFN),
            Mapped::Pages(self.keys.view()),
            Mapped::Pages(self.values.view()),
        ];
        let down = weights.down.iter().map(Mapped::LongResidual);
        let qkv = weights.qkv.iter().map(Mapped::LongQkv);
        let all = values.into_iter().chain(weights.gate_up.iter().map(Mapped::LongGateUp)).chain(down).chain(qkv);
        let maps = Some(TensorMaps::new(device, all).unwrap());
        Self { maps, ..self }
    }

    fn launch(&mut self, device: &Device, weights: &Weights, layer: usize, piece: Piece) {
        let places = Places {
            positions: self.positions.view(),
            row_tables: self.row_tables.view(),
            page_tables: self.page_tables.view(),
        };
        match piece {
            Piece::Qkv => {
                ops::linear(device, &self.normed.view(), &weights.qkv[layer], &mut self.qkv.view_mut()).unwrap();
            }
            Piece::RotaryKvWrite => {
                let mut pages = PagesMut { keys: self.keys.view_mut(), values: self.values.view_mut() };
                let (bias, table) = (self.bias.view(), self.table.view());
                let mut qkv = self.qkv.view_mut();
                ops::rotary_kv_write(device, &mut qkv, &bias, &table, places, &mut pages, HEADS).unwrap();
            }
            Piece::Attention | Piece::WideAttention | Piece::GroupAttention => {
                let tiles = self.tiles.clone().with_wide_warps(piece == Piece::WideAttention);
                let pages = Pages { keys: self.keys.view(), values: self.values.view() };
                ops::attention_prefill(
                    device,
                    &self.qkv.view(),
                    pages,
                    self.maps.as_ref().filter(|_| piece == Piece::GroupAttention),
                    &places.page_tables,
                    &tiles,
                    &self.tile_numbers.view(),
                    &mut self.attended.view_mut(),
                    HEADS,
                )
                .unwrap();
            }
            Piece::Output => {
                let mut parts = self.parts.view_mut();
                ops::linear_to_residual(device, &self.attended.view(), &weights.output[layer], &mut parts).unwrap();
            }
            Piece::ResidualNorm => {
                let (mut residual, mut normed) = (self.residual.view_mut(), self.normed.view_mut());
                let (parts, gain) = (self.parts.view(), self.gain.view());
                let part = parts.slice(..self.rows * HIDDEN).unwrap();
                ops::residual_norm(device, &mut residual, &part, &gain, &mut normed, EPS).unwrap();
            }
            Piece::GateUp => {
                let mut out = self.gate_up.view_mut();
                ops::linear(device, &self.normed.view(), &weights.gate_up[layer], &mut out).unwrap();
            }
            Piece::SiluMul => {
                ops::silu_mul(device, &self.gate_up.view(), &mut self.gated.view_mut(), FFN).unwrap();
            }
            Piece::LongGateUp(outputs) => {
                let Some(maps) = &self.maps else { return };
                let (x, mut out) = (self.normed.view(), self.gated.view_mut());
                let (block, rows, weight) = (BlockOutputs::Of(outputs), 0..self.rows, &weights.gate_up[layer]);
                ops::wgmma_long_gate_up(device, block, maps, &x, rows, weight, &mut out).unwrap();
            }
            Piece::Down => {
                let mut parts = self.parts.view_mut();
                ops::linear_to_residual(device, &self.gated.view(), &weights.down[layer], &mut parts).unwrap();
            }
            Piece::LongResidual(outputs) => {
                let Some(maps) = &self.maps else { return };
                let (x, mut residual) = (self.gated.view(), self.residual.view_mut());
                let (block, weight) = (BlockOutputs::Of(outputs), &weights.down[layer]);
                ops::wgmma_long_residual(device, block, maps, DOWN_SEGMENTS, &x, weight, &mut residual).unwrap();
            }
            Piece::LongQkv(of) => {
                let Some(maps) = &self.maps else { return };
                let mut pages = PagesMut { keys: self.keys.view_mut(), values: self.values.view_mut() };
                let (bias, table, block) = (self.bias.view(), self.table.view(), BlockHeads::Of(of));
                let (x, weight, mut qkv) = (self.normed.view(), &weights.qkv[layer], self.qkv.view_mut());
                ops::wgmma_long_qkv(
                    device, block, maps, &x, weight, &bias, &table, places, &mut qkv, &mut pages, HEADS,
                )
                .unwrap();
            }
            Piece::RmsNorm => {
                let (residual, gain) = (self.residual.view(), self.gain.view());
                ops::rms_norm(device, &residual, &gain, &mut self.normed.view_mut(), EPS).unwrap();
            }
            Piece::FeedForward(most) => {
                for start in (0..self.rows).step_by(most) {
                    let count = most.min(self.rows - start);
                    let at = start * HIDDEN..(start + count) * HIDDEN;
                    let (mut residual, mut normed) = (self.residual.view_mut(), self.normed.view_mut());
                    let mut residual = residual.slice_mut(at.clone()).unwrap();
                    let mut normed = normed.slice_mut(at).unwrap();
                    let (mut gate_up, mut gated) = (self.gate_up.view_mut(), self.gated.view_mut());
                    let mut gate_up = gate_up.slice_mut(..count * 2 * FFN).unwrap();
                    let mut gated = gated.slice_mut(..count * FFN).unwrap();
                    let mut parts = self.parts.view_mut();
                    ops::linear(device, &normed.as_slice(), &weights.gate_up[layer], &mut gate_up).unwrap();
                    ops::silu_mul(device, &gate_up.as_slice(), &mut gated, FFN).unwrap();
                    let down =
                        ops::linear_to_residual(device, &gated.as_slice(), &weights.down[layer], &mut parts).unwrap();
                    let gain = self.gain.view();
                    ops::residual_norm(device, &mut residual, &down, &gain, &mut normed, EPS).unwrap();
                }
            }
        }
    }

    fn layers(&mut self, device: &Device, weights: &Weights, pieces: &[Piece]) {
        for layer in 0..LAYERS {
            for &piece in pieces {
                self.launch(device, weights, layer, piece);
            }
        }
    }
}

fn whole_layer(feed: usize) -> [Piece; 6] {
    use Piece::{Attention, FeedForward, Output, Qkv, ResidualNorm, RotaryKvWrite};
    [Qkv, RotaryKvWrite, Attention, Output, ResidualNorm, FeedForward(feed)]
}

/// Prints microseconds of a layer: the device's, recorded; the device's, launched; the host's, to launch.
fn measure(device: &Device, what: &str, work: &mut dyn FnMut()) {
    let mut stopwatch = device.stopwatch().unwrap();
    let mut recording = Recording::default();
    let mut best = [f64::INFINITY; 3];
    let per = |seconds: f64| seconds * 1e6 / LAYERS as f64;
    for round in 0..6 {
        for recorded in [true, false] {
            device.synchronize().unwrap();
            stopwatch.start().unwrap();
            let began = Instant::now();
            if recorded {
                let mut run = || {
                    work();
                    Ok(())
                };
                device.replay(&mut recording, &mut run).unwrap();
            } else {
                work();
            }
            let host = per(began.elapsed().as_secs_f64());
            stopwatch.stop().unwrap();
            let took = per(stopwatch.elapsed().unwrap().as_secs_f64());
            // The first round makes plans, loads code and records.
            if round > 0 && recorded {
                best[0] = best[0].min(took);
            } else if round > 0 {
                best[1] = best[1].min(took);
                best[2] = best[2].min(host);
            }
        }
    }
    let [recorded, launched, host] = best;
    println!("{what}: {recorded:.2} us recorded, {launched:.2} launched, {host:.2} of the host");
}

/// Chooses algorithms at every rung up to `rows`; prints what changed.
fn choose<O: LinearOutput>(
    device: &Device,
    name: &str,
    rows: usize,
    x: &Guarded<bf16>,
    weights: &[Weight],
    segments: usize,
    out: &mut SliceMut<'_, O>,
) {
    let all: Vec<&Weight> = weights.iter().collect();
    let (n, k) = (weights[0].n(), weights[0].k());
    for rung in LINEAR_RUNGS.into_iter().filter(|&rung| rung <= rows) {
        let x = x.view();
        let began = Instant::now();
        let x = x.slice(..rung * k).unwrap();
        let choice =
            device.choose_linear_algorithm(x, &all, segments, out.slice_mut(..segments * rung * n).unwrap()).unwrap();
        let Some(choice) = choice else { continue };
        println!(
            "{name}, {rung} rows: {:.2} us instead of {:.2}, the algorithm {} of {} ({}), in {:.2} ms",
            choice.chosen_us,
            choice.first_us,
            choice.index,
            choice.offered,
            choice.algorithm,
            began.elapsed().as_secs_f64() * 1e3
        );
    }
}

#[test]
#[ignore = "a measurement; needs a GPU"]
fn speed() {
    let rig = Rig::cuda();
    let device = rig.device.clone();
    let weights = Weights::new(&device);
    for chosen in [false, true] {
        if chosen {
            let mut v = Values::new(&rig, 4096);
            choose(&device, "qkv", 4096, &v.normed, &weights.qkv, 1, &mut v.qkv.view_mut());
            choose(&device, "attention output", 4096, &v.attended, &weights.output, 1, &mut v.parts.view_mut());
            choose(&device, "gate and up", 4096, &v.normed, &weights.gate_up, 1, &mut v.gate_up.view_mut());
            choose(&device, "down", 4096, &v.gated, &weights.down, DOWN_SEGMENTS, &mut v.parts.view_mut());
        }
        let algorithms = if chosen { "timed algorithms" } else { "the library's algorithms" };
        for rows in [64, 128, 256, 512, 1024, 4096] {
            let mut values = Values::new(&rig, rows);
            let mut pieces = vec![Piece::Qkv, Piece::Output, Piece::GateUp, Piece::Down];
            if !chosen {
                pieces.extend([
                    Piece::RotaryKvWrite,
                    Piece::Attention,
                    Piece::WideAttention,
                    Piece::ResidualNorm,
                    Piece::SiluMul,
                ]);
            }
            for piece in pieces {
                let what = format!("{rows} rows, {algorithms}, {piece:?}");
                measure(&device, &what, &mut || values.layers(&device, &weights, &[piece]));
            }
            for feed in [4096, 2048, 1408, 1280, 1024, 512] {
                if feed == 4096 || feed < rows {
                    let what = format!("{rows} rows, {algorithms}, a layer, {feed} rows of feed-forward at once");
                    let layer = whole_layer(feed);
                    measure(&device, &what, &mut || values.layers(&device, &weights, &layer));
                }
            }
        }
    }
}

/// What warpgroups compute of a layer.
#[test]
#[ignore = "a measurement; needs a GPU"]
fn speed_of_warpgroups() {
    let rig = Rig::cuda();
    let device = rig.device.clone();
    let weights = Weights::new(&device);
    for rows in [128, 256, 384, 512, 768, 1024, 1536, 2048, 4096] {
        let mut values = Values::new(&rig, rows).mapped(&device, &weights);
        // None of these changes what another one reads.
        let pieces = [
            &[Piece::GroupAttention][..],
            &[Piece::Qkv, Piece::RotaryKvWrite],
            &[Piece::LongQkv(1)],
            &[Piece::LongQkv(3)],
            &[Piece::LongGateUp(160)],
            &[Piece::LongGateUp(256)],
            &[Piece::LongResidual(112), Piece::RmsNorm],
            &[Piece::LongResidual(224), Piece::RmsNorm],
            &[Piece::LongResidual(224)],
            &[Piece::Down, Piece::ResidualNorm],
        ];
        for pieces in pieces {
            let what = format!("{rows} rows, {pieces:?}");
            measure(&device, &what, &mut || values.layers(&device, &weights, pieces));
        }
    }
}

/// The bits of a layer do not depend on how many rows its feed-forward part takes at once, nor on timing.
#[test]
#[ignore = "needs a GPU"]
fn parts_and_algorithms_change_no_bit() {
    let rig = Rig::cuda();
    let device = rig.device.clone();
    let weights = Weights::new(&device);
    let run = |feed: usize| {
        let mut values = Values::new(&rig, 700);
        for piece in whole_layer(feed) {
            values.launch(&device, &weights, 0, piece);
        }
        (rig.download(&values.residual), rig.download(&values.normed))
    };
    let (residual, normed) = run(4096);
    assert!(residual.iter().all(|value| value.is_finite()), "a layer of sound values");
    for timed in [false, true] {
        if timed {
            let mut v = Values::new(&rig, 768);
            choose(&device, "qkv", 768, &v.normed, &weights.qkv, 1, &mut v.qkv.view_mut());
            choose(&device, "attention output", 768, &v.attended, &weights.output, 1, &mut v.parts.view_mut());
            choose(&device, "gate and up", 768, &v.normed, &weights.gate_up, 1, &mut v.gate_up.view_mut());
            choose(&device, "down", 768, &v.gated, &weights.down, DOWN_SEGMENTS, &mut v.parts.view_mut());
        }
        for feed in [4096, 512, 333, 128] {
            let (again, normed_again) = run(feed);
            let what = format!("{feed} rows at once, timed: {timed}");
            assert_same(&again, &residual, &what);
            assert_same(&normed_again, &normed, &what);
        }
    }
}
