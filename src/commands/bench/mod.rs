//! `lockstep bench`: how fast this device computes this model, beside what the device can do at most.
//!
//! | file | what it measures |
//! | --- | --- |
//! | `ceiling` | the device's copy bandwidth and matrix product |
//! | `load` | from the folder to an engine that answers; memory |
//! | `decode` | tokens per second by batch and context |
//! | `first_token` | prefill by length; the first tokens of prompts that come at once |
//! | `sampling` | what drawing a token adds |
//! | `step` | the part of a step in which the device waits |
//! | `http` | a running server, as its clients see it |
//!
//! All but the ceilings goes through the engine, as a user's request would. `work` counts the bytes and operations,
//! `requests` takes the times, `figure` and `compare` print.

mod arguments;
mod ceiling;
mod compare;
mod decode;
mod figure;
mod first_token;
mod http;
mod load;
mod requests;
mod rig;
mod sampling;
mod step;
mod work;

use std::process::ExitCode;
use std::sync::Arc;

use host::device::Device;
use host::engine::{EngineOptions, spawn};
use host::model::ModelConfig;

pub(crate) use self::arguments::BenchArguments;

use self::arguments::Kind;
use self::decode::Shape;
use self::figure::{Figure, Report, heading};
use self::rig::Rig;
use crate::model_folder;
use crate::start::{EngineThread, Started, open};

/// Drawing is measured at the largest batch up to this one, or else at the smallest.
const SAMPLING_BATCH: usize = 64;

/// Measures and prints, or compares.
pub(crate) fn run(arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    // A file that cannot be read is found before minutes are spent.
    let mut kept = arguments.compare.iter().map(|path| compare::read(path)).collect::<Result<Vec<_>, _>>()?;
    if kept.len() < 2 {
        kept.push(match &arguments.http.url {
            Some(url) => asked(arguments, url)?,
            None => measure(arguments)?,
        });
    }
    let printed = match &kept[..] {
        [before, after] if arguments.json => serde_json::json!({"figures": compare::pairs(before, after)}).to_string(),
        [before, after] => compare::table(before, after),
        [report, ..] if arguments.json => serde_json::to_string(report)?,
        // Its rows were printed as they came.
        _ => return Ok(ExitCode::SUCCESS),
    };
    println!("{}", printed.trim_end());
    Ok(ExitCode::SUCCESS)
}

/// A server's figures, which are all there at once.
fn asked(arguments: &BenchArguments, url: &str) -> anyhow::Result<Report> {
    let report = http::measure(arguments, url)?;
    if arguments.shows_rows() {
        println!("{}\n{}", report.conditions(), heading());
        report.figures.iter().for_each(|figure| println!("{}", figure.row()));
    }
    Ok(report)
}

/// Figures as they come: rows for people, or silence until all are there.
struct Figures {
    all: Vec<Figure>,
    shows_rows: bool,
}

impl Figures {
    fn add(&mut self, figures: impl IntoIterator<Item = Figure>) {
        for figure in figures {
            if self.shows_rows {
                println!("{}", figure.row());
            }
            self.all.push(figure);
        }
    }
}

fn measure(arguments: &BenchArguments) -> anyhow::Result<Report> {
    let folder = model_folder::find(arguments.source.model.as_deref())?;
    ModelConfig::load(&folder)?;
    let device = open(&arguments.source, &folder)?;
    let plan = arguments.plan(device.is_cuda());
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device: device.name(),
        driver: driver(&device),
        kernels: device.kernel_image().map(str::to_owned),
        linear_library: Some(device.linear_library()),
        model: model_folder::name(&folder),
        runs: plan.runs,
        tokens: plan.tokens,
        figures: Vec::new(),
    };
    let shows_rows = arguments.shows_rows();
    if shows_rows {
        println!("{}\n{}", report.conditions(), heading());
    }
    let mut figures = Figures { all: Vec::new(), shows_rows };
    let (ceilings, measured) = ceiling::measure(&device, plan.runs)?;
    figures.add(measured);
    drop(device);

    let most = plan.batches.iter().copied().max().unwrap_or(1);
    let options = move |device: &Device| {
        let options = EngineOptions::for_device(device);
        EngineOptions { queue: options.queue.max(most), max_running: options.max_running.max(most), ..options }
    };
    let (loads, runs) = (arguments.wants(Kind::Load), plan.runs);
    // A server starts once, and steps of a process that has started several times were slower by up to 4 %: so the first start answers.
    // It brings the weights into the page cache, too; how long starting takes is measured behind everything else.
    let load::Start { started, chosen, .. } = load::start(&arguments.source, &folder, 1, options)?;
    if loads {
        figures.add(chosen);
    }
    let rig = Rig::new(started, plan, ceilings);
    answers(arguments, &rig, &mut figures)?;
    if loads {
        figures.add(load::memory(&rig)?);
    }
    if arguments.wants(Kind::Step) {
        steps(rig, &options, &mut figures)?;
    } else {
        // Its memory is needed again.
        drop(rig);
    }
    if loads {
        figures.add(load::start(&arguments.source, &folder, runs, options)?.times);
    }
    report.figures = figures.all;
    Ok(report)
}

