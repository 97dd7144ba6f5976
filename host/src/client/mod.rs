//! Drives a server over HTTP/1.1 with requests whose answers stream, and notes when each token came.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `arrivals` | when requests are due |
//! | `events` | server-sent events to counts of tokens |
//! | `exchange` | one request and its answer |

mod arrivals;
mod events;
mod exchange;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use self::exchange::Connection;

pub use self::arrivals::due_times;

/// A server, from a URL such as `http://127.0.0.1:8080`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Host and port.
    authority: String,
    /// What comes before every path, without a slash at its end.
    prefix: String,
}

/// Why nothing could be asked at all.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL is none that can be asked.
    #[error("{url:?} is not the URL of a server; write http://HOST:PORT")]
    Url {
        /// What was given.
        url: String,
    },
    /// The server does not answer.
    #[error("{authority} does not answer ({reason}); start it, or check the URL")]
    NoAnswer {
        /// Host and port.
        authority: String,
        /// Why.
        reason: String,
    },
    /// No runtime.
    #[error("no threads for a client: {0}")]
    NoRuntime(String),
}

/// Which requests are sent when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// So many clients, each of which asks again as soon as it has its answer.
    Closed {
        /// Clients.
        clients: usize,
    },
    /// Requests at random times, whether others were answered or not: the gaps are exponential.
    Open {
        /// Requests per second on average.
        per_second: f64,
        /// Of the gaps.
        seed: u64,
    },
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// With the whole answer.
    Complete,
    /// Refused with this status.
    Status(u16),
    /// No connection, or one that ended before an answer began.
    NoConnection,
    /// An error event instead of the rest of the answer.
    ErrorEvent,
    /// A stream that ended without its end.
    CutOff,
    /// Not within the patience.
    TimedOut,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Complete => f.write_str("complete"),
            Self::Status(status) => write!(f, "status {status}"),
            Self::NoConnection => f.write_str("no connection"),
            Self::ErrorEvent => f.write_str("error event"),
            Self::CutOff => f.write_str("cut off"),
            Self::TimedOut => f.write_str("timed out"),
        }
    }
}

/// One request and what came of it. Times count from the start of the traffic.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    /// When it was due: latencies count from here, so that a request that waits to be sent is late.
    pub due: Duration,
    /// When each event with tokens came, and how many there were in it.
    pub tokens: Vec<(Duration, u32)>,
    /// When it was over.
    pub ended: Duration,
    /// How it ended.
    pub outcome: Outcome,
}

/// Traffic for one server.
#[derive(Clone, Debug)]
pub struct Traffic {
    /// Where requests go.
    pub target: Target,
    /// Their path.
    pub path: String,
    /// When they are sent.
    pub arrivals: Arrivals,
    /// For how long new ones are sent.
    pub duration: Duration,
    /// How long one may take.
    pub patience: Duration,
}

impl Target {
    /// The server at `url`.
    ///
    /// # Errors
    /// It is no `http://` URL with a host.
    pub fn parse(url: &str) -> Result<Self, ClientError> {
        let wrong = || ClientError::Url { url: url.to_owned() };
        let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.is_empty() || authority.starts_with(':') || authority.contains(['?', '#', '@', ' ']) {
            return Err(wrong());
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
        let prefix = if path.is_empty() { String::new() } else { format!("/{}", path.trim_end_matches('/')) };
        Ok(Self { authority, prefix })
    }

    /// The status and the body of the answer to `GET path`.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn get(&self, path: &str, patience: Duration) -> Result<(u16, Vec<u8>), ClientError> {
        let no_answer =
            |reason: &str| ClientError::NoAnswer { authority: self.authority.clone(), reason: reason.to_owned() };
        runtime()?.block_on(async {
            let answer = async { Connection::open(self).await?.get(self, path).await };
            match tokio::time::timeout(patience, answer).await {
                Ok(answer) => answer.map_err(|reason| no_answer(&reason)),
                Err(_) => Err(no_answer("it takes too long")),
            }
        })
    }
}

