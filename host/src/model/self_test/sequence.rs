//! One sequence, computed whole, in chunks, token by token, and among others.

use super::{Finding, first_difference, next_random};
use crate::device::DeviceError;
use crate::model::{KvCache, Model, Prefill, Step, StepLimits, Workspace};
use crate::ops::PAGE;

/// Rows with logits of one step, at most: a prompt's last ones. More would not fit beside a large vocabulary.
const MOST_LOGITS_ROWS: usize = 64;
/// Tokens that the prompt of a neighbour gains in each step of a crowded batch.
const NEIGHBOUR_CHUNK: usize = 3;

/// What a sequence left behind.
struct Trace {
    /// Of the last [`MOST_LOGITS_ROWS`] positions.
    logits: Vec<f32>,
    key_values: Vec<u16>,
}

/// Compares, for a sequence of each length that the context holds, its computation in one prefill with that in unequal
/// chunks, token by token, and token by token among others on scattered pages. One finding per way.
///
/// # Errors
/// The device's.
pub fn sequences(model: &Model, lengths: &[usize]) -> Result<Vec<Finding>, DeviceError> {
    let ways: [(&str, Way); 3] = [
        ("prefill = chunks", Way::Chunks),
        ("prefill = decode steps", Way::Tokens),
        ("prefill = decode steps among others", Way::Crowded),
    ];
    let mut findings: Vec<Finding> = ways
        .iter()
        .map(|(what, _)| Finding { what: format!("{what}: logits, keys and values"), cases: 0, difference: None })
        .collect();
    for &length in lengths.iter().filter(|length| **length <= model.context_tokens()) {
        let mut bench = Bench::new(model, length)?;
        let whole = bench.trace(Way::Whole)?;
        for ((_, way), finding) in ways.iter().zip(&mut findings) {
            if finding.difference.is_some() {
                continue;
            }
            finding.cases += 1;
            let other = bench.trace(*way)?;
            finding.difference = difference(&other, &whole, model.config().vocab)
                .map(|difference| format!("{length} tokens: {difference}"));
        }
    }
    Ok(findings)
}

fn difference(found: &Trace, expected: &Trace, vocab: usize) -> Option<String> {
    if let Some(difference) = first_difference(&found.logits, &expected.logits, vocab) {
        return Some(format!("logits, {difference}"));
    }
    let index = found.key_values.iter().zip(&expected.key_values).position(|(a, b)| a != b);
    match index {
        _ if found.key_values.len() != expected.key_values.len() => Some("not as many keys and values".into()),
        Some(index) => Some(format!("keys and values, element {index}")),
        None => None,
    }
}

/// How a sequence is cut into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Whole,
    Chunks,
    Tokens,
    Crowded,
}

/// A sequence and its neighbours, with room to compute them.
struct Bench<'a> {
    model: &'a Model,
    tokens: Vec<u32>,
    /// Two that decode and one whose prompt comes in chunks.
    neighbours: [Vec<u32>; 3],
    cache: KvCache,
    workspace: Workspace,
    /// Pages of one sequence.
    pages: usize,
}

impl<'a> Bench<'a> {
    fn new(model: &'a Model, length: usize) -> Result<Self, DeviceError> {
        let mut state = length as u64;
        let mut random_tokens = |count: usize| -> Vec<u32> {
            (0..count).map(|_| (next_random(&mut state) % model.config().vocab as u64) as u32).collect()
        };
        let tokens = random_tokens(length);
        let prompt = (NEIGHBOUR_CHUNK * length).min(model.context_tokens());
        let neighbours = [random_tokens(length), random_tokens(length), random_tokens(prompt)];
        let pages = length.div_ceil(PAGE);
        let prompt_pages = prompt.div_ceil(PAGE);
        let limits = StepLimits {
            rows: length.max(3 + NEIGHBOUR_CHUNK),
            decode_rows: 3,
            logits_rows: length.min(MOST_LOGITS_ROWS),
            table_entries: 3 * pages + prompt_pages,
        };
        let cache = model.kv_cache(3 * pages + prompt_pages)?;
        Ok(Self { model, tokens, neighbours, cache, workspace: model.workspace(limits)?, pages })
    }

