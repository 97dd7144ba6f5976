//! Brings a model folder onto a device.

use half::bf16;
use half::slice::HalfBitsSliceExt;

use super::{Checkpoint, ModelConfig, ModelError, Weight as Pieces, architecture};
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, Weight};

/// Why a model could not be loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    /// The folder is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device is at fault.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl LoadError {
    /// A stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Model(error) => error.code(),
            Self::Device(error) => error.code().as_str(),
        }
    }
}

/// A layer's weights on a device.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_norm: Buffer<bf16>,
    pub(super) qkv: Weight,
    pub(super) qkv_bias: Option<Buffer<bf16>>,
    pub(super) output: Weight,
    pub(super) post_norm: Buffer<bf16>,
    pub(super) gate_up: Weight,
    pub(super) down: Weight,
}

impl Layer {
    /// The bias of queries, keys and values; empty where the architecture has none.
    pub(super) fn bias(&self) -> Result<Slice<'_, bf16>, DeviceError> {
        self.qkv_bias.as_ref().map_or_else(|| self.input_norm.slice(..0), |bias| Ok(bias.as_slice()))
    }
}

/// All weights on a device.
#[derive(Debug)]
pub(super) struct Parameters {
    /// Also the head, where it is tied.
    pub(super) embedding: Weight,
    pub(super) head: Option<Weight>,
    pub(super) final_norm: Buffer<bf16>,
    pub(super) layers: Vec<Layer>,
}

/// Uploads every weight. `progress(done, total)` is told bytes.
pub(super) fn parameters(
    device: &Device,
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Parameters, LoadError> {
    let weights = architecture::weights(config, checkpoint)?;
    let mut upload = Upload { device, done: 0, total: weights.byte_len() as u64, progress };
    (upload.progress)(0, upload.total);
    let embedding = upload.linear(&weights.embedding, "embedding", true)?;
    let mut layers = Vec::with_capacity(weights.layers.len());
    for layer in &weights.layers {
        layers.push(Layer {
            input_norm: upload.vector(&layer.input_norm, "input norm")?,
            qkv: upload.linear(&layer.qkv, "query, key and value", false)?,
            qkv_bias: layer.qkv_bias.as_ref().map(|bias| upload.vector(bias, "bias")).transpose()?,
            output: upload.linear(&layer.output, "attention output", false)?,
            post_norm: upload.vector(&layer.post_norm, "post norm")?,
            gate_up: upload.linear(&layer.gate_up, "gate and up", false)?,
            down: upload.linear(&layer.down, "down", false)?,
        });
    }
    let final_norm = upload.vector(&weights.final_norm, "final norm")?;
    let head = weights.head.as_ref().map(|head| upload.linear(head, "head", false)).transpose()?;
    device.synchronize()?;
    Ok(Parameters { embedding, head, final_norm, layers })
}

struct Upload<'a> {
    device: &'a Device,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Upload<'_> {
    fn vector(&mut self, weight: &Pieces<'_>, label: &str) -> Result<Buffer<bf16>, DeviceError> {
        let mut buffer = self.device.alloc_unwritten::<bf16>(weight.element_count(), MemoryKind::Weights, label)?;
        let mut start = 0;
        for part in &weight.parts {
            let count = part.bytes.len() / size_of::<bf16>();
            let to = buffer.slice_mut(start..start + count)?;
            // The mapped file is aligned in practice; where it is not, the values are copied once.
            match bytemuck::try_cast_slice::<u8, u16>(part.bytes) {
                Ok(bits) if cfg!(target_endian = "little") => self.device.upload(to, bits.reinterpret_cast())?,
                _ => self.device.upload(to, &part.bf16_values().collect::<Vec<_>>())?,
            }
            start += count;
            self.done += part.bytes.len() as u64;
            (self.progress)(self.done, self.total);
        }
        Ok(buffer)
    }

    fn linear(&mut self, weight: &Pieces<'_>, label: &str, keep_rows: bool) -> Result<Weight, DeviceError> {
        let rows = self.vector(weight, label)?;
        self.device.prepare_weight(rows, weight.rows, weight.columns, keep_rows)
    }
}
