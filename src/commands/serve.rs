//! `lockstep serve`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::ExitCode;

use anyhow::anyhow;

use crate::cli::ServeArguments;

pub(crate) fn run(arguments: &ServeArguments) -> anyhow::Result<ExitCode> {
    let _ = arguments;
    anyhow::bail!("not connected yet")
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
