//! Times every kernel of `host::ops` by itself: on the CPU, and on the first GPU where there is one.
//!
//! `cargo bench --bench kernels -- [NAME]`, such as `gpu/attention_decode`. A time is the device's own, from an event
//! before the launch to one after it (which is a microsecond or two for nothing at all), and each run finds the caches
//! full of something else: a buffer larger than they are is overwritten first. Shapes are those of Qwen2.5-0.5B on a
//! GPU and of a small model on the CPU. `GB/s` counts what must be moved at least; `elem` is one floating-point
//! operation, so `Gelem/s` is GFLOP/s.
#![expect(clippy::unwrap_used, reason = "a launch that fails ends the run")]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use cuda_std::Element;
use half::bf16;
use host::device::{Buffer, CpuOptions, Device, DeviceError, KernelImage, KernelImages, MemoryKind, contract};
use host::ops::{
    self, BlockHeads, BlockOutputs, BlockTokens, DecodeBlocks, DecodeScratch, FEW, HeadShape, Mapped, Norm, PAGE,
    Pages, PagesMut, Pairing, Places, PrefillTiles, QkvBlocks, RowParameters, SampleParams, Segment, TensorMaps,
};
use host::testing::TestRng;

const IMAGES: KernelImages<'static> = KernelImages {
    images: &[
        KernelImage { sm: 80, arch_specific: false, ptx: include_str!(env!("LOCKSTEP_PTX_SM_80")) },
        KernelImage { sm: 90, arch_specific: true, ptx: include_str!(env!("LOCKSTEP_PTX_SM_90A")) },
    ],
};

/// Larger than any cache of a GPU, and of most CPUs.
const GPU_CACHE_BYTES: usize = 256 << 20;
const CPU_CACHE_BYTES: usize = 64 << 20;

/// What a case does to its own buffers.
type Run = Box<dyn FnMut(&Device) -> Result<(), DeviceError>>;

/// A model's dimensions and how much is asked of it.
struct Shape {
    hidden: usize,
    ffn: usize,
    vocab: usize,
    heads: HeadShape,
    /// Tokens of a decode step.
    rows: Vec<usize>,
    /// Tokens of their contexts.
    context: usize,
    /// Tokens of a prefill.
    prompt: usize,
}

impl Shape {
    fn of(device: &Device) -> Self {
        let heads = HeadShape { query_heads: 14, kv_heads: 2, width: 64 };
        if device.is_cuda() {
            let (hidden, ffn, vocab) = (896, 4864, 151_936);
            Self { hidden, ffn, vocab, heads, rows: vec![1, 8, 64, 256], context: 1024, prompt: 4096 }
        } else {
            let heads = HeadShape { query_heads: 4, ..heads };
            Self { hidden: 256, ffn: 512, vocab: 2048, heads, rows: vec![1, 8], context: 256, prompt: 128 }
        }
    }
}

/// Inputs: random, because a GPU is faster on zeros.
struct Inputs<'a> {
    device: &'a Device,
    random: TestRng,
}

impl Inputs<'_> {
    fn holding<T: Element>(&self, values: &[T]) -> Buffer<T> {
        self.device.alloc_from(values, MemoryKind::Other, "bench").unwrap()
    }

    fn floats(&mut self, len: usize) -> Buffer<f32> {
        let values: Vec<f32> = (0..len).map(|_| self.random.next_f32()).collect();
        self.holding(&values)
    }

    fn halves(&mut self, len: usize) -> Buffer<bf16> {
        let values: Vec<bf16> = (0..len).map(|_| bf16::from_f32(self.random.next_f32())).collect();
        self.holding(&values)
    }

    fn below(&mut self, len: usize, end: usize) -> Buffer<u32> {
        let values: Vec<u32> = (0..len).map(|_| self.random.below(end as u64) as u32).collect();
        self.holding(&values)
    }

    fn same<T: Element>(&self, len: usize, value: T) -> Buffer<T> {
        self.holding(&vec![value; len])
    }
}

/// A device with its stopwatch and the memory that is overwritten between runs.
struct Rig<'a> {
    criterion: &'a mut Criterion,
    device: &'a Device,
    place: &'static str,
    overwritten: Buffer<u32>,
}

impl Rig<'_> {
    fn time(&mut self, kernel: &str, size: impl std::fmt::Display, throughput: Throughput, mut run: Run) {
        let mut stopwatch = self.device.stopwatch().unwrap();
        let mut group = self.criterion.benchmark_group(format!("{}/{kernel}", self.place));
        group.throughput(throughput);
        let (device, overwritten) = (self.device, &mut self.overwritten);
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    // On a GPU the launch is queued while this is still being written, so no launch is waited for.
                    device.fill_zero(&mut *overwritten).unwrap();
                    stopwatch.start().unwrap();
                    run(device).unwrap();
                    stopwatch.stop().unwrap();
                    total += stopwatch.elapsed().unwrap();
                }
                total
            });
        });
    }

    fn bytes(&mut self, kernel: &str, size: impl std::fmt::Display, bytes: usize, run: Run) {
        self.time(kernel, size, Throughput::BytesDecimal(bytes as u64), run);
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .without_plots()
        .configure_from_args();
    let cpu = Device::cpu(CpuOptions::default()).unwrap();
    bench(&mut criterion, &cpu, "cpu", CPU_CACHE_BYTES);
    if Device::cuda_count() > 0 {
        let gpu = Device::cuda(0, &IMAGES, kernels_gpu::KERNELS).unwrap();
        println!("{}, {} kernels", gpu.name(), gpu.kernel_image().unwrap_or_default());
        bench(&mut criterion, &gpu, "gpu", GPU_CACHE_BYTES);
    }
    criterion.final_summary();
}

