//! A whole decode step of one token in one kernel: see [`kernels_gpu::decode_step`]. It gives the bits of the separate operations
//! on a GPU.

use cuda_std::launch::Grid;
use half::bf16;
use kernels_gpu::attention_decode_short::{apart_bytes, span_bytes};
use kernels_gpu::decode_step::{LAYER_WORDS, MOST_HIDDEN, STAGE, Shape};
use kernels_gpu::decode_step::{decode_step_32, decode_step_64, decode_step_long_32, decode_step_long_64};
use kernels_gpu::few_logits;
use kernels_gpu::weight_ring::{UNITS, unit_bytes};

use super::attention::PagesMut;
use super::few::{Norm, Places};
use super::{HeadShape, PAGE, expect, size};
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, SliceMut, Weight, contract};

const NAME: &str = "decode_step";

/// Units of weights on their way to a multiprocessor at once.
const AHEAD: u32 = 2;

/// Clock cycles that a multiprocessor waits for each KiB of a layer's weights, so that memory is not always busy when blocks hand
/// values to each other. Measured on an H100 (0.5 billion parameters): 80 gives 1,881 tokens/s, 90 1,910, 100 1,927, 110 1,930,
/// 120 1,925, 130 1,903 (`benches/results/2026-11-23-h100-replicas.md`).
const PACE: u32 = 105;

/// The same where all blocks attend, and stream keys and values too. At contexts of 385, 1,025 and 4,096 tokens 93 gives 1,898, 1,879 and 1,741
/// tokens/s, 97 1,897, 1,880 and 1,750, 101 1,885, 1,875 and 1,757, 105 1,859, 1,855 and 1,755.
const LONG_PACE: u32 = 101;

/// Most spans of a context that one block computes for a KV head: as many as it has at once. Of longer ones all blocks share the spans.
const ALONE: usize = 4;

/// Most spans of a context. There are words for the partial results of so many: 3.8 MB with 14 heads of 64 elements.
const MOST_SPANS: usize = 512;

/// Most spans of a KV head that a block computes.
const SPANS_OF_BLOCK: usize = 32;

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

/// What steps leave for each other on a device: the table of layers, and the words that blocks exchange. What all steps of a model
/// have in common is computed once, for it.
#[derive(Debug)]
pub struct StepMemory {
    heads: HeadShape,
    /// Its vocabulary is that of the step's head.
    shape: Shape,
    /// Whether the kernel takes the model on the device.
    fits: bool,
    /// The layers' addresses.
    table: Buffer<u64>,
    /// What is in `table`, once it has been uploaded.
    layers: Vec<[u64; LAYER_WORDS]>,
    /// Whether it has.
    uploaded: bool,
    words: Buffer<u64>,
    /// Most spans of a context.
    most_spans: usize,
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
        let shape = shape(heads, hidden, ffn)?;
        let fits = fits(device, heads, shape, layers);
        let most_spans = if fits { most_spans(device, heads) } else { 0 };
        let words = shape.partials(size(NAME, most_spans)?).len as usize;
        Ok(Self {
            heads,
            shape,
            fits,
            most_spans,
            table: device.alloc((layers * LAYER_WORDS).max(1), MemoryKind::Activations, "table of layers")?,
            layers: vec![[0; LAYER_WORDS]; layers],
            uploaded: false,
            words: device.alloc(words, MemoryKind::Activations, "words between blocks")?,
            tag: 1,
        })
    }

    /// Overwrites every word with `u64::MAX`: a value that is NaN, and a tag that no step has. For tests: whoever takes a word that
    /// this step has not written shows it.
    ///
    /// # Errors
    /// The device's error.
    pub(crate) fn poison(&mut self, device: &Device) -> Result<(), DeviceError> {
        let poison = vec![u64::MAX; self.words.len()];
        device.upload(&mut self.words, &poison)
    }

    #[cfg(test)]
    pub(crate) fn words(&self) -> Slice<'_, u64> {
        self.words.as_slice()
    }

    /// Puts the layers' addresses into the table on the device, where they are not there yet. Returns how many elements the keys of
    /// a layer's pages have, and its values.
    fn place<'a>(
        &mut self,
        device: &Device,
        layers: impl Iterator<Item = StepLayer<'a>>,
    ) -> Result<usize, DeviceError> {
        let (heads, hidden, ffn) = (self.heads, self.shape.hidden as usize, self.shape.ffn as usize);
        let (count, mut given, mut page_elements) = (self.layers.len(), 0, None);
        for layer in layers {
            let elements = *page_elements.get_or_insert(layer.pages.keys.len());
            let shaped = layer.input_gain.len() == hidden
                && layer.post_gain.len() == hidden
                && (layer.qkv.n(), layer.qkv.k()) == (heads.qkv_width(), hidden)
                && layer.bias.as_ref().is_none_or(|bias| bias.len() == heads.qkv_width())
                && (layer.output.n(), layer.output.k()) == (hidden, heads.query_width())
                && (layer.gate_up.n(), layer.gate_up.k()) == (2 * ffn, hidden)
                && (layer.down.n(), layer.down.k()) == (hidden, ffn)
                && layer.pages.keys.len() == elements
                && layer.pages.values.len() == elements;
            expect(shaped, NAME, || format!("layer {given}: buffers of other sizes"))?;
            let addresses = [
                layer.input_gain.address(),
                layer.qkv.rows()?.as_slice().address(),
                layer.bias.as_ref().map_or(0, Slice::address),
                layer.output.rows()?.as_slice().address(),
                layer.post_gain.address(),
                layer.gate_up.rows()?.as_slice().address(),
                layer.down.rows()?.as_slice().address(),
                layer.pages.keys.address(),
                layer.pages.values.address(),
            ];
            // One layer too many has no place, and is an error below.
            if let Some(held) = self.layers.get_mut(given).filter(|held| **held != addresses) {
                self.uploaded = false;
                *held = addresses;
            }
            given += 1;
        }
        expect(given == count, NAME, || format!("{given} layers, with memory for {count}"))?;
        if !self.uploaded {
            device.upload(&mut self.table, self.layers.as_flattened())?;
            // The kernel reads it before it waits for the work ahead.
            device.synchronize()?;
            self.uploaded = true;
        }
        Ok(page_elements.unwrap_or(0))
    }

    /// The first of `count` tags that are on no word. All of them are below `u32::MAX`, which is [`poison`](Self::poison)'s.
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

