//! Chooses the next token of each row of logits, on the device: penalties and bias, temperature, top-k, top-p, min-p,
//! draw. One upload per step goes down, one small copy of ids comes back. Rows that need nothing but a draw are the model's
//! own to choose ([`Choosing`](crate::model::Choosing)): what is here serves penalties and log-probabilities.

use std::collections::BTreeMap;

use super::Sampling;
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, SliceMut};
use crate::model::Logits;
use crate::ops::{self, LogProbs, PENALTY_ENTRY, ROW_WORDS, RowParameters, SampleParams};

/// A row whose next token is wanted.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// How to choose.
    pub sampling: &'a Sampling,
    /// How often each token was generated so far.
    pub counts: &'a BTreeMap<u32, u32>,
    /// Tokens that must not be chosen.
    pub banned: &'a [u32],
    /// The position of the token to choose.
    pub position: u32,
    /// Log-probabilities are wanted, of this many most likely tokens too.
    pub logprobs: Option<u32>,
}

impl SampleRow<'_> {
    /// Whether the likeliest token is all that is asked for.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        temperature(self.sampling) == 0.0 && self.is_drawn()
    }

    /// Whether one token of those that the model's logits and the filters give is all that is asked for.
    #[must_use]
    pub fn is_drawn(&self) -> bool {
        self.logprobs.is_none() && !has_penalties(self)
    }

    /// Whether this stays so whatever tokens come.
    #[must_use]
    pub fn stays_drawn(&self) -> bool {
        self.is_drawn() && !lists_penalties(self.sampling)
    }

    /// What the kernels need to know of it.
    #[must_use]
    pub fn parameters(&self) -> RowParameters {
        parameters(self)
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id, or none where no logit is finite.
    pub id: Option<u32>,
    /// Its log-probability, where wanted.
    pub logprob: Option<f32>,
    /// The most likely tokens with theirs, where wanted.
    pub top: Vec<(u32, f32)>,
}

impl From<u32> for Sampled {
    /// A token as the kernels write it: `u32::MAX` is none.
    fn from(id: u32) -> Self {
        Self { id: (id != u32::MAX).then_some(id), logprob: None, top: Vec::new() }
    }
}

/// The most tokens whose log-probabilities can be asked for.
pub const MAX_TOP_LOGPROBS: u32 = 20;

/// Penalty entries that are applied at once; a step with more launches again. Each entry stands for itself, so this
/// changes no bit.
const ENTRIES: usize = 1 << 14;

/// The sampler's memory, for up to a fixed number of rows.
#[derive(Debug)]
pub struct Sampler {
    device: Device,
    vocab: usize,
    ids: Buffer<u32>,
    /// The rows' parameters, then penalty entries: one upload for both.
    words: Buffer<u32>,
    top_ids: Buffer<u32>,
    top_values: Buffer<f32>,
    rows: usize,
}

impl Sampler {
    /// A sampler of up to `rows` rows of `vocab` logits.
    ///
    /// # Errors
    /// No memory, or a size of 0.
    pub fn new(device: &Device, rows: usize, vocab: usize) -> Result<Self, DeviceError> {
        let kind = MemoryKind::Activations;
        let listed = rows * MAX_TOP_LOGPROBS as usize;
        Ok(Self {
            device: device.clone(),
            vocab,
            ids: device.alloc_unwritten(rows, kind, "sampled tokens")?,
            words: device.alloc_unwritten(rows * ROW_WORDS + ENTRIES * PENALTY_ENTRY, kind, "sampling parameters")?,
            top_ids: device.alloc_unwritten(listed, kind, "most likely tokens")?,
            top_values: device.alloc_unwritten(listed + rows, kind, "log-probabilities")?,
            rows,
        })
    }

