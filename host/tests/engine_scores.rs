//! Minimal lengths, log-probabilities of prompts, and admission by tokens, with the demo model on the CPU.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod engine_support;

use engine_support::{Reader, Rule, TokenBits, chat, demo, engine, eventually, greedy, options};
use host::engine::{
    Engine, EngineOptions, Event, EventSink, FinishReason, Handle, Request, Sampling, SubmitError, TokenEvent,
};
use host::testing::TestRng;

const END_OF_TURN: u32 = 258;

fn bits(tokens: &[TokenEvent]) -> Vec<TokenBits> {
    let top = |token: &TokenEvent| token.top.iter().map(|&(id, value)| (id, value.to_bits())).collect();
    tokens.iter().map(|token| (token.id, token.logprob.map(f32::to_bits), top(token))).collect()
}

/// The prompt's report, and the bits of what was generated.
fn scored(reader: &Reader) -> (Vec<TokenBits>, Vec<TokenBits>) {
    eventually(|| reader.is_dropped());
    let mut events = reader.events();
    let Event::Prompt(prompt) = events.remove(0) else { panic!("no report of the prompt: {events:?}") };
    assert!(matches!(events.pop(), Some(Event::End(_))));
    let tokens: Vec<TokenEvent> = events
        .into_iter()
        .map(|event| if let Event::Token(token) = event { token } else { panic!("{event:?} before the end") })
        .collect();
    (bits(&prompt), bits(&tokens))
}

fn random_prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut random = TestRng::new(seed);
    (0..tokens).map(|_| random.below(256) as u32).collect()
}

#[test]
fn no_stop_token_comes_before_the_minimum() {
    let (engine, _) = engine(options());
    let plain = Request { stop_tokens: vec![END_OF_TURN], ..greedy(chat("What is 12 + 30?"), 80) };
    let short = Reader::ask(&engine, plain.clone());
    let length = short.finish().generated_tokens;
    assert!(matches!(short.finish().reason, FinishReason::StopToken(_)) && length > 5);
    for sampling in [plain.sampling.clone(), Sampling { temperature: 0.9, seed: 4, ..Sampling::default() }] {
        // A minimum that is reached anyway changes nothing.
        let plain = Request { sampling, ..plain.clone() };
        let bits = Reader::ask(&engine, Request { logprobs: Some(2), ..plain.clone() }).bits();
        let early = Request { min_tokens: 3, logprobs: Some(2), ..plain.clone() };
        assert_eq!(Reader::ask(&engine, early).bits(), bits);
        for min_tokens in [length, length + 1, length + 20, 80] {
            let answer = Reader::ask(&engine, Request { min_tokens, ..plain.clone() });
            assert!(answer.finish().generated_tokens >= min_tokens, "{:?}", answer.finish());
            assert!(!answer.ids().contains(&END_OF_TURN));
        }
    }
    // Without a minimum of its own a neighbour is not touched, and the other way round.
    let long = Request { min_tokens: 70, ..plain.clone() };
    let alone = Reader::ask(&engine, long.clone()).ids();
    let readers: Vec<Reader> = (0..6)
        .map(|place| Reader::submitted(&engine, if place % 2 == 0 { plain.clone() } else { long.clone() }))
        .collect();
    for (place, reader) in readers.iter().enumerate() {
        assert_eq!(reader.answer().ids(), if place % 2 == 0 { short.ids() } else { alone.clone() });
    }
    // Banned means never, not unlikely: of two tokens that are far ahead of all others the banned one is not taken.
    let forced = Sampling { logit_bias: vec![(7, 1e6), (8, 1e5)], ..plain.sampling.clone() };
    let forced = Request { sampling: forced, stop_tokens: vec![7], min_tokens: 4, max_tokens: 9, ..plain };
    let answer = Reader::ask(&engine, forced);
    assert_eq!((answer.ids(), answer.finish().reason), (vec![8; 4], FinishReason::StopToken(7)));
}

