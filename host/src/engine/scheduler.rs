//! What each step computes: who may run, with which pages, and how many tokens of each. No tensors, no device.
//!
//! Requests run in the order of their arrival: every running sequence is older than every waiting one. A step has a
//! budget of tokens. Sequences that generate get one each; what is left goes to prompts, one half to the oldest, so that
//! a long prompt always moves, one half to those with the least to do, so that a short one does not stand behind it.
//! When no page is left, the youngest running sequence gives up its pages and waits again, its tokens kept: computed
//! once more, they are the same.

use std::collections::{HashSet, VecDeque};

use super::pages::{PageCounts, PagePool};
use super::sequence::{Sequence, SequenceId};

/// What bounds a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SchedulerLimits {
    /// Tokens of a page.
    pub(super) page_tokens: usize,
    /// Pages of the cache.
    pub(super) pages: usize,
    /// Sequences that run at once.
    pub(super) running: usize,
    /// Tokens of a step; at least 2, so that neither prompts nor answers stop for the other.
    pub(super) step_tokens: usize,
    /// Rows of a step whose logits are computed; at least as many as sequences can be in a step.
    pub(super) logits_rows: usize,
}

impl SchedulerLimits {
    /// Pages for so many tokens.
    pub(super) fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Tokens of a step that generating sequences leave to prompts, where there are any.
    pub(super) fn reserved_tokens(&self) -> usize {
        (self.step_tokens / 4).max(1)
    }
}

/// Some consecutive tokens of one sequence that a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) id: SequenceId,
    /// Position of the first.
    pub(super) first: usize,
    /// How many.
    pub(super) rows: usize,
    /// The last one is the sequence's last: its logits choose the next token.
    pub(super) wants_token: bool,
}

/// What a step computes: at most one segment of a sequence, those of one row first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) segments: Vec<Segment>,
}

impl Plan {
    /// Tokens in all.
    pub(super) fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.rows).sum()
    }
}

/// A request that no state of the cache could hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NeverFits {
    pub(super) needed_pages: usize,
    pub(super) total_pages: usize,
}

/// The scheduler. `running` and `waiting` are sorted by id, and every id of the first is below every id of the second.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: SchedulerLimits,
    pub(super) pool: PagePool,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    next_id: SequenceId,
    /// The last sequence that generated; the turn goes on behind it where the budget is smaller than their number.
    last_decoded: SequenceId,
    preemptions: u64,
}

impl Scheduler {
    pub(super) fn new(limits: SchedulerLimits) -> Self {
        let limits = SchedulerLimits { step_tokens: limits.step_tokens.max(2), ..limits };
        Self {
            limits,
            pool: PagePool::new(limits.pages),
            running: Vec::new(),
            waiting: VecDeque::new(),
            next_id: 0,
            last_decoded: 0,
            preemptions: 0,
        }
    }

    pub(super) fn limits(&self) -> &SchedulerLimits {
        &self.limits
    }

