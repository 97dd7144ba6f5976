//! From logits to tokens.

use cuda_std::launch::Grid;

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

/// Divides each row of `logits` \[R, V\] by its temperature; rows with temperature 0 stay.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
pub fn temperature(
    device: &Device,
    logits: &mut SliceMut<'_, f32>,
    temperatures: &Slice<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "temperature";
    let vocab = logits.len().checked_div(temperatures.len()).unwrap_or(0);
    let rows = rows(NAME, logits.len(), vocab)?;
    expect(rows == temperatures.len(), NAME, || format!("{} temperatures for {rows} rows", temperatures.len()))?;
    let grid = Grid::new_2d(blocks(NAME, vocab, 256)?, size(NAME, rows)?);
    device.launch(kernels_gpu::temperature::temperature::launch(logits, temperatures, size(NAME, vocab)?), grid)
}

/// Applies penalties and biases to listed (row, token) entries, each listed once; see the kernel for the formula.
/// `repetition`, `frequency` and `presence` are \[R\]; the entries' arrays have one length, which may be 0.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn penalties(
    device: &Device,
    logits: &mut SliceMut<'_, f32>,
    entry_rows: &Slice<'_, u32>,
    tokens: &Slice<'_, u32>,
    counts: &Slice<'_, u32>,
    biases: &Slice<'_, f32>,
    repetition: &Slice<'_, f32>,
    frequency: &Slice<'_, f32>,
    presence: &Slice<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "penalties";
    let (rows_count, entries) = (repetition.len(), entry_rows.len());
    let vocab = logits.len().checked_div(rows_count).unwrap_or(0);
    rows(NAME, logits.len(), vocab)?;
    let shaped = tokens.len() == entries && counts.len() == entries && biases.len() == entries;
    expect(shaped && frequency.len() == rows_count && presence.len() == rows_count, NAME, || {
        format!("{entries} entries and {rows_count} rows in every array")
    })?;
    if entries == 0 {
        return Ok(());
    }
    device.launch(
        kernels_gpu::penalties::penalties::launch(
            logits,
            entry_rows,
            tokens,
            counts,
            biases,
            repetition,
            frequency,
            presence,
            size(NAME, vocab)?,
        ),
        Grid::new_1d(blocks(NAME, entries, 128)?),
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

/// What the random choice needs to know of each row: arrays of \[R\].
#[derive(Clone, Copy, Debug)]
pub struct SampleParams<'a> {
    /// Keys of the random numbers.
    pub seeds: Slice<'a, u64>,
    /// The position of the token that is drawn.
    pub positions: Slice<'a, u32>,
    /// 0 keeps all.
    pub top_ks: Slice<'a, u32>,
    /// 1 keeps all.
    pub top_ps: Slice<'a, f32>,
    /// 0 keeps all.
    pub min_ps: Slice<'a, f32>,
}

/// A token of each row of `logits` \[R, V\], drawn after top-k, top-p and min-p, into `ids` \[R\]; `u32::MAX` where no
/// logit is finite.
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
    let lengths = [
        ids.len(),
        params.seeds.len(),
        params.positions.len(),
        params.top_ks.len(),
        params.top_ps.len(),
        params.min_ps.len(),
    ];
    expect(lengths == [rows; 6], NAME, || format!("{rows} of every parameter, not {lengths:?}"))?;
    device.launch(
        kernels_gpu::sample::sample::launch(
            logits,
            &params.seeds,
            &params.positions,
            &params.top_ks,
            &params.top_ps,
            &params.min_ps,
            ids,
            size(NAME, vocab)?,
        ),
        Grid::new_1d(size(NAME, rows)?),
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
