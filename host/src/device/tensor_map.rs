//! How the copy engine of a GPU sees a matrix: tensor maps.

use half::bf16;

use super::{Device, DeviceError, Slice};

/// Words of a tensor map.
pub const TENSOR_MAP_WORDS: usize = 16;

/// A dimension of what a tensor map describes, the innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dimension {
    /// Its length.
    pub len: usize,
    /// Elements from one index to the next: 1 for the innermost dimension, a multiple of 8 (16 bytes) for the others.
    pub stride: usize,
    /// How many indices a copy takes, at most 256.
    pub boxed: usize,
}

impl Device {
    /// The tensor map of `source`, whose dimensions are these, for copies of boxes whose rows are 128 bytes and land with the 128-byte
    /// swizzle. Kernels get it in memory of the device.
    ///
    /// # Errors
    /// Not on the CPU; dimensions that are not inside `source`, or that the driver refuses.
    pub fn tensor_map(
        &self,
        source: &Slice<'_, bf16>,
        dimensions: &[Dimension],
    ) -> Result<[u64; TENSOR_MAP_WORDS], DeviceError> {
        let Self::Cuda(device) = self else {
            return Err(DeviceError::InvalidDevice("tensor maps are a GPU's; the CPU copies without".to_owned()));
        };
        let last: usize = dimensions.iter().map(|one| one.len.saturating_sub(1) * one.stride).sum();
        let shaped = (2..=5).contains(&dimensions.len())
            && dimensions[0].stride == 1
            && dimensions.iter().all(|one| one.len > 0 && (1..=256).contains(&one.boxed))
            && dimensions[1..].iter().all(|one| one.stride.is_multiple_of(8))
            && last < source.len();
        if !shaped {
            return Err(DeviceError::InvalidParameter(format!(
                "{dimensions:?} is no tensor map of {} elements",
                source.len()
            )));
        }
        device.tensor_map(source.address(), dimensions)
    }
}
