//! `lockstep generate`: one prompt, answered on standard output as its tokens come, or as one JSON object.

mod answer;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::anyhow;
use host::engine::{EngineOptions, Request, Sampling};
use host::model::ModelConfig;
use host::text::{ChatTemplate, Tokenizer};

use self::answer::{Form, answer};
use crate::cli::GenerateArguments;
use crate::model_folder;
use crate::start::start;

/// Tokens generated when nothing else is said.
const DEFAULT_MAX_TOKENS: u32 = 256;
/// The exit code for a command line that makes no sense, as clap's own.
const USAGE: u8 = 2;

/// Loads the model, answers, prints.
pub(crate) fn run(arguments: &GenerateArguments) -> anyhow::Result<ExitCode> {
    if let Some(option) = idle_option(arguments) {
        eprintln!("error: {option} has no effect at temperature 0; add --temperature 1");
        return Ok(ExitCode::from(USAGE));
    }
    let folder = model_folder::find(arguments.source.model.as_deref())?;
    // Everything that can be wrong with the question is found before gigabytes are loaded.
    ModelConfig::load(&folder)?;
    let tokenizer = tokenizer(&folder, arguments)?;
    let prompt = prompt(&folder, arguments, tokenizer.as_ref())?;
    let started = start(&arguments.source, &folder, None, EngineOptions::for_one_request)?;
    let request = request(arguments, prompt, started.model.config().eos_ids.clone(), started.model.context_tokens());
    let form = if arguments.json { Form::Json } else { Form::Stream };
    let mut out = io::stdout().lock();
    let summary = match answer(&started.engine, tokenizer.as_ref(), request, form, &mut out) {
        Err(error) if is_broken_pipe(&error) => return Ok(ExitCode::SUCCESS),
        other => other?,
    };
    if !arguments.json {
        writeln!(io::stderr(), "[{summary}]")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Options that choose among likely tokens say nothing at temperature 0; a silent greedy answer would mislead.
fn idle_option(arguments: &GenerateArguments) -> Option<&'static str> {
    let given = [
        ("--top-p", arguments.top_p.is_some()),
        ("--top-k", arguments.top_k.is_some()),
        ("--min-p", arguments.min_p.is_some()),
    ];
    let first = given.into_iter().find(|(_, given)| *given).map(|(option, _)| option);
    first.filter(|_| arguments.temperature == 0.0)
}

/// The model's tokenizer; with token ids as the question, a folder without one will do.
fn tokenizer(folder: &Path, arguments: &GenerateArguments) -> anyhow::Result<Option<Arc<Tokenizer>>> {
    if arguments.token_ids.is_some() && !folder.join("tokenizer.json").exists() {
        return Ok(None);
    }
    Ok(Some(Arc::new(Tokenizer::load(folder)?)))
}

fn prompt(
    folder: &Path,
    arguments: &GenerateArguments,
    tokenizer: Option<&Arc<Tokenizer>>,
) -> anyhow::Result<Vec<u32>> {
    if let Some(ids) = &arguments.token_ids {
        return Ok(ids.0.clone());
    }
    let tokenizer = tokenizer.ok_or_else(|| anyhow!("the model has no tokenizer; give --token-ids"))?;
    if let Some(message) = &arguments.chat {
        let template = ChatTemplate::load(folder)?
            .ok_or_else(|| anyhow!("the model has no chat template; give the text as PROMPT instead of --chat"))?;
        let messages = [serde_json::json!({"role": "user", "content": message})];
        let text = template.render(&messages, true, &serde_json::Map::new())?;
        return Ok(tokenizer.encode(&text, false)?);
    }
    let text = arguments.prompt.as_deref().unwrap_or_default();
    let ids = tokenizer.encode(text, true)?;
    if ids.is_empty() { Err(anyhow!("the prompt is empty; give at least one character")) } else { Ok(ids) }
}

fn request(arguments: &GenerateArguments, prompt: Vec<u32>, eos_ids: Vec<u32>, context_tokens: usize) -> Request {
    let left = u32::try_from(context_tokens.saturating_sub(prompt.len())).unwrap_or(u32::MAX);
    let neutral = Sampling::default();
    Request {
        max_tokens: arguments.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(left.max(1))),
        sampling: Sampling {
            temperature: arguments.temperature,
            top_k: arguments.top_k.unwrap_or(neutral.top_k),
            top_p: arguments.top_p.unwrap_or(neutral.top_p),
            min_p: arguments.min_p.unwrap_or(neutral.min_p),
            seed: arguments.seed.unwrap_or_else(draw_seed),
            ..neutral
        },
        stop_tokens: if arguments.ignore_eos { Vec::new() } else { eos_ids },
        logprobs: arguments.logprobs,
        prompt,
        ..Request::default()
    }
}

/// A seed from the system's randomness, below 2^53 so that it survives any JSON reader.
fn draw_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 11
}

/// Whoever read the output has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn arguments(line: &str) -> GenerateArguments {
        let words = ["lockstep", "generate"].into_iter().chain(line.split_whitespace());
        match Cli::parse_from(words).command {
            Some(Command::Generate(arguments)) => arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_carries_every_option() {
        let line = "--token-ids 4,5 --max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --seed 8 --logprobs 2 --json";
        let request = request(&arguments(line), vec![4, 5], vec![1], 100);
        let expected = Sampling { temperature: 0.5, top_k: 3, top_p: 0.9, min_p: 0.1, seed: 8, ..Sampling::default() };
        assert_eq!(request.sampling, expected);
        assert_eq!((request.prompt, request.max_tokens, request.logprobs), (vec![4, 5], 9, Some(2)));
        assert_eq!(request.stop_tokens, vec![1]);
    }

    #[test]
    fn ignoring_the_end_leaves_no_stop_token() {
        assert!(request(&arguments("x --ignore-eos"), vec![4], vec![1], 100).stop_tokens.is_empty());
    }

    #[test]
    fn the_default_length_fits_the_context() {
        let length = |prompt: usize, context| request(&arguments("x"), vec![1; prompt], vec![], context).max_tokens;
        assert_eq!(length(10, 1000), 256);
        assert_eq!(length(10, 100), 90);
        // An over-long prompt keeps a legal length, so that the engine's refusal speaks of the prompt.
        assert_eq!(length(100, 100), 1);
        assert_eq!(length(101, 100), 1);
    }

    #[test]
    fn seeds_are_drawn_and_fit_a_double() {
        let seeds: std::collections::BTreeSet<u64> = (0..20).map(|_| draw_seed()).collect();
        assert!(seeds.len() > 1);
        assert!(seeds.iter().all(|seed| *seed < 1 << 53));
    }

    #[test]
    fn options_without_effect_are_refused() {
        for option in ["--top-p 0.5", "--top-k 2", "--min-p 0.5"] {
            let name = option.split(' ').next();
            assert_eq!(idle_option(&arguments(&format!("x {option}"))), name);
            assert_eq!(idle_option(&arguments(&format!("x {option} --temperature 1"))), None);
        }
    }
}
