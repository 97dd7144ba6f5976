//! What drawing a token instead of taking the most likely one adds to a step.

use host::engine::Sampling;

use super::decode::{Shape, run, timed};
use super::figure::Figure;
use super::requests::greedy;
use super::rig::Rig;

/// Percent of a greedy step that temperature 0.8, top-p 0.95 and top-k 50 add. Each run has its own greedy run beside it,
/// so that a device whose clock moves is compared with itself.
pub(super) fn figure(rig: &Rig, shape: Shape) -> anyhow::Result<Figure> {
    let drawn = Sampling { temperature: 0.8, top_p: 0.95, top_k: 50, seed: 1, ..Sampling::default() };
    run(rig, shape, &greedy())?;
    run(rig, shape, &drawn)?;
    let mut added = Vec::new();
    for _ in 0..rig.plan.runs {
        let (plain, drawn) = (timed(rig, shape, &greedy())?, timed(rig, shape, &drawn)?);
        added.push((drawn / plain - 1.0) * 100.0);
    }
    Ok(Figure::of("drawing a token adds to a step", "%", &added).batch(shape.batch).context(shape.context))
}
