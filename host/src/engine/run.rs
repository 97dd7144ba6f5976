//! The engine's own thread: takes requests from a bounded queue and generates, one request at a time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::sampler::{SampleRow, Sampler};
use super::sequence::Sequence;
use super::{
    Engine, EngineError, Event, EventSink, Finish, FinishReason, Refused, Request, Sampling, Status, SubmitError,
    TokenEvent,
};
use crate::device::{Device, DeviceError};
use crate::model::{KvCache, Model, Prefill, Step, StepLimits, Workspace};
use crate::ops::PAGE;

/// What an engine is set up with.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Requests that may wait.
    pub queue: usize,
    /// Tokens of a prompt that one step computes at most. It changes no answer.
    pub chunk_tokens: usize,
    /// How often memory is checked to be where it should be.
    pub residency_check: Duration,
}

impl EngineOptions {
    /// What suits the device.
    #[must_use]
    pub fn for_device(device: &Device) -> Self {
        let chunk_tokens = if device.is_cuda() { 4096 } else { 256 };
        Self { queue: 256, chunk_tokens, residency_check: Duration::from_secs(60) }
    }
}

/// A running engine, to give requests to. Cheap to clone; the engine stops when the last clone is gone and its queue is
/// empty.
#[derive(Clone, Debug)]
pub struct Handle {
    queue: SyncSender<Submission>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    device: Device,
    queue_limit: usize,
    context_tokens: usize,
    vocab_size: usize,
    waiting: AtomicUsize,
    running: AtomicUsize,
    failure: Mutex<Option<String>>,
    resident: Mutex<Result<(), String>>,
}

struct Submission {
    request: Request,
    sink: Box<dyn EventSink>,
}

/// Starts an engine for `model` on its own thread. All memory that it will use is allocated here.
///
/// # Errors
/// No memory for the cache, the workspace or the sampler; no thread.
pub fn spawn(model: Arc<Model>, options: EngineOptions) -> Result<(Handle, JoinHandle<()>), DeviceError> {
    let device = model.device().clone();
    let pages = model.context_tokens().div_ceil(PAGE);
    let limits = StepLimits {
        rows: options.chunk_tokens.min(model.context_tokens()),
        decode_rows: 1,
        logits_rows: 1,
        table_entries: pages,
    };
    let worker = Worker {
        cache: model.kv_cache(pages)?,
        workspace: model.workspace(limits)?,
        sampler: Sampler::new(&device, 1, model.config().vocab)?,
        page_table: (0..pages as u32).collect(),
        options,
        shared: Arc::new(Shared {
            device: device.clone(),
            queue_limit: options.queue,
            context_tokens: model.context_tokens(),
            vocab_size: model.config().vocab,
            waiting: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            failure: Mutex::new(None),
            resident: Mutex::new(Ok(())),
        }),
        model,
    };
    let shared = worker.shared.clone();
    let (queue, submissions) = sync_channel(options.queue);
    let thread = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || worker.run(&submissions))
        .map_err(|error| DeviceError::Unknown(format!("the engine's thread cannot start: {error}")))?;
    Ok((Handle { queue, shared }, thread))
}

impl Engine for Handle {
    fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<(), SubmitError> {
        let shared = &self.shared;
        if let Some(reason) = lock(&shared.failure).clone() {
            return Err(SubmitError::Stopped { reason });
        }
        check(&request, shared.context_tokens, shared.vocab_size)?;
        shared.waiting.fetch_add(1, Ordering::Relaxed);
        self.queue.try_send(Submission { request, sink }).map_err(|error| {
            shared.waiting.fetch_sub(1, Ordering::Relaxed);
            match error {
                TrySendError::Full(_) => SubmitError::QueueFull { limit: shared.queue_limit },
                TrySendError::Disconnected(_) => SubmitError::Stopped { reason: "its thread has ended".to_owned() },
            }
        })
    }

