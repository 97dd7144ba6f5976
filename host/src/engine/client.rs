//! A request's owner: what it asked for, and what it is told.

use std::collections::BTreeMap;

use super::sampler::{SampleRow, Sampled};
use super::{EngineError, Event, EventSink, Finish, FinishReason, Refused, Request, TokenEvent};

/// The owner of a running or waiting request.
pub(super) struct Client {
    /// Without its prompt, which the scheduler has.
    request: Request,
    sink: Box<dyn EventSink>,
    prompt_tokens: u32,
    generated_tokens: u32,
    /// How often each token was generated.
    counts: BTreeMap<u32, u32>,
    /// The prompt with its log-probabilities as far as they are known; empty once it was told, or where nobody asked.
    prompt: Vec<TokenEvent>,
}

impl Client {
    pub(super) fn new(request: Request, prompt: &[u32], sink: Box<dyn EventSink>) -> Self {
        let first = prompt.first().filter(|_| request.prompt_logprobs.is_some());
        let prompt_tokens = prompt.len() as u32;
        let prompt = first.map(|&id| TokenEvent { id, logprob: None, top: Vec::new() }).into_iter().collect();
        Self { request, sink, prompt_tokens, generated_tokens: 0, counts: BTreeMap::new(), prompt }
    }

    /// How many most likely tokens are wanted at each place of the prompt, where any are.
    pub(super) fn prompt_logprobs(&self) -> Option<u32> {
        self.request.prompt_logprobs
    }

    /// Takes the log-probabilities of the prompt's next tokens.
    pub(super) fn take_scores(&mut self, tokens: impl Iterator<Item = TokenEvent>) {
        self.prompt.extend(tokens);
    }

    /// Nobody reads any more.
    pub(super) fn is_gone(&self) -> bool {
        self.sink.is_gone()
    }

    /// How to choose the token at `position`.
    pub(super) fn sample_row(&self, position: u32) -> SampleRow<'_> {
        let Request { sampling, stop_tokens, logprobs, min_tokens, .. } = &self.request;
        let banned = if self.generated_tokens < *min_tokens { &stop_tokens[..] } else { &[] };
        SampleRow { sampling, counts: &self.counts, banned, position, logprobs: *logprobs }
    }

    /// Whether the answer goes on behind the next token, unless it is one that ends it.
    pub(super) fn goes_on(&self) -> bool {
        self.generated_tokens + 1 < self.request.max_tokens
    }

    /// Tells of the token chosen at `position`. The token if the answer goes on, none if it has ended.
    pub(super) fn deliver(&mut self, sampled: Sampled, position: u32, cached_tokens: usize) -> Option<u32> {
        if !self.prompt.is_empty() {
            let prompt = std::mem::take(&mut self.prompt);
            self.offer(Event::Prompt(prompt))?;
        }
        if self.request.max_tokens == 0 {
            self.finish(FinishReason::Length, cached_tokens);
            return None;
        }
        let Some(id) = sampled.id else {
            self.fail(EngineError::NoFiniteLogit { position });
            return None;
        };
        if self.request.stop_tokens.contains(&id) {
            self.finish(FinishReason::StopToken(id), cached_tokens);
            return None;
        }
        self.generated_tokens += 1;
        *self.counts.entry(id).or_insert(0) += 1;
        self.offer(Event::Token(TokenEvent { id, logprob: sampled.logprob, top: sampled.top }))?;
        if self.generated_tokens == self.request.max_tokens {
            self.finish(FinishReason::Length, cached_tokens);
            return None;
        }
        Some(id)
    }

    /// Says that the request has failed.
    pub(super) fn fail(&mut self, error: EngineError) {
        // Whether anybody still listens does not matter any more.
        let _ = self.sink.offer(Event::Error(error));
    }

    fn finish(&mut self, reason: FinishReason, cached_tokens: usize) {
        let finish = Finish {
            reason,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            cached_tokens: cached_tokens as u32,
        };
        self.offer(Event::End(finish));
    }

    /// None if the reader is gone or too slow: then it is over.
    fn offer(&mut self, event: Event) -> Option<()> {
        match self.sink.offer(event) {
            Ok(()) => Some(()),
            Err(Refused::Gone) => None,
            Err(Refused::Full) => {
                self.fail(EngineError::SlowReader);
                None
            }
        }
    }
}
