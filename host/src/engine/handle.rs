//! The seam between the engine and whoever brings it requests.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::check::check;
use super::clock::StepTimes;
use super::pages::PageCounts;
use super::scheduler::SchedulerLimits;
use super::{EventSink, Request, SubmitError};
use crate::device::Device;

/// What the engine is doing now, for health checks and admission. Read from memory; asking costs no device call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Requests being generated.
    pub running: usize,
    /// Requests waiting for a place, those that had to give theirs up included.
    pub waiting: usize,
    /// Tokens that the waiting may come to: prompts, and answers at their longest.
    pub waiting_tokens: usize,
    /// False once the device failed or the engine stopped: nothing more will be answered.
    pub healthy: bool,
    /// Why it is not healthy.
    pub failure: Option<String>,
    /// True while the weights were last seen in device memory.
    pub resident: bool,
    /// Bytes of device memory held.
    pub device_bytes_used: u64,
    /// Pages of the KV cache.
    pub pages: PageCounts,
    /// Times a request had to give up its pages and was computed again.
    pub preemptions: u64,
    /// Steps so far, with their times where they are taken.
    pub steps: StepTimes,
}

/// Takes requests without blocking.
pub trait Engine: Send + Sync + 'static {
    /// Queues `request`; its events go to `sink`.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing was queued then and `sink` hears nothing.
    fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<(), SubmitError>;

    /// Queues all of `requests` or none of them, one behind the other.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing was queued then and no sink hears anything.
    fn submit_all(&self, requests: Vec<(Request, Box<dyn EventSink>)>) -> Result<(), SubmitError>;

    /// What the engine is doing now.
    fn status(&self) -> Status;
}

/// A running engine, to give requests to. Cheap to clone; the engine stops when the last clone is gone and its queue is
/// empty.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) queue: SyncSender<Submission>,
    pub(super) shared: Arc<Shared>,
}

/// What the handles and the engine's thread both see.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) device: Device,
    pub(super) queue_limit: usize,
    pub(super) queue_tokens: usize,
    pub(super) context_tokens: usize,
    pub(super) vocab_size: usize,
    pub(super) limits: SchedulerLimits,
    /// In the channel or in the scheduler's queue.
    pub(super) waiting: Mutex<Waiting>,
    pub(super) progress: Mutex<Progress>,
    pub(super) failure: Mutex<Option<String>>,
    pub(super) resident: Mutex<Result<(), String>>,
}

/// How much waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) requests: usize,
    /// Their prompts and longest answers.
    pub(super) tokens: usize,
}

/// What the engine's thread last said of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub(super) running: usize,
    pub(super) pages: PageCounts,
    pub(super) preemptions: u64,
    pub(super) steps: StepTimes,
}

pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) sink: Box<dyn EventSink>,
}

impl Engine for Handle {
    fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<(), SubmitError> {
        self.submit_all(vec![(request, sink)])
    }

    fn submit_all(&self, requests: Vec<(Request, Box<dyn EventSink>)>) -> Result<(), SubmitError> {
        let shared = &self.shared;
        if let Some(reason) = lock(&shared.failure).clone() {
            return Err(SubmitError::Stopped { reason });
        }
        for (request, _) in &requests {
            check(request, shared.context_tokens, shared.vocab_size, &shared.limits)?;
        }
        let tokens = requests.iter().map(|(request, _)| request.most_tokens()).sum();
        shared.reserve(Waiting { requests: requests.len(), tokens })?;
        for (request, sink) in requests {
            // The channel has as many places, and whoever is in it is counted: it is never full.
            self.queue.try_send(Submission { request, sink }).map_err(|error| match error {
                TrySendError::Full(_) => SubmitError::QueueFull { limit: shared.queue_limit },
                TrySendError::Disconnected(_) => {
                    *lock(&shared.waiting) = Waiting::default();
                    SubmitError::Stopped { reason: "its thread has ended".to_owned() }
                }
            })?;
        }
        Ok(())
    }

    fn status(&self) -> Status {
        let shared = &self.shared;
        let failure = lock(&shared.failure)
            .clone()
            .or_else(|| shared.device.failure().map(|error| error.to_string()))
            .or_else(|| lock(&shared.resident).clone().err());
        // The waiting are read under the lock under which they become running.
        let progress = lock(&shared.progress);
        let waiting = *lock(&shared.waiting);
        Status {
            running: progress.running,
            waiting: waiting.requests,
            waiting_tokens: waiting.tokens,
            healthy: failure.is_none(),
            failure,
            resident: lock(&shared.resident).is_ok(),
            device_bytes_used: shared.device.tracker().total_bytes(),
            pages: progress.pages,
            preemptions: progress.preemptions,
            steps: progress.steps,
        }
    }
}

impl Shared {
    /// Counts `more` as waiting, all of it or nothing.
    fn reserve(&self, more: Waiting) -> Result<(), SubmitError> {
        let mut waiting = lock(&self.waiting);
        if waiting.requests + more.requests > self.queue_limit {
            return Err(SubmitError::QueueFull { limit: self.queue_limit });
        }
        // Where nobody waits, a request that is longer than the bound would otherwise never be taken.
        if waiting.requests > 0 && waiting.tokens.saturating_add(more.tokens) > self.queue_tokens {
            return Err(SubmitError::QueueTokens {
                waiting_tokens: waiting.tokens,
                request_tokens: more.tokens,
                limit: self.queue_tokens,
            });
        }
        waiting.requests += more.requests;
        waiting.tokens = waiting.tokens.saturating_add(more.tokens);
        Ok(())
    }
}

/// A lock whose holder panicked still holds plain values.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
