//! Stand-in.
pub(super) struct Pool { threads: usize }
impl Pool {
    pub(super) fn new(threads: usize) -> std::io::Result<Self> { Ok(Self { threads }) }
    pub(super) fn threads(&self) -> usize { self.threads }
    pub(super) fn for_each(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) { (0..tasks).for_each(task); }
}
