//! Where a step's numbers lie among the indices of its workspace. It follows from how many there are of each kind, so that steps
//! with equal counts launch equal work on equal places.

use std::ops::Range;

use super::workspace::DRAW_ALIGN;
use super::{Choosing, Step};
use crate::ops::{NO_ROW, PrefillTiles, ROW_WORDS, RowParameters};

/// What a step leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Logits.
    Logits,
    /// The likeliest token of each row.
    Tokens,
    /// A drawn token of each row.
    Draws {
        /// For some row the mass of the whole vocabulary is needed.
        whole_mass: bool,
    },
}

impl Wanted {
    pub(super) fn of(choosing: Choosing<'_>) -> Self {
        match choosing {
            Choosing::Caller => Self::Logits,
            Choosing::Likeliest => Self::Tokens,
            Choosing::Drawn(_) => Self::Draws { whole_mass: choosing.needs_whole_mass() },
        }
    }
}

/// What a row that fills up a bucket draws: the likeliest of what is there, which is least work.
pub(super) const PADDING_DRAW: RowParameters = RowParameters {
    seed: 0,
    position: 0,
    top_k: 1,
    temperature: 0.0,
    top_p: 1.0,
    min_p: 0.0,
    repetition: 1.0,
    frequency: 0.0,
    presence: 0.0,
};

/// How many numbers of each kind a step has, padding included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Rows.
    pub(super) rows: usize,
    /// Rows with logits.
    pub(super) logits_rows: usize,
    /// Tiles of prefills.
    pub(super) tiles: usize,
    /// What is left of the rows with logits.
    pub(super) wanted: Wanted,
}

impl Layout {
    /// Which rows have logits.
    pub(super) fn logits_rows(&self) -> Range<usize> {
        3 * self.rows..3 * self.rows + self.logits_rows
    }

    /// The records of draws; none where none are wanted.
    pub(super) fn draws(&self) -> Range<usize> {
        let end = self.logits_rows().end;
        match self.wanted {
            Wanted::Logits | Wanted::Tokens => end..end,
            Wanted::Draws { .. } => {
                let start = end.next_multiple_of(DRAW_ALIGN);
                start..start + self.logits_rows * ROW_WORDS
            }
        }
    }

    /// The numbers of tiles.
    pub(super) fn tiles(&self) -> Range<usize> {
        let start = self.draws().end;
        start..start + PrefillTiles::numbers_of(self.tiles)
    }

    /// Where the page tables start. They are last: nothing else moves with their length.
    pub(super) fn page_tables(&self) -> usize {
        self.tiles().end
    }

    /// Writes a step's numbers to `staging`, as they will be uploaded. Rows that it lacks become rows of no sequence, and rows
    /// with logits that it lacks its first row once more. `tiles` are as many as the layout says.
    pub(super) fn stage(&self, step: &Step<'_>, choosing: Choosing<'_>, tiles: &PrefillTiles, staging: &mut Vec<u32>) {
        staging.clear();
        let padding = self.rows - step.tokens.len();
        for (part, pad) in [(step.tokens, 0), (step.positions, NO_ROW), (step.row_tables, 0)] {
            staging.extend_from_slice(part);
            staging.extend(std::iter::repeat_n(pad, padding));
        }
        staging.extend_from_slice(step.logits_rows);
        let padding = self.logits_rows - step.logits_rows.len();
        staging.extend(std::iter::repeat_n(0, padding));
        staging.resize(self.draws().start, 0);
        if let (Wanted::Draws { .. }, Choosing::Drawn(draws)) = (self.wanted, choosing) {
            let padding = std::iter::repeat_n(&PADDING_DRAW, padding);
            staging.extend(draws.iter().chain(padding).flat_map(|draw| draw.words()));
        }
        staging.extend_from_slice(&tiles.numbers);
        staging.extend_from_slice(step.page_tables);
    }
}
