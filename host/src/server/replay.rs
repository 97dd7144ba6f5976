//! Sends recorded requests again and compares the answers with what was recorded.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Bytes of an answer that are read at most.
const LARGEST_ANSWER: usize = 256 << 20;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Times that a request is sent which the server is too busy for.
const MOST_TRIES: usize = 600;
/// How long to wait then, where the server does not say.
const PAUSE: Duration = Duration::from_secs(1);

/// Why nothing can be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The address is not one that can be asked.
    #[error("{url:?} is no address of a server; give one like http://127.0.0.1:8080")]
    Url {
        /// What was given.
        url: String,
    },
    /// No threads for it.
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
}

/// What became of a recorded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything that was recorded came again.
    Same,
    /// What differs, in words.
    Different(String),
    /// There is no answer to compare: what went wrong, in words.
    Failed(String),
    /// The line does not hold a request with something to compare: why.
    Unreadable(String),
}

/// How many requests went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// See [`Outcome::Same`].
    pub same: u64,
    /// See [`Outcome::Different`].
    pub different: u64,
    /// See [`Outcome::Failed`].
    pub failed: u64,
    /// See [`Outcome::Unreadable`].
    pub unreadable: u64,
}

impl Counts {
    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Same => self.same += 1,
            Outcome::Different(_) => self.different += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Unreadable(_) => self.unreadable += 1,
        }
    }

    /// All requests.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.same + self.different + self.failed + self.unreadable
    }
}

/// Sends each of `lines` (number and text) to the server at `url`, `concurrency` at a time, and tells `report` the line's
/// number and what became of it, in the order of the answers.
///
/// A request without a seed is sent with the recorded one. A server that is too busy is asked again.
///
/// # Errors
/// [`ReplayError`]; nothing was sent then.
pub fn replay(
    lines: impl Iterator<Item = (usize, String)> + Send + 'static,
    url: &str,
    concurrency: usize,
    report: &mut dyn FnMut(usize, &Outcome),
) -> Result<Counts, ReplayError> {
    let server: Arc<str> = authority(url).ok_or_else(|| ReplayError::Url { url: url.to_owned() })?.into();
    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("replay").enable_all().build()?;
    let mut counts = Counts::default();
    runtime.block_on(async {
        let lines = Arc::new(Mutex::new(lines));
        let (outcomes, mut told) = mpsc::channel(concurrency.max(1));
        for _ in 0..concurrency.max(1) {
            let (lines, server, outcomes) = (Arc::clone(&lines), Arc::clone(&server), outcomes.clone());
            tokio::spawn(async move {
                let mut connection = Connection { server, sender: None };
                loop {
                    let next = lines.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some((number, line)) = next else { return };
                    let outcome = outcome(&mut connection, &line).await;
                    if outcomes.send((number, outcome)).await.is_err() {
                        return;
                    }
                }
            });
        }
        drop(outcomes);
        while let Some((number, outcome)) = told.recv().await {
            counts.count(&outcome);
            report(number, &outcome);
        }
    });
    Ok(counts)
}

/// `host:port` of an address without a path.
fn authority(url: &str) -> Option<String> {
    let uri: hyper::Uri = url.trim_end_matches('/').parse().ok()?;
    if uri.scheme_str() != Some("http") || uri.path() != "/" || uri.query().is_some() {
        return None;
    }
    Some(format!("{}:{}", uri.host()?, uri.port_u16().unwrap_or(80)))
}

async fn outcome(connection: &mut Connection, line: &str) -> Outcome {
    let entry = match Entry::parse(line) {
        Ok(entry) => entry,
        Err(why) => return Outcome::Unreadable(why),
    };
    match connection.ask(&entry).await {
        Ok(facts) => match entry.recorded.differences(&facts) {
            differences if differences.is_empty() => Outcome::Same,
            differences => Outcome::Different(differences.join("; ")),
        },
        Err(why) => Outcome::Failed(why),
    }
}

/// A line of a record.
#[derive(Debug)]
struct Entry {
    endpoint: String,
    request: Map<String, Value>,
    recorded: Facts,
}

