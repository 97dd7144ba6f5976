//! `lockstep serve`: the model over HTTP, until a signal ends it.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{anyhow, bail};
use host::device::Device;
use host::engine::EngineOptions;
use host::model::{Model, ModelConfig};
use host::server::{App, Limits, ModelInfo, Recorder};
use host::text::{ChatTemplate, Tokenizer};

use crate::cli::ServeArguments;
use crate::fingerprint::fingerprint;
use crate::model_folder;
use crate::start::{IMAGES, Started, describe, start};

/// Loads the model, announces it, serves.
pub(crate) fn run(arguments: &ServeArguments) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let folder = model_folder::find(arguments.source.model.as_deref())?;
    // Everything that can be wrong without the weights is found before gigabytes are loaded; the server takes the port
    // itself when it is ready.
    let capacity = &arguments.capacity;
    ModelConfig::load(&folder)?.context_tokens(capacity.context)?;
    let tokenizer = Arc::new(Tokenizer::load(&folder)?);
    let template = ChatTemplate::load(&folder)?;
    drop(bind(&arguments.host, arguments.port)?);
    let recorder = arguments.record.as_deref().map(record_to).transpose()?;

    let options = |device: &Device| capacity.apply(EngineOptions::for_device(device));
    let Started { engine, model, thread: _thread } = start(&arguments.source, &folder, capacity.context, options)?;
    let chats = template.is_some();
    let info = model_info(&model, &folder);
    let mut announcement = announcement(&model, &info);
    let app = App {
        engine: Arc::new(engine),
        tokenizer,
        template,
        model: info.clone(),
        limits: Limits::default(),
        recorder: recorder.clone(),
    };
    let drained = host::server::serve(&arguments.host, arguments.port, app, |address| {
        let line = curl_line(address, &info.id, chats);
        let seconds = began.elapsed().as_secs_f64();
        let _ = write!(announcement, "listening  http://{address} after {seconds:.2} s\n\n{line}\n");
        // Nobody may be reading any more; that ends no server.
        let _ = writeln!(io::stdout(), "{announcement}");
    })?;
    if recorder.is_some_and(|recorder| !recorder.flush(RECORD_PATIENCE)) {
        tracing::error!("the last answers were not recorded: the disk does not keep up");
    }
    match drained.unfinished {
        0 => Ok(ExitCode::SUCCESS),
        count => bail!("stopped with {count} answers cut off"),
    }
}

/// How long the end waits for the last records.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);

fn record_to(path: &Path) -> anyhow::Result<Recorder> {
    Recorder::append(path).map_err(|error| anyhow!("cannot record to {}: {error}; check --record", path.display()))
}

fn model_info(model: &Model, folder: &Path) -> ModelInfo {
    let config = model.config();
    let kernels: Vec<&str> = IMAGES.images.iter().map(|image| image.ptx).collect();
    let modified = std::fs::metadata(&config.path).and_then(|metadata| metadata.modified()).ok();
    let created = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    ModelInfo {
        id: model_folder::name(folder),
        context_tokens: model.context_tokens(),
        vocab_size: config.vocab,
        eos_ids: config.eos_ids.clone(),
        device: describe(model.device()),
        fingerprint: fingerprint(model, folder, &kernels),
        dtype: "bf16".into(),
        created: created.map_or(0, |age| age.as_secs()),
    }
}

fn announcement(model: &Model, info: &ModelInfo) -> String {
    let (config, device) = (model.config(), model.device());
    let mebibytes = device.tracker().total_bytes() >> 20;
    format!(
        "device     {}\nmodel      {} ({}, {} layers, context of {} tokens)\nmemory     {mebibytes} MiB\n",
        info.device,
        info.id,
        config.architecture.name(),
        config.layers,
        info.context_tokens,
    )
}

/// Takes the port before the model is loaded, so that a port in use is known at once.
fn bind(host: &str, port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((host, port)).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => anyhow!("port {port} of {host} is in use; choose another with --port"),
        io::ErrorKind::AddrNotAvailable => {
            anyhow!("{host} is not an address of this machine; choose one with --host (0.0.0.0 is every interface)")
        }
        io::ErrorKind::PermissionDenied => {
            anyhow!("port {port} of {host} may not be used by this user; choose one above 1023 with --port")
        }
        _ => anyhow!("cannot listen on {host} port {port}: {error}; check --host and --port"),
    })
}

/// A command that asks the server something, ready to be copied.
fn curl_line(address: SocketAddr, model: &str, chats: bool) -> String {
    let (path, body) = if chats {
        let messages = serde_json::json!([{"role": "user", "content": "What is 12 + 30?"}]);
        ("chat/completions", serde_json::json!({"model": model, "messages": messages, "stream": true}))
    } else {
        ("completions", serde_json::json!({"model": model, "prompt": "Once upon a time", "stream": true}))
    };
    // A shell ends a quoted text at an apostrophe; the model's name may have one.
    let body = body.to_string().replace('\'', "'\\''");
    format!("curl -N http://{}/v1/{path} -H 'content-type: application/json' -d '{body}'", reachable(address))
}

/// An address that can be asked, where the server listens on every interface.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_an_error_that_names_it() {
        let first = bind("127.0.0.1", 0).unwrap();
        let port = first.local_addr().unwrap().port();
        let text = bind("127.0.0.1", port).unwrap_err().to_string();
        assert!(text.contains(&port.to_string()) && text.contains("in use") && text.contains("--port"), "{text}");
    }

    #[test]
    fn an_address_of_another_machine_is_an_error() {
        let text = bind("192.0.2.1", 0).unwrap_err().to_string();
        assert!(text.contains("192.0.2.1") && text.contains("--host"), "{text}");
    }

    #[test]
    fn the_curl_line_asks_what_the_model_can_answer() {
        let address = "0.0.0.0:8080".parse().unwrap();
        let chat = curl_line(address, "demo", true);
        assert!(chat.starts_with("curl -N http://127.0.0.1:8080/v1/chat/completions "), "{chat}");
        let body = chat.split("-d '").nth(1).unwrap().strip_suffix('\'').unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!((&body["model"], &body["stream"]), (&"demo".into(), &true.into()));
        assert_eq!(body["messages"][0]["role"], "user");
        let text = curl_line("[::]:9".parse().unwrap(), "bob's", false);
        assert!(text.starts_with("curl -N http://[::1]:9/v1/completions ") && text.contains("bob'\\''s"), "{text}");
    }
}
