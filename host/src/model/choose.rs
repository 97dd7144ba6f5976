//! What computes a model's linear layers: timed on its own weights when it has been loaded.

use std::time::{Duration, Instant};

use half::bf16;

use super::ways::{Linear, Plan, RUNGS};
use super::{Choosing, Model, Step, StepLimits};
use crate::device::{
    DeviceError, LINEAR_RUNGS, LinearBackend, LinearChoice, LinearOutput, MemoryKind, Slice, Weight, contract,
};
use crate::ops::{self, FEW, PAGE, Pages, PrefillTiles, Segment};
use crate::testing::TestRng;

/// Rows of random values, repeated to make up a rung: what is multiplied changes a GPU's power, and so its clock, a little.
const RANDOM_ROWS: usize = 16;

/// A layer is timed where its output is no more than this many bytes.
const MOST_BYTES: usize = 256 << 20;

/// Rows of a head up to which its algorithms are timed, and its bits tested before serving.
pub const MOST_HEAD_ROWS: usize = 256;

/// The largest number of rows that is timed for a layer of `n` outputs of `bytes` bytes.
fn most_rows(n: usize, bytes: usize) -> usize {
    MOST_BYTES / (n * bytes).max(1)
}

/// Steps that are timed at once.
const STEPS: u32 = 6;

/// What is taken instead of the guess has to be faster by one part in so many: times of so few steps differ by 1 to 2 %.
const WORTHWHILE: u32 = 40;

/// Tokens of the prefill that is timed.
const PREFILL: usize = 2048;

/// The position of every row in the steps that are timed: two pages, one of them full.
const POSITION: usize = 100;

/// What decode steps of `rows` rows take from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct TilesChoice {
    /// Rows: those above the last choice's, too.
    pub rows: usize,
    /// Which it is, in words.
    pub what: String,
    /// A step's time.
    pub time: Duration,
    /// The time of what was guessed.
    pub guess: Duration,
}

/// What computes steps of so many rows.
fn in_words(plan: Plan, rows: usize) -> String {
    if plan.whole {
        return "one kernel".to_owned();
    }
    if plan.few && rows <= FEW {
        return "fused layers".to_owned();
    }
    let own: Vec<_> = Linear::ALL.into_iter().filter(|&layer| plan.tiled.takes(layer)).map(Linear::name).collect();
    match own.len() {
        0 => "no tiles of ours".to_owned(),
        5 => "our tiles".to_owned(),
        _ => format!("our tiles for {}", own.join(", ")),
    }
}

impl Model {
    /// Times decode steps with the fused layers of few rows or our own tiles, and with more rows with each linear layer by our
    /// own tiles or by the library, at a ladder of rows, and keeps what is fastest, for at most `budget`: what is not reached
    /// stays as it is. Nothing where there is no choice. It changes no bits.
    ///
    /// # Errors
    /// No memory, or the device's error.
    pub fn choose_tiles(&self, budget: Duration) -> Result<Vec<TilesChoice>, DeviceError> {
        let device = self.device();
        let mut found = Vec::new();
        let open = self.ways.has_tiles() && device.linear_backend() == LinearBackend::CublasLt;
        if !open || self.context_tokens() <= POSITION {
            return Ok(found);
        }
        let deadline = Instant::now() + budget;
        let most = RUNGS[RUNGS.len() - 1];
        let limits = StepLimits { rows: most, decode_rows: most, logits_rows: most, table_entries: 2 };
        let (mut workspace, mut cache) = (self.workspace(limits)?, self.kv_cache(2)?);
        let mut stopwatch = device.stopwatch()?;
        for (rung, rows) in RUNGS.into_iter().enumerate() {
            if Instant::now() >= deadline {
                break;
            }
            let vocab = self.config().vocab;
            // All rows are one sequence's: they overwrite each other's keys and values, which nobody reads afterwards.
            let step = Step {
                tokens: &(0..rows).map(|row| (row % vocab) as u32).collect::<Vec<_>>(),
                positions: &vec![POSITION as u32; rows],
                row_tables: &vec![0; rows],
                page_tables: &[0, 1],
                decode_rows: rows,
                prefills: &[],
                logits_rows: &(0..rows as u32).collect::<Vec<_>>(),
            };
            let mut time = |plan: Plan| {
                self.ways.set_plan(rung, plan);
                let mut steps = |count: u32| {
                    (0..count)
                        .try_for_each(|_| self.forward_choosing(&step, Choosing::Likeliest, &mut cache, &mut workspace))
                };
                // The first records it.
                steps(2)?;
                stopwatch.start()?;
                steps(STEPS)?;
                stopwatch.stop()?;
                Ok::<_, DeviceError>(stopwatch.elapsed()? / STEPS)
            };
            let planned = self.ways.plan(rows);
            let mut best = Plan { whole: planned.whole && rows == 1 && self.ways.has_whole(), ..planned };
            let guess = time(best)?;
            let mut fastest = guess;
            let is_faster = |taken: Duration, than: Duration| taken + taken / WORTHWHILE < than;
            if rows <= FEW {
                // One kernel, the fused layers or our tiles. Very long contexts are never one kernel's, so the others are compared
                // in any case.
                let mut apart = Plan { whole: false, ..best };
                let mut taken = if best.whole { time(apart)? } else { guess };
                let other = Plan { few: !apart.few, ..apart };
                let others = time(other)?;
                if is_faster(others, taken) {
                    (apart, taken) = (other, others);
                }
                best.few = apart.few;
                if is_faster(taken, fastest) {
                    (best, fastest) = (apart, taken);
                }
            } else {
                // Each layer is asked about, the largest first.
                for layer in Linear::ALL.into_iter().rev() {
                    let other = Plan { tiled: best.tiled.toggled(layer), ..best };
                    let taken = time(other)?;
                    if is_faster(taken, fastest) {
                        (best, fastest) = (other, taken);
                    }
                }
            }
            let mut guess = guess;
            if best != planned && rows > FEW {
                // Noise finds something among so many: what was found has to be faster once more.
                guess = time(planned)?.min(guess);
                let again = time(best)?;
                (best, fastest) = if is_faster(again, guess) { (best, again) } else { (planned, guess) };
            }
            self.ways.set_plan(rung, best);
            found.push(TilesChoice { rows, what: in_words(best, rows), time: fastest, guess });
        }
        for TilesChoice { rows, what, time, guess } in &found {
            tracing::debug!(rows, "a decode step takes {time:?} with {what}, {guess:?} as was guessed");
        }
        Ok(found)
    }

