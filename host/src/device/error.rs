//! What can go wrong on a device, with codes that never change.

use super::MemoryKind;

/// A stable error code: clients match on its string, logs and tools on its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The ordinal names no device, or the device cannot be used.
    InvalidDevice,
    /// An allocation did not fit.
    OutOfMemory,
    /// Kernels or weights could not be put on the device.
    ModelLoadFailed,
    /// A copy, a synchronisation or an earlier asynchronous step failed.
    InferenceFailed,
    /// The caller passed what no device accepts.
    InvalidParameter,
    /// A kernel or a linear layer could not be started.
    KernelLaunchFailed,
    /// Memory that must lie on the device does not.
    ResidencyFailed,
    /// There is no driver or no device.
    DeviceNotFound,
    /// Anything else.
    Unknown,
}

impl ErrorCode {
    /// Every code, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::InvalidDevice,
        Self::OutOfMemory,
        Self::ModelLoadFailed,
        Self::InferenceFailed,
        Self::InvalidParameter,
        Self::KernelLaunchFailed,
        Self::ResidencyFailed,
        Self::DeviceNotFound,
        Self::Unknown,
    ];

    /// Its number: 1 to 8, or 99.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::InvalidDevice => 1,
            Self::OutOfMemory => 2,
            Self::ModelLoadFailed => 3,
            Self::InferenceFailed => 4,
            Self::InvalidParameter => 5,
            Self::KernelLaunchFailed => 6,
            Self::ResidencyFailed => 7,
            Self::DeviceNotFound => 8,
            Self::Unknown => 99,
        }
    }

    /// The code of a number; [`Unknown`](Self::Unknown) for any other number.
    #[must_use]
    pub fn from_number(number: i32) -> Self {
        Self::ALL.into_iter().find(|code| code.number() == number).unwrap_or(Self::Unknown)
    }

    /// Its string, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidDevice => "INVALID_DEVICE",
            Self::OutOfMemory => "VRAM_OOM",
            Self::ModelLoadFailed => "MODEL_LOAD_FAILED",
            Self::InferenceFailed => "INFERENCE_FAILED",
            Self::InvalidParameter => "INVALID_PARAMETER",
            Self::KernelLaunchFailed => "KERNEL_LAUNCH_FAILED",
            Self::ResidencyFailed => "VRAM_RESIDENCY_FAILED",
            Self::DeviceNotFound => "DEVICE_NOT_FOUND",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// True when the same call may succeed later: only for memory that others may give back.
    #[must_use]
    pub fn is_retriable(self) -> bool {
        self == Self::OutOfMemory
    }
}

/// A failure of a device. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// See [`ErrorCode::InvalidDevice`].
    #[error("invalid device: {0}")]
    InvalidDevice(String),
    /// See [`ErrorCode::OutOfMemory`].
    #[error(
        "out of device memory: {requested_bytes} bytes for {label} ({kind}) do not fit, {free_bytes} bytes are free; \
         use a smaller model, context or batch. In use: {breakdown}"
    )]
    OutOfMemory {
        /// The size of the allocation that failed.
        requested_bytes: u64,
        /// What was free then, in bytes.
        free_bytes: u64,
        /// What the memory was for.
        kind: MemoryKind,
        /// Its name.
        label: String,
        /// What is allocated, by kind.
        breakdown: String,
    },
    /// See [`ErrorCode::ModelLoadFailed`].
    #[error("load failed: {0}")]
    ModelLoadFailed(String),
    /// See [`ErrorCode::InferenceFailed`].
    #[error("inference failed: {0}")]
    InferenceFailed(String),
    /// See [`ErrorCode::InvalidParameter`].
    #[error("invalid parameter: {0}")]
    InvalidParameter(String),
    /// See [`ErrorCode::KernelLaunchFailed`].
    #[error("launch failed: {0}")]
    KernelLaunchFailed(String),
    /// See [`ErrorCode::ResidencyFailed`].
    #[error("memory is not resident: {0}")]
    ResidencyFailed(String),
    /// See [`ErrorCode::DeviceNotFound`].
    #[error("no device: {0}")]
    DeviceNotFound(String),
    /// See [`ErrorCode::Unknown`].
    #[error("unknown device error: {0}")]
    Unknown(String),
}

impl DeviceError {
    /// Its code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidDevice(_) => ErrorCode::InvalidDevice,
            Self::OutOfMemory { .. } => ErrorCode::OutOfMemory,
            Self::ModelLoadFailed(_) => ErrorCode::ModelLoadFailed,
            Self::InferenceFailed(_) => ErrorCode::InferenceFailed,
            Self::InvalidParameter(_) => ErrorCode::InvalidParameter,
            Self::KernelLaunchFailed(_) => ErrorCode::KernelLaunchFailed,
            Self::ResidencyFailed(_) => ErrorCode::ResidencyFailed,
            Self::DeviceNotFound(_) => ErrorCode::DeviceNotFound,
            Self::Unknown(_) => ErrorCode::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table that clients rely on. A change here breaks them: do not edit, add.
    #[test]
    fn codes_are_frozen() {
        let table = ErrorCode::ALL.map(|code| (code.number(), code.as_str(), code.is_retriable()));
        assert_eq!(
            table,
            [
                (1, "INVALID_DEVICE", false),
                (2, "VRAM_OOM", true),
                (3, "MODEL_LOAD_FAILED", false),
                (4, "INFERENCE_FAILED", false),
                (5, "INVALID_PARAMETER", false),
                (6, "KERNEL_LAUNCH_FAILED", false),
                (7, "VRAM_RESIDENCY_FAILED", false),
                (8, "DEVICE_NOT_FOUND", false),
                (99, "UNKNOWN", false),
            ]
        );
    }

    #[test]
    fn numbers_round_trip_and_the_rest_is_unknown() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_number(code.number()), code);
        }
        for number in [-1, 0, 9, 98, 100, 999, i32::MIN, i32::MAX] {
            assert_eq!(ErrorCode::from_number(number), ErrorCode::Unknown);
        }
    }

    #[test]
    fn messages_name_their_category_and_keep_the_detail() {
        let detail = || "the detail".to_owned();
        let errors = [
            DeviceError::InvalidDevice(detail()),
            DeviceError::ModelLoadFailed(detail()),
            DeviceError::InferenceFailed(detail()),
            DeviceError::InvalidParameter(detail()),
            DeviceError::KernelLaunchFailed(detail()),
            DeviceError::ResidencyFailed(detail()),
            DeviceError::DeviceNotFound(detail()),
            DeviceError::Unknown(detail()),
        ];
        for error in errors {
            let text = error.to_string();
            assert!(text.ends_with(": the detail") && text.len() > ": the detail".len(), "{text}");
        }
    }
}
