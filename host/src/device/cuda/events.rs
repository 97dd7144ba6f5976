//! Two points in the stream, and the time between them.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{self, CUevent_flags_enum};

use super::context::{Context, driver_version};
use crate::device::DeviceError;

/// A pair of events.
pub(in crate::device) struct Events {
    first: Event,
    last: Event,
    context: Arc<Context>,
}

pub(super) struct Event {
    handle: sys::CUevent,
    recorded: bool,
    context: Arc<Context>,
}

// SAFETY: a driver's handle may be used from any thread in which the context is current, and every use makes it so.
unsafe impl Send for Event {}
// SAFETY: shared, it is only waited for and read.
unsafe impl Sync for Event {}

const FAULT: &str = "an event";

/// The driver that brought the way in which times are read here.
const MINIMAL_DRIVER: i32 = 12080;

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; destroyed in `drop`.
        let result = unsafe { sys::cuEventCreate(&raw mut handle, CUevent_flags_enum::CU_EVENT_DEFAULT as u32) };
        context.check(result, DeviceError::InferenceFailed, FAULT)?;
        Ok(Self { handle, recorded: false, context: Arc::clone(context) })
    }

    /// The event happens when the device gets here.
    pub(super) fn record(&mut self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: event and stream live, and belong to one context.
        let result = unsafe { sys::cuEventRecord(self.handle, self.context.stream()) };
        self.context.check(result, DeviceError::InferenceFailed, FAULT)?;
        self.recorded = true;
        Ok(())
    }

    /// Waits until it has happened.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the event lives.
        let result = unsafe { sys::cuEventSynchronize(self.handle) };
        self.context.check(result, DeviceError::InferenceFailed, "work before this point failed")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; the driver keeps what is still under way.
        unsafe {
            let _ = self.context.make_current();
            let _ = sys::cuEventDestroy_v2(self.handle);
        }
    }
}

impl Events {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        // cudarc panics where the library lacks a function.
        if driver_version() < MINIMAL_DRIVER {
            let text = "timing needs a driver for CUDA 12.8 or later: install a newer one";
            return Err(DeviceError::InvalidDevice(text.to_owned()));
        }
        Ok(Self { first: Event::new(context)?, last: Event::new(context)?, context: Arc::clone(context) })
    }

    pub(in crate::device) fn start(&mut self) -> Result<(), DeviceError> {
        self.first.record()
    }

    pub(in crate::device) fn stop(&mut self) -> Result<(), DeviceError> {
        self.last.record()
    }

    pub(in crate::device) fn elapsed(&self) -> Result<Duration, DeviceError> {
        if !self.first.recorded || !self.last.recorded {
            let text = "a stopwatch must be started and stopped before it is read";
            return Err(DeviceError::InvalidParameter(text.to_owned()));
        }
        self.context.enter()?;
        let mut milliseconds = 0.0_f32;
        // SAFETY: both events are recorded; the last call writes one number.
        let result = unsafe {
            match sys::cuEventSynchronize(self.last.handle) {
                sys::CUresult::CUDA_SUCCESS => {
                    sys::cuEventElapsedTime_v2(&raw mut milliseconds, self.first.handle, self.last.handle)
                }
                error => error,
            }
        };
        self.context.check(result, DeviceError::InferenceFailed, FAULT)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("two events")
    }
}
