//! The engine with the demo model on the CPU: what it refuses, what it reports, and that nobody's going away or slowness
//! touches anybody else's answer.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod engine_support;

use std::path::Path;
use std::sync::Arc;

use engine_support::{Reader, Rule, chat, demo, engine, eventually, greedy, options, texts};
use host::engine::{Engine, EngineError, Event, FinishReason, Request, Sampling, SubmitError, spawn};
use host::model::Model;
use host::testing::TestRng;

const END_OF_TURN: u32 = 258;

#[test]
fn the_demo_model_adds() {
    let (engine, _) = engine(options());
    let answer =
        Reader::ask(&engine, Request { stop_tokens: vec![END_OF_TURN], ..greedy(chat("What is 12 + 30?"), 64) });
    let text = texts(&answer.ids());
    assert!(text.contains("42"), "{text:?}");
    // The stop token is named and not emitted, and not counted.
    let finish = answer.finish();
    assert_eq!(finish.reason, FinishReason::StopToken(END_OF_TURN));
    assert!(!answer.ids().contains(&END_OF_TURN));
    assert_eq!(finish.generated_tokens as usize, answer.ids().len());
    assert_eq!(finish.prompt_tokens as usize, chat("What is 12 + 30?").len());
}

#[test]
fn any_token_can_end_an_answer_even_the_first() {
    let (engine, _) = engine(options());
    let whole = Reader::ask(&engine, greedy(chat("Reverse the word lamp"), 6)).ids();
    assert_eq!(whole.len(), 6);
    for stop in &whole {
        let place = whole.iter().position(|id| id == stop).unwrap();
        let answer =
            Reader::ask(&engine, Request { stop_tokens: vec![9, *stop], ..greedy(chat("Reverse the word lamp"), 6) });
        assert_eq!(answer.ids(), whole[..place]);
        assert_eq!(answer.finish().reason, FinishReason::StopToken(*stop));
        assert_eq!(answer.finish().generated_tokens as usize, place);
    }
}

#[test]
fn lengths_are_kept_up_to_the_last_token_of_the_context() {
    let (engine, _) = engine(options());
    let context = demo().context_tokens();
    for (prompt, max_tokens) in [(1, 1), (1, 5), (63, 2), (64, 2), (65, 1), (context - 3, 3), (context - 1, 1)] {
        let answer = Reader::ask(&engine, greedy(vec![97; prompt], max_tokens));
        assert_eq!(answer.ids().len(), max_tokens as usize);
        let finish = answer.finish();
        assert_eq!(finish.reason, FinishReason::Length);
        assert_eq!((finish.prompt_tokens as usize, finish.generated_tokens), (prompt, max_tokens));
    }
}

