//! Several answers to one prompt, prompts in answers, and receipts, with a scripted engine.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod server_support;

use std::sync::Arc;

use host::engine::{FinishReason, Request, choice_seed};
use serde_json::{Value, json};
use server_support::{EOS, Fixture, Script, digest, end, events, say, sha256, token};

/// Says its seed in decimal.
fn say_seed() -> Arc<Script> {
    Arc::new(|request: Request, mut sink| {
        let text = request.sampling.seed.to_string();
        for byte in text.bytes() {
            sink.offer(token(u32::from(byte))).unwrap();
        }
        let _ = sink.offer(end(&request, FinishReason::StopToken(EOS), text.len() as u32));
    })
}

fn ids_of(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn choices_have_the_seeds_and_indices_of_their_place() {
    let server = Fixture::new(say_seed());
    let seeds: Vec<u64> = (0..3).map(|choice| choice_seed(7, choice)).collect();
    let texts: Vec<String> = seeds.iter().map(u64::to_string).collect();
    let digests: Vec<String> = texts.iter().map(|text| digest(0, &ids_of(text))).collect();
    let bytes =
        |hex: &String| (0..32).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect::<Vec<u8>>();
    let all = sha256(&digests.iter().flat_map(bytes).collect::<Vec<u8>>());
    let lockstep = json!({"seed": 7, "digest": all, "choices": [
        {"index": 0, "seed": 7, "digest": digests[0]},
        {"index": 1, "seed": seeds[1], "digest": digests[1]},
        {"index": 2, "seed": seeds[2], "digest": digests[2]},
    ]});
    let generated: usize = texts.iter().map(String::len).sum();
    for (path, mut body, shown) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "a"}]}), "message"),
        ("/v1/completions", json!({"prompt": "[user] a\n[assistant] "}), "text"),
    ] {
        (body["n"], body["seed"]) = (json!(3), json!(7));
        let reply = server.post(path, &body.to_string()).json();
        assert_eq!(reply["choices"].as_array().unwrap().len(), 3);
        for (index, choice) in reply["choices"].as_array().unwrap().iter().enumerate() {
            let text = if shown == "text" { &choice["text"] } else { &choice["message"]["content"] };
            assert_eq!((&choice["index"], text), (&json!(index), &json!(texts[index])));
        }
        let prompt = 21;
        let usage =
            json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated});
        assert_eq!((&reply["usage"], &reply["lockstep"], &reply["seed"]), (&usage, &lockstep, &json!(7)));

        (body["stream"], body["stream_options"]) = (json!(true), json!({"include_usage": true}));
        for include_usage in [true, false] {
            body["stream_options"]["include_usage"] = json!(include_usage);
            let reply = server.post(path, &body.to_string());
            let events = events(&reply.body);
            assert_eq!(events.last().unwrap().1, "[DONE]");
            let chunks: Vec<Value> =
                events[..events.len() - 1].iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
            let mut streamed = vec![String::new(); 3];
            let (mut ends, mut roles) = ([0; 3], [0; 3]);
            for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
                let index = choice["index"].as_u64().unwrap() as usize;
                assert_eq!(ends[index], 0, "nothing comes behind the end");
                let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
                streamed[index] += text.unwrap_or_default();
                ends[index] += usize::from(choice["finish_reason"] == "stop");
                roles[index] += usize::from(choice["delta"]["role"] == "assistant");
            }
            assert_eq!((&streamed, ends), (&texts, [1; 3]));
            assert_eq!(roles, [usize::from(shown == "message"); 3]);
            let (last, before) = chunks.split_last().unwrap();
            assert_eq!(last["lockstep"], lockstep);
            assert!(before.iter().all(|chunk| chunk["lockstep"].is_null()));
            assert_eq!(last["usage"], if include_usage { usage.clone() } else { Value::Null });
        }
    }
    let requests = server.engine.requests.lock().unwrap();
    assert!(requests.iter().all(|request| request.prompt == requests[0].prompt));
}

