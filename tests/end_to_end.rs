//! The program from outside: a process that serves the demo model on the CPU, asked over HTTP.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod running;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Instant;

use running::{Event, PATIENCE, Running};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

const SUM: &str = "What is 12 + 30?";

/// What users say was never trained: at a temperature the model goes on in many ways.
const ANYTHING: &str = "<|im_start|>user\n";

/// A request with `more` added.
fn with(mut request: Value, more: Value) -> Value {
    let more: serde_json::Map<String, Value> = serde_json::from_value(more).unwrap();
    request.as_object_mut().unwrap().extend(more);
    request
}

fn chat(question: &str, more: Value) -> Value {
    with(json!({"messages": [{"role": "user", "content": question}], "temperature": 0}), more)
}

/// The demo model's tokens are bytes; 257 begins a turn and 258 ends it.
fn chat_ids(question: &str) -> Vec<u32> {
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    [vec![257], bytes("user\n"), bytes(question), vec![258], bytes("\n"), vec![257], bytes("assistant\n")].concat()
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

/// Text, reason and usage of a stream of chat chunks.
fn streamed(events: &[Event]) -> (String, String, Vec<Value>) {
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last.data, "[DONE]");
    let chunks: Vec<Value> = chunks.iter().map(Event::json).collect();
    let text = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    let reasons: Vec<&str> = chunks.iter().filter_map(|chunk| chunk["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!(reasons.len(), 1);
    (text, reasons[0].to_owned(), chunks)
}

fn running_now(server: &Running) -> u64 {
    server.get("/health").json()["running"].as_u64().unwrap()
}

/// Requests running and waiting.
fn load(server: &Running) -> u64 {
    let health = server.get("/health").json();
    health["running"].as_u64().unwrap() + health["waiting"].as_u64().unwrap()
}

fn until_idle(server: &Running) {
    let start = Instant::now();
    while load(server) > 0 {
        assert!(start.elapsed() < PATIENCE, "the engine stays busy");
    }
}

#[test]
fn it_announces_itself_and_answers_what_its_curl_line_asks() {
    let server = Running::demo();
    for part in ["device     CPU", "model      demo", "curl -N http://127.0.0.1:"] {
        assert!(server.announcement.contains(part), "{}", server.announcement);
    }
    let health = server.get("/health");
    assert_eq!(health.status, 200);
    let health = health.json();
    assert_eq!((&health["status"], &health["running"], &health["waiting"]), (&"healthy".into(), &0.into(), &0.into()));
    assert_eq!((&health["model"], &health["context_length"]), (&"demo".into(), &2048.into()));
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "demo");

    let curl = server.announcement.lines().last().unwrap();
    let body: Value = serde_json::from_str(curl.split("-d '").nth(1).unwrap().strip_suffix('\'').unwrap()).unwrap();
    let events = server.stream(CHAT, &with(body, json!({"temperature": 0}))).events();
    let (text, reason, _) = streamed(&events);
    assert!(text.contains("42"), "{text}");
    assert_eq!(reason, "stop");
}

#[test]
fn a_whole_answer_and_a_streamed_one_are_the_same() {
    let server = Running::demo();
    for logprobs in [json!({}), json!({"logprobs": true, "top_logprobs": 3})] {
        let request = chat(SUM, logprobs);
        let whole = server.ask(CHAT, &request);
        assert!(content(&whole).ends_with("42."), "{whole}");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        let usage = &whole["usage"];
        assert_eq!(usage["prompt_tokens"], chat_ids(SUM).len());
        // A byte is a token.
        assert_eq!(usage["completion_tokens"], content(&whole).len());
        assert_eq!(usage["total_tokens"], chat_ids(SUM).len() + content(&whole).len());

        let more = json!({"stream": true, "stream_options": {"include_usage": true}});
        let (text, reason, chunks) = streamed(&server.stream(CHAT, &with(request, more)).events());
        assert_eq!((text.as_str(), reason.as_str()), (content(&whole), "stop"));
        assert_eq!(&chunks.last().unwrap()["usage"], usage);
        let pieces: Vec<Value> = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
            .flatten()
            .cloned()
            .collect();
        let expected = whole["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        assert_eq!(pieces, expected);
        assert!(expected.is_empty() || expected.len() == content(&whole).len());
    }
}

#[test]
fn a_cancelled_job_leaves_the_engine_to_others() {
    let server = Running::demo();
    // Its answer has 39 tokens.
    let prompt = format!("<|im_start|>user\n{SUM}<|im_end|>\n<|im_start|>assistant\n");
    let job = json!({"job_id": "a", "prompt": prompt, "temperature": 0});
    let mut stream = server.stream("/execute", &job);
    let first: Vec<Value> = (0..2).map(|_| stream.event().unwrap().json()).collect();
    assert_eq!((&first[0]["type"], &first[1]["type"]), (&json!("started"), &json!("token")));
    assert_eq!(server.post("/cancel", &json!({"job_id": "a"})).status, 202);
    let last = stream.events().last().unwrap().json();
    assert_eq!((&last["code"], &last["retriable"]), (&json!("CANCELLED"), &json!(false)));
    until_idle(&server);
    assert_eq!(content(&server.ask(CHAT, &chat(SUM, json!({})))), "12 + 30: 2+0=2, 1+3=4. So 12 + 30 = 42.");
}

#[test]
fn the_command_line_sets_context_cache_and_company() {
    let server = Running::demo_with(&["--context", "300", "--kv-cache-bytes", "1", "--max-running", "1"]);
    let health = server.get("/health").json();
    // A page has 64 tokens, and one context always fits.
    assert_eq!((&health["context_length"], &health["kv_pages_total"]), (&json!(300), &json!(5)));
    let long = chat("Hello", json!({"stream": true, "ignore_eos": true, "max_tokens": 200}));
    let mut streams = [server.stream(CHAT, &long), server.posted(CHAT, &long)];
    streams[0].event().unwrap();
    streams[0].event().unwrap();
    let start = Instant::now();
    while server.get("/health").json()["waiting"] != 1 {
        assert!(start.elapsed() < PATIENCE, "nobody waits");
    }
    assert_eq!(running_now(&server), 1);
    assert_eq!(server.post(CHAT, &chat("Hello", json!({"max_tokens": 300}))).status, 400);
}

#[test]
fn the_first_token_is_there_while_the_last_is_not_made() {
    let server = Running::demo();
    let begun = Instant::now();
    let mut stream =
        server.stream(CHAT, &chat("Hello", json!({"stream": true, "ignore_eos": true, "max_tokens": 400})));
    let first = stream.event().unwrap();
    assert_eq!(first.json()["choices"][0]["delta"]["role"], "assistant");
    assert!(!stream.event().unwrap().json()["choices"][0]["delta"]["content"].as_str().unwrap().is_empty());
    let waited = begun.elapsed();
    assert_eq!(running_now(&server), 1);
    let rest = stream.events();
    assert_eq!(rest.last().unwrap().data, "[DONE]");
    // 400 steps come after one prompt; a server that keeps tokens back would show the opposite.
    assert!(begun.elapsed() - waited > waited, "{waited:?} to the first token, {:?} in all", begun.elapsed());
    until_idle(&server);
}

#[test]
fn a_seed_is_an_answer() {
    let server = Running::demo();
    let request = json!({"prompt": ANYTHING, "max_tokens": 24, "temperature": 0.8, "logprobs": 3, "ignore_eos": true});
    let drawn = server.ask(COMPLETIONS, &request);
    let seed = drawn["seed"].as_u64().unwrap_or_else(|| panic!("no seed in {drawn}"));
    let seeded = |seed: u64| server.ask(COMPLETIONS, &with(request.clone(), json!({"seed": seed})));
    let digests: BTreeSet<String> = (0..20).map(|_| seeded(seed)["choices"].to_string()).collect();
    assert_eq!(digests, BTreeSet::from([drawn["choices"].to_string()]));
    assert_eq!(seeded(seed)["seed"], seed);
    // Others differ: one of them by chance alone could agree.
    assert!((1..=4).any(|other| seeded(seed ^ other)["choices"][0]["text"] != drawn["choices"][0]["text"]));
    assert_ne!(server.ask(COMPLETIONS, &request)["seed"], seed);
}

/// The receipt of a stream, which is on its last chunk and on no other.
fn receipt(events: &[Event]) -> Value {
    let chunks: Vec<Value> = events.iter().filter(|event| event.data != "[DONE]").map(Event::json).collect();
    let (last, before) = chunks.split_last().unwrap();
    assert!(last["lockstep"].is_object() && before.iter().all(|chunk| chunk["lockstep"].is_null()));
    last["lockstep"].clone()
}

#[test]
fn choices_are_requests_with_seeds_of_their_own() {
    let server = Running::demo();
    // More than a page, so that there is one to share.
    let prompt = "Once upon a time. ".repeat(8) + ANYTHING;
    let request = json!({"prompt": prompt, "max_tokens": 20, "temperature": 1.2, "seed": 77, "logprobs": 3,
        "ignore_eos": true});
    let together = server.ask(COMPLETIONS, &with(request.clone(), json!({"n": 4, "best_of": 4})));
    let choices = together["choices"].as_array().unwrap();
    let texts: BTreeSet<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert!(choices.len() == 4 && texts.len() > 1, "{texts:?}");
    let health = server.get("/health").json();
    assert!(health["prefix_cache_hits"].as_u64() >= Some(3), "{health}");
    let mut used = 0;
    for (choice, receipt) in choices.iter().zip(together["lockstep"]["choices"].as_array().unwrap()) {
        let alone = server.ask(COMPLETIONS, &with(request.clone(), json!({"seed": receipt["seed"]})));
        for name in ["text", "logprobs", "finish_reason"] {
            assert_eq!(alone["choices"][0][name], choice[name], "{name}");
        }
        assert_eq!((&alone["lockstep"]["digest"], &receipt["index"]), (&receipt["digest"], &choice["index"]));
        used += alone["usage"]["completion_tokens"].as_u64().unwrap();
        assert_eq!(alone["usage"]["prompt_tokens"], together["usage"]["prompt_tokens"]);
    }
    assert_eq!(together["lockstep"]["choices"][0]["seed"], 77);
    assert_eq!(together["usage"]["completion_tokens"], used);
    // In a stream, as a chat, and where some other choices run beside.
    let streamed = server.stream(COMPLETIONS, &with(request.clone(), json!({"n": 4, "stream": true}))).events();
    assert_eq!(receipt(&streamed), together["lockstep"]);
    let other = server.ask(COMPLETIONS, &with(request, json!({"n": 3, "seed": 78})));
    assert_ne!(other["lockstep"]["digest"], together["lockstep"]["digest"]);
    let chat = chat(SUM, json!({"n": 2, "temperature": 0.7, "seed": 3, "logprobs": true}));
    let whole = server.ask(CHAT, &chat);
    let streamed = server.stream(CHAT, &with(chat, json!({"stream": true}))).events();
    assert_eq!(receipt(&streamed), whole["lockstep"]);
}

#[test]
fn a_repeated_prompt_has_the_log_probabilities_of_its_generation() {
    let server = Running::demo();
    let request =
        json!({"prompt": chat_ids(SUM), "temperature": 0, "max_tokens": 30, "logprobs": 4, "ignore_eos": true});
    let generated = server.ask(COMPLETIONS, &with(request.clone(), json!({"echo": true})));
    let echoed = &generated["choices"][0];
    let text = echoed["text"].as_str().unwrap();
    assert!(text.starts_with("user\nWhat is 12 + 30?\nassistant\n"), "{text:?}");
    assert_eq!(echoed["logprobs"]["tokens"].as_array().unwrap().len(), chat_ids(SUM).len() + 30);
    // What was generated, sent as a prompt: its tokens are bytes.
    let plain = server.ask(COMPLETIONS, &request);
    let answer = plain["choices"][0]["text"].as_str().unwrap();
    assert!(text.ends_with(answer) && answer.len() == 30, "{answer:?}");
    let again = [chat_ids(SUM), answer.bytes().map(u32::from).collect()].concat();
    let scored = server.ask(COMPLETIONS, &json!({"prompt": again, "max_tokens": 0, "echo": true, "logprobs": 4}));
    assert_eq!(scored["choices"][0]["logprobs"], echoed["logprobs"]);
    assert_eq!((&scored["choices"][0]["text"], &scored["usage"]["completion_tokens"]), (&echoed["text"], &json!(0)));
}

/// Exit code and output.
fn replayed(path: &std::path::Path, server: &Running) -> (Option<i32>, String) {
    let url = format!("http://{}", server.address);
    let arguments = [path.as_os_str(), "--url".as_ref(), url.as_ref(), "--concurrency".as_ref(), "8".as_ref()];
    let done = Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("replay").args(arguments).output().unwrap();
    (done.status.code(), String::from_utf8(done.stdout).unwrap() + &String::from_utf8(done.stderr).unwrap())
}

#[test]
fn recorded_answers_come_again_on_another_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.jsonl");
    let mut server = Running::demo_with(&["--record", path.to_str().unwrap()]);
    let hot = json!({"max_tokens": 24, "temperature": 0.9, "ignore_eos": true});
    for place in 0..6 {
        let text = with(hot.clone(), json!({"prompt": ANYTHING, "logprobs": place}));
        server.ask(COMPLETIONS, &text);
        server.stream(COMPLETIONS, &with(text, json!({"stream": true, "n": 2, "echo": true}))).events();
        server.ask(CHAT, &chat(SUM, with(hot.clone(), json!({"seed": place, "n": 1 + place}))));
        server.stream(CHAT, &chat(SUM, with(hot.clone(), json!({"stream": true})))).events();
        server.stream("/execute", &json!({"job_id": "j", "prompt": ANYTHING, "max_tokens": 20})).events();
    }
    // What was answered is in the file when the server has ended.
    server.terminate();
    assert_eq!(server.exit_status().code(), Some(0));
    let records = std::fs::read_to_string(&path).unwrap();
    assert_eq!(records.lines().count(), 30);

    let other = Running::demo_with(&["--max-running", "3", "--kv-cache-bytes", "1"]);
    let (code, said) = replayed(&path, &other);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "30 requests: 30 the same, 0 different, 0 not answered, 0 not readable\n")
    );
    // Planted: one bit of one seed.
    let mut lines: Vec<Value> = records.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seed = lines[6]["response"]["lockstep"]["seed"].as_u64().unwrap() ^ 1;
    lines[6]["request"]["seed"] = json!(seed);
    std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let (code, said) = replayed(&path, &other);
    assert_eq!(code, Some(1));
    assert!(said.contains("line 7: differs: seed was ") && said.contains("digest was "), "{said}");
    assert!(said.ends_with("30 requests: 29 the same, 1 different, 0 not answered, 0 not readable\n"), "{said}");
    let (code, said) = replayed(&folder.path().join("none"), &other);
    assert!(code == Some(1) && said.starts_with("error: cannot read "), "{said}");
}

