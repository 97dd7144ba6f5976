//! Streams in time: what leaves when, and how answers end before their end.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod server_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use host::engine::{EngineError, Event, FinishReason, Refused};
use host::server::{Drained, Limits};
use serde_json::{Value, json};
use server_support::{Client, EOS, Fixture, LONG, PATIENCE, Script, end, events, say, token};

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "a"}], "stream": true}"#;
const COMPLETION: &str = r#"{"prompt": "a", "stream": true}"#;
const WHOLE: &str = r#"{"prompt": "a"}"#;
const JOB: &str = r#"{"job_id": "j", "prompt": "a"}"#;

/// Says one byte for each one received, to one request, and ends when the sender is dropped. The sender notices when
/// nobody listens to the script any more.
fn dictated() -> (Sender<u8>, Arc<Script>) {
    let (dictate, bytes) = channel::<u8>();
    let bytes = Mutex::new(Some(bytes));
    let script = move |request: host::engine::Request, mut sink: Box<dyn host::engine::EventSink>| {
        let bytes = bytes.lock().unwrap().take().expect("one request");
        let mut count = 0;
        while let Ok(byte) = bytes.recv() {
            if sink.offer(token(u32::from(byte))).is_err() {
                return;
            }
            count += 1;
        }
        let _ = sink.offer(end(&request, FinishReason::StopToken(EOS), count));
    };
    (dictate, Arc::new(script))
}