#[test]
fn what_cannot_be_answered_is_refused_with_numbers() {
    let (engine, _) = engine(options());
    let context = demo().context_tokens();
    let vocab = demo().config().vocab;
    let refuse = |request: Request| {
        let reader = Reader::new(Rule::Take);
        let error = engine.submit(request, reader.sink()).unwrap_err();
        assert!(reader.is_dropped() && reader.events().is_empty());
        assert_eq!((engine.status().waiting, engine.status().running), (0, 0));
        error
    };
    assert_eq!(refuse(greedy(vec![], 1)), SubmitError::EmptyPrompt);
    assert_eq!(refuse(greedy(vec![1], 0)), SubmitError::NoTokens);
    for (prompt_tokens, max_tokens) in [(context, 1), (1, context as u32), (10, u32::MAX), (3 * context, 1)] {
        let expected = SubmitError::TooLong { prompt_tokens, max_tokens, context_tokens: context };
        assert_eq!(refuse(greedy(vec![1; prompt_tokens], max_tokens)), expected);
    }
    for id in [vocab as u32, u32::MAX] {
        let expected = SubmitError::UnknownToken { id, vocab_size: vocab };
        assert_eq!(refuse(greedy(vec![1, id, 2], 1)), expected);
        let sampling = Sampling { logit_bias: vec![(1, 1.0), (id, 1.0)], ..Sampling::default() };
        assert_eq!(refuse(Request { sampling, ..greedy(vec![1], 1) }), expected);
    }
    let neutral = Sampling::default;
    for (name, sampling) in [
        ("temperature", Sampling { temperature: -0.1, ..neutral() }),
        ("temperature", Sampling { temperature: f32::NAN, ..neutral() }),
        ("temperature", Sampling { temperature: f32::INFINITY, ..neutral() }),
        ("top_p", Sampling { top_p: 1.1, ..neutral() }),
        ("top_p", Sampling { top_p: -0.1, ..neutral() }),
        ("min_p", Sampling { min_p: f32::NAN, ..neutral() }),
        ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..neutral() }),
        ("presence_penalty", Sampling { presence_penalty: f32::INFINITY, ..neutral() }),
        ("frequency_penalty", Sampling { frequency_penalty: f32::NAN, ..neutral() }),
        ("logit_bias", Sampling { logit_bias: vec![(1, f32::NEG_INFINITY)], ..neutral() }),
    ] {
        match refuse(Request { sampling, ..greedy(vec![1], 1) }) {
            SubmitError::OutOfRange { name: found, .. } => assert_eq!(found, name),
            other => panic!("{name}: {other}"),
        }
    }
    assert_eq!(Reader::ask(&engine, greedy(vec![1], 1)).ids().len(), 1);
}

#[test]
fn a_full_queue_refuses_and_everyone_in_it_is_answered() {
    let (engine, _) = engine(host::engine::EngineOptions { queue: 2, ..options() });
    let (held, gate) = Reader::held();
    engine.submit(greedy(chat("Hello"), 3), held.sink()).unwrap();
    held.wait_until_held();
    let queued: Vec<Reader> = (0..2).map(|_| Reader::submitted(&engine, greedy(chat("Hello"), 3))).collect();
    assert_eq!((engine.status().running, engine.status().waiting), (1, 2));
    let late = Reader::new(Rule::Take);
    let refused = engine.submit(greedy(chat("Hello"), 3), late.sink());
    assert_eq!(refused, Err(SubmitError::QueueFull { limit: 2 }));
    assert!(late.is_dropped() && late.events().is_empty());
    assert_eq!(engine.status().waiting, 2);
    gate.open();
    let first = held.answer().ids();
    assert_eq!(first.len(), 3);
    assert!(queued.iter().all(|reader| reader.answer().ids() == first));
    eventually(|| (engine.status().running, engine.status().waiting) == (0, 0));
    assert!(engine.status().healthy && engine.status().resident && engine.status().device_bytes_used > 0);
}

#[test]
fn a_client_that_leaves_the_queue_is_not_worked_for() {
    let (engine, _) = engine(options());
    let (held, gate) = Reader::held();
    engine.submit(greedy(chat("Hello"), 2), held.sink()).unwrap();
    held.wait_until_held();
    let gone = Reader::submitted(&engine, greedy(chat("Hello"), 2));
    let stays = Reader::submitted(&engine, greedy(chat("Hello"), 2));
    gone.leave();
    gate.open();
    assert_eq!(stays.answer().ids(), held.answer().ids());
    assert!(gone.is_dropped() && gone.events().is_empty());
    eventually(|| engine.status().running == 0);
}

#[test]
fn a_client_that_leaves_during_prefill_frees_the_engine() {
    let (engine, _) = engine(host::engine::EngineOptions { chunk_tokens: 4, ..options() });
    let reader = Reader::new(Rule::LeaveAfterQuestions(5));
    engine.submit(greedy(vec![97; 200], 3), reader.sink()).unwrap();
    eventually(|| reader.is_dropped());
    // 200 tokens are 50 steps; it was asked once before each and left at the fifth.
    assert!(reader.events().is_empty());
    assert_eq!(reader.questions(), 5);
    assert_eq!(Reader::ask(&engine, greedy(vec![97; 9], 3)).ids().len(), 3);
}

