//! What can be asked for on the command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, Args, Parser, Subcommand};
use host::engine::{CacheSize, EngineOptions};

use crate::commands::bench::BenchArguments;

/// An LLM inference server whose answers depend on the request alone.
///
/// Without a command: serves the demo model on the best device at 127.0.0.1:8080.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model over HTTP
    Serve(ServeArguments),
    /// Answer one prompt on the terminal
    Generate(GenerateArguments),
    /// Check the numeric contract on this device; exits with 1 when a line fails
    Verify(VerifyArguments),
    /// Time decode, prefill, sampling and loading, beside what the device can do at most; or a server under load
    Bench(BenchArguments),
    /// Send recorded requests to a server again; exits with 1 unless every answer is the same
    Replay(ReplayArguments),
}

impl Command {
    /// What `lockstep` without arguments does.
    pub(crate) fn serve_demo_model() -> Self {
        Self::Serve(ServeArguments {
            source: ModelArguments { model: None, device: DeviceChoice::Auto },
            host: "127.0.0.1".into(),
            port: 8080,
            record: None,
            capacity: CapacityArguments::default(),
        })
    }
}

/// Which model runs where.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelArguments {
    /// Model folder as published on model hubs: config.json, tokenizer.json, *.safetensors [default: the demo model]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Where to run: auto, cuda:N or cpu; auto takes the first GPU, else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceChoice,
}

#[derive(Args, Debug, PartialEq)]
pub(crate) struct ServeArguments {
    #[command(flatten)]
    pub(crate) source: ModelArguments,
    /// Address to listen on; 0.0.0.0 is every interface
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Append each request that was answered to the end, and its answer, to this file, a JSON object a line: what
    /// lockstep replay reads. It holds prompts and texts
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) capacity: CapacityArguments,
}

/// How much a server takes on. None of it changes a token of an answer.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub(crate) struct CapacityArguments {
    /// Requests generated at once at most; more wait [default: 256 on a GPU, 32 on a CPU]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    pub(crate) max_running: Option<usize>,
    /// Tokens that the waiting requests may come to together, prompts and longest answers; beyond it new ones get 429
    /// [default: 1048576]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one::<usize>)]
    pub(crate) max_queued_tokens: Option<usize>,
    /// Memory for the KV cache, in bytes; it gets what one full context needs in any case [default on a CPU: 134217728]
    #[arg(long, value_name = "BYTES", conflicts_with = "kv_cache_fraction", value_parser = at_least_one::<u64>)]
    pub(crate) kv_cache_bytes: Option<u64>,
    /// Part of the memory still free once the weights are loaded that the KV cache may take, above 0 and at most 1
    /// [default on a GPU: 0.9]
    #[arg(long, value_name = "F", value_parser = positive_share)]
    pub(crate) kv_cache_fraction: Option<f64>,
    /// Tokens that a prompt and its answer may have together [default: the model's own maximum, which is also the most]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one::<usize>)]
    pub(crate) context: Option<usize>,
}

impl CapacityArguments {
    /// `options` with what was asked for.
    pub(crate) fn apply(&self, mut options: EngineOptions) -> EngineOptions {
        options.max_running = self.max_running.unwrap_or(options.max_running);
        options.queue_tokens = self.max_queued_tokens.unwrap_or(options.queue_tokens);
        options.cache = match (self.kv_cache_bytes, self.kv_cache_fraction) {
            (Some(bytes), _) => CacheSize::Bytes(bytes),
            (None, Some(fraction)) => CacheSize::FreeFraction(fraction),
            (None, None) => options.cache,
        };
        options
    }
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("input").required(true).multiple(false).args(["prompt", "chat", "token_ids"]))]
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    pub(crate) source: ModelArguments,
    /// Text to continue
    #[arg(value_name = "PROMPT")]
    pub(crate) prompt: Option<String>,
    /// Message to answer, put through the model's chat template
    #[arg(long, value_name = "TEXT")]
    pub(crate) chat: Option<String>,
    /// Token ids to continue, as 1,2,3 or @FILE
    #[arg(long, value_name = "IDS")]
    pub(crate) token_ids: Option<TokenIds>,
    /// Tokens to generate at most [default: 256, or what the context still holds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// Divides the logits; 0 takes the most likely token
    #[arg(long, value_name = "T", default_value = "0", value_parser = not_negative)]
    pub(crate) temperature: f32,
    /// Keep the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", value_parser = share)]
    pub(crate) top_p: Option<f32>,
    /// Keep this many of the most likely tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Keep tokens at least this fraction as likely as the most likely one
    #[arg(long, value_name = "P", value_parser = share)]
    pub(crate) min_p: Option<f32>,
    /// Keys the random numbers [default: drawn, and reported]
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Report the K most likely tokens at each position with their log-probabilities (0 to 20; with --json)
    #[arg(long, value_name = "K", requires = "json", value_parser = clap::value_parser!(u32).range(0..=20))]
    pub(crate) logprobs: Option<u32>,
    /// Go on after the model's end-of-sequence tokens
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object at the end: tokens, text, logprobs, finish_reason, seed
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct VerifyArguments {
    #[command(flatten)]
    pub(crate) source: ModelArguments,
    /// Check that no request can tell its company: alone against among up to OTHERS, under every step size, state of the
    /// cache and order of pages [default: 255 others]
    #[arg(long, value_name = "OTHERS", num_args = 0..=1, default_missing_value = "255", require_equals = true,
        value_parser = at_least_one::<usize>)]
    pub(crate) batch: Option<usize>,
    /// Compare with the golden digests of this device and model in FILE
    #[arg(long, value_name = "FILE")]
    pub(crate) golden: Option<PathBuf>,
    /// Record this device's and model's golden digests in FILE, beside those of others
    #[arg(long, value_name = "FILE", conflicts_with = "golden")]
    pub(crate) write_golden: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct ReplayArguments {
    /// A JSON object a line: {"endpoint": "/v1/chat/completions", "request": {...}, "response": {...}}, where response is
    /// the answer or its "lockstep" object
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The server to ask
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub(crate) url: String,
    /// Requests under way at once; it changes no answer
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one::<usize>)]
    pub(crate) concurrency: usize,
}

