//! Time to the first token, with a cold cache: of one prompt by its length, and of prompts that come at once.

use super::decode::Shape;
use super::figure::Figure;
use super::requests::{self, greedy, request};
use super::rig::Rig;

/// Milliseconds from handing in to the first token of one prompt of `length` tokens, and tokens per second.
pub(super) fn prefill(rig: &Rig, length: usize) -> anyhow::Result<[Figure; 2]> {
    let firsts = all_firsts(rig, Shape { batch: 1, context: length })?;
    let milliseconds: Vec<f64> = firsts.iter().flatten().copied().collect();
    let rates: Vec<f64> = milliseconds.iter().map(|milliseconds| length as f64 / milliseconds * 1e3).collect();
    let flops = rig.work.prefill_flops(length);
    let figure = Figure::of("prefill", "ms", &milliseconds);
    let share = flops / (figure.value / 1e3) / rig.ceilings.flops_per_second;
    Ok([
        Figure { flops: Some(flops), share_of_ceiling: Some(share), ..figure }.batch(1).context(length),
        Figure::of("prefill", "tokens/s", &rates).batch(1).context(length),
    ])
}

/// Milliseconds from handing in to the first token where `shape.batch` prompts come at once: of the middle one, and of
/// the last one.
pub(super) fn at_once(rig: &Rig, shape: Shape) -> anyhow::Result<[Figure; 2]> {
    let runs = all_firsts(rig, shape)?;
    let middles: Vec<f64> = runs.iter().map(|firsts| Figure::of("", "", firsts).value).collect();
    let lasts: Vec<f64> = runs.iter().map(|firsts| Figure::of("", "", firsts).max).collect();
    let placed = |what, values: &[f64]| Figure::of(what, "ms", values).batch(shape.batch).context(shape.context);
    Ok([placed("first token, median request", &middles), placed("first token, last request", &lasts)])
}

/// Milliseconds to the first token of each request, in each run, after one run that is not counted.
fn all_firsts(rig: &Rig, shape: Shape) -> anyhow::Result<Vec<Vec<f64>>> {
    firsts(rig, shape)?;
    (0..rig.plan.runs).map(|_| firsts(rig, shape)).collect()
}

fn firsts(rig: &Rig, shape: Shape) -> anyhow::Result<Vec<f64>> {
    let salt = rig.fresh_salt();
    let one = |index| {
        let request = request(rig.vocab(), index, shape.context, 1, greedy());
        host::engine::Request { cache_salt: Some(salt.clone()), ..request }
    };
    let lives = requests::run(rig.engine(), (0..shape.batch).map(one).collect())?;
    // From when the first of them was handed in.
    let began = lives.iter().map(|life| life.submitted).min();
    let first = |life: &requests::Life| Some((*life.tokens.first()? - began?).as_secs_f64() * 1e3);
    Ok(lives.iter().filter_map(first).collect())
}
