//! The ways of computing a step that a model chooses among. All have the bits of the separate operations: which is taken is a matter of time.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::ModelConfig;
use crate::device::{Device, LinearBackend};
use crate::ops::{self, FEW, HeadShape};

/// A way of computing a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeWay {
    /// The fused layers of few rows, recorded.
    Few,
    /// Layers of more rows of which our own tiles compute all or some, recorded.
    Tiles,
    /// Layers by separate operations, recorded.
    Recorded,
}

/// A linear layer of a step of more than [`FEW`] rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linear {
    Qkv,
    Output,
    GateUp,
    Down,
    Head,
}

/// Which linear layers our own tiles compute, with what stands behind them; the others are the library's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tiled {
    All,
    /// Those with few outputs, on which the library's large tiles are wasted.
    Narrow,
    None,
}

impl Tiled {
    pub(super) const ALL: [Self; 3] = [Self::All, Self::Narrow, Self::None];

    pub(super) fn takes(self, layer: Linear) -> bool {
        match self {
            Self::All => true,
            Self::Narrow => matches!(layer, Linear::Qkv | Linear::Output | Linear::Down),
            Self::None => false,
        }
    }
}

/// Numbers of rows for which [`Tiled`] is chosen; each stands for those above the one before.
pub(super) const RUNGS: [usize; 5] = [16, 32, 64, 128, 256];

/// How a model computes decode steps.
#[derive(Debug)]
pub(super) struct Ways {
    few: AtomicBool,
    tiles: AtomicBool,
    recorded: AtomicBool,
    /// An index into [`Tiled::ALL`] for each rung.
    tiled: [AtomicU8; RUNGS.len()],
    /// Attention of long prefills by warps of 32 rows.
    wide_warps: AtomicBool,
}

impl Ways {
    /// Those that the device and the shapes allow, and guesses of what is fastest.
    pub(super) fn new(device: &Device, heads: HeadShape, config: &ModelConfig) -> Self {
        let tensor_cores = device.tensor_cores();
        Self {
            few: AtomicBool::new(tensor_cores && ops::few_fits(device, heads, config.hidden, config.ffn)),
            tiles: AtomicBool::new(tensor_cores && ops::tiles_fits(device, heads, config.hidden, config.ffn)),
            recorded: AtomicBool::new(tensor_cores),
            // With more rows, tiles read their operands from the second-level cache more often than the library's larger ones.
            tiled: [0, 0, 0, 0, 1].map(AtomicU8::new),
            wide_warps: AtomicBool::new(false),
        }
    }

    fn flag(&self, way: DecodeWay) -> &AtomicBool {
        match way {
            DecodeWay::Few => &self.few,
            DecodeWay::Tiles => &self.tiles,
            DecodeWay::Recorded => &self.recorded,
        }
    }

    fn is_open(&self, way: DecodeWay) -> bool {
        self.flag(way).load(Ordering::Relaxed)
    }

    pub(super) fn give_up(&self, way: DecodeWay) {
        self.flag(way).store(false, Ordering::Relaxed);
    }

    pub(super) fn has_tiles(&self) -> bool {
        self.is_open(DecodeWay::Tiles)
    }

    pub(super) fn has_wide_warps(&self) -> bool {
        self.wide_warps.load(Ordering::Relaxed)
    }

    pub(super) fn set_wide_warps(&self, wide: bool) {
        self.wide_warps.store(wide, Ordering::Relaxed);
    }

    /// Takes it for the rows of a rung from now on.
    pub(super) fn set_tiled(&self, rung: usize, tiled: Tiled) {
        let index = Tiled::ALL.iter().position(|&other| other == tiled).unwrap_or(0);
        if let Some(place) = self.tiled.get(rung) {
            place.store(index as u8, Ordering::Relaxed);
        }
    }

    fn tiled(&self, rows: usize) -> Tiled {
        let rung = RUNGS.iter().position(|&rung| rows <= rung).unwrap_or(RUNGS.len() - 1);
        Tiled::ALL[usize::from(self.tiled[rung].load(Ordering::Relaxed)) % Tiled::ALL.len()]
    }

    /// The way of a step of so many rows, and its layers that tiles compute.
    pub(super) fn of(&self, device: &Device, rows: usize) -> Option<(DecodeWay, Tiled)> {
        if rows <= FEW && self.is_open(DecodeWay::Few) {
            return Some((DecodeWay::Few, Tiled::None));
        }
        let tiled = match device.linear_backend() {
            LinearBackend::CublasLt => self.tiled(rows),
            // Instead of the plain kernel of the contract.
            LinearBackend::Kernel => Tiled::All,
        };
        if tiled != Tiled::None && self.is_open(DecodeWay::Tiles) {
            return Some((DecodeWay::Tiles, tiled));
        }
        self.is_open(DecodeWay::Recorded).then_some((DecodeWay::Recorded, Tiled::None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;

    fn ways() -> Ways {
        Ways {
            few: AtomicBool::new(true),
            tiles: AtomicBool::new(true),
            recorded: AtomicBool::new(true),
            tiled: [0, 1, 2, 0, 1].map(AtomicU8::new),
            wide_warps: AtomicBool::new(false),
        }
    }

    #[test]
    fn a_way_is_taken_until_it_is_given_up() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let ways = ways();
        let of = |rows| ways.of(&device, rows);
        assert_eq!(of(1), Some((DecodeWay::Few, Tiled::None)));
        assert_eq!(of(9), Some((DecodeWay::Tiles, Tiled::All)));
        assert_eq!(of(17), Some((DecodeWay::Tiles, Tiled::Narrow)));
        assert_eq!(of(64), Some((DecodeWay::Recorded, Tiled::None)));
        assert_eq!(of(1000), Some((DecodeWay::Tiles, Tiled::Narrow)), "beyond the last rung");
        ways.set_tiled(2, Tiled::All);
        assert_eq!(of(64), Some((DecodeWay::Tiles, Tiled::All)));
        ways.give_up(DecodeWay::Few);
        assert_eq!(of(1), Some((DecodeWay::Tiles, Tiled::All)));
        ways.give_up(DecodeWay::Tiles);
        assert_eq!([of(1), of(64)], [Some((DecodeWay::Recorded, Tiled::None)); 2]);
        ways.give_up(DecodeWay::Recorded);
        assert_eq!([of(1), of(64)], [None; 2]);
    }

    #[test]
    fn where_the_library_is_not_trusted_tiles_take_all() {
        let device = Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap();
        assert_eq!(device.linear_backend(), LinearBackend::Kernel);
        assert_eq!(ways().of(&device, 64), Some((DecodeWay::Tiles, Tiled::All)));
    }
}