/// The value of `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    Auto,
    Cuda(i32),
    Cpu,
}

impl FromStr for DeviceChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => match text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse::<u16>().ok()) {
                Some(ordinal) => Ok(Self::Cuda(i32::from(ordinal))),
                None => Err("choose auto, cuda:0 (or another number) or cpu"),
            },
        }
    }
}

/// The value of `--token-ids`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let file;
        let list = match text.strip_prefix('@') {
            Some(path) => {
                file = std::fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
                file.as_str()
            }
            None => text,
        };
        let words = list.split([',', ' ', '\n', '\r', '\t']).filter(|word| !word.is_empty());
        let parsed = words.map(|word| word.parse().map_err(|_| format!("{word:?} is not a token id")));
        let ids: Vec<u32> = parsed.collect::<Result<_, String>>()?;
        if ids.is_empty() { Err("give at least one token id".into()) } else { Ok(Self(ids)) }
    }
}

fn not_negative(text: &str) -> Result<f32, String> {
    in_range(text, 0.0..=f32::MAX, "a number that is not negative")
}

fn share(text: &str) -> Result<f32, String> {
    in_range(text, 0.0..=1.0, "a number from 0 to 1")
}

fn positive_share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "it must be a number above 0 and at most 1".to_owned())
}

pub(crate) fn at_least_one<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| *number >= T::from(1));
    number.ok_or_else(|| "it must be a whole number of at least 1".to_owned())
}

