//! `POST /cancel`: ends the jobs of `/execute` that have a name. Works while the queue is full and while the server drains.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use hyper::{Response, StatusCode};
use serde_json::{Map, Value, json};

use super::correlation::RequestIds;
use super::error::ApiError;
use super::http::{Body, Server, json_response};

/// 202 whether or not the job is there: it may have ended while the request was on its way, and sending it again is safe.
pub(super) fn handle(server: &Server, body: &Map<String, Value>, ids: &RequestIds) -> Result<Response<Body>, ApiError> {
    let job_id = super::execute::job_id(body, ids)?;
    let jobs = server.jobs.cancel(&job_id);
    tracing::info!(correlation_id = %ids.correlation, job_id, jobs, "cancelled");
    let mut response = json_response(&json!({"job_id": job_id}));
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

/// Whether an answer is still wanted, as its reader and the engine's thread both see it.
#[derive(Debug, Default)]
pub(super) struct Cancellation {
    cancelled: AtomicBool,
    /// The reader, which may be waiting for a token of a request that has not begun.
    reader: Mutex<Option<Waker>>,
}

impl Cancellation {
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Like [`is_cancelled`](Self::is_cancelled); the task is woken when that changes.
    pub(super) fn poll_cancelled(&self, cx: &Context<'_>) -> bool {
        let mut reader = lock(&self.reader);
        match &mut *reader {
            Some(waker) => waker.clone_from(cx.waker()),
            None => *reader = Some(cx.waker().clone()),
        }
        drop(reader);
        // After the waker is in place: a cancellation from now on wakes it.
        self.is_cancelled()
    }

    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        let reader = lock(&self.reader).take();
        if let Some(waker) = reader {
            waker.wake();
        }
    }
}

/// The jobs that can be cancelled. Each entry belongs to an open request and goes with it, so there are no more of them
/// than of those.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// Clients choose the names, so several jobs may share one.
    by_name: Mutex<HashMap<Arc<str>, Vec<Arc<Cancellation>>>>,
}

impl Jobs {
    /// Until the result is dropped, the job is found by its name.
    pub(super) fn register(self: &Arc<Self>, job_id: &str) -> Registered {
        let (name, cancellation): (Arc<str>, _) = (job_id.into(), Arc::new(Cancellation::default()));
        lock(&self.by_name).entry(Arc::clone(&name)).or_default().push(Arc::clone(&cancellation));
        Registered { jobs: Arc::clone(self), name, cancellation }
    }

    /// How many jobs had this name.
    fn cancel(&self, job_id: &str) -> usize {
        let found = lock(&self.by_name).get(job_id).cloned().unwrap_or_default();
        for cancellation in &found {
            cancellation.cancel();
        }
        found.len()
    }
}

/// A job's entry.
#[derive(Debug)]
pub(super) struct Registered {
    jobs: Arc<Jobs>,
    name: Arc<str>,
    pub(super) cancellation: Arc<Cancellation>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut by_name = lock(&self.jobs.by_name);
        if let Some(entries) = by_name.get_mut(&self.name) {
            entries.retain(|entry| !Arc::ptr_eq(entry, &self.cancellation));
            if entries.is_empty() {
                by_name.remove(&self.name);
            }
        }
    }
}

/// Every state that these locks guard is complete between two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_ends_all_of_its_jobs_and_only_those() {
        let jobs = Arc::new(Jobs::default());
        let (first, second, other) = (jobs.register("a"), jobs.register("a"), jobs.register("b"));
        assert_eq!((jobs.cancel("a"), jobs.cancel("c")), (2, 0));
        let cancelled = [&first, &second, &other].map(|job| job.cancellation.is_cancelled());
        assert_eq!(cancelled, [true, true, false]);
    }

    #[test]
    fn an_entry_goes_with_its_job() {
        let jobs = Arc::new(Jobs::default());
        let (first, second) = (jobs.register("a"), jobs.register("a"));
        drop(first);
        assert_eq!(jobs.cancel("a"), 1);
        assert!(second.cancellation.is_cancelled());
        drop(second);
        assert!(lock(&jobs.by_name).is_empty());
        assert!(!jobs.register("a").cancellation.is_cancelled(), "a name can be used again");
        assert!(lock(&jobs.by_name).is_empty());
    }
}
