//! Routes, bodies, admission, and what every answer has in common.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::{Semaphore, watch};

use crate::engine;

use super::cancel::{Cancellation, Jobs};
use super::correlation::RequestIds;
use super::error::{ApiError, Shape};
use super::generation::Generation;
use super::receipt::Tally;
use super::record::Transcript;
use super::sse::{EventStream, Protocol};
use super::{App, cancel, chat, completions, execute, health};

/// A response's body: bytes at once or a stream of events.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Longer texts are encoded on a thread of their own: at some 5 MB/s, this many bytes take about 6 ms.
const ENCODED_INLINE: usize = 32 * 1024;

/// What the handlers share.
pub(super) struct Server {
    pub(super) app: App,
    pub(super) started: Instant,
    /// The jobs of `/execute`, by name.
    pub(super) jobs: Arc<Jobs>,
    draining: AtomicBool,
    in_flight: watch::Sender<usize>,
    /// Long texts encoded at the same time; more wait here, each holding one bounded body.
    encoders: Semaphore,
}

/// Counts a generation from admission until its last byte or its end.
pub(super) struct InFlight(Arc<Server>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}

impl Server {
    pub(super) fn new(app: App) -> Self {
        Self {
            app,
            started: Instant::now(),
            jobs: Arc::default(),
            draining: AtomicBool::new(false),
            in_flight: watch::Sender::new(0),
            encoders: Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)),
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub(super) fn start_draining(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Returns once no generation is running.
    pub(super) async fn wait_for_generations(&self) {
        // The sender lives in `self`, so it is never closed.
        let _ = self.in_flight.subscribe().wait_for(|count| *count == 0).await;
    }

    pub(super) fn generations_in_flight(&self) -> usize {
        *self.in_flight.borrow()
    }

    /// Refuses before any work is done on the request.
    fn admit(self: &Arc<Self>) -> Result<InFlight, ApiError> {
        // Counted first: a drain that begins now either is seen here or sees this request.
        self.in_flight.send_modify(|count| *count += 1);
        let in_flight = InFlight(Arc::clone(self));
        if self.is_draining() {
            return Err(ApiError::shutting_down());
        }
        let status = self.app.engine.status();
        if !status.healthy {
            return Err(ApiError::unhealthy(status.failure.as_deref().unwrap_or("no reason given")));
        }
        if status.waiting >= self.app.limits.waiting {
            return Err(ApiError::queue_full(self.app.limits.waiting));
        }
        Ok(in_flight)
    }

    pub(super) async fn encode(self: &Arc<Self>, text: String, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        let encoded = if text.len() < ENCODED_INLINE {
            self.app.tokenizer.encode(&text, add_special_tokens)
        } else {
            let Ok(_permit) = self.encoders.acquire().await else { return Err(ApiError::shutting_down()) };
            let server = Arc::clone(self);
            tokio::task::spawn_blocking(move || server.app.tokenizer.encode(&text, add_special_tokens))
                .await
                .map_err(|e| ApiError::internal(format!("the tokenizer failed: {e}")))?
        };
        encoded.map_err(|e| ApiError::invalid("prompt", e.to_string()))
    }

    /// All or none.
    pub(super) fn submit(
        &self,
        requests: Vec<engine::Request>,
        stop: &[String],
        cancellation: &Arc<Cancellation>,
    ) -> Result<Vec<Generation>, ApiError> {
        let (count, most) = (requests.len(), self.app.limits.waiting);
        if count > most {
            let message = format!("n answers to each prompt are {count} in all; at most {most} can wait");
            return Err(ApiError::invalid("n", message));
        }
        let mut generations = Vec::with_capacity(count);
        let mut submissions = Vec::with_capacity(count);
        for request in requests {
            let (tokenizer, cancellation) = (Arc::clone(&self.app.tokenizer), Arc::clone(cancellation));
            let (generation, sink) = Generation::new(tokenizer, &request, stop, cancellation);
            submissions.push((request, sink));
            generations.push(generation);
        }
        self.app.engine.submit_all(submissions)?;
        Ok(generations)
    }

    /// The record of an answer, where answers are recorded; `texts` is what each choice begins with.
    pub(super) fn transcript(
        &self,
        endpoint: &'static str,
        request: &Map<String, Value>,
        texts: impl FnOnce() -> Vec<String>,
        tally: &Tally,
    ) -> Option<Transcript> {
        let recorder = self.app.recorder.clone()?;
        let fingerprint = self.app.model.fingerprint.clone();
        Some(Transcript::new(recorder, endpoint, request.clone(), fingerprint, texts(), tally.clone()))
    }

    pub(super) fn stream(
        &self,
        generations: Vec<Generation>,
        protocol: Box<dyn Protocol>,
        transcript: Option<Transcript>,
        in_flight: InFlight,
    ) -> Response<Body> {
        let body = EventStream::new(generations, protocol, transcript, self.app.limits.keep_alive, in_flight);
        let mut response = Response::new(body.boxed_unsync());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // nginx would collect the events otherwise.
        headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        response
    }
}

pub(super) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed_unsync()
}

