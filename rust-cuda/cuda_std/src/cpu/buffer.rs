//! Memory for tests of kernels.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::Shadow;
use crate::Element;
use crate::launch::{BufferArg, ReadBuffer, WriteBuffer};

#[derive(Clone, Copy)]
#[repr(align(128))]
#[expect(dead_code, reason = "used through pointers")]
struct Line([u8; 128]);

/// Device memory on the CPU, aligned to 128 bytes, with what checked mode knows of it. Fresh memory holds `0xff`
/// bytes, a NaN in every float type.
pub struct Buffer<T> {
    lines: Vec<Line>,
    length: usize,
    shadow: Arc<Shadow>,
    _element: std::marker::PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// `length` elements that nobody has written.
    #[must_use]
    pub fn uninitialised(length: usize) -> Self {
        let bytes = length * size_of::<T>();
        let lines = vec![Line([0xff; 128]); bytes.div_ceil(128)];
        Self { lines, length, shadow: Shadow::new(bytes), _element: std::marker::PhantomData }
    }

    /// A copy of `values`.
    #[must_use]
    pub fn new(values: &[T]) -> Self {
        let mut buffer = Self::uninitialised(values.len());
        buffer.as_mut_slice().copy_from_slice(values);
        buffer
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The elements, written or not.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: the lines hold `length` elements, aligned to 128; all bits are values of an Element.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.length) }
    }

    /// The elements, all of which count as written from now on.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self.shadow.mark_initialised(0..usize::MAX);
        // SAFETY: as above; borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }

    /// What checked mode knows of it.
    #[must_use]
    pub fn shadow(&self) -> &Shadow {
        &self.shadow
    }

    /// A part of it, as an argument.
    ///
    /// # Panics
    /// When the range is not inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        assert!(range.start <= range.end && range.end <= self.length, "the slice is inside the buffer");
        Slice { buffer: self, range }
    }

    fn arg(&self, address: u64, range: &Range<usize>) -> BufferArg {
        let offset = (range.start * size_of::<T>()) as u64;
        BufferArg {
            address: address + offset,
            length: (range.end - range.start) as u64,
            shadow: Arc::as_ptr(&self.shadow),
            shadow_offset: offset,
        }
    }
}

impl<T: Element + fmt::Debug> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

/// A part of a [`Buffer`] that a kernel reads.
pub struct Slice<'a, T> {
    buffer: &'a Buffer<T>,
    range: Range<usize>,
}

// SAFETY: the buffer owns its memory and its shadow; a shared borrow keeps writers away.
unsafe impl<T: Element> ReadBuffer<T> for Buffer<T> {
    fn read_arg(&self) -> BufferArg {
        self.arg(self.lines.as_ptr() as u64, &(0..self.length))
    }
}

// SAFETY: the buffer owns its memory and its shadow; borrowed exclusively.
unsafe impl<T: Element> WriteBuffer<T> for Buffer<T> {
    fn write_arg(&mut self) -> BufferArg {
        let address = self.lines.as_mut_ptr() as u64;
        self.arg(address, &(0..self.length))
    }
}

// SAFETY: as for the whole buffer.
unsafe impl<T: Element> ReadBuffer<T> for Slice<'_, T> {
    fn read_arg(&self) -> BufferArg {
        self.buffer.arg(self.buffer.lines.as_ptr() as u64, &self.range)
    }
}
