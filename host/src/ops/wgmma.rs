//! The linear layers of steps of many rows on Hopper, with what stands behind them. Each gives the bits of the separate operations on
//! a GPU; how many tokens a block takes changes none.

use std::ops::Range;

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::warpgroup_tiles::{Layout, STAGE};
use kernels_gpu::wgmma_qkv::{QKV, QKV_PAIRED};
use kernels_gpu::{
    attention_groups as groups, few_logits, wgmma_gate_up, wgmma_logits, wgmma_long_gate_up as long, wgmma_parts,
    wgmma_qkv,
};

use super::attention::PagesMut;
use super::few::Places;
use super::tiles::BlockTokens;
use super::{HeadShape, PAGE, expect, size};
use crate::device::{
    Buffer, Device, DeviceError, Dimension, MemoryKind, Slice, SliceMut, TENSOR_MAP_WORDS, Weight, contract,
};

/// Layouts for 64, 128 and 256 tokens.
type Layouts = [Layout; 3];

const PARTS: Layouts = [wgmma_parts::PARTS_64, wgmma_parts::PARTS_128, wgmma_parts::PARTS_256];
const GATE_UP: Layouts = [wgmma_gate_up::GATE_UP_64, wgmma_gate_up::GATE_UP_128, wgmma_gate_up::GATE_UP_256];
const LOGITS: Layouts = [wgmma_logits::LOGITS_64, wgmma_logits::LOGITS_128, wgmma_logits::LOGITS_256];

const LONG_GATE_UP: [long::Layout; 2] = [long::OUTPUTS_160, long::OUTPUTS_256];

/// The image whose kernels have the instructions: no other GPU has them.
const IMAGE: &str = "sm_90a";

/// How many blocks of [`wgmma_qkv()`] a multiprocessor has at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvBlocks {
    /// One, with room for all of its operands, where they leave half of the multiprocessors to the next kernel; or two.
    Chosen,
    /// One.
    One,
    /// Two.
    Two,
}

/// Whether the kernels of this file take a model's shapes on this device.
#[must_use]
pub fn wgmma_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize) -> bool {
    let layouts = [PARTS, GATE_UP, LOGITS].into_iter().flatten().chain([QKV, QKV_PAIRED]);
    let most = layouts.map(Layout::ring_bytes).max().unwrap_or(0);
    device.kernel_image() == Some(IMAGE)
        && most <= device.shared_bytes_per_block()
        && hidden.is_multiple_of(STAGE)
        && ffn.is_multiple_of(STAGE * contract::segments(hidden, ffn))
        && heads.query_width().is_multiple_of(STAGE * contract::segments(hidden, heads.query_width()))
        && heads.width.is_multiple_of(32)
}

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

/// Elements of the scratch of [`wgmma_logits()`] for `rows` rows.
#[must_use]
pub fn wgmma_best_len(device: &Device, rows: usize) -> usize {
    device.multiprocessors() * rows
}

