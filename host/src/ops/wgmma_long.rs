//! Layers of prefills by warpgroups on Hopper. Each gives the bits of the separate operations on a GPU.

use std::ops::Range;

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::warpgroup_tiles::STAGE;
use kernels_gpu::{
    attention_groups as groups, wgmma_long_gate_up as long, wgmma_long_qkv as long_qkv,
    wgmma_long_residual as residual_tiles,
};

use super::attention::PagesMut;
use super::few::Places;
use super::tensor_maps::{Boxes, TensorMaps};
use super::wgmma::{self, IMAGE, wgmma_fits};
use super::{HeadShape, expect, size};
use crate::device::{Device, DeviceError, Slice, SliceMut, Weight};

pub(super) const LONG_GATE_UP: [long::Layout; 2] = [long::OUTPUTS_160, long::OUTPUTS_256];
pub(super) const LONG_QKV: [long_qkv::Layout; 2] = [long_qkv::HEADS_1, long_qkv::HEADS_3];
pub(super) const LONG_RESIDUAL: [residual_tiles::Layout; 2] =
    [residual_tiles::OUTPUTS_112, residual_tiles::OUTPUTS_224];

/// Whether warpgroups compute [`attention_prefill()`](super::attention_prefill) where it is given tensor maps of the pages.
#[must_use]
pub fn wgmma_attends(device: &Device, heads: HeadShape) -> bool {
    device.kernel_image() == Some(IMAGE)
        && heads.width == STAGE
        && groups::shared_bytes() <= device.shared_bytes_per_block()
}

/// Whether the kernels of prefills take a model's shapes where the others do.
#[must_use]
pub fn wgmma_long_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize) -> bool {
    wgmma_fits(device, heads, hidden, ffn)
        && LONG_GATE_UP.into_iter().all(|layout| ffn.is_multiple_of(layout.woven()))
        && LONG_GATE_UP.into_iter().all(|layout| layout.shared_bytes() <= device.shared_bytes_per_block())
        && LONG_QKV.into_iter().all(|layout| layout.shared_bytes() <= device.shared_bytes_per_block())
        && LONG_RESIDUAL.into_iter().all(|layout| layout.shared_bytes() <= device.shared_bytes_per_block())
}

/// Outputs of a block. It changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOutputs {
    /// What is expected to be fastest.
    Chosen,
    /// So many: 160 or 256 of gate and up, 112 or 224 of what is added to the residual stream.
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
    /// The time of a narrow tile, for its width, in percent of a wide one's: on an H100 narrow ones are faster with 1024 rows, in
    /// rounds of 320 by 384, and slower with 1536, in 480 by 512.
    const NARROW: usize = 107;
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

/// Whether [`wgmma_long_qkv()`] takes a model's heads, where [`wgmma_long_fits()`].
#[must_use]
pub fn wgmma_long_qkv_fits(heads: HeadShape) -> bool {
    heads.width == long_qkv::WIDTH
}

/// Heads of a block of [`wgmma_long_qkv()`]. It changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockHeads {
    /// What is expected to be fastest.
    Chosen,
    /// So many: 1 or 3.
    Of(usize),
}

/// Blocks of a layout of [`LONG_QKV`]: as many that share rows, in whole clusters, and as many that share heads.
fn qkv_blocks(layout: long_qkv::Layout, rows: usize, heads: usize) -> [usize; 2] {
    [rows.div_ceil(long_qkv::CLUSTER * layout.tokens()) * long_qkv::CLUSTER, heads.div_ceil(layout.heads)]
}

/// Which layout of [`LONG_QKV`]: blocks of one head, of which a multiprocessor has two, as long as all are on the GPU at once.
fn qkv_layout(
    name: &str,
    block: BlockHeads,
    rows: usize,
    heads: usize,
    multiprocessors: usize,
) -> Result<usize, DeviceError> {
    match block {
        BlockHeads::Chosen => {
            let [tall, wide] = qkv_blocks(LONG_QKV[0], rows, heads);
            Ok(usize::from(tall * wide > 2 * multiprocessors))
        }
        BlockHeads::Of(wanted) => LONG_QKV
            .iter()
            .position(|layout| layout.heads == wanted)
            .ok_or_else(|| DeviceError::InvalidParameter(format!("{name}: a block makes 1 or 3 heads, not {wanted}"))),
    }
}