    /// Times the attention of a long prefill by warps of 16 and of 32 rows on random values, and takes the latter where it is
    /// faster and has the same bits. Nothing on the CPU, where there are no such warps, or where
    /// warpgroups attend. Returns both times.
    ///
    /// # Errors
    /// No memory, or the device's error.
    pub fn choose_prefill(&self) -> Result<Option<[Duration; 2]>, DeviceError> {
        let (device, heads) = (self.device(), self.heads());
        if !device.is_cuda() || self.context_tokens() < PREFILL || ops::wgmma_attends(device, heads) {
            return Ok(None);
        }
        let segment = Segment { first_row: 0, rows: PREFILL, first_position: 0, table_start: 0 };
        let tiles = PrefillTiles::new(device, [segment].into_iter(), heads)?;
        if !tiles.has_wide_warps(heads) {
            return Ok(None);
        }
        let kind = MemoryKind::Other;
        let (pages, mut random) = (PREFILL / PAGE, TestRng::new(0xa191));
        let qkv = device.alloc_from(&random.f32s(PREFILL * heads.qkv_width()), kind, "timing's queries")?;
        let keys = device.alloc_from(&random.bf16s(pages * heads.page_elements()), kind, "timing's keys")?;
        let values = device.alloc_from(&random.bf16s(pages * heads.page_elements()), kind, "timing's values")?;
        let table = device.alloc_from(&(0..pages as u32).collect::<Vec<_>>(), kind, "timing's pages")?;
        let numbers = device.alloc_from(&tiles.numbers, kind, "timing's tiles")?;
        let output = || device.alloc_unwritten::<bf16>(PREFILL * heads.query_width(), kind, "timing's output");
        let mut outputs = [output()?, output()?];
        let mut times = [Duration::MAX; 2];
        let mut stopwatch = device.stopwatch()?;
        for (wide, (out, time)) in outputs.iter_mut().zip(&mut times).enumerate() {
            let tiles = tiles.clone().with_wide_warps(wide == 1);
            let mut launches = |count: u32| {
                (0..count).try_for_each(|_| {
                    let pages = Pages { keys: keys.as_slice(), values: values.as_slice() };
                    let (qkv, table, numbers) = (qkv.as_slice(), table.as_slice(), numbers.as_slice());
                    ops::attention_prefill(
                        device,
                        &qkv,
                        pages,
                        None,
                        &table,
                        &tiles,
                        &numbers,
                        &mut out.as_slice_mut(),
                        heads,
                    )
                })
            };
            launches(1)?;
            stopwatch.start()?;
            launches(STEPS)?;
            stopwatch.stop()?;
            *time = stopwatch.elapsed()? / STEPS;
        }
        let [narrow, wide] = &outputs;
        let differing = ops::differing(device, &narrow.as_slice(), &wide.as_slice())?;
        if differing > 0 {
            tracing::warn!("attention by warps of 32 rows gives {differing} other values: it is not used");
        }
        self.ways.set_wide_warps(differing == 0 && times[1] < times[0]);
        tracing::debug!(
            "attention of {PREFILL} tokens takes {:?} by warps of 16 rows, {:?} by warps of 32",
            times[0],
            times[1]
        );
        Ok(Some(times))
    }

