//! A whole decode step of one token in one kernel: see [`kernels_gpu::decode_step`]. It gives the bits of the separate operations
//! on a GPU.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::attention_decode_short::apart_bytes;
use kernels_gpu::decode_step::{LAYER_WORDS, MOST_HIDDEN, STAGE, Shape};
use kernels_gpu::decode_step::{decode_step_32, decode_step_64};
use kernels_gpu::weight_ring::{UNITS, unit_bytes};
use kernels_gpu::{few, few_logits};

use super::attention::PagesMut;
use super::few::{Norm, Places};
use super::{HeadShape, expect, size};
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, SliceMut, Weight, contract};

const NAME: &str = "decode_step";

/// Units of weights on their way to a multiprocessor at once.
const AHEAD: u32 = 2;

/// Clock cycles that a multiprocessor waits for each KiB of a layer's weights, so that memory is not always busy when blocks hand
/// values to each other. Measured on an H100 (0.5 billion parameters): 0 gives 1,398 tokens/s, 140 1,472, 170 1,490, 205 1,392.
const PACE: u32 = 170;

/// A layer of the model, and its pages.
#[derive(Debug)]
pub struct StepLayer<'a> {
    /// In front of QKV \[C\].
    pub input_gain: Slice<'a, bf16>,
    /// \[(H + 2 G) D, C\].
    pub qkv: &'a Weight,
    /// \[(H + 2 G) D\].
    pub bias: Option<Slice<'a, bf16>>,
    /// \[C, H D\].
    pub output: &'a Weight,
    /// In front of gate and up \[C\].
    pub post_gain: Slice<'a, bf16>,
    /// \[2 F, C\].
    pub gate_up: &'a Weight,
    /// \[C, F\].
    pub down: &'a Weight,
    /// Its pages.
    pub pages: PagesMut<'a>,
}

/// What is in front of the first layer and behind the last.
#[derive(Clone, Copy, Debug)]
pub struct StepEnds<'a> {
    /// \[V, C\].
    pub embedding: Slice<'a, bf16>,
    /// In front of the head; its `eps` is every norm's.
    pub norm: Norm<'a>,
    /// \[V, C\].
    pub head: &'a Weight,
    /// \[positions, D / 2, 2\].
    pub rope_table: Slice<'a, f32>,
}

/// What steps leave for each other on a device: the table of layers, and the words that blocks exchange.
#[derive(Debug)]
pub struct StepMemory {
    table: Buffer<u64>,
    /// What is in `table`.
    layers: Vec<u64>,
    words: Buffer<u64>,
    /// The next tag. 0 is on words that nobody has written.
    tag: u32,
}

impl StepMemory {
    /// For a model with so many layers.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        device: &Device,
        heads: HeadShape,
        hidden: usize,
        ffn: usize,
        layers: usize,
    ) -> Result<Self, DeviceError> {
        let words = shape(heads, hidden, ffn, 0)?.words().len as usize;
        Ok(Self {
            table: device.alloc((layers * LAYER_WORDS).max(1), MemoryKind::Activations, "table of layers")?,
            layers: Vec::new(),
            words: device.alloc(words, MemoryKind::Activations, "words between blocks")?,
            tag: 1,
        })
    }

    /// The first of `count` tags that are on no word.
    fn tags(&mut self, device: &Device, count: u32) -> Result<u32, DeviceError> {
        if self.tag.checked_add(count).is_none() {
            device.fill_zero(&mut self.words)?;
            self.tag = 1;
        }
        let first = self.tag;
        self.tag += count;
        Ok(first)
    }
}

fn shape(heads: HeadShape, hidden: usize, ffn: usize, vocab: usize) -> Result<Shape, DeviceError> {
    Ok(Shape {
        hidden: size(NAME, hidden)?,
        heads: size(NAME, heads.query_heads)?,
        kv_heads: size(NAME, heads.kv_heads)?,
        head_width: size(NAME, heads.width)?,
        ffn: size(NAME, ffn)?,
        output_halvings: contract::segments(hidden, heads.query_width()).ilog2(),
        down_halvings: contract::segments(hidden, ffn).ilog2(),
        vocab: size(NAME, vocab)?,
    })
}

