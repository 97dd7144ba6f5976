//! Opening a device, loading a model onto it, starting the engine.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use cuda_std::launch::KernelDesc;
use host::device::{CpuOptions, Device, KernelImage, KernelImages};
use host::engine::{EngineOptions, Handle, spawn};
use host::model::{Model, ModelConfig, TilesChoice};
use host::verify;
use kernels_gpu::kernels_for;

use crate::cli::{DeviceChoice, ModelArguments};
use crate::model_folder;
use crate::progress::Progress;

/// The GPU kernels this program carries. The device takes the best that it runs.
pub(crate) const IMAGES: KernelImages<'static> = KernelImages {
    images: &[
        KernelImage { sm: 80, arch_specific: false, ptx: include_str!(env!("LOCKSTEP_PTX_SM_80")) },
        KernelImage { sm: 90, arch_specific: true, ptx: include_str!(env!("LOCKSTEP_PTX_SM_90A")) },
    ],
};

/// A model that answers.
pub(crate) struct Started {
    pub(crate) engine: Handle,
    pub(crate) model: Arc<Model>,
    /// After the engine, so that it is dropped after it.
    pub(crate) thread: EngineThread,
}

/// The engine's thread. Waits for it when dropped: a process that ends while another thread frees memory of a GPU can
/// crash in the driver's own clean-up.
pub(crate) struct EngineThread(Option<JoinHandle<()>>);

/// The thread ends with the step it is in; a device that hangs must not keep the process.
const PATIENCE: Duration = Duration::from_secs(5);

impl EngineThread {
    pub(crate) fn new(thread: JoinHandle<()>) -> Self {
        Self(Some(thread))
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let deadline = Instant::now() + PATIENCE;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() && thread.join().is_err() {
            tracing::error!("the engine's thread panicked");
        }
    }
}

/// Opens the device, loads the model with a progress display, starts an engine with the options that suit the device.
pub(crate) fn start(
    source: &ModelArguments,
    folder: &Path,
    context_tokens: Option<usize>,
    options: impl FnOnce(&Device) -> EngineOptions,
) -> anyhow::Result<Started> {
    ready(Arc::new(load(source, folder, context_tokens)?), options)
}

/// Checks the numeric contract and starts an engine.
pub(crate) fn ready(model: Arc<Model>, options: impl FnOnce(&Device) -> EngineOptions) -> anyhow::Result<Started> {
    if let Some(line) = verify::quick(&model)?.iter().find(|line| !line.holds) {
        anyhow::bail!(
            "the numeric contract does not hold on this device: {}: {}; see lockstep verify",
            line.claim,
            line.detail
        );
    }
    let (engine, thread) = spawn(Arc::clone(&model), options(model.device()))?;
    Ok(Started { engine, model, thread: EngineThread::new(thread) })
}

/// How long algorithms of linear layers are timed at most. What is not reached stays as it is.
const CHOOSING_ALGORITHMS: Duration = Duration::from_millis(120);

/// How long our own tiles are timed at most.
const CHOOSING_TILES: Duration = Duration::from_millis(400);

/// Opens the device, loads the model onto it and chooses what computes it, for contexts of the model's own maximum where nothing
/// else is asked for.
pub(crate) fn load(source: &ModelArguments, folder: &Path, context_tokens: Option<usize>) -> anyhow::Result<Model> {
    let device = open(source, folder)?;
    let mut progress = Progress::on_stderr(format!("loading {}", model_folder::name(folder)));
    let model = Model::load(&device, folder, context_tokens, &mut |done, total| progress.show(done, total))?;
    choose(&model)?;
    Ok(model)
}

/// Chooses by timing what computes the model's layers, where there is a choice. Returns what [`Model::choose_tiles`] does.
pub(crate) fn choose(model: &Model) -> anyhow::Result<Vec<TilesChoice>> {
    let chosen = model
        .choose_algorithms(CHOOSING_ALGORITHMS)
        .and_then(|_| model.choose_tiles(CHOOSING_TILES))
        .and_then(|tiles| {
            model.choose_prefill()?;
            Ok(tiles)
        });
    chosen.or_else(|error| {
        // What was not timed stays as it is; a device that has failed is another matter.
        if let Some(failure) = model.device().failure() {
            return Err(failure.into());
        }
        tracing::warn!("what computes linear layers was not timed: {error}");
        Ok(Vec::new())
    })
}

/// Opens the device with the kernels that the model needs.
pub(crate) fn open(source: &ModelArguments, folder: &Path) -> anyhow::Result<Device> {
    open_device(source.device, &kernels_for(ModelConfig::load(folder)?.head_width))
}

/// The device in words, with the kernels it runs.
pub(crate) fn describe(device: &Device) -> String {
    match device.kernel_image() {
        Some(image) => format!("{} ({image} kernels)", device.name()),
        None => device.name(),
    }
}

/// `auto` means the first GPU if there is one; a GPU that is there but cannot be used is an error, because answering a
/// hundred times slower in silence helps nobody.
fn open_device(choice: DeviceChoice, kernels: &[&'static KernelDesc]) -> anyhow::Result<Device> {
    match choice {
        DeviceChoice::Cpu => cpu(),
        DeviceChoice::Auto if Device::cuda_count() == 0 => cpu(),
        DeviceChoice::Auto => {
            Device::cuda(0, &IMAGES, kernels).map_err(|error| anyhow!("{error}; --device cpu works without the GPU"))
        }
        DeviceChoice::Cuda(ordinal) => Ok(Device::cuda(ordinal, &IMAGES, kernels)?),
    }
}

fn cpu() -> anyhow::Result<Device> {
    Ok(Device::cpu(CpuOptions::default())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_ptx_of_its_own_target() {
        for image in IMAGES.images {
            assert!(image.ptx.contains(&format!(".target {}", image.name())), "{}", image.name());
        }
    }
}
