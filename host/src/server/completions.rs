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
use super::generation::{Answer, Piece, collect};
use super::http::{Body, InFlight, Server, json_response};
use super::parameters::{Head, Parameters, Usage, finite, token_id, token_text};
use super::receipt::{Receipt, Tally};
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
    let count = |name| fields.integer(name, 0..=20).map(|n| n.and_then(|n| u32::try_from(n).ok()));
    let logprobs = count("logprobs")?;
    let prompt_logprobs = count("prompt_logprobs")?;
    let echoed_logprobs = logprobs.filter(|_| parameters.echo);
    // An answer without a token is its prompt's report; the engine has no shorter one.
    let scored = echoed_logprobs.max(prompt_logprobs).or((parameters.max_tokens == Some(0)).then_some(0));
    let mut requests = Vec::new();
    let mut echoes = Vec::new();
    let mut prompt_tokens = 0_u32;
    for prompt in prompts(fields, &app.model)? {
        let (ids, text) = match prompt {
            Prompt::Text(text) => {
                let echo = parameters.echo.then(|| text.clone());
                (server.encode(text, true).await?, echo)
            }
            Prompt::Tokens(ids) => (ids, None),
        };
        prompt_tokens = prompt_tokens.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX));
        if parameters.echo {
            echoes.push(text.unwrap_or_else(|| app.tokenizer.decode(&ids, true)));
        }
        requests.extend(parameters.requests(ids, logprobs, scored, app)?);
    }
    let choices = requests.len();
    let generations = server.submit(requests, &parameters.stop, &Arc::default())?;

    let of_each = parameters.n as usize;
    let mut tally = Tally::new(parameters.seed.clone(), prompt_tokens, choices, of_each);
    let head = Head::new("cmpl", "text_completion", parameters.seed.clone(), &app.model);
    let shape = Shape {
        tokenizer: Arc::clone(&app.tokenizer),
        logprobs,
        prompt_logprobs,
        echoes,
        of_each,
        scored: scored.is_some(),
    };
    let texts = || (0..choices).map(|choice| shape.echo(choice)).collect();
    let mut transcript = server.transcript("/v1/completions", body, texts, &tally);
    if parameters.stream {
        let protocol = CompletionStream {
            head,
            shape,
            offsets: vec![0; choices],
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
    let choices: Vec<Choice> = answers.iter().enumerate().map(|(choice, answer)| shape.whole(choice, answer)).collect();
    let usage = Some(Some(tally.usage()));
    Ok(json_response(&Completion { head: &head, choices: &choices, usage, lockstep: tally.receipt() }))
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

/// What is shown of each choice.
struct Shape {
    tokenizer: Arc<Tokenizer>,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    /// The text of each prompt, where it is repeated.
    echoes: Vec<String>,
    /// Choices of each prompt.
    of_each: usize,
    /// The engine reports the prompt's tokens before the answer's.
    scored: bool,
}

impl Shape {
    /// The text of the prompt where it is repeated, else nothing.
    fn echo(&self, choice: usize) -> String {
        self.echoes.get(choice / self.of_each).cloned().unwrap_or_default()
    }

    fn is_echoed(&self) -> bool {
        !self.echoes.is_empty()
    }

    /// The prompt's tokens as part of the answer, where they are.
    fn echoed_logprobs(&self, prompt: &[TokenEvent], offset: &mut usize) -> Option<Logprobs> {
        let most = self.logprobs.filter(|_| self.is_echoed())?;
        Some(Logprobs::new(prompt, most, &self.tokenizer, offset))
    }

    fn whole(&self, choice: usize, answer: &Answer) -> Choice {
        let mut offset = 0;
        let logprobs = self.logprobs.map(|most| {
            let mut all = self.echoed_logprobs(&answer.prompt, &mut offset).unwrap_or_default();
            all.append(Logprobs::new(&answer.tokens, most, &self.tokenizer, &mut offset));
            all
        });
        Choice {
            index: u32::try_from(choice).unwrap_or(u32::MAX),
            text: self.echo(choice) + &answer.text,
            logprobs,
            finish_reason: Some(finish_reason(answer.end.as_ref())),
            prompt_logprobs: self.prompt_logprobs(&answer.prompt),
        }
    }

    fn prompt_logprobs(&self, prompt: &[TokenEvent]) -> Option<Vec<Option<PromptLogprobs>>> {
        let most = self.prompt_logprobs? as usize;
        Some(prompt.iter().map(|event| PromptLogprob::listed(event, most, &self.tokenizer)).collect())
    }
}

#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [Choice],
    /// `Some(None)` is `null`.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    /// On the last chunk of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    lockstep: Option<Receipt>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptLogprobs>>>,
}

/// By token id: the prompt's own token and the most likely ones.
type PromptLogprobs = BTreeMap<u32, PromptLogprob>;

#[derive(Serialize)]
struct PromptLogprob {
    logprob: f32,
    /// 1 is the most likely token; `null` for the prompt's own where it is not among those that are listed.
    rank: Option<usize>,
    decoded_token: String,
}

impl PromptLogprob {
    /// None for the first token, which follows nothing.
    fn listed(event: &TokenEvent, most: usize, tokenizer: &Tokenizer) -> Option<PromptLogprobs> {
        let entry = |id, logprob, rank| {
            let decoded_token = token_text(&tokenizer.token_bytes(id));
            (id, Self { logprob: finite(logprob), rank, decoded_token })
        };
        let own = entry(event.id, event.logprob?, None);
        let top = event.top.iter().take(most).zip(1..).map(|(&(id, logprob), rank)| entry(id, logprob, Some(rank)));
        Some(std::iter::once(own).chain(top).collect())
    }
}

#[derive(Default, Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    /// `null` for the first token of a prompt, which follows nothing.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Characters before each token.
    text_offset: Vec<usize>,
}