pub(super) fn json_response(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => {
            let mut response = Response::new(full(body));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(e) => ApiError::internal(format!("the answer cannot be written as JSON: {e}")).response(Shape::OpenAi),
    }
}

/// Answers one request; failures become responses here.
pub(super) async fn answer(server: Arc<Server>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let begun = Instant::now();
    let ids = RequestIds::from_headers(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let shape = if matches!(path.as_str(), "/execute" | "/cancel") { Shape::Worker } else { Shape::OpenAi };
    if let Some(deadline) = request.headers().get("x-deadline") {
        tracing::debug!(correlation_id = %ids.correlation, ?deadline, "deadline noted, not enforced");
    }
    let mut response = match route(&server, request, &path, &ids).await {
        Ok(response) => response,
        Err(error) => {
            let (correlation_id, code) = (&ids.correlation, error.code);
            if error.status.is_server_error() {
                tracing::error!(%correlation_id, code, retriable = error.is_retriable(), "{}", error.message);
            }
            error.response(shape)
        }
    };
    ids.stamp(response.headers_mut());
    tracing::info!(
        correlation_id = %ids.correlation,
        request_id = %ids.request,
        %method,
        path,
        status = response.status().as_u16(),
        milliseconds = begun.elapsed().as_secs_f64() * 1e3,
        "answered"
    );
    Ok(response)
}

async fn route(
    server: &Arc<Server>,
    request: Request<Incoming>,
    path: &str,
    ids: &RequestIds,
) -> Result<Response<Body>, ApiError> {
    let reads = |answer: Response<Body>| {
        if matches!(*request.method(), Method::GET | Method::HEAD) {
            Ok(answer)
        } else {
            Err(ApiError::method(path, "GET, HEAD"))
        }
    };
    match path {
        "/health" => return reads(health::health(server)),
        "/version" => return reads(health::version(server)),
        "/v1/models" => return reads(health::models(server)),
        "/v1/chat/completions" | "/v1/completions" | "/execute" | "/cancel" => {}
        _ => match path.strip_prefix("/v1/models/") {
            Some(id) => return health::model(server, &percent_decoded(id)).and_then(reads),
            None => return Err(ApiError::unknown_path(path)),
        },
    }
    if request.method() != Method::POST {
        return Err(ApiError::method(path, "POST"));
    }
    // The body is read before a refusal, or the client could miss the answer while it is still sending.
    let body = read_body(server, request).await?;
    if path == "/cancel" {
        return cancel::handle(server, &parse_object(&body)?, ids);
    }
    let in_flight = server.admit()?;
    let body = parse_object(&body)?;
    match path {
        "/v1/chat/completions" => chat::handle(server, &body, in_flight).await,
        "/v1/completions" => completions::handle(server, &body, in_flight).await,
        _ => execute::handle(server, &body, ids, in_flight).await,
    }
}

async fn read_body(server: &Server, request: Request<Incoming>) -> Result<Bytes, ApiError> {
    let headers = request.headers();
    if let Some(given) = headers.get(CONTENT_TYPE) {
        let given = given.to_str().unwrap_or_default().to_ascii_lowercase();
        let media_type = given.split(';').next().unwrap_or_default().trim();
        if media_type != "application/json" && !media_type.ends_with("+json") {
            return Err(ApiError::media_type(media_type));
        }
    }
    let limits = &server.app.limits;
    let announced = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > limits.body_bytes as u64) {
        return Err(ApiError::too_large(limits.body_bytes));
    }
    let body = Limited::new(request.into_body(), limits.body_bytes).collect();
    match tokio::time::timeout(limits.read_timeout, body).await {
        Err(_) => Err(ApiError::body_timeout()),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::too_large(limits.body_bytes)),
        Ok(Err(error)) => Err(ApiError::invalid(None, format!("the body could not be read: {error}"))),
    }
}

fn parse_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if body.is_empty() {
        return Err(ApiError::invalid(None, "the body is empty; send a JSON object"));
    }
    serde_json::from_slice::<Value>(body)
        .map_err(|e| ApiError::invalid(None, format!("the body is not valid JSON: {e}")).with_code("invalid_json"))
        .and_then(|value| match value {
            Value::Object(object) => Ok(object),
            other => {
                let kind = super::validate::kind_of(&other);
                Err(ApiError::invalid(None, format!("the body is {kind}; send a JSON object")))
            }
        })
}

/// `%2F` is `/`: names of models have slashes. Anything malformed stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let digit =
            |i: usize| after.get(i).and_then(|b| char::from(*b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        if let (b'%', Some(high), Some(low)) = (*first, digit(0), digit(1)) {
            bytes.push(high << 4 | low);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::percent_decoded;

    #[test]
    fn percent_encoding() {
        assert_eq!(percent_decoded("a%2Fb%2fc%e6%97%a5"), "a/b/c日");
        assert_eq!(percent_decoded("100%"), "100%");
        assert_eq!(percent_decoded("%zz%4"), "%zz%4");
    }
}