/// The driver's versions, where there is one.
fn driver(device: &Device) -> Option<String> {
    let cuda = device.driver()?;
    let module = std::fs::read_to_string("/sys/module/nvidia/version").ok();
    Some(module.map_or_else(|| cuda.clone(), |version| format!("{cuda}, driver {}", version.trim())))
}

/// Every figure of an engine as it serves.
fn answers(arguments: &BenchArguments, rig: &Rig, figures: &mut Figures) -> anyhow::Result<()> {
    let plan = &rig.plan;
    for &length in plan.lengths.iter().filter(|_| arguments.wants(Kind::Prefill)) {
        if fits(rig, "prefill", Shape { batch: 1, context: length }, 1) {
            figures.add(first_token::prefill(rig, length)?);
        }
    }
    let first_context = plan.contexts.first().copied().unwrap_or(1);
    for &batch in plan.batches.iter().filter(|_| arguments.wants(Kind::Ttft)) {
        let shape = Shape { batch, context: first_context };
        if fits(rig, "first token", shape, 1) {
            figures.add(first_token::at_once(rig, shape)?);
        }
    }
    for &context in plan.contexts.iter().filter(|_| arguments.wants(Kind::Decode)) {
        for &batch in &plan.batches {
            let shape = Shape { batch, context };
            if fits(rig, "decode", shape, plan.tokens) {
                figures.add(decode::figures(rig, shape)?);
            }
        }
    }
    let batch = plan.batches.iter().copied().filter(|&batch| batch <= SAMPLING_BATCH).max();
    let batch = batch.or(plan.batches.iter().copied().min());
    if let Some(batch) = batch.filter(|_| arguments.wants(Kind::Sampling)) {
        let shape = Shape { batch, context: first_context };
        if fits(rig, "sampling", shape, plan.tokens) {
            figures.add([sampling::figure(rig, shape)?]);
        }
    }
    Ok(())
}

/// The times of the steps of an engine that takes them, instead of the one that served.
fn steps(rig: Rig, options: &impl Fn(&Device) -> EngineOptions, figures: &mut Figures) -> anyhow::Result<()> {
    let (plan, ceilings) = (rig.plan.clone(), rig.ceilings);
    let Started { engine, model, thread } = rig.into_started();
    // Its memory is needed again.
    drop(engine);
    drop(thread);
    let options = EngineOptions { time_steps: true, ..options(model.device()) };
    let (engine, thread) = spawn(Arc::clone(&model), options)?;
    let rig = Rig::new(Started { engine, model, thread: EngineThread::new(thread) }, plan, ceilings);
    let context = rig.plan.contexts.first().copied().unwrap_or(1);
    for &batch in &rig.plan.batches {
        let shape = Shape { batch, context };
        if fits(&rig, "step", shape, rig.plan.tokens) {
            figures.add(step::figures(&rig, shape)?);
        }
    }
    Ok(())
}

/// What does not fit is left out and said to be.
fn fits(rig: &Rig, what: &str, shape: Shape, tokens: u32) -> bool {
    let reason = rig.too_large(shape, tokens);
    if let Some(reason) = &reason {
        eprintln!("left out: {what}, batch {}, context {}: {reason}", shape.batch, shape.context);
    }
    reason.is_none()
}
