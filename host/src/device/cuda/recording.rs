//! Work recorded once and launched again as a whole: CUDA graphs.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::context::{Context, describe};
use crate::device::DeviceError;

/// Recorded work.
pub(in crate::device) struct Graph {
    executable: sys::CUgraphExec,
    /// How many frees the device had seen: after a further one the recorded addresses may be somebody else's.
    frees: u64,
    context: Arc<Context>,
}

// SAFETY: the handle may be used from any thread in which the context is current; one thread at a time has it.
unsafe impl Send for Graph {}

impl Graph {
    /// Whether no memory was freed since it was recorded.
    pub(in crate::device) fn is_current(&self) -> bool {
        self.frees == self.context.frees_so_far()
    }

    /// Records what `work` launches, without running it. `None` where the driver cannot record it.
    pub(super) fn record(
        context: &Arc<Context>,
        work: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<Option<Self>, DeviceError> {
        context.enter()?;
        let _recorder = context.hold_recorder();
        let frees = context.frees_so_far();
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle; destroyed below.
        let result =
            unsafe { sys::cuStreamCreate(&raw mut stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32) };
        context.check(result, DeviceError::InferenceFailed, "no stream to record on")?;
        // Relaxed: libraries may load their code on first use, which the other modes forbid.
        // SAFETY: the stream is new and idle.
        let begun = unsafe {
            sys::cuStreamBeginCapture_v2(stream, sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED)
        };
        let mut graph = std::ptr::null_mut();
        let (worked, result) = if begun == CUresult::CUDA_SUCCESS {
            context.record_on(Some(stream));
            let worked = work();
            context.record_on(None);
            // SAFETY: begun above on this stream; writes one handle, or null.
            (worked, unsafe { sys::cuStreamEndCapture(stream, &raw mut graph) })
        } else {
            (Ok(()), begun)
        };
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph is what was recorded, and is not used after; the stream is ours and records no more.
        let result = unsafe {
            let result = match result {
                CUresult::CUDA_SUCCESS if worked.is_ok() => {
                    sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0)
                }
                other => other,
            };
            if !graph.is_null() {
                let _ = sys::cuGraphDestroy(graph);
            }
            let _ = sys::cuStreamDestroy_v2(stream);
            result
        };
        worked?;
        if result != CUresult::CUDA_SUCCESS || executable.is_null() {
            tracing::warn!(reason = describe(result), "work cannot be recorded; it is launched piece by piece");
            return Ok(None);
        }
        Ok(Some(Self { executable, frees, context: Arc::clone(context) }))
    }

    /// Runs it.
    pub(in crate::device) fn launch(&self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: every address in it is live memory, as no memory was freed since it was recorded (`is_current`).
        let result = unsafe { sys::cuGraphLaunch(self.executable, self.context.stream()) };
        self.context.check(result, DeviceError::KernelLaunchFailed, "recorded work")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once, destroyed once; the driver keeps what still runs.
        unsafe {
            let _ = self.context.make_current();
            let _ = sys::cuGraphExecDestroy(self.executable);
        }
    }
}
