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
}

impl Client {
    pub(super) fn new(request: Request, prompt_tokens: usize, sink: Box<dyn EventSink>) -> Self {
        Self { request, sink, prompt_tokens: prompt_tokens as u32, generated_tokens: 0, counts: BTreeMap::new() }
    }

    /// Nobody reads any more.
    pub(super) fn is_gone(&self) -> bool {
        self.sink.is_gone()
    }

    /// How to choose the token at `position`.
    pub(super) fn sample_row(&self, position: u32) -> SampleRow<'_> {
        SampleRow { sampling: &self.request.sampling, counts: &self.counts, position, logprobs: self.request.logprobs }
    }

    /// Tells of the token chosen at `position`. The token if the answer goes on, none if it has ended.
    pub(super) fn deliver(&mut self, sampled: Sampled, position: u32, cached_tokens: usize) -> Option<u32> {
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
