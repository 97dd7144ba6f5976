//! A plan as the model takes it: tokens, positions, page tables.

use std::ops::Range;

use super::scheduler::{Plan, Scheduler};
use super::sequence::SequenceId;
use crate::model::{Prefill, Step};

/// The arrays of a step, filled anew for each and kept for their memory.
#[derive(Debug, Default)]
pub(super) struct Batch {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    row_tables: Vec<u32>,
    page_tables: Vec<u32>,
    decode_rows: usize,
    prefills: Vec<Prefill>,
    logits_rows: Vec<u32>,
    choosing_rows: usize,
    scores: Vec<Scores>,
}

/// Rows of a prompt whose logits a step computes for their own sake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scores {
    pub(super) id: SequenceId,
    /// Their positions; each row's logits are of the token behind it.
    pub(super) positions: Range<usize>,
}

impl Batch {
    /// Takes `plan`, whose sequences run in `scheduler`.
    pub(super) fn fill(&mut self, plan: &Plan, scheduler: &Scheduler) {
        self.tokens.clear();
        self.positions.clear();
        self.row_tables.clear();
        self.page_tables.clear();
        self.prefills.clear();
        self.logits_rows.clear();
        self.scores.clear();
        let mut scored_rows = Vec::new();
        self.decode_rows = 0;
        for segment in &plan.segments {
            let Some(sequence) = scheduler.sequence(segment.id) else { continue };
            let (first_row, end) = (self.tokens.len(), segment.first + segment.rows);
            let table_start = self.page_tables.len();
            let table_len = scheduler.limits().pages_for(end);
            self.page_tables.extend_from_slice(&sequence.pages[..table_len]);
            // A token that is not known yet is on the device.
            self.tokens.extend((segment.first..end).map(|place| sequence.tokens.get(place).copied().unwrap_or(0)));
            self.positions.extend(segment.first as u32..end as u32);
            self.row_tables.resize(first_row + segment.rows, table_start as u32);
            if segment.rows == 1 {
                self.decode_rows += 1;
            } else {
                self.prefills.push(Prefill {
                    first_row,
                    rows: segment.rows,
                    first_position: segment.first,
                    table_start,
                    table_len,
                });
            }
            if segment.wants_token {
                self.logits_rows.push(self.tokens.len() as u32 - 1);
            }
            let positions = sequence.scores_of_next(segment.rows);
            if !positions.is_empty() {
                scored_rows.extend(positions.clone().map(|position| (first_row + position - segment.first) as u32));
                self.scores.push(Scores { id: segment.id, positions });
            }
        }
        self.choosing_rows = self.logits_rows.len();
        self.logits_rows.append(&mut scored_rows);
    }

    /// Logits rows that choose a token: the first ones.
    pub(super) fn choosing_rows(&self) -> usize {
        self.choosing_rows
    }

    /// Whose logits follow those that choose a token, in this order.
    pub(super) fn scores(&self) -> &[Scores] {
        &self.scores
    }

    /// The step.
    pub(super) fn step(&self) -> Step<'_> {
        Step {
            tokens: &self.tokens,
            positions: &self.positions,
            row_tables: &self.row_tables,
            page_tables: &self.page_tables,
            decode_rows: self.decode_rows,
            prefills: &self.prefills,
            logits_rows: &self.logits_rows,
        }
    }
}
