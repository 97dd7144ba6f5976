//! Prefills: one that is recorded, filled up to a bucket and started again with other numbers gives the bits of the separate
//! operations, and so does one whose layers are our own tiles'.

use super::{Line, rehearsal};
use crate::device::{DeviceError, MemoryKind};
use crate::model::{KvCache, Model, Prefill, Step, StepLimits, Workspace};
use crate::ops::{self, PAGE};

/// A step that is compared: its rows, and how many prompts share them.
pub(super) type Shape = (usize, usize);

/// Of the quick check, which a server makes before it serves: all tiles of long prefills.
pub(super) const QUICK: [Shape; 4] = [(100, 3), (1000, 1), (1500, 1), (2100, 1)];

/// Of the full check: both sides of buckets' boundaries.
pub(super) const FULL: [Shape; 19] = [
    (2, 1),
    (15, 3),
    (16, 1),
    (17, 1),
    (33, 3),
    (63, 1),
    (64, 1),
    (65, 1),
    (65, 3),
    (130, 1),
    (200, 3),
    (500, 1),
    (500, 3),
    (513, 1),
    (1000, 3),
    (1024, 1),
    (1025, 1),
    (1500, 3),
    (4500, 1),
];

/// Rows that a bucket has more than a step, at most; a workspace without them would have none filled up.
const PADDING: usize = 128;

/// A line, where such steps are recorded.
pub(super) fn check(model: &Model, shapes: &[Shape]) -> Result<Option<Line>, DeviceError> {
    // What is too long for the model's contexts is checked as far as it goes.
    let mut shapes: Vec<Shape> =
        shapes.iter().map(|&(rows, prompts)| (rows.min(model.context_tokens()), prompts)).collect();
    shapes.dedup();
    shapes.retain(|&(rows, prompts)| {
        (model.records_prefill(rows) || model.fuses_prefill(rows)) && (1..=rows).contains(&prompts)
    });
    let Some(most) = shapes.iter().copied().reduce(|(a, b), (c, d)| (a.max(c), b.max(d))) else { return Ok(None) };
    let mut pair = Pair::new(model, most)?;
    let (mut wrong, mut values) = (0, 0);
    for &(rows, prompts) in &shapes {
        let part = rows.div_ceil(prompts);
        let lengths: Vec<usize> = (0..rows).step_by(part).map(|start| part.min(rows - start)).collect();
        let (differing, seen) = pair.compare(&lengths, &Model::forward)?;
        (wrong, values) = (wrong + differing, values + seen);
    }
    Ok(Some(Line::new(
        "recorded and fused prefills = prefills by separate operations",
        format!("{wrong} of {values} logits, keys and values differ, {} steps of up to {} rows", shapes.len(), most.0),
        wrong == 0 && values > 0,
    )))
}

/// Computes a step that comes again.
type Forward<'a> = dyn Fn(&Model, &Step<'_>, &mut KvCache, &mut Workspace) -> Result<(), DeviceError> + 'a;

/// What both ways leave behind.
struct Pair<'a> {
    model: &'a Model,
    workspace: Workspace,
    expected: KvCache,
    found: KvCache,
}

impl<'a> Pair<'a> {
    /// For steps of at most so many rows and prompts.
    fn new(model: &'a Model, (rows, prompts): Shape) -> Result<Self, DeviceError> {
        // A page is nobody's.
        let pages = rows.div_ceil(PAGE) + prompts + 1;
        let limits =
            StepLimits { rows: rows + PADDING, decode_rows: 1, logits_rows: 2 * prompts, table_entries: pages };
        let workspace = model.workspace(limits)?;
        Ok(Self { model, workspace, expected: model.kv_cache(pages)?, found: model.kv_cache(pages)? })
    }

    /// How many logits and cache entries of how many differ between separate operations and `forward`, for prompts of these
    /// lengths. `forward` computes two such steps with other tokens before: it records the second and starts it again.
    fn compare(&mut self, lengths: &[usize], forward: &Forward<'_>) -> Result<(u64, u64), DeviceError> {
        let Self { model, workspace, expected, found } = self;
        let device = model.device();
        for cache in [&mut *expected, &mut *found] {
            cache.clear(device)?;
        }
        let rows = lengths.iter().sum();
        let (mut positions, mut row_tables, mut prefills, mut last_rows) = (vec![], vec![], vec![], vec![]);
        let mut pages = 0;
        for &length in lengths {
            let (first_row, table_len) = (positions.len(), length.div_ceil(PAGE));
            prefills.push(Prefill { first_row, rows: length, first_position: 0, table_start: pages, table_len });
            positions.extend(0..length as u32);
            row_tables.resize(positions.len(), pages as u32);
            last_rows.push(positions.len() as u32 - 1);
            pages += table_len;
        }
        // Page 0 is nobody's, and stays as it is.
        let page_tables: Vec<u32> = (1..=pages as u32).rev().collect();
        let step = Step {
            tokens: &[],
            positions: &positions,
            row_tables: &row_tables,
            page_tables: &page_tables,
            decode_rows: 0,
            prefills: &prefills,
            logits_rows: &last_rows,
        };
        let [tokens, others] = [7, 8].map(|seed| rehearsal::tokens(model, rows, seed));
        let step = Step { tokens: &tokens, ..step };

        let wanted = lengths.len();
        model.forward_plain(&step, expected, workspace)?;
        let mut logits =
            device.alloc_unwritten::<f32>(wanted * model.config().vocab, MemoryKind::Other, "self-test expectation")?;
        device.copy(workspace.logits(wanted)?, logits.slice_mut(..)?)?;

        for tokens in [&others, &others, &tokens] {
            forward(model, &Step { tokens, ..step }, found, workspace)?;
        }
        let wrong = u64::from(ops::differing(device, &workspace.logits(wanted)?, &logits.as_slice())?);
        let heads = model.heads();
        let stored = rows * model.config().layers * 2 * heads.kv_heads * heads.width;
        Ok((wrong + expected.differing(device, found)?, (logits.len() + stored) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{CpuOptions, Device};

    /// A way that computes something else: another token in one row, and a token too many.
    #[test]
    fn one_wrong_row_is_seen() {
        let device = Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap();
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
        let model = Model::load(&device, &folder, Some(128), &mut |_, _| {}).unwrap();
        let mut pair = Pair::new(&model, (20, 3)).unwrap();
        let mut differing = |wrong: Option<usize>, place: usize| {
            pair.compare(&[4, 9], &|model, step, cache, workspace| {
                let mut tokens = step.tokens.to_vec();
                let mut page_tables = step.page_tables.to_vec();
                if let Some(row) = wrong {
                    tokens[row] ^= 1;
                }
                page_tables[0] += place as u32;
                let step = Step { tokens: &tokens, page_tables: &page_tables, ..*step };
                model.forward(&step, cache, workspace)
            })
            .unwrap()
            .0
        };
        assert_eq!(differing(None, 0), 0);
        assert!(differing(Some(2), 0) > 0 && differing(Some(12), 0) > 0);
        assert!(differing(None, 1) > 0, "a page that is nobody's");
    }
}