#[test]
fn choices_of_several_prompts_follow_each_other() {
    let server = Fixture::new(say_seed());
    let reply =
        server.post("/v1/completions", r#"{"prompt": ["ab", "c"], "n": 2, "seed": 9, "cache_salt": "x"}"#).json();
    let texts: Vec<&str> = reply["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    let second = choice_seed(9, 1).to_string();
    assert_eq!(texts, ["9", &second, "9", &second]);
    assert_eq!(reply["usage"]["prompt_tokens"], 3);
    // Two of each prompt, whatever its choices found.
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
}

#[test]
fn a_prompt_comes_back_with_its_log_probabilities() {
    let server = Fixture::new(say("né".as_bytes()));
    let value = |id: u32| json!(-(id as f32) / 256.0);
    let top = |text: &str, id: u32| json!({text: value(id), "<|end|>": -9.5});
    let reply = server
        .post("/v1/completions", r#"{"prompt": "hi", "echo": true, "logprobs": 2, "max_tokens": 1, "seed": 3}"#)
        .json();
    let choice = &reply["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("hin"), &json!("length")));
    let want = json!({
        "tokens": ["h", "i", "n"],
        "token_logprobs": [null, value(105), value(110)],
        "top_logprobs": [null, top("i", 105), top("n", 110)],
        "text_offset": [0, 1, 2],
    });
    assert_eq!(choice["logprobs"], want);
    assert!(choice.get("prompt_logprobs").is_none());
    let bits = |id: u32| (-(id as f32) / 256.0).to_bits();
    assert_eq!(reply["lockstep"]["digest"], digest(3, &[2, 104, 105, bits(105), 110, bits(110)]));
    {
        let requests = server.engine.requests.lock().unwrap();
        assert_eq!((requests[0].prompt_logprobs, requests[0].logprobs), (Some(2), Some(2)));
    }

    // Nothing generated: the prompt alone; and without log-probabilities its text alone.
    let ask = |more: Value| {
        let mut body = json!({"prompt": [104, 105], "echo": true, "max_tokens": 0, "seed": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body.to_string()).json()
    };
    let scored = ask(json!({"logprobs": 1}));
    assert_eq!((&scored["choices"][0]["text"], &scored["usage"]["completion_tokens"]), (&json!("hi"), &json!(0)));
    let logprobs = &scored["choices"][0]["logprobs"];
    assert_eq!(
        (&logprobs["tokens"], &logprobs["top_logprobs"]),
        (&json!(["h", "i"]), &json!([null, {"i": value(105)}]))
    );
    let plain = ask(json!({}));
    assert_eq!((&plain["choices"][0]["text"], &plain["choices"][0]["logprobs"]), (&json!("hi"), &Value::Null));
    let zero = ask(json!({"logprobs": 0}))["choices"][0]["logprobs"].clone();
    assert_eq!((&zero["token_logprobs"], &zero["top_logprobs"]), (&json!([null, value(105)]), &json!([null, {}])));
}

#[test]
fn a_prompts_log_probabilities_alone() {
    let server = Fixture::new(say(b"x"));
    let reply = server.post("/v1/completions", r#"{"prompt": "hi", "prompt_logprobs": 1}"#).json();
    let choice = &reply["choices"][0];
    let own = json!({"logprob": -105.0 / 256.0, "rank": 1, "decoded_token": "i"});
    assert_eq!(choice["prompt_logprobs"], json!([null, {"105": own}]));
    assert_eq!((&choice["text"], &choice["logprobs"]), (&json!("x"), &Value::Null));
    let reply = server.post("/v1/completions", r#"{"prompt": "hi", "prompt_logprobs": 0}"#).json();
    assert_eq!(reply["choices"][0]["prompt_logprobs"][1]["105"]["rank"], Value::Null);
}

#[test]
fn a_repeated_prompt_streams_before_its_answer() {
    let server = Fixture::new(say(b"yz"));
    for (more, logprobs) in [("", false), (r#", "logprobs": 1"#, true), (r#", "prompt_logprobs": 1"#, false)] {
        let whole = format!(r#"{{"prompt": ["ab", "c"], "n": 2, "seed": 1, "echo": true{more}}}"#);
        let whole_reply = server.post("/v1/completions", &whole).json();
        let reply = server.post("/v1/completions", &whole.replace("\"seed\"", "\"stream\": true, \"seed\""));
        let mut choices = vec![json!({"text": "", "tokens": [], "text_offset": [], "prompt_logprobs": null}); 4];
        for (_, data) in events(&reply.body).iter().filter(|(_, data)| data != "[DONE]") {
            let chunk: Value = serde_json::from_str(data).unwrap();
            let choice = &chunk["choices"][0];
            let all = &mut choices[choice["index"].as_u64().unwrap() as usize];
            all["text"] = json!(all["text"].as_str().unwrap().to_owned() + choice["text"].as_str().unwrap());
            for name in ["tokens", "text_offset"] {
                let more = choice["logprobs"][name].as_array().cloned().unwrap_or_default();
                all[name].as_array_mut().unwrap().extend(more);
            }
            if choice["prompt_logprobs"].is_array() {
                all["prompt_logprobs"] = choice["prompt_logprobs"].clone();
            }
        }
        for (streamed, whole) in choices.iter().zip(whole_reply["choices"].as_array().unwrap()) {
            assert!(["abyz", "cyz"].contains(&whole["text"].as_str().unwrap()), "{whole}");
            assert_eq!(streamed["text"], whole["text"]);
            let places = streamed["tokens"].as_array().unwrap().len();
            assert_eq!(places, if logprobs { whole["text"].as_str().unwrap().len() } else { 0 });
            if logprobs {
                assert_eq!(streamed["tokens"], whole["logprobs"]["tokens"]);
                assert_eq!(streamed["text_offset"], whole["logprobs"]["text_offset"]);
            }
            assert_eq!(streamed["prompt_logprobs"], whole["prompt_logprobs"]);
        }
    }
}
