//! The ways of computing a step that a model chooses among. All have the bits of the separate operations: which is taken is a matter of time.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::ModelConfig;
use crate::device::{Device, LinearBackend};
use crate::ops::{self, FEW, HeadShape, PAGE};

/// A way of computing a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeWay {
    /// A whole step in one kernel: one row.
    Whole,
    /// The fused layers of few rows, recorded.
    Few,
    /// Layers of which our own tiles compute all or some, recorded.
    Tiles,
    /// Layers by separate operations, recorded.
    Recorded,
}

/// A linear layer of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linear {
    Qkv,
    Output,
    GateUp,
    Down,
    Head,
}

impl Linear {
    pub(super) const ALL: [Self; 5] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down, Self::Head];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Output => "attention output",
            Self::GateUp => "gate and up",
            Self::Down => "down",
            Self::Head => "head",
        }
    }
}

/// Which linear layers our own tiles compute, with what stands behind them; the others are the library's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiled(u8);

impl Tiled {
    pub(super) const NONE: Self = Self(0);
    pub(super) const ALL: Self = Self(0b1_1111);
    /// Those with few outputs, on which the library's large tiles are wasted.
    pub(super) const NARROW: Self = Self::NONE.toggled(Linear::Qkv).toggled(Linear::Output).toggled(Linear::Down);

    pub(super) const fn takes(self, layer: Linear) -> bool {
        self.0 >> layer as u8 & 1 == 1
    }

    /// With this layer where it was without, or without.
    pub(super) const fn toggled(self, layer: Linear) -> Self {
        Self(self.0 ^ 1 << layer as u8)
    }
}

/// What computes steps of some number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// One kernel, where it can, for one row of a context that it takes.
    pub(super) whole: bool,
    /// The fused layers of few rows, where they can.
    pub(super) few: bool,
    /// What our own tiles compute otherwise.
    pub(super) tiled: Tiled,
}

impl Plan {
    const WHOLE_BIT: u8 = 1 << 6;
    const FEW_BIT: u8 = 1 << 7;

    /// What was fastest for a model of 0.5 billion parameters on an H100: with more rows, tiles of warps read their operands from the
    /// second-level cache more often than the library's larger ones. Those of warpgroups do not.
    fn guess(rows: usize, warpgroups: bool) -> Self {
        let tiled = match rows {
            0..=32 => Tiled::ALL,
            _ if warpgroups => Tiled::ALL,
            33..=64 => Tiled::NARROW.toggled(Linear::Head),
            65..=128 => Tiled::NARROW.toggled(Linear::Down),
            _ => Tiled::NONE.toggled(Linear::Qkv),
        };
        Self { whole: rows == 1, few: rows <= 2, tiled }
    }

    fn packed(self) -> u8 {
        self.tiled.0 | if self.few { Self::FEW_BIT } else { 0 } | if self.whole { Self::WHOLE_BIT } else { 0 }
    }

    fn unpacked(bits: u8) -> Self {
        let [whole, few] = [Self::WHOLE_BIT, Self::FEW_BIT].map(|bit| bits & bit != 0);
        Self { whole, few, tiled: Tiled(bits & Tiled::ALL.0) }
    }
}

/// Numbers of rows for which a [`Plan`] is chosen; each stands for those above the one before.
pub(super) const RUNGS: [usize; 9] = [1, 2, 4, FEW, 16, 32, 64, 128, 256];

/// How a model computes decode steps.
#[derive(Debug)]
pub(super) struct Ways {
    whole: AtomicBool,
    /// Most spans of a context for which a step is one kernel: as many as it takes. On an H100 it makes 1,757 tokens/s in contexts of
    /// 4,096 tokens and fused layers 924; of 32,000 tokens 725 and 577.
    whole_spans: usize,
    few: AtomicBool,
    tiles: AtomicBool,
    /// Tiles of many rows by warpgroups.
    warpgroups: bool,
    /// The same for prefills.
    long_tiles: bool,
    recorded: AtomicBool,
    /// A packed [`Plan`] for each rung.
    plans: [AtomicU8; RUNGS.len()],
    /// Prefills that come again, recorded.
    prefills: AtomicBool,
    /// Attention of long prefills by warps of 32 rows.
    wide_warps: AtomicBool,
}

