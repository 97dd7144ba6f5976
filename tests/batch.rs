//! Company changes nothing: a request's tokens, and the bits of their log-probabilities, are the same alone and among
//! others, however steps are cut, whatever the cache holds, and whether or not it had to give up its pages. What is compared
//! is `host::verify`'s, as `lockstep verify --batch` runs it with more company.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod devices;
mod random_model;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use host::device::{CpuOptions, Device};
use host::engine::{CacheSize, Engine, EngineOptions, Event, EventSink, Refused, Request, Sampling, SubmitError};
use host::model::{DecodeWay, Model, Prefill, Step, StepLimits};
use host::verify::rehearsal::{Running, ToChannel, TokenBits, alone, collect, request, watched_sampled};
use host::verify::{self, Size};
use random_model::Sizes;

/// Eight pages: long enough for several, short enough to be filled.
const CONTEXT: usize = 512;

fn demo(device: &Device) -> Arc<Model> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    Arc::new(Model::load(device, &folder, Some(CONTEXT), &mut |_, _| {}).unwrap())
}

fn options(model: &Model) -> EngineOptions {
    EngineOptions { cache: CacheSize::Bytes(128 << 20), ..EngineOptions::for_device(model.device()) }
}

fn no_request_can_tell_its_company(model: &Arc<Model>, size: Size) {
    let mut lines = Vec::new();
    let all = verify::batch(model, size, &mut |line| lines.push(line.clone())).unwrap();
    let failed: Vec<_> = lines.iter().filter(|line| !line.holds).collect();
    assert!(all && failed.is_empty(), "{failed:#?}");
    // Each subject has its line.
    for subject in [
        "among 1 others",
        "steps of 16",
        "warm cache",
        "preempted",
        "NaN",
        "other orders",
        "two engines",
        "greedy without",
        "drawn without",
        "penalised from",
    ] {
        assert!(lines.iter().any(|line| line.claim.contains(subject)), "{subject}: {lines:#?}");
    }
}

#[test]
fn no_request_can_tell_its_company_on_the_cpu() {
    no_request_can_tell_its_company(&demo(&devices::cpu()), Size { company: 9, few: 3 });
}

/// The steps that a GPU records and fuses, run by the executor, on a model so small that this takes seconds.
#[test]
fn no_request_can_tell_its_company_on_a_cpu_like_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    Sizes { hidden: 64, heads: 2, head_width: 32, ffn: 64 }.write(folder.path());
    let device = devices::cpu_like_a_gpu();
    let model = Arc::new(Model::load(&device, folder.path(), Some(CONTEXT), &mut |_, _| {}).unwrap());
    assert_eq!([1, 9].map(|rows| model.decode_way(rows, 1)), [Some(DecodeWay::Few), Some(DecodeWay::Tiles)]);
    no_request_can_tell_its_company(&model, Size { company: 9, few: 3 });
}

#[test]
#[ignore = "needs a GPU"]
fn no_request_can_tell_its_company_on_the_gpu() {
    no_request_can_tell_its_company(&demo(&devices::cuda()), Size::with_company(31));
}

/// Races, and reads of memory that nobody wrote: none, though requests share pages, join and leave.
#[test]
fn checked_mode_finds_nothing_in_a_shared_step() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/qwen2-w64-r2");
    let prompt: Vec<u32> = (0..70).map(|token| token % 50).collect();
    let requests: Vec<Request> = [(70, 3), (68, 2), (5, 4), (1, 3)]
        .map(|(length, max_tokens)| request(prompt[..length].to_vec(), max_tokens, Sampling::default(), Some(1)))
        .into();
    let answers = |checked| {
        let device = Device::cpu(CpuOptions { checked, ..CpuOptions::default() }).unwrap();
        let model = Arc::new(Model::load(&device, &folder, Some(128), &mut |_, _| {}).unwrap());
        let options = EngineOptions { cache: CacheSize::Pages(5), chunk_tokens: 48, ..options(&model) };
        let running = Running::new(&model, options).unwrap();
        let receivers: Vec<_> = requests.iter().map(|request| running.submit(request).unwrap()).collect();
        let answers: Vec<Vec<TokenBits>> = receivers.iter().map(|events| collect(events).unwrap().tokens).collect();
        assert!(running.settled().unwrap().pages.hits > 0);
        answers
    };
    assert_eq!(answers(true), answers(false));
}

