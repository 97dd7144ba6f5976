//! A server on a free port of the loopback, with a scripted engine behind it, and a client that shows bytes as they are.
//!
//! The script stands in for the engine in tests of the protocol only; it computes nothing.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by several tests, each of which uses a part"
)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::engine::{Engine, Event, EventSink, Finish, FinishReason, Refused, Request, Status, SubmitError, TokenEvent};
use host::server::{App, Drained, Limits, ModelInfo, Recorder, bind, run};
use host::text::{ChatTemplate, Tokenizer};
use sha2::Digest;
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokio::sync::oneshot;

/// Long enough for any machine; a test that hangs fails by it.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Ends an answer.
pub const EOS: u32 = 256;
/// A token of 4096 characters.
pub const LONG: u32 = 257;
pub const VOCAB: usize = 258;

/// Token id = byte, then `EOS`, then `LONG`.
pub fn tokenizer() -> Tokenizer {
    let mut next = 0x100;
    let vocab: HashMap<String, u32> = (0..256_u32)
        .map(|byte| {
            let shown = matches!(byte, 33..=126 | 161..=172 | 174..=255);
            let code = if shown { byte } else { next };
            next += u32::from(!shown);
            (char::from_u32(code).unwrap().to_string(), byte)
        })
        .collect();
    let mut inner = tokenizers::Tokenizer::new(BPE::new(vocab.into_iter().collect(), vec![]));
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, false)));
    inner.with_decoder(Some(ByteLevel::default()));
    inner.add_special_tokens([AddedToken::from("<|end|>", true)]).unwrap();
    inner.add_tokens([AddedToken::from("y".repeat(4096), false)]).unwrap();
    let tokenizer = Tokenizer::new(inner, vec![EOS]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_to_id("<|end|>")), (VOCAB, Some(EOS)));
    tokenizer
}

pub type Script = dyn Fn(Request, Box<dyn EventSink>) + Send + Sync;

/// Runs the script on a thread for each request.
pub struct Scripted {
    script: Arc<Script>,
    pub status: Mutex<Status>,
    pub refusal: Mutex<Option<SubmitError>>,
    pub requests: Mutex<Vec<Request>>,
}

impl Engine for Scripted {
    fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<(), SubmitError> {
        if let Some(error) = self.refusal.lock().unwrap().clone() {
            return Err(error);
        }
        self.requests.lock().unwrap().push(request.clone());
        let script = Arc::clone(&self.script);
        std::thread::spawn(move || script(request, sink));
        Ok(())
    }

    fn submit_all(&self, requests: Vec<(Request, Box<dyn EventSink>)>) -> Result<(), SubmitError> {
        requests.into_iter().try_for_each(|(request, sink)| self.submit(request, sink))
    }

    fn status(&self) -> Status {
        self.status.lock().unwrap().clone()
    }
}

pub fn token(id: u32) -> Event {
    let id_f = id as f32;
    Event::Token(TokenEvent { id, logprob: Some(-id_f / 256.0), top: vec![(id, -id_f / 256.0), (EOS, -9.5)] })
}

pub fn end(request: &Request, reason: FinishReason, generated_tokens: u32) -> Event {
    // Whoever brings a salt finds two tokens.
    let cached_tokens = if request.cache_salt.is_some() { 2 } else { 0 };
    Event::End(Finish { reason, prompt_tokens: request.prompt.len() as u32, generated_tokens, cached_tokens })
}

/// Says `text` a byte at a time as far as `max_tokens` allows, then ends with `EOS`.
pub fn say(text: &'static [u8]) -> Arc<Script> {
    Arc::new(move |request, mut sink| {
        let count = text.len().min(request.max_tokens as usize);
        if request.prompt_logprobs.is_some() {
            let prompt = request.prompt.iter().enumerate().map(|(place, &id)| {
                let Event::Token(mut event) = token(id) else { unreachable!() };
                if place == 0 {
                    (event.logprob, event.top) = (None, vec![]);
                }
                event
            });
            let _ = sink.offer(Event::Prompt(prompt.collect()));
        }
        for byte in &text[..count] {
            let mut event = token(u32::from(*byte));
            if let (Event::Token(token), None) = (&mut event, request.logprobs) {
                (token.logprob, token.top) = (None, vec![]);
            }
            if sink.offer(event) == Err(Refused::Gone) {
                return;
            }
        }
        let reason = if count < text.len() { FinishReason::Length } else { FinishReason::StopToken(EOS) };
        let _ = sink.offer(end(&request, reason, count as u32));
    })
}

/// What the tests serve.
pub fn app(script: Arc<Script>, limits: Limits) -> (App, Arc<Scripted>) {
    let status = Status { healthy: true, resident: true, device_bytes_used: 1234, ..Status::default() };
    let engine = Arc::new(Scripted {
        script,
        status: Mutex::new(status),
        refusal: Mutex::new(None),
        requests: Mutex::new(Vec::new()),
    });
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}[assistant] {% endif %}";
    let app = App {
        engine: Arc::clone(&engine) as Arc<dyn Engine>,
        tokenizer: Arc::new(tokenizer()),
        template: Some(ChatTemplate::new(template.into(), String::new(), String::new()).unwrap()),
        model: ModelInfo {
            id: "org/demo".into(),
            context_tokens: 40_000,
            vocab_size: VOCAB,
            eos_ids: vec![EOS],
            device: "script".into(),
            fingerprint: "fp_test".into(),
            dtype: "bf16".into(),
            created: 1_700_000_000,
        },
        limits,
        recorder: None,
    };
    (app, engine)
}

