//! A sequence of launches that is recorded once and then started as a whole.

use super::{Device, DeviceError, cuda};

/// The recorded form of some work, empty at first. On a GPU a CUDA graph, whose launch costs one call instead of hundreds; the
/// CPU records nothing.
#[derive(Default)]
pub struct Recording(State);

#[derive(Default)]
enum State {
    #[default]
    Empty,
    Recorded(cuda::Graph),
    /// The device cannot record this.
    Impossible,
}

impl Device {
    /// Runs `work`: launches only, no uploads, downloads or waiting. From the second call on with the same `recording` the
    /// work is not called but started as it was recorded.
    ///
    /// So the caller gives a recording the same work each time: the same launches over the same memory, whose borrows
    /// `work` holds. Should memory of the device have been freed since, the work is recorded again.
    ///
    /// # Errors
    /// The work's or the device's error.
    pub fn replay(
        &self,
        recording: &mut Recording,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Self::Cuda(device) = self else { return work() };
        if let State::Recorded(graph) = &recording.0
            && graph.is_current()
        {
            return graph.launch();
        }
        if !matches!(recording.0, State::Impossible) {
            recording.0 = device.record(&mut *work)?.map_or(State::Impossible, State::Recorded);
            if let State::Recorded(graph) = &recording.0 {
                return graph.launch();
            }
        }
        work()
    }
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            State::Empty => "Recording(empty)",
            State::Recorded(_) => "Recording",
            State::Impossible => "Recording(impossible)",
        })
    }
}