/// What a tensor map is for.
#[derive(Clone, Copy, Debug)]
pub enum Mapped<'a> {
    /// The input of [`wgmma_qkv()`] \[M, K\], and K.
    QkvInput(Slice<'a, bf16>, usize),
    /// The weight of it, whose heads are so wide.
    Qkv(&'a Weight, usize),
    /// The input of [`wgmma_gate_up()`] \[M, K\], and K.
    GateUpInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    GateUp(&'a Weight),
    /// The input of [`wgmma_long_gate_up()`], all of it, and K.
    LongGateUpInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    LongGateUp(&'a Weight),
    /// The input of [`wgmma_parts()`] \[M, K\], and K.
    PartsInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    Parts(&'a Weight),
    /// A layer's keys, or its values, for [`attention_prefill()`](super::attention_prefill) with heads of 64 elements.
    Pages(Slice<'a, bf16>),
    /// The input of [`wgmma_logits()`] \[M, K\], and K.
    LogitsInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    Logits(&'a Weight),
}

/// What a copy takes of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boxes {
    /// So many rows.
    Rows(usize),
    /// Gates and their ups by eights.
    Eights,
    /// Both halves of heads by eights.
    Partners,
    /// So many gates, or ups, in the order in which a lane has neighbours.
    Woven(usize),
}

/// The matrix that a tensor map is of, and its boxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    address: u64,
    width: usize,
    boxes: Boxes,
}

/// Tensor maps in a device's memory. They do not hold the matrices: whoever uses one brings the matrix along.
#[derive(Debug)]
pub struct TensorMaps {
    words: Buffer<u64>,
    of: Vec<(Key, usize)>,
}

impl TensorMaps {
    /// Makes those of these matrices, and waits until they are on the device: kernels read them before they wait for the work ahead.
    ///
    /// # Errors
    /// No memory, not on this device, or the driver's error.
    pub fn new<'a>(device: &Device, matrices: impl IntoIterator<Item = Mapped<'a>>) -> Result<Self, DeviceError> {
        let (mut words, mut of) = (Vec::new(), Vec::new());
        for matrix in matrices {
            for (key, rows, map) in encode(device, matrix)? {
                words.extend(map);
                of.push((key, rows));
            }
        }
        let words = device.alloc_from(&words, MemoryKind::Activations, "tensor maps")?;
        device.synchronize()?;
        Ok(Self { words, of })
    }

    /// The map of a matrix that begins where this one does and has its rows, or more.
    fn find(&self, name: &str, key: Key, rows: usize) -> Result<Slice<'_, u64>, DeviceError> {
        let place = self.of.iter().position(|&(of, most)| of == key && rows <= most);
        let Some(place) = place else {
            return Err(DeviceError::InvalidParameter(format!("{name}: {rows} rows of {key:?} have no tensor map")));
        };
        self.words.slice(place * TENSOR_MAP_WORDS..(place + 1) * TENSOR_MAP_WORDS)
    }

    /// That of all keys of a layer, or of all values.
    pub(super) fn pages(&self, name: &str, pages: &Slice<'_, bf16>) -> Result<Slice<'_, u64>, DeviceError> {
        let key = Key { address: pages.address(), width: STAGE, boxes: Boxes::Rows(PAGE) };
        self.find(name, key, pages.len() / STAGE)
    }

    fn input(
        &self,
        name: &str,
        layout: Layout,
        x: &Slice<'_, bf16>,
        width: usize,
    ) -> Result<Slice<'_, u64>, DeviceError> {
        let boxes = Boxes::Rows(layout.box_rows());
        self.find(name, Key { address: x.address(), width, boxes }, x.len() / width)
    }

    fn weight(&self, name: &str, weight: &Weight, boxes: Boxes) -> Result<Slice<'_, u64>, DeviceError> {
        let address = weight.rows()?.as_slice().address();
        self.find(name, Key { address, width: weight.k(), boxes }, weight.n())
    }
}

/// A tensor map, what it is of, and how many rows that has.
type Encoded = (Key, usize, [u64; TENSOR_MAP_WORDS]);

/// The map of rows of `width`, in boxes of so many.
fn encode_rows(
    device: &Device,
    source: &Slice<'_, bf16>,
    width: usize,
    box_rows: usize,
) -> Result<Encoded, DeviceError> {
    let rows = source.len().checked_div(width).unwrap_or(0);
    let dimensions =
        [Dimension { len: width, stride: 1, boxed: STAGE }, Dimension { len: rows, stride: width, boxed: box_rows }];
    let map = device.tensor_map(source, &dimensions)?;
    Ok((Key { address: source.address(), width, boxes: Boxes::Rows(box_rows) }, rows, map))
}

/// The maps that the layouts of an operation want of a matrix: those with other boxes apart.
fn encode(device: &Device, matrix: Mapped<'_>) -> Result<Vec<Encoded>, DeviceError> {
    let in_boxes = |source: &Slice<'_, bf16>, width: usize, mut box_rows: Vec<usize>| {
        box_rows.sort_unstable();
        box_rows.dedup();
        box_rows.into_iter().map(|rows| encode_rows(device, source, width, rows)).collect()
    };
    let input =
        |x: &Slice<'_, bf16>, width, layouts: Layouts| in_boxes(x, width, layouts.map(Layout::box_rows).to_vec());
    let outputs = |weight: &Weight, layouts: Layouts| {
        in_boxes(&weight.rows()?.as_slice(), weight.k(), layouts.map(|layout| layout.outputs).to_vec())
    };
    match matrix {
        Mapped::QkvInput(x, width) => in_boxes(&x, width, vec![QKV.box_rows()]),
        Mapped::GateUpInput(x, width) => input(&x, width, GATE_UP),
        Mapped::PartsInput(x, width) => input(&x, width, PARTS),
        Mapped::LogitsInput(x, width) => input(&x, width, LOGITS),
        Mapped::Parts(weight) => outputs(weight, PARTS),
        Mapped::Pages(pages) => Ok(vec![encode_rows(device, &pages, STAGE, PAGE)?]),
        Mapped::Logits(weight) => outputs(weight, LOGITS),
        Mapped::Qkv(weight, head_width) => {
            let (rows, width) = (weight.rows()?.as_slice(), weight.k());
            let half = head_width / 2;
            let dimensions = [
                Dimension { len: width, stride: 1, boxed: STAGE },
                Dimension { len: 8, stride: width, boxed: 8 },
                Dimension { len: 2, stride: half * width, boxed: 2 },
                Dimension { len: half / 8, stride: 8 * width, boxed: QKV.outputs / 16 },
                Dimension { len: weight.n() / head_width.max(1), stride: head_width * width, boxed: 1 },
            ];
            let map = device.tensor_map(&rows, &dimensions)?;
            Ok(vec![(Key { address: rows.address(), width, boxes: Boxes::Partners }, weight.n(), map)])
        }
        Mapped::GateUp(weight) => {
            let (rows, width) = (weight.rows()?.as_slice(), weight.k());
            let ffn = weight.n() / 2;
            let dimensions = [
                Dimension { len: width, stride: 1, boxed: STAGE },
                Dimension { len: 8, stride: width, boxed: 8 },
                Dimension { len: 2, stride: ffn * width, boxed: 2 },
                Dimension { len: ffn / 8, stride: 8 * width, boxed: GATE_UP[0].outputs / 16 },
            ];
            let map = device.tensor_map(&rows, &dimensions)?;
            Ok(vec![(Key { address: rows.address(), width, boxes: Boxes::Eights }, weight.n(), map)])
        }
        Mapped::LongGateUpInput(x, width) => Ok(vec![encode_rows(device, &x, width, long::TOKENS)?]),
        Mapped::LongGateUp(weight) => {
            let (rows, width) = (weight.rows()?.as_slice(), weight.k());
            let woven = |layout: long::Layout| {
                // Of 4 N outputs, N t + 2 i + j stands at 8 i + 2 t + j, whose sums lane t of four has.
                let long::Layout { width: outputs, neighbours, .. } = layout;
                let blocks = [weight.n(), outputs].map(|count| count / layout.woven());
                let dimensions = [
                    Dimension { len: width, stride: 1, boxed: STAGE },
                    Dimension { len: 2, stride: width, boxed: 2 },
                    Dimension { len: 4, stride: neighbours * width, boxed: 4 },
                    Dimension { len: neighbours / 2, stride: 2 * width, boxed: neighbours / 2 },
                    Dimension { len: blocks[0], stride: layout.woven() * width, boxed: blocks[1] },
                ];
                let map = device.tensor_map(&rows, &dimensions)?;
                Ok((Key { address: rows.address(), width, boxes: Boxes::Woven(outputs) }, weight.n(), map))
            };
            LONG_GATE_UP.into_iter().map(woven).collect()
        }
    }
}

