//! `POST /execute`: the worker API. One job, a plain prompt, named events.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use hyper::Response;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::engine::{EngineError, Request, Sampling};
use crate::text::rfc3339;

use super::cancel::Registered;
use super::correlation::RequestIds;
use super::error::{ApiError, Violation, is_retriable};
use super::generation::{End, Piece};
use super::http::{Body, InFlight, Server};
use super::parameters::{draw_seed, fit};
use super::receipt::{Receipt, Tally};
use super::record::Transcript;
use super::sse::{Frames, Protocol};
use super::validate::kind_of;

/// In characters, not bytes.
const LONGEST_PROMPT: usize = 32_768;
const MOST_TOKENS: u64 = 2048;
const MOST_STOP_STRINGS: usize = 4;
/// In bytes.
const LONGEST_STOP_STRING: usize = 100;

pub(super) async fn handle(
    server: &Arc<Server>,
    body: &Map<String, Value>,
    ids: &RequestIds,
    in_flight: InFlight,
) -> Result<Response<Body>, ApiError> {
    let app = &server.app;
    let job = Job::parse(body).map_err(|violations| refused(violations, body, ids))?;
    // From here on, so that a cancellation finds a job whose prompt is still being encoded.
    let registered = server.jobs.register(&job.job_id);
    let prompt = server.encode(job.prompt, true).await?;
    // Without a limit of its own a job gets what fits.
    let default = u32::try_from(MOST_TOKENS).unwrap_or(u32::MAX);
    let max_tokens = fit(prompt.len(), job.max_tokens, default, app.model.context_tokens).map_err(|e| {
        let field = if prompt.is_empty() { "prompt" } else { "max_tokens" };
        let constraint = format!("context({})", app.model.context_tokens);
        refused(vec![Violation { field, constraint, message: e.message, value: None }], body, ids)
    })?;
    let seed = job.sampling.seed;
    let stop_tokens = app.model.eos_ids.clone();
    let request = Request { prompt, max_tokens, sampling: job.sampling, stop_tokens, ..Request::default() };
    let tally = Tally::new(seed.into(), u32::try_from(request.prompt.len()).unwrap_or(u32::MAX), 1, 1);
    let generations = server.submit(vec![request], &job.stop, &registered.cancellation)?;
    let transcript =
        server.transcript("/execute", body, || vec![String::new()], &tally).map(Transcript::whole_characters);
    let protocol = JobStream {
        job_id: job.job_id,
        registered: Some(registered),
        model: app.model.id.clone(),
        seed,
        stop: job.stop,
        started: Instant::now(),
        system_fingerprint: app.model.fingerprint.clone(),
        next: 0,
        tokens_out: 0,
        tally,
        end: None,
    };
    Ok(server.stream(generations, Box::new(protocol), transcript, in_flight))
}

/// The job that a body names.
pub(super) fn job_id(body: &Map<String, Value>, ids: &RequestIds) -> Result<String, ApiError> {
    let mut check = Check { body, violations: Vec::new() };
    match check.job_id() {
        Some(job_id) if check.violations.is_empty() => Ok(job_id),
        _ => Err(refused(check.violations, body, ids)),
    }
}

/// Logs field names only: prompts and stop strings are private.
fn refused(violations: Vec<Violation>, body: &Map<String, Value>, ids: &RequestIds) -> ApiError {
    let fields: Vec<&str> = violations.iter().map(|v| v.field).collect();
    let job_id = body.get("job_id").and_then(Value::as_str).unwrap_or_default();
    tracing::warn!(correlation_id = %ids.correlation, job_id, errors = violations.len(), ?fields, "request not valid");
    ApiError::violations(violations)
}

struct Job {
    job_id: String,
    prompt: String,
    max_tokens: Option<u32>,
    sampling: Sampling,
    stop: Vec<String>,
}