#[test]
fn a_request_larger_than_the_cache_is_refused_with_the_numbers() {
    let model = demo(&devices::cpu());
    let running = Running::new(&model, EngineOptions { cache: CacheSize::Pages(3), ..options(&model) }).unwrap();
    let (sender, events) = channel();
    let greedy = |prompt, max_tokens| request(vec![1; prompt], max_tokens, Sampling::default(), None);
    let refused = running.engine().unwrap().submit(greedy(190, 3), Box::new(ToChannel(sender)));
    assert_eq!(refused, Err(SubmitError::NeverFits { needed_pages: 4, total_pages: 3, page_tokens: 64 }));
    assert!(events.recv().is_err());
    assert_eq!(running.ask(&greedy(190, 2)).unwrap().tokens.len(), 2);
    running.settled().unwrap();
}

/// Is gone when asked, after so many questions.
struct Leaving {
    after: usize,
    questions: std::cell::Cell<usize>,
}

impl EventSink for Leaving {
    fn offer(&mut self, _: Event) -> Result<(), Refused> {
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.questions.set(self.questions.get() + 1);
        self.questions.get() > self.after
    }
}

#[test]
fn whoever_leaves_in_whatever_state_leaves_no_page_behind() {
    let model = demo(&devices::cpu());
    // Two run, the others wait; prompts take several steps.
    let watched = watched_sampled(&model);
    let options = EngineOptions { max_running: 2, chunk_tokens: 32, ..options(&model) };
    let running = Running::new(&model, options).unwrap();
    let stays = running.submit(&watched).unwrap();
    for after in 0..30 {
        let leaving = Leaving { after, questions: std::cell::Cell::new(0) };
        running.engine().unwrap().submit(Request { max_tokens: 300, ..watched.clone() }, Box::new(leaving)).unwrap();
    }
    let answer = collect(&stays).unwrap().tokens;
    running.settled().unwrap();
    assert_eq!(answer, alone(&model, &watched).unwrap().tokens);
}

/// What the suite relies on: a page or a workspace filled with NaN is seen by whoever reads it.
#[test]
fn poison_is_seen() {
    let model = demo(&devices::cpu());
    let device = model.device();
    let logits = |poisoned: Option<u32>| {
        let mut cache = model.kv_cache(3).unwrap();
        let limits = StepLimits { rows: 70, decode_rows: 1, logits_rows: 1, table_entries: 2 };
        let mut workspace = model.workspace(limits).unwrap();
        let (tokens, positions): (Vec<u32>, Vec<u32>) = (vec![65; 71], (0..71).collect());
        let prefills = [Prefill { first_row: 0, rows: 70, first_position: 0, table_start: 0, table_len: 2 }];
        let prefill = Step {
            tokens: &tokens[..70],
            positions: &positions[..70],
            row_tables: &[0; 70],
            page_tables: &[2, 0],
            decode_rows: 0,
            prefills: &prefills,
            logits_rows: &[69],
        };
        model.forward(&prefill, &mut cache, &mut workspace).unwrap();
        workspace.poison(device).unwrap();
        let stale = device.download(workspace.logits(1).unwrap()).unwrap();
        assert!(stale.iter().all(|value| value.is_nan()));
        if let Some(page) = poisoned {
            cache.poison(device, page).unwrap();
        }
        let decode = Step {
            tokens: &tokens[70..],
            positions: &positions[70..],
            row_tables: &[0],
            decode_rows: 1,
            prefills: &[],
            logits_rows: &[0],
            ..prefill
        };
        model.forward(&decode, &mut cache, &mut workspace).unwrap();
        device.download(workspace.logits(1).unwrap()).unwrap()
    };
    let clean = logits(None);
    assert!(clean.iter().all(|value| value.is_finite()));
    assert_eq!(logits(Some(1)), clean, "nobody has that page");
    for page in [2, 0] {
        assert!(logits(Some(page)).iter().all(|value| value.is_nan()), "page {page}");
    }
}
