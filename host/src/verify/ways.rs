//! Decode steps: every way of computing one gives the bits of the separate operations.

use super::Line;
use super::rehearsal;
use crate::device::{DeviceError, MemoryKind};
use crate::model::{Choosing, DecodeWay, KvCache, Model, Prefill, Step, StepLimits, Workspace};
use crate::ops::{self, PAGE};

/// Rows of the quick check, which a server makes before it serves: every number of rows for which a way is chosen, with
/// padding and without.
pub(super) const QUICK: [usize; 8] = [1, 3, 8, 9, 20, 33, 100, 130];

/// Rows of the full check.
pub(super) const FULL: [usize; 14] = [1, 2, 3, 4, 5, 7, 8, 9, 16, 23, 64, 65, 130, 256];

/// Full pages that all rows share: contexts of six, four and two pages. The quick check takes the longest that fits and has the way;
/// of one kernel, which is another one for contexts of few pages, two.
const SHARED: [usize; LENGTHS] = [5, 3, 1];

/// Lengths of contexts that there are.
pub(super) const LENGTHS: usize = 3;

/// In the full check of one kernel, pages that come before these: more spans than blocks compute or merge at once.
const MANY: usize = 69;

/// Steps that give each row a history of its own.
const OWN: usize = 3;

/// A line for each way that serves some of `counts` at some length, checked at one such length or at several. A model whose contexts are too
/// short to be checked does not hold: what cannot be checked is not used.
pub(super) fn check(model: &Model, counts: &[usize], lengths: usize) -> Result<Vec<(DecodeWay, Line)>, DeviceError> {
    let mut lines = Vec::new();
    for way in [DecodeWay::Whole, DecodeWay::Few, DecodeWay::Tiles, DecodeWay::Recorded] {
        let (mut wrong, mut values, mut compared) = (0, 0, Vec::new());
        let fits = |shared: &usize| (shared + 1) * PAGE <= model.context_tokens();
        let mut left = match way {
            DecodeWay::Whole if lengths == LENGTHS => LENGTHS + 1,
            DecodeWay::Whole => lengths.max(2),
            _ => lengths,
        };
        let many = (left > LENGTHS).then_some(MANY);
        for shared in many.into_iter().chain(SHARED).filter(fits) {
            let of_way = |rows: &usize| model.decode_way(*rows, (shared + 1) * PAGE) == Some(way);
            let counts: Vec<usize> = counts.iter().copied().filter(of_way).collect();
            let Some(&most) = counts.last() else { continue };
            if left == 0 {
                break;
            }
            left -= 1;
            let mut batch = Batch::new(model, most, shared)?;
            for &rows in &counts {
                let (differing, seen) = batch.compare(rows, &|model, step, cache, workspace, greedy| {
                    model.forward_choosing(step, choosing(greedy), cache, workspace)
                })?;
                (wrong, values) = (wrong + differing, values + seen);
            }
            compared.extend(counts);
        }
        // Where a model's contexts are too short to be checked, a way that they would take does not hold.
        if compared.is_empty() && !counts.iter().any(|&rows| model.decode_way(rows, 1) == Some(way)) {
            continue;
        }
        compared.sort_unstable();
        compared.dedup();
        let what = match way {
            DecodeWay::Whole => "one kernel",
            DecodeWay::Few => "fused layers",
            DecodeWay::Tiles => "our tiles",
            DecodeWay::Recorded => "recorded layers",
        };
        let (first, last) = (compared.first().copied().unwrap_or(0), compared.last().copied().unwrap_or(0));
        lines.push((
            way,
            Line::new(
                format!("decode steps by {what} = by separate operations"),
                format!("{wrong} of {values} values differ, {} batches of {first} to {last} rows", compared.len()),
                wrong == 0 && values > 0,
            ),
        ));
    }
    Ok(lines)
}

/// Computes a step; the last argument says whether the likeliest tokens are wanted or logits.
type Forward<'a> = dyn Fn(&Model, &Step<'_>, &mut KvCache, &mut Workspace, bool) -> Result<(), DeviceError> + 'a;

fn choosing<'a>(greedy: bool) -> Choosing<'a> {
    if greedy { Choosing::Likeliest } else { Choosing::Caller }
}

/// Sequences that share their first pages and have one of their own each.
struct Batch<'a> {
    model: &'a Model,
    cache: KvCache,
    workspace: Workspace,
    shared: usize,
}

impl<'a> Batch<'a> {
    fn new(model: &'a Model, rows: usize, shared: usize) -> Result<Self, DeviceError> {
        let prompt = rehearsal::tokens(model, shared * PAGE, 3);
        let limits = StepLimits {
            rows: rows.max(prompt.len()),
            decode_rows: rows,
            logits_rows: rows,
            table_entries: rows * (shared + 1),
        };
        let mut cache = model.kv_cache(shared + rows)?;
        let mut workspace = model.workspace(limits)?;
        let pages: Vec<u32> = (0..shared as u32).collect();
        let positions: Vec<u32> = (0..prompt.len() as u32).collect();
        let prefill =
            Prefill { first_row: 0, rows: prompt.len(), first_position: 0, table_start: 0, table_len: shared };
        let step = Step {
            tokens: &prompt,
            positions: &positions,
            row_tables: &vec![0; prompt.len()],
            page_tables: &pages,
            decode_rows: 0,
            prefills: &[prefill],
            logits_rows: &[],
        };
        model.forward_plain(&step, &mut cache, &mut workspace)?;
        let mut batch = Self { model, cache, workspace, shared };
        for place in 0..OWN {
            batch.step(rows, place, Model::forward_plain)?;
        }
        Ok(batch)
    }

