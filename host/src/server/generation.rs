//! One answer on its way from the engine's thread to an HTTP task: a bounded channel, then text.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::sync::mpsc;

use crate::engine::{EngineError, Event, EventSink, FinishReason, Refused, TokenEvent};
use crate::text::{Detokenizer, StopStrings, Tokenizer};

/// Events that may wait for a reader. At 300 tokens a second, most of a second; then the request is ended rather
/// than its tokens kept without bound.
pub(super) const EVENTS_WAITING: usize = 256;

struct Sink {
    events: mpsc::Sender<Event>,
    overflowed: Arc<AtomicBool>,
}

impl EventSink for Sink {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.events.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(_) => Refused::Gone,
            mpsc::error::TrySendError::Full(_) => {
                self.overflowed.store(true, Ordering::Release);
                Refused::Full
            }
        })
    }

    fn is_gone(&self) -> bool {
        self.events.is_closed()
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    Length,
    StopToken,
    /// The client's stop string with this index.
    StopString(usize),
    Failed(EngineError),
}

/// New text, with the tokens since the last piece. A piece has text, or an end, or both.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Kept on request only.
    pub(super) tokens: Vec<TokenEvent>,
    /// Tokens generated so far.
    pub(super) generated: u32,
    pub(super) end: Option<End>,
}

/// The reading half. Dropping it tells the engine that nobody reads any more.
pub(super) struct Generation {
    events: mpsc::Receiver<Event>,
    overflowed: Arc<AtomicBool>,
    detokenizer: Detokenizer,
    stop_strings: StopStrings,
    keep_tokens: bool,
    tokens: Vec<TokenEvent>,
    generated: u32,
    ended: bool,
}

impl Generation {
    /// `keep_tokens` hands tokens on beside their text.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, stop: &[String], keep_tokens: bool) -> (Self, Box<dyn EventSink>) {
        let (sender, events) = mpsc::channel(EVENTS_WAITING);
        let overflowed = Arc::new(AtomicBool::new(false));
        let this = Self {
            events,
            overflowed: Arc::clone(&overflowed),
            detokenizer: Detokenizer::new(tokenizer, true),
            stop_strings: StopStrings::new(stop),
            keep_tokens,
            tokens: Vec::new(),
            generated: 0,
            ended: false,
        };
        (this, Box::new(Sink { events: sender, overflowed }))
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// The next piece. After one with an end there are no more, and this must not be called again.
    pub(super) fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Piece> {
        loop {
            let end = match ready!(self.events.poll_recv(cx)) {
                Some(Event::Token(token)) => {
                    let text = self.detokenizer.push(token.id);
                    self.generated += 1;
                    if self.keep_tokens {
                        self.tokens.push(token);
                    }
                    let scan = self.stop_strings.push(&text);
                    if let Some(index) = scan.matched {
                        return Poll::Ready(self.end(scan.text, End::StopString(index)));
                    }
                    if scan.text.is_empty() {
                        continue;
                    }
                    return Poll::Ready(self.piece(scan.text, None));
                }
                Some(Event::End(finish)) => match finish.reason {
                    FinishReason::Length => End::Length,
                    FinishReason::StopToken(_) => End::StopToken,
                },
                Some(Event::Error(error)) => End::Failed(error),
                // The engine dropped the request without a last word.
                None if self.overflowed.load(Ordering::Acquire) => {
                    End::Failed(EngineError::SlowReader { limit: EVENTS_WAITING })
                }
                None => End::Failed(EngineError::Stopped),
            };
            let tail = self.detokenizer.flush();
            let mut scan = self.stop_strings.push(&tail);
            let end = match scan.matched {
                Some(index) => End::StopString(index),
                None => {
                    scan.text.push_str(&self.stop_strings.flush());
                    end
                }
            };
            return Poll::Ready(self.end(scan.text, end));
        }
    }

    fn piece(&mut self, text: String, end: Option<End>) -> Piece {
        Piece { text, tokens: std::mem::take(&mut self.tokens), generated: self.generated, end }
    }

    fn end(&mut self, text: String, end: End) -> Piece {
        self.ended = true;
        self.events.close();
        self.piece(text, Some(end))
    }
}

/// A whole answer.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenEvent>,
    pub(super) generated: u32,
    pub(super) end: Option<End>,
}

/// Waits for all answers at once, so that none of their channels fills up behind another.
pub(super) async fn collect(mut generations: Vec<Generation>) -> Result<Vec<Answer>, EngineError> {
    let mut answers: Vec<Answer> = generations.iter().map(|_| Answer::default()).collect();
    std::future::poll_fn(|cx| {
        let mut open = false;
        for (generation, answer) in generations.iter_mut().zip(&mut answers) {
            while !generation.is_ended() {
                let Poll::Ready(piece) = generation.poll_piece(cx) else {
                    open = true;
                    break;
                };
                answer.text.push_str(&piece.text);
                answer.tokens.extend(piece.tokens);
                answer.generated = piece.generated;
                if let Some(End::Failed(error)) = piece.end {
                    return Poll::Ready(Err(error));
                }
                answer.end = piece.end;
            }
        }
        if open { Poll::Pending } else { Poll::Ready(Ok(())) }
    })
    .await?;
    Ok(answers)
}
