//! The HTTP interface over real sockets: bytes of answers, validation, refusals, headers.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod server_support;

use host::engine::{PageCounts, Status, SubmitError};
use host::server::{Limits, ServerError, bind};
use serde_json::{Value, json};
use server_support::{EOS, Fixture, Reply, digest, say};

/// The id and the time of creation, which differ from answer to answer.
fn id_and_created(reply: &Reply) -> (String, u64) {
    let first = reply.chunks.first().unwrap().strip_prefix("data: ").unwrap();
    let value: Value = serde_json::from_str(first).unwrap();
    (value["id"].as_str().unwrap().to_owned(), value["created"].as_u64().unwrap())
}

#[test]
fn chat_stream_bytes() {
    let server = Fixture::new(say(b"Hi!"));
    let body = r#"{"model": "org/demo", "messages": [{"role": "user", "content": "hello"}], "stream": true, "seed": 7,
        "stream_options": {"include_usage": true}, "unknown": 1, "temperature": null}"#;
    let reply = server.post("/v1/chat/completions", body);
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["content-type"], "text/event-stream");
    assert_eq!(reply.headers["cache-control"], "no-store");
    let (id, created) = id_and_created(&reply);
    assert!(id.starts_with("chatcmpl-"));
    let head = format!(
        "data: {{\"id\":\"{id}\",\"object\":\"chat.completion.chunk\",\"created\":{created},\"model\":\"org/demo\",\
         \"system_fingerprint\":\"fp_test\",\"seed\":7,\"choices\":["
    );
    let choice = |delta: &str, reason: &str| {
        format!(
            "{head}{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":{reason}}}],\"usage\":null}}\n\n"
        )
    };
    let want = [
        choice(r#"{"role":"assistant","content":""}"#, "null"),
        choice(r#"{"content":"H"}"#, "null"),
        choice(r#"{"content":"i"}"#, "null"),
        choice(r#"{"content":"!"}"#, "null"),
        choice("{}", "\"stop\""),
        // "[user] hello\n[assistant] " is 25 bytes, so 25 tokens.
        format!(
            "{head}],\"usage\":{{\"prompt_tokens\":25,\"completion_tokens\":3,\"total_tokens\":28}},\
             \"lockstep\":{{\"seed\":7,\"digest\":\"{}\"}}}}\n\n",
            digest(0, &[72, 105, 33])
        ),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(reply.body, want.concat());
    let prompt = &server.engine.requests.lock().unwrap()[0].prompt;
    assert_eq!(prompt.iter().map(|&id| id as u8).collect::<Vec<u8>>(), b"[user] hello\n[assistant] ");
}

#[test]
fn completion_stream_bytes() {
    let server = Fixture::new(say("né".as_bytes()));
    let body = r#"{"prompt": [104, 105], "stream": true, "seed": -1, "max_tokens": 3}"#;
    let reply = server.post("/v1/completions", body);
    let (id, created) = id_and_created(&reply);
    let chunk = |text: &str, reason: &str| {
        format!(
            "data: {{\"id\":\"{id}\",\"object\":\"text_completion\",\"created\":{created},\"model\":\"org/demo\",\
             \"system_fingerprint\":\"fp_test\",\"seed\":-1,\"choices\":[{{\"index\":0,\"text\":\"{text}\",\
             \"logprobs\":null,\"finish_reason\":{reason}}}]}}\n\n"
        )
    };
    let receipt = format!("}}],\"lockstep\":{{\"seed\":-1,\"digest\":\"{}\"}}}}\n\n", digest(0, &[110, 0xc3, 0xa9]));
    let last = chunk("", "\"stop\"").replace("}]}\n\n", &receipt);
    let want = [chunk("n", "null"), chunk("é", "null"), last, "data: [DONE]\n\n".to_owned()];
    assert_eq!(reply.body, want.concat());
    let request = &server.engine.requests.lock().unwrap()[0];
    assert_eq!((request.sampling.seed, request.prompt.as_slice()), (u64::MAX, [104, 105].as_slice()));
}

#[test]
fn execute_stream_bytes() {
    let server = Fixture::new(say("a\"日\n".as_bytes()));
    let body = r#"{"job_id": "j1", "prompt": "x", "max_tokens": 9, "seed": 18446744073709551615}"#;
    let reply = server.post("/execute", body);
    assert_eq!((reply.status, reply.headers["content-type"].as_str()), (200, "text/event-stream"));
    let field = |name: &str| reply.body.split(name).nth(1).unwrap().split(['"', ',', '}']).next().unwrap();
    let (time, milliseconds) = (field("\"started_at\":\""), field("\"decode_time_ms\":"));
    assert!(time.len() == 24 && time.ends_with('Z') && milliseconds.parse::<u64>().is_ok(), "{time} {milliseconds}");
    let want = format!(
        "event: started\ndata: {{\"type\":\"started\",\"job_id\":\"j1\",\"model\":\"org/demo\",\"started_at\":\"{time}\",\
         \"seed\":18446744073709551615}}\n\n\
         event: token\ndata: {{\"type\":\"token\",\"t\":\"a\",\"i\":0}}\n\n\
         event: token\ndata: {{\"type\":\"token\",\"t\":\"\\\"\",\"i\":1}}\n\n\
         event: token\ndata: {{\"type\":\"token\",\"t\":\"日\",\"i\":2}}\n\n\
         event: token\ndata: {{\"type\":\"token\",\"t\":\"\\n\",\"i\":3}}\n\n\
         event: end\ndata: {{\"type\":\"end\",\"tokens_out\":6,\"decode_time_ms\":{milliseconds},\"stop_reason\":\"eos\",\
         \"system_fingerprint\":\"fp_test\",\"lockstep\":{{\"seed\":18446744073709551615,\"digest\":\"{}\"}}}}\n\n",
        digest(0, &[97, 34, 0xe6, 0x97, 0xa5, 10])
    );
    assert_eq!(reply.body, want);
}

#[test]
fn execute_says_why_it_ended() {
    let server = Fixture::new(say("ab<end>c\u{e9}".as_bytes()));
    let last = |extra: &str| -> Value {
        let reply = server.post("/execute", &format!("{{\"job_id\": \"j\", \"prompt\": \"x\", {extra}}}"));
        let events = server_support::events(&reply.body);
        let terminal = events.iter().filter(|(name, _)| name == "end" || name == "error").count();
        assert_eq!(terminal, 1, "{}", reply.body);
        let (name, data) = events.last().unwrap();
        assert_eq!(name, "end");
        serde_json::from_str(data).unwrap()
    };
    let ended = last(r#""max_tokens": 2"#);
    assert_eq!((&ended["stop_reason"], &ended["tokens_out"]), (&json!("max_tokens"), &json!(2)));
    assert!(ended.get("stop_sequence_matched").is_none());
    let ended = last(r#""max_tokens": 20, "stop": ["<x>", "<end>"]"#);
    assert_eq!((&ended["stop_reason"], &ended["stop_sequence_matched"]), (&json!("stop_sequence"), &json!("<end>")));
    assert_eq!(last(r#""max_tokens": 20"#)["stop_reason"], "eos");
    // An unfinished character at the end is dropped here, and replaced in the OpenAI API.
    let reply = server.post("/execute", r#"{"job_id": "j", "prompt": "x", "max_tokens": 9}"#);
    assert!(!reply.body.contains('\u{fffd}') && reply.body.contains("\"tokens_out\":9"), "{}", reply.body);
    let reply = server.post("/v1/completions", r#"{"prompt": "x", "max_tokens": 9}"#);
    assert_eq!(reply.json()["choices"][0]["text"], "ab<end>c\u{fffd}");
    assert_eq!(reply.json()["choices"][0]["finish_reason"], "length");
}

#[test]
fn whole_answers() {
    let server = Fixture::new(say(b"ok"));
    let body = r#"{"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null}], "seed": 5, "logprobs": true, "top_logprobs": 2}"#;
    let reply = server.post("/v1/chat/completions", body);
    assert_eq!((reply.status, reply.headers["content-type"].as_str()), (200, "application/json"));
    let mut got = reply.json();
    assert!(got["id"].as_str().unwrap().starts_with("chatcmpl-") && got["created"].as_u64().unwrap() > 1_700_000_000);
    let object = got.as_object_mut().unwrap();
    object.remove("id");
    object.remove("created");
    let never = json!({"token": "<|end|>", "logprob": -9.5, "bytes": b"<|end|>".to_vec()});
    let entry = |token: &str, logprob: f32| {
        let own = json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
        json!({"token": token, "logprob": logprob, "bytes": token.as_bytes(), "top_logprobs": [own, never]})
    };
    let want = json!({
        "object": "chat.completion", "model": "org/demo", "system_fingerprint": "fp_test", "seed": 5,
        "choices": [{
            "index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": "ok", "refusal": null},
            "logprobs": {"content": [entry("o", -111.0 / 256.0), entry("k", -107.0 / 256.0)], "refusal": null},
        }],
        "usage": {"prompt_tokens": 37, "completion_tokens": 2, "total_tokens": 39},
        "lockstep": {"seed": 5, "digest": digest(1, &[111, (-111.0_f32 / 256.0).to_bits(), 107, (-107.0_f32 / 256.0).to_bits()])},
    });
    assert_eq!(got, want);
    let prompt: Vec<u8> = server.engine.requests.lock().unwrap()[0].prompt.iter().map(|&id| id as u8).collect();
    assert_eq!(prompt, b"[system] ab\n[assistant] \n[assistant] ");

    let reply = server.post("/v1/completions", r#"{"prompt": ["a", [98, 99]], "logprobs": 2, "seed": 1}"#).json();
    assert_eq!(reply["usage"], json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}));
    for (index, choice) in reply["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!("ok")));
        let lp = &choice["logprobs"];
        assert_eq!((&lp["tokens"], &lp["text_offset"]), (&json!(["o", "k"]), &json!([0, 1])));
        assert_eq!(lp["top_logprobs"][0], json!({"o": -111.0 / 256.0, "<|end|>": -9.5}));
    }
    // No seed: one is drawn and told.
    let seeds: Vec<u64> =
        (0..2).map(|_| server.post("/v1/completions", r#"{"prompt": "a"}"#).json()["seed"].as_u64().unwrap()).collect();
    assert_ne!(seeds[0], seeds[1]);
    assert_eq!(server.engine.requests.lock().unwrap().last().unwrap().sampling.seed, seeds[1]);
}

#[test]
fn tokens_from_the_cache_are_counted_and_the_salt_reaches_the_engine() {
    let server = Fixture::new(say(b"abc"));
    let details = |body: &str| {
        let reply = server.post("/v1/completions", body).json();
        reply["usage"]["prompt_tokens_details"].clone()
    };
    assert_eq!(details(r#"{"prompt": "hello"}"#), Value::Null);
    assert_eq!(details(r#"{"prompt": "hello", "cache_salt": "me"}"#), json!({"cached_tokens": 2}));
    assert_eq!(details(r#"{"prompt": ["a", "b"], "cache_salt": "me"}"#), json!({"cached_tokens": 4}));
    assert_eq!(server.engine.requests.lock().unwrap()[1].cache_salt.as_deref(), Some("me"));
    let chat = r#"{"messages": [{"role": "user", "content": "hi"}], "cache_salt": "me", "stream": true,
        "stream_options": {"include_usage": true}}"#;
    let reply = server.post("/v1/chat/completions", chat);
    assert_eq!(reply.body.matches("\"prompt_tokens_details\":{\"cached_tokens\":2}").count(), 1, "{}", reply.body);
    let refused = server.post("/v1/completions", r#"{"prompt": "hello", "cache_salt": 7}"#);
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("cache_salt")));
}

#[test]
fn several_prompts_stream_with_their_index() {
    let server = Fixture::new(say(b"abc"));
    let body = r#"{"prompt": ["x", "y"], "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}}"#;
    let reply = server.post("/v1/completions", body);
    let mut texts = [String::new(), String::new()];
    let mut ends = [0, 0];
    let events = server_support::events(&reply.body);
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done.1, "[DONE]");
    let (usage, chunks) = chunks.split_last().unwrap();
    let usage: Value = serde_json::from_str(&usage.1).unwrap();
    assert_eq!(usage["usage"], json!({"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}));
    for (_, data) in chunks {
        let chunk: Value = serde_json::from_str(data).unwrap();
        assert!(chunk["usage"]["completion_tokens"].as_u64().unwrap() > 0);
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["text"].as_str().unwrap();
        ends[index] += usize::from(choice["finish_reason"] == "stop");
    }
    assert_eq!((texts, ends), (["abc".to_owned(), "abc".to_owned()], [1, 1]));
}

#[test]
fn parameters_reach_the_engine() {
    let server = Fixture::new(say(b""));
    let body = r#"{"prompt": "abc", "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "max_tokens": 11,
        "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5, "logit_bias": {"9": -100, "3": 1.5},
        "seed": 18446744073709551615, "stop_token_ids": [7, 256], "logprobs": 20, "min_tokens": 5}"#;
    assert_eq!(server.post("/v1/completions", body).json()["seed"], json!(u64::MAX));
    let request = server.engine.requests.lock().unwrap()[0].clone();
    let s = &request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.5, 0.25, 3, 0.125));
    assert_eq!((s.presence_penalty, s.frequency_penalty, s.repetition_penalty), (-2.0, 2.0, 1.5));
    assert_eq!((s.logit_bias.as_slice(), s.seed), ([(3, 1.5), (9, -100.0)].as_slice(), u64::MAX));
    assert_eq!((request.max_tokens, request.logprobs, request.stop_tokens), (11, Some(20), vec![7, EOS]));

    let ask = |body: &str| {
        assert_eq!(server.post("/v1/completions", body).status, 200, "{body}");
        server.engine.requests.lock().unwrap().last().unwrap().clone()
    };
    let plain = ask(r#"{"prompt": "abc", "top_k": -1}"#);
    assert_eq!((plain.max_tokens, plain.sampling.top_k, plain.stop_tokens), (4096, 0, vec![EOS]));
    assert_eq!((plain.sampling.temperature, plain.logprobs), (1.0, None));
    assert_eq!((request.min_tokens, plain.min_tokens, plain.prompt_logprobs), (5, 0, None));
    assert_eq!(ask(r#"{"prompt": "abc", "ignore_eos": true}"#).stop_tokens, Vec::<u32>::new());
    assert_eq!(ask(r#"{"prompt": "a", "max_completion_tokens": 5, "max_tokens": 6}"#).max_tokens, 5);
    // The longest prompt leaves room for one token; and what fits is the default near the end of the context.
    let long = |n: usize| format!("{{\"prompt\": \"{}\"}}", "a".repeat(n));
    assert_eq!(ask(&long(39_999)).max_tokens, 1);
    let refused = server.post("/v1/completions", &long(40_000));
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    let exact = r#"{"prompt": "ab", "max_tokens": 39998}"#;
    assert_eq!(ask(exact).max_tokens, 39_998);
    assert_eq!(server.post("/v1/completions", &exact.replace("39998", "39999")).status, 400);
}

#[test]
fn openai_validation() {
    let server = Fixture::new(say(b"x"));
    let long_stop = format!("{{\"stop\": [{}]}}", vec!["\"a\""; 17].join(", "));
    let cases = [
        ("temperature", r#"{"temperature": -0.1}"#),
        ("temperature", r#"{"temperature": 2.1}"#),
        ("temperature", r#"{"temperature": "1"}"#),
        ("top_p", r#"{"top_p": 1.01}"#),
        ("top_k", r#"{"top_k": -2}"#),
        ("top_k", r#"{"top_k": 1.5}"#),
        ("min_p", r#"{"min_p": -1}"#),
        ("max_tokens", r#"{"max_tokens": 0}"#),
        ("max_completion_tokens", r#"{"max_completion_tokens": 4294967296}"#),
        ("presence_penalty", r#"{"presence_penalty": 2.5}"#),
        ("frequency_penalty", r#"{"frequency_penalty": -2.5}"#),
        ("repetition_penalty", r#"{"repetition_penalty": 0}"#),
        ("repetition_penalty", r#"{"repetition_penalty": 2.01}"#),
        ("n", r#"{"n": 0}"#),
        ("n", r#"{"n": 129}"#),
        ("n", r#"{"n": 1.5}"#),
        ("best_of", r#"{"best_of": 3}"#),
        ("best_of", r#"{"n": 3, "best_of": 2}"#),
        ("echo", r#"{"echo": 1}"#),
        ("min_tokens", r#"{"min_tokens": -1}"#),
        ("min_tokens", r#"{"min_tokens": "1"}"#),
        ("seed", r#"{"seed": 1.5}"#),
        ("seed", r#"{"seed": 18446744073709551616}"#),
        ("stop", r#"{"stop": 5}"#),
        ("stop", r#"{"stop": ["a", ""]}"#),
        ("stop", long_stop.as_str()),
        ("stop_token_ids", r#"{"stop_token_ids": [258]}"#),
        ("logit_bias", r#"{"logit_bias": {"258": 1}}"#),
        ("logit_bias", r#"{"logit_bias": {"1": 101}}"#),
        ("stream", r#"{"stream": "yes"}"#),
        ("stream_options", r#"{"stream_options": []}"#),
        ("tools", r#"{"tools": [{}]}"#),
        ("response_format", r#"{"response_format": {"type": "json_object"}}"#),
    ];
    let mut rows: Vec<(&str, &str, Value)> = Vec::new();
    for (param, extra) in cases {
        let mut chat = json!({"messages": [{"role": "user", "content": "secret"}]});
        let mut completion = json!({"prompt": "secret"});
        for (key, value) in serde_json::from_str::<Value>(extra).unwrap().as_object().unwrap() {
            chat[key] = value.clone();
            completion[key] = value.clone();
        }
        rows.push((param, "/v1/chat/completions", chat));
        rows.push((param, "/v1/completions", completion));
    }
    let chat = |messages: Value| ("messages", "/v1/chat/completions", json!({"messages": messages}));
    rows.extend([
        ("messages", "/v1/chat/completions", json!({})),
        chat(json!([])),
        chat(json!("secret")),
        chat(json!([{"role": "robot", "content": "secret"}])),
        chat(json!([{"role": "user"}])),
        chat(json!([{"role": "user", "content": 5}])),
        chat(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "secret"}}]}])),
        ("prompt", "/v1/completions", json!({})),
        ("prompt", "/v1/completions", json!({"prompt": ""})),
        ("prompt", "/v1/completions", json!({"prompt": []})),
        ("prompt", "/v1/completions", json!({"prompt": [[]]})),
        ("prompt", "/v1/completions", json!({"prompt": [258]})),
        ("prompt", "/v1/completions", json!({"prompt": [1, "secret"]})),
        ("prompt", "/v1/completions", json!({"prompt": vec!["a"; 65]})),
        ("logprobs", "/v1/completions", json!({"prompt": "a", "logprobs": 21})),
        ("prompt_logprobs", "/v1/completions", json!({"prompt": "a", "prompt_logprobs": 21})),
        ("n", "/v1/completions", json!({"prompt": ["a", "b", "c"], "n": 100})),
    ]);
    let message = json!([{"role": "user", "content": "a"}]);
    rows.push((
        "top_logprobs",
        "/v1/chat/completions",
        json!({"messages": message, "logprobs": true, "top_logprobs": 21}),
    ));
    rows.push(("top_logprobs", "/v1/chat/completions", json!({"messages": message, "top_logprobs": 2})));
    rows.push(("echo", "/v1/chat/completions", json!({"messages": message, "echo": true})));
    rows.push(("prompt_logprobs", "/v1/chat/completions", json!({"messages": message, "prompt_logprobs": 1})));
    for (param, path, body) in &rows {
        let reply = server.post(path, &body.to_string());
        let error = &reply.json()["error"];
        assert_eq!((reply.status, &error["param"]), (400, &json!(param)), "{path} {body}: {}", reply.body);
        assert_eq!(error["type"], "invalid_request_error");
        let message = error["message"].as_str().unwrap();
        assert!(!message.is_empty() && (*param == "prompt" || !message.contains("secret")), "{message}");
    }
    assert!(server.engine.requests.lock().unwrap().is_empty(), "nothing reached the engine");
    // The other side of each border.
    for extra in [
        r#"{"temperature": 0, "top_p": 0, "min_p": 0, "top_k": 0, "presence_penalty": -2, "frequency_penalty": -2}"#,
        r#"{"temperature": 2, "top_p": 1, "min_p": 1, "top_k": 4294967295, "presence_penalty": 2, "frequency_penalty": 2}"#,
        r#"{"repetition_penalty": 0.01, "max_tokens": 1, "n": 1, "best_of": 1, "echo": false, "seed": 0, "stop": "a"}"#,
        r#"{"repetition_penalty": 2, "seed": -9223372036854775808, "stop": [], "tools": [], "stop_token_ids": [0, 257]}"#,
        r#"{"n": 2, "best_of": 2, "min_tokens": 0, "echo": true, "max_tokens": 0, "prompt_logprobs": 20}"#,
        r#"{"logit_bias": {"257": -100, "0": 100}, "response_format": {"type": "text"}, "stream_options": null}"#,
    ] {
        let mut body = json!({"prompt": "a"});
        body.as_object_mut()
            .unwrap()
            .extend(serde_json::from_str::<Value>(extra).unwrap().as_object().unwrap().clone());
        let reply = server.post("/v1/completions", &body.to_string());
        assert_eq!(reply.status, 200, "{extra}: {}", reply.body);
    }
}

#[test]
fn execute_validation() {
    let server = Fixture::new(say(b"x"));
    let base = json!({"job_id": "j", "prompt": "secret", "max_tokens": 5});
    let with = |field: &str, value: Value| {
        let mut body = base.clone();
        body[field] = value;
        body
    };
    let s = |n: usize| Value::String("é".repeat(n));
    let accepted = [
        base.clone(),
        with("prompt", s(1)),
        with("prompt", json!("a".repeat(32_768))),
        with("max_tokens", json!(1)),
        with("max_tokens", json!(2048)),
        with("max_tokens", Value::Null),
        with("temperature", json!(0.0)),
        with("temperature", json!(2.0)),
        with("seed", json!(0)),
        with("seed", json!(u64::MAX)),
        with("top_p", json!(0.0)),
        with("top_p", json!(1.0)),
        with("top_k", json!(0)),
        with("top_k", json!(u32::MAX)),
        with("min_p", json!(0.0)),
        with("min_p", json!(1.0)),
        with("repetition_penalty", json!(0.001)),
        with("repetition_penalty", json!(2.0)),
        with("stop", json!([])),
        with("stop", json!(["a", "b", "c", "d"])),
        with("stop", json!(["é".repeat(50)])),
        with("other", json!({"unknown": true})),
    ];
    for body in &accepted {
        let reply = server.post("/execute", &body.to_string());
        assert_eq!(reply.status, 200, "{}", reply.body);
    }
    let submitted = server.engine.requests.lock().unwrap().len();
    assert_eq!(submitted, accepted.len());

    let rejected: [(&str, &str, Option<&str>, Value); 22] = [
        ("job_id", "non_empty", Some(""), with("job_id", json!(""))),
        ("job_id", "required", None, with("job_id", Value::Null)),
        ("job_id", "type(string)", None, with("job_id", json!(4))),
        ("prompt", "length(1..=32768)", None, with("prompt", json!(""))),
        ("prompt", "length(1..=32768)", None, with("prompt", s(32_769))),
        ("prompt", "required", None, with("prompt", Value::Null)),
        ("max_tokens", "range(1..=2048)", Some("0"), with("max_tokens", json!(0))),
        ("max_tokens", "range(1..=2048)", Some("2049"), with("max_tokens", json!(2049))),
        ("max_tokens", "type(unsigned integer)", None, with("max_tokens", json!(-1))),
        ("temperature", "range(0.0..=2.0)", Some("-0.01"), with("temperature", json!(-0.01))),
        ("temperature", "range(0.0..=2.0)", Some("2.01"), with("temperature", json!(2.01))),
        ("temperature", "type(number)", None, with("temperature", json!("hot"))),
        ("top_p", "range(0.0..=1.0)", Some("1.01"), with("top_p", json!(1.01))),
        ("top_p", "range(0.0..=1.0)", Some("-1"), with("top_p", json!(-1))),
        ("min_p", "range(0.0..=1.0)", Some("1.5"), with("min_p", json!(1.5))),
        ("top_k", "range(0..=4294967295)", Some("4294967296"), with("top_k", json!(4_294_967_296_u64))),
        ("repetition_penalty", "range(0.0..=2.0)", Some("0"), with("repetition_penalty", json!(0.0))),
        ("repetition_penalty", "range(0.0..=2.0)", Some("2.5"), with("repetition_penalty", json!(2.5))),
        ("stop", "max_count(4)", Some("5"), with("stop", json!(["a", "b", "c", "d", "e"]))),
        ("stop", "non_empty", None, with("stop", json!(["a", ""]))),
        ("stop", "max_length(100)", None, with("stop", json!(["a".repeat(101)]))),
        ("seed", "type(unsigned integer)", None, with("seed", json!(-5))),
    ];
    for (field, constraint, value, body) in &rejected {
        let reply = server.post("/execute", &body.to_string());
        let errors = reply.json();
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!((reply.status, errors["errors"].as_array().unwrap().len()), (400, 1), "{shown}: {errors}");
        let error = &errors["errors"][0];
        assert_eq!((&error["field"], &error["constraint"]), (&json!(field), &json!(constraint)), "{shown}");
        assert_eq!(error.get("value").and_then(Value::as_str), *value, "{shown}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(field) && !message.contains("secret"), "{message}");
    }
    // All at once.
    let body = json!({"job_id": "", "prompt": "", "max_tokens": 0, "temperature": 3, "top_p": 2, "min_p": 2,
        "repetition_penalty": 0, "stop": ["", "", "", "", ""], "top_k": -1, "seed": "x"});
    let reply = server.post("/execute", &body.to_string()).json();
    let fields: Vec<&str> = reply["errors"].as_array().unwrap().iter().map(|e| e["field"].as_str().unwrap()).collect();
    for field in body.as_object().unwrap().keys() {
        assert!(fields.contains(&field.as_str()), "{field} is not in {fields:?}");
    }
    assert_eq!(fields.iter().filter(|f| **f == "stop").count(), 6);
    assert_eq!(server.engine.requests.lock().unwrap().len(), submitted, "nothing invalid reached the engine");
}

#[test]
fn refusals_have_a_status_and_a_body() {
    let server = Fixture::with_limits(say(b"x"), Limits { body_bytes: 1000, ..Limits::default() });
    let json_type = [("content-type", "application/json")];
    let openai = |reply: &Reply, status: u16, code: Value| {
        assert_eq!(reply.status, status, "{}", reply.body);
        assert_eq!(reply.headers["content-type"], "application/json");
        let error = &reply.json()["error"];
        assert_eq!(error["code"], code, "{}", reply.body);
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()) && error["type"].is_string());
        assert!(reply.headers.contains_key("x-request-id") && reply.headers.contains_key("x-correlation-id"));
    };
    openai(&server.get("/nothing"), 404, json!("unknown_url"));
    openai(&server.get("/v1/models/other"), 404, json!("model_not_found"));
    openai(&server.post("/v1/completions", r#"{"model": "gpt-9", "prompt": "a"}"#), 404, json!("model_not_found"));
    for (method, path, allow) in [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("PUT", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/org/demo", "GET, HEAD"),
    ] {
        let reply = server.send(method, path, &[], b"");
        openai(&reply, 405, json!("method_not_allowed"));
        assert_eq!(reply.headers["allow"], allow);
    }
    let form = [("content-type", "application/x-www-form-urlencoded")];
    openai(&server.send("POST", "/v1/completions", &form, b"{}"), 415, json!("unsupported_media_type"));
    // Announced too long, and too long without an announcement.
    let announced = [json_type[0], ("content-length", "1001")];
    openai(&server.send("POST", "/v1/completions", &announced, b""), 413, json!("body_too_large"));
    let mut client = server.connect();
    let chunked = format!("{:x}\r\n{}\r\n0\r\n\r\n", 1001, "a".repeat(1001));
    let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    std::io::Write::write_all(&mut client.stream, (head + &chunked).as_bytes()).unwrap();
    openai(&client.reply(), 413, json!("body_too_large"));

    let broken = server.post("/v1/completions", "{\"prompt\": \"a\",\n  oops}");
    openai(&broken, 400, json!("invalid_json"));
    assert!(broken.body.contains("line 2 column 3"), "{}", broken.body);
    openai(&server.post("/v1/completions", ""), 400, Value::Null);
    openai(&server.post("/v1/completions", "[]"), 400, Value::Null);
    // Without a content type, and with parameters on it.
    assert_eq!(server.send("POST", "/v1/completions", &[], br#"{"prompt": "a"}"#).status, 200);
    let charset = [("content-type", "Application/JSON; charset=utf-8")];
    assert_eq!(server.send("POST", "/v1/completions", &charset, br#"{"prompt": "a"}"#).status, 200);

    // The worker API has its own shape.
    for (method, body, status, code) in [
        ("GET", "", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "{", 400, "INVALID_REQUEST"),
        ("POST", "", 400, "INVALID_REQUEST"),
    ] {
        let reply = server.send(method, "/execute", &json_type, body.as_bytes());
        let got = reply.json();
        assert_eq!((reply.status, &got["code"], &got["retriable"]), (status, &json!(code), &json!(false)));
        assert!(got["message"].is_string());
    }
}

#[test]
fn a_full_queue_and_a_stopped_engine_are_said_at_once() {
    let server = Fixture::with_limits(say(b"x"), Limits { waiting: 3, ..Limits::default() });
    let ask = || server.post("/v1/completions", r#"{"prompt": "a"}"#);
    let full = |reply: Reply| {
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (429, &json!("queue_full")));
        assert_eq!((reply.headers["retry-after"].as_str(), reply.headers["retry-after-ms"].as_str()), ("1", "1000"));
    };
    let healthy = Status { healthy: true, resident: true, ..Status::default() };
    *server.engine.status.lock().unwrap() = Status { waiting: 2, ..healthy.clone() };
    assert_eq!(ask().status, 200);
    *server.engine.status.lock().unwrap() = Status { waiting: 3, ..healthy.clone() };
    full(ask());
    *server.engine.status.lock().unwrap() = healthy.clone();
    *server.engine.refusal.lock().unwrap() = Some(SubmitError::QueueFull { limit: 3 });
    full(ask());
    let tokens = SubmitError::QueueTokens { waiting_tokens: 1234, request_tokens: 567, limit: 1500 };
    *server.engine.refusal.lock().unwrap() = Some(tokens);
    let reply = ask();
    assert!(["1234", "567", "1500"].iter().all(|number| reply.body.contains(number)), "{}", reply.body);
    full(reply);
    let worker = server.post("/execute", r#"{"job_id": "j", "prompt": "a"}"#);
    assert_eq!((worker.status, &worker.json()["code"]), (429, &json!("QUEUE_FULL")));
    assert_eq!(worker.json()["retriable"], true);

    *server.engine.refusal.lock().unwrap() = None;
    assert_eq!(server.get("/health").status, 200);
    *server.engine.status.lock().unwrap() = Status { failure: Some("lost the device".into()), ..Status::default() };
    let reply = ask();
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("engine_stopped")));
    assert!(reply.body.contains("lost the device"));
    let health = server.get("/health");
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("unhealthy")));
    assert_eq!((&health.json()["resident"], &health.json()["reason"]), (&json!(false), &json!("lost the device")));
    assert_eq!(server.get("/v1/models").json()["data"], json!([]));
}

#[test]
fn the_server_describes_itself() {
    let server = Fixture::new(say(b"x"));
    let pages = PageCounts { total: 9, held: 3, idle: 4, high_water: 5, hits: 6, misses: 7, ..PageCounts::default() };
    {
        let mut status = server.engine.status.lock().unwrap();
        (status.pages, status.preemptions) = (pages, 8);
    }
    let mut health = server.get("/health").json();
    assert!(health.as_object_mut().unwrap().remove("uptime_seconds").unwrap().is_u64());
    let want = json!({"status": "healthy", "reason": null, "model": "org/demo", "device": "script", "dtype": "bf16",
        "resident": true, "vram_bytes_used": 1234, "context_length": 40_000, "vocab_size": 258,
        "tokenizer_kind": "hf-json", "running": 0, "waiting": 0, "waiting_tokens": 0, "kv_pages_total": 9,
        "kv_pages_held": 3, "kv_pages_cached": 4, "kv_pages_high_water": 5, "prefix_cache_hits": 6,
        "prefix_cache_misses": 7, "preemptions": 8});
    assert_eq!(health, want);
    let model = json!({"id": "org/demo", "object": "model", "created": 1_700_000_000, "owned_by": "lockstep",
        "max_model_len": 40_000});
    assert_eq!(server.get("/v1/models").json(), json!({"object": "list", "data": [model]}));
    assert_eq!(server.get("/v1/models/org/demo").json(), model);
    assert_eq!(server.get("/v1/models/org%2Fdemo").json(), model);
    assert_eq!(server.get("/version").json()["fingerprint"], "fp_test");
}

#[test]
fn correlation_ids() {
    let server = Fixture::new(say(b"x"));
    let given = "0a1B2c3d-0000-4fFf-89ab-0123456789ab";
    let ask = |path: &str, header: Option<&str>| {
        let headers: Vec<(&str, &str)> = header.iter().map(|id| ("x-correlation-id", *id)).collect();
        server.send("GET", path, &headers, b"").headers["x-correlation-id"].clone()
    };
    assert_eq!(ask("/health", Some(given)), given, "a valid id comes back as it was");
    assert_eq!(ask("/nothing", Some(given)), given, "on errors, too");
    let post = [("x-correlation-id", given), ("x-request-id", "my-id")];
    let streamed = server.send("POST", "/execute", &post, br#"{"job_id": "j", "prompt": "a"}"#);
    assert_eq!((streamed.status, &streamed.headers["x-correlation-id"]), (200, &given.to_owned()), "on streams, too");
    assert_eq!(streamed.headers["x-request-id"], "my-id");
    let fresh = |id: &str| {
        let version = id.as_bytes()[14];
        assert!(id.len() == 36 && version == b'4' && id != given, "{id}");
        id.to_owned()
    };
    assert_ne!(fresh(&ask("/health", None)), fresh(&ask("/health", None)), "each gets its own");
    fresh(&ask("/health", Some("")));
    fresh(&ask("/health", Some(&given[..35])));
    fresh(&ask("/health", Some(&format!("{given}0"))));
    fresh(&ask("/health", Some(&given.replace('0', "g"))));
    fresh(&ask("/health", Some(&given.replace('-', "_"))));
    fresh(&ask("/health", Some("<script>alert(1)</script>")));
    let request_id =
        |id: &str| server.send("GET", "/health", &[("x-request-id", id)], b"").headers["x-request-id"].clone();
    assert_eq!(request_id(&"a".repeat(128)), "a".repeat(128));
    assert!(request_id(&"a".repeat(129)).starts_with("req-"));
    assert!(request_id("two words").starts_with("req-"));
}

#[test]
fn a_port_in_use_is_named() {
    let server = Fixture::new(say(b"x"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(bind("127.0.0.1", server.address.port())).unwrap_err();
    assert!(matches!(&error, ServerError::AddressInUse { address } if *address == server.address.to_string()));
    assert!(error.to_string().contains("--port"), "{error}");
    let error = runtime.block_on(bind("192.0.2.1", 0)).unwrap_err();
    assert!(matches!(error, ServerError::Bind { .. }) && error.to_string().contains("192.0.2.1:0"), "{error}");
}
