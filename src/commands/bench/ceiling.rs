//! What the device can do at most, measured in the same run: copying its memory, and one large matrix product.

use half::bf16;
use host::device::{Device, DeviceError, MemoryKind};
use host::ops;
use host::testing::TestRng;

use super::figure::Figure;

/// The device's own limits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ceilings {
    /// Bytes read plus bytes written per second of a copy.
    pub(super) bytes_per_second: f64,
    /// Operations per second of a bf16 matrix product under the numeric contract.
    pub(super) flops_per_second: f64,
}

/// How much is copied at once, and the side of the matrices: beyond the caches, short of a second.
struct Sizes {
    copied_bytes: usize,
    repeats: usize,
    rows: usize,
    width: usize,
}

impl Sizes {
    fn of(device: &Device) -> Result<Self, DeviceError> {
        if !device.is_cuda() {
            return Ok(Self { copied_bytes: 128 << 20, repeats: 2, rows: 256, width: 1024 });
        }
        // Nobody needs a large GPU's whole memory for this, and a small one may not have two gigabytes left.
        let quarter = device.memory_info()?.free_bytes / 4;
        let copied_bytes = usize::try_from(quarter).unwrap_or(usize::MAX).clamp(4096, 1 << 30);
        Ok(Self { copied_bytes, repeats: 8, rows: 8192, width: 8192 })
    }
}

/// Measures both, each as often as `runs` says.
pub(super) fn measure(device: &Device, runs: usize) -> Result<(Ceilings, [Figure; 2]), DeviceError> {
    let sizes = Sizes::of(device)?;
    let copy = copy(device, &sizes, runs)?;
    let product = product(device, &sizes, runs)?;
    let ceilings = Ceilings { bytes_per_second: copy.value * 1e9, flops_per_second: product.value * 1e12 };
    Ok((ceilings, [copy, product]))
}

/// Seconds of the device for `work`, `runs` times after one that is not counted.
pub(super) fn seconds(
    device: &Device,
    runs: usize,
    mut work: impl FnMut() -> Result<(), DeviceError>,
) -> Result<Vec<f64>, DeviceError> {
    let mut stopwatch = device.stopwatch()?;
    work()?;
    (0..runs)
        .map(|_| {
            stopwatch.start()?;
            work()?;
            stopwatch.stop()?;
            Ok(stopwatch.elapsed()?.as_secs_f64())
        })
        .collect()
}

fn copy(device: &Device, sizes: &Sizes, runs: usize) -> Result<Figure, DeviceError> {
    let len = sizes.copied_bytes / size_of::<u32>();
    let source = device.alloc::<u32>(len, MemoryKind::Other, "copied from")?;
    let mut destination = device.alloc::<u32>(len, MemoryKind::Other, "copied to")?;
    let seconds = seconds(device, runs, || {
        for _ in 0..sizes.repeats {
            device.copy(&source, &mut destination)?;
        }
        Ok(())
    })?;
    // A copy reads and writes.
    let bytes = (2 * sizes.repeats * len * size_of::<u32>()) as f64;
    let rates: Vec<f64> = seconds.iter().map(|seconds| bytes / seconds / 1e9).collect();
    Ok(Figure { bytes: Some(bytes), ..Figure::of("ceiling: device copy", "GB/s", &rates) })
}

fn product(device: &Device, sizes: &Sizes, runs: usize) -> Result<Figure, DeviceError> {
    let Sizes { rows, width, .. } = *sizes;
    // Random, because a GPU multiplies zeros faster.
    let mut random = TestRng::new(1);
    let mut values = |count: usize| (0..count).map(|_| bf16::from_f32(random.next_f32())).collect::<Vec<_>>();
    let x = device.alloc_from(&values(rows * width), MemoryKind::Other, "left matrix")?;
    let weight = device.alloc_from(&values(width * width), MemoryKind::Other, "right matrix")?;
    let weight = device.prepare_weight(weight, width, width, false)?;
    let mut out = device.alloc_unwritten::<bf16>(rows * width, MemoryKind::Other, "product")?;
    let seconds = seconds(device, runs, || ops::linear(device, &x.as_slice(), &weight, &mut out.as_slice_mut()))?;
    let flops = 2.0 * rows as f64 * width as f64 * width as f64;
    let rates: Vec<f64> = seconds.iter().map(|seconds| flops / seconds / 1e12).collect();
    Ok(Figure { flops: Some(flops), ..Figure::of("ceiling: matrix product", "TFLOP/s", &rates) })
}