fn bench(criterion: &mut Criterion, device: &Device, place: &'static str, cache_bytes: usize) {
    let overwritten = device.alloc::<u32>(cache_bytes / 4, MemoryKind::Other, "overwritten").unwrap();
    let rig = &mut Rig { criterion, device, place, overwritten };
    let inputs = &mut Inputs { device, random: TestRng::new(1) };
    let shape = Shape::of(device);
    for &rows in &shape.rows {
        between_layers(rig, inputs, &shape, rows);
        linear_layers(rig, inputs, &shape, rows);
        if rows <= FEW && ops::few_fits(device, shape.heads, shape.hidden, shape.ffn) {
            few_layers(rig, inputs, &shape, rows);
        }
        if rows > FEW && ops::tiles_fits(device, shape.heads, shape.hidden, shape.ffn) {
            tile_layers(rig, inputs, &shape, rows);
        }
        if rows > FEW && ops::wgmma_fits(device, shape.heads, shape.hidden, shape.ffn) {
            warpgroup_layers(rig, inputs, &shape, rows);
        }
        attention(rig, inputs, &shape, rows);
        from_logits(rig, inputs, &shape, rows);
    }
    prefill(rig, inputs, &shape);
    comparison(rig, inputs);
}

fn between_layers(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    let Shape { hidden, ffn, vocab, heads, .. } = *shape;
    let (ids, table) = (inputs.below(rows, vocab), inputs.halves(vocab * hidden));
    let mut residual = inputs.floats(rows * hidden);
    let run: Run = Box::new(move |device| {
        ops::embedding(device, &ids.as_slice(), &table.as_slice(), &mut residual.as_slice_mut(), hidden)
    });
    rig.bytes("embedding", rows, rows * (4 + hidden * (2 + 4)), run);

    let (x, weight, mut out) = (inputs.floats(rows * hidden), inputs.halves(hidden), inputs.halves(rows * hidden));
    let run: Run =
        Box::new(move |device| ops::rms_norm(device, &x.as_slice(), &weight.as_slice(), &mut out.as_slice_mut(), 1e-6));
    rig.bytes("rms_norm", rows, rows * hidden * (4 + 2) + hidden * 2, run);

    for parts in [1, 4] {
        let (mut residual, delta) = (inputs.floats(rows * hidden), inputs.same(parts * rows * hidden, 0.0_f32));
        let (weight, mut out) = (inputs.halves(hidden), inputs.halves(rows * hidden));
        let run: Run = Box::new(move |device| {
            let (residual, out) = (&mut residual.as_slice_mut(), &mut out.as_slice_mut());
            ops::residual_norm(device, residual, &delta.as_slice(), &weight.as_slice(), out, 1e-6)
        });
        let bytes = rows * hidden * (8 + 4 * parts + 2) + hidden * 2;
        rig.bytes("residual_norm", format!("{rows}, {parts} parts"), bytes, run);
    }

    let width = heads.qkv_width();
    let (mut x, bias) = (inputs.floats(rows * width), inputs.same(width, bf16::ZERO));
    let run: Run = Box::new(move |device| ops::bias_add(device, &mut x.as_slice_mut(), &bias.as_slice()));
    rig.bytes("bias_add", rows, rows * width * (4 + 4) + width * 2, run);

    let (mut qkv, positions) = (inputs.floats(rows * width), inputs.below(rows, shape.context));
    let angles = inputs.floats(shape.context * heads.width);
    let run: Run = Box::new(move |device| {
        let (positions, angles) = (positions.as_slice(), angles.as_slice());
        ops::rotary(device, &mut qkv.as_slice_mut(), &positions, &angles, heads, Pairing::Halves)
    });
    let rotated = (heads.query_heads + heads.kv_heads) * heads.width;
    rig.bytes("rotary", rows, rows * (rotated * (4 + 4) + heads.width * 4 + 4), run);

    let (mut residual, x) = (inputs.floats(rows * hidden), inputs.same(rows * hidden, 0.0_f32));
    let run: Run = Box::new(move |device| ops::residual_add(device, &mut residual.as_slice_mut(), &x.as_slice()));
    rig.bytes("residual_add", rows, rows * hidden * 12, run);

    let (x, mut out) = (inputs.halves(rows * 2 * ffn), inputs.halves(rows * ffn));
    let run: Run = Box::new(move |device| ops::silu_mul(device, &x.as_slice(), &mut out.as_slice_mut(), ffn));
    rig.bytes("silu_mul", rows, rows * ffn * (2 * 2 + 2), run);

    let (x, list, mut out) = (inputs.floats(rows * hidden), inputs.below(rows, rows), inputs.floats(rows * hidden));
    let run: Run = Box::new(move |device| {
        ops::gather_rows(device, &x.as_slice(), &list.as_slice(), &mut out.as_slice_mut(), hidden)
    });
    rig.bytes("gather_rows", rows, rows * (hidden * (4 + 4) + 4), run);

    let (ids, mut out) = (inputs.below(rows, rows), inputs.below(rows, rows));
    let run: Run = Box::new(move |device| device.copy(ids.as_slice(), &mut out));
    rig.bytes("copy_words", rows, rows * (4 + 4), run);
}