/// As [`wgmma_qkv()`](super::wgmma_qkv), in tiles for many rows of heads of 64 elements. `maps` has
/// [`Mapped::LongQkvInput`](super::Mapped::LongQkvInput) of x, or of more rows from its first on, and
/// [`Mapped::LongQkv`](super::Mapped::LongQkv) of the weight.
///
/// # Errors
/// As for [`wgmma_parts()`](super::wgmma_parts).
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn wgmma_long_qkv(
    device: &Device,
    block: BlockHeads,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    bias: &Slice<'_, bf16>,
    rope_table: &Slice<'_, f32>,
    places: Places<'_>,
    queries: &mut SliceMut<'_, f32>,
    pages: &mut PagesMut<'_>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_long_qkv";
    let (width, outputs) = (weight.k(), heads.qkv_width());
    let tokens = wgmma::rows(NAME, device, x, width, 1)?;
    let shaped = weight.n() == outputs
        && wgmma_long_qkv_fits(heads)
        && (bias.is_empty() || bias.len() == outputs)
        && places.positions.len() == tokens
        && places.row_tables.len() == tokens
        && queries.len() == tokens * outputs
        && pages.keys.len() == pages.values.len();
    expect(shaped, NAME, || {
        format!(
            "x of {tokens} rows, {} positions, queries {}, weight {} x {width}, {heads:?}",
            places.positions.len(),
            queries.len(),
            weight.n()
        )
    })?;
    let all_heads = outputs / heads.width;
    let chosen = qkv_layout(NAME, block, tokens, all_heads, device.multiprocessors())?;
    let layout = LONG_QKV[chosen];
    let kernel = match chosen {
        0 => long_qkv::wgmma_long_qkv_1::launch,
        _ => long_qkv::wgmma_long_qkv_3::launch,
    };
    let [tall, wide] = qkv_blocks(layout, tokens, all_heads);
    let grid = Grid {
        blocks: [size(NAME, tall)?, size(NAME, wide)?, 1],
        dynamic_shared_bytes: size(NAME, layout.shared_bytes())?,
    };
    let x_map = maps.rows(NAME, x, width, layout.tokens())?;
    let weight_map = maps.weight(NAME, weight, Boxes::Rows(layout.box_rows()))?;
    device.launch(
        kernel(
            &x_map,
            &weight_map,
            bias,
            rope_table,
            &places.positions,
            &places.row_tables,
            &places.page_tables,
            queries,
            &mut pages.keys,
            &mut pages.values,
            size(NAME, width)?,
            size(NAME, heads.query_heads)?,
            size(NAME, heads.kv_heads)?,
        ),
        grid,
    )
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
        dynamic_shared_bytes: size(NAME, layout.shared_bytes())?,
    };
    let (first, tokens) = (size(NAME, rows.start)?, size(NAME, rows.len())?);
    let (ffn, width) = (size(NAME, ffn)?, size(NAME, width)?);
    device.launch(kernel(&x_map, &weight_map, out, first, tokens, ffn, width), grid)
}

/// Blocks of a layout of [`LONG_RESIDUAL`] that `rows` rows of `outputs` take: whole clusters.
fn residual_blocks(layout: residual_tiles::Layout, rows: usize, outputs: usize) -> usize {
    rows.div_ceil(residual_tiles::CLUSTER * residual_tiles::TOKENS)
        * residual_tiles::CLUSTER
        * outputs.div_ceil(layout.outputs)
}

/// Whether [`wgmma_long_residual()`] is expected to be faster than segments by themselves, whose sums are added behind them: where its
/// blocks, each of which computes all segments, keep most multiprocessors busy.
#[must_use]
pub fn wgmma_long_residual_pays(device: &Device, rows: usize, outputs: usize) -> bool {
    let narrow = residual_blocks(LONG_RESIDUAL[0], rows, outputs);
    3 * narrow >= 2 * device.multiprocessors()
}

/// Which layout of [`LONG_RESIDUAL`]: the narrow one, while all of its blocks are on the GPU at once.
fn residual_layout(
    name: &str,
    block: BlockOutputs,
    rows: usize,
    outputs: usize,
    blocks: usize,
) -> Result<usize, DeviceError> {
    match block {
        BlockOutputs::Chosen => Ok(usize::from(residual_blocks(LONG_RESIDUAL[0], rows, outputs) > blocks)),
        BlockOutputs::Of(wanted) => LONG_RESIDUAL.iter().position(|layout| layout.outputs == wanted).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("{name}: a block makes 112 or 224 outputs, not {wanted}"))
        }),
    }
}

