//! The two ids that tie a request to log lines on both sides.

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use uuid::Uuid;

const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");
const REQUEST: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids are replaced: they go into every log line.
const LONGEST_REQUEST_ID: usize = 128;

/// The ids of one request, echoed on every response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequestIds {
    /// A UUID, the client's or a fresh one.
    pub(super) correlation: String,
    /// The client's own id, or a fresh one.
    pub(super) request: String,
}

impl RequestIds {
    pub(super) fn from_headers(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
        Self {
            correlation: text(CORRELATION)
                .filter(|id| is_uuid(id))
                .map_or_else(|| Uuid::new_v4().to_string(), str::to_owned),
            request: text(REQUEST)
                .filter(|id| (1..=LONGEST_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()))
                .map_or_else(|| format!("req-{}", Uuid::new_v4().simple()), str::to_owned),
        }
    }

    pub(super) fn stamp(&self, headers: &mut HeaderMap) {
        for (name, id) in [(CORRELATION, &self.correlation), (REQUEST, &self.request)] {
            // Both were checked to be plain ASCII.
            if let Ok(value) = HeaderValue::from_str(id) {
                headers.insert(name, value);
            }
        }
    }
}

/// 36 characters: hexadecimal digits in groups of 8, 4, 4, 4 and 12 with hyphens between.
fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(
            |(i, b)| {
                if matches!(i, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() }
            },
        )
}