/// Which of the layouts: the smallest with room for all tokens, or the largest; or the caller's.
fn layout(name: &str, block: BlockTokens, layouts: &Layouts, tokens: usize) -> Result<usize, DeviceError> {
    match block {
        BlockTokens::Chosen => Ok(layouts.iter().position(|layout| tokens <= layout.tokens()).unwrap_or(2)),
        BlockTokens::Of(wanted) => layouts.iter().position(|layout| layout.tokens() == wanted).ok_or_else(|| {
            DeviceError::InvalidParameter(format!("{name}: a block takes 64, 128 or 256 tokens, not {wanted}"))
        }),
    }
}

fn grid(name: &str, layout: Layout, blocks: usize, tokens: usize, segments: usize) -> Result<Grid, DeviceError> {
    Ok(Grid {
        blocks: [
            size(name, blocks.next_multiple_of(layout.cluster))?,
            size(name, tokens.div_ceil(layout.tokens()))?,
            size(name, segments)?,
        ],
        dynamic_shared_bytes: size(name, layout.ring_bytes())?,
    })
}

/// M of `x` \[M, K\], where K suits and the device has the instructions.
fn rows(name: &str, device: &Device, x: &Slice<'_, bf16>, width: usize, segments: usize) -> Result<usize, DeviceError> {
    expect(device.kernel_image() == Some(IMAGE), name, || {
        format!("kernels of an {IMAGE} image; use the separate operations")
    })?;
    let shaped = segments > 0
        && width > 0
        && width.is_multiple_of(STAGE * segments)
        && !x.is_empty()
        && x.len().is_multiple_of(width);
    expect(shaped, name, || format!("x [M, {width}] of {}, K a multiple of {}", x.len(), STAGE * segments))?;
    Ok(x.len() / width)
}

