//! The memory of a step's intermediate values.

use half::bf16;

use super::arena::{Arena, ArenaSizes, Logits};
use super::decode::{self, Tokens};
use super::recordings::Recordings;
use super::{Model, StepLimits, prefill};
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, contract};
use crate::ops::{self, Mapped, PAGE, PrefillTiles, ROW_WORDS, StepMemory, TensorMaps};

/// f32 elements of attention partials (64 MiB) that a step has at most, as long as one row needs no more. Hundreds of
/// long contexts would need gigabytes; beyond this they are computed in groups, one after the other.
const PARTIALS: usize = 1 << 24;

/// Rows that a feed-forward layer takes at once: a long prefill goes through it in parts. Between gate, up and down a row has
/// 3 times the feed-forward width in bf16, which parts of about 1024 rows keep in a GPU's second-level cache, at the price of
/// products whose tiles fill a GPU less well. `cargo test --test kernels -- --ignored --nocapture prefill::speed` measures
/// both. At least the longest prefill of a step: not cut. It changes no bit.
const FEED_ROWS: usize = 4096;

/// The records of draws start at multiples of so many words, 16 bytes.
pub(super) const DRAW_ALIGN: usize = 4;

/// The memory of a step's intermediate values, allocated once and used again by each step.
#[derive(Debug)]
pub struct Workspace {
    limits: StepLimits,
    vocab: usize,
    /// Tokens, positions, row tables, logits rows, draws, prefill tiles and page tables of a step: one upload.
    pub(super) indices: Buffer<u32>,
    pub(super) staging: Vec<u32>,
    pub(super) residual: Buffer<f32>,
    pub(super) normed: Buffer<bf16>,
    pub(super) qkv: Buffer<f32>,
    pub(super) counters: Buffer<u32>,
    pub(super) attended: Buffer<bf16>,
    /// Gate and up, gated, attention partials, parts of a layer's output; then logits.
    pub(super) arena: Arena,
    /// Rows that a feed-forward layer takes at once.
    pub(super) feed_rows: usize,
    pub(super) head_rows: Buffer<f32>,
    pub(super) head_normed: Buffer<bf16>,
    /// The best token that each block of the head found.
    pub(super) best: Buffer<u64>,
    /// The tokens chosen by the step, of the rows with logits.
    pub(super) chosen: Buffer<u32>,
    /// Of decode steps.
    pub(super) recordings: Recordings<decode::Bucket>,
    /// Of prefills.
    pub(super) prefills: Recordings<prefill::Bucket>,
    /// Of steps in one kernel.
    pub(super) step_memory: StepMemory,
    /// Of the weights and of what is multiplied with them, where warpgroups multiply.
    pub(super) tensor_maps: Option<TensorMaps>,
}

