//! HTTP, JSON and server-sent events: HTTP/1.1 and HTTP/2 without TLS on one port. Only this and
//! `client` name hyper and tokio; the rest of the program is plain threads.

mod cancel;
mod chat;
mod completions;
mod correlation;
mod error;
mod execute;
mod generation;
mod health;
mod http;
mod parameters;
mod receipt;
mod record;
pub mod replay;
mod sse;
mod validate;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

pub use record::Recorder;

use crate::engine::Engine;
use crate::text::{ChatTemplate, Tokenizer};

/// What is served, as clients see it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// The model's name.
    pub id: String,
    /// Tokens that prompt and answer may have together.
    pub context_tokens: usize,
    /// Token ids below this exist.
    pub vocab_size: usize,
    /// Tokens that end an answer.
    pub eos_ids: Vec<u32>,
    /// The device, in words.
    pub device: String,
    /// Names all that the bits of an answer depend on beside the request.
    pub fingerprint: String,
    /// The type of the weights, such as `bf16`.
    pub dtype: String,
    /// When the weights were made, in seconds since 1970.
    pub created: u64,
}

/// Bounds on what clients can take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Requests waiting in the engine's queue from which on new ones are refused at the door.
    pub waiting: usize,
    /// Tokens generated at most for a request that names no limit.
    pub default_max_tokens: u32,
    /// Silence on a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// For a request's header (idle connections are closed after it, too) and again for its body.
    pub read_timeout: Duration,
    /// For running answers after the signal to stop.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            waiting: 256,
            default_max_tokens: 4096,
            keep_alive: Duration::from_secs(10),
            read_timeout: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}

/// Everything the server needs.
pub struct App {
    /// Generates.
    pub engine: Arc<dyn Engine>,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// None: the model completes text, but does not chat.
    pub template: Option<ChatTemplate>,
    /// What is served.
    pub model: ModelInfo,
    /// Bounds.
    pub limits: Limits,
    /// Where complete answers are recorded, if they are.
    pub recorder: Option<Recorder>,
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another program listens there.
    #[error("{address} is in use by another program; stop that one or choose another port with --port")]
    AddressInUse {
        /// `host:port`.
        address: String,
    },
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}; choose an address of this machine with --host and a port with --port"
    )]
    Bind {
        /// `host:port`.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// No threads, or no signal handlers.
    #[error("cannot start the server: {0}")]
    Start(#[from] std::io::Error),
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Answers that were cut off because they outlasted [`Limits::drain`].
    pub unfinished: usize,
}

/// Listens on `host:port`; port 0 takes a free one.
///
/// # Errors
/// [`ServerError::AddressInUse`] and [`ServerError::Bind`].
pub async fn bind(host: &str, port: u16) -> Result<TcpListener, ServerError> {
    TcpListener::bind((host, port)).await.map_err(|source| {
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        match source.kind() {
            std::io::ErrorKind::AddrInUse => ServerError::AddressInUse { address },
            _ => ServerError::Bind { address, source },
        }
    })
}

/// Serves until `shutdown` completes; then takes no new connections, refuses new generations, lets running ones finish
/// within [`Limits::drain`], and returns with every connection closed and every request of the engine let go.
pub async fn run(listener: TcpListener, shutdown: impl Future<Output = ()>, app: App) -> Drained {
    let server = Arc::new(http::Server::new(app));
    let limits = server.app.limits.clone();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.read_timeout);
    // Pings find HTTP/2 clients that vanished without closing.
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Some(Duration::from_secs(20)));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = serve_connection(&builder, Arc::clone(&server), stream);
                let watched = graceful.watch(connection);
                connections.spawn(async move {
                    if let Err(error) = watched.await {
                        tracing::debug!(error, "connection ended");
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, most often: some are given back soon.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    server.start_draining();
    tracing::info!(generations = server.generations_in_flight(), "shutting down");
    let _ = tokio::time::timeout(limits.drain, server.wait_for_generations()).await;
    let unfinished = server.generations_in_flight();
    // What is left is writing: a client that does not read is not waited for.
    let _ = tokio::time::timeout(Duration::from_secs(1), graceful.shutdown()).await;
    connections.shutdown().await;
    Drained { unfinished }
}

fn serve_connection(
    builder: &auto::Builder<TokioExecutor>,
    server: Arc<http::Server>,
    stream: TcpStream,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = Box<dyn std::error::Error + Send + Sync>> + use<> {
    // A token must not wait for the acknowledgement of the one before.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let service = service_fn(move |request| http::answer(Arc::clone(&server), request));
    builder.serve_connection(TokioIo::new(stream), service).into_owned()
}

/// Runs a server on threads of its own until SIGINT or SIGTERM; a second signal ends it at once. `ready` is called with
/// the address once connections are accepted.
///
/// # Errors
/// [`ServerError`].
pub fn serve(host: &str, port: u16, app: App, ready: impl FnOnce(SocketAddr)) -> Result<Drained, ServerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("http").enable_all().build()?;
    let drained = runtime.block_on(async {
        let listener = bind(host, port).await?;
        let mut first = Signals::new()?;
        let mut second = Signals::new()?;
        ready(listener.local_addr()?);
        let served = run(listener, async move { first.next().await }, app);
        tokio::select! {
            drained = served => Ok::<Drained, ServerError>(drained),
            () = async { second.next().await; second.next().await } => {
                tracing::warn!("second signal: not waiting for running answers");
                Ok(Drained { unfinished: 0 })
            }
        }
    })?;
    // Nothing is left to wait for.
    runtime.shutdown_background();
    Ok(drained)
}

/// SIGINT and SIGTERM.
#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Ctrl-C, where there are no Unix signals.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