#[test]
fn a_client_that_leaves_while_tokens_come_hears_no_more() {
    let (engine, _) = engine(options());
    for rule in [Rule::LeaveAfterTokens(3), Rule::RefuseAfterTokens(3)] {
        let reader = Reader::new(rule);
        engine.submit(greedy(chat("Hello"), 100), reader.sink()).unwrap();
        eventually(|| reader.is_dropped());
        assert_eq!(reader.events().len(), 3, "{rule:?}");
        assert!(reader.events().iter().all(|event| matches!(event, Event::Token(_))));
    }
    assert_eq!(Reader::ask(&engine, greedy(chat("Hello"), 4)).ids().len(), 4);
}

#[test]
fn a_slow_reader_is_ended_and_the_engine_goes_on() {
    let (engine, _) = engine(options());
    let expected = Reader::ask(&engine, greedy(chat("Hello"), 8)).ids();
    let slow = Reader::new(Rule::FullAfterTokens(5));
    engine.submit(greedy(chat("Hello"), 100), slow.sink()).unwrap();
    eventually(|| slow.is_dropped());
    let events = slow.events();
    assert_eq!(events.len(), 6);
    assert!(matches!(events.last(), Some(Event::Error(EngineError::SlowReader))), "{events:?}");
    assert_eq!(slow.tokens(), expected[..5]);
    assert_eq!(Reader::ask(&engine, greedy(chat("Hello"), 8)).ids(), expected);
}

#[test]
fn how_a_prompt_is_cut_changes_no_bit() {
    let mut random = TestRng::new(7);
    let prompt: Vec<u32> = (0..150).map(|_| random.below(256) as u32).collect();
    let request = Request {
        sampling: Sampling { temperature: 0.8, seed: 11, ..Sampling::default() },
        logprobs: Some(5),
        ..greedy(prompt, 12)
    };
    let answers: Vec<_> = [1, 7, 64, 256]
        .into_iter()
        .map(|chunk_tokens| {
            let (engine, _) = engine(host::engine::EngineOptions { chunk_tokens, ..options() });
            // The second time over what the first left in the cache.
            let (first, second) = (Reader::ask(&engine, request.clone()), Reader::ask(&engine, request.clone()));
            assert_eq!(first.bits(), second.bits());
            first.bits()
        })
        .collect();
    assert_eq!(answers[0].len(), 12);
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    // The comparison sees a different seed.
    let (engine, _) = engine(options());
    let other = Request { sampling: Sampling { seed: 12, ..request.sampling.clone() }, ..request };
    assert_ne!(Reader::ask(&engine, other).bits(), answers[0]);
}

#[test]
fn log_probabilities_are_those_of_a_distribution() {
    let (engine, _) = engine(options());
    let ask = |sampling: Sampling, logprobs| {
        Reader::ask(&engine, Request { sampling, logprobs, ..greedy(chat("Tell me a joke"), 12) })
    };
    let hot = Sampling { temperature: 1.5, seed: 3, ..Sampling::default() };
    let answer = ask(hot.clone(), Some(20));
    for token in answer.tokens() {
        assert_eq!(token.top.len(), 20);
        let sum: f64 = token.top.iter().map(|&(_, value)| f64::from(value).exp()).sum();
        assert!(sum <= 1.0 + 1e-5 && token.top[0].1 <= 0.0, "{sum}");
        assert!(sum > 20.0 / 272.0, "the 20 most likely of 272 hold less than their share: {sum}");
        assert!(token.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        let ids: std::collections::BTreeSet<u32> = token.top.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids.len(), 20);
        let own = token.logprob.unwrap();
        match token.top.iter().find(|&&(id, _)| id == token.id) {
            Some(&(_, value)) => assert_eq!(value, own),
            None => assert!(own <= token.top[19].1),
        }
    }
    // Asking for them, and for how many, changes neither the answer nor the values.
    let none = ask(hot.clone(), None);
    assert!(none.tokens().iter().all(|token| token.logprob.is_none() && token.top.is_empty()));
    assert_eq!(none.ids(), answer.ids());
    for (some, all) in ask(hot, Some(3)).tokens().iter().zip(answer.tokens()) {
        assert_eq!((some.id, some.logprob, &some.top[..]), (all.id, all.logprob, &all.top[..3]));
    }
    let zero = ask(Sampling { temperature: 0.0, ..Sampling::default() }, Some(0));
    assert!(zero.tokens().iter().all(|token| token.logprob.is_some() && token.top.is_empty()));
}

