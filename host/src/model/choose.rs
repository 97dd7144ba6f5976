//! Which algorithms compute a model's linear layers: timed on its own weights when it has been loaded.

use std::time::{Duration, Instant};

use half::bf16;

use super::transformer::Model;
use crate::device::{
    DeviceError, LINEAR_RUNGS, LinearBackend, LinearChoice, LinearOutput, MemoryKind, Slice, Weight, contract,
};
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

impl Model {
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