fn linear_layers(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    let Shape { hidden, ffn, vocab, heads, .. } = *shape;
    let layers = [
        ("qkv", heads.qkv_width(), hidden),
        ("attention output", hidden, heads.query_width()),
        ("gate and up", 2 * ffn, hidden),
        ("down", hidden, ffn),
        ("head", vocab, hidden),
    ];
    for (layer, n, k) in layers {
        let size = format!("{layer} [{n}, {k}] x {rows}");
        let bytes = 2 * (rows * k + n * k) + 4 * rows * n;
        let (x, weight) = (inputs.halves(rows * k), inputs.halves(n * k));
        let (weight, mut out) =
            (rig.device.prepare_weight(weight, n, k, false).unwrap(), inputs.same(rows * n, 0.0_f32));
        let run: Run = Box::new(move |device| ops::linear(device, &x.as_slice(), &weight, &mut out.as_slice_mut()));
        rig.bytes("linear", &size, bytes, run);

        let (x, weight, mut out) = (inputs.halves(rows * k), inputs.halves(n * k), inputs.same(rows * n, 0.0_f32));
        let run: Run = Box::new(move |device| {
            ops::linear_kernel(device, &x.as_slice(), &weight.as_slice(), &mut out.as_slice_mut(), k)
        });
        rig.bytes("linear_kernel", &size, bytes, run);
    }
    // Layers whose output is added to the residual stream, as the contract cuts them.
    for (layer, n, k) in [layers[1], layers[3]] {
        let segments = contract::segments(n, k);
        let (x, weight) = (inputs.halves(rows * k), inputs.halves(n * k));
        let weight = rig.device.prepare_weight(weight, n, k, false).unwrap();
        let mut out = inputs.same(segments * rows * n, 0.0_f32);
        let run: Run =
            Box::new(move |device| ops::linear_parts(device, &x.as_slice(), &weight, &mut out.as_slice_mut()));
        let bytes = 2 * (rows * k + n * k) + 4 * segments * rows * n;
        rig.bytes("linear_parts", format!("{layer} [{n}, {k}] in {segments} x {rows}"), bytes, run);
    }
    // The plain chain is for comparisons only; one shape says how long they take.
    let (n, k) = (hidden, hidden);
    let (x, weight, mut out) = (inputs.halves(rows * k), inputs.halves(n * k), inputs.same(rows * n, 0.0_f32));
    let run: Run = Box::new(move |device| {
        ops::linear_plain(device, &x.as_slice(), &weight.as_slice(), &mut out.as_slice_mut(), k)
    });
    rig.bytes("linear_plain", format!("[{n}, {k}] x {rows}"), 2 * (rows * k + n * k) + 4 * rows * n, run);
}