impl Ways {
    /// Those that the device and the shapes allow, and guesses of what is fastest.
    pub(super) fn new(device: &Device, heads: HeadShape, config: &ModelConfig) -> Self {
        let tensor_cores = device.tensor_cores();
        let warpgroups = tensor_cores && ops::wgmma_fits(device, heads, config.hidden, config.ffn);
        Self {
            whole: AtomicBool::new(
                tensor_cores && ops::decode_step_fits(device, heads, config.hidden, config.ffn, config.layers),
            ),
            whole_spans: ops::decode_step_context(device, heads) / PAGE,
            few: AtomicBool::new(tensor_cores && ops::few_fits(device, heads, config.hidden, config.ffn)),
            tiles: AtomicBool::new(tensor_cores && ops::tiles_fits(device, heads, config.hidden, config.ffn)),
            warpgroups,
            long_tiles: tensor_cores && ops::wgmma_long_fits(device, heads, config.hidden, config.ffn),
            recorded: AtomicBool::new(tensor_cores),
            plans: RUNGS.map(|rung| AtomicU8::new(Plan::guess(rung, warpgroups).packed())),
            prefills: AtomicBool::new(tensor_cores),
            wide_warps: AtomicBool::new(false),
        }
    }

    fn flag(&self, way: DecodeWay) -> &AtomicBool {
        match way {
            DecodeWay::Whole => &self.whole,
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

    pub(super) fn has_whole(&self) -> bool {
        self.is_open(DecodeWay::Whole)
    }

    pub(super) fn has_tiles(&self) -> bool {
        self.is_open(DecodeWay::Tiles)
    }

    pub(super) fn has_warpgroups(&self) -> bool {
        self.warpgroups
    }

    pub(super) fn has_recorded_prefills(&self) -> bool {
        self.prefills.load(Ordering::Relaxed)
    }

    /// Prefills whose layers are our own tiles', until prefills of other ways are given up.
    pub(super) fn has_fused_prefills(&self) -> bool {
        self.long_tiles && self.has_recorded_prefills()
    }

    pub(super) fn give_up_recorded_prefills(&self) {
        self.prefills.store(false, Ordering::Relaxed);
    }

    pub(super) fn has_wide_warps(&self) -> bool {
        self.wide_warps.load(Ordering::Relaxed)
    }

    pub(super) fn set_wide_warps(&self, wide: bool) {
        self.wide_warps.store(wide, Ordering::Relaxed);
    }

    /// Takes it for the rows of a rung from now on.
    pub(super) fn set_plan(&self, rung: usize, plan: Plan) {
        if let Some(place) = self.plans.get(rung) {
            place.store(plan.packed(), Ordering::Relaxed);
        }
    }

    /// What is taken for so many rows.
    pub(super) fn plan(&self, rows: usize) -> Plan {
        let rung = RUNGS.iter().position(|&rung| rows <= rung).unwrap_or(RUNGS.len() - 1);
        Plan::unpacked(self.plans[rung].load(Ordering::Relaxed))
    }

    /// The way of a step of so many rows, whose contexts have at most so many spans, and its layers that tiles compute.
    pub(super) fn of(&self, device: &Device, rows: usize, spans: usize) -> Option<(DecodeWay, Tiled)> {
        let Plan { whole, few, mut tiled } = self.plan(rows);
        if whole && rows == 1 && spans <= self.whole_spans && self.is_open(DecodeWay::Whole) {
            return Some((DecodeWay::Whole, Tiled::NONE));
        }
        if few && rows <= FEW && self.is_open(DecodeWay::Few) {
            return Some((DecodeWay::Few, Tiled::NONE));
        }
        if device.linear_backend() == LinearBackend::Kernel {
            // Instead of the plain kernel of the contract.
            tiled = Tiled::ALL;
        }
        if tiled != Tiled::NONE && self.is_open(DecodeWay::Tiles) {
            return Some((DecodeWay::Tiles, tiled));
        }
        self.is_open(DecodeWay::Recorded).then_some((DecodeWay::Recorded, Tiled::NONE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;

    fn ways() -> Ways {
        let plan = |few, tiled| AtomicU8::new(Plan { whole: false, few, tiled }.packed());
        let [all, narrow, none] = [Tiled::ALL, Tiled::NARROW, Tiled::NONE];
        Ways {
            whole: AtomicBool::new(true),
            whole_spans: 100,
            few: AtomicBool::new(true),
            tiles: AtomicBool::new(true),
            warpgroups: false,
            long_tiles: true,
            recorded: AtomicBool::new(true),
            plans: [
                (true, all),
                (true, all),
                (true, none),
                (false, all),
                (true, all),
                (false, narrow),
                (false, none),
                (false, all),
                (false, narrow),
            ]
            .map(|(few, tiled)| plan(few, tiled)),
            prefills: AtomicBool::new(true),
            wide_warps: AtomicBool::new(false),
        }
    }

    #[test]
    fn a_way_is_taken_until_it_is_given_up() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let ways = ways();
        let of = |rows| ways.of(&device, rows, 1);
        assert_eq!([of(1), of(3)], [Some((DecodeWay::Few, Tiled::NONE)); 2]);
        assert_eq!(of(5), Some((DecodeWay::Tiles, Tiled::ALL)), "not where tiles are faster");
        assert_eq!(of(9), Some((DecodeWay::Tiles, Tiled::ALL)), "never beyond the most that they take");
        assert_eq!(of(17), Some((DecodeWay::Tiles, Tiled::NARROW)));
        assert_eq!(of(64), Some((DecodeWay::Recorded, Tiled::NONE)));
        assert_eq!(of(1000), Some((DecodeWay::Tiles, Tiled::NARROW)), "beyond the last rung");
        ways.set_plan(6, Plan { whole: false, few: false, tiled: Tiled::ALL });
        assert_eq!(of(64), Some((DecodeWay::Tiles, Tiled::ALL)));
        ways.give_up(DecodeWay::Few);
        assert_eq!([of(1), of(3)], [Some((DecodeWay::Tiles, Tiled::ALL)), Some((DecodeWay::Recorded, Tiled::NONE))]);
        ways.give_up(DecodeWay::Tiles);
        assert_eq!([of(1), of(64)], [Some((DecodeWay::Recorded, Tiled::NONE)); 2]);
        ways.give_up(DecodeWay::Recorded);
        assert_eq!([of(1), of(64)], [None; 2]);
        assert!(ways.has_recorded_prefills() && ways.has_fused_prefills(), "they are no decode steps");
        ways.give_up_recorded_prefills();
        assert!(!ways.has_recorded_prefills() && !ways.has_fused_prefills());
    }

    #[test]
    fn one_kernel_is_for_one_row_of_a_context_that_it_takes() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let ways = ways();
        ways.set_plan(0, Plan { whole: true, few: true, tiled: Tiled::ALL });
        ways.set_plan(1, Plan { whole: true, few: true, tiled: Tiled::ALL });
        let of = |rows, spans| ways.of(&device, rows, spans).map(|(way, _)| way);
        assert_eq!([of(1, 1), of(1, 100)], [Some(DecodeWay::Whole); 2]);
        assert_eq!([of(1, 101), of(2, 1)], [Some(DecodeWay::Few); 2]);
        ways.give_up(DecodeWay::Whole);
        assert_eq!(of(1, 1), Some(DecodeWay::Few));
    }

    #[test]
    fn where_the_library_is_not_trusted_tiles_take_all() {
        let device = Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap();
        assert_eq!(device.linear_backend(), LinearBackend::Kernel);
        assert_eq!(ways().of(&device, 64, 1), Some((DecodeWay::Tiles, Tiled::ALL)));
    }

    #[test]
    fn layers_are_toggled_one_by_one() {
        let all = Linear::ALL.into_iter().fold(Tiled::NONE, Tiled::toggled);
        assert_eq!(all, Tiled::ALL);
        for layer in Linear::ALL {
            let without = Tiled::ALL.toggled(layer);
            assert!(Linear::ALL.into_iter().all(|other| without.takes(other) == (other != layer)));
            for whole in [false, true] {
                let plan = Plan { whole, few: !whole, tiled: without };
                assert_eq!(Plan::unpacked(plan.packed()), plan);
            }
        }
    }
}
