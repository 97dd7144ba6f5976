//! What a step computes, how large it may be, and what must hold of it.

use super::{KvCache, Model};
use crate::device::DeviceError;
use crate::ops::{PAGE, RowParameters, Segment};

/// Some rows of a step that are consecutive tokens of one sequence, more than one or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// Their first row in the step.
    pub first_row: usize,
    /// How many.
    pub rows: usize,
    /// The first one's position in its sequence.
    pub first_position: usize,
    /// Where their sequence's page table starts in [`Step::page_tables`].
    pub table_start: usize,
    /// Pages in that table.
    pub table_len: usize,
}

impl Prefill {
    pub(super) fn segment(&self) -> Segment {
        let Self { first_row, rows, first_position, table_start, .. } = *self;
        Segment { first_row, rows, first_position, table_start }
    }
}

/// What a step computes. A row is a token; first the rows that are one new token of a sequence each, then the prefills.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// \[T\] token ids.
    pub tokens: &'a [u32],
    /// \[T\] positions in their sequences.
    pub positions: &'a [u32],
    /// \[T\] where each row's sequence starts in `page_tables`.
    pub row_tables: &'a [u32],
    /// The page tables of all sequences, one after the other.
    pub page_tables: &'a [u32],
    /// Rows that are single tokens: these come first.
    pub decode_rows: usize,
    /// The other rows, in order and without gaps.
    pub prefills: &'a [Prefill],
    /// Rows whose logits are wanted.
    pub logits_rows: &'a [u32],
}

impl Step<'_> {
    /// An error where a kernel would otherwise fault.
    pub(super) fn check(&self, model: &Model, cache: &KvCache, limits: StepLimits) -> Result<(), DeviceError> {
        let (step, rows) = (self, self.tokens.len());
        let ordered = step.prefills.iter().try_fold(step.decode_rows, |next, prefill| {
            (prefill.first_row == next && prefill.table_start + prefill.table_len <= step.page_tables.len())
                .then_some(next + prefill.rows)
        });
        let wrong = if rows == 0 || step.positions.len() != rows || step.row_tables.len() != rows {
            Some("tokens, positions and row tables have one length, not 0")
        } else if ordered != Some(rows) {
            Some("decode rows and prefills follow each other without gaps")
        } else if rows > limits.rows
            || step.decode_rows > limits.decode_rows
            || step.logits_rows.len() > limits.logits_rows
            || step.page_tables.len() > limits.table_entries
        {
            Some("the step is inside the workspace's limits")
        } else if step.tokens.iter().any(|&id| id as usize >= model.config().vocab) {
            Some("every token is in the vocabulary")
        } else if step.positions.iter().any(|&position| position as usize >= model.context_tokens()) {
            Some("every position is in the context")
        } else if step.page_tables.iter().any(|&page| page as usize >= cache.page_count()) {
            Some("every page is in the cache")
        } else if step
            .row_tables
            .iter()
            .zip(step.positions)
            .any(|(&start, &position)| start as usize + position as usize / PAGE >= step.page_tables.len())
        {
            Some("every row has a page for its position")
        } else if step.logits_rows.iter().any(|&row| row as usize >= rows) {
            Some("logits are of rows of the step")
        } else {
            None
        };
        wrong.map_or(Ok(()), |rule| Err(DeviceError::InvalidParameter(format!("a step must be such that {rule}"))))
    }
}

/// Who chooses the tokens of the rows with logits.
#[derive(Clone, Copy, Debug)]
pub enum Choosing<'a> {
    /// Whoever asked for the step: it leaves logits.
    Caller,
    /// The step takes the likeliest token of each row. Where that is faster it writes no logits.
    Likeliest,
    /// The step draws a token of each row, from what the model said of it and these, one for each row.
    Drawn(&'a [RowParameters]),
}

impl Choosing<'_> {
    /// Whether some row is to be drawn by top-p from the whole vocabulary.
    pub(super) fn needs_whole_mass(&self) -> bool {
        matches!(self, Self::Drawn(draws) if draws.iter().any(RowParameters::needs_whole_mass))
    }
}

/// How large a step may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows.
    pub rows: usize,
    /// Rows that are single tokens.
    pub decode_rows: usize,
    /// Rows with logits.
    pub logits_rows: usize,
    /// Entries of all page tables together.
    pub table_entries: usize,
}
