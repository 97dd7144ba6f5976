//! Memory that the layers of a step use first and the choice of its tokens after them: the largest intermediate values of
//! either are never there at a time with those of the other. At 256 rows with logits and 4096 rows in all this saves a
//! third of what they need apart.

use half::bf16;

use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, SliceMut};

/// Parts start at multiples of so many f32: 256 bytes, as an allocation of its own would.
const ALIGN: usize = 64;

/// How large each part is, in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct ArenaSizes {
    /// bf16.
    pub(super) gate_up: usize,
    /// bf16.
    pub(super) gated: usize,
    /// f32.
    pub(super) scratch: usize,
    /// f32.
    pub(super) logits: usize,
    /// f32 behind logits of as many rows as there can be.
    pub(super) spare: usize,
}

/// The memory.
#[derive(Debug)]
pub(super) struct Arena {
    memory: Buffer<f32>,
    sizes: ArenaSizes,
}

/// The arena as layers use it. Nothing of it is there any more when logits are.
#[derive(Debug)]
pub(super) struct LayerValues<'a> {
    pub(super) gate_up: SliceMut<'a, bf16>,
    pub(super) gated: SliceMut<'a, bf16>,
    /// Attention partials, and when these are merged the parts of a layer's output.
    pub(super) scratch: SliceMut<'a, f32>,
}

/// The logits of a step, and memory for what is made of them.
#[derive(Debug)]
pub struct Logits<'a> {
    /// \[R, V\].
    pub values: SliceMut<'a, f32>,
    /// Nobody's until the next step: for R rows at least what [`spare_for_choosing`](crate::ops::spare_for_choosing) says.
    pub spare: SliceMut<'a, f32>,
}

impl Arena {
    pub(super) fn new(device: &Device, sizes: ArenaSizes) -> Result<Self, DeviceError> {
        let layers = words(sizes.gate_up) + words(sizes.gated) + sizes.scratch;
        let choosing = sizes.logits.next_multiple_of(ALIGN) + sizes.spare;
        let label = "layers' values, then logits";
        let memory = device.alloc_unwritten(layers.max(choosing), MemoryKind::Activations, label)?;
        Ok(Self { memory, sizes })
    }

    /// Elements of scratch memory.
    pub(super) fn scratch_len(&self) -> usize {
        self.sizes.scratch
    }

    /// For the layers.
    pub(super) fn layers(&mut self) -> Result<LayerValues<'_>, DeviceError> {
        let Self { memory, sizes } = self;
        let (gate_up, rest) = memory.as_slice_mut().split_at(words(sizes.gate_up))?;
        let (gated, rest) = rest.split_at(words(sizes.gated))?;
        Ok(LayerValues {
            gate_up: gate_up.cast()?.into_slice(..sizes.gate_up)?,
            gated: gated.cast()?.into_slice(..sizes.gated)?,
            scratch: rest.into_slice(..sizes.scratch)?,
        })
    }

    /// Behind the layers: `len` logits.
    pub(super) fn logits(&mut self, len: usize) -> Result<Logits<'_>, DeviceError> {
        let (values, spare) = self.memory.as_slice_mut().split_at(len.next_multiple_of(ALIGN))?;
        Ok(Logits { values: values.into_slice(..len)?, spare })
    }

    /// The first `len` logits of those.
    pub(super) fn written_logits(&self, len: usize) -> Result<Slice<'_, f32>, DeviceError> {
        self.memory.slice(..len)
    }

    /// Overwrites all of it with what is NaN as f32 and as bf16.
    pub(super) fn poison(&mut self, device: &Device) -> Result<(), DeviceError> {
        let poison = vec![f32::from_bits(0x7fc0_7fc0); self.memory.len()];
        device.upload(&mut self.memory, &poison)
    }
}

/// f32 that have room for so many bf16, up to the next part.
fn words(halves: usize) -> usize {
    halves.div_ceil(2).next_multiple_of(ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;

    #[test]
    fn the_parts_of_one_time_do_not_touch() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let sizes = ArenaSizes { gate_up: 7, gated: 129, scratch: 3, logits: 65, spare: 5 };
        let mut arena = Arena::new(&device, sizes).unwrap();
        let LayerValues { mut gate_up, mut gated, mut scratch } = arena.layers().unwrap();
        assert_eq!((gate_up.len(), gated.len(), scratch.len()), (7, 129, 3));
        device.upload(&mut gate_up, &[bf16::from_f32(1.0); 7]).unwrap();
        device.upload(&mut gated, &[bf16::from_f32(2.0); 129]).unwrap();
        device.upload(&mut scratch, &[3.0; 3]).unwrap();
        assert_eq!(device.download(&gate_up).unwrap(), [bf16::from_f32(1.0); 7]);
        assert_eq!(device.download(&gated).unwrap(), [bf16::from_f32(2.0); 129]);
        assert_eq!(device.download(&scratch).unwrap(), [3.0; 3]);

        let Logits { mut values, mut spare } = arena.logits(65).unwrap();
        assert!(values.len() == 65 && spare.len() >= 5, "{}", spare.len());
        let rest = vec![5.0; spare.len()];
        device.upload(&mut values, &[4.0; 65]).unwrap();
        device.upload(&mut spare, &rest).unwrap();
        assert_eq!(device.download(&values).unwrap(), [4.0; 65]);
        assert_eq!(device.download(arena.written_logits(65).unwrap()).unwrap(), [4.0; 65]);
        assert!(arena.logits(1 << 20).is_err());
    }

    #[test]
    fn poison_is_nan_in_every_part() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let sizes = ArenaSizes { gate_up: 64, gated: 3, scratch: 3, logits: 9, spare: 1 };
        let mut arena = Arena::new(&device, sizes).unwrap();
        arena.poison(&device).unwrap();
        let LayerValues { gate_up, gated, scratch } = arena.layers().unwrap();
        for halves in [&gate_up, &gated] {
            assert!(device.download(halves).unwrap().iter().all(|value| value.is_nan()));
        }
        assert!(device.download(&scratch).unwrap().iter().all(|value| value.is_nan()));
        assert!(device.download(&arena.logits(9).unwrap().values).unwrap().iter().all(|value| value.is_nan()));
    }
}
