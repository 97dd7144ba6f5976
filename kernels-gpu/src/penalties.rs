//! Repetition, frequency and presence penalties, and logit bias.

use cuda_std::prelude::*;

/// For each entry (a token of a row, listed once): with `count` > 0 the logit is first divided (if positive) or multiplied
/// (if not) by the row's repetition penalty, then lowered by count * frequency + presence; then the bias is added.
///
/// - `logits`: f32 \[R, V\]; `rows`, `tokens`, `counts`: u32 \[E\]; `biases`: f32 \[E\]; `repetition`, `frequency`, `presence`:
///   f32 \[R\].
/// - grid (ceil(E / 128)); a thread does one entry.
/// - bytes: 24 per entry.
/// - the caller: no (row, token) is listed twice; `vocab` = V.
#[kernel(block = 128)]
pub fn penalties(
    logits: InOut<f32>,
    rows: In<u32>,
    tokens: In<u32>,
    counts: In<u32>,
    biases: In<f32>,
    repetition: In<f32>,
    frequency: In<f32>,
    presence: In<f32>,
    vocab: u32,
) {
    let entry = thread::index_1d() as usize;
    if entry < rows.len() {
        let row = rows.get(entry) as usize;
        let index = row * vocab as usize + tokens.get(entry) as usize;
        let mut logit = logits.get(index);
        let count = counts.get(entry);
        if count > 0 {
            let penalty = repetition.get(row);
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            logit -= math::fma(count as f32, frequency.get(row), presence.get(row));
        }
        logits.set(index, logit + biases.get(entry));
    }
}
