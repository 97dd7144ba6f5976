//! Whole sequences: prefill in any chunks and decode give the same bits, and so do repeated runs.

use std::sync::Arc;

use super::Line;
use super::rehearsal::{self, Running, collect};
use crate::device::DeviceError;
use crate::engine::{CacheSize, EngineOptions, Sampling};
use crate::model::{KvCache, Model, Prefill, Step, StepLimits, Workspace};
use crate::ops::PAGE;

/// Tokens of the prompt: two full pages and a part of a third.
const PROMPT_TOKENS: usize = 150;

/// Chunk sizes beside the whole prompt and single tokens.
const CHUNKS: [usize; 4] = [7, 16, 64, 100];

/// Tokens that a feed-forward layer takes at once, where they are less than the prompt.
const FED: usize = 37;

/// Runs of one request.
const RUNS: usize = 100;

/// Tokens generated in a run.
const RUN_TOKENS: u32 = 16;

/// What a prompt leaves behind: the bits of its logits at every position, and of its keys and values.
#[derive(PartialEq, Eq)]
struct Trace {
    logits: Vec<u32>,
    cache: Vec<u16>,
}

/// Prefill of n tokens against n decode steps and against several chunk sizes, each into differently ordered pages.
pub(super) fn prefill_is_decode(model: &Model) -> Result<Vec<Line>, DeviceError> {
    let count = PROMPT_TOKENS.min(model.context_tokens());
    let tokens = rehearsal::tokens(model, count, 1);
    let limits = StepLimits { rows: count, decode_rows: 1, logits_rows: count, table_entries: count.div_ceil(PAGE) };
    let mut workspace = model.workspace(limits)?;
    let mut cache = model.kv_cache(count.div_ceil(PAGE) + 2)?;
    let whole = trace(model, &mut cache, &mut workspace, &tokens, count)?;
    let mut lines = Vec::new();
    for chunk in [1].into_iter().chain(CHUNKS) {
        let chunked = trace(model, &mut cache, &mut workspace, &tokens, chunk)?;
        let claim = if chunk == 1 {
            format!("prefill of {count} tokens = {count} decode steps")
        } else {
            format!("prefill of {count} tokens = prefill in chunks of {chunk}")
        };
        lines.push(compared(claim, &whole, &chunked));
    }
    workspace.feed_at_once(FED);
    let fed = trace(model, &mut cache, &mut workspace, &tokens, count)?;
    let claim = format!("prefill of {count} tokens = with {FED} of them at once in feed-forward layers");
    lines.push(compared(claim, &whole, &fed));
    Ok(lines)
}

fn compared(claim: String, whole: &Trace, other: &Trace) -> Line {
    let wrong_logits = whole.logits.iter().zip(&other.logits).filter(|(a, b)| a != b).count();
    let wrong_cache = whole.cache.iter().zip(&other.cache).filter(|(a, b)| a != b).count();
    Line::new(
        claim,
        format!(
            "{wrong_logits} of {} logits and {wrong_cache} of {} keys and values differ",
            whole.logits.len(),
            whole.cache.len()
        ),
        whole == other,
    )
}

fn trace(
    model: &Model,
    cache: &mut KvCache,
    workspace: &mut Workspace,
    tokens: &[u32],
    chunk: usize,
) -> Result<Trace, DeviceError> {
    // Which pages are used must not matter: count from the end for odd chunks.
    let last = cache.page_count() as u32 - 1;
    let table: Vec<u32> =
        (0..tokens.len().div_ceil(PAGE) as u32).map(|page| if chunk % 2 == 1 { last - page } else { page }).collect();
    let mut logits = Vec::with_capacity(tokens.len() * model.config().vocab);
    for first in (0..tokens.len()).step_by(chunk) {
        let rows = chunk.min(tokens.len() - first);
        let pages = &table[..(first + rows).div_ceil(PAGE)];
        let positions: Vec<u32> = (first as u32..(first + rows) as u32).collect();
        let wanted: Vec<u32> = (0..rows as u32).collect();
        let prefill = [Prefill { first_row: 0, rows, first_position: first, table_start: 0, table_len: pages.len() }];
        let (decode_rows, prefills) = if rows == 1 { (1, &prefill[..0]) } else { (0, &prefill[..]) };
        let step = Step {
            tokens: &tokens[first..first + rows],
            positions: &positions,
            row_tables: &vec![0; rows],
            page_tables: pages,
            decode_rows,
            prefills,
            logits_rows: &wanted,
        };
        model.forward(&step, cache, workspace)?;
        logits.extend(model.device().download(workspace.logits(rows)?)?.into_iter().map(f32::to_bits));
    }
    Ok(Trace { logits, cache: cache.download(model.device(), &table, tokens.len())? })
}

/// Many runs of one request through the engine, one alone and the others together, at temperature 0 and above; and
/// another seed.
pub(super) fn runs_repeat(model: &Arc<Model>) -> Result<Vec<Line>, DeviceError> {
    let prompt_tokens = PROMPT_TOKENS.min(model.context_tokens() - RUN_TOKENS as usize);
    let prompt = rehearsal::tokens(model, prompt_tokens, 2);
    let options = EngineOptions { cache: CacheSize::Bytes(256 << 20), ..EngineOptions::for_device(model.device()) };
    let running = Running::new(model, options)?;
    let request = |temperature: f32, seed: u64| {
        let sampling = Sampling { temperature, seed, ..Sampling::default() };
        rehearsal::request(prompt.clone(), RUN_TOKENS, sampling, Some(5))
    };
    let mut lines = Vec::new();
    let mut warm_digest = None;
    for temperature in [0.0, 0.8] {
        let request = request(temperature, 1);
        let mut digests = vec![running.ask(&request)?.digest()];
        let together = (1..RUNS).map(|_| running.submit(&request)).collect::<Result<Vec<_>, _>>()?;
        for run in &together {
            digests.push(collect(run)?.digest());
        }
        digests.sort_unstable();
        digests.dedup();
        lines.push(Line::new(
            format!("{RUNS} runs at temperature {temperature}, one alone, the others at once: one digest"),
            format!("{} digests of tokens and log-probabilities", digests.len()),
            digests.len() == 1,
        ));
        warm_digest = digests.pop();
    }
    let other = running.ask(&request(0.8, 2))?.digest();
    let differs = warm_digest.is_some_and(|digest| digest != other);
    let detail = if differs { "the digests differ" } else { "the digests are equal" };
    lines.push(Line::new("another seed at temperature 0.8 gives another digest", detail, differs));
    Ok(lines)
}
