//! Requests put to engines to compare what comes back, bit by bit: alone, among others, and under conditions that must
//! not matter. `lockstep verify --batch` and the tests share it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::device::DeviceError;
use crate::engine::{
    CacheSize, Engine, EngineError, EngineOptions, Event, EventSink, Finish, Handle, Refused, Request, Sampling,
    Status, TokenEvent, spawn,
};
use crate::model::Model;
use crate::ops::PAGE;
use crate::testing::TestRng;

/// What takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Tokens of the watched prompt: two full pages and a part of a third.
pub const WATCHED_PROMPT: usize = 150;

/// Tokens of the watched answers.
pub const WATCHED_TOKENS: u32 = 24;

/// The longest prompt and answer of [`others`] together: models need a context of so many tokens.
pub const LONGEST: usize = 330;

/// One generated token, with the bits of every number that is reported of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBits {
    /// Its id.
    pub id: u32,
    /// Of its log-probability.
    pub logprob: Option<u32>,
    /// The most likely tokens with theirs.
    pub top: Vec<(u32, u32)>,
}

impl From<TokenEvent> for TokenBits {
    fn from(token: TokenEvent) -> Self {
        let top = token.top.into_iter().map(|(id, value)| (id, value.to_bits())).collect();
        Self { id: token.id, logprob: token.logprob.map(f32::to_bits), top }
    }
}

/// An answer, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What two answers to one request have in common: generated tokens, behind those of the prompt where their
    /// log-probabilities were asked for.
    pub tokens: Vec<TokenBits>,
    /// How it ended; how much of it the cache had differs from run to run.
    pub finish: Finish,
}

impl Answer {
    /// The ids.
    #[must_use]
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// SHA-256 over the tokens and the bits of the log-probabilities.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for token in &self.tokens {
            hash.update(token.id.to_le_bytes());
            hash.update(token.logprob.unwrap_or_default().to_le_bytes());
            hash.update((token.top.len() as u64).to_le_bytes());
            for (id, value) in &token.top {
                hash.update(id.to_le_bytes());
                hash.update(value.to_le_bytes());
            }
        }
        hash.finalize().into()
    }
}

/// Passes events on. The channel is bounded by the answer's own length.
#[derive(Clone, Debug)]
pub struct ToChannel(pub Sender<Event>);

impl EventSink for ToChannel {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.0.send(event).map_err(|_| Refused::Gone)
    }

    fn is_gone(&self) -> bool {
        false
    }
}

fn failed(why: &impl std::fmt::Display) -> DeviceError {
    DeviceError::InferenceFailed(format!("a run of the self-test failed: {why}"))
}

/// Waits for the whole answer.
///
/// # Errors
/// The request's error; or nothing came for a long time.
pub fn collect(events: &Receiver<Event>) -> Result<Answer, DeviceError> {
    let mut tokens = Vec::new();
    loop {
        match events.recv_timeout(PATIENCE) {
            Ok(Event::Prompt(prompt)) => tokens.extend(prompt.into_iter().map(TokenBits::from)),
            Ok(Event::Token(token)) => tokens.push(token.into()),
            Ok(Event::End(finish)) => return Ok(Answer { tokens, finish }),
            Ok(Event::Error(error)) => return Err(failed(&error)),
            Err(RecvTimeoutError::Timeout) => return Err(failed(&"the engine says nothing any more")),
            Err(RecvTimeoutError::Disconnected) => return Err(failed(&"the engine went away")),
        }
    }
}

/// An engine that ends, and gives its memory back, before the next one starts.
#[derive(Debug)]
pub struct Running {
    engine: Option<Handle>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// As [`spawn`].
    pub fn new(model: &Arc<Model>, options: EngineOptions) -> Result<Self, DeviceError> {
        let (engine, thread) = spawn(Arc::clone(model), options)?;
        Ok(Self { engine: Some(engine), thread: Some(thread) })
    }

    /// The engine.
    ///
    /// # Errors
    /// None while it runs.
    pub fn engine(&self) -> Result<&Handle, DeviceError> {
        self.engine.as_ref().ok_or_else(|| failed(&"the engine has ended"))
    }

    /// Where the answer will arrive.
    ///
    /// # Errors
    /// The request was refused.
    pub fn submit(&self, request: &Request) -> Result<Receiver<Event>, DeviceError> {
        let (sender, events) = channel();
        self.engine()?.submit(request.clone(), Box::new(ToChannel(sender))).map_err(|error| failed(&error))?;
        Ok(events)
    }

    /// The answer.
    ///
    /// # Errors
    /// The request's error.
    pub fn ask(&self, request: &Request) -> Result<Answer, DeviceError> {
        collect(&self.submit(request)?)
    }