impl Model {
    /// A workspace for steps up to `limits`.
    ///
    /// # Errors
    /// No memory, or a limit of 0.
    pub fn workspace(&self, limits: StepLimits) -> Result<Workspace, DeviceError> {
        let (config, heads, device) = (self.config(), self.heads(), self.device());
        let spans = self.context_tokens().div_ceil(PAGE);
        let partials = |rows| ops::partials_len(heads, rows, spans);
        let bounded_partials = partials(limits.decode_rows).min(PARTIALS.max(partials(1)));
        let tiles = PrefillTiles::numbers_of(limits.rows);
        let draws = limits.logits_rows * ROW_WORDS + DRAW_ALIGN;
        let indices = 3 * limits.rows + limits.logits_rows + limits.table_entries + tiles + draws;
        let counters = ops::counters_len(heads, limits.decode_rows.max(1));
        let segments = |k| contract::segments(config.hidden, k);
        let feed_rows = limits.rows.min(FEED_ROWS.max(limits.decode_rows));
        let part_rows = (segments(heads.query_width()) * limits.rows).max(segments(config.ffn) * feed_rows);
        let activation = |len: usize, label: &str| device.alloc_unwritten::<f32>(len, MemoryKind::Activations, label);
        let operand = |len: usize, label: &str| device.alloc_unwritten::<bf16>(len, MemoryKind::Activations, label);
        let mut workspace = Workspace {
            limits,
            vocab: config.vocab,
            indices: device.alloc_unwritten(indices, MemoryKind::Activations, "step indices")?,
            staging: Vec::with_capacity(indices),
            residual: activation(limits.rows * config.hidden, "residual stream")?,
            normed: operand(limits.rows * config.hidden, "normalised rows")?,
            qkv: activation(limits.rows * heads.qkv_width(), "queries, keys and values")?,
            counters: device.alloc(counters, MemoryKind::Activations, "attention counters")?,
            attended: operand(limits.rows * heads.query_width(), "attention output")?,
            arena: Arena::new(
                device,
                ArenaSizes {
                    gate_up: feed_rows * 2 * config.ffn,
                    gated: feed_rows * config.ffn,
                    scratch: bounded_partials.max(part_rows * config.hidden),
                    logits: limits.logits_rows * config.vocab,
                    spare: ops::spare_for_choosing(device, limits.logits_rows, config.vocab),
                },
            )?,
            feed_rows: FEED_ROWS,
            head_rows: activation(limits.logits_rows * config.hidden, "rows with logits")?,
            head_normed: operand(limits.logits_rows * config.hidden, "normalised rows with logits")?,
            best: device.alloc_unwritten(
                ops::best_len(device)
                    .max(ops::tile_best_len(device))
                    .max(ops::wgmma_best_len(device, limits.logits_rows)),
                MemoryKind::Activations,
                "best tokens",
            )?,
            chosen: device.alloc_unwritten(limits.logits_rows, MemoryKind::Activations, "chosen tokens")?,
            recordings: Recordings::new(decode::RECORDINGS),
            prefills: Recordings::new(prefill::RECORDINGS),
            step_memory: StepMemory::new(device, heads, config.hidden, config.ffn, config.layers)?,
            tensor_maps: None,
        };
        if self.ways.has_warpgroups() {
            workspace.tensor_maps = Some(self.tensor_maps(&mut workspace)?);
        }
        Ok(workspace)
    }

    /// The tensor maps of its weights and of a workspace's values.
    fn tensor_maps(&self, workspace: &mut Workspace) -> Result<TensorMaps, DeviceError> {
        let (hidden, ffn, heads) = (self.config().hidden, self.config().ffn, self.heads());
        let gated = workspace.arena.layers()?.gated;
        let long = ops::wgmma_long_fits(self.device(), heads, hidden, ffn);
        let values = [
            Mapped::QkvInput(workspace.normed.as_slice(), hidden),
            Mapped::PartsInput(workspace.attended.as_slice(), heads.query_width()),
            Mapped::GateUpInput(workspace.normed.as_slice(), hidden),
            Mapped::PartsInput(gated.as_slice(), ffn),
            Mapped::LogitsInput(workspace.head_normed.as_slice(), hidden),
            Mapped::Logits(self.head()),
        ];
        let layers = self.parameters.layers.iter();
        let weights = layers.flat_map(|layer| {
            [
                Mapped::Qkv(&layer.qkv, heads.width),
                Mapped::Parts(&layer.output),
                Mapped::GateUp(&layer.gate_up),
                Mapped::Parts(&layer.down),
            ]
        });
        let long_inputs = [
            Mapped::LongQkvInput(workspace.normed.as_slice(), hidden),
            Mapped::LongGateUpInput(workspace.normed.as_slice(), hidden),
            Mapped::LongResidualInput(workspace.attended.as_slice(), heads.query_width()),
            Mapped::LongResidualInput(gated.as_slice(), ffn),
        ];
        let long_weights = self.parameters.layers.iter().flat_map(|layer| {
            [
                Mapped::LongQkv(&layer.qkv),
                Mapped::LongResidual(&layer.output),
                Mapped::LongGateUp(&layer.gate_up),
                Mapped::LongResidual(&layer.down),
            ]
        });
        let longs = long_inputs.into_iter().chain(long_weights).filter(|_| long);
        TensorMaps::new(self.device(), values.into_iter().chain(weights).chain(longs))
    }
}

impl Workspace {
    /// How large a step may be.
    #[must_use]
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// From now on feed-forward layers take at most `rows` rows at once, or as many as there is memory for. It changes no bit;
    /// for tests and measurements.
    pub fn feed_at_once(&mut self, rows: usize) {
        self.feed_rows = rows.clamp(1, FEED_ROWS);
    }

