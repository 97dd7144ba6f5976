//! One request put to the engine, and its events turned into output.

use std::fmt;
use std::io::Write;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use host::engine::{Engine, Event, EventSink, Finish, FinishReason, Refused, Request, TokenEvent};
use host::text::{Detokenizer, Tokenizer};
use serde::Serialize;

/// How the answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Text (without a tokenizer: ids) as the tokens come.
    Stream,
    /// One object at the end.
    Json,
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct Answer {
    tokens: Vec<u32>,
    /// `null` when the model has no tokenizer.
    text: Option<String>,
    /// Per position the most likely tokens, then the chosen one if it is not among them; natural log, before temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<Vec<(u32, f32)>>>,
    finish_reason: &'static str,
    seed: u64,
}

/// What there is to say about an answer besides itself.
pub(super) struct Summary {
    finish: Finish,
    seed: u64,
    /// From the first token to the end.
    decode: Duration,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finish { reason, prompt_tokens, generated_tokens, .. } = self.finish;
        write!(f, "{prompt_tokens} + {generated_tokens} tokens, ")?;
        if generated_tokens > 1 && !self.decode.is_zero() {
            let rate = f64::from(generated_tokens - 1) / self.decode.as_secs_f64();
            write!(f, "{rate:.1} tokens/s, ")?;
        }
        write!(f, "seed {}, {}", self.seed, finish_reason(reason))
    }
}

/// Asks the engine and prints what it says.
pub(super) fn answer(
    engine: &dyn Engine,
    tokenizer: Option<&Arc<Tokenizer>>,
    request: Request,
    form: Form,
    out: &mut dyn Write,
) -> anyhow::Result<Summary> {
    let seed = request.sampling.seed;
    let wants_logprobs = request.logprobs.is_some();
    let alive = Arc::new(());
    // Not bounded, because the request is: at most `max_tokens` events and one end.
    let (sender, events) = mpsc::channel();
    engine.submit(request, Box::new(Sink { sender, reader: Arc::downgrade(&alive) }))?;
    let mut detokenizer = tokenizer.map(|tokenizer| Detokenizer::new(Arc::clone(tokenizer), true));
    let (mut tokens, mut text, mut logprobs) = (Vec::new(), String::new(), Vec::new());
    let mut first_token = None;
    let finish = loop {
        match events.recv() {
            Ok(Event::Token(token)) => {
                first_token.get_or_insert_with(Instant::now);
                let piece = match &mut detokenizer {
                    Some(detokenizer) => detokenizer.push(token.id),
                    None => format!("{} ", token.id),
                };
                match form {
                    Form::Stream => print(out, &piece)?,
                    Form::Json => text.push_str(&piece),
                }
                tokens.push(token.id);
                logprobs.push(most_likely(token));
            }
            Ok(Event::Prompt(_)) => {}
            Ok(Event::End(finish)) => break finish,
            Ok(Event::Error(error)) => {
                end_line(form, out)?;
                return Err(anyhow!(error));
            }
            Err(mpsc::RecvError) => {
                end_line(form, out)?;
                bail!("the engine ended without completing the answer");
            }
        }
    };
    let decode = first_token.map_or(Duration::ZERO, |first| first.elapsed());
    let rest = detokenizer.as_mut().map(Detokenizer::flush).unwrap_or_default();
    match form {
        Form::Stream => print(out, &rest)?,
        Form::Json => {
            text.push_str(&rest);
            let object = Answer {
                tokens,
                text: detokenizer.is_some().then_some(text),
                logprobs: wants_logprobs.then_some(logprobs),
                finish_reason: finish_reason(finish.reason),
                seed,
            };
            out.write_all(serde_json::to_string(&object)?.as_bytes())?;
            writeln!(out)?;
        }
    }
    end_line(form, out)?;
    drop(alive);
    Ok(Summary { finish, seed, decode })
}

fn print(out: &mut dyn Write, piece: &str) -> std::io::Result<()> {
    if piece.is_empty() {
        return Ok(());
    }
    out.write_all(piece.as_bytes())?;
    out.flush()
}

fn end_line(form: Form, out: &mut dyn Write) -> std::io::Result<()> {
    if form == Form::Stream {
        writeln!(out)?;
    }
    out.flush()
}

fn most_likely(token: TokenEvent) -> Vec<(u32, f32)> {
    let mut listed = token.top;
    if let Some(own) = token.logprob
        && !listed.iter().any(|(id, _)| *id == token.id)
    {
        listed.push((token.id, own));
    }
    listed
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::StopToken(_) => "stop",
    }
}

/// The engine's end of the channel; knows by the reader's token whether anybody still listens.
struct Sink {
    sender: Sender<Event>,
    reader: Weak<()>,
}

impl EventSink for Sink {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.sender.send(event).map_err(|_| Refused::Gone)
    }

    fn is_gone(&self) -> bool {
        self.reader.strong_count() == 0
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
