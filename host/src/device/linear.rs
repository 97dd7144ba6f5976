//! Linear layers, `out[m, n] = x[m, k] * weight[n, k]` transposed: their types and their numeric contract.

use cuda_std::Element;
use half::bf16;

use super::{Buffer, DeviceError, cpu};

/// The numeric contract: what the bits of a linear layer may depend on.
pub mod contract {
    /// Names the contract in the fingerprint of a server. Raised whenever the bits of any operation are changed on purpose.
    pub const VERSION: u32 = 2;

    /// Into how many equal, consecutive segments K is cut in a layer whose output is added to the residual stream: attention
    /// output and down projection. Each segment is a chain from 0, and the result is residual + (((s0 + s1) + s2) + s3) in
    /// f32. Every other layer is one chain. It depends on the weight's shape only, never on the number of rows that happen
    /// to be in a batch.
    ///
    /// The reason is time: at one row a layer takes as long as its chain of dependent products or as its weights' way from
    /// memory, whichever is longer. Both grow with K, so N alone decides which: the chain is about 1900 / N times as long.
    /// With K = 4864 and N = 896 a layer takes 10.4, 6.5 and 4.7 microseconds on an H100 in 1, 2 and 4 segments. Where K is
    /// short there is little to win, and a step of many rows writes and reads every part. 64 divides a segment so that
    /// kernels load it in whole stages.
    #[must_use]
    pub fn segments(n: usize, k: usize) -> usize {
        let most = match n {
            0..=1024 => 4,
            1025..=2048 => 2,
            _ => 1,
        };
        let fits = |segments: &usize| *segments <= most && k >= 2048 && k.is_multiple_of(64 * segments);
        [4, 2].into_iter().find(fits).unwrap_or(1)
    }
}

/// Who computes linear layers on a CUDA device. Their bits are equal where the self-test says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearBackend {
    /// cuBLASLt, through `Device::linear`.
    CublasLt,
    /// The Rust tensor-core kernel, launched by the operations.
    Kernel,
}

/// What a linear layer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputType {
    /// The f32 sums.
    F32,
    /// The f32 sums, rounded once to the nearest bf16, ties to even.
    Bf16,
    /// The f32 sums of each of so many segments of K, one matrix after the other.
    Parts(usize),
}

mod sealed {
    pub trait Sealed {
        /// What is written for a sum.
        fn from_sum(sum: f32) -> Self;
    }

    impl Sealed for f32 {
        fn from_sum(sum: f32) -> Self {
            sum
        }
    }

    impl Sealed for half::bf16 {
        fn from_sum(sum: f32) -> Self {
            cuda_std::bf16::f32_to_bf16(sum)
        }
    }
}

/// Elements that a linear layer can write: `f32` and `bf16`.
pub trait LinearOutput: Element + sealed::Sealed {
    /// Which of them.
    const TYPE: OutputType;
}

impl LinearOutput for f32 {
    const TYPE: OutputType = OutputType::F32;
}

impl LinearOutput for bf16 {
    const TYPE: OutputType = OutputType::Bf16;
}

/// A linear layer's weight, in the form that its device computes with.
#[derive(Debug)]
pub struct Weight {
    /// Output features.
    pub(super) n: usize,
    /// Input features.
    pub(super) k: usize,
    /// Row-major, one row per output feature.
    pub(super) rows: Option<Buffer<bf16>>,
    /// The CPU's own form.
    pub(super) packed: Option<cpu::PackedWeight>,
}

impl Weight {
    /// Output features.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// The weight as it was given, `[n, k]` row-major, where it is still there: always on CUDA, on the CPU only when
    /// `prepare_weight` was told to keep it.
    ///
    /// # Errors
    /// It was given up.
    pub fn rows(&self) -> Result<&Buffer<bf16>, DeviceError> {
        self.rows.as_ref().ok_or_else(|| {
            DeviceError::InvalidParameter(
                "this weight's rows were given up; prepare it with keep_rows to read them".to_owned(),
            )
        })
    }
}

/// Checks a layer's shapes and returns the rows `m`.
pub(super) fn check_shapes(x: usize, weight: &Weight, segments: usize, out: usize) -> Result<usize, DeviceError> {
    let (n, k) = (weight.n, weight.k);
    let m = x / k;
    if m == 0 || x != m * k || segments == 0 || !k.is_multiple_of(segments) || out != segments * m * n {
        return Err(DeviceError::InvalidParameter(format!(
            "a linear layer of {n} x {k} in {segments} segments, which divide {k}, takes m * {k} inputs and \
             {segments} * m * {n} outputs with m >= 1, not {x} and {out}"
        )));
    }
    Ok(m)
}

#[cfg(test)]
mod tests {
    use super::contract::segments;

    #[test]
    fn segments_follow_the_shape() {
        // Down projections and attention outputs of models as they are, and both sides of every bound.
        for (n, k, expected) in [
            (896, 4864, 4),
            (896, 896, 1),
            (1024, 3072, 4),
            (1024, 2048, 4),
            (1536, 8960, 2),
            (2048, 8192, 2),
            (2048, 2048, 2),
            (2560, 9728, 1),
            (4096, 14336, 1),
            (256, 512, 1),
            (1025, 4096, 2),
            (2049, 4096, 1),
            (1024, 2047, 1),
            (1024, 1984, 1),
            (1024, 2048 + 128, 2),
            (1024, 2048 + 64, 1),
            (1024, 2048 + 256, 4),
            (2048, 2048 + 64, 1),
            (1, 2048, 4),
        ] {
            assert_eq!(segments(n, k), expected, "{n} x {k}");
        }
    }
}
