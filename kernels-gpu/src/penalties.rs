//! Repetition, frequency and presence penalties, and logit bias.

use cuda_std::prelude::*;

use crate::row_parameters::RowParameters;

/// Words of an entry: row, token, count, and the bits of the bias.
pub const ENTRY: usize = 4;

/// For each entry (a token of a row, listed once): with `count` > 0 the logit is first divided (if positive) or multiplied
/// (if not) by the row's repetition penalty, then lowered by count * frequency + presence; then the bias is added.
///
/// - `logits`: f32 \[R, V\]; `entries`: u32 \[E, [`ENTRY`]\]; `parameters`: u32 \[R, 12\], the records of
///   [`RowParameters`]; both start at multiples of 16 bytes.
/// - grid (ceil(E / 128)); a thread does one entry.
/// - bytes: 24 per entry.
/// - the caller: no (row, token) is listed twice; `vocab` = V.
#[kernel(block = 128)]
pub fn penalties(logits: InOut<f32>, entries: In<u32>, parameters: In<u32>, vocab: u32) {
    let entry = thread::index_1d() as usize;
    if entry < entries.len() / ENTRY {
        let [row, token, count, bias] = entries.load(entry * ENTRY);
        let index = row as usize * vocab as usize + token as usize;
        let mut logit = logits.get(index);
        if count > 0 {
            let parameters = RowParameters::of_row(&parameters, row as usize);
            let penalty = parameters.repetition;
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            logit -= math::fma(count as f32, parameters.frequency, parameters.presence);
        }
        logits.set(index, logit + f32::from_bits(bias));
    }
}