impl Job {
    /// All violations, not the first one only.
    fn parse(body: &Map<String, Value>) -> Result<Self, Vec<Violation>> {
        let mut check = Check { body, violations: Vec::new() };
        let job_id = check.job_id();
        let prompt = check.text("prompt");
        let characters = prompt.as_deref().map_or(1, |p| p.chars().count());
        if !(1..=LONGEST_PROMPT).contains(&characters) {
            let message = format!("prompt must have 1 to {LONGEST_PROMPT} characters; it has {characters}");
            check.violate("prompt", &format!("length(1..={LONGEST_PROMPT})"), message, None);
        }
        let max_tokens = check.unsigned("max_tokens");
        if let Some(count) = max_tokens.filter(|n| !(1..=MOST_TOKENS).contains(n)) {
            let message = format!("max_tokens must be from 1 to {MOST_TOKENS}; it is {count}");
            check.violate("max_tokens", &format!("range(1..={MOST_TOKENS})"), message, Some(count.to_string()));
        }
        let top_k = check.unsigned("top_k");
        if let Some(k) = top_k.filter(|k| *k > u64::from(u32::MAX)) {
            let message = format!("top_k must be from 0 to {}; it is {k}", u32::MAX);
            check.violate("top_k", &format!("range(0..={})", u32::MAX), message, Some(k.to_string()));
        }
        let sampling = Sampling {
            temperature: check.number("temperature", 2.0, 1.0),
            top_p: check.number("top_p", 1.0, 1.0),
            min_p: check.number("min_p", 1.0, 0.0),
            repetition_penalty: check.number("repetition_penalty", 2.0, 1.0),
            top_k: top_k.and_then(|k| u32::try_from(k).ok()).unwrap_or(0),
            seed: check.unsigned("seed").unwrap_or_else(draw_seed),
            ..Sampling::default()
        };
        if sampling.repetition_penalty == 0.0 {
            let message = "repetition_penalty must be above 0.0 and at most 2.0; it is 0, and it divides";
            check.violate("repetition_penalty", "range(0.0..=2.0)", message, Some("0".to_owned()));
        }
        let stop = check.stop();
        match (job_id, prompt) {
            (Some(job_id), Some(prompt)) if check.violations.is_empty() => {
                let max_tokens = max_tokens.and_then(|n| u32::try_from(n).ok());
                Ok(Self { job_id, prompt, max_tokens, sampling, stop })
            }
            _ => Err(check.violations),
        }
    }
}

struct Check<'a> {
    body: &'a Map<String, Value>,
    violations: Vec<Violation>,
}

impl<'a> Check<'a> {
    fn violate(
        &mut self,
        field: &'static str,
        constraint: &str,
        message: impl Into<String>,
        value: impl Into<Option<String>>,
    ) {
        let (constraint, message, value) = (constraint.to_owned(), message.into(), value.into());
        self.violations.push(Violation { field, constraint, message, value });
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.body.get(field).filter(|v| !v.is_null())
    }

    fn wrong_type(&mut self, field: &'static str, expected: &str, value: &Value) {
        let message = format!("{field} must be of type {expected}; it is {}", kind_of(value));
        self.violate(field, &format!("type({expected})"), message, None);
    }

    /// A string that must be there.
    fn text(&mut self, field: &'static str) -> Option<String> {
        match self.get(field) {
            Some(Value::String(text)) => return Some(text.clone()),
            Some(other) => self.wrong_type(field, "string", other),
            None => self.violate(field, "required", format!("{field} is missing"), None),
        }
        None
    }

    fn job_id(&mut self) -> Option<String> {
        let job_id = self.text("job_id");
        if job_id.as_deref() == Some("") {
            self.violate("job_id", "non_empty", "job_id must not be empty", Some(String::new()));
        }
        job_id
    }

    fn unsigned(&mut self, field: &'static str) -> Option<u64> {
        let value = self.get(field)?;
        let number = value.as_u64();
        if number.is_none() {
            self.wrong_type(field, "unsigned integer", value);
        }
        number
    }

    /// A number from 0 to `high`.
    fn number(&mut self, field: &'static str, high: f64, default: f32) -> f32 {
        let Some(value) = self.get(field) else { return default };
        match value.as_f64() {
            None => self.wrong_type(field, "number", value),
            Some(number) if (0.0..=high).contains(&number) => return number as f32,
            Some(number) => {
                let message = format!("{field} must be from 0.0 to {high:?}; it is {number}");
                self.violate(field, &format!("range(0.0..={high:?})"), message, Some(value.to_string()));
            }
        }
        default
    }