#[test]
fn a_minimum_above_the_maximum_is_refused() {
    let (engine, _) = engine(options());
    let refused = engine.submit(Request { min_tokens: 4, ..greedy(vec![1], 3) }, Reader::new(Rule::Take).sink());
    assert!(matches!(refused, Err(SubmitError::OutOfRange { name: "min_tokens", .. })), "{refused:?}");
}

#[test]
fn a_prompt_is_scored_with_the_bits_of_decode() {
    let (engine, _) = engine(options());
    // 130 tokens come out one by one; then they are a prompt.
    let asked = random_prompt(3, 20);
    let hot = Sampling { temperature: 1.2, seed: 8, ..Sampling::default() };
    let generated = Reader::ask(&engine, Request { sampling: hot, logprobs: Some(5), ..greedy(asked.clone(), 130) });
    let prompt = [asked.clone(), generated.ids()].concat();
    let reader =
        Reader::submitted(&engine, Request { prompt_logprobs: Some(5), max_tokens: 0, ..greedy(prompt.clone(), 1) });
    let (report, tokens) = scored(&reader);
    assert_eq!((report.len(), tokens.len()), (150, 0));
    assert_eq!(report.iter().map(|token| token.0).collect::<Vec<_>>(), prompt);
    assert_eq!((report[0].1, &report[0].2[..]), (None, &[][..]));
    assert!(report[1..].iter().all(|token| token.1.is_some() && token.2.len() == 5));
    assert_eq!(report[20..], generated.bits());
    // The comparison sees a token that is another one.
    let mut other = prompt;
    other[100] = (other[100] + 1) % 256;
    let reader = Reader::submitted(&engine, Request { prompt_logprobs: Some(5), max_tokens: 0, ..greedy(other, 1) });
    let (changed, _) = scored(&reader);
    assert_eq!(changed[..100], report[..100]);
    assert!((100..150).all(|place| changed[place] != report[place]));
}

#[test]
fn scores_do_not_depend_on_chunks_company_or_the_cache() {
    let prompt = random_prompt(5, 150);
    let request = Request { prompt_logprobs: Some(3), logprobs: Some(3), ..greedy(prompt.clone(), 6) };
    let (expected, tokens) = {
        let (engine, _) = engine(options());
        scored(&Reader::submitted(&engine, request.clone()))
    };
    assert_eq!((expected.len(), tokens.len()), (150, 6));
    for (chunk_tokens, max_running) in [(2, 3), (7, 32), (64, 1), (64, 32)] {
        let (engine, _) = engine(EngineOptions { chunk_tokens, max_running, ..options() });
        // What is asked for besides: the same prompt without scores, others, and one that is scored too.
        let beside = [
            greedy(prompt.clone(), 20),
            greedy(random_prompt(6, 90), 30),
            Request { prompt_logprobs: Some(20), ..greedy(random_prompt(7, 70), 3) },
            greedy(prompt[..64].to_vec(), 40),
        ];
        let company: Vec<Reader> = beside.iter().map(|request| Reader::submitted(&engine, request.clone())).collect();
        let readers: Vec<Reader> = (0..2).map(|_| Reader::submitted(&engine, request.clone())).collect();
        for reader in &readers {
            assert!(scored(reader) == (expected.clone(), tokens.clone()), "{chunk_tokens} {max_running}");
        }
        for (reader, request) in company.iter().zip(&beside) {
            eventually(|| reader.is_dropped());
            assert_eq!(reader.tokens().len(), request.max_tokens as usize);
        }
        // Now every page is in the cache.
        assert!(scored(&Reader::submitted(&engine, request.clone())) == (expected.clone(), tokens.clone()));
    }
    // And a scored prompt leaves its pages to those that come later.
    let (engine, _) = engine(options());
    scored(&Reader::submitted(&engine, request.clone()));
    let plain = Reader::ask(&engine, Request { prompt_logprobs: None, ..request });
    assert_eq!((plain.bits(), plain.finish().cached_tokens), (tokens, 128));
}

