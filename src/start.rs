//! Opening a device and loading a model onto it.

use std::path::Path;

use host::engine::Engine;
use host::model::ModelConfig;

use crate::cli::ModelArguments;

/// A model that answers.
pub(crate) struct Started {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) config: ModelConfig,
    pub(crate) context_tokens: usize,
}

/// Opens the device, loads the model with a progress display, starts the engine.
pub(crate) fn start(source: &ModelArguments, folder: &Path) -> anyhow::Result<Started> {
    let _ = (source, folder);
    anyhow::bail!("not connected yet")
}
