//! What a client is told when a request is not answered: one type, two shapes on the wire.

use std::time::Duration;

use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;

use crate::engine::{EngineError, SubmitError};

use super::http::{Body, full};

/// How long a refused client should wait. One decode step frees a place at the earliest; a second is long enough
/// that retries do not become the load.
const RETRY: Duration = Duration::from_secs(1);

/// A violated rule of `/execute`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Violation {
    pub(super) field: &'static str,
    pub(super) constraint: String,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<String>,
}

/// The shape of an error body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// `{"code", "message", "retriable"}`, or `{"errors": [...]}` for violated rules.
    Worker,
}

/// A refusal or a failure before the first byte of an answer.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) code: Option<&'static str>,
    pub(super) param: Option<&'static str>,
    pub(super) message: String,
    pub(super) violations: Vec<Violation>,
    worker_code: &'static str,
    retry: bool,
    allow: Option<&'static str>,
    close: bool,
}

impl ApiError {
    fn new(status: StatusCode, worker_code: &'static str, message: String) -> Self {
        Self {
            status,
            code: None,
            param: None,
            message,
            violations: Vec::new(),
            worker_code,
            retry: false,
            allow: None,
            close: false,
        }
    }

    pub(super) fn invalid(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        let mut this = Self::new(StatusCode::BAD_REQUEST, "INVALID_REQUEST", message.into());
        this.param = param.into();
        this
    }

    pub(super) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(super) fn violations(violations: Vec<Violation>) -> Self {
        let mut this = Self::invalid(None, "the request is not valid");
        this.violations = violations;
        this
    }

    pub(super) fn unknown_path(path: &str) -> Self {
        let message = format!(
            "there is no {path} here; try /v1/chat/completions, /v1/completions, /v1/models, /execute, /cancel, /health or /version"
        );
        Self::new(StatusCode::NOT_FOUND, "NOT_FOUND", message).with_code("unknown_url")
    }

    pub(super) fn unknown_model(asked: &str, ours: &str) -> Self {
        let message = format!("the model {asked:?} is not served here; this server has {ours:?}");
        let mut this = Self::new(StatusCode::NOT_FOUND, "NOT_FOUND", message).with_code("model_not_found");
        this.param = Some("model");
        this
    }

    pub(super) fn method(path: &str, allow: &'static str) -> Self {
        let message = format!("{path} takes {allow}");
        let mut this =
            Self::new(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", message).with_code("method_not_allowed");
        this.allow = Some(allow);
        this
    }

    pub(super) fn media_type(given: &str) -> Self {
        let message = format!("the body is {given}; send JSON with the header content-type: application/json");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED_MEDIA_TYPE", message)
            .with_code("unsupported_media_type")
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        let mut this = Self::new(StatusCode::PAYLOAD_TOO_LARGE, "BODY_TOO_LARGE", message).with_code("body_too_large");
        // The rest of the body is not worth reading.
        this.close = true;
        this
    }

    pub(super) fn body_timeout() -> Self {
        let message = "the body did not arrive in time".to_owned();
        let mut this = Self::new(StatusCode::REQUEST_TIMEOUT, "BODY_TIMEOUT", message).with_code("body_timeout");
        this.close = true;
        this
    }

    pub(super) fn queue_full(limit: usize) -> Self {
        Self::try_later(format!("the queue is full ({limit} requests waiting); try again later"))
    }

    /// Too much waits already.
    fn try_later(message: String) -> Self {
        let mut this = Self::new(StatusCode::TOO_MANY_REQUESTS, "QUEUE_FULL", message).with_code("queue_full");
        this.retry = true;
        this
    }

    pub(super) fn shutting_down() -> Self {
        let message = "the server is shutting down; send the request to another one".to_owned();
        let mut this = Self::new(StatusCode::SERVICE_UNAVAILABLE, "SHUTTING_DOWN", message).with_code("shutting_down");
        this.retry = true;
        this.close = true;
        this
    }

    pub(super) fn unhealthy(reason: &str) -> Self {
        let message = format!("the engine has stopped: {reason}; restart the server");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "WORKER_UNHEALTHY", message).with_code("engine_stopped")
    }

    pub(super) fn internal(message: String) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", message).with_code("internal_error")
    }

    pub(super) fn is_retriable(&self) -> bool {
        self.retry
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            StatusCode::INTERNAL_SERVER_ERROR => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The error object of an OpenAI body, also sent when a stream breaks.
    pub(super) fn openai_body(&self) -> serde_json::Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }

    fn worker_body(&self) -> serde_json::Value {
        if self.violations.is_empty() {
            json!({"code": self.worker_code, "message": self.message, "retriable": self.retry})
        } else {
            json!({"errors": self.violations})
        }
    }

    pub(super) fn response(&self, shape: Shape) -> Response<Body> {
        let body = match shape {
            Shape::OpenAi => self.openai_body(),
            Shape::Worker => self.worker_body(),
        };
        let mut response = Response::new(full(body.to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.retry {
            headers.insert(RETRY_AFTER, HeaderValue::from(RETRY.as_secs()));
            let milliseconds = u64::try_from(RETRY.as_millis()).unwrap_or(u64::MAX);
            headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(milliseconds));
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match &error {
            SubmitError::QueueFull { limit } => Self::queue_full(*limit),
            SubmitError::QueueTokens { .. } => Self::try_later(error.to_string()),
            SubmitError::Stopped { reason } => Self::unhealthy(reason),
            SubmitError::EmptyPrompt => Self::invalid("prompt", error.to_string()),
            SubmitError::NoTokens => Self::invalid("max_tokens", error.to_string()),
            SubmitError::TooLong { .. } | SubmitError::NeverFits { .. } => {
                Self::invalid("max_tokens", error.to_string()).with_code("context_length_exceeded")
            }
            SubmitError::UnknownToken { .. } => Self::invalid("prompt", error.to_string()),
            SubmitError::OutOfRange { name, .. } => Self::invalid(*name, error.to_string()),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match &error {
            EngineError::Stopped => Self::shutting_down(),
            EngineError::NeverFits { .. } => {
                Self::invalid("max_tokens", error.to_string()).with_code("context_length_exceeded")
            }
            EngineError::Device(_)
            | EngineError::SlowReader
            | EngineError::Cancelled
            | EngineError::NoFiniteLogit { .. } => Self::internal(error.to_string()),
        }
    }
}

/// Whether the same request may succeed when sent again.
pub(super) fn is_retriable(error: &EngineError) -> bool {
    matches!(error, EngineError::Stopped | EngineError::SlowReader)
}