/// The fused layers of a small batch: `few_qkv` and `few_gate_up` take their wide kernels from three rows on, `few_logits` has
/// `few_argmax` behind it.
fn few_layers(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    const EPS: f32 = 1e-6;
    let Shape { hidden, ffn, vocab, heads, context, .. } = *shape;
    let weight = |inputs: &mut Inputs<'_>, n: usize, k: usize| {
        let rows = inputs.halves(n * k);
        inputs.device.prepare_weight(rows, n, k, true).unwrap()
    };
    let bytes = |n: usize, k: usize| 2 * n * k;

    let width = heads.qkv_width();
    let (mut keys, mut values, tables, starts) = pages(inputs, heads, rows, context);
    let (residual, gain, bias) = (inputs.floats(rows * hidden), inputs.halves(hidden), inputs.halves(width));
    let (qkv, positions) = (weight(inputs, width, hidden), inputs.same(rows, context as u32 - 1));
    let (angles, mut queries) = (inputs.floats(context * heads.width), inputs.same(rows * width, 0.0_f32));
    let run: Run = Box::new(move |device| {
        let places =
            Places { positions: positions.as_slice(), row_tables: starts.as_slice(), page_tables: tables.as_slice() };
        let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
        let norm = Norm { gain: gain.as_slice(), eps: EPS };
        let (bias, angles, queries) = (bias.as_slice(), angles.as_slice(), &mut queries.as_slice_mut());
        let residual = residual.as_slice();
        ops::few_qkv(device, &residual, norm, &qkv, Some(&bias), &angles, places, queries, &mut pages, heads)
    });
    let written = heads.query_width() * 4 + 2 * heads.kv_heads * heads.width * 2;
    rig.bytes("few_qkv", rows, bytes(width, hidden) + rows * (hidden * 4 + written), run);

    let (residual, gain, mut out) =
        (inputs.floats(rows * hidden), inputs.halves(hidden), inputs.same(rows * ffn, bf16::ZERO));
    let gate_up = weight(inputs, 2 * ffn, hidden);
    let run: Run = Box::new(move |device| {
        let norm = Norm { gain: gain.as_slice(), eps: EPS };
        ops::few_gate_up(device, &residual.as_slice(), norm, &gate_up, &mut out.as_slice_mut())
    });
    rig.bytes("few_gate_up", rows, bytes(2 * ffn, hidden) + rows * (hidden * 4 + ffn * 2), run);

    for (layer, k) in [("attention output", heads.query_width()), ("down", ffn)] {
        for segments in [1, 2, 4] {
            if !k.is_multiple_of(64 * segments) {
                continue;
            }
            let (x, weight) = (inputs.halves(rows * k), weight(inputs, hidden, k));
            let mut residual = inputs.floats(rows * hidden);
            let run: Run = Box::new(move |device| {
                ops::few_residual_in(device, segments, &x.as_slice(), &weight, &mut residual.as_slice_mut())
            });
            let size = format!("{layer} [{hidden}, {k}] x {rows}");
            rig.bytes(&format!("few_residual_{segments}"), size, bytes(hidden, k) + rows * (k * 2 + hidden * 8), run);
        }
    }

    let (residual, gain, head) = (inputs.floats(rows * hidden), inputs.halves(hidden), weight(inputs, vocab, hidden));
    let (mut best, mut ids) = (inputs.same(ops::best_len(rig.device), 0_u64), inputs.same(rows, 0_u32));
    let mut unwanted = inputs.same(1, 0.0_f32);
    let run: Run = Box::new(move |device| {
        let norm = Norm { gain: gain.as_slice(), eps: EPS };
        let (best, ids) = (&mut best.as_slice_mut(), &mut ids.as_slice_mut());
        let logits = &mut unwanted.slice_mut(..0)?;
        ops::few_logits(device, &residual.as_slice(), norm, &head, logits, best, ids)
    });
    rig.bytes("few_logits", rows, bytes(vocab, hidden) + rows * hidden * 4, run);
}

/// The layers of more rows by our own tiles, with what stands behind them; `tile_logits` has `few_argmax` behind it.
fn tile_layers(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    const BLOCK: BlockTokens = BlockTokens::Chosen;
    let Shape { hidden, ffn, vocab, heads, context, .. } = *shape;
    let weight = |inputs: &mut Inputs<'_>, n: usize, k: usize| {
        let rows = inputs.halves(n * k);
        inputs.device.prepare_weight(rows, n, k, true).unwrap()
    };
    let bytes = |n: usize, k: usize| 2 * n * k;

    let width = heads.qkv_width();
    let (mut keys, mut values, tables, starts) = pages(inputs, heads, rows, context);
    let (x, bias, qkv) = (inputs.halves(rows * hidden), inputs.halves(width), weight(inputs, width, hidden));
    let positions = inputs.same(rows, context as u32 - 1);
    let (angles, mut queries) = (inputs.floats(context * heads.width), inputs.same(rows * width, 0.0_f32));
    let run: Run = Box::new(move |device| {
        let places =
            Places { positions: positions.as_slice(), row_tables: starts.as_slice(), page_tables: tables.as_slice() };
        let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
        let (x, bias, angles) = (x.as_slice(), bias.as_slice(), angles.as_slice());
        let queries = &mut queries.as_slice_mut();
        ops::tile_qkv(device, BLOCK, &x, &qkv, &bias, &angles, places, queries, &mut pages, heads)
    });
    let written = heads.query_width() * 4 + 2 * heads.kv_heads * heads.width * 2;
    rig.bytes("tile_qkv", rows, bytes(width, hidden) + rows * (hidden * 2 + written), run);

    for (layer, k) in [("attention output", heads.query_width()), ("down", ffn)] {
        let segments = contract::segments(hidden, k);
        let (x, weight) = (inputs.halves(rows * k), weight(inputs, hidden, k));
        let mut parts = inputs.same(segments * rows * hidden, 0.0_f32);
        let run: Run = Box::new(move |device| {
            ops::tile_parts(device, BLOCK, segments, &x.as_slice(), &weight, &mut parts.as_slice_mut())
        });
        let size = format!("{layer} [{hidden}, {k}] in {segments} x {rows}");
        rig.bytes("tile_parts", size, bytes(hidden, k) + rows * (k * 2 + segments * hidden * 4), run);
    }

    let (x, gate_up) = (inputs.halves(rows * hidden), weight(inputs, 2 * ffn, hidden));
    let mut out = inputs.same(rows * ffn, bf16::ZERO);
    let run: Run =
        Box::new(move |device| ops::tile_gate_up(device, BLOCK, &x.as_slice(), &gate_up, &mut out.as_slice_mut()));
    rig.bytes("tile_gate_up", rows, bytes(2 * ffn, hidden) + rows * (hidden + ffn) * 2, run);

    let (x, head) = (inputs.halves(rows * hidden), weight(inputs, vocab, hidden));
    let (mut best, mut ids) = (inputs.same(ops::tile_best_len(rig.device), 0_u64), inputs.same(rows, 0_u32));
    let mut unwanted = inputs.same(1, 0.0_f32);
    let run: Run = Box::new(move |device| {
        let (best, ids) = (&mut best.as_slice_mut(), &mut ids.as_slice_mut());
        let logits = &mut unwanted.slice_mut(..0)?;
        ops::tile_logits(device, BLOCK, &x.as_slice(), &head, logits, best, ids)
    });
    rig.bytes("tile_logits", rows, bytes(vocab, hidden) + rows * hidden * 2, run);
}

