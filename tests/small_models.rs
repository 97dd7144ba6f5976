//! The small reference models against float32 transformers, through the engine: log-probabilities of the five likeliest
//! tokens of every position, and the tokens wherever the reference is sure of them.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod devices;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use host::device::{Device, LinearBackend};
use host::engine::{Engine, EngineOptions, Event, EventSink, Refused, Request, Sampling, TokenEvent, spawn};
use host::model::Model;
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Allowed error of a natural log of a probability; and the margin from which on a token must be the reference's.
const BOUND: f32 = 0.05;

#[derive(Deserialize)]
struct Goldens {
    manifest: Manifest,
    prompts: Vec<Vec<u32>>,
    /// Per model and prompt.
    models: BTreeMap<String, Vec<Golden>>,
}

#[derive(Deserialize)]
struct Manifest {
    checksums: BTreeMap<String, String>,
}

/// Per greedy position the five likeliest tokens, the chosen one first.
type Golden = Vec<Vec<(u32, f32)>>;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn goldens() -> Goldens {
    let bytes = std::fs::read(repository().join("tests/golden/small_models.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// SHA-256 over the names and contents of the config and the weight files, in the order of their names.
fn checksum(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let wanted = |path: &PathBuf| path.ends_with("config.json") || path.extension().is_some_and(|e| e == "safetensors");
    let mut files: Vec<PathBuf> = entries.filter(wanted).collect();
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        hash.update(path.file_name().unwrap().as_encoded_bytes());
        hash.update([0]);
        hash.update(std::fs::read(path).unwrap());
    }
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[derive(Debug, Default, PartialEq)]
struct Comparison {
    /// Positions compared: up to the first where the greedy tokens part.
    positions: usize,
    /// The largest error.
    worst: f32,
    complaints: Vec<String>,
}

fn compare(golden: &Golden, answer: &[TokenEvent]) -> Comparison {
    let mut found = Comparison::default();
    if answer.len() != golden.len() {
        found.complaints.push(format!("{} tokens, expected {}", answer.len(), golden.len()));
    }
    for (place, (expected, given)) in golden.iter().zip(answer).enumerate() {
        found.positions += 1;
        let lowest = given.top.iter().map(|&(_, value)| value).fold(f32::INFINITY, f32::min);
        for &(id, value) in expected {
            // A token that is not listed has at most the lowest value listed.
            let error = match given.top.iter().find(|&&(listed, _)| listed == id) {
                Some(&(_, ours)) => (ours - value).abs(),
                None if lowest.is_finite() => (value - lowest).max(0.0),
                None => f32::NAN,
            };
            if error.is_nan() || error > BOUND {
                found.complaints.push(format!("position {place}: token {id} is off by {error}: {:?}", given.top));
            }
            found.worst = if error.is_nan() { error } else { found.worst.max(error) };
        }
        let margin = expected[0].1 - expected[1].1;
        if given.id != expected[0].0 {
            if margin > BOUND {
                let wanted = expected[0].0;
                found.complaints.push(format!("position {place}: {}, not {wanted} (by {margin})", given.id));
            }
            break;
        }
    }
    found
}

struct Channel(Sender<Event>);

impl EventSink for Channel {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.0.send(event).map_err(|_| Refused::Gone)
    }

    fn is_gone(&self) -> bool {
        false
    }
}

fn answer(engine: &impl Engine, prompt: &[u32], golden: &Golden) -> Vec<TokenEvent> {
    let (events, received) = channel();
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens: golden.len() as u32,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: Some(golden[0].len() as u32),
        ..Request::default()
    };
    engine.submit(request, Box::new(Channel(events))).unwrap();
    let mut tokens = Vec::new();
    for event in received {
        match event {
            Event::Token(token) => tokens.push(token),
            Event::End(_) => return tokens,
            Event::Prompt(_) => panic!("nobody asked for the prompt's log-probabilities"),
            Event::Error(error) => panic!("{error}"),
        }
    }
    panic!("the engine went away");
}

fn every_model_agrees(device: &Device) {
    let goldens = goldens();
    assert_eq!(goldens.models.len(), 6);
    let mut complaints = Vec::new();
    for (name, answers) in &goldens.models {
        let folder = repository().join("tests/models").join(name);
        assert_eq!(
            checksum(&folder),
            goldens.manifest.checksums[name],
            "{name} is not what the goldens were made from"
        );
        let model = Arc::new(Model::load(device, &folder, Some(512), &mut |_, _| {}).unwrap());
        let (engine, thread) = spawn(model, EngineOptions::for_one_request(device)).unwrap();
        let (mut worst, mut positions, mut wanted) = (0.0_f32, 0, 0);
        assert_eq!(answers.len(), goldens.prompts.len());
        for (prompt, golden) in goldens.prompts.iter().zip(answers) {
            let found = compare(golden, &answer(&engine, prompt, golden));
            (worst, positions, wanted) = (worst.max(found.worst), positions + found.positions, wanted + golden.len());
            complaints.extend(found.complaints.iter().map(|text| format!("{name}, {} tokens: {text}", prompt.len())));
        }
        drop(engine);
        thread.join().unwrap();
        println!("{name}: largest error {worst:.4} over {positions} of {wanted} positions");
        // Most greedy answers stay on the reference's path to their end; else little would be compared.
        assert!(wanted == 60 && 2 * positions > wanted, "{name}: {positions} of {wanted} positions");
    }
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn every_small_model_agrees_with_transformers_on_the_cpu() {
    every_model_agrees(&devices::cpu());
}

/// What serves where cuBLASLt is missing or has other bits.
/// One after the other: with two devices of one process, on one GPU, cuBLASLt's first product of a shape failed
/// (`CUBLAS_STATUS_EXECUTION_FAILED`) while the other device computed and recorded. A server has one.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
#[ignore = "needs a GPU"]
fn every_small_model_agrees_with_our_own_linear_kernel_on_the_gpu() {
    let _turn = turn();
    let device = devices::cuda();
    device.set_linear_backend(LinearBackend::Kernel);
    every_model_agrees(&device);
}

#[test]
#[ignore = "needs a GPU"]
fn every_small_model_agrees_with_transformers_on_the_gpu() {
    let _turn = turn();
    every_model_agrees(&devices::cuda());
}

#[test]
fn the_comparison_sees_planted_faults() {
    let goldens = goldens();
    for golden in goldens.models.values().flatten() {
        let echo: Vec<TokenEvent> =
            golden.iter().map(|top| TokenEvent { id: top[0].0, logprob: Some(top[0].1), top: top.clone() }).collect();
        let whole = Comparison { positions: golden.len(), ..Comparison::default() };
        assert_eq!(compare(golden, &echo), whole);
        let sure = golden.iter().position(|top| top[0].1 - top[1].1 > BOUND).unwrap();
        let last = golden.len() - 1;
        let refuses = |fault: &dyn Fn(&mut Vec<TokenEvent>)| {
            let mut answer = echo.clone();
            fault(&mut answer);
            assert!(!compare(golden, &answer).complaints.is_empty(), "{answer:?}");
        };
        refuses(&|answer| answer[last].top[2].1 += 1.2 * BOUND);
        refuses(&|answer| answer[last].top[0].1 -= 1.2 * BOUND);
        refuses(&|answer| answer[0].top[4].1 = f32::NAN);
        refuses(&|answer| answer[0].top.clear());
        refuses(&|answer| answer[sure].id = answer[sure].top[1].0);
        refuses(&|answer| drop(answer.pop()));
    }
}
