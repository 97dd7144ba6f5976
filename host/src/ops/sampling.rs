//! From logits to tokens.

use cuda_std::launch::Grid;

use kernels_gpu::candidates;
use kernels_gpu::penalties::ENTRY as PENALTY_ENTRY;
use kernels_gpu::row_parameters::WORDS as ROW_WORDS;

use super::{blocks, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut};

/// The most tokens that a vocabulary may have: top-p sums 40-bit masses of that many in 64 bits.
const MAX_VOCAB: usize = 1 << 18;

/// The rows of `logits` \[R, V\].
fn rows(operation: &str, logits: usize, vocab: usize) -> Result<usize, DeviceError> {
    let shaped = vocab > 0 && vocab <= MAX_VOCAB && logits > 0 && logits.is_multiple_of(vocab);
    expect(shaped, operation, || format!("logits [R, {vocab}] of {logits}, V at most {MAX_VOCAB}"))?;
    Ok(logits / vocab)
}

/// Applies penalties and biases to listed (row, token) entries, each listed once; see the kernel for the formula.
/// `entries` is u32 \[E, [`PENALTY_ENTRY`]\], where E may be 0; `parameters` are the records of the R rows.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn penalties(
    device: &Device,
    logits: &mut SliceMut<'_, f32>,
    entries: &Slice<'_, u32>,
    parameters: &Slice<'_, u32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "penalties";
    let rows_count = parameters.len() / ROW_WORDS;
    let vocab = logits.len().checked_div(rows_count).unwrap_or(0);
    rows(NAME, logits.len(), vocab)?;
    let shaped = parameters.len() == rows_count * ROW_WORDS && entries.len().is_multiple_of(PENALTY_ENTRY);
    expect(shaped, NAME, || format!("{} words of entries, {} of parameters", entries.len(), parameters.len()))?;
    if entries.is_empty() {
        return Ok(());
    }
    device.launch(
        kernels_gpu::penalties::penalties::launch(logits, entries, parameters, size(NAME, vocab)?),
        Grid::new_1d(blocks(NAME, entries.len() / PENALTY_ENTRY, 128)?),
    )
}

/// The most likely token of each row of `logits` \[R, V\] into `ids` \[R\]; `u32::MAX` where no logit is finite.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn argmax(device: &Device, logits: &Slice<'_, f32>, ids: &mut SliceMut<'_, u32>) -> Result<(), DeviceError> {
    const NAME: &str = "argmax";
    let vocab = logits.len().checked_div(ids.len()).unwrap_or(0);
    let rows = rows(NAME, logits.len(), vocab)?;
    expect(rows == ids.len(), NAME, || format!("{} ids for {rows} rows", ids.len()))?;
    device.launch(kernels_gpu::argmax::argmax::launch(logits, ids, size(NAME, vocab)?), Grid::new_1d(size(NAME, rows)?))
}

/// What the random choice needs beside the logits.
#[derive(Debug)]
pub struct SampleParams<'a> {
    /// The records of the R rows: [`RowParameters::words`](super::RowParameters::words).
    pub rows: Slice<'a, u32>,
    /// Whether some row has top-p without top-k, which needs a second pass. Without that pass such rows are slow.
    pub whole_mass: bool,
    /// [`sample_scratch_len`] words for the passes that many blocks share; without them one block does a row, which is
    /// slow on a GPU and fast on a CPU. The bits are the same.
    pub scratch: Option<SliceMut<'a, u64>>,
}

/// Words of a part of a row in the scratch memory: its summary, its sum, its candidates.
const PART_WORDS: usize = candidates::SUMMARY + 1 + candidates::CAPACITY;

/// Words of [`SampleParams::scratch`] for `rows` rows.
#[must_use]
pub fn sample_scratch_len(rows: usize, vocab: usize) -> usize {
    rows * vocab.div_ceil(candidates::PART) * PART_WORDS
}

/// f32 elements of memory beside the logits of `rows` rows that choosing their tokens takes at least: a GPU's scratch memory, and
/// a copy of a row for penalties. With more, penalties take fewer launches.
#[must_use]
pub fn spare_for_choosing(device: &Device, rows: usize, vocab: usize) -> usize {
    let scratch = |rows| if device.tensor_cores() { 2 * sample_scratch_len(rows, vocab) } else { 0 };
    // On a CPU there is memory to copy all of them, and its cores share the rows of a launch.
    let copies = if device.tensor_cores() { 1 } else { rows };
    scratch(rows).max(copies * vocab.next_multiple_of(4) + scratch(1))
}

