//! Company, steps, cache, memory and pages change no bit of an answer: the lines of `lockstep verify --batch`.

use std::sync::Arc;

use super::Line;
use super::rehearsal::{
    LONGEST, Running, TokenBits, WATCHED_PROMPT, alone, collect, others, request, roomy, together, tokens,
    watched_greedy, watched_sampled,
};
use crate::device::DeviceError;
use crate::engine::{CacheSize, EngineOptions, Request, Sampling, Status, Trial};
use crate::model::Model;
use crate::ops::PAGE;

/// How much company the watched requests get.
const COMPANY: [usize; 7] = [1, 7, 8, 9, 31, 64, 255];

/// Tokens of a step.
const BUDGETS: [usize; 4] = [16, 64, 100, 512];

/// Sizes for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// So many others at most.
    pub company: usize,
    /// Others in the runs that are about something else.
    pub few: usize,
}

impl Size {
    /// Everything.
    pub const FULL: Self = Self { company: 255, few: 9 };

    /// With `others` at most, of whom there are 255.
    #[must_use]
    pub fn with_company(others: usize) -> Self {
        Self { company: others.min(Self::FULL.company), few: others.min(Self::FULL.few) }
    }
}

/// What was compared, and how much of it differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    tokens: usize,
    wrong_tokens: usize,
    values: usize,
    wrong_values: usize,
}

impl Tally {
    fn compare(&mut self, expected: &[TokenBits], actual: &[TokenBits]) {
        for index in 0..expected.len().max(actual.len()) {
            let (Some(expected), Some(actual)) = (expected.get(index), actual.get(index)) else {
                // One of them ended earlier.
                self.tokens += 1;
                self.wrong_tokens += 1;
                continue;
            };
            self.tokens += 1;
            self.wrong_tokens += usize::from(expected.id != actual.id);
            let (expected, actual) = (values(expected), values(actual));
            self.values += expected.len().max(actual.len());
            let equal = expected.iter().zip(&actual).filter(|(a, b)| a == b && !f32::from_bits(a.1).is_nan()).count();
            self.wrong_values += expected.len().max(actual.len()) - equal;
        }
    }

    fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.wrong_tokens += other.wrong_tokens;
        self.values += other.values;
        self.wrong_values += other.wrong_values;
    }

    fn holds(&self) -> bool {
        self.tokens > 0 && self.wrong_tokens == 0 && self.wrong_values == 0
    }

    fn line(&self, claim: impl Into<String>) -> Line {
        self.line_if(claim, true, "")
    }

    /// A line that also wants something else, and says it.
    fn line_if(&self, claim: impl Into<String>, also: bool, said: &str) -> Line {
        let detail = format!(
            "{} of {} tokens and {} of {} log-probabilities differ{said}",
            self.wrong_tokens, self.tokens, self.wrong_values, self.values
        );
        Line::new(claim, detail, self.holds() && also)
    }
}

/// Ids and bits of all log-probabilities of a token; its own under its id.
fn values(token: &TokenBits) -> Vec<(u32, u32)> {
    token.logprob.map(|bits| (token.id, bits)).into_iter().chain(token.top.iter().copied()).collect()
}

/// Requests, and the answers that they get alone.
struct Known {
    requests: Vec<Request>,
    answers: Vec<Vec<TokenBits>>,
}

impl Known {
    fn of(model: &Arc<Model>, requests: Vec<Request>) -> Result<Self, DeviceError> {
        let answer = |request| Ok(alone(model, request)?.tokens);
        let answers = requests.iter().map(answer).collect::<Result<_, DeviceError>>()?;
        Ok(Self { requests, answers })
    }

    /// The answers to all of them together under `options`, compared with those alone.
    fn compare(&self, model: &Arc<Model>, options: EngineOptions, seed: u64) -> Result<(Tally, Status), DeviceError> {
        let (answers, status) = together(model, options, &self.requests, seed)?;
        let mut tally = Tally::default();
        for (expected, actual) in self.answers.iter().zip(&answers) {
            tally.compare(expected, &actual.tokens);
        }
        Ok((tally, status))
    }
}

