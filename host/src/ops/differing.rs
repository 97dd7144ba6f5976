//! Bit comparison on the device.

use cuda_std::launch::{Grid, Launch};
use half::bf16;

use super::expect;
use crate::device::{Device, DeviceError, MemoryKind, Slice};

/// An element whose bits can be compared.
pub trait Comparable: cuda_std::Element {
    /// The launch that counts.
    fn launch<'a>(
        a: &'a Slice<'_, Self>,
        b: &'a Slice<'_, Self>,
        count: &'a mut crate::device::Buffer<u32>,
    ) -> Launch<'a>;
}

impl Comparable for f32 {
    fn launch<'a>(
        a: &'a Slice<'_, Self>,
        b: &'a Slice<'_, Self>,
        count: &'a mut crate::device::Buffer<u32>,
    ) -> Launch<'a> {
        kernels_gpu::differing::differing_f32::launch(a, b, count)
    }
}

impl Comparable for bf16 {
    fn launch<'a>(
        a: &'a Slice<'_, Self>,
        b: &'a Slice<'_, Self>,
        count: &'a mut crate::device::Buffer<u32>,
    ) -> Launch<'a> {
        kernels_gpu::differing::differing_bf16::launch(a, b, count)
    }
}

/// How many elements of `a` and `b` differ in their bits. Waits for the device.
///
/// # Errors
/// Different or empty lengths, or the device's error.
pub fn differing<T: Comparable>(device: &Device, a: &Slice<'_, T>, b: &Slice<'_, T>) -> Result<u32, DeviceError> {
    let shaped = !a.is_empty() && a.len() == b.len() && u32::try_from(a.len()).is_ok();
    expect(shaped, "differing", || format!("lengths {} and {}", a.len(), b.len()))?;
    let mut count = device.alloc::<u32>(1, MemoryKind::Other, "differences")?;
    let blocks = a.len().div_ceil(256).min(1056) as u32;
    device.launch(T::launch(a, b, &mut count), Grid::new_1d(blocks))?;
    Ok(device.download(&count)?.first().copied().unwrap_or(u32::MAX))
}