    /// Chooses a token for each of `rows`; the logits \[R, V\] stay as they are. Whatever is in the spare memory is lost.
    ///
    /// # Errors
    /// More rows than the sampler has, less spare memory than [`ops::spare_for_choosing`] says, or the device's error.
    pub fn sample(&mut self, logits: Logits<'_>, rows: &[SampleRow<'_>]) -> Result<Vec<Sampled>, DeviceError> {
        let count = rows.len();
        let Logits { values, mut spare } = logits;
        let logits = &values.as_slice();
        self.check_rows(logits, count)?;
        let adjusted = rows.iter().any(has_penalties);
        if !adjusted && rows.iter().all(|row| temperature(row.sampling) == 0.0) {
            ops::argmax(&self.device, logits, &mut self.ids.slice_mut(..count)?)?;
        } else if adjusted {
            // As many rows at a time as there is memory to copy.
            let at_once = self.rows_copied_at_once(spare.len(), count)?;
            for (index, rows) in rows.chunks(at_once).enumerate() {
                let first = index * at_once;
                let logits = logits.slice(first * self.vocab..(first + rows.len()) * self.vocab)?;
                let (mut copy, rest) = spare.slice_mut(..)?.split_at((rows.len() * self.vocab).next_multiple_of(4))?;
                let mut copy = copy.slice_mut(..rows.len() * self.vocab)?;
                self.device.copy(logits, copy.slice_mut(..)?)?;
                let parameters = self.penalise(&mut copy, rows)?;
                self.draw(&copy.as_slice(), rows, parameters, rest, first)?;
            }
        } else {
            let words: Vec<u32> = rows.iter().flat_map(|row| parameters(row).words()).collect();
            self.device.upload(self.words.slice_mut(..words.len())?, &words)?;
            self.draw(logits, rows, words.len(), spare, 0)?;
        }
        let probabilities = self.log_probs(logits, count, rows.iter().filter_map(|row| row.logprobs).max())?;
        let ids = self.device.download(self.ids.slice(..count)?)?;
        Ok(ids
            .into_iter()
            .enumerate()
            .map(|(row, id)| {
                let (logprob, top) = probabilities.row(row, rows[row].logprobs);
                Sampled { id: (id != u32::MAX).then_some(id), logprob, top }
            })
            .collect())
    }

    /// The log-probabilities of given tokens, one for each row of `logits` \[R, V\], and of the `top` most likely ones.
    ///
    /// # Errors
    /// More rows than the sampler has, or the device's error.
    pub fn score(&mut self, logits: &Slice<'_, f32>, tokens: &[u32], top: u32) -> Result<Vec<Sampled>, DeviceError> {
        let count = tokens.len();
        self.check_rows(logits, count)?;
        self.device.upload(self.ids.slice_mut(..count)?, tokens)?;
        let listed = self.log_probs(logits, count, Some(top))?;
        let scored = tokens.iter().enumerate().map(|(row, &id)| {
            let (logprob, top) = listed.row(row, Some(top));
            Sampled { id: Some(id), logprob, top }
        });
        Ok(scored.collect())
    }

    /// An error unless `logits` has `count` rows that fit.
    fn check_rows(&self, logits: &Slice<'_, f32>, count: usize) -> Result<(), DeviceError> {
        if count == 0 || count > self.rows || logits.len() != count * self.vocab {
            return Err(DeviceError::InvalidParameter(format!(
                "{count} rows of {} logits in all, for a sampler of {} rows of {}",
                logits.len(),
                self.rows,
                self.vocab
            )));
        }
        Ok(())
    }

    /// How many of `count` rows of logits can be copied and drawn from at a time.
    fn rows_copied_at_once(&self, spare: usize, count: usize) -> Result<usize, DeviceError> {
        let needed = |rows: usize| {
            let scratch = if self.device.tensor_cores() { 2 * ops::sample_scratch_len(rows, self.vocab) } else { 0 };
            (rows * self.vocab).next_multiple_of(4) + scratch
        };
        (1..=count).rev().find(|&rows| needed(rows) <= spare).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("{spare} f32 beside the logits; penalties take {}", needed(1)))
        })
    }

    /// Applies the penalties and biases of `rows` to their logits. Leaves the rows' parameters in `self.words`, and says how
    /// many words they are.
    fn penalise(&mut self, logits: &mut SliceMut<'_, f32>, rows: &[SampleRow<'_>]) -> Result<usize, DeviceError> {
        let device = &self.device;
        let mut words: Vec<u32> = rows.iter().flat_map(|row| parameters(row).words()).collect();
        let parameters_end = words.len();
        let entries = penalty_entries(rows);
        let (first, more) = entries.split_at(entries.len().min(ENTRIES));
        words.extend(first.iter().flat_map(PenaltyEntry::words));
        device.upload(self.words.slice_mut(..words.len())?, &words)?;
        let mut apply = |words: &Buffer<u32>, end: usize| {
            ops::penalties(device, logits, &words.slice(parameters_end..end)?, &words.slice(..parameters_end)?)
        };
        apply(&self.words, words.len())?;
        for entries in more.chunks(ENTRIES) {
            let words: Vec<u32> = entries.iter().flat_map(PenaltyEntry::words).collect();
            let end = parameters_end + words.len();
            device.upload(self.words.slice_mut(parameters_end..end)?, &words)?;
            apply(&self.words, end)?;
        }
        Ok(parameters_end)
    }

    /// Draws tokens of `rows`, whose parameters are the first `parameters_end` of `self.words`, into `self.ids` from `first` on.
    fn draw(
        &mut self,
        logits: &Slice<'_, f32>,
        rows: &[SampleRow<'_>],
        parameters_end: usize,
        spare: SliceMut<'_, f32>,
        first: usize,
    ) -> Result<(), DeviceError> {
        let scratch = if self.device.tensor_cores() {
            Some(spare.cast()?.into_slice(..ops::sample_scratch_len(rows.len(), self.vocab))?)
        } else {
            None
        };
        let params = SampleParams {
            rows: self.words.slice(..parameters_end)?,
            whole_mass: rows.iter().any(|row| parameters(row).needs_whole_mass()),
            scratch,
        };
        ops::sample(&self.device, logits, params, &mut self.ids.slice_mut(first..first + rows.len())?)
    }

    /// Of the `count` tokens in `self.ids`, and of the `most` most likely ones of each row; of none where that is none.
    fn log_probs(&mut self, logits: &Slice<'_, f32>, count: usize, most: Option<u32>) -> Result<Listed, DeviceError> {
        let Some(per_row) = most else { return Ok(Listed::default()) };
        let device = &self.device;
        let per_row = per_row.min(MAX_TOP_LOGPROBS) as usize;
        let mut out = LogProbs {
            ids: self.top_ids.slice_mut(..count * per_row)?,
            values: self.top_values.slice_mut(..count * (1 + per_row))?,
        };
        ops::log_probs(device, logits, &self.ids.slice(..count)?, &mut out)?;
        let ids = if per_row > 0 { device.download(out.ids.as_slice())? } else { Vec::new() };
        Ok(Listed { per_row, ids, values: device.download(out.values.as_slice())? })
    }
}