/// Whether kernels of an image such as `sm_90a` have the copy engine's instructions: from compute capability 9.0 on. What counts is
/// the image, not the GPU, which may be newer and run an older one.
fn has_bulk_copies(image: &str) -> bool {
    let digits = image.strip_prefix("sm_").unwrap_or_default().trim_end_matches(|c: char| c.is_ascii_alphabetic());
    digits.parse::<u32>().is_ok_and(|capability| capability >= 90)
}

/// Whether the kernel takes a model's shapes on this device, with the kernels that run there.
#[must_use]
pub fn decode_step_fits(device: &Device, heads: HeadShape, hidden: usize, ffn: usize, layers: usize) -> bool {
    let Ok(shape) = shape(heads, hidden, ffn, 0) else { return false };
    let stage = STAGE as usize;
    let (output, down) = (1 << shape.output_halvings, 1 << shape.down_halvings);
    let Ok(layers) = u32::try_from(layers) else { return false };
    let largest = [(16, shape.hidden), (8, shape.query_width() / output), (8, shape.ffn / down)];
    let largest = largest.map(|(rows, width)| unit_bytes(rows, width) as usize).into_iter().max().unwrap_or(0);
    let ring = device.shared_bytes_per_block().saturating_sub(shape.front(layers).ring as usize);
    device.kernel_image().is_some_and(has_bulk_copies)
        && matches!(heads.width, 32 | 64)
        && heads.query_heads / heads.kv_heads <= 16
        && hidden.is_multiple_of(stage)
        && shape.hidden <= MOST_HIDDEN
        && heads.query_width().is_multiple_of(stage * output as usize)
        && ffn.is_multiple_of(stage * down as usize)
        && ring >= 2 * largest
        && ring >= largest + apart_bytes(heads.width)
}