fn in_range(text: &str, range: std::ops::RangeInclusive<f32>, allowed: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("it must be {allowed}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("lockstep").chain(line.split_whitespace()))
    }

    fn generate(line: &str) -> GenerateArguments {
        match parse(&format!("generate {line}")).unwrap().command {
            Some(Command::Generate(arguments)) => arguments,
            other => panic!("{other:?}"),
        }
    }

    fn refused(line: &str) -> ErrorKind {
        let error = parse(line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
        error.kind()
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_means_serve_with_its_defaults() {
        assert!(parse("").unwrap().command.is_none());
        let Some(Command::Serve(given)) = parse("serve").unwrap().command else { panic!() };
        let Command::Serve(implied) = Command::serve_demo_model() else { panic!() };
        assert_eq!(given, implied);
    }

    #[test]
    fn serve_takes_model_device_host_and_port() {
        let line = "serve --model m --device cuda:3 --host 0.0.0.0 --port 9000 --record r.jsonl";
        let Some(Command::Serve(given)) = parse(line).unwrap().command else { panic!() };
        let source = ModelArguments { model: Some("m".into()), device: DeviceChoice::Cuda(3) };
        assert_eq!(
            given,
            ServeArguments {
                source,
                host: "0.0.0.0".into(),
                port: 9000,
                record: Some("r.jsonl".into()),
                capacity: CapacityArguments::default()
            }
        );
    }

    fn capacity(line: &str) -> CapacityArguments {
        match parse(&format!("serve {line}")).unwrap().command {
            Some(Command::Serve(arguments)) => arguments.capacity,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn serve_takes_its_capacity() {
        let device = host::device::Device::cpu(host::device::CpuOptions::default()).unwrap();
        let default = EngineOptions::for_device(&device);
        let options = |line: &str| capacity(line).apply(default);
        let unchanged = options("");
        assert_eq!((unchanged.max_running, unchanged.cache), (default.max_running, default.cache));
        assert_eq!((unchanged.queue_tokens, options("--max-queued-tokens 9").queue_tokens), (1 << 20, 9));
        let given = options("--max-running 3 --kv-cache-bytes 5000000000");
        assert_eq!((given.max_running, given.cache), (3, CacheSize::Bytes(5_000_000_000)));
        assert_eq!(options("--kv-cache-fraction 0.25").cache, CacheSize::FreeFraction(0.25));
        assert_eq!(options("--kv-cache-fraction 1").cache, CacheSize::FreeFraction(1.0));
        assert_eq!((capacity("").context, capacity("--context 300").context), (None, Some(300)));
    }

    #[test]
    fn verify_takes_how_much_company() {
        let company = |line: &str| match parse(line).unwrap().command {
            Some(Command::Verify(arguments)) => arguments.batch,
            other => panic!("{other:?}"),
        };
        assert_eq!(company("verify"), None);
        assert_eq!(company("verify --batch"), Some(255));
        assert_eq!(company("verify --batch=9 --device cpu"), Some(9));
    }

    #[test]
    fn replay_takes_file_url_and_concurrency() {
        let given = |line: &str| match parse(&format!("replay {line}")).unwrap().command {
            Some(Command::Replay(arguments)) => (arguments.file, arguments.url, arguments.concurrency),
            other => panic!("{other:?}"),
        };
        assert_eq!(given("a.jsonl"), ("a.jsonl".into(), "http://127.0.0.1:8080".to_owned(), 4));
        assert_eq!(given("a --url http://b:1 --concurrency 9"), ("a".into(), "http://b:1".to_owned(), 9));
        assert_eq!(refused("replay"), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused("replay a --concurrency 0"), ErrorKind::ValueValidation);
    }

    #[test]
    fn devices() {
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        assert_eq!("cuda:12".parse(), Ok(DeviceChoice::Cuda(12)));
        for wrong in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "cuda:99999999999", "CPU"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn generate_needs_exactly_one_input() {
        assert_eq!(refused("generate"), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused("generate hello --chat hello"), ErrorKind::ArgumentConflict);
        assert_eq!(refused("generate --chat hello --token-ids 1"), ErrorKind::ArgumentConflict);
        assert_eq!(generate("hello").prompt.as_deref(), Some("hello"));
        assert_eq!(generate("--chat hello").chat.as_deref(), Some("hello"));
        assert_eq!(generate("--token-ids 1,2,3").token_ids, Some(TokenIds(vec![1, 2, 3])));
    }

    #[test]
    fn token_ids_come_from_a_file_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "5, 6\n7\n").unwrap();
        let given: TokenIds = format!("@{}", file.path().display()).parse().unwrap();
        assert_eq!(given, TokenIds(vec![5, 6, 7]));
        for wrong in ["", ",", "1,x", "-1", "4294967296", "1.5", "@/nowhere/ids"] {
            assert!(wrong.parse::<TokenIds>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn generate_takes_all_options() {
        let given = generate(
            "x --max-tokens 7 --temperature 0.8 --top-p 0.9 --top-k 40 --min-p 0.05 --seed 18446744073709551615 \
             --logprobs 5 --ignore-eos --json --device cpu",
        );
        assert_eq!((given.max_tokens, given.temperature, given.top_p), (Some(7), 0.8, Some(0.9)));
        assert_eq!((given.top_k, given.min_p, given.seed), (Some(40), Some(0.05), Some(u64::MAX)));
        assert_eq!((given.logprobs, given.ignore_eos, given.json), (Some(5), true, true));
        assert_eq!(given.source.device, DeviceChoice::Cpu);
    }

    #[test]
    fn values_out_of_range_are_usage_errors() {
        for option in [
            "--max-tokens 0",
            "--max-tokens=-1",
            "--temperature NaN",
            "--temperature inf",
            "--temperature=-0.1",
            "--top-p 1.01",
            "--top-p x",
            "--min-p=-0.5",
            "--logprobs 21 --json",
            "--seed 18446744073709551616",
            "--device tpu",
        ] {
            assert_eq!(refused(&format!("generate x {option}")), ErrorKind::ValueValidation, "{option}");
        }
        assert_eq!(refused("generate x --logprobs 5"), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused("serve --port 65536"), ErrorKind::ValueValidation);
        for option in [
            "--max-running 0",
            "--max-queued-tokens 0",
            "--max-running=-1",
            "--kv-cache-bytes 0",
            "--kv-cache-bytes 1.5",
            "--kv-cache-fraction 0",
            "--kv-cache-fraction 1.01",
            "--kv-cache-fraction=-0.5",
            "--kv-cache-fraction NaN",
            "--context 0",
            "--context x",
        ] {
            assert_eq!(refused(&format!("serve {option}")), ErrorKind::ValueValidation, "{option}");
        }
        assert_eq!(refused("serve --kv-cache-bytes 1 --kv-cache-fraction 0.5"), ErrorKind::ArgumentConflict);
        assert_eq!(refused("verify --golden a --write-golden b"), ErrorKind::ArgumentConflict);
        assert_eq!(refused("verify --batch=0"), ErrorKind::ValueValidation);
        assert_eq!(refused("observe"), ErrorKind::InvalidSubcommand);
    }
}
