//! How long the device takes for the work between two points.

use std::time::{Duration, Instant};

use super::{Device, DeviceError, cuda};

/// Times work on a device. On CUDA the two points are events in the stream: they are reached when the device gets there,
/// not when the host says so. On the CPU, which works while the caller waits, they are the caller's clock.
#[derive(Debug)]
pub struct Stopwatch(Points);

#[derive(Debug)]
enum Points {
    Cpu { started: Option<Instant>, took: Option<Duration> },
    Cuda(cuda::Events),
}

impl Stopwatch {
    pub(super) fn new(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self(match device {
            Device::Cpu(_) => Points::Cpu { started: None, took: None },
            Device::Cuda(device) => Points::Cuda(device.events()?),
        }))
    }

    /// Work given to the device from here on is timed.
    ///
    /// # Errors
    /// The device has failed.
    pub fn start(&mut self) -> Result<(), DeviceError> {
        match &mut self.0 {
            Points::Cpu { started, .. } => *started = Some(Instant::now()),
            Points::Cuda(events) => events.start()?,
        }
        Ok(())
    }

    /// Work given to the device up to here is timed.
    ///
    /// # Errors
    /// The device has failed.
    pub fn stop(&mut self) -> Result<(), DeviceError> {
        match &mut self.0 {
            Points::Cpu { started, took } => *took = started.map(|started| started.elapsed()),
            Points::Cuda(events) => events.stop()?,
        }
        Ok(())
    }

    /// How long the device took from [`start`](Self::start) to [`stop`](Self::stop); waits until it is done. On CUDA to
    /// about half a microsecond.
    ///
    /// # Errors
    /// It was not started and stopped, or some work failed.
    pub fn elapsed(&self) -> Result<Duration, DeviceError> {
        match &self.0 {
            Points::Cpu { took, .. } => took.ok_or_else(|| {
                DeviceError::InvalidParameter("a stopwatch must be started and stopped before it is read".to_owned())
            }),
            Points::Cuda(events) => events.elapsed(),
        }
    }
}