#[test]
fn scores_survive_the_loss_of_pages() {
    let prompt = random_prompt(9, 140);
    let request = Request { prompt_logprobs: Some(2), logprobs: Some(2), ..greedy(prompt, 100) };
    let ask = |engine: &Handle| scored(&Reader::submitted(engine, request.clone()));
    let (alone, _alone) = engine(options());
    let expected = ask(&alone);
    // Five pages for requests that grow to four each: the youngest has to give its own up, again and again.
    let cache = host::engine::CacheSize::Pages(5);
    let (tight, _tight) = engine(EngineOptions { cache, chunk_tokens: 16, ..options() });
    let others: Vec<Reader> =
        (0..3).map(|place| Reader::submitted(&tight, greedy(random_prompt(20 + place, 60), 120))).collect();
    for _ in 0..3 {
        assert!(ask(&tight) == expected);
    }
    eventually(|| others.iter().all(Reader::is_dropped));
    assert!(tight.status().preemptions > 0);
}

#[test]
fn a_prompt_of_one_token_has_a_report_too() {
    let (engine, _) = engine(options());
    for max_tokens in [0, 2] {
        let reader =
            Reader::submitted(&engine, Request { prompt_logprobs: Some(4), max_tokens, ..greedy(vec![65], 1) });
        let (report, tokens) = scored(&reader);
        assert_eq!((report, tokens.len()), (vec![(65, None, vec![])], max_tokens as usize));
    }
    let context = demo().context_tokens();
    let reader = Reader::submitted(
        &engine,
        Request { prompt_logprobs: Some(0), max_tokens: 0, ..greedy(random_prompt(2, context), 1) },
    );
    assert_eq!(scored(&reader).0.len(), context);
}

fn sinks(readers: &[Reader], request: &Request) -> Vec<(Request, Box<dyn EventSink>)> {
    readers.iter().map(|reader| (request.clone(), reader.sink())).collect()
}

#[test]
fn tokens_that_wait_are_bounded_and_so_are_they_all_or_none() {
    let (engine, _) = engine(EngineOptions { queue: 4, queue_tokens: 200, ..options() });
    let (held, gate) = Reader::held();
    engine.submit(greedy(chat("Hello"), 3), held.sink()).unwrap();
    held.wait_until_held();
    let readers = |count: usize| (0..count).map(|_| Reader::new(Rule::Take)).collect::<Vec<_>>();
    // 60 tokens each.
    let request = greedy(vec![65; 50], 10);
    let refused = readers(5);
    assert_eq!(engine.submit_all(sinks(&refused, &request)), Err(SubmitError::QueueFull { limit: 4 }));
    let first = readers(2);
    engine.submit_all(sinks(&first, &request)).unwrap();
    assert_eq!((engine.status().waiting, engine.status().waiting_tokens), (2, 120));
    let late = readers(2);
    let error = engine.submit_all(sinks(&late, &request)).unwrap_err();
    assert_eq!(error, SubmitError::QueueTokens { waiting_tokens: 120, request_tokens: 120, limit: 200 });
    assert!(["120", "200"].iter().all(|number| error.to_string().contains(number)), "{error}");
    assert!(refused.iter().chain(&late).all(|reader| reader.is_dropped() && reader.events().is_empty()));
    assert_eq!((engine.status().waiting, engine.status().waiting_tokens), (2, 120));
    let last = readers(1);
    engine.submit_all(sinks(&last, &request)).unwrap();
    gate.open();
    let ids = first[0].answer().ids();
    assert!(first.iter().chain(&last).all(|reader| reader.answer().ids() == ids));
    eventually(|| (engine.status().running, engine.status().waiting, engine.status().waiting_tokens) == (0, 0, 0));
    // Where nobody waits, more is taken than may wait.
    assert_eq!(Reader::ask(&engine, greedy(vec![65; 200], 50)).ids().len(), 50);
    // One bad request of several: none is taken.
    let mixed = readers(2);
    let mut several = sinks(&mixed, &request);
    several[1].0.prompt.clear();
    assert_eq!(engine.submit_all(several), Err(SubmitError::EmptyPrompt));
    assert!(mixed.iter().all(|reader| reader.is_dropped() && reader.events().is_empty()));
}
