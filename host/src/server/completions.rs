//! `POST /v1/completions`: text in, text out, for one prompt or several.

use std::collections::BTreeMap;
use std::sync::Arc;

use hyper::Response;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::engine::{EngineError, TokenEvent};
use crate::text::Tokenizer;

use super::ModelInfo;
use super::chat::finish_reason;
use super::error::ApiError;
use super::generation::{Piece, collect};
use super::http::{Body, InFlight, Server, json_response};
use super::parameters::{Head, Parameters, Usage, finite, token_id, token_text};
use super::sse::{Frames, Protocol};
use super::validate::{Fields, kind_of};

/// Each prompt is a request of its own in the engine's queue.
const MOST_PROMPTS: usize = 64;

enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

pub(super) async fn handle(
    server: &Arc<Server>,
    body: &Map<String, Value>,
    in_flight: InFlight,
) -> Result<Response<Body>, ApiError> {
    let fields = Fields(body);
    let app = &server.app;
    let parameters = Parameters::parse(fields, &app.model)?;
    let logprobs = fields.integer("logprobs", 0..=20)?.and_then(|n| u32::try_from(n).ok());
    let mut requests = Vec::new();
    let mut prompt_tokens = 0_u32;
    for prompt in prompts(fields, &app.model)? {
        let ids = match prompt {
            Prompt::Text(text) => server.encode(text, true).await?,
            Prompt::Tokens(ids) => ids,
        };
        prompt_tokens = prompt_tokens.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX));
        requests.push(parameters.request(ids, logprobs, app)?);
    }
    let count = requests.len();
    let generations = server.submit(requests, &parameters.stop, logprobs.is_some(), &Arc::default())?;

    let head = Head::new("cmpl", "text_completion", parameters.seed.clone(), &app.model);
    let tokenizer = logprobs.map(|_| Arc::clone(&app.tokenizer));
    if parameters.stream {
        let protocol = CompletionStream {
            head,
            tokenizer,
            offsets: vec![0; count],
            generated: vec![0; count],
            cached: vec![0; count],
            prompt_tokens,
            include_usage: parameters.include_usage,
            continuous_usage: parameters.continuous_usage,
        };
        return Ok(server.stream(generations, Box::new(protocol), in_flight));
    }
    let answers = collect(generations).await?;
    let generated = answers.iter().map(|a| a.generated).sum();
    let cached = answers.iter().map(|a| a.cached).sum();
    let choices: Vec<Choice> = (0..)
        .zip(answers)
        .map(|(index, answer)| Choice {
            index,
            logprobs: tokenizer.as_ref().map(|t| Logprobs::new(&answer.tokens, t, &mut 0)),
            finish_reason: Some(finish_reason(answer.end.as_ref())),
            text: answer.text,
        })
        .collect();
    let usage = Some(Some(Usage::new(prompt_tokens, generated, cached)));
    Ok(json_response(&Completion { head: &head, choices: &choices, usage }))
}

/// A string, strings, token ids, or lists of token ids.
fn prompts(fields: Fields<'_>, model: &ModelInfo) -> Result<Vec<Prompt>, ApiError> {
    let wrong = |message: String| Err(ApiError::invalid("prompt", message));
    let list = match fields.get("prompt") {
        None => return wrong("prompt is missing".to_owned()),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text.clone())]),
        Some(Value::Array(list)) => list,
        Some(other) => return wrong(format!("prompt is {}; it must be a string or a list", kind_of(other))),
    };
    let ids = |list: &[Value]| -> Result<Prompt, ApiError> {
        let ids: Result<Vec<u32>, ApiError> = list.iter().map(|id| token_id(id, "prompt", model)).collect();
        Ok(Prompt::Tokens(ids?))
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![ids(list)?]);
    }
    if list.is_empty() || list.len() > MOST_PROMPTS {
        return wrong(format!("prompt has {} entries; 1 to {MOST_PROMPTS} are allowed", list.len()));
    }
    list.iter()
        .map(|entry| match entry {
            Value::String(text) => Ok(Prompt::Text(text.clone())),
            Value::Array(list) => ids(list),
            other => {
                let message = format!("prompt holds {}; it must hold strings or lists of token ids", kind_of(other));
                Err(ApiError::invalid("prompt", message))
            }
        })
        .collect()
}

#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [Choice],
    /// `Some(None)` is `null`.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Characters before each token.
    text_offset: Vec<usize>,
}

impl Logprobs {
    fn new(events: &[TokenEvent], tokenizer: &Tokenizer, offset: &mut usize) -> Self {
        let text = |id| token_text(&tokenizer.token_bytes(id));
        let mut this = Self { tokens: vec![], token_logprobs: vec![], top_logprobs: vec![], text_offset: vec![] };
        for event in events {
            let bytes = tokenizer.token_bytes(event.id);
            this.text_offset.push(*offset);
            // A character is counted with the token that starts it.
            *offset += bytes.iter().filter(|b| **b & 0xc0 != 0x80).count();
            this.tokens.push(token_text(&bytes));
            this.token_logprobs.push(finite(event.logprob.unwrap_or(f32::NAN)));
            this.top_logprobs.push(event.top.iter().map(|&(id, p)| (text(id), finite(p))).collect());
        }
        this
    }
}

/// Chunks with text, then one with the reason for the end, for each prompt; the usage if asked for; `[DONE]`.
struct CompletionStream {
    head: Head,
    /// With log-probabilities only.
    tokenizer: Option<Arc<Tokenizer>>,
    offsets: Vec<usize>,
    generated: Vec<u32>,
    cached: Vec<u32>,
    prompt_tokens: u32,
    include_usage: bool,
    continuous_usage: bool,
}

impl CompletionStream {
    fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.generated.iter().sum(), self.cached.iter().sum())
    }

    fn chunk(&self, choice: Choice, frames: &mut Frames) {
        let usage = if self.continuous_usage { Some(Some(self.usage())) } else { self.include_usage.then_some(None) };
        frames.data(&Completion { head: &self.head, choices: &[choice], usage });
    }
}

impl Protocol for CompletionStream {
    fn open(&mut self, _: &mut Frames) {}

    fn piece(&mut self, choice: usize, piece: Piece, frames: &mut Frames) {
        let index = u32::try_from(choice).unwrap_or(u32::MAX);
        self.generated[choice] = piece.generated;
        self.cached[choice] = piece.cached;
        let logprobs = match &self.tokenizer {
            Some(tokenizer) if !piece.tokens.is_empty() => {
                Some(Logprobs::new(&piece.tokens, tokenizer, &mut self.offsets[choice]))
            }
            _ => None,
        };
        if !piece.text.is_empty() || logprobs.is_some() {
            self.chunk(Choice { index, text: piece.text, logprobs, finish_reason: None }, frames);
        }
        if let Some(end) = &piece.end {
            let finish_reason = Some(finish_reason(Some(end)));
            self.chunk(Choice { index, text: String::new(), logprobs: None, finish_reason }, frames);
        }
    }

    fn close(&mut self, frames: &mut Frames) {
        if self.include_usage {
            frames.data(&Completion { head: &self.head, choices: &[], usage: Some(Some(self.usage())) });
        }
        frames.done();
    }

    fn fail(&mut self, error: &EngineError, frames: &mut Frames) {
        frames.event("error", &ApiError::from(error.clone()).openai_body());
    }
}
