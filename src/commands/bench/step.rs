//! The part of a step in which the device waits for the host. For an engine that takes the time of its steps.

use host::engine::Engine;

use super::decode::{Shape, run};
use super::figure::Figure;
use super::requests::greedy;
use super::rig::Rig;

/// Percent of the time of the steps in which the device has nothing to do, and a step's milliseconds on the device.
pub(super) fn figures(rig: &Rig, shape: Shape) -> anyhow::Result<[Figure; 2]> {
    run(rig, shape, &greedy())?;
    let (mut waiting, mut on_device) = (Vec::new(), Vec::new());
    for _ in 0..rig.plan.runs {
        let before = rig.engine().status().steps;
        run(rig, shape, &greedy())?;
        let after = rig.engine().status().steps;
        let wall = (after.wall_ns - before.wall_ns) as f64;
        let device = (after.device_ns - before.device_ns) as f64;
        waiting.push((1.0 - device / wall) * 100.0);
        on_device.push(device / (after.steps - before.steps) as f64 / 1e6);
    }
    let placed = |figure: Figure| figure.batch(shape.batch).context(shape.context);
    Ok([
        placed(Figure::of("step: device waits for the host", "%", &waiting)),
        placed(Figure::of("step: on the device", "ms", &on_device)),
    ])
}