/// Queries, keys and values of `x` \[M, K\], rotated (pairs i and i + D/2): the queries are left in `queries`
/// \[M, (H + 2 G) D\], keys and values are stored in their pages. The bits of [`linear`](super::linear) and
/// [`rotary_kv_write`](super::rotary_kv_write). `maps` has [`Mapped::QkvInput`] and [`Mapped::Qkv`] of them.
///
/// # Errors
/// As for [`wgmma_parts()`].
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn wgmma_qkv(
    device: &Device,
    at_once: QkvBlocks,
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
    const NAME: &str = "wgmma_qkv";
    let (width, outputs) = (weight.k(), heads.qkv_width());
    let tokens = rows(NAME, device, x, width, 1)?;
    let shaped = weight.n() == outputs
        && (bias.is_empty() || bias.len() == outputs)
        && places.positions.len() == tokens
        && places.row_tables.len() == tokens
        && queries.len() == tokens * outputs
        && heads.width.is_multiple_of(32)
        && pages.keys.len() == pages.values.len();
    expect(shaped, NAME, || {
        format!(
            "x of {tokens} rows, {} positions, queries {}, weight {} x {width}, {heads:?}",
            places.positions.len(),
            queries.len(),
            weight.n()
        )
    })?;
    let blocks = wgmma_qkv::blocks(heads.query_heads, heads.kv_heads, heads.width);
    let paired = match at_once {
        // Large blocks on most multiprocessors would keep attention's from starting early.
        QkvBlocks::Chosen => 2 * blocks * tokens.div_ceil(QKV.tokens()) > device.multiprocessors(),
        QkvBlocks::One | QkvBlocks::Two => at_once == QkvBlocks::Two,
    };
    let (layout, kernel) = match paired {
        false => (QKV, wgmma_qkv::wgmma_qkv::launch as fn(_, _, _, _, _, _, _, _, _, _, _, _, _, _) -> _),
        true => (QKV_PAIRED, wgmma_qkv::wgmma_qkv_paired::launch as _),
    };
    let (x_map, weight_map) = (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Partners)?);
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
            size(NAME, heads.width)?,
        ),
        grid(NAME, layout, blocks, tokens, 1)?,
    )
}

/// `x` \[M, K\] times the weight \[N, K\], with K in `segments` equal, consecutive segments: `parts` \[segments, M, N\]. `maps` has
/// [`Mapped::PartsInput`] and [`Mapped::Parts`] of them.
///
/// # Errors
/// A shape that does not fit, a map that is missing, or the launch's error.
pub fn wgmma_parts(
    device: &Device,
    block: BlockTokens,
    maps: &TensorMaps,
    segments: usize,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    parts: &mut SliceMut<'_, f32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_parts";
    let (width, outputs) = (weight.k(), weight.n());
    let tokens = rows(NAME, device, x, width, segments)?;
    expect(parts.len() == segments * tokens * outputs && outputs.is_multiple_of(8), NAME, || {
        format!("parts of {}, {segments} x {tokens} x {outputs} (a multiple of 8)", parts.len())
    })?;
    // The fewest tokens for which each block has a multiprocessor: its time is that of the tokens' way there.
    let blocks = |layout: Layout| outputs.div_ceil(layout.outputs) * tokens.div_ceil(layout.tokens()) * segments;
    let chosen = match block {
        BlockTokens::Chosen if blocks(PARTS[0]) <= device.multiprocessors() => 0,
        _ => layout(NAME, block, &PARTS, tokens)?,
    };
    let layout = PARTS[chosen];
    let kernel = match chosen {
        0 => wgmma_parts::wgmma_parts_64::launch,
        1 => wgmma_parts::wgmma_parts_128::launch,
        _ => wgmma_parts::wgmma_parts_256::launch,
    };
    let (x_map, weight_map) =
        (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Rows(layout.outputs))?);
    let grid = grid(NAME, layout, outputs.div_ceil(layout.outputs), tokens, segments)?;
    let (tokens, outputs, part) = (size(NAME, tokens)?, size(NAME, outputs)?, size(NAME, width / segments)?);
    device.launch(kernel(&x_map, &weight_map, parts, tokens, outputs, part), grid)
}

