//! From the folder to an engine that answers, and the memory it holds then.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use host::device::{Device, MemoryKind};
use host::engine::EngineOptions;
use host::model::Model;

use super::figure::Figure;
use super::requests;
use super::rig::Rig;
use crate::cli::ModelArguments;
use crate::start::{Started, choose, open, ready};

/// What starting gave: an engine, what was chosen by timing, and how long it all took.
pub(super) struct Start {
    pub(super) started: Started,
    pub(super) chosen: Vec<Figure>,
    pub(super) times: Vec<Figure>,
}

/// Opens the device, loads, tests and starts `runs` times; the last one stays. The weights are in the page cache but for
/// the first run of the machine, so times that count should follow a start that does not.
pub(super) fn start(
    source: &ModelArguments,
    folder: &Path,
    runs: usize,
    options: impl Fn(&Device) -> EngineOptions,
) -> anyhow::Result<Start> {
    let (mut open_ms, mut load_ms, mut ready_ms, mut total_ms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut choose_ms = Vec::new();
    loop {
        let began = Instant::now();
        let milliseconds = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        let device = open(source, folder)?;
        open_ms.push(milliseconds(began));
        let loading = Instant::now();
        let model = Arc::new(Model::load(&device, folder, None, &mut |_, _| {})?);
        load_ms.push(milliseconds(loading));
        let choosing = Instant::now();
        let choices = choose(&model)?;
        choose_ms.push(milliseconds(choosing));
        let testing = Instant::now();
        let started = ready(model, &options)?;
        ready_ms.push(milliseconds(testing));
        total_ms.push(milliseconds(began));
        if total_ms.len() == runs {
            let times = vec![
                Figure::of("start: device", "ms", &open_ms),
                Figure::of("start: load", "ms", &load_ms),
                Figure::of("start: choice by timing", "ms", &choose_ms),
                Figure::of("start: self-test and engine", "ms", &ready_ms),
                Figure::of("start to ready", "ms", &total_ms),
            ];
            let chosen = choices.into_iter().map(|choice| {
                let what = format!("chosen: {}", choice.what);
                Figure::of(&what, "ms", &[choice.time.as_secs_f64() * 1e3]).batch(choice.rows)
            });
            return Ok(Start { started, chosen: chosen.collect(), times });
        }
    }
}

/// What the device holds with an engine that has answered: some memory of the driver comes with the first use. On a GPU
/// also all that is used of it, which counts the driver's context and other processes.
pub(super) fn memory(rig: &Rig) -> anyhow::Result<Vec<Figure>> {
    requests::run(rig.engine(), vec![requests::request(rig.vocab(), 0, 1, 2, requests::greedy())])?;
    let device = rig.device();
    let tracker = device.tracker();
    let megabytes = |what: &str, bytes: u64| Figure::of(what, "MB", &[bytes as f64 / 1e6]);
    let [weights, cache] = [MemoryKind::Weights, MemoryKind::KvCache].map(|kind| tracker.bytes_of(kind));
    let mut figures = vec![
        megabytes("memory: weights", weights),
        megabytes("memory: KV cache", cache),
        megabytes("memory: other allocations", tracker.total_bytes().saturating_sub(weights + cache)),
    ];
    if device.is_cuda() {
        let info = device.memory_info()?;
        let used = info.total_bytes.saturating_sub(info.free_bytes);
        figures.push(megabytes("memory beyond weights and KV", used.saturating_sub(weights + cache)));
    }
    Ok(figures)
}
