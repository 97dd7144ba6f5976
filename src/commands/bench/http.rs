//! `lockstep bench --http`: a running server under load, as its clients see it.

use std::time::Duration;

use anyhow::bail;
use host::client::{Arrivals, Exchange, Outcome, Target, Traffic, drive, outcomes};
use host::testing::TestRng;

use super::arguments::{BenchArguments, HttpArguments};
use super::figure::{Figure, Report};

/// Of the gaps between arrivals.
const SEED: u64 = 1;

/// A request that takes longer counts as timed out.
const PATIENCE: Duration = Duration::from_secs(120);

/// Prompts are made of these ids, which every vocabulary has and no tokenizer known here gives a special meaning.
const IDS: std::ops::Range<u64> = 32..127;

/// The percentiles that are told, in percent.
const PERCENTILES: [u32; 3] = [50, 90, 99];

/// Sends the traffic that was asked for to the server at `url`.
pub(super) fn measure(arguments: &BenchArguments, url: &str) -> anyhow::Result<Report> {
    let target = Target::parse(url)?;
    let HttpArguments { rate, clients, seconds, prompt_tokens, max_tokens, .. } = arguments.http;
    let model = model(&target)?;
    let arrivals = match rate {
        Some(per_second) => Arrivals::Open { per_second, seed: SEED },
        None => Arrivals::Closed { clients: clients.unwrap_or(8) },
    };
    let duration = Duration::from_secs_f64(seconds.unwrap_or(10.0));
    let (prompt_tokens, max_tokens) = (prompt_tokens.unwrap_or(128), max_tokens.unwrap_or(128));
    let traffic = Traffic { target, path: "/v1/completions".to_owned(), arrivals, duration, patience: PATIENCE };
    let name = model.clone();
    let exchanges = drive(&traffic, move |number| body(&name, number, prompt_tokens, max_tokens))?;
    let load = match arrivals {
        Arrivals::Closed { clients } => format!("{clients} clients"),
        Arrivals::Open { per_second, .. } => format!("{per_second} requests/s"),
    };
    let batch = match arrivals {
        Arrivals::Closed { clients } => Some(clients),
        Arrivals::Open { .. } => None,
    };
    let figures = figures(&exchanges, duration).into_iter();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device: format!("{url}, {load} for {} s", duration.as_secs_f64()),
        driver: None,
        kernels: None,
        linear_library: None,
        model,
        runs: 1,
        tokens: max_tokens,
        figures: figures.map(|figure| Figure { batch, ..figure }.context(prompt_tokens)).collect(),
    })
}

/// The name under which the server knows its model.
fn model(target: &Target) -> anyhow::Result<String> {
    let (status, body) = target.get("/v1/models", Duration::from_secs(10))?;
    let models: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    match models["data"][0]["id"].as_str() {
        Some(id) if status == 200 => Ok(id.to_owned()),
        _ => bail!("the server names no model at /v1/models (status {status}); wait until it is ready"),
    }
}

/// A prompt of its own for each number, so that no answer comes from a cache of prompts.
fn body(model: &str, number: u64, prompt_tokens: usize, max_tokens: u32) -> String {
    let mut random = TestRng::new(number);
    let prompt: Vec<u64> = (0..prompt_tokens).map(|_| IDS.start + random.below(IDS.end - IDS.start)).collect();
    serde_json::json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    })
    .to_string()
}

