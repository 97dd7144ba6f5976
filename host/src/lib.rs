//! Lockstep's library. Dependencies point down only:
//!
//! | module | what it does | knows nothing of |
//! | --- | --- | --- |
//! | [`server`] | HTTP, JSON, server-sent events | tensors, pages |
//! | [`client`] | drives a server over HTTP and takes the times (it and `server` alone name hyper and tokio) | all others |
//! | [`text`] | tokenizer, chat template, incremental detokenizer | devices, HTTP |
//! | [`verify`] | the self-test of the numeric contract | text, HTTP |
//! | [`engine`] | requests, the step loop on its own thread | text, HTTP |
//! | [`model`] | configuration, weights, the transformer | requests |
//! | [`ops`] | one safe function per kernel: checks shapes, chooses the grid, launches | models |
//! | [`device`] | memory, launches and linear layers on CUDA or on the CPU executor | everything above |

#[cfg(all(feature = "planted-batch-dependence", not(debug_assertions)))]
compile_error!(
    "the feature planted-batch-dependence makes wrong answers on purpose; it is for tests, in the dev profile only"
);

pub mod client;
pub mod device;
pub mod engine;
pub mod model;
pub mod ops;
pub mod server;
#[doc(hidden)]
pub mod testing;
pub mod text;
pub mod verify;