/// Log-probabilities of every row.
#[derive(Default)]
struct Listed {
    per_row: usize,
    ids: Vec<u32>,
    values: Vec<f32>,
}

impl Listed {
    fn row(&self, row: usize, wanted: Option<u32>) -> (Option<f32>, Vec<(u32, f32)>) {
        let Some(wanted) = wanted else { return (None, Vec::new()) };
        let values = &self.values[row * (1 + self.per_row)..(row + 1) * (1 + self.per_row)];
        let ids = &self.ids[row * self.per_row..(row + 1) * self.per_row];
        let top = ids.iter().zip(&values[1..]).take(wanted as usize).filter(|(id, _)| **id != u32::MAX);
        (Some(values[0]), top.map(|(&id, &value)| (id, value)).collect())
    }
}

/// Below this a lead of a thousandth is e^100 : 1, and dividing by much less would overflow: greedy.
const LEAST_TEMPERATURE: f32 = 1e-5;

fn temperature(sampling: &Sampling) -> f32 {
    if sampling.temperature < LEAST_TEMPERATURE { 0.0 } else { sampling.temperature }
}

fn lists_penalties(sampling: &Sampling) -> bool {
    let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = *sampling;
    repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0
}

fn is_penalised(row: &SampleRow<'_>) -> bool {
    lists_penalties(row.sampling) && !row.counts.is_empty()
}

