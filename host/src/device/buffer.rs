//! Typed device memory: owned buffers and borrowed views of them.

use std::marker::PhantomData;
use std::ops::{Bound, Range, RangeBounds};

use cuda_std::Element;
use cuda_std::cpu::Shadow;
use cuda_std::launch::{BufferArg, ReadBuffer, WriteBuffer};

use super::{DeviceError, cpu, cuda};

/// Which device memory belongs to: the address of the device's state, unique while any of its memory lives.
pub(super) type DeviceId = usize;

/// Memory that its device gets back when this is dropped.
pub(super) enum Memory {
    Cpu(cpu::Memory),
    Cuda(cuda::Memory),
}

/// Memory for elements of one type on one device. Dropping it frees the memory.
pub struct Buffer<T: Element> {
    memory: Memory,
    len: usize,
    _elements: PhantomData<T>,
}

/// A readable view of a part of a [`Buffer`].
#[derive(Clone, Copy)]
pub struct Slice<'a, T: Element> {
    view: View,
    _elements: PhantomData<&'a T>,
}

/// A writable view of a part of a [`Buffer`].
pub struct SliceMut<'a, T: Element> {
    view: View,
    _elements: PhantomData<&'a mut T>,
}

#[derive(Clone, Copy)]
struct View {
    device: DeviceId,
    address: u64,
    /// Elements.
    len: usize,
    /// Of the whole buffer; null outside checked mode.
    shadow: *const Shadow,
    /// Bytes from the start of the buffer.
    shadow_offset: usize,
}

impl View {
    fn part<T>(self, range: impl RangeBounds<usize>) -> Result<Self, DeviceError> {
        let start = match range.start_bound() {
            Bound::Included(&start) => Some(start),
            Bound::Excluded(&before) => before.checked_add(1),
            Bound::Unbounded => Some(0),
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.checked_add(1),
            Bound::Excluded(&end) => Some(end),
            Bound::Unbounded => Some(self.len),
        };
        match (start, end) {
            (Some(start), Some(end)) if start <= end && end <= self.len => Ok(Self {
                address: self.address + (start * size_of::<T>()) as u64,
                len: end - start,
                shadow_offset: self.shadow_offset + start * size_of::<T>(),
                ..self
            }),
            _ => Err(DeviceError::InvalidParameter(format!(
                "the range {:?}..{:?} is not inside a buffer of {} elements",
                range.start_bound(),
                range.end_bound(),
                self.len
            ))),
        }
    }

    /// What checked mode knows of the buffer, and the bytes of this view in it.
    ///
    /// # Safety
    /// The buffer is alive.
    unsafe fn shadow<'a, T>(&self) -> Option<(&'a Shadow, Range<usize>)> {
        // SAFETY: the shadow lives as long as the buffer.
        let shadow = unsafe { self.shadow.as_ref()? };
        Some((shadow, self.shadow_offset..self.shadow_offset + self.len * size_of::<T>()))
    }

    fn arg(&self) -> BufferArg {
        BufferArg {
            address: self.address,
            length: self.len as u64,
            shadow: self.shadow,
            shadow_offset: self.shadow_offset as u64,
        }
    }
}

impl<T: Element> Buffer<T> {
    /// Takes over memory of `len` elements.
    pub(super) fn new(memory: Memory, len: usize) -> Self {
        Self { memory, len, _elements: PhantomData }
    }

    fn view(&self) -> View {
        let (device, address, shadow) = match &self.memory {
            Memory::Cpu(memory) => (memory.device(), memory.address(), memory.shadow()),
            Memory::Cuda(memory) => (memory.device(), memory.address(), std::ptr::null()),
        };
        View { device, address, len: self.len, shadow, shadow_offset: 0 }
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: an allocation has at least one element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, to read.
    #[must_use]
    pub fn as_slice(&self) -> Slice<'_, T> {
        Slice { view: self.view(), _elements: PhantomData }
    }

    /// All of it, to write.
    #[must_use]
    pub fn as_slice_mut(&mut self) -> SliceMut<'_, T> {
        SliceMut { view: self.view(), _elements: PhantomData }
    }

    /// The elements of `range`, to read.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<Slice<'_, T>, DeviceError> {
        self.as_slice().slice(range)
    }

    /// The elements of `range`, to write.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Result<SliceMut<'_, T>, DeviceError> {
        self.as_slice_mut().into_slice(range)
    }
}

impl<'a, T: Element> Slice<'a, T> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.view.len
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.view.len == 0
    }

    /// The elements of `range` of this view.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<Slice<'a, T>, DeviceError> {
        Ok(Slice { view: self.view.part::<T>(range)?, _elements: PhantomData })
    }

    /// What checked mode knows of the buffer, and the bytes of this view in it.
    pub(super) fn shadow(&self) -> Option<(&Shadow, Range<usize>)> {
        // SAFETY: the view borrows the buffer.
        unsafe { self.view.shadow::<T>() }
    }

    pub(super) fn device(&self) -> DeviceId {
        self.view.device
    }

    pub(crate) fn address(&self) -> u64 {
        self.view.address
    }
}