impl Logprobs {
    fn new(events: &[TokenEvent], most: u32, tokenizer: &Tokenizer, offset: &mut usize) -> Self {
        let text = |id| token_text(&tokenizer.token_bytes(id));
        let mut this = Self::default();
        for event in events {
            let bytes = tokenizer.token_bytes(event.id);
            this.text_offset.push(*offset);
            // A character is counted with the token that starts it; a mark of the format is no text.
            if !tokenizer.is_special(event.id) {
                *offset += bytes.iter().filter(|b| **b & 0xc0 != 0x80).count();
            }
            this.tokens.push(token_text(&bytes));
            this.token_logprobs.push(event.logprob.map(finite));
            let top = event.top.iter().take(most as usize);
            this.top_logprobs.push(event.logprob.map(|_| top.map(|&(id, p)| (text(id), finite(p))).collect()));
        }
        this
    }

    fn append(&mut self, mut more: Self) {
        self.tokens.append(&mut more.tokens);
        self.token_logprobs.append(&mut more.token_logprobs);
        self.top_logprobs.append(&mut more.top_logprobs);
        self.text_offset.append(&mut more.text_offset);
    }
}

/// Chunks of each choice: the prompt where it is repeated, text by text, the reason for the end; the usage if asked for;
/// `[DONE]`.
struct CompletionStream {
    head: Head,
    shape: Shape,
    offsets: Vec<usize>,
    tally: Tally,
    include_usage: bool,
    continuous_usage: bool,
}

impl CompletionStream {
    fn chunk(&self, choice: Choice, frames: &mut Frames) {
        let usage =
            if self.continuous_usage { Some(Some(self.tally.usage())) } else { self.include_usage.then_some(None) };
        let last = choice.finish_reason.is_some() && !self.include_usage;
        let lockstep = if last { self.tally.receipt() } else { None };
        frames.data(&Completion { head: &self.head, choices: &[choice], usage, lockstep });
    }

    /// What is known of a choice before its first token.
    fn prompt(&mut self, choice: usize, prompt: &[TokenEvent], frames: &mut Frames) {
        let logprobs = self.shape.echoed_logprobs(prompt, &mut self.offsets[choice]);
        let prompt_logprobs = self.shape.prompt_logprobs(prompt);
        if self.shape.is_echoed() || prompt_logprobs.is_some() {
            let (index, text) = (u32::try_from(choice).unwrap_or(u32::MAX), self.shape.echo(choice));
            self.chunk(Choice { index, text, logprobs, finish_reason: None, prompt_logprobs }, frames);
        }
    }
}

impl Protocol for CompletionStream {
    fn open(&mut self, frames: &mut Frames) {
        if self.shape.is_echoed() && !self.shape.scored {
            for choice in 0..self.offsets.len() {
                self.prompt(choice, &[], frames);
            }
        }
    }

    fn piece(&mut self, choice: usize, piece: Piece, frames: &mut Frames) {
        let index = u32::try_from(choice).unwrap_or(u32::MAX);
        self.tally.note(choice, &piece);
        if !piece.prompt.is_empty() {
            self.prompt(choice, &piece.prompt, frames);
        }
        let logprobs = match self.shape.logprobs {
            Some(most) if !piece.tokens.is_empty() => {
                Some(Logprobs::new(&piece.tokens, most, &self.shape.tokenizer, &mut self.offsets[choice]))
            }
            _ => None,
        };
        if !piece.text.is_empty() || logprobs.is_some() {
            let finish_reason = None;
            self.chunk(Choice { index, text: piece.text, logprobs, finish_reason, prompt_logprobs: None }, frames);
        }
        if let Some(end) = &piece.end {
            let (text, finish_reason) = (String::new(), Some(finish_reason(Some(end))));
            self.chunk(Choice { index, text, logprobs: None, finish_reason, prompt_logprobs: None }, frames);
        }
    }

    fn close(&mut self, frames: &mut Frames) {
        if self.include_usage {
            let (usage, lockstep) = (Some(Some(self.tally.usage())), self.tally.receipt());
            frames.data(&Completion { head: &self.head, choices: &[], usage, lockstep });
        }
        frames.done();
    }

    fn fail(&mut self, error: &EngineError, frames: &mut Frames) {
        frames.event("error", &ApiError::from(error.clone()).openai_body());
    }
}
