//! A server stops for SIGTERM and for SIGINT. Alone in its process, since signals reach all of it.
#![cfg(unix)]

mod server_support;

use std::process::Command;
use std::sync::mpsc::channel;

use host::server::{Drained, serve};
use server_support::{Client, PATIENCE, app, say};

#[test]
fn signals_drain_and_stop() {
    for signal in ["-TERM", "-INT"] {
        let (told, address) = channel();
        let (app, _engine) = app(say(b"x"), host::server::Limits::default());
        let server = std::thread::spawn(move || serve("127.0.0.1", 0, app, |address| told.send(address).unwrap()));
        let mut client = Client::new(address.recv_timeout(PATIENCE).unwrap());
        client.request("GET", "/health", &[], b"");
        assert_eq!(client.reply().status, 200);
        let sent = Command::new("kill").args([signal, &std::process::id().to_string()]).status().unwrap();
        assert!(sent.success());
        assert_eq!(server.join().unwrap().unwrap(), Drained { unfinished: 0 });
        assert!(client.rest().is_empty());
    }
}
