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
    /// Tokens to generate at most; at least 1. Prompt and answer together must fit the context.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer (end-of-sequence ids and the client's own). The ending token is reported in
    /// [`Finish`], not as a [`Event::Token`].
    pub stop_tokens: Vec<u32>,
    /// Report log-probabilities, and those of the `n` most likely tokens (0 to 20) at each position.
    pub logprobs: Option<u32>,
    /// What is computed of this request is used again only for requests with the same salt. It changes no answer; it
    /// keeps others from learning by the clock what was asked.
    pub cache_salt: Option<String>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Its id.
    pub id: u32,
    /// Natural log of its probability, before temperature and penalties; with [`Request::logprobs`] only.
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

/// What a request's owner is told: any number of tokens, then exactly one `End` or `Error`.
#[derive(Clone, Debug)]
pub enum Event {
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
