//! What `lockstep bench` can be asked for.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cli::{ModelArguments, at_least_one};

#[derive(Args, Clone, Debug)]
pub(crate) struct BenchArguments {
    #[command(flatten)]
    pub(crate) source: ModelArguments,
    /// What to measure [default: everything]
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_enum)]
    pub(crate) only: Vec<Kind>,
    /// Requests at once [default: 1,8,32,64,128,256 on a GPU, 1,8,32 on a CPU]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = at_least_one::<usize>)]
    pub(crate) batch: Vec<usize>,
    /// Tokens of their prompts; for decode in whole pages of 64 and one more [default: 128,4096 on a GPU, 128 on a CPU]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = at_least_one::<usize>)]
    pub(crate) context: Vec<usize>,
    /// Tokens of the prompts whose prefill is timed [default: 128,512,1024,4096,32000 on a GPU, 128,512 on a CPU]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = at_least_one::<usize>)]
    pub(crate) length: Vec<usize>,
    /// Tokens that each request generates [default: 128 on a GPU, 16 on a CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(4..))]
    pub(crate) tokens: Option<u32>,
    /// Runs of which each figure is the median
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one::<usize>)]
    pub(crate) runs: usize,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Set this run beside one kept with --json; with two files, set these side by side and measure nothing
    #[arg(long, value_name = "FILE", num_args = 1..=2)]
    pub(crate) compare: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) http: HttpArguments,
}

/// Load for a running server instead of measurements on a device.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct HttpArguments {
    /// Ask the server at this URL, such as http://127.0.0.1:8080, with streams, and take the times of its clients
    #[arg(
        long = "http",
        value_name = "URL",
        conflicts_with_all = ["model", "device", "only", "batch", "context", "length", "tokens", "runs"]
    )]
    pub(crate) url: Option<String>,
    /// Requests per second, at random times from a fixed seed, whether others are answered or not; latencies count from
    /// when a request was due
    #[arg(long, value_name = "R", requires = "url", conflicts_with = "clients", value_parser = above_zero)]
    pub(crate) rate: Option<f64>,
    /// Clients, each of which asks again when it has its answer [default: 8]
    #[arg(long, value_name = "N", requires = "url", value_parser = at_least_one::<usize>)]
    pub(crate) clients: Option<usize>,
    /// For how long new requests are sent [default: 10]
    #[arg(long, value_name = "S", requires = "url", value_parser = above_zero)]
    pub(crate) seconds: Option<f64>,
    /// Tokens of each prompt [default: 128]
    #[arg(long, value_name = "P", requires = "url", value_parser = at_least_one::<usize>)]
    pub(crate) prompt_tokens: Option<usize>,
    /// Tokens of each answer [default: 128]
    #[arg(long, value_name = "M", requires = "url", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
}

fn above_zero(text: &str) -> Result<f64, String> {
    // More than a million requests or seconds is a mistyped number.
    let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= 1e6);
    number.ok_or_else(|| "it must be a number above 0 and at most 1000000".to_owned())
}

/// A kind of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Tokens per second while all requests generate
    Decode,
    /// Time to the first token of one prompt with a cold cache
    Prefill,
    /// Time to the first token of prompts that come at once
    Ttft,
    /// What drawing a token adds to a step
    Sampling,
    /// From the folder to an engine that answers, and the memory it holds then
    Load,
    /// The part of a step in which the device waits for the host
    Step,
}

/// What is measured on the device at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) batches: Vec<usize>,
    pub(super) contexts: Vec<usize>,
    pub(super) lengths: Vec<usize>,
    pub(super) tokens: u32,
    pub(super) runs: usize,
}

impl BenchArguments {
    pub(super) fn wants(&self, kind: Kind) -> bool {
        self.only.is_empty() || self.only.contains(&kind)
    }

    /// Figures are printed as they come, not as JSON or beside others.
    pub(super) fn shows_rows(&self) -> bool {
        !self.json && self.compare.is_empty()
    }

