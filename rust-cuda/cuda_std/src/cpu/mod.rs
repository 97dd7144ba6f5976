//! The SIMT executor: runs kernels on the CPU.

/// Which memory an access is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Device memory.
    Global,
    /// The block's shared memory.
    Shared,
}

/// What checked mode knows of a buffer.
#[derive(Debug)]
pub struct Shadow {}

pub(crate) fn thread_idx() -> u32 {
    unimplemented!()
}
pub(crate) fn block_dim() -> u32 {
    unimplemented!()
}
pub(crate) fn block_idx() -> [u32; 3] {
    unimplemented!()
}
pub(crate) fn grid_dim() -> [u32; 3] {
    unimplemented!()
}
#[track_caller]
pub(crate) fn sync_threads() {
    unimplemented!()
}
#[track_caller]
pub(crate) fn sync_warp() {
    unimplemented!()
}
#[track_caller]
pub(crate) fn warp_exchange<R>(_value: u32, _read: impl FnOnce(&[u32; 32], usize) -> R) -> R {
    unimplemented!()
}
#[track_caller]
pub(crate) fn mma_m16n8k16_bf16(_a: [u32; 4], _b: [u32; 2], _c: [f32; 4]) -> [f32; 4] {
    unimplemented!()
}
#[track_caller]
pub(crate) fn out_of_bounds(_space: Space, _index: usize, _count: usize, _length: usize) -> ! {
    unimplemented!()
}
#[track_caller]
pub(crate) fn check_alignment(_address: usize, _bytes: usize) {
    unimplemented!()
}
#[track_caller]
pub(crate) fn global_read(_shadow: *const Shadow, _offset: usize, _bytes: usize) {
    unimplemented!()
}
#[track_caller]
pub(crate) fn global_write(_shadow: *const Shadow, _offset: usize, _bytes: usize) {
    unimplemented!()
}
#[track_caller]
pub(crate) fn global_atomic(_shadow: *const Shadow, _offset: usize, _bytes: usize) {
    unimplemented!()
}
#[track_caller]
pub(crate) fn dynamic_shared(_offset: usize, _bytes: usize) -> u32 {
    unimplemented!()
}
#[track_caller]
pub(crate) fn static_shared(_bytes: usize) -> u32 {
    unimplemented!()
}
#[track_caller]
pub(crate) fn shared_read<V: Copy>(_offset: usize) -> V {
    unimplemented!()
}
#[track_caller]
pub(crate) fn shared_write<V: Copy>(_offset: usize, _value: V) {
    unimplemented!()
}
#[track_caller]
pub(crate) fn shared_atomic<V: Copy>(_offset: usize, _update: impl FnOnce(V) -> V) -> V {
    unimplemented!()
}
#[track_caller]
pub(crate) fn async_copy<V: Copy>(_offset: usize, _value: V) {
    unimplemented!()
}
pub(crate) fn async_commit() {
    unimplemented!()
}
pub(crate) fn async_wait(_pending: usize) {
    unimplemented!()
}
