//! Tensor maps: what the copy engine of a GPU knows of a matrix of which it brings boxes. Which boxes there are follows from the kernels
//! that want them.

use half::bf16;
use kernels_gpu::warpgroup_tiles::{Layout, STAGE};
use kernels_gpu::wgmma_qkv::QKV;
use kernels_gpu::{wgmma_long_gate_up as long, wgmma_long_qkv as long_qkv, wgmma_long_residual as residual_tiles};

use super::PAGE;
use super::wgmma::{GATE_UP, LOGITS, Layouts, PARTS};
use super::wgmma_long::{LONG_GATE_UP, LONG_QKV, LONG_RESIDUAL};
use crate::device::{Buffer, Device, DeviceError, Dimension, MemoryKind, Slice, TENSOR_MAP_WORDS, Weight};

/// What a tensor map is for.
#[derive(Clone, Copy, Debug)]
pub enum Mapped<'a> {
    /// The input of [`wgmma_qkv()`](super::wgmma_qkv) \[M, K\], and K.
    QkvInput(Slice<'a, bf16>, usize),
    /// The weight of it, whose heads are so wide.
    Qkv(&'a Weight, usize),
    /// The input of [`wgmma_gate_up()`](super::wgmma_gate_up) \[M, K\], and K.
    GateUpInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    GateUp(&'a Weight),
    /// The input of [`wgmma_long_qkv()`](super::wgmma_long_qkv), all of it, and K.
    LongQkvInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    LongQkv(&'a Weight),
    /// The input of [`wgmma_long_gate_up()`](super::wgmma_long_gate_up), all of it, and K.
    LongGateUpInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    LongGateUp(&'a Weight),
    /// The input of [`wgmma_long_residual()`](super::wgmma_long_residual), all of it, and K.
    LongResidualInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    LongResidual(&'a Weight),
    /// The input of [`wgmma_parts()`](super::wgmma_parts) \[M, K\], and K.
    PartsInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    Parts(&'a Weight),
    /// A layer's keys, or its values, for [`attention_prefill()`](super::attention_prefill) with heads of 64 elements.
    Pages(Slice<'a, bf16>),
    /// The input of [`wgmma_logits()`](super::wgmma_logits) \[M, K\], and K.
    LogitsInput(Slice<'a, bf16>, usize),
    /// The weight of it.
    Logits(&'a Weight),
}

/// What a copy takes of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Boxes {
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

    pub(super) fn input(
        &self,
        name: &str,
        layout: Layout,
        x: &Slice<'_, bf16>,
        width: usize,
    ) -> Result<Slice<'_, u64>, DeviceError> {
        self.rows(name, x, width, layout.box_rows())
    }

    /// That of a matrix \[M, K\] in boxes of so many rows.
    pub(super) fn rows(
        &self,
        name: &str,
        x: &Slice<'_, bf16>,
        width: usize,
        box_rows: usize,
    ) -> Result<Slice<'_, u64>, DeviceError> {
        let key = Key { address: x.address(), width, boxes: Boxes::Rows(box_rows) };
        self.find(name, key, x.len() / width)
    }

    pub(super) fn weight(&self, name: &str, weight: &Weight, boxes: Boxes) -> Result<Slice<'_, u64>, DeviceError> {
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
        Mapped::LongQkvInput(x, width) => in_boxes(&x, width, LONG_QKV.map(long_qkv::Layout::tokens).to_vec()),
        Mapped::LongQkv(weight) => {
            in_boxes(&weight.rows()?.as_slice(), weight.k(), LONG_QKV.map(long_qkv::Layout::box_rows).to_vec())
        }
        Mapped::LongGateUpInput(x, width) => Ok(vec![encode_rows(device, &x, width, long::TOKENS)?]),
        Mapped::LongResidualInput(x, width) => Ok(vec![encode_rows(device, &x, width, residual_tiles::TOKENS)?]),
        Mapped::LongResidual(weight) => {
            let box_rows = LONG_RESIDUAL.map(residual_tiles::Layout::box_rows).to_vec();
            in_boxes(&weight.rows()?.as_slice(), weight.k(), box_rows)
        }
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
