//! A few threads that stay, for loops over independent pieces of work.

/// Runs loops on several threads.
pub(super) struct Pool {
    threads: usize,
}

impl Pool {
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        Ok(Self { threads })
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }
}
