//! Times whole steps of a model: prefill by length, decode by context, and loading.
//!
//! `cargo bench --bench step -- [MODEL_DIR] [--device cpu|cuda:N] [--json]`; the demo model and the first GPU (else the
//! CPU) where nothing is said. Each figure is the median of five; the first run of a shape, in which cuBLASLt plans,
//! is not counted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use host::device::{CpuOptions, Device, DeviceError, KernelImage, KernelImages};
use host::engine::{SampleRow, Sampler, Sampling};
use host::model::{KvCache, Model, Prefill, Step, StepLimits, Workspace};
use host::ops::PAGE;

const IMAGES: KernelImages<'static> = KernelImages {
    images: &[
        KernelImage { sm: 80, arch_specific: false, ptx: include_str!(env!("LOCKSTEP_PTX_SM_80")) },
        KernelImage { sm: 90, arch_specific: true, ptx: include_str!(env!("LOCKSTEP_PTX_SM_90A")) },
    ],
};

const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo"));
    let (mut device, mut json) = (None, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--json" => json = true,
            "--device" => device = arguments.next(),
            path => folder = path.into(),
        }
    }
    let device = match device.as_deref() {
        Some("cpu") => Device::cpu(CpuOptions::default())?,
        Some(name) => Device::cuda(name.trim_start_matches("cuda:").parse()?, &IMAGES, kernels_gpu::KERNELS)?,
        None if Device::cuda_count() > 0 => Device::cuda(0, &IMAGES, kernels_gpu::KERNELS)?,
        None => Device::cpu(CpuOptions::default())?,
    };

    let mut bench = Bench::new(&device, &folder)?;
    let mut figures = vec![("load".to_owned(), "ms".to_owned(), bench.load_ms)];
    let longest = bench.model.context_tokens();
    let lengths = if device.is_cuda() { vec![128, 512, 1024, 4096] } else { vec![32, 128, 512] };
    for &length in lengths.iter().filter(|&&length| length < longest) {
        let milliseconds = bench.median(|bench| bench.prefill(length))?;
        figures.push((format!("prefill {length}"), "ms".to_owned(), milliseconds));
    }
    for context in [128, 1024, 4096].into_iter().filter(|&context| context + 64 < longest) {
        let milliseconds = bench.median(|bench| bench.decode(context, 0.0))?;
        figures.push((format!("decode at context {context}, greedy"), "tokens/s".to_owned(), 1000.0 / milliseconds));
    }
    let milliseconds = bench.median(|bench| bench.decode(128, 0.8))?;
    figures.push((
        "decode at context 128, T 0.8 top-p 0.95 top-k 50".to_owned(),
        "tokens/s".to_owned(),
        1000.0 / milliseconds,
    ));

    let (name, image) = (device.name(), device.kernel_image().unwrap_or("executor").to_owned());
    if json {
        let figures: Vec<_> = figures
            .iter()
            .map(|(what, unit, value)| serde_json::json!({"what": what, "unit": unit, "value": value}))
            .collect();
        println!("{}", serde_json::json!({"device": name, "kernels": image, "model": folder, "figures": figures}));
    } else {
        println!("{name}, {image} kernels, {}", folder.display());
        for (what, unit, value) in figures {
            println!("{what:<52} {value:>10.2} {unit}");
        }
    }
    Ok(())
}

struct Bench {
    device: Device,
    model: Model,
    cache: KvCache,
    workspace: Workspace,
    sampler: Sampler,
    table: Vec<u32>,
    load_ms: f64,
}

impl Bench {
    fn new(device: &Device, folder: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let start = Instant::now();
        let model = Model::load(device, folder, None, &mut |_, _| {})?;
        let load_ms = start.elapsed().as_secs_f64() * 1e3;
        let pages = model.context_tokens().div_ceil(PAGE);
        let limits = StepLimits { rows: 4096, decode_rows: 1, logits_rows: 1, table_entries: pages };
        Ok(Self {
            device: device.clone(),
            cache: model.kv_cache(pages)?,
            workspace: model.workspace(limits)?,
            sampler: Sampler::new(device, 1, model.config().vocab)?,
            table: (0..pages as u32).collect(),
            model,
            load_ms,
        })
    }

    /// The median of [`RUNS`] calls, after one that is not counted. Each call returns its milliseconds.
    fn median(&mut self, mut run: impl FnMut(&mut Self) -> Result<f64, DeviceError>) -> Result<f64, DeviceError> {
        run(self)?;
        let mut times = (0..RUNS).map(|_| run(self)).collect::<Result<Vec<_>, _>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[RUNS / 2])
    }

    fn step(&mut self, first: usize, rows: usize) -> Result<(), DeviceError> {
        let vocab = self.model.config().vocab as u32;
        let positions: Vec<u32> = (first as u32..(first + rows) as u32).collect();
        let tokens: Vec<u32> = positions.iter().map(|&position| position.wrapping_mul(2_654_435_761) % vocab).collect();
        let pages = &self.table[..(first + rows).div_ceil(PAGE)];
        let prefill = [Prefill { first_row: 0, rows, first_position: first, table_start: 0, table_len: pages.len() }];
        let (decode_rows, prefills) = if rows == 1 { (1, &prefill[..0]) } else { (0, &prefill[..]) };
        let step = Step {
            tokens: &tokens,
            positions: &positions,
            row_tables: &vec![0; rows],
            page_tables: pages,
            decode_rows,
            prefills,
            logits_rows: &[rows as u32 - 1],
        };
        self.model.forward(&step, &mut self.cache, &mut self.workspace)
    }

    fn sample(&mut self, position: usize, temperature: f32) -> Result<(), DeviceError> {
        let sampling = Sampling { temperature, top_p: 0.95, top_k: 50, seed: 1, ..Sampling::default() };
        let counts = std::collections::BTreeMap::new();
        let row =
            SampleRow { sampling: &sampling, counts: &counts, banned: &[], position: position as u32, logprobs: None };
        self.sampler.sample(&self.workspace.logits(1)?, &[row]).map(|_| ())
    }

    /// From the prompt's upload to the first token's id on the host.
    fn prefill(&mut self, length: usize) -> Result<f64, DeviceError> {
        self.device.synchronize()?;
        let start = Instant::now();
        self.step(0, length)?;
        self.sample(length, 0.0)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Milliseconds a token, over 32 tokens, each chosen and read back before the next.
    fn decode(&mut self, context: usize, temperature: f32) -> Result<f64, DeviceError> {
        const TOKENS: usize = 32;
        // The cache must hold something: timing over memory that nobody wrote would flatter.
        for first in (0..context).step_by(self.workspace.limits().rows.min(context)) {
            self.step(first, self.workspace.limits().rows.min(context - first))?;
        }
        self.device.synchronize()?;
        let start = Instant::now();
        for token in 0..TOKENS {
            self.step(context + token, 1)?;
            self.sample(context + token + 1, temperature)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e3 / TOKENS as f64)
    }
}