/// Computes a step of one token that continues a sequence, `id` \[1\]: stores its key and value in the pages, leaves `logits`
/// \[V\] where given, and the token that [`argmax`](super::argmax) would choose in `chosen` \[1\]. `best` has
/// [`best_len`](super::best_len) elements. One multiprocessor reads all of the context for a KV head, so long ones are better
/// computed otherwise.
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "a whole model's arguments")]
pub fn decode_step(
    device: &Device,
    memory: &mut StepMemory,
    id: &Slice<'_, u32>,
    places: Places<'_>,
    ends: StepEnds<'_>,
    layers: &mut [StepLayer<'_>],
    logits: &mut SliceMut<'_, f32>,
    best: &mut SliceMut<'_, u64>,
    chosen: &mut SliceMut<'_, u32>,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    let (hidden, vocab) = (ends.head.k(), ends.head.n());
    let ffn = layers.first().map_or(few::STAGE, |layer| layer.down.k());
    let shape = shape(heads, hidden, ffn, vocab)?;
    expect(decode_step_fits(device, heads, hidden, ffn, layers.len()), NAME, || {
        format!(
            "{heads:?}, width {hidden}, feed-forward width {ffn}: not supported on this device, use the separate operations"
        )
    })?;
    let page_elements = layers.first().map_or(0, |layer| layer.pages.keys.len());
    let fits = |layer: &StepLayer<'_>| {
        layer.input_gain.len() == hidden
            && layer.post_gain.len() == hidden
            && (layer.qkv.n(), layer.qkv.k()) == (heads.qkv_width(), hidden)
            && layer.bias.as_ref().is_none_or(|bias| bias.len() == heads.qkv_width())
            && (layer.output.n(), layer.output.k()) == (hidden, heads.query_width())
            && (layer.gate_up.n(), layer.gate_up.k()) == (2 * ffn, hidden)
            && (layer.down.n(), layer.down.k()) == (hidden, ffn)
            && layer.pages.keys.len() == page_elements
            && layer.pages.values.len() == page_elements
    };
    let blocks = device.multiprocessors();
    let shaped = id.len() == 1
        && places.positions.len() == 1
        && places.row_tables.len() == 1
        && ends.embedding.len() == vocab * hidden
        && ends.norm.gain.len() == hidden
        && layers.iter().all(fits)
        && memory.table.len() == (layers.len() * LAYER_WORDS).max(1)
        && memory.words.len() >= shape.words().len as usize
        && (logits.is_empty() || logits.len() == vocab)
        && best.len() >= blocks
        && chosen.len() == 1;
    expect(shaped, NAME, || format!("one token and {} layers: buffers of other sizes", layers.len()))?;

    let mut table = Vec::with_capacity(layers.len() * LAYER_WORDS);
    for layer in layers.iter() {
        table.extend([
            layer.input_gain.address(),
            layer.qkv.rows()?.as_slice().address(),
            layer.bias.as_ref().map_or(0, Slice::address),
            layer.output.rows()?.as_slice().address(),
            layer.post_gain.address(),
            layer.gate_up.rows()?.as_slice().address(),
            layer.down.rows()?.as_slice().address(),
            layer.pages.keys.address(),
            layer.pages.values.address(),
        ]);
    }
    if memory.layers != table {
        device.upload(memory.table.slice_mut(..table.len())?, &table)?;
        memory.layers = table;
    }
    let tag = memory.tags(device, size(NAME, layers.len() + 1)?)?;
    let shared = size(NAME, device.shared_bytes_per_block())?;
    const { assert!(AHEAD < UNITS) };
    let kernel = match heads.width {
        32 => decode_step_32::launch,
        _ => decode_step_64::launch,
    };
    let mut block_best = best.slice_mut(..blocks)?;
    device.launch(
        kernel(
            id,
            &ends.embedding,
            &memory.table.slice(..layers.len() * LAYER_WORDS)?,
            &ends.norm.gain,
            &ends.head.rows()?.as_slice(),
            &ends.rope_table,
            &places.positions,
            &places.row_tables,
            &places.page_tables,
            &mut memory.words.as_slice_mut(),
            logits,
            &mut block_best,
            shape.heads,
            shape.kv_heads,
            shape.ffn,
            shape.vocab,
            page_elements as u64,
            shape.output_halvings | shape.down_halvings << 8,
            shared,
            AHEAD,
            PACE,
            tag,
            ends.norm.eps,
            heads.scale(),
        ),
        Grid { blocks: [size(NAME, blocks)?, 1, 1], dynamic_shared_bytes: shared },
    )?;
    device.launch(few_logits::few_argmax::launch(&block_best.as_slice(), chosen, 1), Grid::new_1d(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuOptions;

    const HEADS: HeadShape = HeadShape { query_heads: 14, kv_heads: 2, width: 64 };

    #[test]
    fn blocks_that_wait_for_each_other_are_not_for_the_executor() {
        let device = Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap();
        assert!(!decode_step_fits(&device, HEADS, 896, 4864, 24));
    }

    #[test]
    fn older_images_have_no_bulk_copies_on_any_gpu() {
        assert_eq!(["sm_90a", "sm_100"].map(has_bulk_copies), [true; 2]);
        assert_eq!(["sm_80", "sm_", "", "90"].map(has_bulk_copies), [false; 4]);
    }

    #[test]
    fn a_tag_is_never_used_twice() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let mut memory = StepMemory::new(&device, HEADS, 896, 4864, 24).unwrap();
        assert_eq!([memory.tags(&device, 25).unwrap(), memory.tags(&device, 25).unwrap()], [1, 26]);
        // Before they would repeat, every word is forgotten.
        let stale = vec![u64::MAX; memory.words.len()];
        device.upload(&mut memory.words, &stale).unwrap();
        memory.tag = u32::MAX - 24;
        assert_eq!(memory.tags(&device, 25).unwrap(), 1);
        assert!(device.download(&memory.words).unwrap().iter().all(|&word| word == 0));
    }
}
