//! What the engine is asked for and what it answers.

/// How the next token is chosen. Applied in this order: penalties and bias, temperature, top-k, top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this. 0, or less than 1e-5, takes the largest logit (ties: the lowest id) and ignores what
    /// follows.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the shortest prefix, in order of falling probability, that reaches this mass; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens generated so far; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token generated so far; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence of a generated token; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys the random numbers; the same seed gives the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// One generation, in token ids.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt; not empty.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most; at least 1, or 0 with [`prompt_logprobs`](Self::prompt_logprobs). Prompt and answer
    /// together must fit the context.
    pub max_tokens: u32,
    /// Tokens to generate at least: before them no stop token can be chosen. At most `max_tokens`.
    pub min_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer (end-of-sequence ids and the client's own). The ending token is reported in
    /// [`Finish`], not as a [`Event::Token`].
    pub stop_tokens: Vec<u32>,
    /// Report log-probabilities, and those of the `n` most likely tokens (0 to 20) at each position.
    pub logprobs: Option<u32>,
    /// The same of the prompt's tokens, as one [`Event::Prompt`] before the first token. The prompt is then computed
    /// without what the cache holds of it, and in steps with few of its tokens each, since every one needs logits.
    pub prompt_logprobs: Option<u32>,
    /// What is computed of this request is used again only for requests with the same salt. It changes no answer; it
    /// keeps others from learning by the clock what was asked.
    pub cache_salt: Option<String>,
}

impl Default for Request {
    /// Without a prompt, and so refused; one token, drawn from the model's own distribution.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            max_tokens: 1,
            min_tokens: 0,
            sampling: Sampling::default(),
            stop_tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            cache_salt: None,
        }
    }
}

impl Request {
    /// The most tokens that prompt and answer can have.
    #[must_use]
    pub fn most_tokens(&self) -> usize {
        self.prompt.len().saturating_add(self.max_tokens as usize)
    }
}

/// The seed of choice number `choice` of a request with this seed: choice 0 has the seed itself. The low 53 bits are
/// raised, modulo 2^53, by those of the `SplitMix64` finalizer of `choice * 0x9e3779b97f4a7c15`; the high 11 bits stay. So a seed
/// that JavaScript can write gives seeds that it can write, and no two of the first 2^20 choices share one.
#[must_use]
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    const LOW: u64 = (1 << 53) - 1;
    let mut z = u64::from(choice).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (seed & !LOW) | (seed.wrapping_add(z) & LOW)
}

/// A token with its log-probabilities: a generated one, or one of the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Its id.
    pub id: u32,
    /// Natural log of its probability, before temperature and penalties; where asked for, and not of a prompt's first
    /// token, which follows nothing.
    pub logprob: Option<f32>,
    /// The most likely tokens at this position with theirs, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_tokens` were generated.
    Length,
    /// This stop token was generated.
    StopToken(u32),
}

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, the stop token not counted.
    pub generated_tokens: u32,
    /// Tokens of the prompt that earlier requests had computed already.
    pub cached_tokens: u32,
}

/// What a request's owner is told: the prompt's log-probabilities if asked for, any number of tokens, then exactly one
/// `End` or `Error`.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt's tokens with their log-probabilities, once, before everything else.
    Prompt(Vec<TokenEvent>),
    /// The next token.
    Token(TokenEvent),
    /// The answer is complete.
    End(Finish),
    /// The request failed; nothing follows.
    Error(EngineError),
}

/// Where a request's events go. Called on the engine's thread, so it must not block.
pub trait EventSink: Send {
    /// Takes the event, or says why not.
    ///
    /// # Errors
    /// [`Refused`]; the engine then ends the request.
    fn offer(&mut self, event: Event) -> Result<(), Refused>;

    /// True once nobody will read further events: the engine then drops the request, queued or running.
    fn is_gone(&self) -> bool;
}

/// Why a sink did not take an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The reader is gone.
    Gone,
    /// The reader is too slow and its bound is reached.
    Full,
}

