//! The numeric contract, checked on the device at hand with the loaded weights.
//!
//! Two promises: a linear layer's bits do not depend on how many rows are computed together or by whom; and a sequence's keys,
//! values and logits do not depend on how it was cut into steps, on its neighbours in a step, or on the pages it lies in.
//! Everything is compared bit for bit; a NaN equals itself, so a model that computes NaN is reported apart.

mod sequence;

use std::fmt;

use half::bf16;

use super::Model;
use crate::device::{Device, DeviceError, LinearBackend, MemoryKind, Weight};
use crate::ops;

pub use sequence::sequences;

/// Rows per call for a thorough check of the linear layers: all small counts, and ten larger ones around tile sizes.
pub const ROW_COUNTS: [usize; 74] = {
    let larger = [65, 96, 127, 128, 129, 256, 511, 1024, 2048, 4096];
    let mut counts = [0; 74];
    let mut index = 0;
    while index < counts.len() {
        counts[index] = if index < 64 { index + 1 } else { larger[index - 64] };
        index += 1;
    }
    counts
};
/// Rows per call for a check at every start: each kind of algorithm that heuristics choose between.
pub const START_UP_ROW_COUNTS: [usize; 6] = [1, 2, 16, 33, 128, 500];
/// Outputs of one call at most: 512 MiB of f32. A wide head is not checked at row counts that no step has.
const MOST_OUTPUTS: usize = 1 << 27;

/// A line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was compared.
    pub what: String,
    /// Comparisons made.
    pub cases: usize,
    /// The first difference, in words.
    pub difference: Option<String>,
}

impl Finding {
    /// True when nothing differed, and something was compared.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.difference.is_none() && self.cases > 0
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.holds() { "equal" } else { "DIFFERENT" };
        write!(f, "{verdict:<9}  {:>4} cases  {}", self.cases, self.what)?;
        match &self.difference {
            Some(difference) => write!(f, ": {difference}"),
            None if self.cases == 0 => write!(f, ": nothing was compared"),
            None => Ok(()),
        }
    }
}

/// Compares, for each kind of linear layer of the model and each count of rows: on a GPU cuBLASLt with our tensor-core
/// kernel; on the CPU all rows together with each row alone. One finding per layer.
///
/// # Errors
/// The device's.
pub fn linear_layers(model: &Model, row_counts: &[usize]) -> Result<Vec<Finding>, DeviceError> {
    let device = model.device();
    let mut findings = Vec::new();
    for (name, weight) in model.linear_layers() {
        let (n, k) = (weight.n(), weight.k());
        let oracle = if device.is_cuda() { "cuBLASLt = kernel" } else { "rows together = rows alone" };
        let mut finding = Finding { what: format!("{name} [{n}, {k}]: {oracle}"), cases: 0, difference: None };
        for &rows in row_counts.iter().filter(|rows| **rows == 1 || **rows * n <= MOST_OUTPUTS) {
            finding.cases += 1;
            if let Some(difference) = linear_difference(device, weight, rows)? {
                finding.difference = Some(format!("{rows} rows: {difference}"));
                break;
            }
        }
        findings.push(finding);
    }
    Ok(findings)
}

/// Checks the linear layers and, where cuBLASLt breaks the contract, has the kernel serve them all: slower, never different.
///
/// # Errors
/// The device's.
pub fn choose_linear_backend(model: &Model) -> Result<Vec<Finding>, DeviceError> {
    let findings = linear_layers(model, &START_UP_ROW_COUNTS)?;
    if model.device().is_cuda() && !findings.iter().all(Finding::holds) {
        model.device().set_linear_backend(LinearBackend::Kernel);
    }
    Ok(findings)
}

fn linear_difference(device: &Device, weight: &Weight, rows: usize) -> Result<Option<String>, DeviceError> {
    let (n, k) = (weight.n(), weight.k());
    let input = device.alloc_from(&inputs(rows * k, rows as u64), MemoryKind::Activations, "self-test input")?;
    let mut output = device.alloc_unwritten::<f32>(rows * n, MemoryKind::Activations, "self-test output")?;
    device.linear(&input, weight, &mut output)?;
    let together = device.download(&output)?;
    let mut output = device.alloc_unwritten::<f32>(rows * n, MemoryKind::Activations, "self-test output")?;
    if device.is_cuda() {
        ops::linear_kernel(device, &input.as_slice(), &weight.rows()?.as_slice(), &mut output.as_slice_mut(), k)?;
    } else {
        for row in 0..rows {
            device.linear(input.slice(row * k..(row + 1) * k)?, weight, output.slice_mut(row * n..(row + 1) * n)?)?;
        }
    }
    Ok(first_difference(&together, &device.download(&output)?, n))
}

/// Numbers whose sum depends on the order they are added in: signs and magnitudes mixed over eight binades.
fn inputs(count: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed;
    let number = |_| {
        let bits = next_random(&mut state);
        let fraction = (bits >> 40) as f32 / (1u64 << 24) as f32;
        let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
        bf16::from_f32(sign * (1.0 + fraction) * 2f32.powi((bits >> 1 & 7) as i32 - 5))
    };
    (0..count).map(number).collect()
}

/// SplitMix64.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The first place where the bits of `found` are not those of `expected`, or where they are of no finite number.
fn first_difference(found: &[f32], expected: &[f32], width: usize) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} values where {} were expected", found.len(), expected.len()));
    }
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() || !a.is_finite();
    let index = found.iter().zip(expected).position(differs)?;
    let (a, b) = (found[index], expected[index]);
    Some(format!("row {}, column {}: {a:e} and {b:e}", index / width, index % width))
}

#[cfg(test)]
#[path = "self_test_tests.rs"]
mod tests;
