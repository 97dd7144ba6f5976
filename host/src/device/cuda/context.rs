//! The driver, the device, its context and its one stream.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

use crate::device::buffer::DeviceId;
use crate::device::{DeviceError, MemoryInfo, MemoryTracker};

/// A device's context, with all that the other files need of it.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Held while a thread records: one does at a time.
    recorder: Mutex<()>,
    /// The thread that records, and the stream it records on.
    recording: Mutex<Option<(ThreadId, sys::CUstream)>>,
    is_recording: AtomicBool,
    ordinal: i32,
    name: String,
    capability: u32,
    multiprocessors: usize,
    shared_bytes_per_block: u32,
    total_bytes: u64,
    tracker: MemoryTracker,
    /// Held while memory is freed, and while a check needs it to stay.
    frees: Mutex<()>,
    failed: AtomicBool,
    failure: Mutex<Option<DeviceError>>,
}

// SAFETY: the driver's handles may be used from any thread in which the context is current, and every use makes it so.
unsafe impl Send for Context {}
// SAFETY: the driver serialises what threads do with a stream.
unsafe impl Sync for Context {}

/// Loads the driver. cudarc panics where the library is missing, so this asks first.
fn load_driver() -> Result<(), DeviceError> {
    // SAFETY: loads a library and runs its initialisers, which for the driver do nothing that we depend on.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::DeviceNotFound(
            "the NVIDIA driver's library libcuda.so was not found: install the driver, or use the CPU device"
                .to_owned(),
        ));
    }
    // SAFETY: called before everything else; may be called again.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(()),
        error => Err(DeviceError::DeviceNotFound(format!(
            "the NVIDIA driver does not start ({}): check nvidia-smi, or use the CPU device",
            describe(error)
        ))),
    }
}

/// How many GPUs there are.
pub(in crate::device) fn device_count() -> Result<usize, DeviceError> {
    load_driver()?;
    let mut count = 0;
    // SAFETY: writes one int.
    match unsafe { sys::cuDeviceGetCount(&raw mut count) } {
        CUresult::CUDA_SUCCESS => Ok(usize::try_from(count).unwrap_or(0)),
        error => Err(DeviceError::DeviceNotFound(format!("the driver cannot count devices: {}", describe(error)))),
    }
}

/// The newest CUDA version that the driver serves, as major * 1000 + minor * 10; 0 where it does not say.
pub(super) fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes one int. Whoever has a device has loaded the driver.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if result == CUresult::CUDA_SUCCESS { version } else { 0 }
}

/// The driver's name and text for a result.
pub(super) fn describe(result: CUresult) -> String {
    let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
    // SAFETY: each call writes a pointer to a static string, or leaves null.
    unsafe {
        let _ = sys::cuGetErrorName(result, &raw mut name);
        let _ = sys::cuGetErrorString(result, &raw mut text);
        if name.is_null() || text.is_null() {
            return format!("CUDA error {}", result as u32);
        }
        format!("{}, {}", CStr::from_ptr(name).to_string_lossy(), CStr::from_ptr(text).to_string_lossy())
    }
}