#[test]
fn filters_that_leave_one_token_are_greedy() {
    let (engine, _) = engine(options());
    let ask =
        |sampling: Sampling| Reader::ask(&engine, Request { sampling, ..greedy(chat("Tell me a joke"), 24) }).ids();
    let hot = Sampling { temperature: 5.0, seed: 5, ..Sampling::default() };
    let greedily = ask(Sampling { temperature: 0.0, ..hot.clone() });
    assert_eq!(ask(Sampling { top_k: 1, ..hot.clone() }), greedily);
    assert_eq!(ask(Sampling { top_p: 0.0, ..hot.clone() }), greedily);
    assert_eq!(ask(Sampling { min_p: 1.0, ..hot.clone() }), greedily);
    // Filters at temperature 0 are ignored.
    let odd = Sampling { temperature: 0.0, top_k: 7, top_p: 0.3, min_p: 0.2, ..hot.clone() };
    assert_eq!(ask(odd), greedily);
    // And at this temperature they matter.
    assert_ne!(ask(hot), greedily);
}

#[test]
fn the_smallest_temperatures_are_greedy() {
    let (engine, _) = engine(options());
    let ask = |temperature: f32| {
        let sampling = Sampling { temperature, seed: 5, ..Sampling::default() };
        Reader::ask(&engine, Request { sampling, ..greedy(chat("What is 12 + 30?"), 12) }).ids()
    };
    let greedily = ask(0.0);
    for temperature in [1e-4, 1e-10, 1e-30, 1e-38, f32::from_bits(1)] {
        assert_eq!(ask(temperature), greedily, "{temperature:e}");
    }
}

#[test]
fn penalties_forbid_and_biases_force() {
    let (engine, _) = engine(options());
    let ask = |sampling: Sampling| {
        Reader::ask(&engine, Request { sampling, logprobs: Some(5), ..greedy(chat("Copy this: aaaaaaaaaaaa"), 10) })
    };
    let zero = Sampling { temperature: 0.0, ..Sampling::default() };
    let plain = ask(zero.clone());
    let distinct = |ids: &[u32]| ids.iter().collect::<std::collections::BTreeSet<_>>().len();
    assert!(distinct(&plain.ids()) < 10, "{:?}", texts(&plain.ids()));
    for temperature in [0.0, 1.0] {
        let base = Sampling { temperature, seed: 1, ..Sampling::default() };
        for sampling in
            [Sampling { presence_penalty: 1e4, ..base.clone() }, Sampling { frequency_penalty: 1e4, ..base.clone() }]
        {
            assert_eq!(distinct(&ask(sampling).ids()), 10);
        }
        let forced = ask(Sampling { logit_bias: vec![(200, 1e4)], ..base.clone() });
        assert_eq!(forced.ids(), [200; 10]);
        // Biases of one token add up; what is reported is the model's own opinion.
        let forced = ask(Sampling { logit_bias: vec![(200, -1e4), (201, 5e3), (200, 2e4)], ..base });
        assert_eq!(forced.ids(), [200; 10]);
        assert_eq!(forced.tokens()[0].top, plain.tokens()[0].top);
        assert!(forced.tokens()[0].logprob.unwrap() < -1.0);
    }
    let banned = plain.ids()[0];
    assert!(!ask(Sampling { logit_bias: vec![(banned, -1e4)], ..zero.clone() }).ids().contains(&banned));
    assert_ne!(ask(Sampling { repetition_penalty: 2.0, ..zero.clone() }).ids(), plain.ids());
    // Penalties concern what was generated: the first token has nothing behind it.
    let penalised = ask(Sampling { presence_penalty: 1e4, repetition_penalty: 2.0, ..zero });
    assert_eq!(penalised.tokens()[0], plain.tokens()[0]);
}

