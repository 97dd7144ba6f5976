//! The engine's own thread: takes requests from a bounded queue and computes them together, a step at a time.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::client::Client;
use super::clock::{Running, StepClock};
use super::handle::{Handle, Progress, Shared, Submission, Waiting, lock};
use super::prompt_scores;
use super::sampler::{SampleRow, Sampled, Sampler};
use super::scheduler::{NeverFits, Plan, Scheduler, SchedulerLimits};
use super::sequence::SequenceId;
use super::{EngineError, EngineOptions};
use crate::device::{DeviceError, Pending};
use crate::model::{Choosing, KvCache, Model, StepLimits, Workspace};
use crate::ops::{PAGE, RowParameters};

/// How long nothing has to happen before the pages are recounted, so that the recount seldom delays a request.
const RECOUNT_AFTER: Duration = Duration::from_secs(1);

/// Rows with logits that a step has room for even where few requests run, so that the log-probabilities of a prompt do
/// not come a token a step.
const LEAST_LOGITS_ROWS: usize = 16;

/// Starts an engine for `model` on its own thread. All memory that it will use is allocated here.
///
/// # Errors
/// Options that allow nothing; no memory for the cache, the workspace or the sampler; no thread.
pub fn spawn(model: Arc<Model>, options: EngineOptions) -> Result<(Handle, JoinHandle<()>), DeviceError> {
    options.check()?;
    let device = model.device().clone();
    let context_pages = model.context_tokens().div_ceil(PAGE);
    // At least 2, as for the scheduler; no more than all requests can fill.
    let rows = options.chunk_tokens.min(options.max_running.saturating_mul(model.context_tokens())).max(2);
    let segments = options.max_running.min(rows);
    let logits_rows = segments.max(LEAST_LOGITS_ROWS.min(rows));
    let workspace = model.workspace(StepLimits {
        rows,
        decode_rows: segments,
        logits_rows,
        table_entries: segments * context_pages,
    })?;
    let sampler = Sampler::new(&device, logits_rows, model.config().vocab)?;
    // The cache comes last: it may take what is left.
    let page_bytes = KvCache::page_bytes(model.config().layers, model.heads());
    let pages = options.cache.pages(&device, page_bytes, context_pages, options.max_running)?;
    let cache = model.kv_cache(pages)?;
    tracing::info!(pages, tokens = cache.capacity_tokens(), bytes = pages as u64 * page_bytes, "KV cache");
    let limits =
        SchedulerLimits { page_tokens: PAGE, pages, running: options.max_running, step_tokens: rows, logits_rows };
    let shared = Arc::new(Shared {
        device,
        queue_limit: options.queue,
        queue_tokens: options.queue_tokens,
        context_tokens: model.context_tokens(),
        vocab_size: model.config().vocab,
        limits,
        waiting: Mutex::default(),
        progress: Mutex::default(),
        failure: Mutex::new(None),
        resident: Mutex::new(Ok(())),
    });
    let mut scheduler = Scheduler::new(limits);
    if let Some(seed) = options.trial.page_order {
        scheduler.pool.shuffle_free(seed);
    }
    let clock = StepClock::new(&shared.device, options.time_steps)?;
    // Where steps are computed as on a GPU, they are launched as on one.
    let model_is_like_on_gpu = shared.device.tensor_cores();
    let mut worker = Worker {
        model,
        cache,
        workspace,
        sampler,
        scheduler,
        clients: BTreeMap::new(),
        batch: Batch::default(),
        clock,
        flight: None,
        counted: Waiting::default(),
        recount_due: false,
        residency_check: options.residency_check,
        poison: options.trial.poison,
        goes_ahead: model_is_like_on_gpu || options.trial.ahead_anywhere,
        shared: shared.clone(),
    };
    worker.publish();
    let (queue, submissions) = sync_channel(options.queue);
    let thread = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || worker.run(&submissions))
        .map_err(|error| DeviceError::Unknown(format!("the engine's thread cannot start: {error}")))?;
    Ok((Handle { queue, shared }, thread))
}

/// Should the engine's thread panic: says that nothing more will be answered, before the queue is dropped.
struct LastWord(Arc<Shared>);

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "the engine's thread panicked; restart the server and report what it wrote";
            lock(&self.0.failure).get_or_insert_with(|| reason.to_owned());
            *lock(&self.0.waiting) = Waiting::default();
            lock(&self.0.progress).running = 0;
        }
    }
}

