//! The test rig: a device, guarded memory on it, and a record of every output.

use std::sync::OnceLock;

use cuda_std::Element;
use half::bf16;
use host::device::{Buffer, CpuOptions, Device, KernelImage, KernelImages, MemoryKind, Slice, SliceMut};

/// Elements on each side of a buffer's values that must stay unwritten. A multiple of every vector access.
const GUARD: usize = 64;

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// For checked mode, which is many times slower, and for canaries.
    Small,
    /// For everything else.
    Full,
}

/// A fault planted in what is read back, to prove that the tests would notice it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sabotage {
    /// Every output is zeros.
    Zeros,
    /// Every float output is NaN, every id `u32::MAX`.
    Nan,
    /// The halves of every output are swapped; an output of one element is wrong.
    Swapped,
    /// One element of the output that is read after this many others is wrong.
    OneWrong(usize),
}

/// An element with bits.
pub(crate) trait Bits: Element + Copy {
    /// Bits of memory that nobody wrote.
    const UNWRITTEN: u32;
    /// The bits.
    fn bits(self) -> u32;
    /// From bits.
    fn of_bits(bits: u32) -> Self;
    /// A clearly different value.
    fn wrong(self) -> Self;
}

impl Bits for f32 {
    const UNWRITTEN: u32 = u32::MAX;
    fn bits(self) -> u32 {
        self.to_bits()
    }
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits)
    }
    fn wrong(self) -> Self {
        if self.is_finite() { self + self.abs() * 0.5 + 0.5 } else { 1.0 }
    }
}

impl Bits for bf16 {
    const UNWRITTEN: u32 = 0xffff;
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }
    fn wrong(self) -> Self {
        Self::from_f32(Bits::wrong(self.to_f32()))
    }
}

impl Bits for u32 {
    const UNWRITTEN: u32 = u32::MAX;
    fn bits(self) -> u32 {
        self
    }
    fn of_bits(bits: u32) -> Self {
        bits
    }
    fn wrong(self) -> Self {
        self ^ 1
    }
}

/// Device memory between two guard zones.
pub(crate) struct Guarded<T: Element> {
    buffer: Buffer<T>,
    len: usize,
}

impl<T: Element> Guarded<T> {
    /// The values.
    pub(crate) fn view(&self) -> Slice<'_, T> {
        self.buffer.slice(GUARD..GUARD + self.len).unwrap()
    }

    /// The values, to write.
    pub(crate) fn view_mut(&mut self) -> SliceMut<'_, T> {
        self.buffer.slice_mut(GUARD..GUARD + self.len).unwrap()
    }
}

/// What a kernel wrote in one case.
pub(crate) struct Record {
    /// Its name in `KERNELS`.
    pub(crate) kernel: &'static str,
    /// The bits of the values.
    pub(crate) bits: Vec<u32>,
}

/// A device and what is done with it.
pub(crate) struct Rig {
    /// The device.
    pub(crate) device: Device,
    /// The outputs so far.
    pub(crate) records: Vec<Record>,
    /// How many outputs were read that have elements.
    pub(crate) reads: usize,
    scale: Scale,
    sabotage: Option<Sabotage>,
}

impl Rig {
    fn new(device: Device, scale: Scale) -> Self {
        Self { device, records: Vec::new(), reads: 0, scale, sabotage: None }
    }

    /// The CPU in checked mode.
    pub(crate) fn checked(seed: u64) -> Self {
        let options = CpuOptions { checked: true, seed, ..CpuOptions::default() };
        Self::new(Device::cpu(options).unwrap(), Scale::Small)
    }

    /// The CPU as a server uses it.
    pub(crate) fn fast() -> Self {
        Self::new(Device::cpu(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap(), Scale::Full)
    }

    /// The CPU with a planted fault.
    pub(crate) fn sabotaged(sabotage: Option<Sabotage>) -> Self {
        Self { scale: Scale::Small, sabotage, ..Self::fast() }
    }

    /// The first GPU, opened once for all tests: a fault in one shows in all.
    pub(crate) fn cuda() -> Self {
        static GPU: OnceLock<Device> = OnceLock::new();
        let open = || {
            let images = [
                KernelImage { sm: 80, arch_specific: false, ptx: super::ptx::SM_80 },
                KernelImage { sm: 90, arch_specific: true, ptx: super::ptx::SM_90A },
            ];
            Device::cuda(0, &KernelImages { images: &images }, kernels_gpu::KERNELS).unwrap()
        };
        Self::new(GPU.get_or_init(open).clone(), Scale::Full)
    }

    /// The cases for this rig's scale.
    pub(crate) fn pick<T>(&self, small: T, full: T) -> T {
        if self.scale == Scale::Small { small } else { full }
    }

    /// Memory that nobody has written.
    pub(crate) fn unwritten<T: Element>(&self, len: usize) -> Guarded<T> {
        let buffer = self.device.alloc_unwritten(len + 2 * GUARD, MemoryKind::Other, "test").unwrap();
        Guarded { buffer, len }
    }

    /// Memory with values.
    pub(crate) fn filled<T: Element>(&self, values: &[T]) -> Guarded<T> {
        let mut guarded = self.unwritten(values.len());
        self.device.upload(guarded.view_mut(), values).unwrap();
        guarded
    }

    /// The values, after a look at the guard zones.
    #[track_caller]
    pub(crate) fn download<T: Bits>(&self, memory: &Guarded<T>) -> Vec<T> {
        let all = self.device.download(&memory.buffer).unwrap();
        let (before, rest) = all.split_at(GUARD);
        let (values, after) = rest.split_at(memory.len);
        assert!(
            before.iter().chain(after).all(|value| value.bits() == T::UNWRITTEN),
            "something was written outside the output"
        );
        values.to_vec()
    }

    /// Words, after a look at the guard zones.
    #[track_caller]
    pub(crate) fn words(&self, memory: &Guarded<u64>) -> Vec<u64> {
        let all = self.device.download(&memory.buffer).unwrap();
        let (before, rest) = all.split_at(GUARD);
        let (values, after) = rest.split_at(memory.len);
        assert!(before.iter().chain(after).all(|&word| word == u64::MAX), "something was written outside the output");
        values.to_vec()
    }

    /// The values that a kernel wrote, for comparison (and perhaps sabotaged).
    #[track_caller]
    pub(crate) fn read<T: Bits>(&mut self, kernel: &'static str, memory: &Guarded<T>) -> Vec<T> {
        assert!(kernels_gpu::KERNELS.iter().any(|known| known.name == kernel), "{kernel} is no kernel");
        let values = self.download(memory);
        self.records.push(Record { kernel, bits: values.iter().map(|value| value.bits()).collect() });
        self.spoil(values)
    }

    /// Plants the fault, where there is one for this output.
    pub(crate) fn spoil<T: Bits>(&mut self, mut values: Vec<T>) -> Vec<T> {
        if values.is_empty() {
            return values;
        }
        let middle = values.len() / 2;
        match self.sabotage {
            Some(Sabotage::Zeros) => values.fill(T::of_bits(0)),
            Some(Sabotage::Nan) => values.fill(T::of_bits(T::UNWRITTEN)),
            Some(Sabotage::Swapped) if values.len() == 1 => values[0] = values[0].wrong(),
            Some(Sabotage::Swapped) => values.rotate_left(middle),
            Some(Sabotage::OneWrong(index)) if index == self.reads => {
                values[middle] = values[middle].wrong();
            }
            _ => {}
        }
        self.reads += 1;
        values
    }
}
