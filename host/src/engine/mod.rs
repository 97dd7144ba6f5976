//! The engine: requests in, token events out. It never sees text.

mod handle;
mod request;

pub use handle::{Engine, Status};
pub use request::{
    EngineError, Event, EventSink, Finish, FinishReason, Refused, Request, Sampling, SubmitError, TokenEvent,
};