/// residual \[M, N\] += `x` \[M, K\] times the weight \[N, K\], with K in `segments`: the bits of
/// [`linear_to_residual`](super::linear_to_residual) and [`residual_add`](super::residual_add), and no parts in memory. `maps` has
/// [`Mapped::LongResidualInput`](super::Mapped::LongResidualInput) of x, or of more rows from its first on, and
/// [`Mapped::LongResidual`](super::Mapped::LongResidual) of the weight.
///
/// # Errors
/// As for [`wgmma_parts()`](super::wgmma_parts).
pub fn wgmma_long_residual(
    device: &Device,
    block: BlockOutputs,
    maps: &TensorMaps,
    segments: usize,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    residual: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_long_residual";
    let (width, outputs) = (weight.k(), weight.n());
    let rows = wgmma::rows(NAME, device, x, width, segments)?;
    let shaped = matches!(segments, 1 | 2 | 4) && outputs.is_multiple_of(8) && residual.len() == rows * outputs;
    expect(shaped, NAME, || {
        format!("{rows} rows, weight {outputs} x {width} in {segments} segments, residual of {}", residual.len())
    })?;
    let chosen = residual_layout(NAME, block, rows, outputs, device.multiprocessors())?;
    let layout = LONG_RESIDUAL[chosen];
    let kernel = match chosen {
        0 => residual_tiles::wgmma_long_residual_112::launch,
        _ => residual_tiles::wgmma_long_residual_224::launch,
    };
    let x_map = maps.rows(NAME, x, width, residual_tiles::TOKENS)?;
    let weight_map = maps.weight(NAME, weight, Boxes::Rows(layout.box_rows()))?;
    let tall = rows.div_ceil(residual_tiles::CLUSTER * residual_tiles::TOKENS) * residual_tiles::CLUSTER;
    let grid = Grid {
        blocks: [size(NAME, tall)?, size(NAME, outputs.div_ceil(layout.outputs))?, 1],
        dynamic_shared_bytes: size(NAME, layout.shared_bytes())?,
    };
    let (rows, outputs) = (size(NAME, rows)?, size(NAME, outputs)?);
    let (part, segments) = (size(NAME, width / segments)?, size(NAME, segments)?);
    device.launch(kernel(&x_map, &weight_map, residual, rows, outputs, part, segments), grid)
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
        assert_eq!([257, 512, 1024].map(|rows| of(rows, BlockOutputs::Chosen).unwrap()), [160; 3]);
        assert_eq!([768, 1536, 2048].map(|rows| of(rows, BlockOutputs::Chosen).unwrap()), [256; 3]);
        assert_eq!([160, 256].map(|outputs| of(1024, BlockOutputs::Of(outputs)).unwrap()), [160, 256]);
        assert!(of(1024, BlockOutputs::Of(128)).is_err());
        assert!(LONG_GATE_UP.into_iter().all(|layout| layout.shared_bytes() <= 232_448), "an H100's shared memory");
        assert!(LONG_RESIDUAL.into_iter().all(|layout| layout.shared_bytes() <= 232_448), "an H100's shared memory");
    }

    /// What was faster on an H100 of 132 multiprocessors, with 18 heads.
    #[test]
    fn one_head_is_taken_while_all_blocks_have_room() {
        let of = |rows, block| qkv_layout("test", block, rows, 18, 132).map(|chosen| LONG_QKV[chosen].heads);
        assert_eq!([512, 1024, 1536].map(|rows| of(rows, BlockHeads::Chosen).unwrap()), [1; 3]);
        assert_eq!([2048, 4096].map(|rows| of(rows, BlockHeads::Chosen).unwrap()), [3; 2]);
        assert_eq!([1, 3].map(|heads| of(100, BlockHeads::Of(heads)).unwrap()), [1, 3]);
        assert!(of(100, BlockHeads::Of(2)).is_err());
        assert!(LONG_QKV.into_iter().all(|layout| layout.shared_bytes() <= 232_448), "an H100's shared memory");
        assert!(2 * (LONG_QKV[0].shared_bytes() + 1024) <= 233_472, "two blocks on a multiprocessor");
    }

    /// What was faster on an H100, of whose multiprocessors 132 take blocks, with 896 outputs.
    #[test]
    fn wide_tiles_are_taken_where_narrow_ones_need_two_rounds() {
        let of =
            |rows, block| residual_layout("test", block, rows, 896, 132).map(|chosen| LONG_RESIDUAL[chosen].outputs);
        assert_eq!([1500, 2048].map(|rows| of(rows, BlockOutputs::Chosen).unwrap()), [112; 2]);
        assert_eq!([2049, 3072, 4096].map(|rows| of(rows, BlockOutputs::Chosen).unwrap()), [224; 3]);
        assert_eq!([112, 224].map(|outputs| of(100, BlockOutputs::Of(outputs)).unwrap()), [112, 224]);
        assert!(of(100, BlockOutputs::Of(160)).is_err());
    }
}
