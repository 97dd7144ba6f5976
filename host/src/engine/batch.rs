//! A plan as the model takes it: tokens, positions, page tables.

use super::scheduler::{Plan, Scheduler};
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
        self.decode_rows = 0;
        for segment in &plan.segments {
            let Some(sequence) = scheduler.sequence(segment.id) else { continue };
            let (first_row, end) = (self.tokens.len(), segment.first + segment.rows);
            let table_start = self.page_tables.len();
            let table_len = scheduler.limits().pages_for(end);
            self.page_tables.extend_from_slice(&sequence.pages[..table_len]);
            self.tokens.extend_from_slice(&sequence.tokens[segment.first..end]);
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
        }
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
