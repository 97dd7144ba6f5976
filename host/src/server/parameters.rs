//! What chat and text completions have in common: the model's name, sampling, lengths, stop conditions, streaming.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Number, Value};
use uuid::Uuid;

use crate::engine::{Request, Sampling, choice_seed};

use super::error::ApiError;
use super::validate::{Fields, kind_of};
use super::{App, ModelInfo};

/// OpenAI allows 4 stop strings; clients of other servers send more.
const MOST_STOP_STRINGS: usize = 16;
const LONGEST_STOP_STRING: usize = 1024;
const MOST_STOP_TOKENS: usize = 64;
const MOST_BIASES: usize = 1024;
/// As OpenAI has it.
const MOST_CHOICES: i64 = 128;

/// The parsed request, but for its prompt.
#[derive(Clone, Debug)]
pub(super) struct Parameters {
    pub(super) max_tokens: Option<u32>,
    min_tokens: u32,
    /// Answers to each prompt.
    pub(super) n: u32,
    /// The prompt comes before the answer.
    pub(super) echo: bool,
    pub(super) sampling: Sampling,
    /// As the client wrote it, or drawn.
    pub(super) seed: Number,
    pub(super) stop: Vec<String>,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    cache_salt: Option<String>,
}

impl Parameters {
    pub(super) fn parse(fields: Fields<'_>, model: &ModelInfo) -> Result<Self, ApiError> {
        if let Some(asked) = fields.string("model")?
            && asked != model.id
        {
            return Err(ApiError::unknown_model(asked, &model.id));
        }
        let n = fields.integer("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        if fields.integer("best_of", i64::MIN..=i64::MAX)?.is_some_and(|best_of| best_of != n) {
            let message = format!("best_of must be n, which is {n}: all answers are returned");
            return Err(ApiError::invalid("best_of", message));
        }
        refuse_what_would_be_ignored(fields)?;
        let echo = fields.boolean("echo")?.unwrap_or(false);
        // With the prompt in the answer there is something to say without a token.
        let tokens = |name| fields.integer(name, i64::from(!echo)..=i64::from(u32::MAX));
        let max_tokens = tokens("max_completion_tokens")?.or(tokens("max_tokens")?);
        let min_tokens = fields.integer("min_tokens", 0..=i64::from(u32::MAX))?;
        let (seed, seed_bits) = seed(fields)?;
        let mut sampling = Sampling { seed: seed_bits, ..Sampling::default() };
        let number = |name, low, high, default: f32| fields.number(name, low, high).map(|v| v.unwrap_or(default));
        sampling.temperature = number("temperature", 0.0, 2.0, 1.0)?;
        sampling.top_p = number("top_p", 0.0, 1.0, 1.0)?;
        sampling.min_p = number("min_p", 0.0, 1.0, 0.0)?;
        sampling.presence_penalty = number("presence_penalty", -2.0, 2.0, 0.0)?;
        sampling.frequency_penalty = number("frequency_penalty", -2.0, 2.0, 0.0)?;
        sampling.repetition_penalty = number("repetition_penalty", 0.0, 2.0, 1.0)?;
        if sampling.repetition_penalty <= 0.0 {
            let message = "repetition_penalty is 0; it divides, so it must be above 0 and at most 2.0";
            return Err(ApiError::invalid("repetition_penalty", message));
        }
        // -1 is how other servers spell "all".
        let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0);
        sampling.top_k = u32::try_from(top_k).unwrap_or(0);
        sampling.logit_bias = logit_bias(fields, model)?;
        let stream_options = fields.object("stream_options")?;
        let option = |name| stream_options.map_or(Ok(None), |o| Fields(o).boolean(name)).map(|v| v.unwrap_or(false));
        let continuous_usage = option("continuous_usage_stats")?;
        Ok(Self {
            max_tokens: max_tokens.and_then(|n| u32::try_from(n).ok()),
            min_tokens: min_tokens.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            n: u32::try_from(n).unwrap_or(1),
            echo,
            sampling,
            seed,
            stop: stop_strings(fields)?,
            stop_token_ids: stop_token_ids(fields, model)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            stream: fields.boolean("stream")?.unwrap_or(false),
            include_usage: option("include_usage")?,
            continuous_usage,
            cache_salt: fields.string("cache_salt")?.map(str::to_owned),
        })
    }

    /// The engine's requests for one prompt: `n` of them, which share its pages.
    pub(super) fn requests(
        &self,
        prompt: Vec<u32>,
        logprobs: Option<u32>,
        prompt_logprobs: Option<u32>,
        app: &App,
    ) -> Result<Vec<Request>, ApiError> {
        let first = self.request(prompt, logprobs, prompt_logprobs, app)?;
        let choice = |choice| {
            let mut request = first.clone();
            request.sampling.seed = choice_seed(self.sampling.seed, choice);
            request
        };
        Ok((0..self.n).map(choice).collect())
    }

    fn request(
        &self,
        prompt: Vec<u32>,
        logprobs: Option<u32>,
        prompt_logprobs: Option<u32>,
        app: &App,
    ) -> Result<Request, ApiError> {
        let max_tokens = fit(prompt.len(), self.max_tokens, app.limits.default_max_tokens, app.model.context_tokens)?;
        let mut stop_tokens = self.stop_token_ids.clone();
        if !self.ignore_eos {
            stop_tokens.extend(app.model.eos_ids.iter().filter(|id| !self.stop_token_ids.contains(id)));
        }
        Ok(Request {
            prompt,
            max_tokens,
            min_tokens: self.min_tokens,
            sampling: self.sampling.clone(),
            stop_tokens,
            logprobs,
            prompt_logprobs,
            cache_salt: self.cache_salt.clone(),
        })
    }
}

