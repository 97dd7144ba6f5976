//! Models: configuration, weights, the transformer.
//!
//! A model is a Hugging Face folder. [`ModelConfig`] reads `config.json`, [`Checkpoint`] maps the safetensors files, and
//! [`architecture::weights`] says which tensor is which and checks every name, dtype and shape before anything is uploaded.

pub mod architecture;
mod arena;
mod checkpoint;
mod choose;
mod config;
mod decode;
mod error;
mod kv_cache;
mod layout;
mod load;
mod prefill;
mod recordings;
mod rope;
mod step;
#[cfg(test)]
mod test_folder;
mod transformer;
mod ways;
mod workspace;

pub use architecture::{LayerWeights, Weight, Weights};
pub use arena::Logits;
pub use checkpoint::{Checkpoint, TensorView};
pub use choose::{MOST_HEAD_ROWS, TilesChoice};
pub use config::{Architecture, HEAD_WIDTHS, MAX_HEAD_RATIO, ModelConfig, WIDTH_MULTIPLE};
pub use error::ModelError;
pub use kv_cache::KvCache;
pub use load::LoadError;
pub use rope::{Rope, RopeScaling, RopeTable};
pub use step::{Choosing, Prefill, Step, StepLimits};
pub use transformer::{LinearLayer, Model};
pub use ways::DecodeWay;
pub use workspace::Workspace;
