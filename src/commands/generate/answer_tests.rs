//! Output for a scripted engine.

use std::sync::Mutex;

use host::engine::{EngineError, Sampling, Status, SubmitError};

use super::*;

/// Says its events on a thread of its own, then hangs up.
struct Script(Mutex<Option<Result<Vec<Event>, SubmitError>>>);

impl Script {
    fn new(events: Vec<Event>) -> Self {
        Self(Mutex::new(Some(Ok(events))))
    }
}

impl Engine for Script {
    fn submit(&self, _: Request, mut sink: Box<dyn EventSink>) -> Result<(), SubmitError> {
        let events = self.0.lock().unwrap().take().expect("one request only")?;
        std::thread::spawn(move || {
            assert!(!sink.is_gone());
            for event in events {
                let _ = sink.offer(event);
            }
        });
        Ok(())
    }

    fn submit_all(&self, requests: Vec<(Request, Box<dyn EventSink>)>) -> Result<(), SubmitError> {
        requests.into_iter().try_for_each(|(request, sink)| self.submit(request, sink))
    }

    fn status(&self) -> Status {
        Status::default()
    }
}

fn request(logprobs: Option<u32>) -> Request {
    let sampling = Sampling { seed: 42, ..Sampling::default() };
    Request { prompt: vec![1, 2], max_tokens: 8, sampling, logprobs, ..Request::default() }
}

fn token(id: u32) -> Event {
    Event::Token(TokenEvent { id, logprob: None, top: Vec::new() })
}

fn end(reason: FinishReason, generated_tokens: u32) -> Event {
    Event::End(Finish { reason, prompt_tokens: 2, generated_tokens, cached_tokens: 0 })
}

/// A tokenizer of four whole words; 3 is special.
fn tokenizer() -> Arc<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": 3, "content": "<end>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "model": {"type": "WordLevel", "vocab": {"one": 0, "two": 1, "three": 2, "<end>": 3}, "unk_token": "one"},
    });
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    Arc::new(Tokenizer::load(folder.path()).unwrap())
}

fn run(
    script: &Script,
    tokenizer: Option<&Arc<Tokenizer>>,
    logprobs: Option<u32>,
    form: Form,
) -> (anyhow::Result<Summary>, String) {
    let mut out = Vec::new();
    let outcome = answer(script, tokenizer, request(logprobs), form, &mut out);
    (outcome, String::from_utf8(out).unwrap())
}

fn json(text: &str) -> serde_json::Value {
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_stream_is_the_text_and_a_line_end() {
    let tokenizer = tokenizer();
    let events = vec![token(0), token(1), token(3), token(2), end(FinishReason::Length, 4)];
    let (outcome, text) = run(&Script::new(events), Some(&tokenizer), None, Form::Stream);
    let expected = tokenizer.decode(&[0, 1, 3, 2], true);
    assert!(expected.contains("two") && !expected.contains("<end>"), "{expected}");
    assert_eq!(text, format!("{expected}\n"));
    let summary = outcome.unwrap().to_string();
    assert!(summary.starts_with("2 + 4 tokens, ") && summary.ends_with(" tokens/s, seed 42, length"), "{summary}");
}

#[test]
fn without_a_tokenizer_the_ids_are_printed() {
    let (_, text) = run(&Script::new(vec![token(7), token(9), end(FinishReason::Length, 2)]), None, None, Form::Stream);
    assert_eq!(text, "7 9 \n");
}

#[test]
fn json_is_one_object() {
    let tokenizer = tokenizer();
    let events = vec![token(0), token(1), end(FinishReason::StopToken(3), 2)];
    let (_, text) = run(&Script::new(events), Some(&tokenizer), None, Form::Json);
    let expected = serde_json::json!({
        "tokens": [0, 1], "text": tokenizer.decode(&[0, 1], true), "finish_reason": "stop", "seed": 42
    });
    assert_eq!(json(&text), expected);
}

#[test]
fn json_without_a_tokenizer_has_no_text_and_may_be_empty() {
    let (_, text) = run(&Script::new(vec![end(FinishReason::StopToken(3), 0)]), None, Some(2), Form::Json);
    let expected = serde_json::json!({"tokens": [], "text": null, "logprobs": [], "finish_reason": "stop", "seed": 42});
    assert_eq!(json(&text), expected);
}

#[test]
fn logprobs_list_the_most_likely_and_the_chosen_token() {
    let listed = |id, own| Event::Token(TokenEvent { id, logprob: Some(own), top: vec![(0, -0.25), (1, -1.5)] });
    let events = vec![listed(1, -1.5), listed(7, -4.0), end(FinishReason::Length, 2)];
    let (_, text) = run(&Script::new(events), None, Some(2), Form::Json);
    let expected = serde_json::json!([[[0, -0.25], [1, -1.5]], [[0, -0.25], [1, -1.5], [7, -4.0]]]);
    assert_eq!(json(&text)["logprobs"], expected);
}

#[test]
fn a_failure_keeps_what_was_said_and_ends_the_line() {
    let failure = Event::Error(EngineError::Device("out of order".into()));
    let (outcome, text) = run(&Script::new(vec![token(5), failure.clone()]), None, None, Form::Stream);
    assert_eq!(text, "5 \n");
    assert_eq!(outcome.err().unwrap().to_string(), "the device failed: out of order");
    let (outcome, text) = run(&Script::new(vec![token(5), failure]), None, None, Form::Json);
    assert!(outcome.is_err() && text.is_empty());
}

#[test]
fn an_engine_that_hangs_up_or_refuses_is_an_error() {
    let (outcome, _) = run(&Script::new(vec![token(5)]), None, None, Form::Json);
    assert!(outcome.err().unwrap().to_string().contains("without completing"));
    let refusal = Script(Mutex::new(Some(Err(SubmitError::EmptyPrompt))));
    let (outcome, _) = run(&refusal, None, None, Form::Json);
    assert_eq!(outcome.err().unwrap().to_string(), SubmitError::EmptyPrompt.to_string());
}

#[test]
fn a_reader_that_left_is_seen_by_the_engine() {
    let alive = Arc::new(());
    let (sender, events) = mpsc::channel();
    let mut sink = Sink { sender, reader: Arc::downgrade(&alive) };
    assert!(!sink.is_gone());
    assert_eq!(sink.offer(token(1)), Ok(()));
    drop((alive, events));
    assert!(sink.is_gone());
    assert_eq!(sink.offer(token(1)), Err(Refused::Gone));
}
