//! What the host needs to start a kernel: its descriptor and its arguments. Written by `#[kernel]`.

use core::marker::PhantomData;

use crate::{Element, cpu};

/// How a kernel uses a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// [`In`](crate::In).
    Read,
    /// [`Out`](crate::Out).
    Write,
    /// [`InOut`](crate::InOut).
    ReadWrite,
}

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// A buffer: in PTX two parameters of 8 bytes, address and length in elements.
    Buffer {
        /// The element's name, as in [`Element::NAME`].
        element: &'static str,
        /// How it is used.
        access: Access,
    },
    /// A number of this many bytes.
    Scalar {
        /// 4 or 8.
        bytes: usize,
    },
}

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamDesc {
    /// Its name in the source.
    pub name: &'static str,
    /// What it is.
    pub kind: ParamKind,
}

/// A kernel: its name in the PTX, its block size, its parameters, and the function that the executor runs.
#[derive(Debug)]
pub struct KernelDesc {
    /// The entry's name in the PTX.
    pub name: &'static str,
    /// Threads in a block: a multiple of 32, fixed for the kernel.
    pub block: u32,
    /// Its parameters, in order.
    pub params: &'static [ParamDesc],
    /// Calls the kernel with arguments of exactly these kinds.
    pub entry: unsafe fn(&[Arg]),
}

impl KernelDesc {
    /// The sizes in bytes of the parameters that the PTX entry declares.
    pub fn ptx_param_bytes(&self) -> impl Iterator<Item = usize> {
        self.params
            .iter()
            .flat_map(|param| match param.kind {
                ParamKind::Buffer { .. } => [8, 8],
                ParamKind::Scalar { bytes } => [bytes, 0],
            })
            .filter(|&bytes| bytes > 0)
    }
}

/// A buffer as an argument.
#[derive(Clone, Copy, Debug)]
pub struct BufferArg {
    /// Its address on its device.
    pub address: u64,
    /// Elements.
    pub length: u64,
    /// What the executor knows of it in checked mode; null otherwise and on a GPU.
    pub shadow: *const cpu::Shadow,
    /// Where the buffer starts in the shadow's allocation, in bytes.
    pub shadow_offset: u64,
}

/// An argument of a launch.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A buffer.
    Buffer(BufferArg),
    /// A number's bits, in the low `bytes` bytes.
    Scalar {
        /// The bits.
        bits: u64,
        /// 4 or 8.
        bytes: usize,
    },
}

/// Memory of `T` on a device that a kernel may read.
///
/// # Safety
/// The argument describes memory that stays valid and unwritten by others while the borrow lasts.
pub unsafe trait ReadBuffer<T: Element> {
    /// The argument.
    fn read_arg(&self) -> BufferArg;
}

/// Memory of `T` on a device that a kernel may read and write.
///
/// # Safety
/// The argument describes memory that stays valid and untouched by others while the borrow lasts.
pub unsafe trait WriteBuffer<T: Element> {
    /// The argument.
    fn write_arg(&mut self) -> BufferArg;
}

/// A number that may be a kernel's argument.
pub trait Scalar: Copy {
    /// Its bits.
    fn to_bits64(self) -> u64;
    /// From its bits.
    fn from_bits64(bits: u64) -> Self;
}

macro_rules! scalars {
    ($($t:ty: $to:expr, $from:expr;)*) => {
        $(impl Scalar for $t {
            fn to_bits64(self) -> u64 { ($to)(self) }
            fn from_bits64(bits: u64) -> Self { ($from)(bits) }
        })*
    };
}
scalars! {
    u32: u64::from, |bits| bits as u32;
    i32: |v| u64::from(v as u32), |bits| bits as u32 as i32;
    u64: |v| v, |bits| bits;
    f32: |v: f32| u64::from(v.to_bits()), |bits| f32::from_bits(bits as u32);
}

/// The most parameters a kernel may have.
pub const MAX_PARAMS: usize = 24;

/// A kernel with its arguments, ready for a device: what `KERNEL::launch(...)` returns.
#[derive(Debug)]
#[must_use = "a launch does nothing until a device runs it"]
pub struct Launch<'a> {
    kernel: &'static KernelDesc,
    args: [Arg; MAX_PARAMS],
    count: usize,
    _buffers: PhantomData<&'a mut ()>,
}

impl<'a> Launch<'a> {
    /// No arguments yet. Called by the code that `#[kernel]` generates.
    pub fn new(kernel: &'static KernelDesc) -> Self {
        Self { kernel, args: [Arg::Scalar { bits: 0, bytes: 0 }; MAX_PARAMS], count: 0, _buffers: PhantomData }
    }

    fn push(mut self, arg: Arg) -> Self {
        self.args[self.count] = arg;
        self.count += 1;
        self
    }

    /// Adds a buffer that is read.
    pub fn read<T: Element>(self, buffer: &'a (impl ReadBuffer<T> + ?Sized)) -> Self {
        self.push(Arg::Buffer(buffer.read_arg()))
    }

    /// Adds a buffer that is written.
    pub fn write<T: Element>(self, buffer: &'a mut (impl WriteBuffer<T> + ?Sized)) -> Self {
        self.push(Arg::Buffer(buffer.write_arg()))
    }

    /// Adds a number.
    pub fn scalar<S: Scalar>(self, value: S) -> Self {
        self.push(Arg::Scalar { bits: value.to_bits64(), bytes: size_of::<S>() })
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &'static KernelDesc {
        self.kernel
    }

    /// The arguments, in the order of [`KernelDesc::params`].
    #[must_use]
    pub fn args(&self) -> &[Arg] {
        &self.args[..self.count]
    }
}

/// The size of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in each dimension; none may be 0.
    pub blocks: [u32; 3],
    /// Bytes of dynamic shared memory per block.
    pub dynamic_shared_bytes: u32,
}

impl Grid {
    /// A one-dimensional grid without dynamic shared memory.
    #[must_use]
    pub fn new_1d(blocks: u32) -> Self {
        Self { blocks: [blocks, 1, 1], dynamic_shared_bytes: 0 }
    }

    /// A two-dimensional grid without dynamic shared memory.
    #[must_use]
    pub fn new_2d(x: u32, y: u32) -> Self {
        Self { blocks: [x, y, 1], dynamic_shared_bytes: 0 }
    }
}
