//! A request on its way through the engine: what is known of its tokens.

use std::collections::BTreeMap;

use super::{EventSink, Request};

/// A running request. In its tokens, `0 <= cached <= tokens.len()`: the first `cached` have keys and values in the cache.
pub(super) struct Sequence {
    pub(super) request: Request,
    pub(super) sink: Box<dyn EventSink>,
    /// Prompt and generated tokens.
    pub(super) tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub(super) cached: usize,
    /// How often each token was generated.
    pub(super) counts: BTreeMap<u32, u32>,
}

impl Sequence {
    pub(super) fn new(request: Request, sink: Box<dyn EventSink>) -> Self {
        Self { tokens: request.prompt.clone(), request, sink, cached: 0, counts: BTreeMap::new() }
    }

    /// Tokens generated.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Takes a generated token.
    pub(super) fn push(&mut self, id: u32) {
        self.tokens.push(id);
        *self.counts.entry(id).or_insert(0) += 1;
    }
}