impl Entry {
    fn parse(line: &str) -> Result<Self, String> {
        let entry: Value = serde_json::from_str(line).map_err(|error| format!("no JSON: {error}"))?;
        let endpoint = match entry.get("endpoint").and_then(Value::as_str) {
            Some(endpoint @ ("/v1/chat/completions" | "/v1/completions" | "/execute")) => endpoint.to_owned(),
            Some(other) => return Err(format!("{other:?} is no endpoint that generates")),
            None => return Err("there is no \"endpoint\"".to_owned()),
        };
        let Some(Value::Object(mut request)) = entry.get("request").cloned() else {
            return Err("there is no \"request\", or it is no object".to_owned());
        };
        let recorded = Facts::of(entry.get("response").unwrap_or(&Value::Null));
        if recorded.digest.is_none() && recorded.texts.is_empty() {
            return Err("the \"response\" has neither a digest nor a text to compare".to_owned());
        }
        if request.get("seed").is_none_or(Value::is_null) {
            let Some(seed) = recorded.seed.clone() else {
                return Err("neither the request nor its response has a seed".to_owned());
            };
            request.insert("seed".to_owned(), seed);
        }
        Ok(Self { endpoint, request, recorded })
    }
}

/// What is compared. What is absent on the recorded side is not.
#[derive(Clone, Debug, Default, PartialEq)]
struct Facts {
    fingerprint: Option<String>,
    seed: Option<Value>,
    digest: Option<String>,
    /// By index.
    choice_digests: BTreeMap<u64, String>,
    texts: BTreeMap<u64, String>,
}

impl Facts {
    /// Of a whole answer, or of the receipt alone.
    fn of(answer: &Value) -> Self {
        let mut facts = Self::default();
        facts.add(answer);
        facts
    }

    /// Takes in an answer, or a chunk of one.
    fn add(&mut self, answer: &Value) {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let receipt = if answer["lockstep"].is_object() { &answer["lockstep"] } else { answer };
        self.fingerprint = text(&answer["system_fingerprint"]).or(self.fingerprint.take());
        let seed = [&receipt["seed"], &answer["seed"]].into_iter().find(|seed| seed.is_number());
        self.seed = seed.cloned().or(self.seed.take());
        self.digest = text(&receipt["digest"]).or(self.digest.take());
        for choice in receipt["choices"].as_array().into_iter().flatten() {
            if let Some(digest) = text(&choice["digest"]) {
                self.choice_digests.insert(choice["index"].as_u64().unwrap_or(0), digest);
            }
        }
        for choice in answer["choices"].as_array().into_iter().flatten() {
            let places = [&choice["text"], &choice["message"]["content"], &choice["delta"]["content"]];
            if let Some(text) = places.into_iter().find_map(Value::as_str) {
                *self.texts.entry(choice["index"].as_u64().unwrap_or(0)).or_default() += text;
            }
        }
    }

    /// Of a stream of events.
    fn of_events(body: &str) -> Result<Self, String> {
        let mut facts = Self::default();
        let mut complete = false;
        for block in body.split("\n\n") {
            let mut name = "";
            for line in block.lines() {
                if let Some(event) = line.strip_prefix("event: ") {
                    name = event;
                }
                let Some(data) = line.strip_prefix("data: ") else { continue };
                if data == "[DONE]" {
                    complete = true;
                    continue;
                }
                let value: Value =
                    serde_json::from_str(data).map_err(|error| format!("an event is no JSON: {error}"))?;
                match name {
                    "error" => return Err(format!("the answer broke off: {data}")),
                    "token" => *facts.texts.entry(0).or_default() += value["t"].as_str().unwrap_or_default(),
                    _ => facts.add(&value),
                }
                if name == "end" {
                    facts.texts.entry(0).or_default();
                    complete = true;
                }
            }
        }
        if complete { Ok(facts) } else { Err("the answer broke off".to_owned()) }
    }