    fn status(&self) -> Status {
        let shared = &self.shared;
        let failure = lock(&shared.failure)
            .clone()
            .or_else(|| shared.device.failure().map(|error| error.to_string()))
            .or_else(|| lock(&shared.resident).clone().err());
        Status {
            running: shared.running.load(Ordering::Relaxed),
            waiting: shared.waiting.load(Ordering::Relaxed),
            healthy: failure.is_none(),
            failure,
            resident: lock(&shared.resident).is_ok(),
            device_bytes_used: shared.device.tracker().total_bytes(),
        }
    }
}

/// A lock whose holder panicked still holds plain values.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses what could not be answered.
fn check(request: &Request, context_tokens: usize, vocab_size: usize) -> Result<(), SubmitError> {
    if request.prompt.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    if request.max_tokens == 0 {
        return Err(SubmitError::NoTokens);
    }
    if request.prompt.len().saturating_add(request.max_tokens as usize) > context_tokens {
        return Err(SubmitError::TooLong {
            prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            context_tokens,
        });
    }
    let biased = request.sampling.logit_bias.iter().map(|&(id, _)| id);
    if let Some(id) = request.prompt.iter().copied().chain(biased).find(|&id| id as usize >= vocab_size) {
        return Err(SubmitError::UnknownToken { id, vocab_size });
    }
    check_sampling(&request.sampling)
}

fn check_sampling(sampling: &Sampling) -> Result<(), SubmitError> {
    let finite = |name, value: f32, holds: bool, range| {
        if value.is_finite() && holds {
            Ok(())
        } else {
            Err(SubmitError::OutOfRange { name, value: value.to_string(), range })
        }
    };
    let Sampling { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
    finite("temperature", temperature, temperature >= 0.0, "0 or more")?;
    finite("top_p", top_p, (0.0..=1.0).contains(&top_p), "0 to 1")?;
    finite("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
    finite("repetition_penalty", repetition_penalty, repetition_penalty > 0.0, "more than 0")?;
    finite("presence_penalty", presence_penalty, true, "finite")?;
    finite("frequency_penalty", frequency_penalty, true, "finite")?;
    sampling.logit_bias.iter().try_for_each(|&(_, bias)| finite("logit_bias", bias, true, "finite"))
}

/// Why a request stops being worked on.
enum Stop {
    /// It ended, or its reader is gone: nothing more to say.
    Done,
    /// It failed; the engine goes on.
    Failed(EngineError),
    /// The device failed; the engine stops.
    Device(DeviceError),
}

impl From<DeviceError> for Stop {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

struct Worker {
    model: Arc<Model>,
    cache: KvCache,
    workspace: Workspace,
    sampler: Sampler,
    page_table: Vec<u32>,
    options: EngineOptions,
    shared: Arc<Shared>,
}

/// Should the engine's thread panic: says that nothing more will be answered, before the queue is dropped.
struct LastWord(Arc<Shared>);

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "the engine's thread panicked; restart the server and report what it wrote";
            lock(&self.0.failure).get_or_insert_with(|| reason.to_owned());
            self.0.waiting.store(0, Ordering::Relaxed);
            self.0.running.store(0, Ordering::Relaxed);
        }
    }
}