fn has_penalties(row: &SampleRow<'_>) -> bool {
    !row.sampling.logit_bias.is_empty() || !row.banned.is_empty() || is_penalised(row)
}

struct PenaltyEntry {
    row: u32,
    token: u32,
    count: u32,
    bias: f32,
}

impl PenaltyEntry {
    /// As the kernel reads it.
    fn words(&self) -> [u32; PENALTY_ENTRY] {
        [self.row, self.token, self.count, self.bias.to_bits()]
    }
}

/// What the kernels need to know of a row.
fn parameters(row: &SampleRow<'_>) -> RowParameters {
    let sampling = row.sampling;
    let temperature = temperature(sampling);
    RowParameters {
        seed: sampling.seed,
        position: row.position,
        // At temperature 0 the first token of the one order is taken: top-k of 1, which needs no other filter.
        top_k: if temperature == 0.0 { 1 } else { sampling.top_k },
        temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition: sampling.repetition_penalty,
        frequency: sampling.frequency_penalty,
        presence: sampling.presence_penalty,
    }
}

/// Each (row, token) that a penalty or a bias concerns, once. What a row lists follows from that row alone.
fn penalty_entries(rows: &[SampleRow<'_>]) -> Vec<PenaltyEntry> {
    let mut entries = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let counts = if is_penalised(row) { row.counts } else { const { &BTreeMap::new() } };
        let mut biases: BTreeMap<u32, f32> = BTreeMap::new();
        for &(id, bias) in &row.sampling.logit_bias {
            *biases.entry(id).or_insert(0.0) += bias;
        }
        biases.extend(row.banned.iter().map(|&id| (id, f32::NEG_INFINITY)));
        let row = index as u32;
        entries.extend(counts.iter().map(|(&token, &count)| {
            let bias = biases.remove(&token).unwrap_or(0.0);
            PenaltyEntry { row, token, count, bias }
        }));
        entries.extend(biases.into_iter().map(|(token, bias)| PenaltyEntry { row, token, count: 0, bias }));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;

    #[test]
    fn more_biases_than_are_applied_at_once() {
        const ROWS: usize = 20;
        const VOCAB: usize = 1000;
        const { assert!(ROWS * VOCAB > ENTRIES) };
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let mut sampler = Sampler::new(&device, ROWS, VOCAB).unwrap();
        let mut logits = device.alloc_from(&[0.5; ROWS * VOCAB], MemoryKind::Other, "logits").unwrap();
        let wanted = |row: usize| (row * 47 + 13) as u32;
        let samplings: Vec<Sampling> = (0..ROWS)
            .map(|row| {
                let bias = |id| (id, if id == wanted(row) { 1.0 } else { -1.0 - row as f32 });
                Sampling { temperature: 0.0, logit_bias: (0..VOCAB as u32).map(bias).collect(), ..Sampling::default() }
            })
            .collect();
        let counts = BTreeMap::new();
        let rows: Vec<_> = samplings
            .iter()
            .map(|sampling| SampleRow { sampling, counts: &counts, banned: &[], position: 1, logprobs: None })
            .collect();
        // All rows at once, three at a time and the last two, one at a time.
        for room in [ROWS * VOCAB, 3 * VOCAB + 7, VOCAB] {
            let mut spare = device.alloc_from(&vec![f32::NAN; room], MemoryKind::Other, "spare").unwrap();
            let asked = Logits { values: logits.as_slice_mut(), spare: spare.as_slice_mut() };
            let sampled = sampler.sample(asked, &rows).unwrap();
            let ids: Vec<_> = sampled.into_iter().map(|sampled| sampled.id).collect();
            assert_eq!(ids, (0..ROWS).map(|row| Some(wanted(row))).collect::<Vec<_>>());
            assert_eq!(device.download(&logits).unwrap(), [0.5; ROWS * VOCAB], "the logits stay as they are");
        }
        let mut spare = device.alloc::<f32>(VOCAB - 1, MemoryKind::Other, "too little").unwrap();
        let asked = Logits { values: logits.as_slice_mut(), spare: spare.as_slice_mut() };
        assert!(sampler.sample(asked, &rows).is_err());
    }

    #[test]
    fn a_row_with_penalties_is_drawn_until_there_are_tokens_and_does_not_stay_so() {
        let (none, some): (_, BTreeMap<u32, u32>) = (BTreeMap::new(), [(3, 1)].into());
        let says = |sampling: Sampling, counts: &BTreeMap<u32, u32>, banned: &[u32], logprobs| {
            let row = SampleRow { sampling: &sampling, counts, banned, position: 1, logprobs };
            [row.is_plain(), row.is_drawn(), row.stays_drawn()]
        };
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let drawn = Sampling { temperature: 0.8, top_p: 0.95, top_k: 50, ..Sampling::default() };
        let penalised = Sampling { presence_penalty: 0.5, ..greedy.clone() };
        assert_eq!(says(greedy.clone(), &some, &[], None), [true, true, true]);
        assert_eq!(says(drawn.clone(), &some, &[], None), [false, true, true]);
        assert_eq!(says(drawn.clone(), &some, &[], Some(0)), [false; 3]);
        assert_eq!(says(drawn.clone(), &some, &[7], None), [false; 3]);
        assert_eq!(says(Sampling { logit_bias: vec![(1, 1.0)], ..drawn }, &none, &[], None), [false; 3]);
        assert_eq!(says(penalised.clone(), &none, &[], None), [true, true, false]);
        assert_eq!(says(penalised, &some, &[], None), [false; 3]);
        let repeating = Sampling { repetition_penalty: 1.1, ..greedy.clone() };
        let frequent = Sampling { frequency_penalty: 0.1, ..greedy };
        assert_eq!(says(repeating, &none, &[], None), [true, true, false]);
        assert_eq!(says(frequent, &none, &[], None), [true, true, false]);
    }

    #[test]
    fn what_a_row_lists_follows_from_it_alone() {
        let counts: BTreeMap<u32, u32> = [(3, 2), (5, 1)].into();
        let listed_with = |sampling: Sampling, banned: &[u32]| {
            let row = SampleRow { sampling: &sampling, counts: &counts, banned, position: 9, logprobs: None };
            let entries = penalty_entries(&[row]);
            entries.iter().map(|entry| (entry.row, entry.token, entry.count, entry.bias)).collect::<Vec<_>>()
        };
        let listed = |sampling: Sampling| listed_with(sampling, &[]);
        let bias = vec![(5, 1.0), (7, -2.0), (5, 0.5)];
        assert_eq!(listed(Sampling::default()), []);
        let biased = Sampling { logit_bias: bias.clone(), ..Sampling::default() };
        assert_eq!(listed(biased.clone()), [(0, 5, 0, 1.5), (0, 7, 0, -2.0)]);
        let both = Sampling { presence_penalty: 0.1, ..biased };
        assert_eq!(listed(both.clone()), [(0, 3, 2, 0.0), (0, 5, 1, 1.5), (0, 7, 0, -2.0)]);
        // What is banned is banned once, whatever else concerns it.
        let never = f32::NEG_INFINITY;
        assert_eq!(listed_with(Sampling::default(), &[9, 3, 9]), [(0, 3, 0, never), (0, 9, 0, never)]);
        assert_eq!(listed_with(both, &[7, 5]), [(0, 3, 2, 0.0), (0, 5, 1, never), (0, 7, 0, never)]);
    }
}
