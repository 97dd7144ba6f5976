//! Records of answers, and their replay, with a scripted engine.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod server_support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use host::engine::{FinishReason, Request, SubmitError};
use host::server::Recorder;
use host::server::replay::{Counts, Outcome, replay};
use serde_json::{Value, json};
use server_support::{EOS, Fixture, PATIENCE, Script, end, token};

/// Says a text that follows from prompt and seed, and from `salt`, which stands for a fault of the server.
fn deterministic(salt: Arc<AtomicU64>) -> Arc<Script> {
    Arc::new(move |request: Request, mut sink| {
        let sum = request.prompt.iter().fold(request.sampling.seed, |sum, &id| sum.wrapping_mul(31) + u64::from(id));
        let text = format!("é{}", sum ^ salt.load(Ordering::SeqCst));
        let count = text.len().min(request.max_tokens as usize);
        for byte in &text.as_bytes()[..count] {
            if sink.offer(token(u32::from(*byte))).is_err() {
                return;
            }
        }
        let reason = if count < text.len() { FinishReason::Length } else { FinishReason::StopToken(EOS) };
        let _ = sink.offer(end(&request, reason, count as u32));
    })
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn requests() -> Vec<(&'static str, Value)> {
    let messages = json!([{"role": "user", "content": "a\nb"}]);
    vec![
        (CHAT, json!({"messages": messages, "seed": 1})),
        (CHAT, json!({"messages": messages, "stream": true})),
        (CHAT, json!({"messages": messages, "n": 3, "stream": true, "stream_options": {"include_usage": true}})),
        (TEXT, json!({"prompt": ["a", "b"], "n": 2, "logprobs": 1})),
        (TEXT, json!({"prompt": "abc", "echo": true, "stream": true, "stop": "zz"})),
        (TEXT, json!({"prompt": "abc", "echo": true, "max_tokens": 1})),
        ("/execute", json!({"job_id": "j", "prompt": "a"})),
        ("/execute", json!({"job_id": "j", "prompt": "a", "max_tokens": 1})),
    ]
}

/// What becomes of each line.
fn replayed(path: &Path, server: &Fixture, concurrency: usize) -> (Vec<(usize, Outcome)>, Counts) {
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<(usize, String)> = (1..).zip(text.lines().map(str::to_owned)).collect();
    let mut outcomes = Vec::new();
    let url = format!("http://{}", server.address);
    let counts = replay(lines.into_iter(), &url, concurrency, &mut |line, outcome| {
        outcomes.push((line, outcome.clone()));
    });
    outcomes.sort_by_key(|(line, _)| *line);
    (outcomes, counts.unwrap())
}

#[test]
fn what_is_recorded_is_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.jsonl");
    let salt = Arc::new(AtomicU64::new(0));
    let recorder = Recorder::append(&path).unwrap();
    let server = Fixture::recording(deterministic(Arc::clone(&salt)), recorder.clone());
    for (path, body) in requests() {
        assert_eq!(server.post(path, &body.to_string()).status, 200);
    }
    // Refused requests are not recorded.
    assert_eq!(server.post(TEXT, r#"{"prompt": "a", "n": 0}"#).status, 400);
    assert!(recorder.flush(PATIENCE));
    let records: Vec<Value> =
        std::fs::read_to_string(&path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(records.len(), requests().len());
    for (record, (path, body)) in records.iter().zip(requests()) {
        assert_eq!((&record["endpoint"], &record["request"]), (&json!(path), &body));
        let response = &record["response"];
        assert_eq!(
            (&response["system_fingerprint"], response["lockstep"]["digest"].as_str().map(str::len)),
            (&json!("fp_test"), Some(64))
        );
        assert!(response["choices"].as_array().unwrap().iter().all(|choice| choice["finish_reason"].is_string()));
    }
    assert_eq!(records[3]["response"]["choices"].as_array().unwrap().len(), 4);
    assert_eq!(records[5]["response"]["choices"][0]["text"], "abc\u{fffd}");
    assert_eq!(records[7]["response"]["choices"][0]["text"], "");

    let again = Fixture::new(deterministic(Arc::clone(&salt)));
    for concurrency in [1, 5] {
        let (outcomes, counts) = replayed(&path, &again, concurrency);
        assert!(outcomes.iter().all(|(_, outcome)| *outcome == Outcome::Same), "{outcomes:?}");
        assert_eq!(counts, Counts { same: requests().len() as u64, ..Counts::default() });
    }
    // A server that says something else is found out, in every line whose text is long enough to tell.
    salt.store(1, Ordering::SeqCst);
    let (outcomes, counts) = replayed(&path, &again, 3);
    assert_eq!((counts.different, counts.same), (6, 2), "{outcomes:?}");
    let Outcome::Different(what) = &outcomes[0].1 else { panic!("{outcomes:?}") };
    assert!(what.contains("digest was ") && what.contains("text of choice 0 differs from character "), "{what}");
    assert!(!what.contains("fingerprint") && !what.contains("seed"), "{what}");
}

#[test]
fn whole_answers_and_receipts_are_replayed_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.jsonl");
    let server = Fixture::new(deterministic(Arc::default()));
    let mut lines = Vec::new();
    for (endpoint, request) in
        requests().into_iter().filter(|(path, body)| *path != "/execute" && body.get("stream").is_none())
    {
        let answer = server.post(endpoint, &request.to_string()).json();
        for response in [answer.clone(), answer["lockstep"].clone()] {
            lines.push(json!({"endpoint": endpoint, "request": request, "response": response}).to_string());
        }
    }
    let good = lines.len();
    // Planted: another digest, another seed, another model, no JSON.
    let mut digest: Value = serde_json::from_str(&lines[1]).unwrap();
    digest["response"]["digest"] = json!("0".repeat(64));
    let mut seed: Value = serde_json::from_str(&lines[1]).unwrap();
    seed["response"]["seed"] = json!(99);
    let mut model: Value = serde_json::from_str(&lines[0]).unwrap();
    model["request"]["model"] = json!("other");
    lines.extend([digest.to_string(), seed.to_string(), model.to_string(), "{".to_owned()]);
    std::fs::write(&path, lines.join("\n")).unwrap();
    let (outcomes, counts) = replayed(&path, &server, 2);
    assert_eq!(counts, Counts { same: good as u64, different: 2, failed: 1, unreadable: 1 }, "{outcomes:?}");
    let says =
        |place: usize, text: &str| assert!(format!("{:?}", outcomes[good + place]).contains(text), "{outcomes:?}");
    says(0, "digest was 000");
    says(1, "seed was 99 and is 1");
    says(2, "404");
    says(3, "Unreadable");
}

#[test]
fn a_busy_server_is_asked_again_and_none_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.jsonl");
    let server = Fixture::new(deterministic(Arc::default()));
    let request = json!({"prompt": "a", "seed": 1});
    let response = server.post(TEXT, &request.to_string()).json();
    std::fs::write(&path, json!({"endpoint": TEXT, "request": request, "response": response}).to_string()).unwrap();
    *server.engine.refusal.lock().unwrap() = Some(SubmitError::QueueFull { limit: 1 });
    std::thread::scope(|scope| {
        let replaying = scope.spawn(|| replayed(&path, &server, 1));
        std::thread::sleep(Duration::from_millis(50));
        *server.engine.refusal.lock().unwrap() = None;
        assert_eq!(replaying.join().unwrap().1, Counts { same: 1, ..Counts::default() });
    });
    let address = server.address;
    drop(server);
    let lines = std::iter::once((1, std::fs::read_to_string(&path).unwrap()));
    let mut said = String::new();
    let url = format!("http://{address}/");
    let counts = replay(lines, &url, 1, &mut |_, outcome| said = format!("{outcome:?}")).unwrap();
    assert_eq!(counts, Counts { failed: 1, ..Counts::default() });
    assert!(said.contains("cannot connect") && said.contains(&address.to_string()), "{said}");
    assert!(replay(std::iter::empty(), "https://a", 1, &mut |_, _| {}).is_err());
}
