//! Kernels on the GPU: loading their image and launching them.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cuda_std::launch::{Arg, Grid, KernelDesc, Launch, MAX_PARAMS};
use cudarc::driver::sys::{self, CUfunction_attribute_enum as FunctionAttribute, CUjit_option_enum as JitOption};

use super::context::Context;
use crate::device::ptx::{check, only, waiting_entries};
use crate::device::{DeviceError, KernelImage, KernelImages};

/// The kernels of one image.
pub(super) struct Module {
    module: sys::CUmodule,
    image: String,
    functions: HashMap<&'static str, Function>,
    /// Whether a kernel has copied something since the last launch of another.
    copied: AtomicBool,
    context: Arc<Context>,
    /// The kernels by their numbers in the timeline.
    #[cfg(feature = "timeline")]
    names: Vec<String>,
}

// SAFETY: the driver's handles may be used from any thread in which the context is current, and every use makes it so.
unsafe impl Send for Module {}
// SAFETY: as above; nothing is changed after loading but an atomic.
unsafe impl Sync for Module {}

struct Function {
    handle: sys::CUfunction,
    static_shared_bytes: u32,
    /// It waits for its predecessors itself: launched while they still run.
    overlaps: bool,
    /// Whether more than [`SHARED_BYTES_ALWAYS`] has been asked for.
    large_shared: AtomicBool,
}

/// The shared memory that a block has without asking.
const SHARED_BYTES_ALWAYS: u32 = 48 * 1024;

/// The driver's message about PTX it refuses is rarely longer.
const LOG_BYTES: usize = 16 * 1024;