/// What the clients saw. Rates are of what came while new requests were sent; latencies are of all requests, and of those
/// with a whole answer only, since a refusal is fast.
fn figures(exchanges: &[Exchange], duration: Duration) -> Vec<Figure> {
    let single = |what: &str, unit: &str, value: f64| Figure::of(what, unit, &[value]);
    let seconds = duration.as_secs_f64();
    let tokens = exchanges.iter().flat_map(|exchange| &exchange.tokens).filter(|(at, _)| *at <= duration);
    let complete: Vec<_> = exchanges.iter().filter(|exchange| exchange.outcome == Outcome::Complete).collect();
    let ended = complete.iter().filter(|exchange| exchange.ended <= duration).count();
    let mut figures = vec![
        single("http: tokens", "tokens/s", tokens.map(|(_, count)| f64::from(*count)).sum::<f64>() / seconds),
        single("http: answers", "1/s", ended as f64 / seconds),
    ];
    let milliseconds = |later: Duration, earlier: Duration| later.saturating_sub(earlier).as_secs_f64() * 1e3;
    let first = |exchange: &&Exchange| Some(milliseconds(exchange.tokens.first()?.0, exchange.due));
    let gaps = |exchange: &&Exchange| {
        let times: Vec<Duration> = exchange.tokens.iter().map(|token| token.0).collect();
        times.windows(2).map(|pair| milliseconds(pair[1], pair[0])).collect::<Vec<_>>()
    };
    let whole = |exchange: &&Exchange| milliseconds(exchange.ended, exchange.due);
    let kinds: [(&str, Vec<f64>); 3] = [
        ("time to first token", complete.iter().filter_map(first).collect()),
        ("time between tokens", complete.iter().flat_map(gaps).collect()),
        ("whole request", complete.iter().map(whole).collect()),
    ];
    for (what, mut values) in kinds {
        values.sort_by(f64::total_cmp);
        let at = |percent| percentile(&values, percent).map(|value| (percent, value));
        figures.extend(
            PERCENTILES
                .into_iter()
                .filter_map(at)
                .map(|(percent, value)| single(&format!("http: {what}, p{percent}"), "ms", value)),
        );
    }
    figures.extend(
        outcomes(exchanges)
            .into_iter()
            .map(|(outcome, count)| single(&format!("http: requests, {outcome}"), "", count as f64)),
    );
    figures
}

/// The smallest of the `sorted` values that at least `percent` percent of them do not exceed.
fn percentile(sorted: &[f64], percent: u32) -> Option<f64> {
    let rank = (sorted.len() * percent as usize).div_ceil(100);
    sorted.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_what_their_definition_says() {
        let mut random = TestRng::new(3);
        for count in 1..=250 {
            let mut values: Vec<f64> = (0..count).map(|_| random.below(50) as f64).collect();
            values.sort_by(f64::total_cmp);
            for percent in [0, 1, 50, 90, 99, 100] {
                let enough = |value: f64| {
                    let not_above = values.iter().filter(|&&other| other <= value).count();
                    not_above * 100 >= percent as usize * count
                };
                let expected = values.iter().copied().find(|&value| enough(value));
                assert_eq!(percentile(&values, percent), expected, "p{percent} of {values:?}");
            }
        }
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn figures_count_what_clients_saw() {
        let at = Duration::from_millis;
        let exchange = |due, tokens: &[(u64, u32)], ended, outcome| Exchange {
            due: at(due),
            tokens: tokens.iter().map(|&(time, count)| (at(time), count)).collect(),
            ended: at(ended),
            outcome,
        };
        let exchanges = [
            exchange(0, &[(100, 1), (150, 2), (250, 1)], 260, Outcome::Complete),
            // Its last token came after the time was over.
            exchange(500, &[(900, 1), (1900, 1), (2100, 5)], 2200, Outcome::Complete),
            exchange(700, &[], 701, Outcome::Status(429)),
            exchange(800, &[(805, 1)], 806, Outcome::CutOff),
        ];
        let figures = figures(&exchanges, at(2000));
        let value = |what: &str| figures.iter().find(|figure| figure.what == what).map(|figure| figure.value);
        assert_eq!(value("http: tokens"), Some(7.0 / 2.0));
        assert_eq!(value("http: answers"), Some(0.5));
        assert_eq!(
            (value("http: time to first token, p50"), value("http: time to first token, p99")),
            (Some(100.0), Some(400.0))
        );
        // 50, 100, 200 and 1000.
        assert_eq!(
            (value("http: time between tokens, p50"), value("http: time between tokens, p90")),
            (Some(100.0), Some(1000.0))
        );
        assert_eq!(value("http: whole request, p99"), Some(1700.0));
        assert_eq!(value("http: requests, complete"), Some(2.0));
        assert_eq!((value("http: requests, status 429"), value("http: requests, cut off")), (Some(1.0), Some(1.0)));
    }

    #[test]
    fn prompts_have_the_length_asked_for_and_differ() {
        let prompt = |number| {
            let body: serde_json::Value = serde_json::from_str(&body("m", number, 100, 7)).unwrap();
            assert_eq!((&body["model"], &body["max_tokens"], &body["stream"]), (&"m".into(), &7.into(), &true.into()));
            body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!((prompt(1).len(), prompt(1)), (100, prompt(1)));
        assert_ne!(prompt(1), prompt(2));
        assert!(prompt(3).iter().all(|id| IDS.contains(id)));
    }
}
