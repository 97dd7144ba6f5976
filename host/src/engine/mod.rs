//! The engine: requests in, token events out. It never sees text.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `request` | what is asked and what is answered |
//! | `handle` | the seam to whoever brings requests |
//! | `run` | the engine's thread: queue, steps, delivery |
//! | `sequence` | a running request's tokens |
//! | `sampler` | logits to tokens |

mod handle;
mod request;
mod run;
mod sampler;
mod sequence;

pub use handle::{Engine, Status};
pub use request::{
    EngineError, Event, EventSink, Finish, FinishReason, Refused, Request, Sampling, SubmitError, TokenEvent,
};
pub use run::{EngineOptions, Handle, spawn};
pub use sampler::{MAX_TOP_LOGPROBS, SampleRow, Sampled, Sampler};