impl Module {
    pub(super) fn new(
        context: &Arc<Context>,
        images: &KernelImages<'_>,
        kernels: &[&'static KernelDesc],
    ) -> Result<Self, DeviceError> {
        let image = images.select(context.capability()).ok_or_else(|| {
            let names: Vec<_> = images.images.iter().map(KernelImage::name).collect();
            DeviceError::InvalidDevice(format!(
                "{} has compute capability {}.{}; the kernels are built for {}",
                context.name(),
                context.capability() / 10,
                context.capability() % 10,
                if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
            ))
        })?;
        check(image.ptx, kernels).map_err(|text| DeviceError::ModelLoadFailed(format!("{}: {text}", image.name())))?;
        let text = only(image.ptx, kernels);
        #[cfg(feature = "timeline")]
        let (text, names) = super::timeline::instrument(&text);
        let ptx = CString::new(text)
            .map_err(|_| DeviceError::ModelLoadFailed(format!("the image {} has a NUL byte", image.name())))?;
        context.enter()?;
        let mut log = vec![0_u8; LOG_BYTES];
        let mut options = [JitOption::CU_JIT_ERROR_LOG_BUFFER, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(LOG_BYTES - 1)];
        let mut module = std::ptr::null_mut();
        // SAFETY: the text ends with a NUL; options and values are two each, and the log buffer has the size it says.
        let result = unsafe {
            sys::cuModuleLoadDataEx(&raw mut module, ptx.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
        };
        let text = String::from_utf8_lossy(&log);
        let text = text.trim_end_matches('\0').trim();
        context.check(
            result,
            DeviceError::ModelLoadFailed,
            &format!("the driver refuses the kernels for {} (a newer driver may take them): {text}", image.name()),
        )?;
        let mut this = Self {
            module,
            image: image.name(),
            functions: HashMap::new(),
            copied: AtomicBool::new(false),
            context: Arc::clone(context),
            #[cfg(feature = "timeline")]
            names,
        };
        let waiting = waiting_entries(image.ptx);
        for kernel in kernels {
            let function = this.function(kernel, waiting.contains(kernel.name))?;
            this.functions.insert(kernel.name, function);
        }
        Ok(this)
    }

    fn function(&self, kernel: &KernelDesc, overlaps: bool) -> Result<Function, DeviceError> {
        let name = CString::new(kernel.name)
            .map_err(|_| DeviceError::ModelLoadFailed(format!("{:?} is no kernel name", kernel.name)))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; the module is loaded.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut handle, self.module, name.as_ptr()) };
        self.context.check(result, DeviceError::ModelLoadFailed, &format!("kernel {}", kernel.name))?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: writes one int; the handle is valid.
            let result = unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, handle) };
            self.context
                .check(result, DeviceError::ModelLoadFailed, kernel.name)
                .map(|()| u32::try_from(value).unwrap_or(0))
        };
        let most_threads = attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        let static_shared_bytes = attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        if kernel.block > most_threads {
            return Err(DeviceError::ModelLoadFailed(format!(
                "{} has blocks of {} threads, but its registers allow {most_threads} on {}; give it a launch bound",
                kernel.name,
                kernel.block,
                self.context.name()
            )));
        }
        // All kernels want the same split of a multiprocessor's memory, the most shared memory there is: one that wants another
        // waits until its predecessor has left the multiprocessor, whatever the launch allows. A hint, so its failure is none.
        // SAFETY: the handle is valid.
        let _ = unsafe {
            sys::cuFuncSetAttribute(
                handle,
                FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                sys::CUshared_carveout_enum::CU_SHAREDMEM_CARVEOUT_MAX_SHARED as i32,
            )
        };
        Ok(Function { handle, static_shared_bytes, overlaps, large_shared: AtomicBool::new(false) })
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }

    /// Whether the device was opened with this kernel.
    pub(super) fn has(&self, kernel: &KernelDesc) -> bool {
        self.functions.contains_key(kernel.name)
    }

    /// Launches a kernel that copies for the host. What comes behind it does not overlap with it, unless it says that it can: a kernel
    /// reads early what only uploads have written.
    pub(super) fn launch_copy(&self, launch: &Launch<'_>, grid: Grid) -> Result<(), DeviceError> {
        self.launch(launch, grid, true)?;
        self.copied.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Launches a kernel. `behind_copies`: it reads nothing early that a copy just ahead of it may write.
    pub(super) fn launch(&self, launch: &Launch<'_>, grid: Grid, behind_copies: bool) -> Result<(), DeviceError> {
        let overlaps = behind_copies | !self.copied.swap(false, Ordering::Relaxed);
        let kernel = launch.kernel();
        let function = self.functions.get(kernel.name).ok_or_else(|| {
            DeviceError::KernelLaunchFailed(format!("{} is not in the table the device was opened with", kernel.name))
        })?;
        let [x, y, z] = grid.blocks;
        if i32::try_from(x).is_err() || y > 65535 || z > 65535 {
            return Err(DeviceError::InvalidParameter(format!(
                "{}: the grid {:?} is beyond 2147483647 x 65535 x 65535",
                kernel.name, grid.blocks
            )));
        }
        self.context.enter()?;
        self.allow_shared(kernel, function, grid.dynamic_shared_bytes)?;

        // A buffer is two parameters of 8 bytes. A number lies in the low bytes of its word, which come first.
        let mut words = [0_u64; 2 * MAX_PARAMS];
        let mut count = 0;
        for arg in launch.args() {
            match *arg {
                Arg::Buffer(buffer) => {
                    words[count] = buffer.address;
                    words[count + 1] = buffer.length;
                    count += 2;
                }
                Arg::Scalar { bits, .. } => {
                    words[count] = bits;
                    count += 1;
                }
            }
        }
        let mut pointers: [*mut c_void; 2 * MAX_PARAMS] = [std::ptr::null_mut(); 2 * MAX_PARAMS];
        let base = words.as_mut_ptr();
        for (index, pointer) in pointers[..count].iter_mut().enumerate() {
            // SAFETY: `count` words are in use.
            *pointer = unsafe { base.add(index) }.cast();
        }
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: kernel.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.dynamic_shared_bytes,
            hStream: self.context.stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(function.overlaps && overlaps),
        };
        // SAFETY: the pointers are as many as the entry has parameters, of the sizes that `check` compared at load and
        // `check_arguments` at this call; the driver copies them, and the configuration, before it returns; the buffers
        // are borrowed by the launch, and freeing them waits for the stream.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.handle, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        self.context.check(result, DeviceError::KernelLaunchFailed, kernel.name)
    }

    /// Asks for as much shared memory as the device has, once, when a launch needs more than blocks have anyway.
    fn allow_shared(&self, kernel: &KernelDesc, function: &Function, bytes: u32) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let most = self.context.shared_bytes_per_block().saturating_sub(function.static_shared_bytes);
        if bytes > most {
            return Err(DeviceError::InvalidParameter(format!(
                "{}: {bytes} bytes of dynamic shared memory per block; {} has {most}",
                kernel.name,
                self.context.name()
            )));
        }
        let large = bytes.saturating_add(function.static_shared_bytes) > SHARED_BYTES_ALWAYS;
        if large && !function.large_shared.load(Ordering::Relaxed) {
            // SAFETY: the handle is valid.
            let result = unsafe {
                sys::cuFuncSetAttribute(
                    function.handle,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    most.cast_signed(),
                )
            };
            self.context.check(result, DeviceError::KernelLaunchFailed, kernel.name)?;
            function.large_shared.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `new`, unloaded once; launches are awaited first.
        unsafe {
            let _ = self.context.make_current();
            let _ = sys::cuStreamSynchronize(self.context.stream());
            #[cfg(feature = "timeline")]
            if let (Some(file), Some(words)) =
                (std::env::var_os(super::timeline::FILE), super::timeline::read(self.module))
                && let Err(error) = super::timeline::write(&words, &self.names, file.as_ref())
            {
                tracing::warn!("{error}");
            }
            let _ = sys::cuModuleUnload(self.module);
        }
    }
}