/// The same layers by warpgroups; `wgmma_logits` has `few_argmax` behind it.
fn warpgroup_layers(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    const BLOCK: BlockTokens = BlockTokens::Chosen;
    let Shape { hidden, ffn, vocab, heads, context, .. } = *shape;
    let weight = |inputs: &mut Inputs<'_>, n: usize, k: usize| {
        let rows = inputs.halves(n * k);
        inputs.device.prepare_weight(rows, n, k, true).unwrap()
    };
    let maps = |device: &Device, of: [Mapped<'_>; 2]| TensorMaps::new(device, of).unwrap();
    let bytes = |n: usize, k: usize| 2 * n * k;

    let width = heads.qkv_width();
    let (mut keys, mut values, tables, starts) = pages(inputs, heads, rows, context);
    let (x, bias, qkv) = (inputs.halves(rows * hidden), inputs.halves(width), weight(inputs, width, hidden));
    let positions = inputs.same(rows, context as u32 - 1);
    let (angles, mut queries) = (inputs.floats(context * heads.width), inputs.same(rows * width, 0.0_f32));
    let of = maps(rig.device, [Mapped::QkvInput(x.as_slice(), hidden), Mapped::Qkv(&qkv, heads.width)]);
    let run: Run = Box::new(move |device| {
        let places =
            Places { positions: positions.as_slice(), row_tables: starts.as_slice(), page_tables: tables.as_slice() };
        let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
        let (x, bias, angles) = (x.as_slice(), bias.as_slice(), angles.as_slice());
        let queries = &mut queries.as_slice_mut();
        ops::wgmma_qkv(device, QkvBlocks::Chosen, &of, &x, &qkv, &bias, &angles, places, queries, &mut pages, heads)
    });
    let written = heads.query_width() * 4 + 2 * heads.kv_heads * heads.width * 2;
    rig.bytes("wgmma_qkv", rows, bytes(width, hidden) + rows * (hidden * 2 + written), run);

    for (layer, k) in [("attention output", heads.query_width()), ("down", ffn)] {
        let segments = contract::segments(hidden, k);
        let (x, weight) = (inputs.halves(rows * k), weight(inputs, hidden, k));
        let mut parts = inputs.same(segments * rows * hidden, 0.0_f32);
        let of = maps(rig.device, [Mapped::PartsInput(x.as_slice(), k), Mapped::Parts(&weight)]);
        let run: Run = Box::new(move |device| {
            ops::wgmma_parts(device, BLOCK, &of, segments, &x.as_slice(), &weight, &mut parts.as_slice_mut())
        });
        let size = format!("{layer} [{hidden}, {k}] in {segments} x {rows}");
        rig.bytes("wgmma_parts", size, bytes(hidden, k) + rows * (k * 2 + segments * hidden * 4), run);
    }

    let (x, gate_up) = (inputs.halves(rows * hidden), weight(inputs, 2 * ffn, hidden));
    let mut out = inputs.same(rows * ffn, bf16::ZERO);
    let of = maps(rig.device, [Mapped::GateUpInput(x.as_slice(), hidden), Mapped::GateUp(&gate_up)]);
    let run: Run = Box::new(move |device| {
        ops::wgmma_gate_up(device, BLOCK, &of, &x.as_slice(), &gate_up, &mut out.as_slice_mut())
    });
    rig.bytes("wgmma_gate_up", rows, bytes(2 * ffn, hidden) + rows * (hidden + ffn) * 2, run);

    let (x, head) = (inputs.halves(rows * hidden), weight(inputs, vocab, hidden));
    let (mut best, mut ids) = (inputs.same(ops::wgmma_best_len(rig.device, rows), 0_u64), inputs.same(rows, 0_u32));
    let mut unwanted = inputs.same(1, 0.0_f32);
    let of = maps(rig.device, [Mapped::LogitsInput(x.as_slice(), hidden), Mapped::Logits(&head)]);
    let run: Run = Box::new(move |device| {
        let (best, ids) = (&mut best.as_slice_mut(), &mut ids.as_slice_mut());
        let logits = &mut unwanted.slice_mut(..0)?;
        ops::wgmma_logits(device, BLOCK, &of, &x.as_slice(), &head, logits, best, ids)
    });
    rig.bytes("wgmma_logits", rows, bytes(vocab, hidden) + rows * hidden * 2, run);
}