impl<'a, T: Element> SliceMut<'a, T> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.view.len
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.view.len == 0
    }

    /// The same elements, to read.
    #[must_use]
    pub fn as_slice(&self) -> Slice<'_, T> {
        Slice { view: self.view, _elements: PhantomData }
    }

    /// The elements of `range` of this view, for a shorter time.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Result<SliceMut<'_, T>, DeviceError> {
        Ok(SliceMut { view: self.view.part::<T>(range)?, _elements: PhantomData })
    }

    /// The elements of `range` of this view, instead of it.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn into_slice(self, range: impl RangeBounds<usize>) -> Result<SliceMut<'a, T>, DeviceError> {
        Ok(SliceMut { view: self.view.part::<T>(range)?, _elements: PhantomData })
    }

    /// The first `middle` elements and the rest.
    ///
    /// # Errors
    /// There are fewer than `middle`.
    pub fn split_at(self, middle: usize) -> Result<(SliceMut<'a, T>, SliceMut<'a, T>), DeviceError> {
        let (first, rest) = (self.view.part::<T>(..middle)?, self.view.part::<T>(middle..)?);
        Ok((SliceMut { view: first, _elements: PhantomData }, SliceMut { view: rest, _elements: PhantomData }))
    }

    /// The same memory as elements of another type, which any bits are values of: for memory that holds one thing after the
    /// other. What does not fill an element is left out.
    ///
    /// # Errors
    /// It does not start where such an element may.
    pub fn cast<U: Element>(self) -> Result<SliceMut<'a, U>, DeviceError> {
        if !self.view.address.is_multiple_of(align_of::<U>() as u64) {
            return Err(DeviceError::InvalidParameter(format!(
                "memory at {:#x} cannot hold elements of type {}",
                self.view.address,
                U::NAME
            )));
        }
        let len = self.view.len * size_of::<T>() / size_of::<U>();
        Ok(SliceMut { view: View { len, ..self.view }, _elements: PhantomData })
    }

    /// What checked mode knows of the buffer, and the bytes of this view in it.
    pub(super) fn shadow(&self) -> Option<(&Shadow, Range<usize>)> {
        // SAFETY: the view borrows the buffer.
        unsafe { self.view.shadow::<T>() }
    }

    pub(super) fn device(&self) -> DeviceId {
        self.view.device
    }

    pub(crate) fn address(&self) -> u64 {
        self.view.address
    }
}

impl<'a, T: Element> From<&'a Buffer<T>> for Slice<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        buffer.as_slice()
    }
}

impl<'a, T: Element> From<&'a Slice<'_, T>> for Slice<'a, T> {
    fn from(slice: &'a Slice<'_, T>) -> Self {
        Slice { view: slice.view, _elements: PhantomData }
    }
}

impl<'a, T: Element> From<&'a SliceMut<'_, T>> for Slice<'a, T> {
    fn from(slice: &'a SliceMut<'_, T>) -> Self {
        slice.as_slice()
    }
}

impl<'a, T: Element> From<&'a mut Buffer<T>> for SliceMut<'a, T> {
    fn from(buffer: &'a mut Buffer<T>) -> Self {
        buffer.as_slice_mut()
    }
}

impl<'a, T: Element> From<&'a mut SliceMut<'_, T>> for SliceMut<'a, T> {
    fn from(slice: &'a mut SliceMut<'_, T>) -> Self {
        SliceMut { view: slice.view, _elements: PhantomData }
    }
}

// SAFETY: a view is an address with a length; the shadow is made to be shared between the executor's threads, and
// the borrow of the buffer keeps both alive.
unsafe impl<T: Element> Send for Slice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for Slice<'_, T> {}
// SAFETY: as above; a writable view is not copyable, so one thread at a time has it.
unsafe impl<T: Element> Send for SliceMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for SliceMut<'_, T> {}

// SAFETY: the buffer owns the memory, and it is borrowed shared: nobody writes.
unsafe impl<T: Element> ReadBuffer<T> for Buffer<T> {
    fn read_arg(&self) -> BufferArg {
        self.view().arg()
    }
}

// SAFETY: the buffer owns the memory, and it is borrowed exclusively.
unsafe impl<T: Element> WriteBuffer<T> for Buffer<T> {
    fn write_arg(&mut self) -> BufferArg {
        self.view().arg()
    }
}

// SAFETY: the view borrows the buffer shared, and lies inside it.
unsafe impl<T: Element> ReadBuffer<T> for Slice<'_, T> {
    fn read_arg(&self) -> BufferArg {
        self.view.arg()
    }
}

// SAFETY: the view borrows its part of the buffer exclusively, and is itself borrowed shared.
unsafe impl<T: Element> ReadBuffer<T> for SliceMut<'_, T> {
    fn read_arg(&self) -> BufferArg {
        self.view.arg()
    }
}

// SAFETY: the view borrows its part of the buffer exclusively, and is itself borrowed exclusively.
unsafe impl<T: Element> WriteBuffer<T> for SliceMut<'_, T> {
    fn write_arg(&mut self) -> BufferArg {
        self.view.arg()
    }
}

impl<T: Element> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{}>[{}]", T::NAME, self.len)
    }
}

impl<T: Element> std::fmt::Debug for Slice<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice<{}>[{}]", T::NAME, self.view.len)
    }
}

impl<T: Element> std::fmt::Debug for SliceMut<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SliceMut<{}>[{}]", T::NAME, self.view.len)
    }
}
