//! What an engine is set up with, and how large its KV cache becomes.

use std::time::Duration;

use crate::device::{Device, DeviceError};

/// What an engine is set up with. None of it changes an answer.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Requests that may wait.
    pub queue: usize,
    /// Tokens, of prompts and of answers at their longest, that the waiting requests may have together. A request that
    /// nobody waits before is taken whatever its length.
    pub queue_tokens: usize,
    /// Tokens that one step computes at most, of all requests together.
    pub chunk_tokens: usize,
    /// Requests that are generated at once at most.
    pub max_running: usize,
    /// How much memory the KV cache gets.
    pub cache: CacheSize,
    /// How often memory is checked to be where it should be.
    pub residency_check: Duration,
    /// Take the time of each step, on the device and by the clock, for [`Status::steps`](super::Status::steps). It costs
    /// some microseconds a step on a GPU.
    pub time_steps: bool,
    /// Conditions that tests put the engine under.
    pub trial: Trial,
}

/// Conditions under which `lockstep verify --batch` and the tests compare answers. A server has none of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    /// Free pages are given out in the order that this seed gives, instead of by number.
    pub page_order: Option<u64>,
    /// Before each step every intermediate value of the workspace, and every page that a sequence begins, is overwritten
    /// with NaN. Costs an upload of the whole workspace per step.
    pub poison: bool,
    /// Steps are given to the device ahead of their turn on a CPU too, which works while the engine waits: it only delays.
    pub ahead_anywhere: bool,
}

/// A full queue at 4096 tokens a request.
const QUEUE_TOKENS: usize = 1 << 20;

/// How much memory the KV cache gets. Except for [`Pages`](Self::Pages) it holds at least one full context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CacheSize {
    /// This part of the memory that is free once everything else is allocated, 0 to 1, as far as it is of use.
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
        let (residency_check, time_steps, trial) = (Duration::from_secs(60), false, Trial::default());
        if device.is_cuda() {
            let cache = CacheSize::FreeFraction(0.9);
            Self {
                queue: 256,
                queue_tokens: QUEUE_TOKENS,
                chunk_tokens: 4096,
                max_running: 256,
                cache,
                residency_check,
                time_steps,
                trial,
            }
        } else {
            let cache = CacheSize::Bytes(128 << 20);
            Self {
                queue: 256,
                queue_tokens: QUEUE_TOKENS,
                chunk_tokens: 256,
                max_running: 32,
                cache,
                residency_check,
                time_steps,
                trial,
            }
        }
    }

    /// For one request at a time: as much memory as one full context needs.
    #[must_use]
    pub fn for_one_request(device: &Device) -> Self {
        Self { max_running: 1, cache: CacheSize::Bytes(0), ..Self::for_device(device) }
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
    /// Pages of `page_bytes`; a context has `context_pages`, and `max_running` requests run at once.
    pub(super) fn pages(
        self,
        device: &Device,
        page_bytes: u64,
        context_pages: usize,
        max_running: usize,
    ) -> Result<usize, DeviceError> {
        let bytes = match self {
            Self::Pages(pages) => return Ok(pages),
            Self::Bytes(bytes) => bytes,
            Self::FreeFraction(fraction) => (device.memory_info()?.free_bytes as f64 * fraction.clamp(0.0, 1.0)) as u64,
        };
        let fitting = usize::try_from(bytes / page_bytes).unwrap_or(usize::MAX);
        // A small model needs no large GPU's whole memory: what all running requests can fill, and three times as much
        // for prompts to come.
        let useful = max_running.saturating_mul(context_pages).saturating_mul(4);
        Ok(fitting.min(useful).max(context_pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;

    #[test]
    fn the_cache_holds_a_context_and_no_more_than_is_useful() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let pages = |size: CacheSize| size.pages(&device, 1000, 8, 4).unwrap();
        assert_eq!(pages(CacheSize::Bytes(0)), 8);
        assert_eq!(pages(CacheSize::Bytes(9_999)), 9);
        assert_eq!(pages(CacheSize::Bytes(u64::MAX)), 128);
        assert_eq!(pages(CacheSize::FreeFraction(0.0)), 8);
        assert_eq!(pages(CacheSize::FreeFraction(0.5)), 128);
        assert_eq!(pages(CacheSize::Pages(3)), 3);
    }

    #[test]
    fn options_that_allow_nothing_are_refused() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let options = EngineOptions::for_device(&device);
        options.check().unwrap();
        assert!(EngineOptions { chunk_tokens: 0, ..options }.check().is_err());
        assert!(EngineOptions { max_running: 0, ..options }.check().is_err());
    }
}
