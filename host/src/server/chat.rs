//! `POST /v1/chat/completions`.

use std::sync::Arc;

use hyper::Response;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::{EngineError, TokenEvent};
use crate::text::Tokenizer;

use super::error::ApiError;
use super::generation::{Answer, End, Piece, collect};
use super::http::{Body, InFlight, Server, json_response};
use super::parameters::{Head, Parameters, Usage, finite, token_text};
use super::receipt::{Receipt, Tally};
use super::sse::{Frames, Protocol};
use super::validate::{Fields, kind_of};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

pub(super) async fn handle(
    server: &Arc<Server>,
    body: &Map<String, Value>,
    in_flight: InFlight,
) -> Result<Response<Body>, ApiError> {
    let fields = Fields(body);
    let app = &server.app;
    let parameters = Parameters::parse(fields, &app.model)?;
    if parameters.echo {
        return Err(ApiError::invalid("echo", "echo is for /v1/completions; a chat's prompt is not repeated"));
    }
    if fields.get("prompt_logprobs").is_some() {
        return Err(ApiError::invalid("prompt_logprobs", "prompt_logprobs is for /v1/completions"));
    }
    let logprobs = logprobs(fields)?;
    let messages = messages(fields)?;
    let Some(template) = &app.template else {
        let message = "this model has no chat template, so it cannot chat; /v1/completions works";
        return Err(ApiError::invalid("messages", message).with_code("no_chat_template"));
    };
    let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
    let arguments = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
    let prompt = template
        .render(&messages, add_generation_prompt, &arguments)
        .map_err(|e| ApiError::invalid("messages", e.to_string()))?;
    // The template has written the special tokens.
    let prompt = server.encode(prompt, false).await?;
    let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
    let requests = parameters.requests(prompt, logprobs, None, app)?;
    let choices = requests.len();
    let generations = server.submit(requests, &parameters.stop, &Arc::default())?;
    let mut tally = Tally::new(parameters.seed.clone(), prompt_tokens, choices, choices);

    let mut transcript = server.transcript("/v1/chat/completions", body, || vec![String::new(); choices], &tally);
    let tokenizer = logprobs.map(|_| Arc::clone(&app.tokenizer));
    if parameters.stream {
        let protocol = ChatStream {
            head: Head::new("chatcmpl", "chat.completion.chunk", parameters.seed.clone(), &app.model),
            tokenizer,
            begun: vec![false; choices],
            tally,
            include_usage: parameters.include_usage,
            continuous_usage: parameters.continuous_usage,
        };
        return Ok(server.stream(generations, Box::new(protocol), transcript, in_flight));
    }
    let answers = collect(generations, |choice, piece| {
        tally.note(choice, piece);
        transcript.iter_mut().for_each(|transcript| transcript.note(choice, piece));
    })
    .await?;
    if let Some(transcript) = transcript {
        transcript.finish();
    }
    let head = Head::new("chatcmpl", "chat.completion", parameters.seed.clone(), &app.model);
    Ok(json_response(&whole(head, &answers, &tally, tokenizer.as_deref())))
}

/// None: not asked for. Some(n): with the n most likely ones.
fn logprobs(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=20)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.and_then(|n| u32::try_from(n).ok()).unwrap_or(0))),
        (false, Some(n)) if n > 0 => Err(ApiError::invalid("top_logprobs", "top_logprobs needs \"logprobs\": true")),
        (false, _) => Ok(None),
    }
}

/// The messages with their content as one string each, the way templates take it.
fn messages(fields: Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let wrong = |message: String| ApiError::invalid("messages", message);
    let list = match fields.get("messages") {
        None => return Err(wrong("messages is missing; send [{\"role\": \"user\", \"content\": \"...\"}]".to_owned())),
        Some(Value::Array(list)) if list.is_empty() => return Err(wrong("messages is empty".to_owned())),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(format!("messages is {}; it must be a list", kind_of(other)))),
    };
    let mut messages = Vec::with_capacity(list.len());
    for (i, message) in list.iter().enumerate() {
        let Some(object) = message.as_object() else {
            return Err(wrong(format!("messages[{i}] is {}; it must be an object", kind_of(message))));
        };
        let Some(role) = object.get("role").and_then(Value::as_str).filter(|r| ROLES.contains(r)) else {
            return Err(wrong(format!("messages[{i}].role must be one of {}", ROLES.join(", "))));
        };
        let content = match object.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => joined(parts, i)?,
            None | Some(Value::Null) if role == "assistant" => String::new(),
            None | Some(Value::Null) => return Err(wrong(format!("messages[{i}].content is missing"))),
            Some(other) => {
                let kind = kind_of(other);
                return Err(wrong(format!("messages[{i}].content is {kind}; it must be a string or a list of parts")));
            }
        };
        let mut message = object.clone();
        // Templates know the role by its older name.
        let role = if role == "developer" { "system" } else { role };
        message.insert("role".to_owned(), role.into());
        message.insert("content".to_owned(), content.into());
        messages.push(Value::Object(message));
    }
    Ok(messages)
}