/// How many tokens to generate: what was asked for, else what fits, up to `default`.
pub(super) fn fit(prompt: usize, asked: Option<u32>, default: u32, context: usize) -> Result<u32, ApiError> {
    if prompt == 0 {
        return Err(ApiError::invalid("prompt", "the prompt is empty; send at least one token"));
    }
    let room = context.saturating_sub(prompt);
    match asked {
        Some(asked) if asked as usize <= room => Ok(asked),
        None if room > 0 => Ok(default.min(u32::try_from(room).unwrap_or(u32::MAX))),
        _ => {
            let asked = asked.map(|n| format!(" and max_tokens is {n}")).unwrap_or_default();
            let message =
                format!("the prompt has {prompt} tokens{asked}; the context holds {context} tokens for both together");
            Err(ApiError::invalid("max_tokens", message).with_code("context_length_exceeded"))
        }
    }
}

/// A seed for a client that sent none. 53 bits, so that JavaScript can send it back unchanged.
pub(super) fn draw_seed() -> u64 {
    Uuid::new_v4().as_u64_pair().1 & ((1 << 53) - 1)
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Any integer of 64 bits, signed or not; a negative one counts by its bits.
fn seed(fields: Fields<'_>) -> Result<(Number, u64), ApiError> {
    let Some(value) = fields.get("seed") else {
        let seed = draw_seed();
        return Ok((seed.into(), seed));
    };
    let bits = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    match (value, bits) {
        (Value::Number(number), Some(bits)) => Ok((number.clone(), bits)),
        _ => Err(ApiError::invalid("seed", format!("seed is {}; it must be an integer of 64 bits", kind_of(value)))),
    }
}

/// Silence would pass for success: what changes the answer's form is refused, not ignored.
fn refuse_what_would_be_ignored(fields: Fields<'_>) -> Result<(), ApiError> {
    for name in ["tools", "functions"] {
        if fields.get(name).is_some_and(|v| v.as_array().is_none_or(|a| !a.is_empty())) {
            return Err(ApiError::invalid(name, format!("{name} is not supported; leave it out")));
        }
    }
    for name in ["suffix", "guided_json", "guided_regex", "guided_choice", "guided_grammar"] {
        if fields.get(name).is_some_and(|v| v.as_str() != Some("")) {
            return Err(ApiError::invalid(name, format!("{name} is not supported; leave it out")));
        }
    }
    if let Some(format) = fields.object("response_format")?
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        return Err(ApiError::invalid("response_format", "response_format: only {\"type\": \"text\"} is supported"));
    }
    Ok(())
}