#[test]
fn the_engine_ends_with_its_last_handle_after_its_queue() {
    let (handle, thread) = engine(options());
    let other = handle.clone();
    let (held, gate) = Reader::held();
    handle.submit(greedy(chat("Hello"), 2), held.sink()).unwrap();
    held.wait_until_held();
    let queued = Reader::submitted(&other, greedy(chat("Hello"), 2));
    drop((handle, other));
    gate.open();
    thread.join().unwrap();
    assert_eq!(queued.answer().ids(), held.answer().ids());
}

#[test]
fn an_engine_whose_thread_dies_says_so() {
    let (engine, thread) = engine(options());
    let (held, gate) = Reader::held();
    engine.submit(greedy(chat("Hello"), 2), held.sink()).unwrap();
    held.wait_until_held();
    let bomb = Reader::new(Rule::Panic);
    engine.submit(greedy(chat("Hello"), 2), bomb.sink()).unwrap();
    let queued = Reader::submitted(&engine, greedy(chat("Hello"), 2));
    gate.open();
    assert!(thread.join().is_err());
    // The sink is dropped without a last word; whoever reads it knows by that.
    assert!(queued.is_dropped() && queued.events().is_empty());
    let status = engine.status();
    assert!(!status.healthy && status.failure.is_some(), "{status:?}");
    assert_eq!((status.running, status.waiting), (0, 0));
    let refused = engine.submit(greedy(chat("Hello"), 2), Reader::new(Rule::Take).sink());
    assert!(matches!(refused, Err(SubmitError::Stopped { .. })), "{refused:?}");
}

#[test]
fn damaged_weights_fail_the_request_and_not_the_engine() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/qwen2-w64-r2");
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let place = |i: usize| header["model.norm.weight"]["data_offsets"][i].as_u64().unwrap() as usize;
    for value in bytes[data + place(0)..data + place(1)].chunks_exact_mut(2) {
        value.copy_from_slice(&half::bf16::NAN.to_le_bytes());
    }
    std::fs::write(&path, bytes).unwrap();
    let model = Model::load(demo().device(), folder.path(), Some(64), &mut |_, _| {}).unwrap();
    let (engine, _thread) = spawn(Arc::new(model), options()).unwrap();
    for sampling in [Sampling { temperature: 0.0, ..Sampling::default() }, Sampling::default()] {
        let reader = Reader::submitted(&engine, Request { sampling, ..greedy(vec![1, 2, 3], 4) });
        eventually(|| reader.is_dropped());
        match &reader.events()[..] {
            [Event::Error(EngineError::NoFiniteLogit { position: 3 })] => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(engine.status().healthy);
}

#[test]
fn an_engine_that_could_compute_nothing_does_not_start() {
    assert!(spawn(demo(), host::engine::EngineOptions { chunk_tokens: 0, ..options() }).is_err());
}

#[test]
fn times_of_steps_are_taken_only_where_asked_for_and_change_no_answer() {
    let asked = |time_steps: bool| {
        let (engine, _) = engine(host::engine::EngineOptions { time_steps, ..options() });
        // One step for the prompt, which chooses the first token, and one for each further token.
        let ids = Reader::ask(&engine, greedy(chat("Reverse the word lamp"), 6)).ids();
        eventually(|| engine.status().running == 0);
        (ids, engine.status().steps)
    };
    let ((ids, timed), (same, untimed)) = (asked(true), asked(false));
    assert_eq!(ids, same);
    assert_eq!((timed.steps, untimed.steps), (6, 6));
    assert_eq!((untimed.wall_ns, untimed.device_ns), (0, 0));
    assert!(0 < timed.device_ns && timed.device_ns <= timed.wall_ns, "{timed:?}");
}
