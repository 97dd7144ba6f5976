//! Linear layers: whatever serves them gives the bits of the contract's chain, at every number of tokens.

use half::bf16;

use super::Line;
use crate::device::{Device, DeviceError, LinearBackend, LinearOutput, MemoryKind, Slice, SliceMut, Weight};
use crate::model::{LinearLayer, Model};
use crate::ops;
use crate::testing::TestRng;

/// Token counts of the quick check.
pub(super) const QUICK: [usize; 8] = [1, 2, 8, 9, 17, 64, 100, 256];

/// Token counts of the full check: 1 to 64 and ten larger ones.
pub(super) const FULL: [usize; 74] = with_larger([65, 100, 128, 129, 255, 256, 512, 1000, 2048, 4096]);

/// The same for the head, whose outputs are many.
pub(super) const FULL_HEAD: [usize; 74] = with_larger([65, 72, 96, 100, 127, 128, 129, 200, 255, 256]);

const fn with_larger(larger: [usize; 10]) -> [usize; 74] {
    let mut all = [0; 74];
    let mut index = 0;
    while index < 74 {
        all[index] = if index < 64 { index + 1 } else { larger[index - 64] };
        index += 1;
    }
    all
}

/// A line for each linear layer's shape.
pub(super) fn check(model: &Model, counts: &[usize], head_counts: &[usize]) -> Result<Vec<Line>, DeviceError> {
    let device = model.device();
    let mut lines = Vec::new();
    for LinearLayer { name, weight, segments } in model.linear_layers() {
        let shape = (weight.n(), weight.k());
        let counts = if name == "head" { head_counts } else { counts };
        // The gate's output is the only one that is rounded to bf16; the plain chain exists for f32 alone.
        let (wrong, values) = match (device.tensor_cores(), name) {
            (false, _) => compare::<f32>(device, shape, segments, counts, ops::linear_parts, ops::linear_parts_plain)?,
            (true, "gate and up") => compare::<bf16>(device, shape, 1, counts, ops::linear, ops::linear_kernel)?,
            (true, _) => compare::<f32>(device, shape, segments, counts, ops::linear_parts, ops::linear_parts_kernel)?,
        };
        let parts = if segments == 1 { String::new() } else { format!(" in {segments} segments") };
        let (chain, served) = match (device.tensor_cores(), device.linear_backend()) {
            (true, LinearBackend::CublasLt) => ("k16 tensor-core chain", "cuBLASLt"),
            (true, LinearBackend::Kernel) => ("k16 tensor-core chain", "our kernel"),
            (false, _) => ("plain chain", "the CPU's linear layer"),
        };
        lines.push(Line::new(
            format!("{name} [{}, {}]{parts}: {served} = {chain}", shape.0, shape.1),
            format!(
                "{wrong} of {values} values differ, {} token counts from 1 to {}",
                counts.len(),
                counts.last().unwrap_or(&0)
            ),
            wrong == 0,
        ));
    }
    Ok(lines)
}

/// What serves: x \[M, K\], weight \[N, K\], out \[S, M, N\].
type Served<O> = fn(&Device, &Slice<'_, bf16>, &Weight, &mut SliceMut<'_, O>) -> Result<(), DeviceError>;

/// A kernel that defines the contract: x \[M, K\], weight \[N, K\], out \[S, M, N\], K.
type Chain<O> = fn(&Device, &Slice<'_, bf16>, &Slice<'_, bf16>, &mut SliceMut<'_, O>, usize) -> Result<(), DeviceError>;

/// How many of how many outputs differ between the device's linear layer and the contract's kernel, on random data.
fn compare<O: LinearOutput + ops::Comparable>(
    device: &Device,
    (n, k): (usize, usize),
    segments: usize,
    counts: &[usize],
    serve: Served<O>,
    contract: Chain<O>,
) -> Result<(u64, u64), DeviceError> {
    let most = counts.iter().copied().max().unwrap_or(1);
    let mut random = TestRng::new(0x010c_57e9);
    let kind = MemoryKind::Other;
    let tokens = device.alloc_from(&random.bf16s(most * k), kind, "self-test tokens")?;
    let rows = device.alloc_from(&random.bf16s(n * k), kind, "self-test weight")?;
    let weight = device.prepare_weight(rows, n, k, true)?;
    let mut served = device.alloc_unwritten::<O>(segments * most * n, kind, "self-test output")?;
    let mut expected = device.alloc_unwritten::<O>(segments * most * n, kind, "self-test expectation")?;
    let (mut wrong, mut values) = (0, 0);
    for &m in counts {
        let x = tokens.slice(..m * k)?;
        let mut served = served.slice_mut(..segments * m * n)?;
        let mut expected = expected.slice_mut(..segments * m * n)?;
        serve(device, &x, &weight, &mut served)?;
        contract(device, &x, &weight.rows()?.as_slice(), &mut expected, k)?;
        wrong += u64::from(ops::differing(device, &served.as_slice(), &expected.as_slice())?);
        values += (segments * m * n) as u64;
    }
    Ok((wrong, values))
}