    /// What was asked for, and what suits the device where nothing was.
    pub(super) fn plan(&self, gpu: bool) -> Plan {
        let or = |asked: &[usize], on_gpu: &[usize], on_cpu: &[usize]| match (asked, gpu) {
            ([], true) => on_gpu.to_vec(),
            ([], false) => on_cpu.to_vec(),
            (asked, _) => asked.to_vec(),
        };
        Plan {
            batches: or(&self.batch, &[1, 8, 32, 64, 128, 256], &[1, 8, 32]),
            contexts: or(&self.context, &[128, 4096], &[128]),
            lengths: or(&self.length, &[128, 512, 1024, 4096, 32_000], &[128, 512]),
            tokens: self.tokens.unwrap_or(if gpu { 128 } else { 16 }),
            runs: self.runs,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use clap::error::ErrorKind;

    use super::*;
    use crate::cli::{Cli, Command, DeviceChoice};

    fn parse(line: &str) -> Result<BenchArguments, clap::Error> {
        match Cli::try_parse_from(["lockstep", "bench"].into_iter().chain(line.split_whitespace()))?.command {
            Some(Command::Bench(arguments)) => Ok(arguments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lists_are_separated_by_commas() {
        let given = parse(
            "--model m --device cpu --only decode,ttft --batch 1,7 --context 32 --length 5,6 --tokens 4 --runs 3 --json",
        )
        .unwrap();
        assert_eq!((given.source.device, given.json, given.compare.len()), (DeviceChoice::Cpu, true, 0));
        assert_eq!(given.only, [Kind::Decode, Kind::Ttft]);
        assert!(given.wants(Kind::Ttft) && !given.wants(Kind::Load));
        let plan = Plan { batches: vec![1, 7], contexts: vec![32], lengths: vec![5, 6], tokens: 4, runs: 3 };
        assert_eq!((given.plan(true), given.plan(false)), (plan.clone(), plan));
    }

    #[test]
    fn nothing_asked_for_is_everything_that_suits_the_device() {
        let given = parse("").unwrap();
        assert!(Kind::value_variants().iter().all(|&kind| given.wants(kind)));
        assert_eq!(given.plan(true).batches, [1, 8, 32, 64, 128, 256]);
        assert_eq!(given.plan(true).contexts, [128, 4096]);
        assert_eq!(given.plan(false).batches, [1, 8, 32]);
        assert_eq!(given.plan(false).runs, 5);
    }

    #[test]
    fn wrong_values_are_usage_errors() {
        for line in
            ["--batch 0", "--batch 1,,2", "--batch 1;2", "--context x", "--runs 0", "--tokens 3", "--only speed"]
        {
            let kind = parse(line).unwrap_err().kind();
            assert!(matches!(kind, ErrorKind::ValueValidation | ErrorKind::InvalidValue), "{line}: {kind:?}");
        }
        assert_eq!(parse("--compare a b c").unwrap_err().kind(), ErrorKind::UnknownArgument);
    }

    #[test]
    fn http_takes_a_rate_or_clients() {
        let given = parse("--http http://h:1 --rate 2.5 --seconds 3 --prompt-tokens 7 --max-tokens 9 --json").unwrap();
        assert_eq!((given.http.url.as_deref(), given.http.rate), (Some("http://h:1"), Some(2.5)));
        assert_eq!(
            (given.http.seconds, given.http.prompt_tokens, given.http.max_tokens),
            (Some(3.0), Some(7), Some(9))
        );
        assert_eq!(parse("--http http://h --clients 64 --compare f").unwrap().http.clients, Some(64));
        for line in ["--http u --rate 1 --clients 2", "--http u --batch 3", "--http u --device cpu"] {
            assert_eq!(parse(line).unwrap_err().kind(), ErrorKind::ArgumentConflict, "{line}");
        }
        for line in ["--http u --rate 0", "--http u --rate nan", "--http u --seconds=-1", "--http u --clients 0"] {
            assert_eq!(parse(line).unwrap_err().kind(), ErrorKind::ValueValidation, "{line}");
        }
        assert_eq!(parse("--rate 1").unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
    }

    #[test]
    fn one_or_two_files_to_compare() {
        assert_eq!(parse("--compare a").unwrap().compare, [PathBuf::from("a")]);
        assert_eq!(parse("--compare a b --json").unwrap().compare, [PathBuf::from("a"), PathBuf::from("b")]);
    }
}
