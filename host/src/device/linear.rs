//! Linear layers, `out[m, n] = x[m, k] * weight[n, k]` transposed: their types and their numeric contract.

use cuda_std::Element;
use half::bf16;

use super::{Buffer, DeviceError, cpu};

/// The numeric contract: what the bits of a linear layer may depend on.
pub mod contract {
    /// Names the contract in the fingerprint of a server. Raised whenever the bits of any operation are changed on purpose.
    pub const VERSION: u32 = 1;

    /// Into how many equal, consecutive segments K is cut; their sums are added in order. It may depend on the
    /// weight's shape only, never on the number of rows that happen to be in a batch.
    #[must_use]
    pub fn segments(_n: usize, _k: usize) -> usize {
        1
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
pub(super) fn check_shapes(x: usize, weight: &Weight, out: usize) -> Result<usize, DeviceError> {
    let (n, k) = (weight.n, weight.k);
    let m = x / k;
    if m == 0 || x != m * k || out != m * n {
        return Err(DeviceError::InvalidParameter(format!(
            "a linear layer of {n} x {k} takes m * {k} inputs and m * {n} outputs with m >= 1, not {x} and {out}"
        )));
    }
    Ok(m)
}
