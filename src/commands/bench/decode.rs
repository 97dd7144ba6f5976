//! Decoding: tokens per second while all requests of a batch generate.

use host::engine::Sampling;

use super::figure::Figure;
use super::requests::{self, decoding_length, greedy, request, seconds_per_step};
use super::rig::Rig;

/// A batch of requests with prompts of about `context` tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) context: usize,
}

/// Tokens per second of all together, and milliseconds of a step.
pub(super) fn figures(rig: &Rig, shape: Shape) -> anyhow::Result<[Figure; 2]> {
    let seconds = all_seconds_per_step(rig, shape, &greedy())?;
    let Shape { batch, context } = shape;
    let rates: Vec<f64> = seconds.iter().map(|seconds| batch as f64 / seconds).collect();
    let milliseconds: Vec<f64> = seconds.iter().map(|seconds| seconds * 1e3).collect();
    let rate = Figure::of("decode", "tokens/s", &rates);
    let mean_context = decoding_length(context) as f64 + f64::from(rig.plan.tokens) / 2.0;
    let bytes = rig.work.decode_bytes(batch, mean_context);
    let share = rate.value / batch as f64 * bytes / rig.ceilings.bytes_per_second;
    let placed = |figure: Figure| Figure { bytes: Some(bytes), ..figure }.batch(batch).context(context);
    Ok([
        Figure { share_of_ceiling: Some(share), ..placed(rate) },
        placed(Figure::of("decode step", "ms", &milliseconds)),
    ])
}

/// Seconds of a step of this shape, in each run, after one that fills the prefix cache and is not counted.
pub(super) fn all_seconds_per_step(rig: &Rig, shape: Shape, sampling: &Sampling) -> anyhow::Result<Vec<f64>> {
    run(rig, shape, sampling)?;
    rig.device().profile(true);
    let seconds = (0..rig.plan.runs).map(|_| timed(rig, shape, sampling)).collect();
    rig.device().profile(false);
    seconds
}

/// Seconds of a step, of one run.
pub(super) fn timed(rig: &Rig, shape: Shape, sampling: &Sampling) -> anyhow::Result<f64> {
    seconds_per_step(&run(rig, shape, sampling)?).ok_or_else(|| {
        anyhow::anyhow!(
            "{} requests with prompts of {} tokens never generated all at once; raise --tokens",
            shape.batch,
            shape.context
        )
    })
}

/// One run of this shape.
pub(super) fn run(rig: &Rig, shape: Shape, sampling: &Sampling) -> anyhow::Result<Vec<requests::Life>> {
    let length = decoding_length(shape.context);
    let one = |index| request(rig.vocab(), index, length, rig.plan.tokens, sampling.clone());
    requests::run(rig.engine(), (0..shape.batch).map(one).collect())
}
