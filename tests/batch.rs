//! Company changes nothing: a request's tokens, and the bits of their log-probabilities, are the same alone and among
//! others, however steps are cut, whatever the cache holds, and whether or not it had to give up its pages.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod devices;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::device::{CpuOptions, Device};
use host::engine::{
    CacheSize, Engine, EngineOptions, Event, EventSink, Finish, Handle, Refused, Request, Sampling, Status,
    SubmitError, spawn,
};
use host::model::Model;
use host::testing::TestRng;

/// Eight pages: long enough for several, short enough to be filled.
const CONTEXT: usize = 512;

/// Prompt of the request that is watched: two full pages and a part of a third.
const PROMPT: usize = 150;

fn demo(device: &Device) -> Arc<Model> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    Arc::new(Model::load(device, &folder, Some(CONTEXT), &mut |_, _| {}).unwrap())
}

fn options(model: &Model) -> EngineOptions {
    EngineOptions { cache: CacheSize::Bytes(128 << 20), ..EngineOptions::for_device(model.device()) }
}

/// An answer: each token, the bits of its log-probability, and the most likely tokens with theirs.
type Bits = Vec<(u32, Option<u32>, Vec<(u32, u32)>)>;

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    bits: Bits,
    finish: Finish,
}

struct ToChannel(Sender<Event>);

impl EventSink for ToChannel {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.0.send(event).map_err(|_| Refused::Gone)
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Waits for the whole answer.
fn collect(events: &Receiver<Event>) -> Answer {
    let mut bits = Bits::new();
    loop {
        match events.recv_timeout(Duration::from_secs(120)).unwrap() {
            Event::Token(token) => {
                let top = token.top.iter().map(|&(id, value)| (id, value.to_bits())).collect();
                bits.push((token.id, token.logprob.map(f32::to_bits), top));
            }
            Event::End(finish) => return Answer { bits, finish },
            Event::Prompt(_) => panic!("nobody asked for the prompt's log-probabilities"),
            Event::Error(error) => panic!("{error}"),
        }
    }
}

/// An engine that ends, and gives its memory back, before the next one starts.
struct Running {
    engine: Option<Handle>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn new(model: &Arc<Model>, options: EngineOptions) -> Self {
        let (engine, thread) = spawn(model.clone(), options).unwrap();
        Self { engine: Some(engine), thread: Some(thread) }
    }

    fn engine(&self) -> &Handle {
        self.engine.as_ref().unwrap()
    }

    fn submit(&self, request: &Request) -> Receiver<Event> {
        let (sender, events) = channel();
        self.engine().submit(request.clone(), Box::new(ToChannel(sender))).unwrap();
        events
    }

    fn ask(&self, request: &Request) -> Answer {
        collect(&self.submit(request))
    }

