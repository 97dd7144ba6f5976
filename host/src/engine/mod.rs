//! The engine: requests in, token events out. It never sees text.

mod request;

pub use request::{
    EngineError, Event, EventSink, Finish, FinishReason, Refused, Request, Sampling, SubmitError, TokenEvent,
};
