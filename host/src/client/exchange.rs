//! One connection, and one request at a time over it.

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::events::{Events, Said};
use super::{Outcome, Target};

/// A connection that is kept from one request to the next.
pub(super) struct Connection(SendRequest<Full<Bytes>>);

impl Connection {
    pub(super) async fn open(target: &Target) -> Result<Self, String> {
        let stream = TcpStream::connect(&target.authority).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        // It ends when the sender is dropped or the server closes; what went wrong comes out of the request.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self(sender))
    }

    pub(super) fn is_open(&self) -> bool {
        !self.0.is_closed()
    }

    pub(super) async fn get(&mut self, target: &Target, path: &str) -> Result<(u16, Vec<u8>), String> {
        let request = request(target, Method::GET, path, Bytes::new())?;
        let answer = self.0.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map_err(|error| error.to_string())?;
        Ok((status, body.to_bytes().to_vec()))
    }

    /// Reads the answer to its end; `note` hears how many tokens have come as soon as they have.
    pub(super) async fn post(
        &mut self,
        target: &Target,
        path: &str,
        body: Bytes,
        mut note: impl FnMut(u32),
    ) -> Outcome {
        let sent = async {
            self.0.ready().await.ok()?;
            self.0.send_request(request(target, Method::POST, path, body).ok()?).await.ok()
        };
        let Some(answer) = sent.await else { return Outcome::NoConnection };
        if !answer.status().is_success() {
            return Outcome::Status(answer.status().as_u16());
        }
        let (mut body, mut events, mut outcome) = (answer.into_body(), Events::default(), Outcome::CutOff);
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { break };
            let Some(bytes) = frame.data_ref() else { continue };
            events.take(bytes, |said| match said {
                Said::Tokens(count) => note(count),
                Said::Nothing => {}
                Said::Error => outcome = Outcome::ErrorEvent,
                Said::Done if outcome == Outcome::CutOff => outcome = Outcome::Complete,
                Said::Done => {}
            });
        }
        outcome
    }
}

fn request(target: &Target, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
    Request::builder()
        .method(method)
        .uri(format!("{}{path}", target.prefix))
        .header(HOST, &target.authority)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| error.to_string())
}
