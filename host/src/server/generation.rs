//! One answer on its way from the engine's thread to an HTTP task: a bounded channel, then text.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::sync::mpsc;

use crate::engine::{EngineError, Event, EventSink, FinishReason, Refused, Request, TokenEvent};
use crate::text::{Detokenizer, Scan, StopStrings, Tokenizer};

use super::cancel::Cancellation;
use super::receipt::{ChoiceDigest, Digesting};

/// Events that may wait for a reader. At 300 tokens a second, most of a second; then the request is ended rather
/// than its tokens kept without bound.
pub(super) const EVENTS_WAITING: usize = 256;

struct Sink {
    events: mpsc::Sender<Event>,
    overflowed: Arc<AtomicBool>,
    cancellation: Arc<Cancellation>,
}

impl EventSink for Sink {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        if self.cancellation.is_cancelled() {
            return Err(Refused::Gone);
        }
        // The last place is kept for the last word: an answer that is complete must not fail for want of it. There is
        // one sender, so the count cannot shrink behind its back.
        if matches!(event, Event::Token(_)) && self.events.capacity() <= 1 && !self.events.is_closed() {
            self.overflowed.store(true, Ordering::Release);
            return Err(Refused::Full);
        }
        self.events.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(_) => Refused::Gone,
            mpsc::error::TrySendError::Full(_) => Refused::Full,
        })
    }

    fn is_gone(&self) -> bool {
        // The reader may be stuck in a connection that takes nothing; the engine does not wait for it.
        self.events.is_closed() || self.cancellation.is_cancelled()
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

/// New text, with the tokens since the last piece. A piece has text, or an end, or both, or the prompt's tokens alone.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    /// On request: the prompt's tokens with their log-probabilities.
    pub(super) prompt: Vec<TokenEvent>,
    /// Kept on request only.
    pub(super) tokens: Vec<TokenEvent>,
    /// Tokens generated so far.
    pub(super) generated: u32,
    /// Tokens of the prompt that were computed already. Known with the engine's own end only: an answer cut at a stop
    /// string does not wait for it.
    pub(super) cached: u32,
    /// With the end, unless it is a failure.
    pub(super) digest: Option<ChoiceDigest>,
    pub(super) end: Option<End>,
}

/// The reading half. Dropping it tells the engine that nobody reads any more.
pub(super) struct Generation {
    events: mpsc::Receiver<Event>,
    overflowed: Arc<AtomicBool>,
    cancellation: Arc<Cancellation>,
    detokenizer: Detokenizer,
    stop_strings: StopStrings,
    min_tokens: u32,
    seed: u64,
    digesting: Digesting,
    keep_tokens: bool,
    tokens: Vec<TokenEvent>,
    generated: u32,
    cached: u32,
    ended: bool,
}