/// Pages of `rows` sequences of `context` tokens: keys, values, page tables, where each row's table starts.
fn pages(
    inputs: &mut Inputs<'_>,
    heads: HeadShape,
    rows: usize,
    context: usize,
) -> (Buffer<bf16>, Buffer<bf16>, Buffer<u32>, Buffer<u32>) {
    let per_row = context.div_ceil(PAGE);
    let elements = rows * per_row * heads.page_elements();
    let tables: Vec<u32> = (0..(rows * per_row) as u32).collect();
    let starts: Vec<u32> = (0..rows as u32).map(|row| row * per_row as u32).collect();
    (inputs.halves(elements), inputs.halves(elements), inputs.holding(&tables), inputs.holding(&starts))
}

/// Rows at `positions`: of a sequence each, or of one where the positions are many tokens of it.
fn rotary_kv_write(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, heads: HeadShape, positions: &[u32], context: usize) {
    let (rows, width) = (positions.len(), heads.qkv_width());
    let one = rows > 1 && positions[0] != positions[1];
    let (mut keys, mut values, tables, starts) = pages(inputs, heads, if one { 1 } else { rows }, context);
    let starts = if one { inputs.same(rows, 0_u32) } else { starts };
    let (mut qkv, bias) = (inputs.floats(rows * width), inputs.same(width, bf16::ZERO));
    let (positions, angles) = (inputs.holding(positions), inputs.floats(context * heads.width));
    let run: Run = Box::new(move |device| {
        let places =
            Places { positions: positions.as_slice(), row_tables: starts.as_slice(), page_tables: tables.as_slice() };
        let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
        let qkv = &mut qkv.as_slice_mut();
        ops::rotary_kv_write(device, qkv, &bias.as_slice(), &angles.as_slice(), places, &mut pages, heads)
    });
    let moved = heads.query_width() * (4 + 4) + 2 * heads.kv_heads * heads.width * (4 + 2);
    rig.bytes("rotary_kv_write", rows, rows * (moved + heads.width * 4), run);
}

fn attention(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    let Shape { heads, context, .. } = *shape;
    let (kv_width, last) = (heads.kv_heads * heads.width, context as u32 - 1);
    let (mut keys, mut values, tables, starts) = pages(inputs, heads, rows, context);
    let (qkv, positions) = (inputs.floats(rows * heads.qkv_width()), inputs.same(rows, last));
    let run: Run = Box::new(move |device| {
        let (positions, starts, tables) = (positions.as_slice(), starts.as_slice(), tables.as_slice());
        let (keys, values) = (&mut keys.as_slice_mut(), &mut values.as_slice_mut());
        ops::kv_write(device, &qkv.as_slice(), &positions, &starts, &tables, keys, values, heads)
    });
    rig.bytes("kv_write", rows, rows * 2 * kv_width * (4 + 2), run);
    rotary_kv_write(rig, inputs, heads, &vec![last; rows], context);

    let (keys, values, tables, starts) = pages(inputs, heads, rows, context);
    let (qkv, positions) = (inputs.floats(rows * heads.qkv_width()), inputs.same(rows, last));
    let mut partials = inputs.same(ops::partials_len(heads, rows, context.div_ceil(PAGE)), 0.0_f32);
    let mut counters = inputs.same(ops::counters_len(heads, rows), 0_u32);
    let mut out = inputs.same(rows * heads.query_width(), bf16::ZERO);
    let run: Run = Box::new(move |device| {
        let pages = Pages { keys: keys.as_slice(), values: values.as_slice() };
        let (positions, starts, tables) = (positions.as_slice(), starts.as_slice(), tables.as_slice());
        let scratch = &mut DecodeScratch { partials: partials.as_slice_mut(), counters: counters.as_slice_mut() };
        let out = &mut out.as_slice_mut();
        let spans = context.div_ceil(PAGE);
        ops::attention_decode(
            device,
            DecodeBlocks::for_contexts(device, heads, rows, spans, rows * spans),
            &qkv.as_slice(),
            pages,
            &positions,
            &starts,
            &tables,
            scratch,
            out,
            heads,
            context,
        )
    });
    rig.bytes("attention_decode", format!("{rows} at {context}"), rows * context * 2 * kv_width * 2, run);
}

/// How each row is sampled, at temperature 0.8.
fn parameters(top_k: u32, top_p: f32, min_p: f32) -> RowParameters {
    RowParameters {
        seed: 7,
        position: 9,
        top_k,
        temperature: 0.8,
        top_p,
        min_p,
        repetition: 1.0,
        frequency: 0.0,
        presence: 0.0,
    }
}

