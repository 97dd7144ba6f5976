//! `POST /cancel`, in every state that a job can be in.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod server_support;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use host::engine::Status;
use host::server::Limits;
use serde_json::{Value, json};
use server_support::{Client, Fixture, PATIENCE, Reply, Script, events, say, token};

const JOB: &str = r#"{"job_id": "j", "prompt": "a"}"#;
const OTHER: &str = r#"{"job_id": "k", "prompt": "b"}"#;

/// Says `a` for ever, or nothing at all, until nobody wants it; then says whose end that was by its prompt.
fn until_gone(speaks: bool) -> (Receiver<u32>, Arc<Script>) {
    let (report, ended) = channel();
    let report = Mutex::new(report);
    let script = move |request: host::engine::Request, mut sink: Box<dyn host::engine::EventSink>| {
        while !sink.is_gone() && (!speaks || sink.offer(token(97)).is_ok()) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = report.lock().unwrap().send(request.prompt[0]);
    };
    (ended, Arc::new(script))
}

fn cancel(server: &Fixture, job_id: &str) -> Reply {
    let reply = server.post("/cancel", &json!({ "job_id": job_id }).to_string());
    assert_eq!((reply.status, reply.json()), (202, json!({ "job_id": job_id })));
    reply
}

/// The rest of a stream whose response has begun: its last event is the cancellation.
fn cancelled(client: &mut Client) {
    let text = client.until("\"retriable\":false}\n\n");
    assert_eq!(text.matches("event: error\n").count(), 1, "{text}");
    assert!(text.contains(r#""code":"CANCELLED""#) && !text.contains("event: end"), "{text}");
    assert!(text.contains(r#""message":"the job was cancelled""#), "{text}");
    assert_eq!(client.until("\r\n0\r\n\r\n"), "\r\n0\r\n\r\n", "nothing follows");
}

fn submitted(server: &Fixture, count: usize) {
    let started = Instant::now();
    while server.engine.requests.lock().unwrap().len() < count {
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_running_job_ends_and_its_neighbour_does_not() {
    let (ended, script) = until_gone(true);
    let server = Fixture::new(script);
    let (mut job, mut other) = (server.connect(), server.connect());
    job.post("/execute", JOB);
    job.until(r#""t":"a""#);
    other.post("/execute", OTHER);
    other.until(r#""t":"a""#);
    cancel(&server, "j");
    cancelled(&mut job);
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(97), "the engine was told");
    for _ in 0..3 {
        other.until(r#""t":"a""#);
    }
    assert!(ended.try_recv().is_err());
    cancel(&server, "k");
    cancelled(&mut other);
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(98));
}

#[test]
fn a_job_that_waits_ends_without_a_token() {
    let (ended, script) = until_gone(false);
    let server = Fixture::new(script);
    let mut job = server.connect();
    job.post("/execute", JOB);
    job.until("event: started\n");
    submitted(&server, 1);
    cancel(&server, "j");
    cancelled(&mut job);
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(97));
}

#[test]
fn cancelling_twice_after_the_end_or_for_an_unknown_job_is_fine() {
    let server = Fixture::new(say(b"Hi"));
    cancel(&server, "j");
    cancel(&server, "never heard of");
    for _ in 0..2 {
        // A cancellation that found nothing says nothing about the next job of the name.
        let names: Vec<String> = events(&server.post("/execute", JOB).body).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["started", "token", "token", "end"]);
        cancel(&server, "j");
        cancel(&server, "j");
    }
    let (ended, script) = until_gone(true);
    let server = Fixture::new(script);
    for _ in 0..2 {
        let mut job = server.connect();
        job.post("/execute", JOB);
        job.until(r#""t":"a""#);
        cancel(&server, "j");
        cancel(&server, "j");
        cancelled(&mut job);
        assert_eq!(ended.recv_timeout(PATIENCE), Ok(97));
    }
}

#[test]
fn jobs_of_one_name_end_together() {
    let (ended, script) = until_gone(true);
    let server = Fixture::new(script);
    let mut jobs = [server.connect(), server.connect()];
    for job in &mut jobs {
        job.post("/execute", JOB);
        job.until(r#""t":"a""#);
    }
    cancel(&server, "j");
    for job in &mut jobs {
        cancelled(job);
        assert_eq!(ended.recv_timeout(PATIENCE), Ok(97));
    }
}

#[test]
fn a_full_queue_is_no_reason_to_refuse() {
    let (ended, script) = until_gone(true);
    let server = Fixture::with_limits(script, Limits { waiting: 1, ..Limits::default() });
    let mut job = server.connect();
    job.post("/execute", JOB);
    job.until(r#""t":"a""#);
    *server.engine.status.lock().unwrap() = Status { healthy: true, waiting: 1, ..Status::default() };
    assert_eq!(server.post("/execute", OTHER).status, 429);
    cancel(&server, "j");
    cancelled(&mut job);
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(97));
}

#[test]
fn malformed_bodies_are_refused() {
    let server = Fixture::new(say(b"x"));
    for (body, constraint) in [
        ("{}", "required"),
        (r#"{"job_id": null}"#, "required"),
        (r#"{"job_id": 7}"#, "type(string)"),
        (r#"{"job_id": ""}"#, "non_empty"),
    ] {
        let reply = server.post("/cancel", body);
        let error = &reply.json()["errors"][0];
        assert_eq!((reply.status, &error["field"]), (400, &json!("job_id")), "{body}");
        assert_eq!(error["constraint"], constraint, "{body}");
    }
    for body in ["", "[]", "{\"job_id\""] {
        let reply = server.post("/cancel", body);
        assert_eq!((reply.status, &reply.json()["code"]), (400, &json!("INVALID_REQUEST")), "{body:?}");
        assert_eq!(reply.json()["retriable"], Value::Bool(false));
    }
    let reply = server.get("/cancel");
    assert_eq!((reply.status, reply.headers["allow"].as_str()), (405, "POST"));
}