    /// Each difference in words.
    fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |name: &str, recorded: Option<String>, now: Option<String>| {
            if let Some(recorded) = recorded
                && now.as_ref() != Some(&recorded)
            {
                found.push(format!("{name} was {recorded} and is {}", now.as_deref().unwrap_or("not there")));
            }
        };
        compare("system_fingerprint", self.fingerprint.clone(), now.fingerprint.clone());
        let seed = |facts: &Self| facts.seed.as_ref().map(Value::to_string);
        compare("seed", seed(self), seed(now));
        compare("digest", self.digest.clone(), now.digest.clone());
        for (index, digest) in &self.choice_digests {
            let now = now.choice_digests.get(index).cloned();
            compare(&format!("digest of choice {index}"), Some(digest.clone()), now);
        }
        for (index, text) in &self.texts {
            match now.texts.get(index) {
                Some(now) if now == text => {}
                Some(now) => {
                    let same = text.chars().zip(now.chars()).take_while(|(a, b)| a == b).count();
                    found.push(format!("text of choice {index} differs from character {same} on"));
                }
                None => found.push(format!("choice {index} is not there")),
            }
        }
        if self.texts.len() < now.texts.len() && !self.texts.is_empty() {
            found.push(format!("there were {} choices and are {}", self.texts.len(), now.texts.len()));
        }
        found
    }
}

/// One connection, opened when it is needed and again when it was closed.
struct Connection {
    server: Arc<str>,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Connection {
    async fn ask(&mut self, entry: &Entry) -> Result<Facts, String> {
        let body = Bytes::from(serde_json::to_vec(&entry.request).map_err(|error| error.to_string())?);
        let mut broken = 0;
        for _ in 0..MOST_TRIES {
            match tokio::time::timeout(PATIENCE, self.post(&entry.endpoint, body.clone())).await {
                Err(_) => {
                    self.sender = None;
                    return Err(format!("no answer within {} s", PATIENCE.as_secs()));
                }
                // A server may close a connection that was idle; it has not seen the request then.
                Ok(Err(_)) if broken == 0 => {
                    broken += 1;
                    self.sender = None;
                }
                Ok(Err(error)) => {
                    self.sender = None;
                    return Err(error);
                }
                Ok(Ok(Answered::Busy(pause))) => tokio::time::sleep(pause).await,
                Ok(Ok(Answered::Facts(facts))) => return Ok(facts),
                Ok(Ok(Answered::Refused(why))) => return Err(why),
            }
        }
        Err(format!("the server was too busy {MOST_TRIES} times"))
    }

    async fn post(&mut self, path: &str, body: Bytes) -> Result<Answered, String> {
        let sender = match &mut self.sender {
            Some(sender) if !sender.is_closed() => sender,
            place => {
                let stream = TcpStream::connect(&*self.server)
                    .await
                    .map_err(|error| format!("cannot connect to {}: {error}", self.server))?;
                let (sender, connection) =
                    http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
                // It ends with its sender, and tells the sender why.
                tokio::spawn(connection);
                place.insert(sender)
            }
        };
        sender.ready().await.map_err(|error| error.to_string())?;
        let request = Request::post(path)
            .header(HOST, &*self.server)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, LARGEST_ANSWER).collect().await.map_err(|error| error.to_string())?.to_bytes();
        let body = String::from_utf8_lossy(&body);
        if matches!(head.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
            && let Some(seconds) = head.headers.get("retry-after")
        {
            let seconds = seconds.to_str().ok().and_then(|text| text.parse().ok());
            return Ok(Answered::Busy(seconds.map_or(PAUSE, Duration::from_secs).min(PATIENCE)));
        }
        if head.status != StatusCode::OK {
            let message = serde_json::from_str::<Value>(&body).ok();
            let message =
                message.and_then(|v| Some(v["error"]["message"].as_str().or(v["message"].as_str())?.to_owned()));
            let message = message.unwrap_or_else(|| body.chars().take(200).collect());
            return Ok(Answered::Refused(format!("the server says {}: {message}", head.status)));
        }
        let streams = head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind == "text/event-stream");
        let facts = if streams {
            Facts::of_events(&body)
        } else {
            serde_json::from_str(&body)
                .map(|answer| Facts::of(&answer))
                .map_err(|error| format!("the answer is no JSON: {error}"))
        };
        Ok(facts.map_or_else(Answered::Refused, Answered::Facts))
    }
}