impl Worker {
    fn run(mut self, submissions: &Receiver<Submission>) {
        let _last_word = LastWord(self.shared.clone());
        let mut checked = Instant::now();
        loop {
            let left = self.options.residency_check.saturating_sub(checked.elapsed());
            match submissions.recv_timeout(left) {
                Ok(submission) => {
                    self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
                    self.shared.running.store(1, Ordering::Relaxed);
                    self.serve(submission);
                    self.shared.running.store(0, Ordering::Relaxed);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if checked.elapsed() >= self.options.residency_check {
                let verdict = self.shared.device.verify_residency().map_err(|error| error.to_string());
                if let Err(reason) = &verdict {
                    tracing::error!(reason, "memory is not where it should be");
                }
                *lock(&self.shared.resident) = verdict;
                checked = Instant::now();
            }
        }
    }

    /// Answers a request to its end. After a device failure every request is refused with its reason.
    fn serve(&mut self, Submission { request, mut sink }: Submission) {
        if let Some(reason) = lock(&self.shared.failure).clone() {
            // Whether anybody still listens does not matter any more.
            let _ = sink.offer(Event::Error(EngineError::Device(reason)));
            return;
        }
        let mut sequence = Sequence::new(request, sink);
        let error = match self.generate(&mut sequence) {
            Ok(never) => match never {},
            Err(Stop::Done) => return,
            Err(Stop::Failed(error)) => error,
            Err(Stop::Device(error)) => {
                tracing::error!(code = error.code().as_str(), %error, "the device failed; the engine answers nothing more");
                *lock(&self.shared.failure) = Some(error.to_string());
                EngineError::Device(error.to_string())
            }
        };
        let _ = sequence.sink.offer(Event::Error(error));
    }

    /// Steps until the request ends, one way or another.
    fn generate(&mut self, sequence: &mut Sequence) -> Result<std::convert::Infallible, Stop> {
        loop {
            if sequence.sink.is_gone() {
                return Err(Stop::Done);
            }
            let wants_token = self.forward(sequence)?;
            if wants_token {
                self.sample(sequence)?;
            }
        }
    }

    /// Computes the next chunk of tokens that are not cached. True when the last token's logits are there.
    fn forward(&mut self, sequence: &mut Sequence) -> Result<bool, DeviceError> {
        let first = sequence.cached;
        let rows = (sequence.tokens.len() - first).min(self.workspace.limits().rows);
        let last = first + rows == sequence.tokens.len();
        let pages = &self.page_table[..(first + rows).div_ceil(PAGE)];
        let positions: Vec<u32> = (first as u32..(first + rows) as u32).collect();
        let prefill = [Prefill { first_row: 0, rows, first_position: first, table_start: 0, table_len: pages.len() }];
        let (decode_rows, prefills) = if rows == 1 { (1, &prefill[..0]) } else { (0, &prefill[..]) };
        let logits_rows = [rows as u32 - 1];
        let step = Step {
            tokens: &sequence.tokens[first..first + rows],
            positions: &positions,
            row_tables: &vec![0; rows],
            page_tables: pages,
            decode_rows,
            prefills,
            logits_rows: if last { &logits_rows } else { &[] },
        };
        self.model.forward(&step, &mut self.cache, &mut self.workspace)?;
        sequence.cached += rows;
        Ok(last)
    }

    /// Chooses a token and reports it.
    fn sample(&mut self, sequence: &mut Sequence) -> Result<(), Stop> {
        let position = sequence.tokens.len() as u32;
        let row = SampleRow {
            sampling: &sequence.request.sampling,
            counts: &sequence.counts,
            position,
            logprobs: sequence.request.logprobs,
        };
        let sampled = self.sampler.sample(&self.workspace.logits(1)?, &[row])?.pop();
        let Some((sampled, id)) = sampled.and_then(|sampled| sampled.id.map(|id| (sampled, id))) else {
            return Err(Stop::Failed(EngineError::NoFiniteLogit { position }));
        };
        if sequence.request.stop_tokens.contains(&id) {
            return Err(finish(sequence, FinishReason::StopToken(id)));
        }
        sequence.push(id);
        offer(sequence, Event::Token(TokenEvent { id, logprob: sampled.logprob, top: sampled.top }))?;
        if sequence.generated() == sequence.request.max_tokens as usize {
            return Err(finish(sequence, FinishReason::Length));
        }
        Ok(())
    }
}

/// Reports the end.
fn finish(sequence: &mut Sequence, reason: FinishReason) -> Stop {
    let finish = Finish {
        reason,
        prompt_tokens: sequence.request.prompt.len() as u32,
        generated_tokens: sequence.generated() as u32,
    };
    offer(sequence, Event::End(finish)).err().unwrap_or(Stop::Done)
}

/// Gives an event to the request's owner.
fn offer(sequence: &mut Sequence, event: Event) -> Result<(), Stop> {
    sequence.sink.offer(event).map_err(|refused| match refused {
        Refused::Gone => Stop::Done,
        Refused::Full => Stop::Failed(EngineError::SlowReader),
    })
}