/// Checks all of it. `report` is told each line as soon as it is known.
///
/// # Errors
/// A context too short for the requests, or the device's error.
pub(super) fn check(model: &Arc<Model>, size: Size, report: &mut dyn FnMut(Line)) -> Result<(), DeviceError> {
    if model.context_tokens() < LONGEST {
        return Err(DeviceError::InvalidParameter(format!(
            "a context of {} tokens; the batch suite's requests need {LONGEST}",
            model.context_tokens()
        )));
    }
    let watched = Known::of(model, vec![watched_greedy(model), watched_sampled(model)])?;
    company(model, &watched, size.company, report)?;
    let mut requests = others(model, size.few);
    requests.extend(watched.requests.iter().cloned());
    let known = Known::of(model, requests)?;
    budgets(model, &known, report)?;
    warm_cache(model, &watched.requests[1], report)?;
    report(preemption(model)?);
    report(log_probabilities(model, &watched)?);
    for mix in [Mix::Greedy, Mix::Drawn, Mix::Penalised] {
        report(ahead(model, mix)?);
    }
    report(poison(model, &known)?);
    report(page_tables(model, &known)?);
    report(two_engines(model, &known)?);
    report(another_seed(model, &watched)?);
    Ok(())
}

/// The watched requests first, in the middle and last among more and more others, who are watched too: by themselves, in
/// the other runs.
fn company(model: &Arc<Model>, watched: &Known, most: usize, report: &mut dyn FnMut(Line)) -> Result<(), DeviceError> {
    let others = others(model, most.max(1) - 1);
    let mut known: Vec<Option<Vec<TokenBits>>> = vec![None; others.len()];
    for count in COMPANY.into_iter().filter(|&count| count <= most) {
        let (mut tally, mut rest) = (Tally::default(), Tally::default());
        // Where the two are among all: each of them is first, in the middle, and last.
        let mut places = vec![[0, count], [count, 0], [count / 2, count / 2 + 1]];
        places.truncate(count + 1);
        for (number, places) in places.into_iter().enumerate() {
            let mut company = others.iter();
            let requests: Vec<Request> = (0..=count)
                .filter_map(|place| match places.iter().position(|&watched| watched == place) {
                    Some(which) => watched.requests.get(which),
                    None => company.next(),
                })
                .cloned()
                .collect();
            let seed = (10 * count + number) as u64;
            let (answers, _) = together(model, roomy(model, &requests), &requests, seed)?;
            let mut known = known.iter_mut();
            for (place, answer) in answers.into_iter().enumerate() {
                if let Some(which) = places.iter().position(|&watched| watched == place) {
                    tally.compare(&watched.answers[which], &answer.tokens);
                } else if let Some(known) = known.next() {
                    match known {
                        Some(known) => rest.compare(known, &answer.tokens),
                        None => *known = Some(answer.tokens),
                    }
                }
            }
        }
        report(tally.line(format!("alone = first, in the middle, last among {count} others")));
        if rest.tokens > 0 {
            report(rest.line(format!("those {} others = themselves in the other runs", count - 1)));
        }
    }
    Ok(())
}

fn budgets(model: &Arc<Model>, known: &Known, report: &mut dyn FnMut(Line)) -> Result<(), DeviceError> {
    let whole = known.requests.iter().map(|request| request.prompt.len()).sum::<usize>() + known.requests.len() + 1;
    for chunk_tokens in BUDGETS.into_iter().chain([whole]) {
        let options = EngineOptions { chunk_tokens, ..roomy(model, &known.requests) };
        let (tally, _) = known.compare(model, options, chunk_tokens as u64)?;
        let name = if chunk_tokens == whole { " (every prompt whole)" } else { "" };
        report(
            tally.line(format!("alone = among {} in steps of {chunk_tokens} tokens{name}", known.requests.len() - 1)),
        );
    }
    let options = EngineOptions { max_running: 2, ..roomy(model, &known.requests) };
    let (tally, _) = known.compare(model, options, 2)?;
    report(tally.line(format!("alone = among {}, two at a time", known.requests.len() - 1)));
    Ok(())
}