enum Answered {
    Facts(Facts),
    /// To be asked again after so long.
    Busy(Duration),
    Refused(String),
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses() {
        let of = |url| authority(url);
        assert_eq!(of("http://127.0.0.1:8080").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(of("http://[::1]:9/").as_deref(), Some("[::1]:9"));
        assert_eq!(of("http://localhost").as_deref(), Some("localhost:80"));
        for wrong in ["", "127.0.0.1:8080", "https://a", "http://", "http://a/v1", "http://a?b", "ftp://a"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_recorded_fact_is_compared_and_no_other() {
        let answer = json!({"system_fingerprint": "fp_1", "seed": 3, "lockstep": {"seed": 3, "digest": "d",
            "choices": [{"index": 0, "digest": "a"}, {"index": 1, "digest": "b"}]},
            "choices": [{"index": 0, "text": "x"}, {"index": 1, "message": {"content": "yz"}}]});
        let now = Facts::of(&answer);
        assert_eq!(now.differences(&now), Vec::<String>::new());
        for (pointer, value, says) in [
            ("/system_fingerprint", json!("fp_2"), "system_fingerprint was fp_2 and is fp_1"),
            ("/lockstep/seed", json!(4), "seed was 4 and is 3"),
            ("/lockstep/digest", json!("e"), "digest was e and is d"),
            ("/lockstep/choices/1/digest", json!("c"), "digest of choice 1 was c and is b"),
            ("/choices/1/message/content", json!("yx"), "text of choice 1 differs from character 1 on"),
            ("/choices/0/index", json!(7), "choice 7 is not there"),
        ] {
            let mut recorded = answer.clone();
            *recorded.pointer_mut(pointer).unwrap() = value;
            assert!(Facts::of(&recorded).differences(&now).contains(&says.to_owned()), "{pointer}");
        }
        let receipt = Facts::of(&json!({"seed": 3, "digest": "d"}));
        assert_eq!(receipt.differences(&now), Vec::<String>::new());
        let fewer = Facts::of(&json!({"choices": [{"index": 0, "text": "x"}]}));
        assert_eq!(fewer.differences(&now), ["there were 1 choices and are 2"]);
        assert_eq!(receipt.differences(&Facts::default()).len(), 2);
    }

    #[test]
    fn lines_that_cannot_be_replayed_say_why() {
        let line = |value: Value| Entry::parse(&value.to_string());
        let response = json!({"digest": "d", "seed": 8});
        let good = json!({"endpoint": "/v1/completions", "request": {"prompt": "a"}, "response": response});
        assert_eq!(line(good.clone()).unwrap().request["seed"], 8);
        let mut seeded = good.clone();
        seeded["request"]["seed"] = json!(5);
        assert_eq!(line(seeded).unwrap().request["seed"], 5);
        assert!(Entry::parse("{").is_err());
        for (name, value, says) in [
            ("endpoint", Value::Null, "endpoint"),
            ("endpoint", json!("/cancel"), "/cancel"),
            ("request", json!([]), "request"),
            ("response", Value::Null, "compare"),
            ("response", json!({"digest": "d"}), "seed"),
        ] {
            let mut bad = good.clone();
            bad[name] = value;
            assert!(line(bad).unwrap_err().contains(says), "{name}");
        }
    }

    #[test]
    fn events_are_put_together() {
        let chat = "data: {\"system_fingerprint\":\"f\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n\
                    : keep-alive\n\n\
                    data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b\"}}],\"lockstep\":{\"seed\":1,\"digest\":\"d\"}}\n\n";
        assert!(Facts::of_events(chat).is_err());
        let facts = Facts::of_events(&format!("{chat}data: [DONE]\n\n")).unwrap();
        let expected = json!({"system_fingerprint": "f", "lockstep": {"seed": 1, "digest": "d"},
            "choices": [{"index": 0, "text": "ab"}]});
        assert_eq!(facts, Facts::of(&expected));
        let job = "event: started\ndata: {\"seed\":1}\n\nevent: token\ndata: {\"t\":\"ab\",\"i\":0}\n\n\
                   event: end\ndata: {\"system_fingerprint\":\"f\",\"lockstep\":{\"seed\":1,\"digest\":\"d\"}}\n\n";
        assert_eq!(Facts::of_events(job).unwrap(), facts);
        assert!(Facts::of_events("event: error\ndata: {\"code\":\"X\"}\n\n").unwrap_err().contains('X'));
    }
}