fn stop_strings(fields: Fields<'_>) -> Result<Vec<String>, ApiError> {
    let wrong = |message: String| Err(ApiError::invalid("stop", message));
    let given = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => {
            let strings: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
            match strings {
                Some(strings) => strings,
                None => return wrong("stop must hold strings only".to_owned()),
            }
        }
        Some(other) => return wrong(format!("stop is {}; it must be a string or a list of strings", kind_of(other))),
    };
    if given.len() > MOST_STOP_STRINGS {
        return wrong(format!("stop has {} strings; at most {MOST_STOP_STRINGS} are allowed", given.len()));
    }
    if given.iter().any(|s| s.is_empty() || s.len() > LONGEST_STOP_STRING) {
        return wrong(format!("each string of stop must have 1 to {LONGEST_STOP_STRING} bytes"));
    }
    Ok(given)
}

fn stop_token_ids(fields: Fields<'_>, model: &ModelInfo) -> Result<Vec<u32>, ApiError> {
    let name = "stop_token_ids";
    let Some(value) = fields.get(name) else { return Ok(Vec::new()) };
    let Some(list) = value.as_array() else {
        return Err(ApiError::invalid(name, format!("{name} is {}; it must be a list of token ids", kind_of(value))));
    };
    if list.len() > MOST_STOP_TOKENS {
        return Err(ApiError::invalid(
            name,
            format!("{name} has {} ids; at most {MOST_STOP_TOKENS} are allowed", list.len()),
        ));
    }
    list.iter().map(|id| token_id(id, name, model)).collect()
}

/// A token id of the model.
pub(super) fn token_id(value: &Value, name: &'static str, model: &ModelInfo) -> Result<u32, ApiError> {
    match value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < model.vocab_size) {
        Some(id) => Ok(id),
        None => {
            let message = format!("{name}: {value} is no token id; ids go from 0 to {}", model.vocab_size.max(1) - 1);
            Err(ApiError::invalid(name, message))
        }
    }
}

/// `{"token id": bias}`.
fn logit_bias(fields: Fields<'_>, model: &ModelInfo) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let Some(map) = fields.object(name)? else { return Ok(Vec::new()) };
    if map.len() > MOST_BIASES {
        return Err(ApiError::invalid(
            name,
            format!("{name} has {} entries; at most {MOST_BIASES} are allowed", map.len()),
        ));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (key, value) in map {
        let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < model.vocab_size);
        let bias = value.as_f64().filter(|b| (-100.0..=100.0).contains(b));
        let (Some(id), Some(bias)) = (id, bias) else {
            let message = format!("{name} maps token ids (below {}) to numbers from -100 to 100", model.vocab_size);
            return Err(ApiError::invalid(name, message));
        };
        biases.push((id, bias as f32));
    }
    // One order, whatever the client's map had.
    biases.sort_by_key(|(id, _)| *id);
    Ok(biases)
}

/// Tokens counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl Usage {
    /// `cached_tokens` of the prompt were computed already; 0 says nothing.
    pub(super) fn new(prompt_tokens: u32, completion_tokens: u32, cached_tokens: u32) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
            prompt_tokens_details: (cached_tokens > 0).then_some(PromptDetails { cached_tokens }),
        }
    }
}

/// The fields that every object of an answer starts with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) system_fingerprint: String,
    pub(super) seed: Number,
}

impl Head {
    pub(super) fn new(prefix: &str, object: &'static str, seed: Number, model: &ModelInfo) -> Self {
        Self {
            id: format!("{prefix}-{}", Uuid::new_v4().simple()),
            object,
            created: unix_seconds(),
            model: model.id.clone(),
            system_fingerprint: model.fingerprint.clone(),
            seed,
        }
    }
}

/// A token as clients see it: its text, or its bytes where they are no text by themselves.
pub(super) fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}

/// JSON has no infinities; -9999 is what clients know for "never".
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