/// Why a request was not accepted. Nothing was queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("the queue is full ({limit} requests waiting); try again later")]
    QueueFull {
        /// Requests that may wait.
        limit: usize,
    },
    /// Those who wait may be given so many tokens that this request's are too many; try again later.
    #[error(
        "the waiting requests may take {waiting_tokens} tokens of prompts and answers and this one {request_tokens}; \
         {limit} may wait; try again later"
    )]
    QueueTokens {
        /// Prompts and longest answers of all that wait.
        waiting_tokens: usize,
        /// Prompts and longest answers of what was asked for now.
        request_tokens: usize,
        /// Tokens that may wait.
        limit: usize,
    },
    /// The prompt is empty.
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt,
    /// `max_tokens` is 0.
    #[error("max_tokens is 0; ask for at least one token")]
    NoTokens,
    /// Prompt and answer do not fit the context.
    #[error(
        "prompt ({prompt_tokens} tokens) plus max_tokens ({max_tokens}) exceed the context of {context_tokens} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for.
        max_tokens: u32,
        /// Tokens that fit.
        context_tokens: usize,
    },
    /// Prompt and answer need more pages than the KV cache has.
    #[error(
        "prompt and answer need {needed_pages} pages of {page_tokens} tokens; the KV cache has {total_pages} in all; ask \
         for less, or give the cache more memory"
    )]
    NeverFits {
        /// Pages that are needed.
        needed_pages: usize,
        /// Pages that there are.
        total_pages: usize,
        /// Tokens of a page.
        page_tokens: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Ids below this exist.
        vocab_size: usize,
    },
    /// A sampling parameter is outside its range.
    #[error("{name} is {value}; it must be {range}")]
    OutOfRange {
        /// The parameter.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// The engine is stopping or has stopped after a device error.
    #[error("the engine has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

/// Why an accepted request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The device failed; the engine stops.
    #[error("the device failed: {0}")]
    Device(String),
    /// The reader did not keep up.
    #[error("the reader did not keep up, so its answer was ended; read events as they come")]
    SlowReader,
    /// The client asked for the end.
    #[error("the job was cancelled")]
    Cancelled,
    /// The engine was stopped before the answer was complete.
    #[error("the server is shutting down")]
    Stopped,
    /// The request needs more pages than the KV cache has.
    #[error("the request needs {needed_pages} pages of the KV cache, which has {total_pages} in all")]
    NeverFits {
        /// Pages that are needed.
        needed_pages: usize,
        /// Pages that there are.
        total_pages: usize,
    },
    /// The model produced no usable number (every logit is NaN or negative infinity).
    #[error("the model gave no finite logit at position {position}; its weights may be damaged")]
    NoFiniteLogit {
        /// The position in the sequence.
        position: u32,
    },
}

impl EngineError {
    /// A stable code for clients.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Device(_) | Self::NoFiniteLogit { .. } => "INFERENCE_FAILED",
            Self::NeverFits { .. } => "INVALID_REQUEST",
            Self::SlowReader => "SLOW_READER",
            Self::Cancelled => "CANCELLED",
            Self::Stopped => "SHUTTING_DOWN",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::choice_seed;

    #[test]
    fn choices_have_seeds_of_their_own() {
        for seed in [0, 1, 7, (1 << 53) - 1] {
            let seeds: BTreeSet<u64> = (0..1 << 20).map(|choice| choice_seed(seed, choice)).collect();
            assert_eq!(seeds.len(), 1 << 20);
            assert!(seeds.iter().all(|&seed| seed < 1 << 53));
            assert_eq!(choice_seed(seed, 0), seed);
        }
        assert_eq!(choice_seed(u64::MAX, 0), u64::MAX);
        assert_eq!(choice_seed(u64::MAX, 9) >> 53, u64::MAX >> 53);
        // SplitMix64's published first value, of the seed 0, and what is left of it.
        assert_eq!(choice_seed(0, 1), 0xe220_a839_7b1d_cdaf & ((1 << 53) - 1));
    }
}