    /// Times the algorithms of every linear layer at [`LINEAR_RUNGS`] and keeps the fastest, for at most `budget`: what is not
    /// reached keeps the library's own choice. Nothing on the CPU, or where our own kernel serves. It changes no bits.
    ///
    /// # Errors
    /// No memory, or the device's error.
    pub fn choose_algorithms(&self, budget: Duration) -> Result<Vec<LinearChoice>, DeviceError> {
        let device = self.device();
        let mut choices = Vec::new();
        if !device.is_cuda() || device.linear_backend() != LinearBackend::CublasLt {
            return Ok(choices);
        }
        let deadline = Instant::now() + budget;
        let layers = &self.parameters.layers;
        let all = |part: fn(&super::load::Layer) -> &Weight| layers.iter().map(part).collect::<Vec<_>>();
        let (qkv, output) = (all(|layer| &layer.qkv), all(|layer| &layer.output));
        let (gate_up, down) = (all(|layer| &layer.gate_up), all(|layer| &layer.down));

        let widest = [&qkv, &output, &gate_up, &down].into_iter().filter_map(|weights| weights.first());
        let widest = widest.map(|weight| weight.k()).max().unwrap_or(0).max(self.head().k());
        let most = LINEAR_RUNGS[LINEAR_RUNGS.len() - 1];
        let random = TestRng::new(0xa190).bf16s(RANDOM_ROWS * widest);
        let mut x = device.alloc_unwritten::<bf16>(most * widest, MemoryKind::Other, "timing's input")?;
        for first in (0..most).step_by(RANDOM_ROWS) {
            device.upload(x.slice_mut(first * widest..(first + RANDOM_ROWS) * widest)?, &random)?;
        }
        let x = x.as_slice();
        let segments =
            |weights: &[&Weight]| weights.first().map_or(1, |weight| contract::segments(weight.n(), weight.k()));
        self.climb::<f32>(&x, &qkv, 1, most, deadline, &mut choices)?;
        self.climb::<f32>(&x, &output, segments(&output), most, deadline, &mut choices)?;
        self.climb::<bf16>(&x, &gate_up, 1, most, deadline, &mut choices)?;
        self.climb::<f32>(&x, &down, segments(&down), most, deadline, &mut choices)?;
        self.climb::<f32>(&x, &[self.head()], 1, MOST_HEAD_ROWS, deadline, &mut choices)?;
        for choice in &choices {
            tracing::debug!(
                n = choice.n,
                k = choice.k,
                rows = choice.rows,
                "algorithm {} of {}, {:.1} us instead of {:.1}: {}",
                choice.index,
                choice.offered,
                choice.chosen_us,
                choice.first_us,
                choice.algorithm
            );
        }
        Ok(choices)
    }

    /// Times one layer's rungs.
    fn climb<O: LinearOutput>(
        &self,
        x: &Slice<'_, bf16>,
        weights: &[&Weight],
        segments: usize,
        most_wanted: usize,
        deadline: Instant,
        choices: &mut Vec<LinearChoice>,
    ) -> Result<(), DeviceError> {
        let Some(weight) = weights.first() else { return Ok(()) };
        let (n, k) = (weight.n(), weight.k());
        let rungs =
            LINEAR_RUNGS.into_iter().filter(|&rows| rows <= most_rows(segments * n, size_of::<O>()).min(most_wanted));
        let Some(most) = rungs.clone().max() else { return Ok(()) };
        if Instant::now() >= deadline {
            return Ok(());
        }
        let mut out = self.device().alloc_unwritten::<O>(segments * most * n, MemoryKind::Other, "timing's output")?;
        for rows in rungs.take_while(|_| Instant::now() < deadline) {
            let out = out.slice_mut(..segments * rows * n)?;
            choices.extend(self.device().choose_linear_algorithm(x.slice(..rows * k)?, weights, segments, out)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_timed_have_outputs_that_fit() {
        assert_eq!(most_rows(151_936, 4), 441);
        assert!(most_rows(2 * 4864, 2) >= LINEAR_RUNGS[LINEAR_RUNGS.len() - 1]);
        assert_eq!(most_rows(1 << 30, 4), 0);
    }
}