/// A sequence whose next token a step chooses, the token's position, and how many of its prompt's tokens were cached.
type Chosen = (SequenceId, u32, usize);

/// The tokens that a step chose.
enum Choice {
    Sampled(Vec<Sampled>),
    /// On their way from the device.
    Coming(Pending<u32>),
}

/// How the tokens of `chosen` are to be chosen; their clients exist.
fn sample_rows<'a>(clients: &'a BTreeMap<SequenceId, Client>, chosen: &[Chosen]) -> Vec<SampleRow<'a>> {
    chosen.iter().filter_map(|&(id, position, _)| Some(clients.get(&id)?.sample_row(position))).collect()
}

/// How the model is to draw tokens of `rows`; none where each takes the likeliest.
fn draws(rows: &[SampleRow<'_>]) -> Option<Vec<RowParameters>> {
    let plain = rows.iter().all(SampleRow::is_plain);
    (!plain).then(|| rows.iter().map(SampleRow::parameters).collect())
}

/// A step that the device has.
struct Flight {
    plan: Plan,
    chosen: Vec<Chosen>,
    sampled: Choice,
    running: Running,
}

struct Worker {
    model: Arc<Model>,
    cache: KvCache,
    workspace: Workspace,
    sampler: Sampler,
    scheduler: Scheduler,
    /// The owners of what the scheduler has, running or waiting.
    clients: BTreeMap<SequenceId, Client>,
    batch: Batch,
    clock: StepClock,
    /// A step that was given to the device ahead of its turn; committed.
    flight: Option<Flight>,
    /// How many of `Shared::waiting` are the scheduler's; the others are in the channel.
    counted: Waiting,
    /// Something was computed since the last recount.
    recount_due: bool,
    residency_check: Duration,
    /// See [`Trial`](super::Trial).
    /// The device works while the host does something else.
    goes_ahead: bool,
    poison: bool,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(mut self, submissions: &Receiver<Submission>) {
        let _last_word = LastWord(self.shared.clone());
        let mut checked = Instant::now();
        loop {
            let left = self.residency_check.saturating_sub(checked.elapsed());
            let open = self.receive(submissions, left);
            self.drop_the_gone();
            if self.scheduler.is_idle() {
                self.publish();
                if !open {
                    return;
                }
            } else if let Err(error) = self.step() {
                self.fail(&error);
            }
            if self.scheduler.is_idle() {
                // What the device still computes ahead is nobody's.
                self.flight = None;
                self.clock.pause();
            }
            self.publish();
            if checked.elapsed() >= self.residency_check {
                self.check_residency();
                checked = Instant::now();
            }
        }
    }

    /// Takes all that was submitted; with nothing to do, waits for it. False once nobody can submit any more.
    fn receive(&mut self, submissions: &Receiver<Submission>, patience: Duration) -> bool {
        if self.scheduler.is_idle() {
            let patience = if self.recount_due { patience.min(RECOUNT_AFTER) } else { patience };
            match submissions.recv_timeout(patience) {
                Ok(submission) => self.take(submission),
                Err(RecvTimeoutError::Timeout) => {
                    self.recount();
                    return true;
                }
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match submissions.try_recv() {
                Ok(submission) => self.take(submission),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// After a device failure every request is refused with its reason.
    fn take(&mut self, Submission { mut request, sink }: Submission) {
        let most_tokens = request.most_tokens();
        self.counted.requests += 1;
        self.counted.tokens += most_tokens;
        // Those that do not exist are never chosen.
        request.stop_tokens.retain(|&id| (id as usize) < self.shared.vocab_size);
        let (prompt, salt) = (std::mem::take(&mut request.prompt), request.cache_salt.take());
        let mut client = Client::new(request, &prompt, sink);
        if let Some(reason) = lock(&self.shared.failure).clone() {
            client.fail(EngineError::Device(reason));
            return;
        }
        match self.scheduler.submit(prompt, most_tokens, salt.as_deref()) {
            Ok(id) => {
                if client.prompt_logprobs().is_some() {
                    self.scheduler.score_prompt(id);
                }
                self.clients.insert(id, client);
            }
            Err(NeverFits { needed_pages, total_pages }) => {
                client.fail(EngineError::NeverFits { needed_pages, total_pages });
            }
        }
    }

    /// Those whose readers are gone, in whatever state, give their pages back.
    fn drop_the_gone(&mut self) {
        let Self { clients, scheduler, .. } = self;
        clients.retain(|&id, client| {
            let stays = !client.is_gone();
            if !stays {
                scheduler.remove(id);
            }
            stays
        });
    }

    /// Computes a step and tells everybody whose next token it chose. Where the step behind it follows whatever is chosen,
    /// the device gets that one before this one's tokens are read.
    fn step(&mut self) -> Result<(), DeviceError> {
        self.recount_due = true;
        let flight = match self.flight.take() {
            Some(flight) => Some(flight),
            None => self.launch()?,
        };
        let Some(flight) = flight else { return Ok(()) };
        let ahead = self.launch_ahead(&flight)?;
        let sampled = match flight.sampled {
            Choice::Sampled(sampled) => sampled,
            Choice::Coming(ids) => self.shared.device.collect(ids)?.into_iter().map(Sampled::from).collect(),
        };
        self.clock.stop(flight.running)?;
        for ((id, position, cached_tokens), sampled) in flight.chosen.into_iter().zip(sampled) {
            let Some(client) = self.clients.get_mut(&id) else { continue };
            if let Some(token) = client.deliver(sampled, position, cached_tokens) {
                self.scheduler.push(id, token);
            } else {
                self.clients.remove(&id);
                self.scheduler.remove(id);
            }
        }
        if let Some(ahead) = &ahead {
            self.scheduler.commit(&ahead.plan);
        }
        self.flight = ahead;
        Ok(())
    }

    /// Gives the device the next step, and commits it. `None` where there is nothing to compute.
    fn launch(&mut self) -> Result<Option<Flight>, DeviceError> {
        let plan = self.scheduler.plan();
        self.publish();
        if plan.segments.is_empty() {
            return Ok(None);
        }
        if self.poison {
            self.poison(&plan)?;
        }
        self.batch.fill(&plan, &self.scheduler);
        let mut chosen: Vec<Chosen> = Vec::with_capacity(plan.segments.len());
        for segment in plan.segments.iter().filter(|segment| segment.wants_token) {
            if let Some(sequence) = self.scheduler.sequence(segment.id)
                && self.clients.contains_key(&segment.id)
            {
                chosen.push((segment.id, sequence.tokens.len() as u32, sequence.cached_tokens));
            }
        }
        // Where nobody wants more than a token, the model chooses it.
        let rows = sample_rows(&self.clients, &chosen);
        let by_model = self.batch.scores().is_empty() && rows.iter().all(SampleRow::is_drawn);
        let draws = if by_model { draws(&rows) } else { None };
        let choosing = match &draws {
            _ if !by_model => Choosing::Caller,
            Some(draws) => Choosing::Drawn(draws),
            None => Choosing::Likeliest,
        };
        let running = self.clock.start()?;
        self.model.forward_choosing(&self.batch.step(), choosing, &mut self.cache, &mut self.workspace)?;
        self.scheduler.commit(&plan);
        self.score_prompts()?;
        let sampled = if chosen.is_empty() {
            Choice::Sampled(Vec::new())
        } else if by_model {
            Choice::Coming(self.shared.device.begin_download(self.workspace.chosen(chosen.len())?)?)
        } else {
            let rows = sample_rows(&self.clients, &chosen);
            Choice::Sampled(self.sampler.sample(self.workspace.logits_and_spare(rows.len())?, &rows)?)
        };
        self.clock.given(running)?;
        Ok(Some(Flight { plan, chosen, sampled, running }))
    }

    /// Gives the device the step behind `flight`, if it is certain which one that is: the same sequences, each with the token
    /// that the device has chosen for it. A sequence that turns out to have ended is computed for nothing; its row is dropped.
    /// To be committed when the tokens are known.
    fn launch_ahead(&mut self, flight: &Flight) -> Result<Option<Flight>, DeviceError> {
        let follows = matches!(flight.sampled, Choice::Coming(_))
            && self.goes_ahead
            && !self.poison
            && flight.chosen.len() == flight.plan.segments.len();
        if !follows {
            return Ok(None);
        }
        let chosen: Vec<Chosen> =
            flight.chosen.iter().map(|&(id, position, cached)| (id, position + 1, cached)).collect();
        // What a row asks for must not depend on the token that nobody knows yet.
        let row = |&(id, position, _): &Chosen| {
            let client = self.clients.get(&id).filter(|client| client.goes_on())?;
            Some(client.sample_row(position)).filter(SampleRow::stays_drawn)
        };
        let Some(rows) = chosen.iter().map(row).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let Some(plan) = self.scheduler.plan_ahead(&flight.plan) else { return Ok(None) };
        self.batch.fill(&plan, &self.scheduler);
        let draws = draws(&rows);
        let choosing = draws.as_deref().map_or(Choosing::Likeliest, Choosing::Drawn);
        let running = self.clock.start()?;
        self.model.forward_ahead(&self.batch.step(), choosing, &mut self.cache, &mut self.workspace)?;
        let ids = self.shared.device.begin_download(self.workspace.chosen(plan.segments.len())?)?;
        self.clock.given(running)?;
        Ok(Some(Flight { plan, chosen, sampled: Choice::Coming(ids), running }))
    }

    /// Overwrites what the step must not read: intermediate values, and the pages that its sequences begin.
    fn poison(&mut self, plan: &Plan) -> Result<(), DeviceError> {
        let device = &self.shared.device;
        self.workspace.poison(device)?;
        for segment in &plan.segments {
            let Some(sequence) = self.scheduler.sequence(segment.id) else { continue };
            for &page in &sequence.pages[self.scheduler.limits().pages_for(segment.first)..] {
                self.cache.poison(device, page)?;
            }
        }
        Ok(())
    }

    /// Tells of the log-probabilities of prompts that the step has computed, before the tokens behind them are chosen.
    fn score_prompts(&mut self) -> Result<(), DeviceError> {
        if self.batch.scores().is_empty() {
            return Ok(());
        }
        let (all, choosing) = (self.batch.step().logits_rows.len(), self.batch.choosing_rows());
        let logits = self.workspace.logits(all)?.slice(choosing * self.model.config().vocab..)?;
        prompt_scores::deliver(&self.batch, &self.scheduler, &mut self.clients, &mut self.sampler, &logits)
    }

    /// The device failed: nobody gets an answer any more.
    fn fail(&mut self, error: &DeviceError) {
        tracing::error!(code = error.code().as_str(), %error, "the device failed; the engine answers nothing more");
        *lock(&self.shared.failure) = Some(error.to_string());
        for (_, mut client) in std::mem::take(&mut self.clients) {
            client.fail(EngineError::Device(error.to_string()));
        }
        self.flight = None;
        self.scheduler = Scheduler::new(*self.scheduler.limits());
    }

    /// Says how things stand.
    fn publish(&mut self) {
        let now = Waiting { requests: self.scheduler.waiting(), tokens: self.scheduler.waiting_tokens() };
        // Under the lock, so that nobody sees an idle engine that has work.
        let mut progress = lock(&self.shared.progress);
        *progress = Progress {
            running: self.scheduler.running().len(),
            pages: self.scheduler.pages(),
            preemptions: self.scheduler.preemptions(),
            steps: self.clock.times(),
        };
        // What was submitted meanwhile stays counted.
        let mut waiting = lock(&self.shared.waiting);
        waiting.requests = (waiting.requests + now.requests).saturating_sub(self.counted.requests);
        waiting.tokens = waiting.tokens.saturating_add(now.tokens).saturating_sub(self.counted.tokens);
        drop(waiting);
        self.counted = now;
    }

    /// With nothing to do: recounts the pages. Wrong books could give one request another's context, so they stop the
    /// engine.
    fn recount(&mut self) {
        if !std::mem::take(&mut self.recount_due) {
            return;
        }
        if let Err(reason) = self.scheduler.check_integrity() {
            tracing::error!(reason, "the pages of the KV cache are not accounted for; the engine answers nothing more");
            *lock(&self.shared.failure) = Some(format!("the pages of the KV cache are not accounted for: {reason}"));
        }
    }

    fn check_residency(&self) {
        let verdict = self.shared.device.verify_residency().map_err(|error| error.to_string());
        if let Err(reason) = &verdict {
            tracing::error!(reason, "memory is not where it should be");
        }
        *lock(&self.shared.resident) = verdict;
    }
}