/// Says `a` for ever, slowly, and reports how it was stopped.
fn endless() -> (Receiver<(Refused, Instant)>, Arc<Script>) {
    let (report, stopped) = channel();
    let report = Mutex::new(report);
    let script = move |_: host::engine::Request, mut sink: Box<dyn host::engine::EventSink>| {
        loop {
            if sink.is_gone() {
                let _ = report.lock().unwrap().send((Refused::Gone, Instant::now()));
                return;
            }
            if let Err(refused) = sink.offer(token(97)) {
                let _ = report.lock().unwrap().send((refused, Instant::now()));
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    (stopped, Arc::new(script))
}

#[test]
fn each_token_leaves_before_the_next_is_made() {
    for (path, body, shown) in [
        ("/v1/chat/completions", CHAT, r#""content":""#),
        ("/v1/completions", COMPLETION, r#""text":""#),
        ("/execute", JOB, r#""t":""#),
    ] {
        let (dictate, script) = dictated();
        let server = Fixture::new(script);
        let mut client = server.connect();
        client.post(path, body);
        // The header is there before the first token.
        client.until("\r\n\r\n");
        for byte in b"xyz" {
            dictate.send(*byte).unwrap();
            client.until(&format!("{shown}{}\"", char::from(*byte)));
        }
        drop(dictate);
        client.until(if path == "/execute" { "event: end\n" } else { "data: [DONE]\n\n" });
        client.until("\r\n0\r\n\r\n");
    }
}

#[test]
fn a_character_or_a_stop_string_over_several_tokens_comes_out_right() {
    let (dictate, script) = dictated();
    let server = Fixture::new(script);
    let mut client = server.connect();
    client.post("/v1/completions", r#"{"prompt": "a", "stream": true, "stop": ["STOP"], "seed": 1}"#);
    client.until("\r\n\r\n");
    for byte in "👩".bytes() {
        dictate.send(byte).unwrap();
    }
    let text = client.until("👩\"");
    assert!(!text.contains('\u{fffd}') && text.matches("\"text\"").count() == 1, "{text}");
    // "ST" may become STOP, so it waits; "x" proves that it does not.
    for byte in b"STx" {
        dictate.send(*byte).unwrap();
    }
    assert_eq!(client.until("STx\"").matches("\"text\"").count(), 1);
    for byte in b"ySTOP" {
        dictate.send(*byte).unwrap();
    }
    let rest = client.until("\r\n0\r\n\r\n");
    assert!(rest.contains("\"text\":\"y\"") && rest.contains("\"finish_reason\":\"stop\""), "{rest}");
    assert!(!rest.contains("ST") && rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{rest}");
    // The engine is told: the script's next token finds nobody.
    let started = Instant::now();
    while dictate.send(b'z').is_ok() {
        assert!(started.elapsed() < PATIENCE, "the script still runs");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_client_that_goes_ends_the_work() {
    for (path, body) in
        [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION), ("/v1/completions", WHOLE), ("/execute", JOB)]
    {
        let (stopped, script) = endless();
        let server = Fixture::new(script);
        let mut client = server.connect();
        client.post(path, body);
        let started = Instant::now();
        while server.engine.requests.lock().unwrap().is_empty() {
            assert!(started.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(1));
        }
        if body != WHOLE {
            client.until("\"a\"");
        }
        let gone = Instant::now();
        drop(client);
        let (refused, noticed) = stopped.recv_timeout(PATIENCE).expect("the engine was told");
        assert_eq!(refused, Refused::Gone, "{path}");
        println!("{path} {body}: noticed after {:?}", noticed.saturating_duration_since(gone));
    }
}

#[test]
fn a_reader_that_does_not_keep_up_is_ended_and_told() {
    let (report, refused) = channel();
    let report = Mutex::new(report);
    let server = Fixture::new(Arc::new(move |_, mut sink| {
        // Some thousand times 4 KiB fill every buffer on the way.
        for count in 0..1_000_000_u32 {
            if let Err(refused) = sink.offer(token(LONG)) {
                report.lock().unwrap().send((refused, count)).unwrap();
                return;
            }
            if count % 64 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }));
    let mut client = server.connect();
    client.post("/execute", JOB);
    let (refused, count) = refused.recv_timeout(PATIENCE).expect("the engine was stopped");
    assert_eq!(refused, Refused::Full);
    assert!(count >= 256);
    let reply = client.reply();
    let events = events(&reply.body);
    for (i, (name, data)) in events[1..events.len() - 1].iter().enumerate() {
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!((name.as_str(), data["i"].as_u64()), ("token", Some(i as u64)));
    }
    assert_eq!(events.len() - 2, count as usize, "what was accepted arrives");
    let (name, data) = events.last().unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!((name.as_str(), &data["code"]), ("error", &json!("SLOW_READER")));
}

#[test]
fn a_failure_in_the_middle_is_the_last_thing_said() {
    let fail = |event: Option<Event>| -> Arc<Script> {
        Arc::new(move |_, mut sink| {
            sink.offer(token(97)).unwrap();
            if let Some(event) = event.clone() {
                let _ = sink.offer(event);
            }
        })
    };
    let cases: [(Option<Event>, &str, u16); 3] = [
        (Some(Event::Error(EngineError::Device("it burns".into()))), "INFERENCE_FAILED", 500),
        (Some(Event::Error(EngineError::NoFiniteLogit { position: 3 })), "INFERENCE_FAILED", 500),
        // The engine lets go without a word.
        (None, "SHUTTING_DOWN", 503),
    ];
    for (event, code, status) in cases {
        let server = Fixture::new(fail(event));
        let job = server.post("/execute", JOB);
        let names: Vec<String> = events(&job.body).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["started", "token", "error"]);
        assert!(job.body.contains(&format!("\"code\":\"{code}\"")), "{}", job.body);
        for (path, body) in [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)] {
            let reply = server.post(path, body);
            let events = events(&reply.body);
            let (name, data) = events.last().unwrap();
            let error: Value = serde_json::from_str(data).unwrap();
            assert!(name == "error" && error["error"]["message"].is_string(), "{}", reply.body);
            assert!(!reply.body.contains("[DONE]"));
        }
        assert_eq!(server.post("/v1/completions", WHOLE).status, status);
    }
}

#[test]
fn silence_is_filled_with_comments() {
    let (dictate, script) = dictated();
    let limits = Limits { keep_alive: Duration::from_millis(30), ..Limits::default() };
    let server = Fixture::with_limits(script, limits);
    let mut client = server.connect();
    client.post("/v1/chat/completions", CHAT);
    for _ in 0..3 {
        client.until(": keep-alive\n\n");
    }
    dictate.send(b'x').unwrap();
    client.until("\"content\":\"x\"");
    client.until(": keep-alive\n\n");
    drop(dictate);
    client.until("data: [DONE]\n\n");
}

#[test]
fn health_answers_while_streams_run() {
    let (stopped, script) = endless();
    let server = Fixture::new(script);
    let mut streams: Vec<Client> = (0..4).map(|_| server.connect()).collect();
    for stream in &mut streams {
        stream.post("/execute", JOB);
        stream.until("event: token\n");
    }
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = server.connect();
                for _ in 0..25 {
                    client.request("GET", "/health", &[], b"");
                    assert_eq!(client.reply().status, 200);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(answered.into_inner(), 100);
    for stream in &mut streams {
        stream.until("event: token\n");
    }
    assert!(stopped.try_recv().is_err(), "the streams still run");
}

#[test]
fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let (dictate, script) = dictated();
    let mut server = Fixture::new(script);
    let mut running = server.connect();
    running.post("/execute", JOB);
    dictate.send(b'x').unwrap();
    running.until("\"t\":\"x\"");
    let mut idle = server.connect();
    idle.request("GET", "/health", &[], b"");
    assert_eq!(idle.reply().status, 200);

    server.begin_stop();
    let started = Instant::now();
    while TcpStream::connect(server.address).is_ok() {
        assert!(started.elapsed() < PATIENCE, "new connections are still taken");
        std::thread::sleep(Duration::from_millis(1));
    }
    idle.request("GET", "/v1/models", &[], b"");
    assert_eq!(idle.reply().json()["data"], json!([]));
    idle.request("GET", "/health", &[], b"");
    let health = idle.reply();
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("unhealthy")));
    idle.post("/v1/completions", WHOLE);
    let refused = idle.reply();
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("shutting_down")));
    assert_eq!(server.engine.requests.lock().unwrap().len(), 1, "it was refused at the door");

    dictate.send(b'y').unwrap();
    running.until("\"t\":\"y\"");
    drop(dictate);
    running.until("\"stop_reason\":\"eos\"");
    running.until("\r\n0\r\n\r\n");
    assert_eq!(server.drained(), Drained { unfinished: 0 });
}

#[test]
fn a_drain_ends_at_its_limit() {
    let (stopped, script) = endless();
    let limits = Limits { drain: Duration::from_millis(50), ..Limits::default() };
    let mut server = Fixture::with_limits(script, limits);
    let mut running = server.connect();
    running.post("/v1/completions", COMPLETION);
    running.until("\"text\"");
    server.begin_stop();
    assert_eq!(server.drained(), Drained { unfinished: 1 });
    assert_eq!(stopped.recv_timeout(PATIENCE).unwrap().0, Refused::Gone);
}

/// HTTP/2 by hand: the preface, empty settings, one request whose headers are spelled out.
#[test]
fn http2_with_prior_knowledge() {
    let server = Fixture::new(say(b"Hi"));
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let frame = |kind: u8, flags: u8, id: u32, payload: &[u8]| {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(id.to_be_bytes());
        bytes.extend(payload);
        bytes
    };
    // Indexed names of the static table: :method POST is 3, :scheme http is 6, :path 4, :authority 1.
    let mut headers = vec![0x83, 0x86, 0x04, 8];
    headers.extend(b"/execute");
    headers.extend([0x01, 4]);
    headers.extend(b"test");
    let (data, head, settings) = (0, 1, 4);
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(settings, 0, 0, &[]));
    bytes.extend(frame(head, 0x4, 1, &headers));
    bytes.extend(frame(data, 0x1, 1, JOB.as_bytes()));
    stream.write_all(&bytes).unwrap();
    let (mut status, mut body, mut ended) = (None, Vec::new(), false);
    while !ended {
        let mut head_bytes = [0; 9];
        stream.read_exact(&mut head_bytes).unwrap();
        let length = u32::from_be_bytes([0, head_bytes[0], head_bytes[1], head_bytes[2]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).unwrap();
        let id = u32::from_be_bytes([head_bytes[5], head_bytes[6], head_bytes[7], head_bytes[8]]);
        if id == 1 {
            match head_bytes[3] {
                1 => status = payload.first().copied(),
                0 => body.extend(payload),
                kind => panic!("frame of kind {kind}: {payload:?}"),
            }
            ended = head_bytes[4] & 1 == 1;
        }
    }
    // :status 200 is entry 8.
    assert_eq!(status, Some(0x88));
    let body = String::from_utf8(body).unwrap();
    let names: Vec<String> = events(&body).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["started", "token", "token", "end"]);
}

#[test]
fn a_connection_serves_one_answer_after_another() {
    let server = Fixture::new(say(b"Hi"));
    let mut client = server.connect();
    for _ in 0..3 {
        client.post("/v1/chat/completions", CHAT);
        assert!(client.reply().body.ends_with("data: [DONE]\n\n"));
        client.post("/v1/completions", r#"{"prompt": ""}"#);
        assert_eq!(client.reply().status, 400);
        client.post("/v1/completions", WHOLE);
        assert_eq!(client.reply().json()["choices"][0]["text"], "Hi");
    }
}
