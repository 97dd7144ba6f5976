//! The self-test of the numeric contract, on the device and the model at hand.
//!
//! [`quick`] is what a server runs before it serves; [`full`] is what `lockstep verify` prints, [`batch`] what it prints
//! with `--batch`; [`Goldens`] are digests of answers, kept per device and model.

mod batch;
mod golden;
mod linear;
mod prefill;
pub mod rehearsal;
mod sequence;
mod ways;

use std::sync::Arc;

use crate::device::{Device, DeviceError, LinearBackend};
use crate::model::{MOST_HEAD_ROWS, Model};

pub use self::batch::Size;
pub use self::golden::{Golden, GoldenError, Goldens};

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What the contract says.
    pub claim: String,
    /// What was compared, in numbers.
    pub detail: String,
    /// Whether it held.
    pub holds: bool,
}

impl Line {
    fn new(claim: impl Into<String>, detail: impl Into<String>, holds: bool) -> Self {
        Self { claim: claim.into(), detail: detail.into(), holds }
    }
}

/// Checks the linear layers, the ways of computing decode steps and recorded prefills at a few sizes, in well under a second. On a
/// GPU where cuBLASLt does not give the contract's bits, our own kernel takes over; the returned lines say so. A way of computing
/// steps that has other bits is given up. On the CPU nothing is in doubt (its linear layer is our own code, and
/// there is one way), and nothing is checked.
///
/// # Errors
/// The device's error.
pub fn quick(model: &Model) -> Result<Vec<Line>, DeviceError> {
    let device = model.device();
    if !device.is_cuda() {
        return Ok(Vec::new());
    }
    // Every algorithm that timing may have chosen serves one of these counts.
    let (counts, head_counts) = (linear::quick_and_rungs(usize::MAX), linear::quick_and_rungs(MOST_HEAD_ROWS));
    let mut lines = linear::check(model, &counts, &head_counts)?;
    if device.linear_backend() == LinearBackend::CublasLt && lines.iter().any(|line| !line.holds) {
        tracing::warn!(
            "cuBLASLt does not give the contract's bits on this device; our own kernel serves every linear layer (slower, same answers)"
        );
        device.set_linear_backend(LinearBackend::Kernel);
        lines = linear::check(model, &linear::QUICK, &linear::QUICK)?;
    }
    // What is given up can no longer give a wrong answer.
    lines.extend(decode_ways(model, &ways::QUICK)?.into_iter().filter(|line| line.holds));
    lines.extend(recorded_prefills(model, &prefill::QUICK)?.filter(|line| line.holds));
    Ok(lines)
}

/// Checks each way of computing decode steps that the model uses for these numbers of rows against separate operations, and
/// gives up those whose bits differ.
///
/// # Errors
/// The device's error.
pub fn decode_ways(model: &Model, rows: &[usize]) -> Result<Vec<Line>, DeviceError> {
    let checked = ways::check(model, rows, 1)?;
    for (way, line) in checked.iter().filter(|(_, line)| !line.holds) {
        tracing::warn!(
            "{}: {}; such steps are computed otherwise from now on (slower, same answers)",
            line.claim,
            line.detail
        );
        model.give_up(*way);
    }
    Ok(checked.into_iter().map(|(_, line)| line).collect())
}

/// Checks recorded prefills of these numbers of rows, shared by so many prompts each, against separate operations, and gives
/// recording up if their bits differ. `None` where none is recorded.
///
/// # Errors
/// The device's error.
pub fn recorded_prefills(model: &Model, shapes: &[(usize, usize)]) -> Result<Option<Line>, DeviceError> {
    let checked = prefill::check(model, shapes)?;
    if let Some(line) = checked.as_ref().filter(|line| !line.holds) {
        tracing::warn!(
            "{}: {}; prefills are computed by separate operations from now on (slower, same answers)",
            line.claim,
            line.detail
        );
        model.give_up_recorded_prefills();
    }
    Ok(checked)
}

/// Checks every line of the contract that one process can check. `report` is told each line as soon as it is known.
///
/// # Errors
/// The device's error.
pub fn full(model: &Arc<Model>, report: &mut dyn FnMut(&Line)) -> Result<bool, DeviceError> {
    let mut all = true;
    let mut tell = |lines: Vec<Line>| {
        for line in lines {
            all &= line.holds;
            report(&line);
        }
    };
    tell(vec![residency(model.device())]);
    // On the CPU the plain chain is slow, and a few sizes of each kind tell enough.
    let (counts, head_counts, rows) = if model.device().is_cuda() {
        (&linear::FULL[..], &linear::FULL_HEAD[..], &ways::FULL[..])
    } else {
        (&linear::QUICK[..5], &linear::QUICK[..5], &ways::QUICK[..6])
    };
    tell(linear::check(model, counts, head_counts)?);
    tell(ways::check(model, rows, ways::LENGTHS)?.into_iter().map(|(_, line)| line).collect());
    tell(prefill::check(model, &prefill::FULL)?.into_iter().collect());
    tell(sequence::prefill_is_decode(model)?);
    tell(sequence::runs_repeat(model)?);
    tell(vec![residency(model.device())]);
    Ok(all)
}

/// Checks that no request can tell its company: one alone against itself among others, under every step budget, state of
/// the cache, order of pages and content of unused memory. `report` is told each line as soon as it is known.
///
/// # Errors
/// The model's context is shorter than the requests, or the device's error.
pub fn batch(model: &Arc<Model>, size: Size, report: &mut dyn FnMut(&Line)) -> Result<bool, DeviceError> {
    let mut all = true;
    batch::check(model, size, &mut |line| {
        all &= line.holds;
        report(&line);
    })?;
    Ok(all)
}

fn residency(device: &Device) -> Line {
    let outcome = device.verify_residency();
    let tracker = device.tracker();
    let held = format!("{} allocations, {:.1} MB", tracker.count(), tracker.total_bytes() as f64 / 1e6);
    let detail = outcome.as_ref().err().map_or_else(|| held.clone(), |error| format!("{held}: {error}"));
    Line::new("all memory is on the device", detail, outcome.is_ok())
}