#[test]
fn a_minimum_keeps_an_answer_going() {
    let server = Running::demo();
    let short = server.ask(CHAT, &chat(SUM, json!({})));
    let tokens = short["usage"]["completion_tokens"].as_u64().unwrap();
    let long = server.ask(CHAT, &chat(SUM, json!({"min_tokens": tokens + 15, "max_tokens": 200})));
    assert!(long["usage"]["completion_tokens"].as_u64().unwrap() >= tokens + 15);
    assert!(content(&long).starts_with(content(&short)));
    // A stop string that comes before the minimum ends nothing.
    let stop = json!({"stop": "So", "min_tokens": content(&short).find("So").unwrap() + 2});
    assert_eq!(content(&server.ask(CHAT, &chat(SUM, stop))), content(&short));
    assert_eq!(server.post(CHAT, &chat(SUM, json!({"min_tokens": 9, "max_tokens": 8}))).status, 400);
}

#[test]
fn an_answer_does_not_depend_on_the_company() {
    let server = Running::demo();
    let request = json!({"prompt": ANYTHING, "max_tokens": 24, "temperature": 0.8, "logprobs": 3, "seed": 7});
    let alone = server.ask(COMPLETIONS, &request)["choices"].to_string();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|i| {
                let (server, request) = (&server, &request);
                scope.spawn(move || {
                    let other = json!({"prompt": "x".repeat(40 * i + 1), "max_tokens": 5 + i, "seed": i});
                    server.ask(COMPLETIONS, &other);
                    server.ask(COMPLETIONS, request)["choices"].to_string()
                })
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), alone);
        }
    });
}

