//! An engine with the demo model, and readers that behave as a test wants them to.
#![allow(dead_code, unreachable_pub, reason = "shared by several tests, each of which uses a part")]

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::device::{CpuOptions, Device};
use host::engine::{
    Engine, EngineOptions, Event, EventSink, Finish, Handle, Refused, Request, Sampling, TokenEvent, spawn,
};
use host::model::Model;

/// A test that waits longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// The demo model, with a context short enough to be filled.
pub fn demo() -> Arc<Model> {
    static DEMO: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
        let device = Device::cpu(CpuOptions::default()).unwrap();
        Arc::new(Model::load(&device, &folder, Some(300), &mut |_, _| {}).unwrap())
    };
    DEMO.get_or_init(load).clone()
}

pub fn options() -> EngineOptions {
    EngineOptions::for_device(demo().device())
}

pub fn engine(options: EngineOptions) -> (Handle, JoinHandle<()>) {
    spawn(demo(), options).unwrap()
}

pub fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Request {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Request { prompt, max_tokens, sampling, ..Request::default() }
}

/// The demo model's tokens are bytes; 257 begins a turn and 258 ends it.
pub fn chat(question: &str) -> Vec<u32> {
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    [vec![257], bytes("user\n"), bytes(question), vec![258], bytes("\n"), vec![257], bytes("assistant\n")].concat()
}

pub fn texts(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

pub fn eventually(holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "it did not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How a reader behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    Take,
    /// Holds the engine's thread at the first token until the gate opens: a known state to test from.
    Hold,
    /// Is gone when asked for the n-th time.
    LeaveAfterQuestions(usize),
    /// Takes n tokens and is gone when asked.
    LeaveAfterTokens(usize),
    /// Takes n tokens and refuses the next as gone.
    RefuseAfterTokens(usize),
    /// Has room for n tokens, and for the last word.
    FullAfterTokens(usize),
    Panic,
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    questions: usize,
    gone: bool,
    dropped: bool,
    held: bool,
    open: bool,
}

type Shared = Arc<(Mutex<Log>, Condvar)>;

pub struct Reader {
    rule: Rule,
    shared: Shared,
}

/// Lets a held engine go on.
pub struct Gate(Shared);

impl Gate {
    pub fn open(self) {
        self.0.0.lock().unwrap().open = true;
        self.0.1.notify_all();
    }
}

/// A token's id, the bits of its log-probability, and the most likely tokens with the bits of theirs.
pub type TokenBits = (u32, Option<u32>, Vec<(u32, u32)>);

/// A whole answer.
pub struct Answer {
    tokens: Vec<TokenEvent>,
    finish: Finish,
}

impl Answer {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    pub fn tokens(&self) -> &[TokenEvent] {
        &self.tokens
    }

    pub fn finish(&self) -> Finish {
        self.finish
    }

    /// Ids and the bits of every log-probability.
    pub fn bits(&self) -> Vec<TokenBits> {
        let top = |token: &TokenEvent| token.top.iter().map(|&(id, value)| (id, value.to_bits())).collect();
        self.tokens.iter().map(|token| (token.id, token.logprob.map(f32::to_bits), top(token))).collect()
    }
}

impl Reader {
    pub fn new(rule: Rule) -> Self {
        Self { rule, shared: Shared::default() }
    }

    pub fn held() -> (Self, Gate) {
        let this = Self::new(Rule::Hold);
        let gate = Gate(this.shared.clone());
        (this, gate)
    }

    pub fn submitted(engine: &Handle, request: Request) -> Self {
        let this = Self::new(Rule::Take);
        engine.submit(request, this.sink()).unwrap();
        this
    }

    pub fn ask(engine: &Handle, request: Request) -> Answer {
        Self::submitted(engine, request).answer()
    }

    /// Call once.
    pub fn sink(&self) -> Box<dyn EventSink> {
        Box::new(Sink { rule: self.rule, shared: self.shared.clone() })
    }

    pub fn wait_until_held(&self) {
        eventually(|| self.shared.0.lock().unwrap().held);
    }

    pub fn leave(&self) {
        self.shared.0.lock().unwrap().gone = true;
    }

    pub fn is_dropped(&self) -> bool {
        self.shared.0.lock().unwrap().dropped
    }

    pub fn questions(&self) -> usize {
        self.shared.0.lock().unwrap().questions
    }

    pub fn events(&self) -> Vec<Event> {
        self.shared.0.lock().unwrap().events.clone()
    }

    pub fn tokens(&self) -> Vec<u32> {
        let id = |event: &Event| if let Event::Token(token) = event { Some(token.id) } else { None };
        self.events().iter().filter_map(id).collect()
    }

    /// Waits for the end: tokens, one `End`, nothing after it.
    pub fn answer(&self) -> Answer {
        eventually(|| self.is_dropped());
        let mut events = self.events();
        let Some(Event::End(finish)) = events.pop() else { panic!("no end: {events:?}") };
        let token = |event| if let Event::Token(token) = event { token } else { panic!("{event:?} before the end") };
        Answer { tokens: events.into_iter().map(token).collect(), finish }
    }
}

struct Sink {
    rule: Rule,
    shared: Shared,
}

impl EventSink for Sink {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        let mut log = self.shared.0.lock().unwrap();
        let (taken, is_token) = (log.events.len(), matches!(event, Event::Token(_)));
        match self.rule {
            Rule::RefuseAfterTokens(count) if taken == count => return Err(Refused::Gone),
            Rule::FullAfterTokens(count) if taken == count && is_token => return Err(Refused::Full),
            Rule::LeaveAfterTokens(count) if taken + 1 == count => log.gone = true,
            Rule::Panic => {
                drop(log);
                panic!("planted");
            }
            Rule::Hold => {
                log.held = true;
                while !log.open {
                    log = self.shared.1.wait(log).unwrap();
                }
            }
            _ => {}
        }
        log.events.push(event);
        Ok(())
    }

    fn is_gone(&self) -> bool {
        let mut log = self.shared.0.lock().unwrap();
        log.questions += 1;
        log.gone || matches!(self.rule, Rule::LeaveAfterQuestions(count) if log.questions >= count)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Ok(mut log) = self.shared.0.lock() {
            log.dropped = true;
        }
    }
}