fn from_logits(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape, rows: usize) {
    const LISTED: usize = 20;
    let (vocab, len) = (shape.vocab, rows * shape.vocab);
    let (logits, mut ids) = (inputs.floats(len), inputs.same(rows, 0_u32));
    let run: Run = Box::new(move |device| ops::argmax(device, &logits.as_slice(), &mut ids.as_slice_mut()));
    rig.bytes("argmax", rows, len * 4, run);

    // As many different tokens of each row as a short answer has.
    let penalised = 128.min(vocab);
    let entries = rows * penalised;
    let words = (0..entries).flat_map(|entry| {
        let token = entry % penalised * (vocab / penalised);
        [(entry / penalised) as u32, token as u32, 1, 0]
    });
    let (listed, neutral) = (inputs.holding(&words.collect::<Vec<_>>()), parameters(0, 1.0, 0.0).words().repeat(rows));
    let (mut logits, neutral) = (inputs.floats(len), inputs.holding(&neutral));
    let run: Run = Box::new(move |device| {
        ops::penalties(device, &mut logits.as_slice_mut(), &listed.as_slice(), &neutral.as_slice())
    });
    rig.bytes("penalties", rows, entries * (4 * 4 + 8), run);

    for (what, top_k, top_p, min_p) in [
        ("temperature alone", 0, 1.0, 0.0),
        ("top-k 50, top-p 0.95", 50, 0.95_f32, 0.0),
        ("top-p 0.95", 0, 0.95, 0.0),
        ("min-p 0.1", 0, 1.0, 0.1),
    ] {
        // A head above a tail, as a model's logits have: uniform ones have no small top-p of 0.95.
        let values: Vec<f32> = (0..len).map(|_| -1.5 * inputs.random.next_f32().abs().max(1e-7).ln()).collect();
        let (logits, mut ids) = (inputs.holding(&values), inputs.same(rows, 0_u32));
        let records = inputs.holding(&parameters(top_k, top_p, min_p).words().repeat(rows));
        let mut scratch = rig.device.is_cuda().then(|| inputs.same(ops::sample_scratch_len(rows, vocab), 0_u64));
        let run: Run = Box::new(move |device| {
            let params = SampleParams {
                rows: records.as_slice(),
                whole_mass: parameters(top_k, top_p, min_p).needs_whole_mass(),
                scratch: scratch.as_mut().map(Buffer::as_slice_mut),
            };
            ops::sample(device, &logits.as_slice(), params, &mut ids.as_slice_mut())
        });
        rig.bytes("sample", format!("{rows}, {what}"), len * 4, run);
    }

    let (logits, chosen) = (inputs.floats(len), inputs.below(rows, vocab));
    let (mut ids, mut values) = (inputs.same(rows * LISTED, 0_u32), inputs.same(rows * (1 + LISTED), 0.0_f32));
    let run: Run = Box::new(move |device| {
        let mut out = ops::LogProbs { ids: ids.as_slice_mut(), values: values.as_slice_mut() };
        ops::log_probs(device, &logits.as_slice(), &chosen.as_slice(), &mut out)
    });
    rig.bytes("log_probs", rows, len * 4, run);
}