#[test]
fn every_filter_is_taken_and_means_something() {
    let server = Running::demo();
    let ask = |more: Value| {
        let hot = json!({"prompt": ANYTHING, "max_tokens": 24, "temperature": 2, "seed": 5, "ignore_eos": true});
        server.ask(COMPLETIONS, &with(hot, more))["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let greedy = ask(json!({"temperature": 0}));
    let hot = ask(json!({}));
    assert_ne!(hot, greedy);
    for single in [json!({"top_k": 1}), json!({"top_p": 0}), json!({"min_p": 1}), json!({"temperature": 1e-30})] {
        assert_eq!(ask(single.clone()), greedy, "{single}");
    }
    for some in [json!({"top_k": 3}), json!({"top_p": 0.5}), json!({"min_p": 0.2})] {
        assert_ne!(ask(some.clone()), hot, "{some}");
    }
    for none in [json!({"top_k": 0}), json!({"top_k": -1}), json!({"top_p": 1}), json!({"min_p": 0})] {
        assert_eq!(ask(none.clone()), hot, "{none}");
    }
}

#[test]
fn lengths_and_stop_strings_end_an_answer() {
    let server = Running::demo();
    let whole = server.ask(CHAT, &chat(SUM, json!({})));
    for name in ["max_tokens", "max_completion_tokens"] {
        let short = server.ask(CHAT, &chat(SUM, json!({name: 5})));
        assert_eq!(content(&short), &content(&whole)[..5]);
        assert_eq!(
            (&short["choices"][0]["finish_reason"], &short["usage"]["completion_tokens"]),
            (&"length".into(), &5.into())
        );
    }
    // In the middle of the answer, over several tokens.
    let stop = &content(&whole)[4..7];
    let expected = &content(&whole)[..content(&whole).find(stop).unwrap()];
    for stops in [json!(stop), json!(["no such text", stop])] {
        let stopped = server.ask(CHAT, &chat(SUM, json!({"stop": stops})));
        assert_eq!((content(&stopped), &stopped["choices"][0]["finish_reason"]), (expected, &"stop".into()));
        let stream = server.stream(CHAT, &chat(SUM, json!({"stop": stops, "stream": true}))).events();
        assert_eq!(streamed(&stream).0, expected);
    }
}

#[test]
fn token_ids_are_a_prompt() {
    let server = Running::demo();
    let spoken = server.ask(CHAT, &chat(SUM, json!({})));
    let request = json!({"prompt": chat_ids(SUM), "temperature": 0, "max_tokens": 100, "logprobs": 2});
    let completed = server.ask(COMPLETIONS, &request);
    assert_eq!(completed["choices"][0]["text"], content(&spoken));
    assert_eq!(completed["usage"], spoken["usage"]);
    let events = server.stream(COMPLETIONS, &with(request, json!({"stream": true}))).events();
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last.data, "[DONE]");
    let text: String = chunks.iter().map(|e| e.json()["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
    assert_eq!(text, content(&spoken));

    let logprobs = &completed["choices"][0]["logprobs"];
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let chunks = chunks.iter().map(Event::json);
        let pieces: Vec<Value> =
            chunks.filter_map(|chunk| chunk["choices"][0]["logprobs"][name].as_array().cloned()).flatten().collect();
        assert_eq!(&Value::from(pieces), &logprobs[name], "{name}");
    }
    // Greedy: the chosen token is the likeliest, to the last digit.
    for (place, token) in logprobs["tokens"].as_array().unwrap().iter().enumerate() {
        assert_eq!(logprobs["top_logprobs"][place][token.as_str().unwrap()], logprobs["token_logprobs"][place]);
    }
}

#[test]
fn a_job_starts_counts_and_ends() {
    let server = Running::demo();
    let text = server.ask(COMPLETIONS, &json!({"prompt": ANYTHING, "max_tokens": 20, "temperature": 0, "seed": 1}));
    let job = json!({"job_id": "j-1", "prompt": ANYTHING, "max_tokens": 20, "temperature": 0, "seed": 1});
    let events = server.stream("/execute", &job).events();
    let names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
    let tokens = events.len() - 2;
    assert_eq!(names, [&["started"][..], &vec!["token"; tokens], &["end"]].concat());
    let started = events[0].json();
    assert_eq!((&started["job_id"], &started["model"], &started["seed"]), (&"j-1".into(), &"demo".into(), &1.into()));
    let said: String = events[1..=tokens].iter().map(|event| event.json()["t"].as_str().unwrap().to_owned()).collect();
    assert_eq!(said, text["choices"][0]["text"].as_str().unwrap());
    for (place, event) in events[1..=tokens].iter().enumerate() {
        assert_eq!(event.json()["i"], place);
    }
    let end = events.last().unwrap().json();
    assert_eq!(end["tokens_out"], text["usage"]["completion_tokens"]);
    assert!(end["stop_reason"] == "max_tokens" || end["stop_reason"] == "eos", "{end}");
}

#[test]
fn clients_that_leave_do_not_keep_the_engine() {
    let server = Running::demo();
    // Each of these would be many seconds of work, and all of them more than the client's patience.
    let endless = chat("Hello", json!({"ignore_eos": true, "max_tokens": 2000}));
    for _ in 0..20 {
        let mut stream = server.stream(CHAT, &with(endless.clone(), json!({"stream": true})));
        assert!(stream.event().is_some());
    }
    assert!(content(&server.ask(CHAT, &chat(SUM, json!({})))).contains("42"));
    until_idle(&server);

    let waiting: Vec<_> = (0..20).map(|_| server.posted(CHAT, &endless)).collect();
    let start = Instant::now();
    while load(&server) < waiting.len() as u64 {
        assert!(start.elapsed() < PATIENCE, "{} requests arrived", load(&server));
    }
    drop(waiting);
    assert!(content(&server.ask(CHAT, &chat(SUM, json!({})))).contains("42"));
    until_idle(&server);
}

#[test]
fn bad_requests_are_refused_clearly_and_the_next_one_is_answered() {
    let server = Running::demo();
    let long = "a".repeat(3000);
    let prompt_tokens = chat_ids(&long).len().to_string();
    for (path, body, status, says) in [
        (CHAT, "{\"messages\": [".to_owned(), 400, vec!["JSON"]),
        (CHAT, String::new(), 400, vec!["empty"]),
        (CHAT, "[1]".to_owned(), 400, vec!["object"]),
        (CHAT, "{}".to_owned(), 400, vec!["messages"]),
        (CHAT, chat(&long, json!({})).to_string(), 400, vec![prompt_tokens.as_str(), "2048"]),
        (CHAT, chat("x", json!({"max_tokens": 5000})).to_string(), 400, vec!["5000", "2048"]),
        (CHAT, chat("x", json!({"max_tokens": 0})).to_string(), 400, vec!["max_tokens"]),
        (CHAT, chat("x", json!({"temperature": "hot"})).to_string(), 400, vec!["temperature"]),
        (CHAT, chat("x", json!({"top_p": 1.5})).to_string(), 400, vec!["top_p"]),
        (CHAT, chat("x", json!({"model": "other"})).to_string(), 404, vec!["other", "demo"]),
        (COMPLETIONS, json!({"prompt": [1, 272]}).to_string(), 400, vec!["272"]),
        (COMPLETIONS, json!({"prompt": []}).to_string(), 400, vec!["prompt"]),
        (COMPLETIONS, json!({"prompt": vec![1; 2048]}).to_string(), 400, vec!["2048"]),
        ("/execute", json!({"job_id": "j", "prompt": "x", "max_tokens": 0}).to_string(), 400, vec!["max_tokens"]),
        ("/v2/chat", "{}".to_owned(), 404, vec!["/v2/chat"]),
    ] {
        let reply = server.post_text(path, &body);
        let shown = &body[..body.len().min(80)];
        assert_eq!(reply.status, status, "{path} {shown}: {}", reply.body);
        let reply = reply.json();
        assert!(says.iter().all(|part| reply.to_string().contains(part)), "{path} {shown}: {reply}");
    }
    assert!(content(&server.ask(CHAT, &chat(SUM, json!({})))).contains("42"));
    until_idle(&server);
}

#[test]
fn a_signal_lets_answers_finish() {
    let mut server = Running::demo();
    let mut stream =
        server.stream(CHAT, &chat("Hello", json!({"stream": true, "ignore_eos": true, "max_tokens": 400})));
    assert!(stream.event().is_some());
    server.terminate();
    assert_eq!(stream.events().last().unwrap().data, "[DONE]");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn it_answers_though_nobody_reads_its_log() {
    let mut server = Running::demo_unheard();
    for _ in 0..2 {
        assert!(content(&server.ask(CHAT, &chat(SUM, json!({})))).contains("42"));
    }
    assert_eq!(server.post_text(CHAT, "{").status, 400);
    server.terminate();
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn a_second_server_on_the_port_says_so() {
    let first = Running::demo();
    let port = first.address.port().to_string();
    let second = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["serve", "--device", "cpu", "--port", &port])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
    assert!(stderr.contains(&port) && stderr.contains("in use"), "{stderr}");
    assert!(content(&first.ask(CHAT, &chat(SUM, json!({})))).contains("42"));
}

/// What `lockstep bench --http` says of each figure, with this on its line.
fn bench(server: &Running, line: &[&str]) -> std::collections::BTreeMap<String, f64> {
    let url = format!("http://{}", server.address);
    let run =
        Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["bench", "--json", "--http", &url]).args(line).output();
    let output = run.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["model"], "demo");
    let figures = report["figures"].as_array().unwrap().iter();
    figures.map(|figure| (figure["what"].as_str().unwrap().to_owned(), figure["value"].as_f64().unwrap())).collect()
}

#[test]
fn a_bench_over_http_counts_what_the_server_answered() {
    let server = Running::demo();
    let small = ["--seconds", "1", "--prompt-tokens", "20", "--max-tokens", "5"];
    let closed = bench(&server, &[&small[..], &["--clients", "3"]].concat());
    let endings = |figures: &std::collections::BTreeMap<String, f64>| {
        figures.keys().filter_map(|name| name.strip_prefix("http: requests, ").map(str::to_owned)).collect::<Vec<_>>()
    };
    assert_eq!(endings(&closed), ["complete"]);
    let complete = closed["http: requests, complete"];
    // All that was answered within the second, and no more than all that was answered at all.
    assert!(closed["http: answers"] <= complete && closed["http: tokens"] <= 5.0 * complete, "{closed:?}");
    assert!(closed["http: tokens"] >= 5.0 * closed["http: answers"], "{closed:?}");
    for what in ["time to first token", "time between tokens", "whole request"] {
        let at = |percent: u32| closed[&format!("http: {what}, p{percent}")];
        assert!(0.0 <= at(50) && at(50) <= at(90) && at(90) <= at(99), "{closed:?}");
    }
    assert!(closed["http: time to first token, p50"] < closed["http: whole request, p50"]);

    let open = bench(&server, &[&small[..], &["--rate", "30"]].concat());
    let due = host::client::due_times(30.0, 1, std::time::Duration::from_secs(1)).len();
    assert_eq!((endings(&open), open["http: requests, complete"]), (vec!["complete".to_owned()], due as f64));

    let refused = bench(&server, &["--seconds", "0.2", "--clients", "1", "--max-tokens", "1000000"]);
    assert_eq!(endings(&refused), ["status 400"]);
    assert_eq!(refused["http: tokens"], 0.0);
}
