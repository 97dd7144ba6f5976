//! The seam between the engine and whoever brings it requests.

use super::{EventSink, Request, SubmitError};

/// What the engine is doing now, for health checks and admission. Read from memory; asking costs no device call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Requests being generated.
    pub running: usize,
    /// Requests waiting for a place.
    pub waiting: usize,
    /// False once the device failed or the engine stopped: nothing more will be answered.
    pub healthy: bool,
    /// Why it is not healthy.
    pub failure: Option<String>,
    /// True while the weights were last seen in device memory.
    pub resident: bool,
    /// Bytes of device memory held.
    pub device_bytes_used: u64,
}

/// Takes requests without blocking.
pub trait Engine: Send + Sync + 'static {
    /// Queues `request`; its events go to `sink`.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing was queued then and `sink` hears nothing.
    fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<(), SubmitError>;

    /// What the engine is doing now.
    fn status(&self) -> Status;
}