    /// Waits until nothing runs; every page is given back then.
    fn settled(&self) -> Status {
        let start = Instant::now();
        loop {
            let status = self.engine().status();
            if (status.running, status.waiting) == (0, 0) {
                assert_eq!(status.pages.held, 0, "{status:?}");
                assert!(status.healthy, "{status:?}");
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(120), "{status:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.engine = None;
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// Submits others while it is answered, each at its own step: arrivals that are random and yet the same in each run.
struct Pacemaker {
    engine: Handle,
    arrivals: VecDeque<(u32, Request, ToChannel)>,
    tokens: u32,
}

impl EventSink for Pacemaker {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.tokens += 1;
        let last = !matches!(event, Event::Token(_));
        while self.arrivals.front().is_some_and(|&(step, ..)| step <= self.tokens || last) {
            let (_, request, sink) = self.arrivals.pop_front().unwrap();
            self.engine.submit(request, Box::new(sink)).unwrap();
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        false
    }
}

const PACEMAKER_TOKENS: u32 = 40;

/// The answers to `requests`, which arrive at random steps of one engine; and what became of the engine.
fn together(model: &Arc<Model>, options: EngineOptions, requests: &[Request], seed: u64) -> (Vec<Answer>, Status) {
    let running = Running::new(model, options);
    let mut random = TestRng::new(seed);
    let mut receivers = Vec::new();
    let mut arrivals: Vec<_> = requests
        .iter()
        .map(|request| {
            let (sender, events) = channel();
            receivers.push(events);
            (1 + random.below(u64::from(PACEMAKER_TOKENS)) as u32 / 2, request.clone(), ToChannel(sender))
        })
        .collect();
    arrivals.sort_by_key(|&(step, ..)| step);
    let pacemaker = Pacemaker { engine: running.engine().clone(), arrivals: arrivals.into(), tokens: 0 };
    let beat = request(vec![7], PACEMAKER_TOKENS, Sampling::default(), None);
    running.engine().submit(beat, Box::new(pacemaker)).unwrap();
    let answers = receivers.iter().map(collect).collect();
    let status = running.settled();
    (answers, status)
}

fn request(prompt: Vec<u32>, max_tokens: u32, sampling: Sampling, logprobs: Option<u32>) -> Request {
    Request { prompt, max_tokens, sampling, logprobs, ..Request::default() }
}

fn tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut random = TestRng::new(seed);
    (0..count).map(|_| random.below(256) as u32).collect()
}

/// The request that is watched: everything that the sampler can do at once.
fn watched() -> Request {
    let sampling = Sampling {
        temperature: 0.9,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: vec![(65, 1.5), (66, -3.0)],
        seed: 42,
    };
    request(tokens(PROMPT, 1), 24, sampling, Some(5))
}

/// Requests of random lengths and parameters; some begin like the watched one.
fn others(count: usize) -> Vec<Request> {
    let mut random = TestRng::new(99);
    (0..count)
        .map(|index| {
            let length = 1 + random.below(if index % 5 == 4 { 300 } else { 90 }) as usize;
            let mut prompt = tokens(length, 1000 + index as u64);
            if index % 3 == 0 {
                let shared = length.min(PROMPT);
                prompt[..shared].copy_from_slice(&tokens(PROMPT, 1)[..shared]);
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
            request(prompt, 1 + random.below(30) as u32, sampling, logprobs)
        })
        .collect()
}

fn alone(model: &Arc<Model>, request: &Request) -> Bits {
    Running::new(model, options(model)).ask(request).bits
}

fn company_changes_nothing(device: &Device, counts: &[usize]) {
    let model = demo(device);
    let expected = alone(&model, &watched());
    assert_eq!(expected.len(), 24);
    let others = others(*counts.iter().max().unwrap());
    let mut known: Vec<Option<Bits>> = vec![None; others.len()];
    for (number, &count) in counts.iter().enumerate() {
        // The watched one has another place each time.
        let mut requests = others[..count].to_vec();
        let place = count * (number % 3) / 2;
        requests.insert(place, watched());
        let (mut answers, status) = together(&model, options(&model), &requests, count as u64);
        assert_eq!(answers.remove(place).bits, expected, "among {count} others");
        // The others are watched too: by themselves in the other runs.
        for (index, answer) in answers.into_iter().enumerate() {
            let bits = known[index].get_or_insert_with(|| answer.bits.clone());
            assert_eq!(*bits, answer.bits, "number {index} of {count}");
        }
        assert!(status.pages.high_water > 1, "{status:?}");
    }
    // Some of them by themselves altogether.
    for index in (0..others.len()).step_by(6) {
        assert_eq!(Some(alone(&model, &others[index])), known[index], "number {index}");
    }
    // The comparison sees another seed.
    let sampling = Sampling { seed: 43, ..watched().sampling };
    assert_ne!(alone(&model, &Request { sampling, ..watched() }), expected);
}

fn budgets_change_nothing(device: &Device) {
    let model = demo(device);
    let mut requests = others(9);
    requests.push(watched());
    let (expected, _) = together(&model, options(&model), &requests, 5);
    let expected: Vec<Bits> = expected.into_iter().map(|answer| answer.bits).collect();
    for (chunk_tokens, max_running) in [(2, 3), (16, 32), (64, 4), (100, 32), (4096, 1), (4096, 32)] {
        let options = EngineOptions { chunk_tokens, max_running, ..options(&model) };
        let (answers, _) = together(&model, options, &requests, 5 + chunk_tokens as u64);
        for (index, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
            assert_eq!(answer.bits, *expected, "number {index}, {chunk_tokens} tokens, {max_running} requests");
        }
    }
}

fn a_warm_cache_changes_nothing(device: &Device) {
    let model = demo(device);
    let warm = Running::new(&model, options(&model));
    let first = Request { max_tokens: 60, ..watched() };
    let cold = warm.ask(&first);
    assert_eq!((cold.finish.cached_tokens, cold.bits.clone()), (0, alone(&model, &first)));
    let ids: Vec<u32> = cold.bits.iter().map(|&(id, ..)| id).collect();
    let whole = [first.prompt.clone(), ids].concat();
    let with_prompt = |prompt: &[u32]| Request { prompt: prompt.to_vec(), max_tokens: 9, ..first.clone() };
    let mut strange = whole[..200].to_vec();
    strange[70] ^= 1;
    for (prompt, cached) in [
        // The same again; full pages cut at, before and behind their ends.
        (&whole[..150], 128),
        (&whole[..128], 64),
        (&whole[..129], 128),
        (&whole[..127], 64),
        (&whole[..100], 64),
        (&whole[..64], 0),
        (&whole[..20], 0),
        // The third page was filled while decoding.
        (&whole[..200], 192),
        (&whole[..210], 192),
        // Another token in the second page.
        (&strange[..], 64),
    ] {
        let request = with_prompt(prompt);
        let answer = warm.ask(&request);
        assert_eq!(answer.finish.cached_tokens, cached, "{} tokens", prompt.len());
        assert_eq!(answer.bits, alone(&model, &request), "{} tokens", prompt.len());
    }
    // Another salt finds nothing and answers alike.
    let salted = Request { cache_salt: Some("mine".to_owned()), ..first.clone() };
    for cached in [0, 128] {
        let answer = warm.ask(&salted);
        assert_eq!((answer.finish.cached_tokens, &answer.bits), (cached, &cold.bits));
    }
    // The same request, from the cache, to its full length.
    let again = warm.ask(&first);
    assert_eq!((again.finish.cached_tokens, again.bits), (128, cold.bits));
    let pages = warm.settled().pages;
    assert!(pages.hits >= 10 && pages.misses >= 2 && pages.idle > 0, "{pages:?}");
}

fn giving_up_pages_changes_nothing(device: &Device) {
    let model = demo(device);
    // Each begins with one page and needs four in the end.
    let requests: Vec<Request> = (0..6)
        .map(|index| {
            let sampling = Sampling { seed: index, frequency_penalty: 0.3, ..Sampling::default() };
            request(tokens(20 + 5 * index as usize, 50 + index), 190 + 5 * index as u32, sampling, Some(2))
        })
        .collect();
    let (expected, calm) = together(&model, options(&model), &requests, 3);
    assert_eq!(calm.preemptions, 0);
    let tight = EngineOptions { cache: CacheSize::Pages(9), ..options(&model) };
    let (answers, pressed) = together(&model, tight, &requests, 3);
    assert!(pressed.preemptions > 1 && pressed.pages.high_water == 9, "{pressed:?}");
    for (index, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
        assert_eq!(answer.bits, expected.bits, "number {index}");
    }
}

fn asking_for_log_probabilities_changes_nothing(device: &Device) {
    let model = demo(device);
    let asking = [None, Some(0), Some(3), Some(20)];
    let mut requests: Vec<Request> = asking.iter().map(|&logprobs| Request { logprobs, ..watched() }).collect();
    requests.extend(others(3));
    let (answers, _) = together(&model, options(&model), &requests, 8);
    let most = &answers[3].bits;
    for (answer, asked) in answers.iter().zip(asking) {
        for (token, full) in answer.bits.iter().zip(most) {
            assert_eq!((token.0, token.1), (full.0, asked.and(full.1)));
            assert_eq!(token.2, full.2[..asked.unwrap_or(0) as usize]);
        }
        assert_eq!(answer.bits.len(), most.len());
    }
}

#[test]
fn company_changes_nothing_on_the_cpu() {
    company_changes_nothing(&devices::cpu(), &[1, 7, 8, 9, 31]);
}

#[test]
fn budgets_change_nothing_on_the_cpu() {
    budgets_change_nothing(&devices::cpu());
}

#[test]
fn a_warm_cache_changes_nothing_on_the_cpu() {
    a_warm_cache_changes_nothing(&devices::cpu());
}

#[test]
fn giving_up_pages_changes_nothing_on_the_cpu() {
    giving_up_pages_changes_nothing(&devices::cpu());
}

#[test]
fn asking_for_log_probabilities_changes_nothing_on_the_cpu() {
    asking_for_log_probabilities_changes_nothing(&devices::cpu());
}

#[test]
#[ignore = "needs a GPU"]
fn nothing_changes_anything_on_the_gpu() {
    let device = devices::cuda();
    company_changes_nothing(&device, &[1, 7, 8, 9, 31, 64]);
    budgets_change_nothing(&device);
    a_warm_cache_changes_nothing(&device);
    giving_up_pages_changes_nothing(&device);
    asking_for_log_probabilities_changes_nothing(&device);
}

/// Races, and reads of memory that nobody wrote: none, though requests share pages, join and leave.
#[test]
fn checked_mode_finds_nothing_in_a_shared_step() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/qwen2-w64-r2");
    let prompt: Vec<u32> = (0..70).map(|token| token % 50).collect();
    let requests: Vec<Request> = [(70, 3), (68, 2), (5, 4), (1, 3)]
        .map(|(length, max_tokens)| request(prompt[..length].to_vec(), max_tokens, Sampling::default(), Some(1)))
        .into();
    let answers = |checked| {
        let device = Device::cpu(CpuOptions { checked, ..CpuOptions::default() }).unwrap();
        let model = Arc::new(Model::load(&device, &folder, Some(128), &mut |_, _| {}).unwrap());
        let options = EngineOptions { cache: CacheSize::Pages(5), chunk_tokens: 48, ..options(&model) };
        let running = Running::new(&model, options);
        let receivers: Vec<_> = requests.iter().map(|request| running.submit(request)).collect();
        let answers: Vec<Bits> = receivers.iter().map(|events| collect(events).bits).collect();
        assert!(running.settled().pages.hits > 0);
        answers
    };
    assert_eq!(answers(true), answers(false));
}

#[test]
fn a_request_larger_than_the_cache_is_refused_with_the_numbers() {
    let model = demo(&devices::cpu());
    let running = Running::new(&model, EngineOptions { cache: CacheSize::Pages(3), ..options(&model) });
    let (sender, events) = channel();
    let greedy = |prompt, max_tokens| request(vec![1; prompt], max_tokens, Sampling::default(), None);
    let refused = running.engine().submit(greedy(190, 3), Box::new(ToChannel(sender)));
    assert_eq!(refused, Err(SubmitError::NeverFits { needed_pages: 4, total_pages: 3, page_tokens: 64 }));
    assert!(events.recv().is_err());
    assert_eq!(running.ask(&greedy(190, 2)).bits.len(), 2);
    running.settled();
}

/// Is gone when asked, after so many questions.
struct Leaving {
    after: usize,
    questions: std::cell::Cell<usize>,
}

impl EventSink for Leaving {
    fn offer(&mut self, _: Event) -> Result<(), Refused> {
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.questions.set(self.questions.get() + 1);
        self.questions.get() > self.after
    }
}

#[test]
fn whoever_leaves_in_whatever_state_leaves_no_page_behind() {
    let model = demo(&devices::cpu());
    // Two run, the others wait; prompts take several steps.
    let options = EngineOptions { max_running: 2, chunk_tokens: 32, ..options(&model) };
    let running = Running::new(&model, options);
    let stays = running.submit(&watched());
    for after in 0..30 {
        let leaving = Leaving { after, questions: std::cell::Cell::new(0) };
        running.engine().submit(Request { max_tokens: 300, ..watched() }, Box::new(leaving)).unwrap();
    }
    let answer = collect(&stays).bits;
    running.settled();
    assert_eq!(answer, alone(&model, &watched()));
}