    /// Overwrites every intermediate value with NaN. For tests: whoever reads one before it is written shows it.
    ///
    /// # Errors
    /// The device's error.
    pub fn poison(&mut self, device: &Device) -> Result<(), DeviceError> {
        let Self {
            residual,
            normed,
            qkv,
            attended,
            arena,
            head_rows,
            head_normed,
            best,
            chosen,
            step_memory,
            tensor_maps: _,
            // Uploaded for each step, or left as they were found, or no values.
            limits: _,
            vocab: _,
            feed_rows: _,
            indices: _,
            staging: _,
            recordings: _,
            prefills: _,
            counters: _,
        } = self;
        arena.poison(device)?;
        step_memory.poison(device)?;
        for buffer in [residual, qkv, head_rows] {
            let poison = vec![f32::NAN; buffer.len()];
            device.upload(buffer, &poison)?;
        }
        for buffer in [normed, attended, head_normed] {
            let poison = vec![bf16::NAN; buffer.len()];
            device.upload(buffer, &poison)?;
        }
        let poison = vec![u64::MAX; best.len()];
        device.upload(best, &poison)?;
        let poison = vec![u32::MAX; chosen.len()];
        device.upload(chosen, &poison)?;
        Ok(())
    }

    /// Puts the chosen tokens in the place of the step's, where they are wanted.
    pub(super) fn take_tokens(&mut self, device: &Device, tokens: Tokens, rows: usize) -> Result<(), DeviceError> {
        if tokens == Tokens::Given {
            return Ok(());
        }
        device.copy(self.chosen.slice(..rows)?, self.indices.slice_mut(..rows)?)
    }

    /// The tokens \[R\] that the last [`Model::forward_choosing`] with `rows` = R logits rows chose.
    ///
    /// # Errors
    /// More rows than the workspace has.
    pub fn chosen(&self, rows: usize) -> Result<Slice<'_, u32>, DeviceError> {
        self.chosen.slice(..rows)
    }

    /// The logits \[R, V\] of the last step with `rows` = R logits rows.
    ///
    /// # Errors
    /// More rows than the workspace has.
    pub fn logits(&self, rows: usize) -> Result<Slice<'_, f32>, DeviceError> {
        self.arena.written_logits(rows * self.vocab)
    }

    /// As [`Self::logits`], with memory for choosing tokens among them.
    ///
    /// # Errors
    /// As for `logits`.
    pub fn logits_and_spare(&mut self, rows: usize) -> Result<Logits<'_>, DeviceError> {
        self.arena.logits(rows * self.vocab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;
    use crate::model::test_folder::TestFolder;

    #[test]
    fn poison_is_in_every_value() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let model = Model::load(&device, TestFolder::qwen2().write().path(), None, &mut |_, _| {}).unwrap();
        let limits = StepLimits { rows: 3, decode_rows: 2, logits_rows: 2, table_entries: 4 };
        let mut workspace = model.workspace(limits).unwrap();
        for zeros in [&mut workspace.residual, &mut workspace.qkv, &mut workspace.head_rows] {
            device.fill_zero(zeros).unwrap();
        }
        for zeros in [&mut workspace.normed, &mut workspace.attended, &mut workspace.head_normed] {
            device.fill_zero(zeros).unwrap();
        }
        device.fill_zero(&mut workspace.best).unwrap();
        device.fill_zero(&mut workspace.chosen).unwrap();
        workspace.poison(&device).unwrap();
        for floats in [&workspace.residual, &workspace.qkv, &workspace.head_rows] {
            assert!(device.download(floats).unwrap().iter().all(|value| value.is_nan()));
        }
        for halves in [&workspace.normed, &workspace.attended, &workspace.head_normed] {
            assert!(device.download(halves).unwrap().iter().all(|value| value.is_nan()));
        }
        assert!(device.download(workspace.logits(2).unwrap()).unwrap().iter().all(|value| value.is_nan()));
        for words in [workspace.best.as_slice(), workspace.step_memory.words()] {
            assert!(device.download(words).unwrap().iter().all(|&word| word == u64::MAX));
        }
        assert_eq!(device.download(&workspace.chosen).unwrap(), [u32::MAX; 2]);
    }
}