/// A model without its vocabulary.
fn shape(heads: HeadShape, hidden: usize, ffn: usize) -> Result<Shape, DeviceError> {
    Ok(Shape {
        hidden: size(NAME, hidden)?,
        heads: size(NAME, heads.query_heads)?,
        kv_heads: size(NAME, heads.kv_heads)?,
        head_width: size(NAME, heads.width)?,
        ffn: size(NAME, ffn)?,
        output_halvings: contract::segments(hidden, heads.query_width()).ilog2(),
        down_halvings: contract::segments(hidden, ffn).ilog2(),
        vocab: 0,
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
    shape(heads, hidden, ffn).is_ok_and(|shape| fits(device, heads, shape, layers))
}

/// Most spans of a context that the kernel takes on this device.
fn most_spans(device: &Device, heads: HeadShape) -> usize {
    (device.multiprocessors() * SPANS_OF_BLOCK / heads.kv_heads.max(1)).min(MOST_SPANS)
}

/// Most tokens of a context that [`decode_step`] takes on this device, the new one included.
#[must_use]
pub fn decode_step_context(device: &Device, heads: HeadShape) -> usize {
    most_spans(device, heads).max(ALONE) * PAGE
}

/// Shared memory of a block: all but what the kernel behind needs, which is to stand ready when the last block ends.
fn shared_bytes(device: &Device) -> usize {
    device.shared_bytes_per_block().saturating_sub(2048)
}

/// Whether the kernel is for this device and this model.
fn fits(device: &Device, heads: HeadShape, shape: Shape, layers: usize) -> bool {
    device.kernel_image().is_some_and(has_bulk_copies) && shape_fits(shared_bytes(device), heads, shape, layers)
}

/// Whether the kernel takes a model's shapes with so much shared memory.
fn shape_fits(shared_bytes: usize, heads: HeadShape, shape: Shape, layers: usize) -> bool {
    let (output, down) = (1 << shape.output_halvings, 1 << shape.down_halvings);
    let Ok(layers) = u32::try_from(layers) else { return false };
    let largest = [(16, shape.hidden), (8, shape.query_width() / output), (8, shape.ffn / down)];
    let largest = largest.map(|(rows, width)| unit_bytes(rows, width) as usize).into_iter().max().unwrap_or(0);
    let [ring, long_ring] =
        [false, true].map(|long| shared_bytes.saturating_sub(shape.front(layers, long).ring as usize));
    layers > 0
        && heads.check(NAME).is_ok()
        && matches!(heads.width, 32 | 64)
        && shape.hidden.is_multiple_of(STAGE)
        && shape.hidden <= MOST_HIDDEN
        && shape.query_width().is_multiple_of(STAGE * output)
        && shape.ffn.is_multiple_of(STAGE * down)
        && long_ring >= 2 * largest
        && long_ring >= largest + span_bytes(heads.width)
        && ring >= largest + apart_bytes(heads.width)
}

/// Computes a step of one token that continues a sequence, `id` \[1\]: stores its key and value in the pages, leaves `logits`
/// \[V\] where given, and the token that [`argmax`](super::argmax) would choose in `chosen` \[1\]. `layers` are all of the
/// model that `memory` is for, in order. `best` has [`best_len`](super::best_len) elements. `context`: tokens, the new one included,
/// at most [`decode_step_context`].
///
/// # Errors
/// A shape that does not fit, or the launch's error.
#[expect(clippy::too_many_arguments, reason = "a whole model's arguments")]
pub fn decode_step<'a>(
    device: &Device,
    memory: &mut StepMemory,
    id: &Slice<'_, u32>,
    places: Places<'_>,
    ends: StepEnds<'_>,
    layers: impl Iterator<Item = StepLayer<'a>>,
    logits: &mut SliceMut<'_, f32>,
    best: &mut SliceMut<'_, u64>,
    chosen: &mut SliceMut<'_, u32>,
    context: usize,
) -> Result<(), DeviceError> {
    let (heads, count) = (memory.heads, memory.layers.len());
    let (hidden, vocab) = (memory.shape.hidden as usize, ends.head.n());
    expect(count > 0, NAME, || "a model without layers: use the separate operations".to_owned())?;
    expect(memory.fits, NAME, || {
        format!(
            "{heads:?}, width {hidden}, feed-forward width {}, {count} layers: not supported on this device, use the \
             separate operations",
            memory.shape.ffn
        )
    })?;
    let shape = Shape { vocab: size(NAME, vocab)?, ..memory.shape };
    let spans = context.div_ceil(PAGE);
    expect(spans <= ALONE || spans <= memory.most_spans, NAME, || {
        format!("a context of {context} tokens: at most {}, else use fused layers", memory.most_spans * PAGE)
    })?;
    let blocks = device.multiprocessors();
    let shaped = id.len() == 1
        && places.positions.len() == 1
        && places.row_tables.len() == 1
        && ends.embedding.len() == vocab * hidden
        && ends.head.k() == hidden
        && ends.norm.gain.len() == hidden
        && (logits.is_empty() || logits.len() == vocab)
        && best.len() >= blocks
        && chosen.len() == 1;
    expect(shaped, NAME, || format!("one token of width {hidden}, {vocab} tokens: buffers of other sizes"))?;
    let page_elements = memory.place(device, layers)?;
    let tag = memory.tags(device, size(NAME, count + 1)?)?;
    let shared = size(NAME, shared_bytes(device))?;
    const { assert!(AHEAD < UNITS) };
    let pace = if spans <= ALONE { PACE } else { LONG_PACE };
    let kernel = match (heads.width, spans <= ALONE) {
        (32, true) => decode_step_32::launch,
        (_, true) => decode_step_64::launch,
        (32, false) => decode_step_long_32::launch,
        (_, false) => decode_step_long_64::launch,
    };
    let mut block_best = best.slice_mut(..blocks)?;
    // It waits before it reads indices; its table's upload has been waited for. It lets `few_argmax` start at once, which reads nothing
    // before it waits.
    device.launch_behind_copies(
        kernel(
            id,
            &ends.embedding,
            &memory.table,
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
            shape.output_halvings | shape.down_halvings << 8 | size(NAME, memory.most_spans)? << 16,
            shared,
            AHEAD,
            pace,
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
    fn shapes_are_what_the_kernel_was_written_for() {
        const SHARED: usize = 227 * 1024;
        let takes = |shared_bytes, [query_heads, kv_heads, width]: [usize; 3], hidden, ffn, layers| {
            let heads = HeadShape { query_heads, kv_heads, width };
            shape_fits(shared_bytes, heads, shape(heads, hidden, ffn).unwrap(), layers)
        };
        assert!(takes(SHARED, [14, 2, 64], 896, 4864, 24));
        for (heads, hidden, ffn) in
            [([1, 1, 64], 64, 64), ([16, 1, 32], 1024, 4096), ([34, 17, 64], 128, 2176), ([7, 1, 64], 320, 2112)]
        {
            assert!(takes(SHARED, heads, hidden, ffn, 3), "{heads:?}, {hidden}, {ffn}");
        }
        for (heads, hidden, ffn, layers) in [
            // Heads.
            ([14, 2, 96], 896, 4864, 24),
            ([17, 1, 64], 896, 4864, 24),
            ([14, 4, 64], 896, 4864, 24),
            ([14, 0, 64], 896, 4864, 24),
            // Widths.
            ([14, 2, 64], 1088, 4864, 24),
            ([14, 2, 64], 928, 4864, 24),
            ([3, 1, 32], 896, 4864, 24),
            ([14, 2, 64], 896, 96, 24),
            ([14, 2, 64], 896, 2080, 24),
            // Layers.
            ([14, 2, 64], 896, 4864, 0),
            ([14, 2, 64], 896, 4864, 1024),
        ] {
            assert!(!takes(SHARED, heads, hidden, ffn, layers), "{heads:?}, {hidden}, {ffn}, {layers} layers");
        }
        // A GPU with the instructions and less shared memory.
        assert!(!takes(99 * 1024, [14, 2, 64], 896, 4864, 24));
    }

    /// A small model's layers on the CPU.
    struct Layers {
        gain: Buffer<bf16>,
        bias: Buffer<bf16>,
        weights: Vec<[Weight; 4]>,
        pages: Vec<[Buffer<bf16>; 2]>,
    }

    const SMALL: HeadShape = HeadShape { query_heads: 2, kv_heads: 1, width: 32 };
    const HIDDEN: usize = 64;
    const FFN: usize = 128;

    impl Layers {
        fn new(device: &Device, count: usize) -> Self {
            let alloc = |len: usize| device.alloc::<bf16>(len, MemoryKind::Other, "test").unwrap();
            let weight = |n: usize, k: usize| device.prepare_weight(alloc(n * k), n, k, true).unwrap();
            let weights = || {
                let (qkv, output) = (weight(SMALL.qkv_width(), HIDDEN), weight(HIDDEN, SMALL.query_width()));
                [qkv, output, weight(2 * FFN, HIDDEN), weight(HIDDEN, FFN)]
            };
            let pages = || [alloc(SMALL.page_elements()), alloc(SMALL.page_elements())];
            Self {
                gain: alloc(HIDDEN),
                bias: alloc(SMALL.qkv_width()),
                weights: (0..count).map(|_| weights()).collect(),
                pages: (0..count).map(|_| pages()).collect(),
            }
        }

        fn steps(&mut self) -> impl Iterator<Item = StepLayer<'_>> {
            let (gain, bias) = (self.gain.as_slice(), self.bias.as_slice());
            self.weights.iter().zip(&mut self.pages).map(move |([qkv, output, gate_up, down], [keys, values])| {
                StepLayer {
                    input_gain: gain,
                    qkv,
                    bias: Some(bias),
                    output,
                    post_gain: gain,
                    gate_up,
                    down,
                    pages: PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() },
                }
            })
        }
    }

    fn memory(device: &Device, layers: usize) -> StepMemory {
        StepMemory::new(device, SMALL, HIDDEN, FFN, layers).unwrap()
    }

    #[test]
    fn the_table_is_uploaded_where_it_changed() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let mut layers = Layers::new(&device, 3);
        let mut memory = memory(&device, 3);
        // What an upload would overwrite.
        let mark = vec![u64::MAX; 3 * LAYER_WORDS];
        let placed = |memory: &mut StepMemory, layers: &mut Layers| -> bool {
            device.upload(&mut memory.table, &mark).unwrap();
            assert_eq!(memory.place(&device, layers.steps()).unwrap(), SMALL.page_elements());
            let found = device.download(&memory.table).unwrap();
            assert!(found == mark || found == memory.layers.as_flattened());
            found != mark
        };
        assert!(placed(&mut memory, &mut layers), "the first time");
        let [_, second, _] = &memory.layers[..] else { panic!("three layers") };
        let address = |weight: &Weight| weight.rows().unwrap().as_slice().address();
        let [qkv, output, gate_up, down] = layers.weights[1].each_ref().map(address);
        let [keys, values] = layers.pages[1].each_ref().map(|buffer| buffer.as_slice().address());
        let (gain, bias) = (layers.gain.as_slice().address(), layers.bias.as_slice().address());
        assert_eq!(*second, [gain, qkv, bias, output, gain, gate_up, down, keys, values]);
        assert!(!placed(&mut memory, &mut layers) && !placed(&mut memory, &mut layers), "nothing changed");

        // Another cache, another bias, another weight; in the first layer, in all, in the last.
        let mut other = Layers::new(&device, 3);
        std::mem::swap(&mut layers.pages[0][1], &mut other.pages[0][1]);
        assert!(placed(&mut memory, &mut layers) && !placed(&mut memory, &mut layers));
        std::mem::swap(&mut layers.bias, &mut other.bias);
        assert!(placed(&mut memory, &mut layers) && !placed(&mut memory, &mut layers));
        std::mem::swap(&mut layers.weights[2], &mut other.weights[2]);
        assert!(placed(&mut memory, &mut layers) && !placed(&mut memory, &mut layers));
    }

    #[test]
    fn a_table_that_was_not_uploaded_is_uploaded_later() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let stranger = Device::cpu(CpuOptions::default()).unwrap();
        let (mut layers, mut other) = (Layers::new(&device, 3), Layers::new(&device, 3));
        let mut memory = memory(&device, 3);
        let holds = |memory: &StepMemory| device.download(&memory.table).unwrap() == memory.layers.as_flattened();

        // The upload fails: at first, and when there is something there.
        for layers in [&mut layers, &mut other] {
            assert!(memory.place(&stranger, layers.steps()).is_err());
            assert!(!holds(&memory));
            memory.place(&device, layers.steps()).unwrap();
            assert!(holds(&memory));
        }

        // Some layers change, then one does not fit, is missing or is one too many.
        for fault in 0..3 {
            let (old, new) = if fault % 2 == 0 { (&mut other, &mut layers) } else { (&mut layers, &mut other) };
            memory.place(&device, old.steps()).unwrap();
            let before = device.download(&memory.table).unwrap();
            let mut more = Layers::new(&device, 1);
            let outcome = match fault {
                0 => {
                    let narrow = device.alloc::<bf16>(HIDDEN / 2, MemoryKind::Other, "test").unwrap();
                    let wrong = |(index, layer)| match index {
                        2 => StepLayer { post_gain: narrow.as_slice(), ..layer },
                        _ => layer,
                    };
                    memory.place(&device, new.steps().enumerate().map(wrong))
                }
                1 => memory.place(&device, new.steps().take(2)),
                _ => memory.place(&device, new.steps().chain(more.steps())),
            };
            assert!(matches!(outcome, Err(DeviceError::InvalidParameter(_))), "{outcome:?}");
            assert_eq!(device.download(&memory.table).unwrap(), before);
            // Those that were held when it failed are not on the device.
            let changed = if fault == 2 { 3 } else { 2 };
            memory.place(&device, new.steps().take(changed).chain(old.steps().skip(changed))).unwrap();
            assert!(holds(&memory));
        }
    }

    #[test]
    fn steps_that_the_kernel_does_not_take_are_refused() {
        let device = Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap();
        let alloc = |len: usize| device.alloc::<bf16>(len, MemoryKind::Other, "test").unwrap();
        let head = device.prepare_weight(alloc(20 * HIDDEN), 20, HIDDEN, true).unwrap();
        let (embedding, final_gain) = (alloc(20 * HIDDEN), alloc(HIDDEN));
        let rope = device.alloc::<f32>(64 * 32, MemoryKind::Other, "test").unwrap();
        let numbers = device.alloc::<u32>(4, MemoryKind::Other, "test").unwrap();
        let mut logits = device.alloc::<f32>(20, MemoryKind::Other, "test").unwrap();
        let mut best = device.alloc::<u64>(device.multiprocessors(), MemoryKind::Other, "test").unwrap();
        let mut chosen = device.alloc::<u32>(1, MemoryKind::Other, "test").unwrap();
        let mut step = |memory: &mut StepMemory, layers: &mut Layers, logits_len: usize, context: usize| {
            let number = |at: usize| numbers.slice(at..=at).unwrap();
            let places = Places { positions: number(1), row_tables: number(2), page_tables: number(3) };
            let ends = StepEnds {
                embedding: embedding.as_slice(),
                norm: Norm { gain: final_gain.as_slice(), eps: 1e-6 },
                head: &head,
                rope_table: rope.as_slice(),
            };
            let outcome = decode_step(
                &device,
                memory,
                &number(0),
                places,
                ends,
                layers.steps(),
                &mut logits.slice_mut(..logits_len).unwrap(),
                &mut best.as_slice_mut(),
                &mut chosen.as_slice_mut(),
                context,
            );
            outcome.unwrap_err().to_string()
        };
        let mut none = Layers::new(&device, 0);
        let mut layers = Layers::new(&device, 2);
        let [mut for_none, mut for_two] = [0, 2].map(|count| memory(&device, count));
        let refused = step(&mut for_none, &mut none, 20, 1);
        assert!(refused.contains("without layers"), "{refused}");
        let refused = step(&mut for_two, &mut layers, 20, 1);
        assert!(refused.contains("not supported on this device"), "{refused}");
        // As if it were.
        for_two.fits = true;
        let refused = step(&mut for_two, &mut none, 20, 1);
        assert!(refused.contains("0 layers, with memory for 2"), "{refused}");
        let refused = step(&mut for_two, &mut layers, 19, 1);
        assert!(refused.contains("buffers of other sizes"), "{refused}");
        assert!(device.is_healthy());
        // On this device it has no words for more spans than one block computes.
        let refused = step(&mut for_two, &mut layers, 20, ALONE * PAGE + 1);
        assert!(refused.contains("a context of 257 tokens"), "{refused}");
        let fault = step(&mut for_two, &mut layers, 20, ALONE * PAGE);
        assert!(fault.contains("decode_step_32"), "{fault}");
    }

    #[test]
    fn words_of_shared_spans_are_apart() {
        for ([query_heads, kv_heads, width], spans) in
            [([14, 2, 64], 512), ([2, 1, 32], 1), ([34, 17, 64], 248), ([5, 1, 32], 77)]
        {
            let shape = shape(HeadShape { query_heads, kv_heads, width }, 64, 64).unwrap();
            let partials = shape.partials(spans);
            let outputs = (query_heads * width) as u32 * spans;
            let parts = [(partials.started, 4 * 16), (partials.statistics, query_heads as u32 * spans * 2)];
            // One behind the other.
            let end = parts.into_iter().chain([(partials.outputs, outputs)]).fold(shape.words().len, |end, part| {
                assert!(part.0 >= end && part.0.is_multiple_of(2), "pairs start evenly");
                part.0 + part.1
            });
            assert_eq!(end, partials.len);
            assert!(partials.started.is_multiple_of(16) && partials.outputs.is_multiple_of(16), "lines");
        }
    }

    #[test]
    fn older_images_have_no_bulk_copies_on_any_gpu() {
        assert_eq!(["sm_90a", "sm_100"].map(has_bulk_copies), [true; 2]);
        assert_eq!(["sm_80", "sm_", "", "90"].map(has_bulk_copies), [false; 4]);
    }

    #[test]
    fn no_step_has_the_tag_of_poison() {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        let mut memory = memory(&device, 3);
        memory.poison(&device).unwrap();
        assert!(device.download(&memory.words).unwrap().iter().all(|&word| word == u64::MAX));
        for next in u32::MAX - 10..=u32::MAX {
            for count in 1..10 {
                memory.tag = next;
                let first = memory.tags(&device, count).unwrap();
                assert!(first > 0 && (first == next || first == 1), "{count} tags from {next} on: {first}");
                assert!(first.checked_add(count - 1).unwrap() < u32::MAX, "{count} tags from {next} on: {first}");
            }
        }
        memory.tag = u32::MAX - 4;
        assert_eq!(memory.tags(&device, 4).unwrap(), u32::MAX - 4, "as late as can be");
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