/// One engine answers what its cache has pages of; a new one each time answers the same from nothing.
fn warm_cache(model: &Arc<Model>, watched: &Request, report: &mut dyn FnMut(Line)) -> Result<(), DeviceError> {
    // Long enough to fill a page while decoding.
    let first = Request { max_tokens: 60, ..watched.clone() };
    let options = EngineOptions { cache: CacheSize::Pages(64), ..roomy(model, &[]) };
    let warm = Running::new(model, options)?;
    let cold = warm.ask(&first)?;
    let whole = [first.prompt.clone(), cold.ids()].concat();
    let mut strange = whole[..whole.len().min(200)].to_vec();
    if let Some(token) = strange.get_mut(PAGE + 6) {
        *token ^= 1;
    }
    let cut = |length: usize| whole[..length.min(whole.len())].to_vec();
    let lines = [
        ("prompt pages: full ones", vec![(cut(WATCHED_PROMPT), 128), (cut(129), 128)]),
        ("prompt pages: half ones are not taken", vec![(cut(128), 64), (cut(127), 64), (cut(100), 64), (cut(64), 0)]),
        ("prompt pages: another token in the second", vec![(strange, 64)]),
        ("pages filled while decoding", vec![(cut(200), 192), (cut(210), 192)]),
    ];
    for (name, prompts) in lines {
        let (mut tally, mut found, mut due) = (Tally::default(), 0, 0);
        for (prompt, cached) in prompts {
            let request = Request { prompt, max_tokens: 9, ..first.clone() };
            let answer = warm.ask(&request)?;
            found += answer.finish.cached_tokens;
            due += cached;
            tally.compare(&alone(model, &request)?.tokens, &answer.tokens);
        }
        let said = format!("; {found} of {due} tokens came from the cache");
        report(tally.line_if(format!("cold = warm cache, {name}"), found == due, &said));
    }
    let mut tally = Tally::default();
    let salted = Request { cache_salt: Some("mine".to_owned()), ..first.clone() };
    let mut found = Vec::new();
    for request in [&salted, &salted, &first] {
        let answer = warm.ask(request)?;
        found.push(answer.finish.cached_tokens);
        tally.compare(&cold.tokens, &answer.tokens);
    }
    let said = format!("; {found:?} tokens came from the cache");
    report(tally.line_if("cold = warm cache, with another salt and without", found == [0, 128, 128], &said));
    let status = warm.settled()?;
    let holds = status.pages.hits > 0 && status.pages.misses > 0;
    report(Line::new("the warm cache gave every page back", format!("{:?}", status.pages), holds));
    Ok(())
}

/// A cache in which not all have room: some give up their pages and are computed again.
fn preemption(model: &Arc<Model>) -> Result<Line, DeviceError> {
    // Each begins with one page and needs four in the end.
    let requests = (0..6).map(|index| {
        let sampling = Sampling { seed: index, frequency_penalty: 0.3, ..Sampling::default() };
        let prompt = tokens(model, 20 + 5 * index as usize, 50 + index);
        request(prompt, 190 + 5 * index as u32, sampling, Some(2))
    });
    let known = Known::of(model, requests.collect())?;
    let options = EngineOptions { cache: CacheSize::Pages(9), ..roomy(model, &known.requests) };
    let (tally, status) = known.compare(model, options, 3)?;
    let said = format!("; {} times a request gave up its pages", status.preemptions);
    Ok(tally.line_if("preempted = not preempted", status.preemptions > 0, &said))
}

fn log_probabilities(model: &Arc<Model>, watched: &Known) -> Result<Line, DeviceError> {
    let mut tally = Tally::default();
    for request in &watched.requests {
        let most = alone(model, &Request { logprobs: Some(20), ..request.clone() })?;
        let asking = [None, Some(0), Some(3), Some(20)];
        let requests: Vec<Request> =
            asking.iter().map(|&logprobs| Request { logprobs, ..request.clone() }).chain(others(model, 3)).collect();
        let (answers, _) = together(model, roomy(model, &requests), &requests, 8)?;
        for (answer, asked) in answers.iter().zip(asking) {
            tally.compare(&reported(&most.tokens, asked), &answer.tokens);
        }
    }
    Ok(tally.line("log-probabilities asked for (0, 3, 20) = not"))
}