    /// Waits until nothing runs or waits; every page must have been given back then.
    ///
    /// # Errors
    /// Pages are still held, or the engine is not healthy.
    pub fn settled(&self) -> Result<Status, DeviceError> {
        let start = Instant::now();
        loop {
            let status = self.engine()?.status();
            if (status.running, status.waiting) == (0, 0) {
                return if status.pages.held == 0 && status.healthy {
                    Ok(status)
                } else {
                    Err(failed(&format!("an idle engine says {status:?}")))
                };
            }
            if start.elapsed() > PATIENCE {
                return Err(failed(&format!("the engine stays busy: {status:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.engine = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported where it happened, and nobody was answered.
            let _ = thread.join();
        }
    }
}

/// Submits others while it is answered, each at its own token: arrivals that are random and yet the same in each run.
struct Pacemaker {
    engine: Handle,
    arrivals: VecDeque<(u32, Request, ToChannel)>,
    tokens: u32,
}

impl EventSink for Pacemaker {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.tokens += 1;
        let last = !matches!(event, Event::Token(_));
        while let Some((_, request, sink)) = self.arrivals.pop_front_if(|&mut (token, ..)| token <= self.tokens || last)
        {
            if let Err(error) = self.engine.submit(request, Box::new(sink.clone())) {
                let _ = sink.0.send(Event::Error(EngineError::Device(error.to_string())));
            }
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Tokens of the request whose answer sets the pace of arrivals; the last one arrives halfway.
const PACEMAKER_TOKENS: u32 = 40;

/// The answers to `requests`, which arrive in their order at random steps of a new engine; and what became of it.
///
/// # Errors
/// A request's error.
pub fn together(
    model: &Arc<Model>,
    options: EngineOptions,
    requests: &[Request],
    seed: u64,
) -> Result<(Vec<Answer>, Status), DeviceError> {
    let running = Running::new(model, options)?;
    let mut random = TestRng::new(seed);
    let mut times: Vec<u32> =
        requests.iter().map(|_| 1 + random.below(u64::from(PACEMAKER_TOKENS / 2)) as u32).collect();
    times.sort_unstable();
    let mut receivers = Vec::new();
    let mut arrivals = VecDeque::new();
    for (time, request) in times.into_iter().zip(requests) {
        let (sender, events) = channel();
        receivers.push(events);
        arrivals.push_back((time, request.clone(), ToChannel(sender)));
    }
    let pacemaker = Pacemaker { engine: running.engine()?.clone(), arrivals, tokens: 0 };
    let beat = request(vec![7], PACEMAKER_TOKENS, Sampling::default(), None);
    running.engine()?.submit(beat, Box::new(pacemaker)).map_err(|error| failed(&error))?;
    let answers = receivers.iter().map(collect).collect::<Result<_, _>>()?;
    let status = running.settled()?;
    Ok((answers, status))
}

/// The answer of a new engine that does nothing else.
///
/// # Errors
/// The request's error.
pub fn alone(model: &Arc<Model>, request: &Request) -> Result<Answer, DeviceError> {
    let cache = pages_for(std::slice::from_ref(request));
    let options = EngineOptions { cache, max_running: 1, ..EngineOptions::for_device(model.device()) };
    Running::new(model, options)?.ask(request)
}

/// Options under which all of `requests` run at once and none has to give up its pages.
#[must_use]
pub fn roomy(model: &Model, requests: &[Request]) -> EngineOptions {
    let count = requests.len() + 1;
    EngineOptions {
        queue: count,
        max_running: count,
        cache: pages_for(requests),
        ..EngineOptions::for_device(model.device())
    }
}

/// A cache that holds all of `requests` and the pacemaker.
fn pages_for(requests: &[Request]) -> CacheSize {
    let pages = |request: &Request| (request.prompt.len() + request.max_tokens as usize).div_ceil(PAGE);
    // One more for each is what admission asks for.
    CacheSize::Pages(requests.iter().map(|request| pages(request) + 1).sum::<usize>() + 2)
}

/// A request that nothing but its length ends.
#[must_use]
pub fn request(prompt: Vec<u32>, max_tokens: u32, sampling: Sampling, logprobs: Option<u32>) -> Request {
    Request { prompt, max_tokens, sampling, logprobs, ..Request::default() }
}

/// Random tokens of the model.
#[must_use]
pub fn tokens(model: &Model, count: usize, seed: u64) -> Vec<u32> {
    let mut random = TestRng::new(seed);
    (0..count).map(|_| random.below(model.config().vocab as u64) as u32).collect()
}

/// The watched request at temperature 0.
#[must_use]
pub fn watched_greedy(model: &Model) -> Request {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    request(tokens(model, WATCHED_PROMPT, 1), WATCHED_TOKENS, sampling, Some(5))
}

/// The watched request with everything that the sampler can do at once.
#[must_use]
pub fn watched_sampled(model: &Model) -> Request {
    let sampling = Sampling {
        temperature: 0.9,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: vec![(5, 1.5), (6, -3.0)],
        seed: 42,
    };
    Request { sampling, ..watched_greedy(model) }
}

/// Requests of random lengths and parameters; some begin like the watched ones, none is longer than [`LONGEST`].
#[must_use]
pub fn others(model: &Model, count: usize) -> Vec<Request> {
    let mut random = TestRng::new(99);
    let watched = tokens(model, WATCHED_PROMPT, 1);
    (0..count)
        .map(|index| {
            let length = 1 + random.below(if index % 5 == 4 { 300 } else { 90 }) as usize;
            let mut prompt = tokens(model, length, 1000 + index as u64);
            if index % 3 == 0 {
                let shared = length.min(WATCHED_PROMPT);
                prompt[..shared].copy_from_slice(&watched[..shared]);
            }
            let sampling = Sampling {
                temperature: [0.0, 0.7, 1.3][random.below(3) as usize],
                top_k: [0, 20][random.below(2) as usize],
                top_p: [1.0, 0.8][random.below(2) as usize],
                frequency_penalty: [0.0, 0.5][random.below(2) as usize],
                seed: random.next_u64(),
                ..Sampling::default()
            };
            let logprobs = [None, Some(0), Some(20)][random.below(3) as usize];
            let prompt_logprobs = (index % 7 == 5).then_some(2);
            Request { prompt_logprobs, ..request(prompt, 1 + random.below(30) as u32, sampling, logprobs) }
        })
        .collect()
}
