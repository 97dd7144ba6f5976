//! The program as a user meets it: exit codes, one clear line per error, and `generate`'s two outputs. On the CPU, with a
//! small reference model.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn lockstep(arguments: &[&str]) -> Outcome {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let read = |mut stream: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
    };
    let (stdout, stderr) = (read(Box::new(child.stdout.take().unwrap())), read(Box::new(child.stderr.take().unwrap())));
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > PATIENCE => {
                child.kill().unwrap();
                panic!("{arguments:?} hangs: {}", stderr.join().unwrap());
            }
            None => thread::sleep(Duration::from_millis(10)),
        }
    };
    Outcome { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// The one line that says why the run failed.
fn failure(arguments: &[&str]) -> String {
    let outcome = lockstep(arguments);
    assert_eq!(outcome.code, Some(1), "{arguments:?}: {}", outcome.stderr);
    let errors: Vec<&str> = outcome.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", outcome.stderr);
    assert_eq!(outcome.stderr.lines().last(), Some(errors[0]));
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    errors[0].to_string()
}

/// A copy of a small reference model, to be damaged.
fn model() -> (TempDir, PathBuf) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/qwen2-w64-r2");
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("small");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    (folder, copy)
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn generate_failure(model: &Path, arguments: &[&str]) -> String {
    let model = model.to_str().unwrap();
    failure(&[&["generate", "--model", model, "--device", "cpu"], arguments].concat())
}

fn json(model: &Path, arguments: &[&str]) -> serde_json::Value {
    let model = model.to_str().unwrap();
    let outcome = lockstep(&[&["generate", "--model", model, "--device", "cpu", "--json"], arguments].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.lines().count(), 1, "{}", outcome.stdout);
    serde_json::from_str(&outcome.stdout).unwrap()
}

#[test]
fn help_and_version() {
    let help = lockstep(&["--help"]);
    assert_eq!(help.code, Some(0));
    assert!(
        ["serve", "generate", "verify", "bench"].iter().all(|command| help.stdout.contains(command)),
        "{}",
        help.stdout
    );
    let version = lockstep(&["--version"]);
    assert_eq!((version.code, version.stdout), (Some(0), format!("lockstep {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn wrong_usage_exits_with_2() {
    for arguments in [
        &["observe"][..],
        &["generate"],
        &["generate", "a", "b"],
        &["generate", "a", "--max-tokens", "0"],
        &["generate", "a", "--top-k", "5"],
        &["serve", "--port", "65536"],
        &["serve", "--max-running", "0"],
        &["serve", "--kv-cache-bytes", "0"],
        &["serve", "--kv-cache-fraction", "1.5"],
        &["serve", "--kv-cache-bytes", "1", "--kv-cache-fraction", "0.5"],
        &["serve", "--context", "0"],
        &["verify", "--device", "abacus"],
        &["bench", "--batch", "0"],
        &["bench", "--only", "luck"],
        &["bench", "--rate", "1"],
    ] {
        let outcome = lockstep(arguments);
        assert_eq!(outcome.code, Some(2), "{arguments:?}");
        assert!(outcome.stderr.starts_with("error: ") && outcome.stdout.is_empty(), "{}", outcome.stderr);
    }
}

#[test]
fn a_folder_that_is_not_there() {
    for command in [&["serve"][..], &["verify"], &["bench"], &["generate", "x"]] {
        let line = failure(&[command, &["--device", "cpu", "--model", "/nowhere/model"]].concat());
        assert!(line.contains("/nowhere/model"), "{line}");
    }
}

#[test]
fn a_missing_file() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let (_guard, model) = model();
        fs::remove_file(model.join(file)).unwrap();
        let line = generate_failure(&model, &["x"]);
        assert!(line.contains(file), "{line}");
    }
}

#[test]
fn a_truncated_weights_file() {
    let (_guard, model) = model();
    let path = model.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    let line = generate_failure(&model, &["x"]);
    assert!(line.contains("model.safetensors is truncated") && line.contains(&bytes.len().to_string()), "{line}");
}

#[test]
fn weights_of_another_dtype() {
    let (_guard, model) = model();
    let path = model.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let text = String::from_utf8(bytes[8..header].to_vec()).unwrap();
    // The same length, so that every offset stays right.
    bytes[8..header].copy_from_slice(text.replace(r#""BF16""#, r#""F16" "#).as_bytes());
    fs::write(&path, bytes).unwrap();
    let line = generate_failure(&model, &["x"]);
    assert!(line.contains("F16") && line.contains("BF16") && line.contains("model.embed_tokens.weight"), "{line}");
}

#[test]
fn an_unknown_architecture_and_a_wrong_shape() {
    let (_guard, model) = model();
    let config = model.join("config.json");
    edit_json(&config, |config| config["intermediate_size"] = 128.into());
    let line = generate_failure(&model, &["x"]);
    assert!(line.contains("shape") && line.contains("[96, 128]") && line.contains("[128, 128]"), "{line}");
    edit_json(&config, |config| config["architectures"] = serde_json::json!(["NovelForCausalLM"]));
    let line = generate_failure(&model, &["x"]);
    assert!(line.contains("NovelForCausalLM") && line.contains("Qwen2ForCausalLM"), "{line}");
}

#[test]
fn a_device_that_is_not_there() {
    let (_guard, model) = model();
    let line = failure(&["generate", "--model", model.to_str().unwrap(), "--device", "cuda:63", "x"]);
    assert!(line.contains("63") || line.contains("driver"), "{line}");
}

#[test]
fn a_port_in_use() {
    let (_guard, model) = model();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let line = failure(&["serve", "--model", model.to_str().unwrap(), "--device", "cpu", "--port", &port]);
    assert!(line.contains(&port) && line.contains("in use"), "{line}");
}

#[test]
fn a_context_longer_than_the_models() {
    let (_guard, model) = model();
    edit_json(&model.join("config.json"), |config| config["max_position_embeddings"] = 64.into());
    let line = failure(&["serve", "--model", model.to_str().unwrap(), "--device", "cpu", "--context", "65"]);
    assert!(line.contains("65") && line.contains("64"), "{line}");
}

#[test]
fn a_prompt_that_does_not_fit() {
    let (_guard, model) = model();
    edit_json(&model.join("config.json"), |config| config["max_position_embeddings"] = 64.into());
    let line = generate_failure(&model, &["--token-ids", "1,2,3", "--max-tokens", "62"]);
    assert!(line.contains("64"), "{line}");
    let ids = vec!["1"; 65].join(",");
    let line = generate_failure(&model, &["--token-ids", &ids]);
    assert!(line.contains("65") && line.contains("64"), "{line}");
    let line = generate_failure(&model, &["--token-ids", "1,99999"]);
    assert!(line.contains("99999"), "{line}");
}

#[test]
fn json_says_everything_and_the_stream_says_the_text() {
    let (_guard, model) = model();
    let question = ["--token-ids", "5,6,7", "--max-tokens", "6", "--ignore-eos", "--seed", "3"];
    let answer = json(&model, &[&question[..], &["--logprobs", "2"]].concat());
    assert_eq!(answer["tokens"].as_array().unwrap().len(), 6);
    assert_eq!((&answer["finish_reason"], &answer["seed"]), (&"length".into(), &3.into()));
    let logprobs = answer["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 6);
    for (listed, token) in logprobs.iter().zip(answer["tokens"].as_array().unwrap()) {
        // Greedy: the first listed token is the chosen one.
        assert_eq!((listed.as_array().unwrap().len(), &listed[0][0]), (2, token));
        assert!(listed[0][1].as_f64().unwrap() >= listed[1][1].as_f64().unwrap());
        assert!(listed[0][1].as_f64().unwrap() < 0.0);
    }
    let model = model.to_str().unwrap();
    let outcome = lockstep(&[&["generate", "--model", model, "--device", "cpu"], &question[..]].concat());
    assert_eq!(outcome.stdout, format!("{}\n", answer["text"].as_str().unwrap()));
}

#[test]
fn one_seed_gives_one_answer_and_without_one_it_is_reported() {
    let (_guard, model) = model();
    let question =
        ["--token-ids", "5,6,7", "--max-tokens", "16", "--ignore-eos", "--temperature", "1", "--logprobs", "3"];
    // Each is a process of its own: log-probabilities are compared to the last digit, too.
    let drawn = json(&model, &question);
    let seed = drawn["seed"].as_u64().unwrap().to_string();
    assert_eq!(json(&model, &[&question[..], &["--seed", &seed]].concat()), drawn);
    let other = json(&model, &[&question[..], &["--seed", &format!("{seed}1")]].concat());
    assert_ne!(other["tokens"], drawn["tokens"]);
}

#[test]
fn golden_digests_are_recorded_compared_and_found_wrong() {
    let (guard, model) = model();
    let file = guard.path().join("golden.json");
    let verify = |option: &str| {
        let (model, file) = (model.to_str().unwrap(), file.to_str().unwrap());
        lockstep(&["verify", "--model", model, "--device", "cpu", option, file])
    };
    let line = failure(&["verify", "--model", model.to_str().unwrap(), "--device", "cpu", "--golden", "/nowhere/file"]);
    assert!(line.contains("/nowhere/file"), "{line}");
    assert_eq!(verify("--write-golden").code, Some(0));
    // Another process.
    let equal = verify("--golden");
    assert_eq!(equal.code, Some(0), "{}{}", equal.stdout, equal.stderr);
    assert!(equal.stdout.lines().filter(|line| line.starts_with("ok ")).count() >= 4, "{}", equal.stdout);
    edit_json(&file, |golden| golden["CPU executor"]["small"]["answers"]["greedy"] = "00".into());
    let other = verify("--golden");
    assert_eq!(other.code, Some(1));
    assert_eq!(other.stdout.lines().filter(|line| line.starts_with("FAIL")).count(), 1, "{}", other.stdout);
    assert!(other.stdout.contains("request greedy"), "{}", other.stdout);
}

#[test]
fn token_ids_may_come_from_a_file_and_need_no_tokenizer() {
    let (_guard, model) = model();
    fs::write(model.join("ids"), "5, 6\n7\n").unwrap();
    let file = format!("@{}", model.join("ids").display());
    let with = json(&model, &["--token-ids", &file, "--max-tokens", "4", "--ignore-eos", "--seed", "1"]);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(model.join(file)).unwrap();
    }
    let without = json(&model, &["--token-ids", "5,6,7", "--max-tokens", "4", "--ignore-eos", "--seed", "1"]);
    assert_eq!(without["tokens"], with["tokens"]);
    assert!(without["text"].is_null() && with["text"].is_string());
}

/// A figure's value, or a panic.
fn figure<'a>(report: &'a serde_json::Value, what: &str, unit: &str, batch: Option<u64>) -> &'a serde_json::Value {
    let figures = report["figures"].as_array().unwrap();
    let is_it = |figure: &&serde_json::Value| {
        figure["what"] == what && figure["unit"] == unit && figure["batch"].as_u64() == batch
    };
    figures.iter().find(is_it).unwrap_or_else(|| panic!("no {what} in {unit} at {batch:?}: {report}"))
}

#[test]
fn a_bench_measures_every_kind_against_its_own_ceilings() {
    let (_guard, model) = model();
    let line = ["--device", "cpu", "--json", "--runs", "1", "--batch", "1,2", "--context", "32", "--tokens", "4"];
    let model = ["bench", "--model", model.to_str().unwrap(), "--length", "70"];
    let outcome = lockstep(&[&model[..], &line].concat());
    assert_eq!((outcome.code, outcome.stdout.lines().count()), (Some(0), 1), "{}", outcome.stderr);
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((&report["model"], &report["runs"]), (&"small".into(), &1.into()));
    for figure in report["figures"].as_array().unwrap() {
        let number = |key: &str| figure[key].as_f64().unwrap_or_else(|| panic!("{key}: {figure}"));
        assert!(number("min") <= number("value") && number("value") <= number("max"), "{figure}");
        // What drawing adds and how long the device waits may come out as nothing.
        assert!(figure["unit"] == "%" || number("value") > 0.0, "{figure}");
    }
    let value = |what: &str, unit: &str, batch| figure(&report, what, unit, batch)["value"].as_f64().unwrap();
    let copied = value("ceiling: device copy", "GB/s", None) * 1e9;
    let multiplied = value("ceiling: matrix product", "TFLOP/s", None) * 1e12;
    for batch in [1, 2] {
        let decode = figure(&report, "decode", "tokens/s", Some(batch));
        // By hand from the model's dimensions: 325,248 parameters once, and 3 layers of 64 keys and 64 values for 32
        // tokens of prompt and half of the 4 generated, two bytes each.
        let bytes = (2 * (325_248 + batch * 3 * 2 * 64 * 34)) as f64;
        assert_eq!(decode["bytes"].as_f64().unwrap(), bytes);
        let share = value("decode", "tokens/s", Some(batch)) / batch as f64 * bytes / copied;
        assert!((decode["share_of_ceiling"].as_f64().unwrap() / share - 1.0).abs() < 1e-9, "{decode}");
        for what in ["first token, median request", "first token, last request", "step: on the device", "decode step"] {
            value(what, "ms", Some(batch));
        }
        assert!(value("step: device waits for the host", "%", Some(batch)) < 100.0);
    }
    let prefill = figure(&report, "prefill", "ms", Some(1));
    let share = prefill["flops"].as_f64().unwrap() / prefill["value"].as_f64().unwrap() * 1e3 / multiplied;
    assert!((prefill["share_of_ceiling"].as_f64().unwrap() / share - 1.0).abs() < 1e-9, "{prefill}");
    value("drawing a token adds to a step", "%", Some(2));
    assert!(value("start to ready", "ms", None) >= value("start: load", "ms", None));
    // 325,248 parameters, of which the CPU has the head's 512 x 128 a second time as the embedding; and the rotary table:
    // sine and cosine of 32 angles at 2048 positions.
    let weights = 2 * (325_248 + 512 * 128) + 4 * 2 * 32 * 2048;
    assert_eq!(value("memory: weights", "MB", None), f64::from(weights) / 1e6);
}

#[test]
fn a_bench_leaves_out_what_does_not_fit_and_compares_with_a_kept_one() {
    let (guard, model) = model();
    edit_json(&model.join("config.json"), |config| config["max_position_embeddings"] = 64.into());
    let kept = guard.path().join("kept.json");
    let model = ["bench", "--model", model.to_str().unwrap(), "--device", "cpu", "--runs", "1", "--tokens", "4"];
    let kinds = ["--only", "decode,prefill", "--batch", "1", "--context", "20,62", "--length", "60,65", "--json"];
    let outcome = lockstep(&[&model[..], &kinds].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("decode, batch 1, context 62: ") && outcome.stderr.contains("64"),
        "{}",
        outcome.stderr
    );
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    let contexts = |what: &str| {
        let figures = report["figures"].as_array().unwrap().iter();
        figures.filter(|figure| figure["what"] == what).map(|figure| figure["context"].as_u64()).collect::<Vec<_>>()
    };
    assert_eq!((contexts("decode"), contexts("decode step")), (vec![Some(20)], vec![Some(20)]));
    assert_eq!(contexts("prefill"), [Some(60), Some(60)]);

    fs::write(&kept, &outcome.stdout).unwrap();
    let kept = kept.to_str().unwrap();
    let outcome = lockstep(&["bench", "--compare", kept, kept, "--json"]);
    let compared: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    let decode = figure(&compared, "decode", "tokens/s", Some(1));
    assert_eq!((&decode["ratio"], &decode["before"]), (&1.0.into(), &decode["after"]));
    let outcome = lockstep(&[&model[..], &kinds[..kinds.len() - 1], &["--compare", kept]].concat());
    assert!(outcome.stdout.lines().any(|line| line.starts_with("decode step ")), "{}", outcome.stdout);
    assert!(failure(&["bench", "--compare", "/nowhere/kept.json"]).contains("/nowhere/kept.json"));
    assert!(failure(&["bench", "--http", "nowhere"]).contains("http://HOST:PORT"));
}