/// silu(gate) * up of `x` \[M, K\] into `out` \[M, F\], where the weight \[2 F, K\] has gate, then up. The bits of
/// [`linear`](super::linear) into bf16 and [`silu_mul`](super::silu_mul). `maps` has [`Mapped::GateUpInput`] and [`Mapped::GateUp`] of
/// them.
///
/// # Errors
/// As for [`wgmma_parts()`].
pub fn wgmma_gate_up(
    device: &Device,
    block: BlockTokens,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    out: &mut SliceMut<'_, bf16>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_gate_up";
    let (width, ffn) = (weight.k(), weight.n() / 2);
    let tokens = rows(NAME, device, x, width, 1)?;
    let shaped = weight.n() == 2 * ffn && ffn.is_multiple_of(8) && out.len() == tokens * ffn;
    expect(shaped, NAME, || {
        format!("weight {} x {width}, F a multiple of 8, out [{tokens}, {ffn}] of {}", weight.n(), out.len())
    })?;
    let chosen = layout(NAME, block, &GATE_UP, tokens)?;
    let layout = GATE_UP[chosen];
    let kernel = match chosen {
        0 => wgmma_gate_up::wgmma_gate_up_64::launch,
        1 => wgmma_gate_up::wgmma_gate_up_128::launch,
        _ => wgmma_gate_up::wgmma_gate_up_256::launch,
    };
    let (x_map, weight_map) = (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Eights)?);
    let grid = grid(NAME, layout, (2 * ffn).div_ceil(layout.outputs), tokens, 1)?;
    let (tokens, ffn, width) = (size(NAME, tokens)?, size(NAME, ffn)?, size(NAME, width)?);
    device.launch(kernel(&x_map, &weight_map, out, tokens, ffn, width), grid)
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

/// As [`wgmma_gate_up()`], for rows `rows` of `x`, in tiles for many: `out` is \[their number, F\]. `maps` has
/// [`Mapped::LongGateUpInput`] of x, or of more rows from its first on, and [`Mapped::LongGateUp`] of the weight.
///
/// # Errors
/// As for [`wgmma_parts()`].
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
    let all = self::rows(NAME, device, x, width, 1)?;
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
    let x_map = maps.find(NAME, Key { address: x.address(), width, boxes: Boxes::Rows(long::TOKENS) }, all)?;
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

/// The head of `x` \[M, K\]: `logits` \[M, V\] where given, and the token that [`argmax`](super::argmax) would choose of each row
/// in `ids` \[M\]. `best` has [`wgmma_best_len`] elements or more. `maps` has [`Mapped::LogitsInput`] and [`Mapped::Logits`] of them.
///
/// # Errors
/// As for [`wgmma_parts()`].
#[expect(clippy::too_many_arguments, reason = "the kernel's own arguments")]
pub fn wgmma_logits(
    device: &Device,
    block: BlockTokens,
    maps: &TensorMaps,
    x: &Slice<'_, bf16>,
    weight: &Weight,
    logits: &mut SliceMut<'_, f32>,
    best: &mut SliceMut<'_, u64>,
    ids: &mut SliceMut<'_, u32>,
) -> Result<(), DeviceError> {
    const NAME: &str = "wgmma_logits";
    let (width, vocab) = (weight.k(), weight.n());
    let tokens = rows(NAME, device, x, width, 1)?;
    let chosen = layout(NAME, block, &LOGITS, tokens)?;
    let layout = LOGITS[chosen];
    let resident = device.multiprocessors() / tokens.div_ceil(layout.tokens()) / layout.cluster * layout.cluster;
    let blocks = vocab.div_ceil(layout.outputs).next_multiple_of(layout.cluster).min(resident.max(layout.cluster));
    let shaped = vocab > 0
        && (logits.is_empty() || logits.len() == tokens * vocab)
        && best.len() >= blocks * tokens
        && ids.len() == tokens;
    expect(shaped, NAME, || {
        format!(
            "x [{tokens}, {width}], weight {vocab} x {width}, logits {}, best {}, ids {}",
            logits.len(),
            best.len(),
            ids.len()
        )
    })?;
    let kernel = match chosen {
        0 => wgmma_logits::wgmma_logits_64::launch,
        1 => wgmma_logits::wgmma_logits_128::launch,
        _ => wgmma_logits::wgmma_logits_256::launch,
    };
    let (x_map, weight_map) =
        (maps.input(NAME, layout, x, width)?, maps.weight(NAME, weight, Boxes::Rows(layout.outputs))?);
    let mut best = best.slice_mut(..blocks * tokens)?;
    let grid = grid(NAME, layout, blocks, tokens, 1)?;
    let (columns, vocab, width) = (size(NAME, tokens)?, size(NAME, vocab)?, size(NAME, width)?);
    device.launch(kernel(&x_map, &weight_map, logits, &mut best, columns, vocab, width), grid)?;
    device.launch(few_logits::few_argmax::launch(&best.as_slice(), ids, columns), Grid::new_1d(columns))
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