/// What the requests of a run that launches steps ahead want.
#[derive(Clone, Copy)]
enum Mix {
    /// Everybody the likeliest token and nothing else, which may be computed without logits.
    Greedy,
    /// Tokens drawn through all the filters, and some likeliest ones among them.
    Drawn,
    /// Prompts of one token, behind which the first token has nothing to be penalised for and the second one has.
    Penalised,
}

impl Mix {
    fn request(self, model: &Arc<Model>, index: usize) -> Request {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let drawn = Sampling { temperature: 0.8, seed: 90 + index as u64, ..Sampling::default() };
        let (prompt, sampling) = match (self, index % 5) {
            (Self::Greedy, _) | (Self::Drawn, 3) => (10 + 13 * index, greedy),
            (Self::Drawn, 0) => (10 + 13 * index, Sampling { top_p: 0.95, top_k: 50, ..drawn }),
            (Self::Drawn, 1) => (10 + 13 * index, Sampling { top_p: 0.7, ..drawn }),
            (Self::Drawn, 2) => (10 + 13 * index, Sampling { min_p: 0.05, temperature: 1.5, ..drawn }),
            (Self::Drawn, _) => (10 + 13 * index, drawn),
            (Self::Penalised, 1) => (1, Sampling { frequency_penalty: 2.0, ..drawn }),
            (Self::Penalised, 3) => (1, Sampling { logit_bias: vec![(7, 5.0)], ..greedy }),
            (Self::Penalised, _) => (1, Sampling { repetition_penalty: 5.0, presence_penalty: 2.0, ..greedy }),
        };
        request(tokens(model, prompt, 70 + index as u64), 20, sampling, Some(0))
    }

    fn claim(self) -> &'static str {
        match self {
            Self::Greedy => "greedy without log-probabilities, 1 to 12 at once, some stopped = alone with",
            Self::Drawn => "drawn without log-probabilities, 1 to 12 at once, some stopped = alone with",
            Self::Penalised => "penalised from the second token on, 1 to 12 at once, some stopped = alone with",
        }
    }
}

/// Steps that may be given to the device before the tokens of the step before are known.
fn ahead(model: &Arc<Model>, mix: Mix) -> Result<Line, DeviceError> {
    let requests = (0..12).map(|index| mix.request(model, index));
    let known = Known::of(model, requests.collect())?;
    let mut tally = Tally::default();
    for (count, ahead_anywhere) in [(1, true), (2, true), (8, false), (8, true), (12, true)] {
        let trial = Trial { ahead_anywhere, ..Trial::default() };
        let running = Running::new(model, EngineOptions { trial, ..roomy(model, &known.requests[..count]) })?;
        // Every third one ends at a token, which nobody knows when the step behind it is given to the device; the others
        // after different numbers of tokens.
        let ends = |index: usize| if index % 3 == 1 { known.answers[index].get(7 + index / 3) } else { None };
        let submit = |(index, request): (usize, &Request)| {
            let stop_tokens = ends(index).map(|token| token.id).into_iter().collect();
            let max_tokens = request.max_tokens - index as u32 % 5;
            running.submit(&Request { logprobs: None, stop_tokens, max_tokens, ..request.clone() })
        };
        let receivers = known.requests[..count].iter().enumerate().map(submit).collect::<Result<Vec<_>, _>>()?;
        for (index, events) in receivers.iter().enumerate() {
            let mut expected = reported(&known.answers[index], None);
            expected.truncate(expected.len() - index % 5);
            if let Some(stop) = ends(index).and_then(|end| expected.iter().position(|token| token.id == end.id)) {
                expected.truncate(stop);
            }
            tally.compare(&expected, &collect(events)?.tokens);
        }
    }
    Ok(tally.line(mix.claim()))
}

/// What is left of an answer for somebody who asked for less.
fn reported(answer: &[TokenBits], asked: Option<u32>) -> Vec<TokenBits> {
    let less = |token: &TokenBits| TokenBits {
        id: token.id,
        logprob: asked.and(token.logprob),
        top: token.top.iter().copied().take(asked.unwrap_or(0) as usize).collect(),
    };
    answer.iter().map(less).collect()
}