/// True when the context can be used after this error. Everything not listed is taken as its end.
fn is_recoverable(result: CUresult) -> bool {
    matches!(
        result,
        CUresult::CUDA_ERROR_INVALID_VALUE
            | CUresult::CUDA_ERROR_OUT_OF_MEMORY
            | CUresult::CUDA_ERROR_NOT_FOUND
            | CUresult::CUDA_ERROR_NOT_SUPPORTED
            | CUresult::CUDA_ERROR_INVALID_HANDLE
            | CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_INVALID_PTX
            | CUresult::CUDA_ERROR_INVALID_SOURCE
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

impl Context {
    pub(super) fn new(ordinal: i32) -> Result<Self, DeviceError> {
        let count = device_count()?;
        if count == 0 {
            return Err(DeviceError::DeviceNotFound(
                "the driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU device".to_owned(),
            ));
        }
        if !usize::try_from(ordinal).is_ok_and(|index| index < count) {
            return Err(DeviceError::InvalidDevice(format!(
                "there is no GPU {ordinal}; choose one of 0..={}",
                count - 1
            )));
        }
        let fault =
            |what: &str, result| DeviceError::InvalidDevice(format!("GPU {ordinal}: {what}: {}", describe(result)));
        let checked = |result, what| match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            error => Err(fault(what, error)),
        };

        let mut device = 0;
        // SAFETY: writes one handle.
        checked(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) }, "it cannot be opened")?;
        let mut text = [0_u8; 256];
        // SAFETY: writes at most the given bytes, with a terminator.
        checked(unsafe { sys::cuDeviceGetName(text.as_mut_ptr().cast(), 255, device) }, "its name cannot be read")?;
        let name =
            CStr::from_bytes_until_nul(&text).map_or_else(|_| String::new(), |name| name.to_string_lossy().into());
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: writes one int.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
            checked(result, "its properties cannot be read").map(|()| u32::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes_per_block = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut total_bytes = 0;
        // SAFETY: writes one size.
        checked(unsafe { sys::cuDeviceTotalMem_v2(&raw mut total_bytes, device) }, "its memory size is unknown")?;

        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle; released in `drop`, or just below.
        checked(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) }, "no context")?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: the context was just retained; the second call writes one handle.
        let result = unsafe {
            match sys::cuCtxSetCurrent(context) {
                CUresult::CUDA_SUCCESS => {
                    sys::cuStreamCreate(&raw mut stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32)
                }
                error => error,
            }
        };
        if result != CUresult::CUDA_SUCCESS {
            // SAFETY: retained above, and nobody else has it.
            unsafe {
                let _ = sys::cuDevicePrimaryCtxRelease_v2(device);
            }
            return Err(fault("no stream", result));
        }
        Ok(Self {
            device,
            context,
            stream,
            recorder: Mutex::new(()),
            recording: Mutex::new(None),
            is_recording: AtomicBool::new(false),
            ordinal,
            name,
            capability: major * 10 + minor,
            multiprocessors: multiprocessors as usize,
            shared_bytes_per_block,
            total_bytes: total_bytes as u64,
            tracker: MemoryTracker::default(),
            frees: Mutex::new(()),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        })
    }

    pub(super) fn id(self: &Arc<Self>) -> DeviceId {
        Arc::as_ptr(self).addr()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn ordinal(&self) -> i32 {
        self.ordinal
    }

    pub(super) fn capability(&self) -> u32 {
        self.capability
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// The most shared memory that a block may have, in bytes.
    pub(super) fn shared_bytes_per_block(&self) -> u32 {
        self.shared_bytes_per_block
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The stream that the calling thread's work goes to: the device's one stream, or the one it records on.
    pub(super) fn stream(&self) -> sys::CUstream {
        if self.is_recording.load(Ordering::Acquire)
            && let Some((thread, stream)) = *self.recording.lock().unwrap_or_else(PoisonError::into_inner)
            && thread == std::thread::current().id()
        {
            return stream;
        }
        self.stream
    }

    /// Keeps other threads from recording while the guard lives.
    pub(super) fn hold_recorder(&self) -> MutexGuard<'_, ()> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, and while it holds the recorder, the calling thread's work goes to `stream`, or again to the device's.
    pub(super) fn record_on(&self, stream: Option<sys::CUstream>) {
        let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        *recording = stream.map(|stream| (std::thread::current().id(), stream));
        self.is_recording.store(recording.is_some(), Ordering::Release);
    }

    /// Counts up whenever memory is freed: what was recorded before may name it.
    pub(super) fn frees_so_far(&self) -> u64 {
        self.tracker.forgotten()
    }

    pub(super) fn tracker(&self) -> &MemoryTracker {
        &self.tracker
    }

    /// Keeps other threads from freeing memory while the guard lives.
    pub(super) fn hold_frees(&self) -> MutexGuard<'_, ()> {
        self.frees.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn failure(&self) -> Option<DeviceError> {
        if !self.failed.load(Ordering::Acquire) {
            return None;
        }
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops the device: the first error stays.
    pub(super) fn fail(&self, error: &DeviceError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
        self.failed.store(true, Ordering::Release);
    }

    /// Makes the context the calling thread's, unless the device has failed.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.make_current()
    }

    /// Makes the context the calling thread's.
    pub(super) fn make_current(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained until `drop`.
        self.check(unsafe { sys::cuCtxSetCurrent(self.context) }, DeviceError::InferenceFailed, "the context")
    }

    /// Turns a result into an error of this kind, and stops the device when the context is lost.
    pub(super) fn check(
        &self,
        result: CUresult,
        kind: fn(String) -> DeviceError,
        what: &str,
    ) -> Result<(), DeviceError> {
        if result == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        let lost = !is_recoverable(result);
        let advice = if lost { "; the device has stopped, restart the process" } else { "" };
        let error = kind(format!("GPU {}: {what}: {}{advice}", self.ordinal, describe(result)));
        if lost {
            self.fail(&error);
        }
        Err(error)
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the stream lives until `drop`.
        self.check(
            unsafe { sys::cuStreamSynchronize(self.stream) },
            DeviceError::InferenceFailed,
            "work before this point failed",
        )
    }

    pub(super) fn memory_info(&self) -> Result<MemoryInfo, DeviceError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        let result = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.check(result, DeviceError::InferenceFailed, "its memory cannot be read")?;
        Ok(MemoryInfo { free_bytes: free as u64, total_bytes: total as u64 })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the last owner; what used the stream held a reference to this and is gone.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuStreamSynchronize(self.stream);
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