fn runtime() -> Result<Runtime, ClientError> {
    let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    built.map_err(|error| ClientError::NoRuntime(error.to_string()))
}

/// Sends requests for as long as `traffic` says and waits for all answers. `body` makes the body of a request from its
/// number.
///
/// # Errors
/// No runtime. What goes wrong with a request is its [`Outcome`].
pub fn drive(
    traffic: &Traffic,
    body: impl Fn(u64) -> String + Send + Sync + 'static,
) -> Result<Vec<Exchange>, ClientError> {
    let runtime = runtime()?;
    let (exchanges, mut results) = unbounded_channel();
    let plan = Arc::new(Plan { traffic: traffic.clone(), body: Box::new(body), began: Instant::now() });
    match traffic.arrivals {
        Arrivals::Closed { clients } => {
            for client in 0..clients {
                runtime.spawn(closed_loop(Arc::clone(&plan), client as u64, clients as u64, exchanges.clone()));
            }
        }
        Arrivals::Open { per_second, seed } => {
            for (number, due) in (0..).zip(due_times(per_second, seed, traffic.duration)) {
                // A thread's sleep is exact to some tens of microseconds, a timer of the runtime to a millisecond.
                std::thread::sleep(due.saturating_sub(plan.began.elapsed()));
                let (plan, exchanges) = (Arc::clone(&plan), exchanges.clone());
                runtime.spawn(async move {
                    let _ = exchanges.send(plan.exchange(&mut None, number, due).await);
                });
            }
        }
    }
    drop(exchanges);
    runtime.block_on(async {
        let mut all = Vec::new();
        while let Some(exchange) = results.recv().await {
            all.push(exchange);
        }
        Ok(all)
    })
}

/// What all requests share.
struct Plan {
    traffic: Traffic,
    body: Box<dyn Fn(u64) -> String + Send + Sync>,
    began: Instant,
}

impl Plan {
    /// Request `number`, which is due at `due`, over `connection` where there is one.
    async fn exchange(&self, connection: &mut Option<Connection>, number: u64, due: Duration) -> Exchange {
        let mut exchange = Exchange { due, tokens: Vec::new(), ended: due, outcome: Outcome::TimedOut };
        let body = Bytes::from((self.body)(number));
        let answer = self.answer(connection, body, &mut exchange.tokens);
        if let Ok(outcome) = tokio::time::timeout(self.traffic.patience, answer).await {
            exchange.outcome = outcome;
        }
        if exchange.outcome != Outcome::Complete {
            // What is left of that answer must not be taken for the next one.
            *connection = None;
        }
        exchange.ended = self.began.elapsed();
        exchange
    }

    async fn answer(
        &self,
        connection: &mut Option<Connection>,
        body: Bytes,
        tokens: &mut Vec<(Duration, u32)>,
    ) -> Outcome {
        if !connection.as_ref().is_some_and(Connection::is_open) {
            *connection = Connection::open(&self.traffic.target).await.ok();
        }
        match connection {
            Some(connection) => {
                let note = |count| tokens.push((self.began.elapsed(), count));
                connection.post(&self.traffic.target, &self.traffic.path, body, note).await
            }
            None => Outcome::NoConnection,
        }
    }
}

/// One client: asks, reads, asks again.
async fn closed_loop(plan: Arc<Plan>, client: u64, clients: u64, exchanges: UnboundedSender<Exchange>) {
    let mut connection = None;
    for turn in 0.. {
        let due = plan.began.elapsed();
        if due >= plan.traffic.duration {
            return;
        }
        let exchange = plan.exchange(&mut connection, turn * clients + client, due).await;
        if exchange.outcome != Outcome::Complete {
            // Whoever is refused asks again, but not as fast as it can.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let _ = exchanges.send(exchange);
    }
}

/// How many requests ended in which way.
#[must_use]
pub fn outcomes(exchanges: &[Exchange]) -> BTreeMap<Outcome, usize> {
    let mut counts = BTreeMap::new();
    for exchange in exchanges {
        *counts.entry(exchange.outcome.clone()).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests;
