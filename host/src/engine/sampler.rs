//! Chooses the next token of each row of logits, on the device: penalties and bias, temperature, top-k, top-p, min-p,
//! draw. One upload per step goes down, one small copy of ids comes back.

use std::collections::BTreeMap;

use super::Sampling;
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice};
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
        temperature(self.sampling) == 0.0 && self.logprobs.is_none() && !has_penalties(self)
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
    /// Logits after penalties.
    adjusted: Buffer<f32>,
    /// What a GPU's draw leaves between its passes; the CPU's has one pass.
    candidates: Option<Buffer<u64>>,
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
        let candidates = || device.alloc_unwritten(ops::sample_scratch_len(rows, vocab), kind, "candidates");
        Ok(Self {
            device: device.clone(),
            vocab,
            adjusted: device.alloc_unwritten(rows * vocab, kind, "logits after penalties")?,
            candidates: device.is_cuda().then(candidates).transpose()?,
            ids: device.alloc_unwritten(rows, kind, "chosen tokens")?,
            words: device.alloc_unwritten(rows * ROW_WORDS + ENTRIES * PENALTY_ENTRY, kind, "sampling parameters")?,
            top_ids: device.alloc_unwritten(listed, kind, "most likely tokens")?,
            top_values: device.alloc_unwritten(listed + rows, kind, "log-probabilities")?,
            rows,
        })
    }

    /// Chooses a token for each of `rows`; `logits` is \[R, V\] and stays as it is.
    ///
    /// # Errors
    /// More rows than the sampler has, or the device's error.
    pub fn sample(&mut self, logits: &Slice<'_, f32>, rows: &[SampleRow<'_>]) -> Result<Vec<Sampled>, DeviceError> {
        let count = rows.len();
        self.check_rows(logits, count)?;
        self.choose(logits, rows)?;
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

    /// Leaves the chosen ids in `self.ids`.
    fn choose(&mut self, logits: &Slice<'_, f32>, rows: &[SampleRow<'_>]) -> Result<(), DeviceError> {
        let (device, count) = (&self.device, rows.len());
        let mut ids = self.ids.slice_mut(..count)?;
        let adjusted = rows.iter().any(|row| has_penalties(row));
        if !adjusted && rows.iter().all(|row| temperature(row.sampling) == 0.0) {
            return ops::argmax(device, logits, &mut ids);
        }

        let mut words: Vec<u32> = rows.iter().flat_map(|row| parameters(row).words()).collect();
        let parameters_end = words.len();
        let entries = if adjusted { penalty_entries(rows) } else { Vec::new() };
        let (first, more) = entries.split_at(entries.len().min(ENTRIES));
        words.extend(first.iter().flat_map(PenaltyEntry::words));
        device.upload(self.words.slice_mut(..words.len())?, &words)?;
        if adjusted {
            let mut target = self.adjusted.slice_mut(..count * self.vocab)?;
            device.copy(*logits, target.slice_mut(..)?)?;
            let mut apply = |words: &Buffer<u32>, end: usize| {
                ops::penalties(device, &mut target, &words.slice(parameters_end..end)?, &words.slice(..parameters_end)?)
            };
            apply(&self.words, words.len())?;
            for entries in more.chunks(ENTRIES) {
                let words: Vec<u32> = entries.iter().flat_map(PenaltyEntry::words).collect();
                let end = parameters_end + words.len();
                device.upload(self.words.slice_mut(parameters_end..end)?, &words)?;
                apply(&self.words, end)?;
            }
        }
        let logits = if adjusted { self.adjusted.slice(..count * self.vocab)? } else { *logits };
        let params = SampleParams {
            rows: self.words.slice(..parameters_end)?,
            whole_mass: rows.iter().any(|row| parameters(row).needs_whole_mass()),
            scratch: match &mut self.candidates {
                Some(candidates) => Some(candidates.slice_mut(..ops::sample_scratch_len(count, self.vocab))?),
                None => None,
            },
        };
        ops::sample(device, &logits, params, &mut ids)
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

fn is_penalised(row: &SampleRow<'_>) -> bool {
    let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = *row.sampling;
    (repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0) && !row.counts.is_empty()
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
        let logits = device.alloc_from(&[0.5; ROWS * VOCAB], MemoryKind::Other, "logits").unwrap();
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
        let sampled = sampler.sample(&logits.as_slice(), &rows).unwrap();
        let ids: Vec<_> = sampled.into_iter().map(|sampled| sampled.id).collect();
        assert_eq!(ids, (0..ROWS).map(|row| Some(wanted(row))).collect::<Vec<_>>());
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
