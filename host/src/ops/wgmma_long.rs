//! Layers of prefills by warpgroups on Hopper. Each gives the bits of the separate operations on a GPU.

use std::ops::Range;

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::warpgroup_tiles::STAGE;
use kernels_gpu::{attention_groups as groups, wgmma_long_gate_up as long};

use super::tensor_maps::{Boxes, TensorMaps};
use super::wgmma::{self, IMAGE, wgmma_fits};
use super::{HeadShape, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut, Weight};

pub(super) const LONG_GATE_UP: [long::Layout; 2] = [long::OUTPUTS_160, long::OUTPUTS_256];

/// Whether warpgroups compute [`attention_prefill()`](super::attention_prefill) where it is given tensor maps of the pages.
#[must_use]
pub fn wgmma_attends(device: &Device, heads: HeadShape) -> bool {
    device.kernel_image() == Some(IMAGE)
        && heads.width == STAGE
        && groups::shared_bytes() <= device.shared_bytes_per_block()
}

/// Whether [`wgmma_long_gate_up()`] takes a model's shapes where the others do.
#[must_use]
pub fn wgmma_long_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize) -> bool {
    wgmma_fits(device, heads, hidden, ffn)
        && LONG_GATE_UP.into_iter().all(|layout| ffn.is_multiple_of(layout.woven()))
        && LONG_GATE_UP.into_iter().all(|layout| layout.ring_bytes() <= device.shared_bytes_per_block())
}

/// Outputs of a block. It changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOutputs {
    /// What is expected to be fastest.
    Chosen,
    /// So many: 160 or 256.
    Of(usize),
}

/// Which layout of [`LONG_GATE_UP`]. A GPU's clusters take about the same time for a tile, so some of them are idle in the last
/// round. Narrow tiles waste less of it, but bring more for what they compute.
fn long_layout(
    name: &str,
    block: BlockOutputs,
    pairs: usize,
    ffn: usize,
    clusters: usize,
) -> Result<usize, DeviceError> {
    /// The time of a narrow tile, for its width, in percent of a wide one's: on an H100 narrow ones are faster with 512 rows, in
    /// rounds of 160 by 256, and slower with 1024, in 320 by 384.
    const NARROW: usize = 125;
    let rounds = |layout: long::Layout| (pairs * ffn.div_ceil(layout.width)).div_ceil(clusters.max(1)) * layout.width;
    match block {
        BlockOutputs::Chosen => Ok(usize::from(rounds(LONG_GATE_UP[1]) * 100 <= rounds(LONG_GATE_UP[0]) * NARROW)),
        BlockOutputs::Of(outputs) => {
            LONG_GATE_UP.iter().position(|layout| 2 * layout.width == outputs).ok_or_else(|| {
                DeviceError::InvalidParameter(format!("{name}: a block makes 160 or 256 outputs, not {outputs}"))
            })
        }
    }
}

/// As [`wgmma_gate_up()`](super::wgmma_gate_up), for rows `rows` of `x`, in tiles for many: `out` is \[their number, F\]. `maps` has
/// [`Mapped::LongGateUpInput`](super::Mapped::LongGateUpInput) of x, or of more rows from its first on, and [`Mapped::LongGateUp`](super::Mapped::LongGateUp) of the weight.
///
/// # Errors
/// As for [`wgmma_parts()`](super::wgmma_parts).
pub fn wgmma_long_gate_up(
    device: &Device,
    block: BlockOutputs,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    rows: Range<usize>,
    weight: &Weight,
    out: &mut SliceMut<'_, bf16>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_long_gate_up";
    let (width, ffn) = (weight.k(), weight.n() / 2);
    let all = wgmma::rows(NAME, device, x, width, 1)?;
    let pairs = rows.len().div_ceil(long::CLUSTER * long::TOKENS);
    let clusters = device.multiprocessors() / long::CLUSTER;
    let chosen = long_layout(NAME, block, pairs, ffn, clusters)?;
    let layout = LONG_GATE_UP[chosen];
    let shaped = weight.n() == 2 * ffn
        && ffn.is_multiple_of(layout.woven())
        && rows.start < rows.end
        && rows.end <= all
        && out.len() == rows.len() * ffn;
    expect(shaped, NAME, || {
        format!(
            "rows {rows:?} of {all}, weight {} x {width}, F a multiple of {}, out of {}",
            weight.n(),
            layout.woven(),
            out.len()
        )
    })?;
    let kernel = match chosen {
        0 => long::wgmma_long_gate_up_160::launch,
        _ => long::wgmma_long_gate_up_256::launch,
    };
    let x_map = maps.rows(NAME, x, width, long::TOKENS)?;
    let weight_map = maps.weight(NAME, weight, Boxes::Woven(layout.width))?;
    let clusters = (pairs * ffn.div_ceil(layout.width)).min(clusters).max(1);
    let grid = Grid {
        blocks: [size(NAME, clusters * long::CLUSTER)?, 1, 1],
        dynamic_shared_bytes: size(NAME, layout.ring_bytes())?,
    };
    let (first, tokens) = (size(NAME, rows.start)?, size(NAME, rows.len())?);
    let (ffn, width) = (size(NAME, ffn)?, size(NAME, width)?);
    device.launch(kernel(&x_map, &weight_map, out, first, tokens, ffn, width), grid)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was faster on an H100, of whose multiprocessors 66 clusters take tiles, with a feed-forward width of 4864.
    #[test]
    fn narrow_tiles_are_taken_where_they_save_a_round() {
        let of = |rows: usize, block| {
            let pairs = rows.div_ceil(long::CLUSTER * long::TOKENS);
            long_layout("test", block, pairs, 4864, 66).map(|chosen| 2 * LONG_GATE_UP[chosen].width)
        };
        assert_eq!([257, 512].map(|rows| of(rows, BlockOutputs::Chosen).unwrap()), [160; 2]);
        assert_eq!([1024, 2048, 3072, 4096].map(|rows| of(rows, BlockOutputs::Chosen).unwrap()), [256; 4]);
        assert_eq!([160, 256].map(|outputs| of(1024, BlockOutputs::Of(outputs)).unwrap()), [160, 256]);
        assert!(of(1024, BlockOutputs::Of(128)).is_err());
        assert!(LONG_GATE_UP.into_iter().all(|layout| layout.ring_bytes() <= 232_448), "an H100's shared memory");
    }
}