    fn table(&self, row: usize) -> Vec<u32> {
        (0..self.shared as u32).chain([(self.shared + row) as u32]).collect()
    }

    /// Computes the step in which the first `rows` rows have their token at `place` of their own page.
    fn step(
        &mut self,
        rows: usize,
        place: usize,
        compute: impl FnOnce(&Model, &Step<'_>, &mut KvCache, &mut Workspace) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let tokens = rehearsal::tokens(self.model, rows, 4 + place as u64);
        let tables: Vec<u32> = (0..rows).flat_map(|row| self.table(row)).collect();
        let row_tables: Vec<u32> = (0..rows).map(|row| (row * (self.shared + 1)) as u32).collect();
        // Every third row is a token behind the others.
        let positions: Vec<u32> = (0..rows)
            .map(|row| (self.shared * PAGE + place - usize::from(place == OWN && row % 3 == 2)) as u32)
            .collect();
        let step = Step {
            tokens: &tokens,
            positions: &positions,
            row_tables: &row_tables,
            page_tables: &tables,
            decode_rows: rows,
            prefills: &[],
            logits_rows: &(0..rows as u32).collect::<Vec<_>>(),
        };
        compute(self.model, &step, &mut self.cache, &mut self.workspace)
    }

    /// How many logits, chosen tokens and cache entries of how many differ between separate operations and `forward`, which is
    /// told whether the likeliest tokens are wanted.
    fn compare(&mut self, rows: usize, forward: &Forward<'_>) -> Result<(u64, u64), DeviceError> {
        let device = self.model.device();
        let vocab = self.model.config().vocab;
        let (mut wrong, mut values) = (0, 0);

        self.step(rows, OWN, Model::forward_plain)?;
        let mut expected = device.alloc_unwritten::<f32>(rows * vocab, MemoryKind::Other, "self-test expectation")?;
        device.copy(self.workspace.logits(rows)?, expected.slice_mut(..)?)?;
        let mut likeliest = device.alloc_unwritten::<u32>(rows, MemoryKind::Other, "self-test expectation")?;
        ops::argmax(device, &expected.as_slice(), &mut likeliest.as_slice_mut())?;
        let likeliest = device.download(&likeliest)?;
        let cached = self.cached(rows)?;

        self.step(rows, OWN, |model, step, cache, workspace| forward(model, step, cache, workspace, false))?;
        wrong += u64::from(ops::differing(device, &self.workspace.logits(rows)?, &expected.as_slice())?);
        values += (rows * vocab) as u64;
        let mut compare = |found: &[u32], expected: &[u32]| {
            wrong += found.iter().zip(expected).filter(|(a, b)| a != b).count() as u64;
            values += expected.len() as u64;
        };
        compare(&self.cached(rows)?, &cached);

        self.step(rows, OWN, |model, step, cache, workspace| forward(model, step, cache, workspace, true))?;
        compare(&device.download(self.workspace.chosen(rows)?)?, &likeliest);
        compare(&self.cached(rows)?, &cached);
        Ok((wrong, values))
    }

    /// The bits that the first and the last of some rows have in the cache.
    fn cached(&self, rows: usize) -> Result<Vec<u32>, DeviceError> {
        let mut bits = Vec::new();
        for row in [0, rows - 1] {
            let own = [(self.shared + row) as u32];
            bits.extend(self.cache.download(self.model.device(), &own, OWN + 1)?.into_iter().map(u32::from));
        }
        Ok(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{CpuOptions, Device};

    /// A way that computes something else: another token in one row, and every other row right.
    #[test]
    fn one_wrong_row_is_seen() {
        let device = Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap();
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
        let model = Model::load(&device, &folder, Some(128), &mut |_, _| {}).unwrap();
        let mut batch = Batch::new(&model, 3, 1).unwrap();
        let mut differing = |wrong: Option<bool>| {
            let forward = |model: &Model, step: &Step<'_>, cache: &mut KvCache, workspace: &mut Workspace, greedy| {
                let mut tokens = step.tokens.to_vec();
                if wrong == Some(greedy) {
                    tokens[2] ^= 1;
                }
                let step = Step { tokens: &tokens, ..*step };
                model.forward_choosing(&step, choosing(greedy), cache, workspace)
            };
            batch.compare(3, &forward).unwrap().0
        };
        assert_eq!(differing(None), 0);
        assert!(differing(Some(false)) > 0 && differing(Some(true)) > 0);
    }
}
