//! Requests to the engine, and when each of their tokens came.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use host::engine::{Engine, Event, EventSink, Handle, Refused, Request, Sampling};
use host::ops::PAGE;
use host::testing::TestRng;

/// When a request was handed in and when each of its tokens came.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) submitted: Instant,
    pub(super) tokens: Vec<Instant>,
}

struct Recorder {
    life: Life,
    done: Sender<Result<Life, String>>,
}

impl EventSink for Recorder {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        match event {
            Event::Prompt(_) => {}
            Event::Token(_) => self.life.tokens.push(Instant::now()),
            // The receiver waits for all of them.
            Event::End(_) => self.done.send(Ok(self.life.clone())).map_err(|_| Refused::Gone)?,
            Event::Error(error) => self.done.send(Err(error.to_string())).map_err(|_| Refused::Gone)?,
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Greedy choice.
pub(super) fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// A prompt of `tokens` random tokens, another one for each `index`, which generates `max_tokens` whatever it says.
pub(super) fn request(vocab: usize, index: usize, tokens: usize, max_tokens: u32, sampling: Sampling) -> Request {
    let mut random = TestRng::new(((tokens as u64) << 32) + index as u64);
    Request {
        prompt: (0..tokens).map(|_| random.below(vocab as u64) as u32).collect(),
        max_tokens,
        sampling,
        ..Request::default()
    }
}

/// The length of a prompt of about `context` tokens of which only the last one is not in full pages: where the pages are
/// known, a request decodes from its first step on.
pub(super) fn decoding_length(context: usize) -> usize {
    if context < PAGE { context } else { context / PAGE * PAGE + 1 }
}

/// Hands all of them in and waits for all of their tokens; when this returns the engine has nothing to do.
pub(super) fn run(engine: &Handle, requests: Vec<Request>) -> anyhow::Result<Vec<Life>> {
    let count = requests.len();
    let (done, lives) = channel();
    for request in requests {
        let tokens = Vec::with_capacity(request.max_tokens as usize);
        let life = Life { submitted: Instant::now(), tokens };
        engine.submit(request, Box::new(Recorder { life, done: done.clone() }))?;
    }
    drop(done);
    let lives: Vec<Life> = lives.iter().take(count).collect::<Result<_, _>>().map_err(|error| anyhow!("{error}"))?;
    if lives.len() < count {
        bail!("the engine stopped: {}", engine.status().failure.unwrap_or_default());
    }
    while engine.status().running + engine.status().waiting > 0 {
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(lives)
}

/// Seconds of a step in which all of `lives` generate: from where the last of them began to where the first one ended,
/// by the clock of one of them, which gets one token a step.
pub(super) fn seconds_per_step(lives: &[Life]) -> Option<f64> {
    let last_to_begin = lives.iter().max_by_key(|life| life.tokens.first().copied())?;
    let first_end = lives.iter().filter_map(|life| life.tokens.last().copied()).min()?;
    let begin = *last_to_begin.tokens.first()?;
    // The steps of one moment are told one request after the other; the clock of one request is that of its own place.
    let within: Vec<_> = last_to_begin.tokens.iter().take_while(|&&token| token <= first_end).collect();
    let steps = within.len().checked_sub(1).filter(|&steps| steps > 0)?;
    Some((**within.last()? - begin).as_secs_f64() / steps as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(epoch: Instant, milliseconds: &[u64]) -> Life {
        let tokens = milliseconds.iter().map(|&at| epoch + Duration::from_millis(at)).collect();
        Life { submitted: epoch, tokens }
    }

    #[test]
    fn only_the_time_in_which_all_generate_counts() {
        let epoch = Instant::now();
        let of = |lives: &[&[u64]]| {
            let lives: Vec<_> = lives.iter().map(|times| life(epoch, times)).collect();
            seconds_per_step(&lives).map(|seconds| (seconds * 1e6).round() as u64)
        };
        assert_eq!(of(&[&[10, 20, 30]]), Some(10_000));
        // The second begins at 100; the first ends at 140. Steps there take 20 ms, before and after 1 ms.
        assert_eq!(of(&[&[98, 99, 100, 120, 140], &[100, 120, 140, 141, 142]]), Some(20_000));
        // They are told a little after one another.
        assert_eq!(of(&[&[100, 200, 300, 400], &[101, 201, 301, 401]]), Some(100_000));
        // Never all at once.
        assert_eq!(of(&[&[1, 2, 3], &[4, 5, 6]]), None);
        assert_eq!((of(&[]), of(&[&[]]), of(&[&[5]])), (None, None, None));
    }

    #[test]
    fn prompts_differ_and_are_the_same_again() {
        let prompt = |index, tokens| request(512, index, tokens, 1, greedy()).prompt;
        assert_eq!(prompt(3, 100), prompt(3, 100));
        assert_ne!(prompt(3, 100), prompt(4, 100));
        assert_ne!(prompt(3, 100)[..64], prompt(3, 128)[..64]);
        assert!(prompt(0, 1000).iter().all(|&id| id < 512));
        assert_eq!([1, 32, 64, 128, 130].map(decoding_length), [1, 32, 65, 129, 129]);
    }
}
