//! The program, serving on a free port of the loopback, and a client that sees each event as it comes.
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]
#![allow(dead_code, reason = "each test file uses some of it")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What takes longer hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A serving program; killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) address: SocketAddr,
    /// What it announced.
    pub(crate) announcement: String,
}

impl Running {
    /// Serves the demo model on the CPU.
    pub(crate) fn demo() -> Self {
        Self::start(&[], Stdio::null())
    }

    /// With more on the command line.
    pub(crate) fn demo_with(arguments: &[&str]) -> Self {
        Self::start(arguments, Stdio::null())
    }

    /// Its log goes to a pipe that nobody reads.
    pub(crate) fn demo_unheard() -> Self {
        let mut this = Self::start(&[], Stdio::piped());
        drop(this.child.stderr.take());
        this
    }

    fn start(arguments: &[&str], stderr: Stdio) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(["serve", "--device", "cpu", "--port", "0"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut announcement = String::new();
        // The curl line is the last one. After it nobody reads, and the program must go on.
        while !announcement.contains("\ncurl ") {
            let line = lines.next().unwrap_or_else(|| panic!("ended after {announcement:?}")).unwrap();
            announcement += &format!("{line}\n");
        }
        let after = announcement.split("listening  http://").nth(1).unwrap();
        let address = after.split_whitespace().next().unwrap().parse().unwrap();
        Self { child, address, announcement }
    }

    pub(crate) fn connect(&self) -> Client {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(BufReader::new(stream))
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        let mut client = self.connect();
        client.send("GET", path, "");
        client.reply()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, &body.to_string())
    }

    pub(crate) fn post_text(&self, path: &str, body: &str) -> Reply {
        let mut client = self.connect();
        client.send("POST", path, body);
        client.reply()
    }

    /// An answer that must be there.
    pub(crate) fn ask(&self, path: &str, body: &Value) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    }

    /// A connection on which a request is sent and nothing read.
    pub(crate) fn posted(&self, path: &str, body: &Value) -> Client {
        let mut client = self.connect();
        client.send("POST", path, &body.to_string());
        client
    }

    /// A connection on which an answer begins to stream.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Client {
        let mut client = self.posted(path, body);
        let (status, headers) = client.head();
        assert_eq!((status, headers["content-type"].as_str()), (200, "text/event-stream"));
        client
    }

    pub(crate) fn terminate(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub(crate) fn exit_status(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the program does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A whole response.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// A connection.
pub(crate) struct Client(BufReader<TcpStream>);

impl Client {
    fn send(&mut self, method: &str, path: &str, body: &str) {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.0.get_mut().write_all((head + body).as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.strip_suffix("\r\n").unwrap_or_else(|| panic!("cut off: {line:?}")).to_owned()
    }

    fn head(&mut self) -> (u16, HashMap<String, String>) {
        let status = self.line().split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = HashMap::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { return (status, headers) };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
    }

    fn exactly(&mut self, count: usize) -> String {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn reply(&mut self) -> Reply {
        let (status, headers) = self.head();
        let body = self.exactly(headers["content-length"].parse().unwrap());
        Reply { status, body }
    }

    /// The next chunk of a stream: one event, or none at the end.
    pub(crate) fn event(&mut self) -> Option<Event> {
        loop {
            let count = usize::from_str_radix(&self.line(), 16).unwrap();
            let text = self.exactly(count);
            assert_eq!(self.line(), "");
            if count == 0 {
                return None;
            }
            let text = text.strip_suffix("\n\n").unwrap_or_else(|| panic!("not an event: {text:?}"));
            // A comment keeps the connection alive.
            if !text.starts_with(':') {
                let (name, data) = match text.strip_prefix("event: ") {
                    Some(rest) => rest.split_once("\ndata: ").unwrap(),
                    None => ("", text.strip_prefix("data: ").unwrap()),
                };
                return Some(Event { name: name.to_owned(), data: data.to_owned() });
            }
        }
    }

    /// All further events.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.event()).collect()
    }
}

/// A server-sent event.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) data: String,
}

impl Event {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error}: {}", self.data))
    }
}