impl Generation {
    /// Reads what `request` is answered, up to one of the strings of `stop`. Where log-probabilities are asked for, the
    /// tokens are handed on beside their text.
    pub(super) fn new(
        tokenizer: Arc<Tokenizer>,
        request: &Request,
        stop: &[String],
        cancellation: Arc<Cancellation>,
    ) -> (Self, Box<dyn EventSink>) {
        let (sender, events) = mpsc::channel(EVENTS_WAITING + 1);
        let overflowed = Arc::new(AtomicBool::new(false));
        let this = Self {
            events,
            overflowed: Arc::clone(&overflowed),
            cancellation: Arc::clone(&cancellation),
            detokenizer: Detokenizer::new(tokenizer, true),
            stop_strings: StopStrings::new(stop),
            min_tokens: request.min_tokens,
            seed: request.sampling.seed,
            digesting: Digesting::new(request),
            keep_tokens: request.logprobs.is_some(),
            tokens: Vec::new(),
            generated: 0,
            cached: 0,
            ended: false,
        };
        (this, Box::new(Sink { events: sender, overflowed, cancellation }))
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// The next piece. After one with an end there are no more, and this must not be called again.
    pub(super) fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Piece> {
        if self.cancellation.poll_cancelled(cx) {
            return Poll::Ready(self.end(String::new(), End::Failed(EngineError::Cancelled)));
        }
        loop {
            let end = match ready!(self.events.poll_recv(cx)) {
                Some(Event::Token(token)) => {
                    let text = self.detokenizer.push(token.id);
                    self.generated += 1;
                    self.digesting.token(&token);
                    if self.keep_tokens {
                        self.tokens.push(token);
                    }
                    let scan = self.scan(&text);
                    if let Some(index) = scan.matched {
                        return Poll::Ready(self.end(scan.text, End::StopString(index)));
                    }
                    if scan.text.is_empty() {
                        continue;
                    }
                    return Poll::Ready(self.piece(scan.text, None));
                }
                Some(Event::Prompt(prompt)) => {
                    self.digesting.prompt(&prompt);
                    return Poll::Ready(Piece { prompt, ..self.piece(String::new(), None) });
                }
                Some(Event::End(finish)) => {
                    self.cached = finish.cached_tokens;
                    match finish.reason {
                        FinishReason::Length => End::Length,
                        FinishReason::StopToken(_) => End::StopToken,
                    }
                }
                Some(Event::Error(error)) => End::Failed(error),
                // The engine dropped the request without a last word.
                None if self.overflowed.load(Ordering::Acquire) => End::Failed(EngineError::SlowReader),
                None => End::Failed(EngineError::Stopped),
            };
            let tail = self.detokenizer.flush();
            let mut scan = self.scan(&tail);
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

    /// Looks for stop strings behind the first `min_tokens` tokens.
    fn scan(&mut self, text: &str) -> Scan {
        if self.generated <= self.min_tokens && self.min_tokens > 0 {
            return Scan { text: self.stop_strings.pass(text), matched: None };
        }
        self.stop_strings.push(text)
    }

    fn piece(&mut self, text: String, end: Option<End>) -> Piece {
        let succeeded = end.as_ref().is_some_and(|end| !matches!(end, End::Failed(_)));
        Piece {
            text,
            prompt: Vec::new(),
            tokens: std::mem::take(&mut self.tokens),
            generated: self.generated,
            cached: self.cached,
            digest: succeeded.then(|| ChoiceDigest { seed: self.seed, digest: self.digesting.finish() }),
            end,
        }
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
    /// On request.
    pub(super) prompt: Vec<TokenEvent>,
    pub(super) tokens: Vec<TokenEvent>,
    pub(super) end: Option<End>,
}

/// Waits for all answers at once, so that none of their channels fills up behind another.
///
/// `note` is told each piece and its choice.
pub(super) async fn collect(
    mut generations: Vec<Generation>,
    mut note: impl FnMut(usize, &Piece),
) -> Result<Vec<Answer>, EngineError> {
    let mut answers: Vec<Answer> = generations.iter().map(|_| Answer::default()).collect();
    std::future::poll_fn(|cx| {
        let mut open = false;
        for (choice, (generation, answer)) in generations.iter_mut().zip(&mut answers).enumerate() {
            while !generation.is_ended() {
                let Poll::Ready(piece) = generation.poll_piece(cx) else {
                    open = true;
                    break;
                };
                note(choice, &piece);
                answer.text.push_str(&piece.text);
                answer.prompt.extend(piece.prompt);
                answer.tokens.extend(piece.tokens);
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tokenizers::models::bpe::BPE;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use crate::engine::Finish;

    use super::*;

    fn tokenizer() -> Arc<Tokenizer> {
        let vocab: HashMap<String, u32> = [("a".to_owned(), 0), ("b".to_owned(), 1)].into();
        let mut inner = tokenizers::Tokenizer::new(BPE::new(vocab.into_iter().collect(), vec![]));
        inner.with_decoder(Some(ByteLevel::default()));
        Arc::new(Tokenizer::new(inner, vec![]))
    }

    fn token(id: u32) -> Event {
        Event::Token(TokenEvent { id, logprob: None, top: vec![] })
    }

    const END: Event =
        Event::End(Finish { reason: FinishReason::Length, prompt_tokens: 1, generated_tokens: 256, cached_tokens: 0 });

    fn generation(stop: &[String], request: &Request) -> (Generation, Box<dyn EventSink>) {
        Generation::new(tokenizer(), request, stop, Arc::default())
    }

    fn collected(generation: Generation) -> Result<Answer, EngineError> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(collect(vec![generation], |_, _| {})).map(|mut answers| answers.remove(0))
    }

    #[test]
    fn a_full_channel_still_takes_the_end() {
        let (generation, mut sink) = generation(&[], &Request::default());
        for _ in 0..EVENTS_WAITING {
            assert_eq!(sink.offer(token(0)), Ok(()));
        }
        assert_eq!(sink.offer(END), Ok(()));
        assert_eq!(sink.offer(END), Err(Refused::Full));
        let answer = collected(generation).unwrap();
        assert_eq!((answer.text, answer.end), ("a".repeat(EVENTS_WAITING), Some(End::Length)));
        assert!(sink.is_gone());
        assert_eq!(sink.offer(token(0)), Err(Refused::Gone));
    }

    #[test]
    fn a_reader_that_is_too_slow_hears_so() {
        let (generation, mut sink) = generation(&[], &Request::default());
        for _ in 0..EVENTS_WAITING {
            assert_eq!(sink.offer(token(0)), Ok(()));
        }
        assert_eq!(sink.offer(token(0)), Err(Refused::Full));
        drop(sink);
        assert_eq!(collected(generation).unwrap_err(), EngineError::SlowReader);
    }

    #[test]
    fn a_cancellation_reaches_the_engine_without_the_reader() {
        let cancellation = Arc::new(Cancellation::default());
        let (generation, mut sink) = Generation::new(tokenizer(), &Request::default(), &[], Arc::clone(&cancellation));
        assert_eq!((sink.offer(token(0)), sink.is_gone()), (Ok(()), false));
        cancellation.cancel();
        assert_eq!((sink.offer(token(0)), sink.is_gone()), (Err(Refused::Gone), true));
        assert_eq!(collected(generation).unwrap_err(), EngineError::Cancelled);
    }

    #[test]
    fn a_stop_string_ends_the_generation_for_the_engine() {
        let request = Request { logprobs: Some(0), ..Request::default() };
        let (generation, mut sink) = generation(&["ab".to_owned()], &request);
        for id in [1, 0, 0, 1, 0] {
            sink.offer(token(id)).unwrap();
        }
        assert!(!sink.is_gone());
        let answer = collected(generation).unwrap();
        assert_eq!((answer.text.as_str(), answer.end), ("ba", Some(End::StopString(0))));
        assert_eq!(answer.tokens.len(), 4);
        assert!(sink.is_gone());
    }

    #[test]
    fn stop_strings_are_not_looked_for_before_the_minimum() {
        let said = |stop: &str, min_tokens| {
            let (generation, mut sink) = generation(&[stop.to_owned()], &Request { min_tokens, ..Request::default() });
            for id in [0, 1, 0, 1, 0, 1] {
                sink.offer(token(id)).unwrap();
            }
            let _ = sink.offer(END);
            let answer = collected(generation).unwrap();
            (answer.text, answer.end == Some(End::StopString(0)))
        };
        assert_eq!(said("ab", 0), (String::new(), true));
        assert_eq!(said("ab", 1), (String::new(), true), "it is complete behind the minimum");
        assert_eq!(said("ab", 2), ("ab".to_owned(), true));
        assert_eq!(said("ab", 3), ("ab".to_owned(), true));
        assert_eq!(said("abab", 4), ("ab".to_owned(), true), "what overlaps with one passed over counts");
        assert_eq!(said("ab", 5), ("abab".to_owned(), true));
        assert_eq!(said("ab", 6), ("ababab".to_owned(), false));
    }
}
