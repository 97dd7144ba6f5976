//! What an engine is set up with, and how large its KV cache becomes.

use std::time::Duration;

use crate::device::{Device, DeviceError};

/// What an engine is set up with. None of it changes an answer.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Requests that may wait.
    pub queue: usize,
    /// Tokens that one step computes at most, of all requests together.
    pub chunk_tokens: usize,
    /// Requests that are generated at once at most.
    pub max_running: usize,
    /// How much memory the KV cache gets.
    pub cache: CacheSize,
    /// How often memory is checked to be where it should be.
    pub residency_check: Duration,
}

/// How much memory the KV cache gets. Except for [`Pages`](Self::Pages) it holds at least one full context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CacheSize {
    /// This part of the memory that is free once everything else is allocated, 0 to 1.
    FreeFraction(f64),
    /// At most so many bytes.
    Bytes(u64),
    /// So many pages. Requests that need more are refused.
    Pages(usize),
}

impl EngineOptions {
    /// What suits the device.
    #[must_use]
    pub fn for_device(device: &Device) -> Self {
        let residency_check = Duration::from_secs(60);
        if device.is_cuda() {
            let cache = CacheSize::FreeFraction(0.9);
            Self { queue: 256, chunk_tokens: 4096, max_running: 256, cache, residency_check }
        } else {
            let cache = CacheSize::Bytes(128 << 20);
            Self { queue: 256, chunk_tokens: 256, max_running: 32, cache, residency_check }
        }
    }

    /// An error where nothing could be computed.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        if self.chunk_tokens == 0 || self.max_running == 0 {
            return Err(DeviceError::InvalidParameter(format!(
                "steps of {} tokens for {} requests: allow at least one of each",
                self.chunk_tokens, self.max_running
            )));
        }
        Ok(())
    }
}

impl CacheSize {
    /// Pages of `page_bytes`; a context has `context_pages`.
    pub(super) fn pages(self, device: &Device, page_bytes: u64, context_pages: usize) -> Result<usize, DeviceError> {
        let bytes = match self {
            Self::Pages(pages) => return Ok(pages),
            Self::Bytes(bytes) => bytes,
            Self::FreeFraction(fraction) => (device.memory_info()?.free_bytes as f64 * fraction.clamp(0.0, 1.0)) as u64,
        };
        // Page numbers are u32 on the device.
        let fitting = usize::try_from(bytes / page_bytes).unwrap_or(usize::MAX).min(u32::MAX as usize);
        Ok(fitting.max(context_pages))
    }
}