fn prefill(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>, shape: &Shape) {
    let Shape { hidden, ffn, heads, prompt, .. } = *shape;
    let (keys, values, tables, _) = pages(inputs, heads, 1, prompt);
    let (qkv, mut out) =
        (inputs.floats(prompt * heads.qkv_width()), inputs.same(prompt * heads.query_width(), bf16::ZERO));
    let segment = Segment { first_row: 0, rows: prompt, first_position: 0, table_start: 0 };
    let tiles = PrefillTiles::sized([segment].into_iter(), false, heads).expect("a prompt is short");
    let numbers = inputs.holding(&tiles.numbers);
    let run: Run = Box::new(move |device| {
        let pages = Pages { keys: keys.as_slice(), values: values.as_slice() };
        let (qkv, tables, out) = (qkv.as_slice(), tables.as_slice(), &mut out.as_slice_mut());
        ops::attention_prefill(device, &qkv, pages, None, &tables, &tiles, &numbers.as_slice(), out, heads)
    });
    // A product and a sum for each score and for its value; causal, so half of all pairs.
    let flops = 4 * heads.query_width() * (prompt * (prompt + 1) / 2);
    rig.time("attention_prefill", prompt, Throughput::Elements(flops as u64), run);
    if ops::wgmma_attends(rig.device, heads) {
        let (keys, values, tables, _) = pages(inputs, heads, 1, prompt);
        let (qkv, mut out) =
            (inputs.floats(prompt * heads.qkv_width()), inputs.same(prompt * heads.query_width(), bf16::ZERO));
        let tiles = PrefillTiles::sized([segment].into_iter(), false, heads).expect("a prompt is short");
        let numbers = inputs.holding(&tiles.numbers);
        let halves = [Mapped::Pages(keys.as_slice()), Mapped::Pages(values.as_slice())];
        let maps = TensorMaps::new(rig.device, halves).expect("pages have tensor maps");
        let run: Run = Box::new(move |device| {
            let pages = Pages { keys: keys.as_slice(), values: values.as_slice() };
            let (qkv, tables, out) = (qkv.as_slice(), tables.as_slice(), &mut out.as_slice_mut());
            ops::attention_prefill(device, &qkv, pages, Some(&maps), &tables, &tiles, &numbers.as_slice(), out, heads)
        });
        rig.time("attention_groups", prompt, Throughput::Elements(flops as u64), run);
    }

    rotary_kv_write(rig, inputs, heads, &(0..prompt as u32).collect::<Vec<_>>(), prompt);

    let (n, k) = (2 * ffn, hidden);
    let (x, weight) = (inputs.halves(prompt * k), inputs.halves(n * k));
    let weight = rig.device.prepare_weight(weight, n, k, false).unwrap();
    let mut out = inputs.same(prompt * n, bf16::ZERO);
    let run: Run = Box::new(move |device| ops::linear(device, &x.as_slice(), &weight, &mut out.as_slice_mut()));
    let flops = 2 * prompt * n * k;
    rig.time("linear", format!("gate and up [{n}, {k}] x {prompt}"), Throughput::Elements(flops as u64), run);

    if ops::wgmma_long_fits(rig.device, heads, hidden, ffn) {
        let (x, weight) = (inputs.halves(prompt * k), inputs.halves(n * k));
        let weight = rig.device.prepare_weight(weight, n, k, true).unwrap();
        let mut out = inputs.same(prompt * ffn, bf16::ZERO);
        let maps = [Mapped::LongGateUpInput(x.as_slice(), k), Mapped::LongGateUp(&weight)];
        let maps = TensorMaps::new(rig.device, maps).expect("matrices have tensor maps");
        let run: Run = Box::new(move |device| {
            let (x, out) = (x.as_slice(), &mut out.as_slice_mut());
            ops::wgmma_long_gate_up(device, BlockOutputs::Chosen, &maps, &x, 0..prompt, &weight, out)
        });
        rig.time("wgmma_long_gate_up", prompt, Throughput::Elements(flops as u64), run);

        let (n, k, segments) = (hidden, ffn, contract::segments(hidden, ffn));
        let (x, weight) = (inputs.halves(prompt * k), inputs.halves(n * k));
        let weight = rig.device.prepare_weight(weight, n, k, true).unwrap();
        let mut residual = inputs.floats(prompt * n);
        let maps = [Mapped::LongResidualInput(x.as_slice(), k), Mapped::LongResidual(&weight)];
        let maps = TensorMaps::new(rig.device, maps).expect("matrices have tensor maps");
        let run: Run = Box::new(move |device| {
            let (x, residual) = (x.as_slice(), &mut residual.as_slice_mut());
            ops::wgmma_long_residual(device, BlockOutputs::Chosen, &maps, segments, &x, &weight, residual)
        });
        let flops = 2 * prompt * n * k;
        rig.time("wgmma_long_residual", prompt, Throughput::Elements(flops as u64), run);
    }
    if ops::wgmma_long_fits(rig.device, heads, hidden, ffn) && ops::wgmma_long_qkv_fits(heads) {
        let (n, k) = (heads.qkv_width(), hidden);
        let (x, weight) = (inputs.halves(prompt * k), inputs.halves(n * k));
        let weight = rig.device.prepare_weight(weight, n, k, true).unwrap();
        let (bias, table) = (inputs.halves(n), inputs.floats(prompt * heads.width));
        let (mut keys, mut values, page_tables, _) = pages(inputs, heads, 1, prompt);
        let positions = inputs.holding(&(0..prompt as u32).collect::<Vec<_>>());
        let row_tables = inputs.same(prompt, 0_u32);
        let mut queries = inputs.floats(prompt * n);
        let maps = [Mapped::LongQkvInput(x.as_slice(), k), Mapped::LongQkv(&weight)];
        let maps = TensorMaps::new(rig.device, maps).expect("matrices have tensor maps");
        let run: Run = Box::new(move |device| {
            let places = Places {
                positions: positions.as_slice(),
                row_tables: row_tables.as_slice(),
                page_tables: page_tables.as_slice(),
            };
            let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
            let (x, bias, table, queries) =
                (x.as_slice(), bias.as_slice(), table.as_slice(), &mut queries.as_slice_mut());
            let (block, pages) = (BlockHeads::Chosen, &mut pages);
            ops::wgmma_long_qkv(device, block, &maps, &x, &weight, &bias, &table, places, queries, pages, heads)
        });
        let flops = 2 * prompt * n * k;
        rig.time("wgmma_long_qkv", prompt, Throughput::Elements(flops as u64), run);
    }
}

/// The self-test's own kernel. Its time has an allocation and a download in it.
fn comparison(rig: &mut Rig<'_>, inputs: &mut Inputs<'_>) {
    const LEN: usize = 1 << 20;
    let (a, b) = (inputs.floats(LEN), inputs.floats(LEN));
    let run: Run = Box::new(move |device| ops::differing(device, &a.as_slice(), &b.as_slice()).map(|_| ()));
    rig.bytes("differing", LEN, LEN * 8, run);
}