/// A token of each row of `logits` \[R, V\], drawn after temperature, top-k, top-p and min-p, into `ids` \[R\];
/// `u32::MAX` where no logit is finite.
///
/// The scratch memory may be larger than it must be: into how many parts rows are divided follows from its length, and
/// changes no bit.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn sample(
    device: &Device,
    logits: &Slice<'_, f32>,
    params: SampleParams<'_>,
    ids: &mut SliceMut<'_, u32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "sample";
    let vocab = logits.len().checked_div(ids.len()).unwrap_or(0);
    let rows = rows(NAME, logits.len(), vocab)?;
    let records = &params.rows;
    let shaped = ids.len() == rows && records.len() == rows * ROW_WORDS;
    expect(shaped, NAME, || format!("{rows} ids, {ROW_WORDS} words of parameters each, not {}", records.len()))?;
    let (vocab_size, row_blocks) = (size(NAME, vocab)?, size(NAME, rows)?);
    let Some(scratch) = params.scratch else {
        let launch = kernels_gpu::sample::sample::launch(logits, records, ids, vocab_size);
        return device.launch(launch, Grid::new_1d(row_blocks));
    };
    let parts = scratch.len() / (rows * PART_WORDS);
    expect(parts <= candidates::MAX_PARTS && parts * candidates::PART >= vocab, NAME, || {
        format!("{} words of scratch memory for {rows} rows of {vocab}", scratch.len())
    })?;
    let places = rows * parts;
    let (mut found, rest) = scratch.split_at(places * candidates::CAPACITY)?;
    let (mut summaries, rest) = rest.split_at(places * candidates::SUMMARY)?;
    let mut sums = rest.into_slice(..places)?;
    let grid = Grid::new_2d(size(NAME, parts)?, row_blocks);
    device
        .launch(candidates::sample_candidates::launch(logits, records, &mut summaries, &mut found, vocab_size), grid)?;
    if params.whole_mass {
        let summaries = summaries.as_slice();
        device.launch(
            kernels_gpu::masses::sample_masses::launch(logits, records, &summaries, &mut sums, vocab_size),
            grid,
        )?;
    }
    device.launch(
        kernels_gpu::choose::sample_choose::launch(
            logits,
            records,
            &summaries.as_slice(),
            &found.as_slice(),
            &sums.as_slice(),
            ids,
            vocab_size,
            size(NAME, parts)?,
            u32::from(params.whole_mass),
        ),
        Grid::new_1d(row_blocks),
    )
}

/// Where [`log_probs`] writes: for `count` most likely tokens per row.
#[derive(Debug)]
pub struct LogProbs<'a> {
    /// \[R, count\]: the most likely tokens, most likely first.
    pub ids: SliceMut<'a, u32>,
    /// \[R, 1 + count\]: ln p of the chosen token, then of those.
    pub values: SliceMut<'a, f32>,
}

/// ln p of the `chosen` \[R\] tokens of `logits` \[R, V\], and the most likely tokens with theirs.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn log_probs(
    device: &Device,
    logits: &Slice<'_, f32>,
    chosen: &Slice<'_, u32>,
    out: &mut LogProbs<'_>,
) -> Result<(), DeviceError> {
    const NAME: &str = "log_probs";
    let vocab = logits.len().checked_div(chosen.len()).unwrap_or(0);
    let rows = rows(NAME, logits.len(), vocab)?;
    let count = out.ids.len() / rows;
    let shaped = rows == chosen.len() && out.ids.len() == rows * count && out.values.len() == rows * (1 + count);
    expect(shaped, NAME, || {
        format!("{rows} rows: chosen {}, ids {}, values {}", chosen.len(), out.ids.len(), out.values.len())
    })?;
    device.launch(
        kernels_gpu::log_probs::log_probs::launch(
            logits,
            chosen,
            &mut out.ids,
            &mut out.values,
            size(NAME, vocab)?,
            size(NAME, count)?,
        ),
        Grid::new_1d(size(NAME, rows)?),
    )
}
