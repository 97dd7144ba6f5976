//! `lockstep generate` against float32 transformers, on the small models of `tests/models`: log-probabilities of the five
//! likeliest tokens, and the greedy token wherever its margin is beyond doubt. `tests/golden/small_models.json` says how the
//! goldens were made; `tools/reference/compare.py` prints the same comparison as figures.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The largest error of a natural-log probability: bf16 activations against float32.
const BOUND: f64 = 0.05;

/// Per position: the likeliest tokens, most likely first.
type Positions = Vec<Vec<(u32, f64)>>;

struct Answer {
    tokens: Vec<u32>,
    logprobs: Positions,
}

/// What is wrong with `answer`, as long as the greedy prefixes are equal; a NaN is an error.
fn complaint(golden: &Positions, answer: &Answer) -> Option<String> {
    if answer.tokens.len() != golden.len() || answer.logprobs.len() != golden.len() {
        return Some(format!("{} tokens, expected {}", answer.tokens.len(), golden.len()));
    }
    for (place, (expected, (token, given))) in golden.iter().zip(answer.tokens.iter().zip(&answer.logprobs)).enumerate()
    {
        let values: HashMap<u32, f64> = given.iter().copied().collect();
        let lowest = given.iter().map(|(_, value)| *value).fold(f64::INFINITY, f64::min);
        for (id, value) in expected {
            // A token that is not listed has at most the lowest value listed.
            let error = values.get(id).map_or((value - lowest).max(0.0), |own| (own - value).abs());
            if !(error <= BOUND && lowest.is_finite()) {
                return Some(format!("position {place}, token {id}: {:?}, expected {value}", values.get(id)));
            }
        }
        if *token != expected[0].0 {
            let margin = expected[0].1 - expected[1].1;
            return (margin > BOUND)
                .then(|| format!("position {place}: token {token}, expected {} by {margin}", expected[0].0));
        }
    }
    None
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn goldens() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("golden/small_models.json")).unwrap()).unwrap()
}

fn positions(value: &Value) -> Positions {
    serde_json::from_value(value.clone()).unwrap()
}

fn generate(model: &str, device: &str, prompt: &[u32], tokens: usize) -> Answer {
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["generate", "--json", "--ignore-eos", "--logprobs", "5", "--temperature", "0", "--device", device])
        .arg("--model")
        .arg(folder().join("models").join(model))
        .args(["--token-ids", &ids.join(","), "--max-tokens", &tokens.to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tokens = serde_json::from_value(object["tokens"].clone()).unwrap();
    Answer { tokens, logprobs: positions(&object["logprobs"]) }
}

fn every_model_agrees(device: &str) {
    let goldens = goldens();
    let prompts: Vec<Vec<u32>> = serde_json::from_value(goldens["prompts"].clone()).unwrap();
    let models = goldens["models"].as_object().unwrap();
    assert_eq!((models.len(), prompts.len()), (6, 5));
    for (model, answers) in models {
        let answers = answers.as_array().unwrap();
        assert_eq!(answers.len(), prompts.len());
        for (prompt, golden) in prompts.iter().zip(answers) {
            let golden = positions(golden);
            let complaint = complaint(&golden, &generate(model, device, prompt, golden.len()));
            assert_eq!(complaint, None, "{model}, prompt of {} tokens", prompt.len());
        }
    }
}

#[test]
fn every_model_agrees_on_the_cpu() {
    every_model_agrees("cpu");
}

#[test]
#[ignore = "needs a GPU"]
fn every_model_agrees_on_the_gpu() {
    every_model_agrees("cuda:0");
}

#[test]
fn the_comparison_refuses_planted_faults() {
    let goldens = goldens();
    let golden = positions(&goldens["models"]["llama-w64-r1"][2]);
    let exact = || Answer { tokens: golden.iter().map(|listed| listed[0].0).collect(), logprobs: golden.clone() };
    assert_eq!(complaint(&golden, &exact()), None);
    let margin = |listed: &[(u32, f64)]| listed[0].1 - listed[1].1;
    let sure = (0..golden.len()).max_by(|a, b| margin(&golden[*a]).total_cmp(&margin(&golden[*b]))).unwrap();
    let plant: [fn(&mut Answer, usize); 5] = [
        |answer, _| answer.logprobs.last_mut().unwrap()[2].1 += 2.0 * BOUND,
        |answer, _| answer.logprobs[0][0].1 = f64::NAN,
        |answer, sure| answer.tokens[sure] += 1,
        |answer, _| answer.tokens.truncate(3),
        |answer, _| answer.logprobs[1].clear(),
    ];
    for (number, plant) in plant.iter().enumerate() {
        let mut answer = exact();
        plant(&mut answer, sure);
        assert!(complaint(&golden, &answer).is_some(), "planted fault {number}");
    }
}
