//! The engine: requests in, token events out. It never sees text.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `request` | what is asked and what is answered |
//! | `handle` | the seam to whoever brings requests |
//! | `options` | what an engine is set up with; the size of the KV cache |
//! | `check` | what is refused before it waits |
//! | `run` | the engine's thread: queue, steps, failure |
//! | `clock` | how long steps take, and how much of that the device has nothing to do |
//! | `scheduler` | what each step computes: admission, budget, preemption; no tensors |
//! | `sequence` | a request's tokens and its pages |
//! | `pages` | the page pool: who holds which page, which contents are known |
//! | `batch` | a plan as the model takes it |
//! | `client` | a request's owner: delivery |
//! | `prompt_scores` | log-probabilities of prompts |
//! | `sampler` | logits to tokens |

mod batch;
mod check;
mod client;
mod clock;
mod handle;
mod options;
mod pages;
mod prompt_scores;
mod request;
mod run;
mod sampler;
mod scheduler;
mod sequence;

pub use clock::StepTimes;
pub use handle::{Engine, Handle, Status};
pub use options::{CacheSize, EngineOptions, Trial};
pub use pages::PageCounts;
pub use request::{
    EngineError, Event, EventSink, Finish, FinishReason, Refused, Request, Sampling, SubmitError, TokenEvent,
    choice_seed,
};
pub use run::spawn;
pub use sampler::{MAX_TOP_LOGPROBS, SampleRow, Sampled, Sampler};
