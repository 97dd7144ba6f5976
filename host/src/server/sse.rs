//! Server-sent events: frames, and the response body that makes them from pieces of text as they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame};
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use crate::engine::EngineError;

use super::generation::{End, Generation, Piece};
use super::http::InFlight;
use super::record::Transcript;

/// Comments keep proxies from closing a silent connection; clients skip them.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Frames to be written, one chunk each.
#[derive(Default)]
pub(super) struct Frames(VecDeque<Bytes>);

impl Frames {
    /// `data: {...}`.
    pub(super) fn data(&mut self, value: &impl Serialize) {
        self.push(b"data: ", value);
    }

    /// `event: name` and its data.
    pub(super) fn event(&mut self, name: &str, value: &impl Serialize) {
        self.push(format!("event: {name}\ndata: ").as_bytes(), value);
    }

    /// The end of an OpenAI stream.
    pub(super) fn done(&mut self) {
        self.0.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }

    fn push(&mut self, head: &[u8], value: &impl Serialize) {
        let mut frame = Vec::with_capacity(256);
        frame.extend_from_slice(head);
        // JSON escapes line breaks, so one line holds any text. Writing plain structs to memory does not fail.
        if serde_json::to_writer(&mut frame, value).is_ok() {
            frame.extend_from_slice(b"\n\n");
            self.0.push_back(Bytes::from(frame));
        }
    }
}

/// What one API makes of the pieces.
pub(super) trait Protocol: Send {
    /// Before the first piece.
    fn open(&mut self, frames: &mut Frames);
    /// Text of the answer to prompt number `choice`; its end is never a failure.
    fn piece(&mut self, choice: usize, piece: Piece, frames: &mut Frames);
    /// After the end of the last answer.
    fn close(&mut self, frames: &mut Frames);
    /// Instead of everything that would follow.
    fn fail(&mut self, error: &EngineError, frames: &mut Frames);
}

/// Pulls pieces while the connection takes bytes. Dropped with the connection, which ends the work in the engine.
pub(super) struct EventStream {
    generations: Vec<Generation>,
    /// Where to look first, so that no answer starves another.
    turn: usize,
    protocol: Box<dyn Protocol>,
    transcript: Option<Transcript>,
    frames: Frames,
    finished: bool,
    silence: Pin<Box<Sleep>>,
    keep_alive: Duration,
    _in_flight: InFlight,
}

impl EventStream {
    pub(super) fn new(
        generations: Vec<Generation>,
        mut protocol: Box<dyn Protocol>,
        transcript: Option<Transcript>,
        keep_alive: Duration,
        in_flight: InFlight,
    ) -> Self {
        let mut frames = Frames::default();
        protocol.open(&mut frames);
        let silence = Box::pin(tokio::time::sleep(keep_alive));
        Self {
            generations,
            turn: 0,
            protocol,
            transcript,
            frames,
            finished: false,
            silence,
            keep_alive,
            _in_flight: in_flight,
        }
    }

    /// True when something was added to the frames.
    fn poll_pieces(&mut self, cx: &mut Context<'_>) -> bool {
        let count = self.generations.len();
        for offset in 0..count {
            let choice = (self.turn + offset) % count;
            if self.generations[choice].is_ended() {
                continue;
            }
            let Poll::Ready(piece) = self.generations[choice].poll_piece(cx) else { continue };
            self.turn = choice + 1;
            if let Some(End::Failed(error)) = &piece.end {
                self.protocol.fail(error, &mut self.frames);
                self.finish();
                return true;
            }
            if let Some(transcript) = &mut self.transcript {
                transcript.note(choice, &piece);
            }
            self.protocol.piece(choice, piece, &mut self.frames);
            if self.generations.iter().all(Generation::is_ended) {
                self.protocol.close(&mut self.frames);
                if let Some(transcript) = self.transcript.take() {
                    transcript.finish();
                }
                self.finish();
            }
            return true;
        }
        false
    }

    fn finish(&mut self) {
        self.finished = true;
        self.generations.clear();
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            if let Some(frame) = this.frames.0.pop_front() {
                this.silence.as_mut().reset(Instant::now() + this.keep_alive);
                return Poll::Ready(Some(Ok(Frame::data(frame))));
            }
            if this.finished {
                return Poll::Ready(None);
            }
            if this.poll_pieces(cx) {
                continue;
            }
            if this.silence.as_mut().poll(cx).is_ready() {
                this.frames.0.push_back(Bytes::from_static(KEEP_ALIVE));
                continue;
            }
            return Poll::Pending;
        }
    }
}