fn joined(parts: &[Value], i: usize) -> Result<String, ApiError> {
    let mut text = String::new();
    for part in parts {
        let kind = part.get("type").and_then(Value::as_str);
        match part.get("text").and_then(Value::as_str) {
            Some(piece) if kind == Some("text") => text.push_str(piece),
            _ => {
                let kind = kind.unwrap_or("without a type");
                let message = format!("messages[{i}].content has a part {kind}; only parts of type text are supported");
                return Err(ApiError::invalid("messages", message));
            }
        }
    }
    Ok(text)
}

pub(super) fn finish_reason(end: Option<&End>) -> &'static str {
    match end {
        Some(End::Length) => "length",
        _ => "stop",
    }
}

fn whole(head: Head, answers: &[Answer], tally: &Tally, tokenizer: Option<&Tokenizer>) -> impl Serialize {
    #[derive(Serialize)]
    struct Completion {
        #[serde(flatten)]
        head: Head,
        choices: Vec<Choice>,
        usage: Usage,
        lockstep: Option<Receipt>,
    }
    // Log-probabilities do not go through `Value`: it widens them to f64, and they would read differently than in a stream.
    #[derive(Serialize)]
    struct Choice {
        index: u32,
        message: Value,
        logprobs: Option<Logprobs>,
        finish_reason: &'static str,
    }
    let choice = |(index, answer): (u32, &Answer)| Choice {
        index,
        message: json!({"role": "assistant", "content": answer.text, "refusal": null}),
        logprobs: tokenizer.map(|t| Logprobs::new(&answer.tokens, t)),
        finish_reason: finish_reason(answer.end.as_ref()),
    };
    let choices = (0..).zip(answers).map(choice).collect();
    Completion { head, choices, usage: tally.usage(), lockstep: tally.receipt() }
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct TokenLogprob {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Alternative {
    fn new(id: u32, logprob: f32, tokenizer: &Tokenizer) -> Self {
        let bytes = tokenizer.token_bytes(id);
        Self { token: token_text(&bytes), logprob: finite(logprob), bytes }
    }
}

impl Logprobs {
    fn new(tokens: &[TokenEvent], tokenizer: &Tokenizer) -> Self {
        let content = tokens.iter().map(|event| TokenLogprob {
            token: Alternative::new(event.id, event.logprob.unwrap_or(f32::NAN), tokenizer),
            top_logprobs: event.top.iter().map(|&(id, logprob)| Alternative::new(id, logprob, tokenizer)).collect(),
        });
        Self { content: content.collect(), refusal: None }
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [ChunkChoice],
    /// `Some(None)` is `null`, as OpenAI has it on every chunk before the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    /// On the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    lockstep: Option<Receipt>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: u32,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Chunks: of each choice the role, text by text, the reason for the end; the usage if asked for; `[DONE]`.
struct ChatStream {
    head: Head,
    /// With log-probabilities only.
    tokenizer: Option<Arc<Tokenizer>>,
    begun: Vec<bool>,
    tally: Tally,
    include_usage: bool,
    continuous_usage: bool,
}

impl ChatStream {
    fn chunk(&self, choice: ChunkChoice, frames: &mut Frames) {
        let usage =
            if self.continuous_usage { Some(Some(self.tally.usage())) } else { self.include_usage.then_some(None) };
        let last = choice.finish_reason.is_some() && !self.include_usage;
        let lockstep = if last { self.tally.receipt() } else { None };
        frames.data(&Chunk { head: &self.head, choices: &[choice], usage, lockstep });
    }
}

impl Protocol for ChatStream {
    /// The role waits for the first text, so that clients which time the first chunk time a token.
    fn open(&mut self, _: &mut Frames) {}

    fn piece(&mut self, choice: usize, piece: Piece, frames: &mut Frames) {
        let index = u32::try_from(choice).unwrap_or(u32::MAX);
        self.tally.note(choice, &piece);
        if !std::mem::replace(&mut self.begun[choice], true) {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason: None }, frames);
        }
        let logprobs =
            self.tokenizer.as_ref().filter(|_| !piece.tokens.is_empty()).map(|t| Logprobs::new(&piece.tokens, t));
        if !piece.text.is_empty() || logprobs.is_some() {
            let delta = Delta { role: None, content: Some(piece.text) };
            self.chunk(ChunkChoice { index, delta, logprobs, finish_reason: None }, frames);
        }
        if let Some(end) = &piece.end {
            let finish_reason = Some(finish_reason(Some(end)));
            self.chunk(ChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason }, frames);
        }
    }

    fn close(&mut self, frames: &mut Frames) {
        if self.include_usage {
            let (usage, lockstep) = (Some(Some(self.tally.usage())), self.tally.receipt());
            frames.data(&Chunk { head: &self.head, choices: &[], usage, lockstep });
        }
        frames.done();
    }

    fn fail(&mut self, error: &EngineError, frames: &mut Frames) {
        frames.event("error", &ApiError::from(error.clone()).openai_body());
    }
}