    pub(super) fn running(&self) -> &[Sequence] {
        &self.running
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Tokens that the waiting sequences may come to.
    pub(super) fn waiting_tokens(&self) -> usize {
        self.waiting.iter().map(|sequence| sequence.most_tokens).sum()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub(super) fn pages(&self) -> PageCounts {
        self.pool.counts()
    }

    /// Times a sequence had to give up its pages.
    pub(super) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Queues a sequence that may grow to `most_tokens`, prompt included. The prompt is not empty.
    ///
    /// # Errors
    /// It could never fit.
    pub(super) fn submit(
        &mut self,
        prompt: Vec<u32>,
        most_tokens: usize,
        salt: Option<&str>,
    ) -> Result<SequenceId, NeverFits> {
        let needed_pages = self.limits.pages_for(most_tokens);
        if needed_pages > self.limits.pages {
            return Err(NeverFits { needed_pages, total_pages: self.limits.pages });
        }
        self.next_id += 1;
        self.waiting.push_back(Sequence::new(self.next_id, prompt, most_tokens, self.limits.page_tokens, salt));
        Ok(self.next_id)
    }

    /// Wants the logits of the whole prompt of a sequence that was queued just now.
    pub(super) fn score_prompt(&mut self, id: SequenceId) {
        if let Some(sequence) = self.waiting.back_mut().filter(|sequence| sequence.id == id) {
            sequence.score_prompt();
        }
    }

    /// The running sequence with this id.
    pub(super) fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.place(id).map(|index| &self.running[index])
    }

    fn place(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok()
    }

    /// Takes a sequence out, running or waiting; its pages are free at once.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = match self.place(id) {
            Some(index) => self.running.remove(index),
            None => {
                let index = self.waiting.binary_search_by_key(&id, |sequence| sequence.id).ok()?;
                self.waiting.remove(index)?
            }
        };
        sequence.release(&mut self.pool);
        Some(sequence)
    }

    /// What the next step computes. Empty when there is nothing to do, or in a step in which the one whose turn it was
    /// had to give up its pages.
    pub(super) fn plan(&mut self) -> Plan {
        let prompts = !self.waiting.is_empty() || self.running.iter().any(|sequence| !sequence.is_decoding());
        let reserved = if prompts { self.limits.reserved_tokens() } else { 0 };
        let mut plan = Plan::default();
        let before = self.preemptions;
        for id in self.choose_decodes(self.limits.step_tokens - reserved) {
            if let Some(index) = self.give_page(id) {
                let sequence = &self.running[index];
                plan.segments.push(Segment { id, first: sequence.computed, rows: 1, wants_token: true });
            }
        }
        // Who was put back in this step is not taken in again by it.
        let settled = self.running.len();
        if self.preemptions == before {
            self.admit();
        }
        self.plan_prompts(&mut plan, settled);
        plan
    }

    /// The step behind `plan`, which is committed and whose tokens are not known yet, those behind ended prompts among them: one
    /// more token of each of its sequences.
    /// Only where nothing else is to be done, and where every sequence has, or gets without anybody giving up pages, a page
    /// for it. The pages stay theirs if the step is not computed.
    pub(super) fn plan_ahead(&mut self, plan: &Plan) -> Option<Plan> {
        let all_go_on = plan.segments.iter().all(|segment| segment.wants_token);
        if !all_go_on || !self.waiting.is_empty() || plan.segments.len() != self.running.len() {
            return None;
        }
        let mut ahead = Plan::default();
        for segment in &plan.segments {
            let index = self.place(segment.id)?;
            let first = self.running[index].computed;
            if first != self.running[index].tokens.len() {
                return None;
            }
            while self.running[index].pages.len() < self.limits.pages_for(first + 1) {
                let page = self.pool.allocate()?;
                self.running[index].pages.push(page);
            }
            ahead.segments.push(Segment { id: segment.id, first, rows: 1, wants_token: true });
        }
        Some(ahead)
    }

    /// The generating sequences whose turn it is, oldest first.
    fn choose_decodes(&mut self, most: usize) -> Vec<SequenceId> {
        let ready: Vec<SequenceId> = self.running.iter().filter(|s| s.is_decoding()).map(|s| s.id).collect();
        let start = if ready.len() > most { ready.partition_point(|&id| id <= self.last_decoded) } else { 0 };
        let mut chosen: Vec<SequenceId> = ready[start..].iter().chain(&ready[..start]).take(most).copied().collect();
        if let Some(&last) = chosen.last() {
            self.last_decoded = last;
        }
        chosen.sort_unstable();
        chosen
    }

    /// Makes sure that there is a page for the last token of `id`; where it runs then. The youngest pays.
    fn give_page(&mut self, id: SequenceId) -> Option<usize> {
        loop {
            let index = self.place(id)?;
            let sequence = &self.running[index];
            if sequence.page_count() <= sequence.pages.len() {
                return Some(index);
            }
            match self.pool.allocate() {
                Some(page) => self.running[index].pages.push(page),
                None => self.preempt(),
            }
        }
    }

    /// Puts the youngest running sequence back in front of the queue.
    fn preempt(&mut self) {
        if let Some(mut youngest) = self.running.pop() {
            youngest.release(&mut self.pool);
            youngest.cached_tokens = 0;
            self.waiting.push_front(youngest);
            self.preemptions += 1;
        }
    }

    /// Lets the oldest waiting sequences run as long as there is a place and there are pages for all their tokens, and
    /// one more for each that runs already: otherwise the newcomer would soon be put back.
    fn admit(&mut self) {
        while self.running.len() < self.limits.running
            && let Some(sequence) = self.waiting.front()
        {
            let shared = sequence.adoptable().iter().map_while(|key| self.pool.find(key)).filter(|&held| held).count();
            if self.pool.available() < sequence.page_count() - shared + self.running.len() {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            sequence.adopt(&mut self.pool);
            while sequence.pages.len() < sequence.page_count()
                && let Some(page) = self.pool.allocate()
            {
                sequence.pages.push(page);
            }
            self.running.push(sequence);
        }
    }

    /// Spends what is left of the budget on sequences with more than one token to compute, and on those that were
    /// admitted just now: the running ones from `settled` on.
    fn plan_prompts(&mut self, plan: &mut Plan, settled: usize) {
        let mut left = self.limits.step_tokens - plan.rows();
        let mut prompts = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if index >= settled || !sequence.is_decoding() {
                // Another request may have computed the next pages since.
                sequence.adopt(&mut self.pool);
                prompts.push((index, 0));
            }
        }
        // Logits rows that nobody needs for the next token: one is kept for each sequence, which may score with its own.
        let mut spare = self.limits.logits_rows.saturating_sub(plan.segments.len() + prompts.len());
        let mut by_length: Vec<usize> = (0..prompts.len()).collect();
        by_length.sort_by_key(|&place| self.running[prompts[place].0].remaining());

        // Pages that this step computes. Whoever needs one of them next waits one step and finds it computed.
        let mut computing = HashSet::new();
        let oldest = (0..prompts.len()).map(|place| (place, true));
        let mut half = left.div_ceil(2);
        for (place, is_oldest_half) in oldest.chain(by_length.into_iter().map(|place| (place, false))) {
            let (index, given) = &mut prompts[place];
            let sequence = &self.running[*index];
            let waits = *given == 0 && sequence.next_key().is_some_and(|key| computing.contains(key));
            let most = if is_oldest_half { half } else { left };
            let mut rows = if waits { 0 } else { most.min(sequence.remaining() - *given) };
            if sequence.is_scoring() {
                let without = sequence.rows_before_scores() + 1;
                let taken = given.saturating_sub(without);
                rows = rows.min(without + taken + spare - *given);
                spare -= (*given + rows).saturating_sub(without) - taken;
            }
            if rows > 0 {
                *given += rows;
                left -= rows;
                half -= if is_oldest_half { rows } else { 0 };
                computing.extend(sequence.keys_of_next(*given).iter().copied());
            }
        }
        let mut segments: Vec<Segment> = prompts
            .into_iter()
            .filter(|&(_, rows)| rows > 0)
            .map(|(index, rows)| {
                let sequence = &self.running[index];
                let wants_token = rows == sequence.remaining();
                Segment { id: sequence.id, first: sequence.computed, rows, wants_token }
            })
            .collect();
        segments.sort_by_key(|segment| segment.rows > 1);
        plan.segments.append(&mut segments);
    }

    /// Takes note that a plan was computed.
    pub(super) fn commit(&mut self, plan: &Plan) {
        for segment in &plan.segments {
            if let Some(index) = self.place(segment.id) {
                self.running[index].advance(segment.rows, &mut self.pool);
            }
        }
    }

    /// Gives a running sequence its next token.
    pub(super) fn push(&mut self, id: SequenceId, token: u32) {
        if let Some(index) = self.place(id) {
            self.running[index].push(token);
        }
    }

    /// Recounts the pages and checks the order of arrival.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn check_integrity(&self) -> Result<(), String> {
        self.pool.check_integrity(self.running.iter().map(|sequence| &sequence.pages[..]))?;
        let ids = || self.running.iter().chain(&self.waiting).map(|sequence| sequence.id);
        if ids().zip(ids().skip(1)).any(|(older, younger)| older >= younger) {
            return Err("running and waiting sequences are not in the order of arrival".to_owned());
        }
        if self.running.len() > self.limits.running {
            return Err(format!("{} sequences run, {} may", self.running.len(), self.limits.running));
        }
        match self.waiting.iter().find(|sequence| !sequence.pages.is_empty()) {
            Some(sequence) => Err(format!("sequence {} waits and has pages", sequence.id)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