    fn stop(&mut self) -> Vec<String> {
        let Some(value) = self.get("stop") else { return Vec::new() };
        let strings: Option<Vec<String>> =
            value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        let Some(strings) = strings else {
            self.wrong_type("stop", "array of strings", value);
            return Vec::new();
        };
        let count = strings.len();
        if count > MOST_STOP_STRINGS {
            let message = format!("stop must have at most {MOST_STOP_STRINGS} entries; it has {count}");
            self.violate("stop", &format!("max_count({MOST_STOP_STRINGS})"), message, Some(count.to_string()));
        }
        for (i, string) in strings.iter().enumerate() {
            if string.is_empty() {
                self.violate("stop", "non_empty", format!("stop[{i}] must not be empty"), None);
            }
            if string.len() > LONGEST_STOP_STRING {
                let length = string.len();
                let message = format!("stop[{i}] must have at most {LONGEST_STOP_STRING} bytes; it has {length}");
                self.violate("stop", &format!("max_length({LONGEST_STOP_STRING})"), message, None);
            }
        }
        strings
    }
}

/// Why a job ended, as clients read it. These spellings do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum StopReason {
    MaxTokens,
    StopSequence,
    Eos,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum JobEvent<'a> {
    Started {
        job_id: &'a str,
        model: &'a str,
        started_at: String,
        seed: u64,
    },
    Token {
        t: &'a str,
        i: u32,
    },
    End {
        /// Tokens generated; text that was held back or spread over tokens makes it differ from the `token` events.
        tokens_out: u32,
        /// From `started` to here.
        decode_time_ms: u64,
        stop_reason: StopReason,
        #[serde(skip_serializing_if = "Option::is_none")]
        stop_sequence_matched: Option<&'a str>,
        system_fingerprint: &'a str,
        lockstep: Option<Receipt>,
    },
    Error {
        code: &'a str,
        message: String,
        retriable: bool,
    },
}

/// `started`, `token`s, then one `end` or `error`.
struct JobStream {
    job_id: String,
    /// Until the end is known.
    registered: Option<Registered>,
    model: String,
    seed: u64,
    stop: Vec<String>,
    started: Instant,
    system_fingerprint: String,
    /// Number of the next `token` event.
    next: u32,
    tokens_out: u32,
    tally: Tally,
    end: Option<End>,
}

impl Protocol for JobStream {
    fn open(&mut self, frames: &mut Frames) {
        let started_at = rfc3339(SystemTime::now());
        let event = JobEvent::Started { job_id: &self.job_id, model: &self.model, started_at, seed: self.seed };
        frames.event("started", &event);
    }

    fn piece(&mut self, _: usize, piece: Piece, frames: &mut Frames) {
        // This API drops a character that was never completed.
        let text = if piece.end.is_some() { piece.text.trim_end_matches('\u{fffd}') } else { &piece.text };
        if !text.is_empty() {
            frames.event("token", &JobEvent::Token { t: text, i: self.next });
            self.next += 1;
        }
        self.tokens_out = piece.generated;
        self.tally.note(0, &piece);
        self.end = piece.end;
    }

    fn close(&mut self, frames: &mut Frames) {
        self.registered = None;
        let (stop_reason, stop_sequence_matched) = match &self.end {
            Some(End::StopString(index)) => (StopReason::StopSequence, self.stop.get(*index).map(String::as_str)),
            Some(End::Length) => (StopReason::MaxTokens, None),
            _ => (StopReason::Eos, None),
        };
        let decode_time_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let event = JobEvent::End {
            tokens_out: self.tokens_out,
            decode_time_ms,
            stop_reason,
            stop_sequence_matched,
            system_fingerprint: &self.system_fingerprint,
            lockstep: self.tally.receipt(),
        };
        frames.event("end", &event);
    }

    fn fail(&mut self, error: &EngineError, frames: &mut Frames) {
        self.registered = None;
        let (code, retriable) = (error.code(), is_retriable(error));
        frames.event("error", &JobEvent::Error { code, message: error.to_string(), retriable });
    }
}