/// The digest of a choice, from its definition: `flags`, then the words.
pub fn digest(flags: u8, words: &[u32]) -> String {
    let bytes = [vec![flags], words.iter().flat_map(|word| word.to_le_bytes()).collect()].concat();
    sha256(&bytes)
}

pub fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A running server.
pub struct Fixture {
    pub address: SocketAddr,
    pub engine: Arc<Scripted>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Drained>>,
}

impl Fixture {
    pub fn new(script: Arc<Script>) -> Self {
        Self::with_limits(script, Limits::default())
    }

    pub fn with_limits(script: Arc<Script>, limits: Limits) -> Self {
        let (app, engine) = app(script, limits);
        Self::serving(app, engine)
    }

    /// What it answers is recorded.
    pub fn recording(script: Arc<Script>, recorder: Recorder) -> Self {
        let (app, engine) = app(script, Limits::default());
        Self::serving(App { recorder: Some(recorder), ..app }, engine)
    }

    fn serving(app: App, engine: Arc<Scripted>) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let (told, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = bind("127.0.0.1", 0).await.unwrap();
                told.send(listener.local_addr().unwrap()).unwrap();
                run(listener, async { drop(stopped.await) }, app).await
            })
        });
        let address = address.recv_timeout(PATIENCE).unwrap();
        Self { address, engine, stop: Some(stop), thread: Some(thread) }
    }

    /// Gives the signal; the server goes on in its thread.
    pub fn begin_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    pub fn drained(mut self) -> Drained {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn connect(&self) -> Client {
        Client::new(self.address)
    }

    pub fn post(&self, path: &str, body: &str) -> Reply {
        self.send("POST", path, &[("content-type", "application/json")], body.as_bytes())
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut client = self.connect();
        client.request(method, path, headers, body);
        client.reply()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let drained = thread.join();
            if !std::thread::panicking() {
                drained.unwrap();
            }
        }
    }
}

/// A response, taken apart.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
    /// The chunks of the transfer coding.
    pub chunks: Vec<String>,
}

impl Reply {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// A connection.
pub struct Client {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: Vec::new() }
    }

    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !headers.iter().any(|(name, _)| *name == "content-length") && method != "GET" {
            head += &format!("content-length: {}\r\n", body.len());
        }
        head += "\r\n";
        self.stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses early may have closed already.
        let _ = self.stream.write_all(body);
    }

    pub fn post(&mut self, path: &str, body: &str) {
        self.request("POST", path, &[("content-type", "application/json")], body.as_bytes());
    }

    /// Reads until `pattern` has come; returns everything up to its end.
    pub fn until(&mut self, pattern: &str) -> String {
        let started = Instant::now();
        loop {
            let bytes = pattern.as_bytes();
            if let Some(at) = self.buffer.windows(bytes.len()).position(|w| w == bytes) {
                let rest = self.buffer.split_off(at + bytes.len());
                return String::from_utf8(std::mem::replace(&mut self.buffer, rest)).unwrap();
            }
            // Comments keep coming on a stream, so the socket's own time limit is not enough.
            assert!(started.elapsed() < PATIENCE, "no {:?} in {:?}", pattern, String::from_utf8_lossy(&self.buffer));
            assert!(self.fill(), "closed before {:?}: {:?}", pattern, String::from_utf8_lossy(&self.buffer));
        }
    }

    /// False at the end.
    pub fn fill(&mut self) -> bool {
        let mut block = [0; 65536];
        let count = self.stream.read(&mut block).unwrap();
        self.buffer.extend_from_slice(&block[..count]);
        count > 0
    }

    /// Everything up to the end of the connection.
    pub fn rest(&mut self) -> Vec<u8> {
        while self.fill() {}
        std::mem::take(&mut self.buffer)
    }

    fn exactly(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.fill(), "closed early");
        }
        let rest = self.buffer.split_off(count);
        std::mem::replace(&mut self.buffer, rest)
    }

    /// One response, whole; the connection may be used again.
    pub fn reply(&mut self) -> Reply {
        let head = self.until("\r\n\r\n");
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: HashMap<String, String> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let mut chunks: Vec<String> = Vec::new();
        let body = match headers.get("content-length") {
            Some(length) => self.exactly(length.parse().unwrap()),
            None if headers.get("transfer-encoding").is_some_and(|v| v == "chunked") => loop {
                let line = self.until("\r\n");
                let length = usize::from_str_radix(line.trim(), 16).unwrap();
                let chunk = self.exactly(length + 2);
                if length == 0 {
                    break chunks.concat().into_bytes();
                }
                chunks.push(String::from_utf8(chunk[..length].to_vec()).unwrap());
            },
            None => Vec::new(),
        };
        Reply { status, headers, body: String::from_utf8(body).unwrap(), chunks }
    }
}

/// The data lines of an event stream, in order, with the event names before them.
pub fn events(body: &str) -> Vec<(String, String)> {
    let mut events = Vec::new();
    for block in body.split_terminator("\n\n") {
        let mut name = String::new();
        for line in block.lines() {
            if let Some(event) = line.strip_prefix("event: ") {
                name = event.to_owned();
            } else if let Some(data) = line.strip_prefix("data: ") {
                events.push((name.clone(), data.to_owned()));
            } else {
                assert!(line.starts_with(':'), "{line:?}");
            }
        }
    }
    events
}
