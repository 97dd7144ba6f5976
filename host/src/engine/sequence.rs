//! A request on its way through the scheduler: its tokens, and the pages that hold what was computed of them.

use std::ops::Range;

use super::pages::{PageId, PageKey, PagePool};

/// Ids rise in the order of submission: a smaller id is an older request.
pub(super) type SequenceId = u64;

/// A sequence of tokens. `computed < tokens.len()` between steps, or equal while the next token is being chosen; pages
/// cover at least the computed tokens.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Prompt and generated tokens.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: usize,
    /// The most that `tokens` can become.
    pub(super) most_tokens: usize,
    /// Places of the prompt whose logits were taken, or need not be: rows from here to the last but one of the prompt are
    /// wanted. The last one's choose the first token in any case.
    scored: usize,
    /// Tokens whose keys and values are in the pages.
    pub(super) computed: usize,
    pub(super) pages: Vec<PageId>,
    /// Tokens of the prompt that this request found computed.
    pub(super) cached_tokens: usize,
    page_tokens: usize,
    root: PageKey,
    /// One for each page full of tokens, computed or not.
    keys: Vec<PageKey>,
}

impl Sequence {
    pub(super) fn new(
        id: SequenceId,
        prompt: Vec<u32>,
        most_tokens: usize,
        page_tokens: usize,
        salt: Option<&str>,
    ) -> Self {
        let mut sequence = Self {
            id,
            prompt_tokens: prompt.len(),
            most_tokens,
            scored: prompt.len().saturating_sub(1),
            tokens: prompt,
            computed: 0,
            pages: Vec::new(),
            cached_tokens: 0,
            page_tokens,
            root: PageKey::root(salt),
            keys: Vec::new(),
        };
        sequence.extend_keys();
        sequence
    }

    fn extend_keys(&mut self) {
        for page in self.keys.len()..self.tokens.len() / self.page_tokens {
            let tokens = &self.tokens[page * self.page_tokens..(page + 1) * self.page_tokens];
            let key = self.keys.last().unwrap_or(&self.root).child(tokens);
            self.keys.push(key);
        }
    }

    /// Tokens still to be computed before the next one can be chosen.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Only the last token is missing.
    pub(super) fn is_decoding(&self) -> bool {
        self.remaining() == 1
    }

    /// Pages that all its tokens need.
    pub(super) fn page_count(&self) -> usize {
        self.tokens.len().div_ceil(self.page_tokens)
    }

    /// The keys of the pages that it could take from others: all full ones but that of the last token, which is
    /// computed in any case, for its logits. Shared pages are never written.
    pub(super) fn shareable(&self) -> &[PageKey] {
        &self.keys[..(self.tokens.len() - 1) / self.page_tokens]
    }

    /// The logits of the whole prompt are wanted. Before anything is computed.
    pub(super) fn score_prompt(&mut self) {
        self.scored = 0;
    }

    /// Rows of the prompt are still to be computed for their logits.
    pub(super) fn is_scoring(&self) -> bool {
        self.scored + 1 < self.prompt_tokens
    }

    /// Of the next `rows` rows those whose logits are wanted for the prompt: their positions.
    pub(super) fn scores_of_next(&self, rows: usize) -> Range<usize> {
        let first = self.scored.max(self.computed);
        first..(self.computed + rows).min(self.prompt_tokens - 1).max(first)
    }

    /// How many of the next rows there are before the first whose logits are wanted.
    pub(super) fn rows_before_scores(&self) -> usize {
        self.scored.saturating_sub(self.computed)
    }

    /// The keys of the pages that it may take from others: where logits are wanted, the page has to be computed.
    pub(super) fn adoptable(&self) -> &[PageKey] {
        let keys = self.shareable();
        if self.is_scoring() { &keys[..keys.len().min(self.scored / self.page_tokens)] } else { keys }
    }

    /// The key of the page at whose start it stands, if it could be taken from others.
    pub(super) fn next_key(&self) -> Option<&PageKey> {
        let at_start = self.computed.is_multiple_of(self.page_tokens);
        self.adoptable().get(self.computed / self.page_tokens).filter(|_| at_start)
    }

    /// The shareable ones among the pages that the next `rows` tokens are in.
    pub(super) fn keys_of_next(&self, rows: usize) -> &[PageKey] {
        let shareable = self.shareable();
        let first = (self.computed / self.page_tokens).min(shareable.len());
        let end = (self.computed + rows).div_ceil(self.page_tokens).min(shareable.len());
        &shareable[first..end]
    }

    /// Takes the next pages from the pool as long as somebody has computed them.
    pub(super) fn adopt(&mut self, pool: &mut PagePool) {
        while let Some(key) = self.next_key() {
            let Some(page) = pool.acquire(key) else { return };
            let index = self.computed / self.page_tokens;
            match self.pages.get_mut(index) {
                Some(own) => pool.release(std::mem::replace(own, page)),
                None => self.pages.push(page),
            }
            self.computed += self.page_tokens;
            if self.tokens.len() == self.prompt_tokens {
                self.cached_tokens += self.page_tokens;
            }
        }
    }

    /// Takes note that the next `rows` tokens are computed, and lets others have the pages that are full now.
    pub(super) fn advance(&mut self, rows: usize, pool: &mut PagePool) {
        let before = self.computed / self.page_tokens;
        self.scored = self.scores_of_next(rows).end.max(self.scored);
        self.computed += rows;
        for index in before..self.computed / self.page_tokens {
            pool.publish(self.pages[index], self.keys[index]);
            if rows > 1 {
                pool.count_miss();
            }
        }
    }

    /// Takes the next token.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.extend_keys();
    }

    /// Gives all pages back. The last ones first, so that they go before those they depend on.
    pub(super) fn release(&mut self, pool: &mut PagePool) {
        for page in self.pages.drain(..).rev() {
            pool.release(page);
        }
        self.computed = 0;
    }
}