    fn trace(&mut self, way: Way) -> Result<Trace, DeviceError> {
        let length = self.tokens.len();
        let mut logits = Vec::new();
        // Scattered and in falling order among others; else the first ones.
        let table: Vec<u32> = match way {
            Way::Crowded => (0..self.pages as u32).rev().map(|page| 3 * page + 1).collect(),
            _ => (0..self.pages as u32).collect(),
        };
        let mut first = 0;
        let mut chunk = 1;
        while first < length {
            let rows = match way {
                Way::Whole => length,
                Way::Chunks => chunk.min(length - first),
                Way::Tokens | Way::Crowded => 1,
            };
            // 1, 3, 7, 15, ...: beginning and ending everywhere in tiles and pages.
            chunk = (2 * chunk + 1).min(length);
            let mut batch = Batch::default();
            if matches!(way, Way::Tokens | Way::Crowded) {
                batch.decode(&self.tokens, first, &table);
            } else {
                batch.prefill(&self.tokens, first, rows, &table);
            }
            if way == Way::Crowded {
                self.add_neighbours(&mut batch, first);
            }
            let wanted = (first + rows).saturating_sub(first.max(length.saturating_sub(MOST_LOGITS_ROWS)));
            let own_row = batch.own_first_row;
            batch.logits_rows.extend((own_row + rows - wanted..own_row + rows).map(|row| row as u32));
            logits.extend(self.run(&batch)?);
            first += rows;
        }
        let key_values = self.cache.download(self.model.device(), &table, length)?;
        Ok(Trace { logits, key_values })
    }

    /// Two decoding sequences, one before and one behind ours, and a chunk of a prompt. Their pages are those that ours
    /// left free.
    fn add_neighbours(&self, batch: &mut Batch, step: usize) {
        let pages = self.pages as u32;
        let [left, right, prompt] = &self.neighbours;
        batch.decode_before(left, step, &(0..pages).map(|page| 3 * page).collect::<Vec<_>>());
        batch.decode(right, step, &(0..pages).map(|page| 3 * page + 2).collect::<Vec<_>>());
        let first = NEIGHBOUR_CHUNK * step;
        let rows = NEIGHBOUR_CHUNK.min(prompt.len().saturating_sub(first));
        if rows > 0 {
            let table: Vec<u32> = (3 * pages..3 * pages + prompt.len().div_ceil(PAGE) as u32).collect();
            batch.prefill(prompt, first, rows, &table);
        }
    }

    fn run(&mut self, batch: &Batch) -> Result<Vec<f32>, DeviceError> {
        let step = Step {
            tokens: &batch.tokens,
            positions: &batch.positions,
            row_tables: &batch.row_tables,
            page_tables: &batch.page_tables,
            decode_rows: batch.decode_rows,
            prefills: &batch.prefills,
            logits_rows: &batch.logits_rows,
        };
        self.model.forward(&step, &mut self.cache, &mut self.workspace)?;
        if batch.logits_rows.is_empty() {
            return Ok(Vec::new());
        }
        self.model.device().download(self.workspace.logits(batch.logits_rows.len())?)
    }
}

/// A step being put together.
#[derive(Default)]
struct Batch {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    row_tables: Vec<u32>,
    page_tables: Vec<u32>,
    decode_rows: usize,
    prefills: Vec<Prefill>,
    logits_rows: Vec<u32>,
    /// Where the sequence that was put in first now begins.
    own_first_row: usize,
}

impl Batch {
    /// The token at `position`, behind the other single tokens.
    fn decode(&mut self, tokens: &[u32], position: usize, table: &[u32]) {
        self.insert(self.decode_rows, tokens, position, table);
    }

    /// The token at `position`, before all rows.
    fn decode_before(&mut self, tokens: &[u32], position: usize, table: &[u32]) {
        self.insert(0, tokens, position, table);
        self.own_first_row += 1;
    }

    fn insert(&mut self, row: usize, tokens: &[u32], position: usize, table: &[u32]) {
        self.tokens.insert(row, tokens[position]);
        self.positions.insert(row, position as u32);
        self.row_tables.insert(row, self.page_tables.len() as u32);
        self.page_tables.extend(table);
        self.decode_rows += 1;
    }

    /// `rows` tokens from `first` on, behind all rows.
    fn prefill(&mut self, tokens: &[u32], first: usize, rows: usize, table: &[u32]) {
        let (first_row, table_start) = (self.tokens.len(), self.page_tables.len());
        self.tokens.extend(&tokens[first..first + rows]);
        self.positions.extend((first..first + rows).map(|position| position as u32));
        self.row_tables.extend(std::iter::repeat_n(table_start as u32, rows));
        self.page_tables.extend(table);
        self.prefills.push(Prefill { first_row, rows, first_position: first, table_start, table_len: table.len() });
    }
}
