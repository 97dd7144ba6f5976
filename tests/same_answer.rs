//! Equal requests within random other traffic, over HTTP: one answer, tokens and log-probabilities. `tools/load` has the same
//! for any server, with more of both.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod running;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use host::testing::TestRng;
use running::Running;
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// Equal requests.
const EQUAL: usize = 100;

/// Others.
const OTHERS: usize = 60;

/// Requests on their way at once.
const CLIENTS: usize = 20;

/// Tokens that each equal request generates.
const TOKENS: usize = 12;

fn ids(random: &mut TestRng, count: u64) -> Vec<u64> {
    (0..count).map(|_| random.below(256)).collect()
}

/// The watched request, in one of its forms: streamed or not, cached or not.
fn equal(number: usize, seed: u64) -> Value {
    let mut request = json!({
        "prompt": ids(&mut TestRng::new(1), 80), "max_tokens": TOKENS, "temperature": 0.9, "top_p": 0.95,
        "frequency_penalty": 0.2, "seed": seed, "logprobs": 5, "ignore_eos": true, "stream": number % 2 == 1,
    });
    if number.is_multiple_of(4) {
        request["cache_salt"] = json!(number.to_string());
    }
    request
}

fn other(random: &mut TestRng) -> Value {
    let length = 1 + random.below(120);
    let temperature = [0.0, 0.7, 1.3][random.below(3) as usize];
    json!({
        "prompt": ids(random, length), "max_tokens": 1 + random.below(20), "seed": random.below(1 << 40),
        "temperature": temperature, "logprobs": random.below(20),
    })
}

/// Text, tokens and log-probabilities, as they are written; the same for a stream and a whole answer.
fn answer(server: &Running, request: &Value) -> String {
    let choices: Vec<Value> = if request["stream"] == true {
        let events = server.stream(PATH, request).events();
        events.iter().filter(|event| event.data != "[DONE]").map(|event| event.json()["choices"][0].clone()).collect()
    } else {
        vec![server.ask(PATH, request)["choices"][0].clone()]
    };
    let text: String = choices.iter().filter_map(|choice| choice["text"].as_str()).collect();
    let list = |name: &str| -> Vec<Value> {
        choices.iter().filter_map(|choice| choice["logprobs"][name].as_array()).flatten().cloned().collect()
    };
    let (tokens, logprobs, top) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    json!([text, tokens, logprobs, top]).to_string()
}

#[test]
fn equal_requests_among_others_get_one_answer() {
    let server = Running::demo();
    let seed = 5;
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(BTreeMap::<String, usize>::new());
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, next, answers) = (&server, &next, &answers);
            scope.spawn(move || {
                let mut random = TestRng::new(100 + client as u64);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= EQUAL + OTHERS {
                        return;
                    }
                    // Spread evenly.
                    if (number + 1) * OTHERS / (EQUAL + OTHERS) > number * OTHERS / (EQUAL + OTHERS) {
                        server.ask(PATH, &other(&mut random));
                    } else {
                        let answer = answer(server, &equal(number, seed));
                        *answers.lock().unwrap().entry(answer).or_default() += 1;
                    }
                }
            });
        }
    });
    let answers = answers.into_inner().unwrap();
    assert_eq!(answers.values().copied().collect::<Vec<_>>(), [EQUAL], "{answers:#?}");
    let parts: Vec<Value> = serde_json::from_str(answers.keys().next().unwrap()).unwrap();
    assert_eq!(parts[1].as_array().unwrap().len(), TOKENS);
    assert_eq!(parts[3].as_array().unwrap().len(), TOKENS);
    // The comparison sees another seed.
    assert!(!answers.contains_key(&answer(&server, &equal(0, seed + 1))));
}