fn poison(model: &Arc<Model>, known: &Known) -> Result<Line, DeviceError> {
    // Small steps, because the workspace is uploaded before each.
    let options = EngineOptions { chunk_tokens: 64, ..roomy(model, &known.requests) };
    let (tally, _) =
        known.compare(model, EngineOptions { trial: Trial { poison: true, ..Trial::default() }, ..options }, 4)?;
    Ok(tally.line("workspace and begun pages filled with NaN before each step = not"))
}

fn page_tables(model: &Arc<Model>, known: &Known) -> Result<Line, DeviceError> {
    const ORDERS: u64 = 3;
    let mut all = Tally::default();
    for seed in 0..ORDERS {
        let trial = Trial { page_order: Some(seed), ..Trial::default() };
        let options = EngineOptions { trial, ..roomy(model, &known.requests) };
        all.add(known.compare(model, options, 5)?.0);
    }
    Ok(all.line(format!("pages in {ORDERS} other orders = in the order of their numbers")))
}

fn two_engines(model: &Arc<Model>, known: &Known) -> Result<Line, DeviceError> {
    let mut tally = Tally::default();
    for _ in 0..2 {
        tally.add(known.compare(model, roomy(model, &known.requests), 6)?.0);
    }
    Ok(tally.line("two engines one after the other = alone"))
}

/// The comparison can fail.
fn another_seed(model: &Arc<Model>, watched: &Known) -> Result<Line, DeviceError> {
    let sampled = &watched.requests[1];
    let sampling = Sampling { seed: sampled.sampling.seed + 1, ..sampled.sampling.clone() };
    let mut tally = Tally::default();
    tally.compare(&watched.answers[1], &alone(model, &Request { sampling, ..sampled.clone() })?.tokens);
    Ok(Line { holds: tally.wrong_tokens > 0, ..tally.line("another seed gives another answer") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, logprob: f32, top: &[(u32, f32)]) -> TokenBits {
        let top = top.iter().map(|&(id, value)| (id, value.to_bits())).collect();
        TokenBits { id, logprob: Some(logprob.to_bits()), top }
    }

    fn tally(expected: &[TokenBits], actual: &[TokenBits]) -> Tally {
        let mut tally = Tally::default();
        tally.compare(expected, actual);
        tally
    }

    #[test]
    fn equal_answers_hold_and_are_counted() {
        let answer = [token(3, -0.5, &[(3, -0.5), (4, -1.0)]), token(4, -2.0, &[])];
        let equal = tally(&answer, &answer);
        assert_eq!(equal, Tally { tokens: 2, wrong_tokens: 0, values: 4, wrong_values: 0 });
        let line = equal.line("a = b");
        assert!(line.holds && line.detail == "0 of 2 tokens and 0 of 4 log-probabilities differ", "{line:?}");
        assert!(!equal.line_if("a = b", false, "").holds);
    }

    #[test]
    fn every_difference_fails() {
        let answer = [token(3, -0.5, &[(3, -0.5), (4, -1.0)])];
        let last_bit = f32::from_bits((-1.0_f32).to_bits() + 1);
        for other in [
            vec![token(4, -0.5, &[(3, -0.5), (4, -1.0)])],
            vec![token(3, -0.5, &[(3, -0.5), (4, last_bit)])],
            vec![token(3, -0.5, &[(3, -0.5), (5, -1.0)])],
            vec![token(3, -0.5, &[(3, -0.5)])],
            vec![token(3, last_bit, &[(3, -0.5), (4, -1.0)])],
            vec![],
            [answer.to_vec(), answer.to_vec()].concat(),
        ] {
            assert!(!tally(&answer, &other).holds() && !tally(&other, &answer).holds(), "{other:?}");
        }
    }

    #[test]
    fn a_nan_equals_nothing_and_nothing_proves_nothing() {
        let answer = [token(3, f32::NAN, &[])];
        assert_eq!(tally(&answer, &answer).wrong_values, 1);
        assert!(!tally(&[], &[]).holds());
    }
}
