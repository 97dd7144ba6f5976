//! A whole decode step as one kernel against the separate operations, bit by bit: logits, token, and what is in the pages.
//!
//! Only a GPU runs the kernel. On the CPU the fused layers of few tokens stand in its place, which have the same bits: so the
//! comparison itself, its cases and the separate operations are tested there.

use std::iter::zip;

use half::bf16;
use host::device::{MemoryKind, Weight, contract};
use host::ops::{
    self, DecodeBlocks, DecodeScratch, HeadShape, Norm, PAGE, Pages, PagesMut, Places, StepEnds, StepLayer, StepMemory,
};
use host::testing::TestRng;

use crate::compare::assert_same;
use crate::rig::{Bits, Guarded, Rig};

const EPS: f32 = 1e-6;

/// A model's sizes.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    layers: usize,
    hidden: usize,
    heads: HeadShape,
    ffn: usize,
    vocab: usize,
    bias: bool,
}

const fn heads(query_heads: usize, kv_heads: usize, width: usize) -> HeadShape {
    HeadShape { query_heads, kv_heads, width }
}

const SMALL: Sizes = Sizes { layers: 2, hidden: 64, heads: heads(2, 1, 32), ffn: 64, vocab: 50, bias: true };

/// Every number of query heads for a KV head from 1 to 7, and the most; one segment of K, two and four in the attention output and in
/// the down projection; fewer groups than multiprocessors and more.
const CASES: [Sizes; 10] = [
    Sizes { layers: 1, hidden: 64, heads: heads(2, 2, 32), ffn: 64, vocab: 333, bias: true },
    Sizes { layers: 2, hidden: 128, heads: heads(2, 1, 64), ffn: 192, vocab: 17, bias: false },
    Sizes { layers: 3, hidden: 192, heads: heads(6, 2, 32), ffn: 320, vocab: 1000, bias: true },
    Sizes { layers: 2, hidden: 256, heads: heads(4, 1, 64), ffn: 2048, vocab: 333, bias: true },
    Sizes { layers: 1, hidden: 320, heads: heads(10, 2, 32), ffn: 2176, vocab: 50, bias: false },
    Sizes { layers: 2, hidden: 128, heads: heads(16, 1, 32), ffn: 128, vocab: 77, bias: true },
    Sizes { layers: 2, hidden: 64, heads: heads(32, 8, 64), ffn: 128, vocab: 333, bias: true },
    Sizes { layers: 1, hidden: 128, heads: heads(34, 17, 64), ffn: 2112, vocab: 100, bias: false },
    Sizes { layers: 2, hidden: 896, heads: heads(12, 2, 64), ffn: 576, vocab: 2049, bias: true },
    Sizes { layers: 3, hidden: 1024, heads: heads(7, 1, 64), ffn: 1216, vocab: 5000, bias: true },
];

/// The first and the last places of pages, and contexts that a warp for each span takes in one turn or not.
const POSITIONS: [usize; 9] = [0, 5, 63, 64, 130, 254, 255, 256, 400];

/// Contexts whose spans are one task for each block or several, and merged in one go or in several: 10, 17, 26, 33, 64, 65 and 130
/// spans.
const LONG_POSITIONS: [usize; 7] = [600, 1087, 1650, 2048, 4095, 4096, 8300];

/// The place behind the last of all.
const MOST_CONTEXT: usize = 8301;

/// Most elements of a context's keys for which long ones are compared too: the time goes into making them.
const MOST_ELEMENTS: usize = 4 << 20;

/// The positions at which a model of these sizes is compared on a GPU.
fn positions(sizes: Sizes) -> Vec<usize> {
    let elements = |position: usize| position * sizes.layers * sizes.heads.kv_heads * sizes.heads.width;
    let long = LONG_POSITIONS.into_iter().filter(|&position| elements(position) <= MOST_ELEMENTS);
    POSITIONS.into_iter().chain(long).collect()
}

fn cases(rig: &Rig) -> Vec<(Sizes, Vec<usize>)> {
    if rig.device.is_cuda() {
        return CASES.map(|sizes| (sizes, positions(sizes))).to_vec();
    }
    let few = CASES.iter().map(|&sizes| (sizes, vec![0, 63, 130]));
    rig.pick(vec![(SMALL, vec![5, 64])], few.chain([(SMALL, vec![0, 64, 255, 400, 1087])]).collect())
}

/// A source of tensors.
struct Source<'a> {
    rng: TestRng,
    /// The tensor that is another one than it would be.
    other: Option<&'a str>,
    /// The names of all.
    names: Vec<String>,
}

impl<'a> Source<'a> {
    fn new(seed: u64, other: Option<&'a str>) -> Self {
        Self { rng: TestRng::new(seed), other, names: Vec::new() }
    }

    fn draw<T: Bits>(&mut self, name: String, values: impl FnOnce(&mut TestRng) -> Vec<T>) -> Vec<T> {
        let mut values = values(&mut self.rng);
        if self.other == Some(name.as_str()) {
            values.iter_mut().for_each(|value| *value = value.wrong());
        }
        self.names.push(name);
        values
    }

    /// A norm's gain, or a bias.
    fn vector(&mut self, rig: &Rig, name: String, len: usize) -> Guarded<bf16> {
        rig.filled(&self.draw(name, |rng| rng.bf16s(len)))
    }

    fn rows(&mut self, name: String, outputs: usize, inputs: usize) -> Vec<bf16> {
        self.draw(name, |rng| {
            rng.bf16s(outputs * inputs).into_iter().map(|value| bf16::from_f32(value.to_f32() * 0.1)).collect()
        })
    }

    fn weight(&mut self, rig: &Rig, name: String, outputs: usize, inputs: usize) -> Weight {
        prepared(rig, &self.rows(name, outputs, inputs), outputs, inputs)
    }
}

fn prepared(rig: &Rig, rows: &[bf16], outputs: usize, inputs: usize) -> Weight {
    let buffer = rig.device.alloc_from(rows, MemoryKind::Weights, "weight").unwrap();
    rig.device.prepare_weight(buffer, outputs, inputs, true).unwrap()
}

struct Layer {
    input_gain: Guarded<bf16>,
    qkv: Weight,
    /// Empty: none.
    bias: Guarded<bf16>,
    output: Weight,
    post_gain: Guarded<bf16>,
    gate_up: Weight,
    down: Weight,
}

struct Model {
    sizes: Sizes,
    embedding: Guarded<bf16>,
    layers: Vec<Layer>,
    final_gain: Guarded<bf16>,
    head: Weight,
    rope_table: Guarded<f32>,
}

/// A token whose embedding is NaN: no logit is a number behind it, and no token is chosen.
const NAN_TOKEN: u32 = 3;

impl Model {
    fn new(rig: &Rig, source: &mut Source<'_>, sizes: Sizes) -> Self {
        let Sizes { layers, hidden, heads, ffn, vocab, bias } = sizes;
        let mut embedding = source.draw("embedding".into(), |rng| rng.bf16s(vocab * hidden));
        embedding[NAN_TOKEN as usize * hidden..][..hidden].fill(bf16::NAN);
        let layers = (0..layers)
            .map(|layer| Layer {
                input_gain: source.vector(rig, format!("input gain {layer}"), hidden),
                qkv: source.weight(rig, format!("qkv {layer}"), heads.qkv_width(), hidden),
                bias: if bias {
                    source.vector(rig, format!("bias {layer}"), heads.qkv_width())
                } else {
                    rig.filled(&[])
                },
                output: source.weight(rig, format!("output {layer}"), hidden, heads.query_width()),
                post_gain: source.vector(rig, format!("post gain {layer}"), hidden),
                gate_up: source.weight(rig, format!("gate and up {layer}"), 2 * ffn, hidden),
                down: source.weight(rig, format!("down {layer}"), hidden, ffn),
            })
            .collect();
        let final_gain = source.vector(rig, "final gain".into(), hidden);
        let mut head = source.rows("head".into(), vocab, hidden);
        // Equal logits: the best are at times two tokens, far from each other or near, of which the first counts.
        head.copy_within(..vocab / 4 * hidden, vocab / 2 * hidden);
        head.copy_within(..hidden, 8 * hidden);
        let head = prepared(rig, &head, vocab, hidden);
        let table = source.draw("rotary table".into(), |rng| rng.f32s(MOST_CONTEXT * heads.width));
        Self { sizes, embedding: rig.filled(&embedding), layers, final_gain, head, rope_table: rig.filled(&table) }
    }
}

/// What is before the token, in shuffled pages; everything else in them is NaN.
struct Context {
    position: usize,
    heads: HeadShape,
    /// Of each layer.
    keys: Vec<Vec<bf16>>,
    /// Of each layer.
    values: Vec<Vec<bf16>>,
    /// The page of the token.
    page: usize,
    positions: Guarded<u32>,
    row_tables: Guarded<u32>,
    page_tables: Guarded<u32>,
}

impl Context {
    fn new(rig: &Rig, source: &mut Source<'_>, sizes: Sizes, position: usize, order: u64) -> Self {
        let HeadShape { kv_heads, width, .. } = sizes.heads;
        let spans = position / PAGE + 1;
        let page_count = spans + 2;
        let mut pages: Vec<u32> = (0..page_count as u32).collect();
        let mut rng = TestRng::new(order);
        for index in (1..page_count).rev() {
            pages.swap(index, rng.below(index as u64 + 1) as usize);
        }
        let mut contents = |name: String, place: &dyn Fn(usize, usize) -> usize| {
            let past = source.draw(name, |rng| rng.bf16s(position * kv_heads * width));
            let mut paged = vec![bf16::NAN; page_count * sizes.heads.page_elements()];
            for (index, value) in past.into_iter().enumerate() {
                let (token, element) = (index / (kv_heads * width), index % (kv_heads * width));
                let page = pages[token / PAGE] as usize * sizes.heads.page_elements();
                paged[page + place(token % PAGE, element)] = value;
            }
            paged
        };
        let layers = 0..sizes.layers;
        let key = |slot, element| key_place(sizes.heads, slot, element);
        let value = |slot, element| value_place(slot, element);
        let keys = layers.clone().map(|layer| contents(format!("keys {layer}"), &key)).collect();
        let values = layers.map(|layer| contents(format!("values {layer}"), &value)).collect();
        // The table does not start at 0.
        let tables: Vec<u32> = [u32::MAX; 3].into_iter().chain(pages[..spans].iter().copied()).collect();
        Self {
            position,
            heads: sizes.heads,
            keys,
            values,
            page: pages[spans - 1] as usize,
            positions: rig.filled(&[position as u32]),
            row_tables: rig.filled(&[3]),
            page_tables: rig.filled(&tables),
        }
    }

    fn places(&self) -> Places<'_> {
        Places {
            positions: self.positions.view(),
            row_tables: self.row_tables.view(),
            page_tables: self.page_tables.view(),
        }
    }

    fn pages(&self, rig: &Rig) -> Cache {
        let filled = |layers: &[Vec<bf16>]| layers.iter().map(|layer| rig.filled(layer)).collect();
        Cache { keys: filled(&self.keys), values: filled(&self.values) }
    }

    /// Panics unless the step has changed the token's own places, all of them, and no others.
    #[track_caller]
    fn check_pages(&self, outcome: &Outcome) {
        let HeadShape { kv_heads, width, .. } = self.heads;
        let start = self.page * self.heads.page_elements();
        let own = |place: &dyn Fn(usize, usize) -> usize| -> Vec<usize> {
            (0..kv_heads * width).map(|element| start + place(self.position % PAGE, element)).collect()
        };
        let keys = own(&|slot, element| key_place(self.heads, slot, element));
        let values = own(&value_place);
        let layers = zip(&self.keys, &outcome.keys).map(|layer| (&keys, layer));
        for (own, (before, after)) in layers.chain(zip(&self.values, &outcome.values).map(|layer| (&values, layer))) {
            let mut without = after.clone();
            for &place in own {
                assert!(after[place].is_finite(), "the token's key or value is not there");
                without[place] = before[place];
            }
            assert_same(&without, before, "the pages beside the token's own places");
        }
    }
}

/// Where in a page's keys \[G, PAGE, D\] an element of a token's \[G, D\] is.
fn key_place(heads: HeadShape, slot: usize, element: usize) -> usize {
    let (head, d) = (element / heads.width, element % heads.width);
    (head * PAGE + slot) * heads.width + d
}

/// Where in a page's values \[G, D, PAGE\] an element of a token's \[G, D\] is.
fn value_place(slot: usize, element: usize) -> usize {
    element * PAGE + slot
}

/// The pages of every layer.
struct Cache {
    keys: Vec<Guarded<bf16>>,
    values: Vec<Guarded<bf16>>,
}

impl Cache {
    fn pages(&self, layer: usize) -> Pages<'_> {
        Pages { keys: self.keys[layer].view(), values: self.values[layer].view() }
    }

    fn pages_mut(&mut self, layer: usize) -> PagesMut<'_> {
        PagesMut { keys: self.keys[layer].view_mut(), values: self.values[layer].view_mut() }
    }
}

/// What a step leaves.
struct Outcome {
    logits: Vec<f32>,
    chosen: u32,
    keys: Vec<Vec<bf16>>,
    values: Vec<Vec<bf16>>,
}

/// Scratch memory of attention.
struct Scratch {
    partials: Guarded<f32>,
    counters: Guarded<u32>,
}

impl Scratch {
    fn new(rig: &Rig, context: &Context) -> Self {
        let spans = context.position / PAGE + 1;
        let partials = rig.unwritten(ops::partials_len(context.heads, 1, spans));
        Self { partials, counters: rig.filled(&vec![0; ops::counters_len(context.heads, 1)]) }
    }
}

fn attention(
    rig: &Rig,
    blocks: DecodeBlocks,
    queries: &Guarded<f32>,
    pages: Pages<'_>,
    context: &Context,
    scratch: &mut Scratch,
    attended: &mut Guarded<bf16>,
) {
    let places = context.places();
    ops::attention_decode(
        &rig.device,
        blocks,
        &queries.view(),
        pages,
        &places.positions,
        &places.row_tables,
        &places.page_tables,
        &mut DecodeScratch { partials: scratch.partials.view_mut(), counters: scratch.counters.view_mut() },
        &mut attended.view_mut(),
        context.heads,
        context.position + 1,
    )
    .unwrap();
}

/// The step by separate operations, linear layers by the tensor-core chain.
fn separate(rig: &Rig, model: &Model, context: &Context, token: u32) -> Outcome {
    let Sizes { hidden, heads, ffn, vocab, .. } = model.sizes;
    let device = &rig.device;
    let mut cache = context.pages(rig);
    let mut scratch = Scratch::new(rig, context);
    let (mut residual, mut normed) = (rig.unwritten::<f32>(hidden), rig.unwritten::<bf16>(hidden));
    let mut qkv = rig.unwritten::<f32>(heads.qkv_width());
    let mut attended = rig.unwritten::<bf16>(heads.query_width());
    let (mut gate_up, mut gated) = (rig.unwritten::<bf16>(2 * ffn), rig.unwritten::<bf16>(ffn));
    let parts_of = |x: &Guarded<bf16>, weight: &Weight| -> Guarded<f32> {
        let mut parts = rig.unwritten(contract::segments(weight.n(), weight.k()) * weight.n());
        let rows = weight.rows().unwrap();
        ops::linear_parts_kernel(device, &x.view(), &rows.as_slice(), &mut parts.view_mut(), weight.k()).unwrap();
        parts
    };

    let id = rig.filled(&[token]);
    ops::embedding(device, &id.view(), &model.embedding.view(), &mut residual.view_mut(), hidden).unwrap();
    for (index, layer) in model.layers.iter().enumerate() {
        let (gain, rows) = (layer.input_gain.view(), layer.qkv.rows().unwrap());
        ops::rms_norm(device, &residual.view(), &gain, &mut normed.view_mut(), EPS).unwrap();
        ops::linear_kernel(device, &normed.view(), &rows.as_slice(), &mut qkv.view_mut(), hidden).unwrap();
        ops::rotary_kv_write(
            device,
            &mut qkv.view_mut(),
            &layer.bias.view(),
            &model.rope_table.view(),
            context.places(),
            &mut cache.pages_mut(index),
            heads,
        )
        .unwrap();
        attention(rig, DecodeBlocks::PerSpan, &qkv, cache.pages(index), context, &mut scratch, &mut attended);
        let parts = parts_of(&attended, &layer.output);
        let (stream, gain) = (&mut residual.view_mut(), layer.post_gain.view());
        ops::residual_norm(device, stream, &parts.view(), &gain, &mut normed.view_mut(), EPS).unwrap();
        let rows = layer.gate_up.rows().unwrap();
        ops::linear_kernel(device, &normed.view(), &rows.as_slice(), &mut gate_up.view_mut(), hidden).unwrap();
        ops::silu_mul(device, &gate_up.view(), &mut gated.view_mut(), ffn).unwrap();
        let parts = parts_of(&gated, &layer.down);
        ops::residual_add(device, &mut residual.view_mut(), &parts.view()).unwrap();
    }
    ops::rms_norm(device, &residual.view(), &model.final_gain.view(), &mut normed.view_mut(), EPS).unwrap();
    let (mut logits, mut chosen) = (rig.unwritten::<f32>(vocab), rig.unwritten::<u32>(1));
    let rows = model.head.rows().unwrap();
    ops::linear_kernel(device, &normed.view(), &rows.as_slice(), &mut logits.view_mut(), hidden).unwrap();
    ops::argmax(device, &logits.view(), &mut chosen.view_mut()).unwrap();
    Outcome {
        logits: rig.download(&logits),
        chosen: rig.download(&chosen)[0],
        keys: cache.keys.iter().map(|keys| rig.download(keys)).collect(),
        values: cache.values.iter().map(|values| rig.download(values)).collect(),
    }
}

/// What else computes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The fused layers of few tokens.
    Few,
    /// One kernel.
    Whole,
}

impl Way {
    /// The kernel whose outputs are logits and pages.
    fn kernels(self, heads: HeadShape, position: usize) -> [&'static str; 2] {
        match (self, heads.width, position / PAGE) {
            (Self::Few, ..) => ["few_logits", "few_qkv"],
            (Self::Whole, 32, 0..4) => ["decode_step_32"; 2],
            (Self::Whole, 32, _) => ["decode_step_long_32"; 2],
            (Self::Whole, _, 0..4) => ["decode_step_64"; 2],
            (Self::Whole, ..) => ["decode_step_long_64"; 2],
        }
    }
}

/// Outputs of a step: NaN, and a token that is in no vocabulary.
struct Outputs {
    logits: Guarded<f32>,
    best: Guarded<u64>,
    chosen: Guarded<u32>,
}

impl Outputs {
    fn new(rig: &Rig, logits: usize) -> Self {
        let best = rig.unwritten(ops::best_len(&rig.device));
        Self { logits: rig.unwritten(logits), best, chosen: rig.filled(&[u32::MAX - 1]) }
    }
}

fn by_few(rig: &Rig, model: &Model, context: &Context, cache: &mut Cache, token: u32, outputs: &mut Outputs) {
    let Sizes { hidden, heads, ffn, .. } = model.sizes;
    let device = &rig.device;
    let mut scratch = Scratch::new(rig, context);
    let mut residual = rig.unwritten::<f32>(hidden);
    let mut queries = rig.unwritten::<f32>(heads.qkv_width());
    let (mut attended, mut gated) = (rig.unwritten::<bf16>(heads.query_width()), rig.unwritten::<bf16>(ffn));
    let id = rig.filled(&[token]);
    ops::embedding(device, &id.view(), &model.embedding.view(), &mut residual.view_mut(), hidden).unwrap();
    for (index, layer) in model.layers.iter().enumerate() {
        let bias = layer.bias.view();
        ops::few_qkv(
            device,
            &residual.view(),
            Norm { gain: layer.input_gain.view(), eps: EPS },
            &layer.qkv,
            (!bias.is_empty()).then_some(&bias),
            &model.rope_table.view(),
            context.places(),
            &mut queries.view_mut(),
            &mut cache.pages_mut(index),
            heads,
        )
        .unwrap();
        attention(rig, DecodeBlocks::PerContext, &queries, cache.pages(index), context, &mut scratch, &mut attended);
        ops::few_residual(device, &attended.view(), &layer.output, &mut residual.view_mut()).unwrap();
        let norm = Norm { gain: layer.post_gain.view(), eps: EPS };
        ops::few_gate_up(device, &residual.view(), norm, &layer.gate_up, &mut gated.view_mut()).unwrap();
        ops::few_residual(device, &gated.view(), &layer.down, &mut residual.view_mut()).unwrap();
    }
    ops::few_logits(
        device,
        &residual.view(),
        Norm { gain: model.final_gain.view(), eps: EPS },
        &model.head,
        &mut outputs.logits.view_mut(),
        &mut outputs.best.view_mut(),
        &mut outputs.chosen.view_mut(),
    )
    .unwrap();
}

fn memory(rig: &Rig, sizes: Sizes) -> StepMemory {
    StepMemory::new(&rig.device, sizes.heads, sizes.hidden, sizes.ffn, sizes.layers).unwrap()
}

fn by_one_kernel(
    rig: &Rig,
    model: &Model,
    context: &Context,
    memory: &mut StepMemory,
    cache: &mut Cache,
    token: u32,
    outputs: &mut Outputs,
) {
    let id = rig.filled(&[token]);
    let ends = StepEnds {
        embedding: model.embedding.view(),
        norm: Norm { gain: model.final_gain.view(), eps: EPS },
        head: &model.head,
        rope_table: model.rope_table.view(),
    };
    let pages = zip(&mut cache.keys, &mut cache.values);
    let layers = zip(&model.layers, pages).map(|(layer, (keys, values))| StepLayer {
        input_gain: layer.input_gain.view(),
        qkv: &layer.qkv,
        bias: Some(layer.bias.view()).filter(|bias| !bias.is_empty()),
        output: &layer.output,
        post_gain: layer.post_gain.view(),
        gate_up: &layer.gate_up,
        down: &layer.down,
        pages: PagesMut { keys: keys.view_mut(), values: values.view_mut() },
    });
    ops::decode_step(
        &rig.device,
        memory,
        &id.view(),
        context.places(),
        ends,
        layers,
        &mut outputs.logits.view_mut(),
        &mut outputs.best.view_mut(),
        &mut outputs.chosen.view_mut(),
        context.position + 1,
    )
    .unwrap();
    // A word for each block, and nothing beside them.
    let best = rig.words(&outputs.best);
    assert!(
        best[rig.device.multiprocessors()..].iter().all(|&word| word == u64::MAX),
        "more than a word for each block"
    );
}

/// Computes a step in another way, and compares what it leaves with the separate operations: logits where they are wanted, the
/// token, the pages.
fn compare(
    rig: &mut Rig,
    way: Way,
    model: &Model,
    context: &Context,
    memory: &mut StepMemory,
    cache: &mut Cache,
    (token, expected, logits): (u32, &Outcome, bool),
) {
    let sizes = model.sizes;
    let mut outputs = Outputs::new(rig, if logits { sizes.vocab } else { 0 });
    match way {
        Way::Few => by_few(rig, model, context, cache, token, &mut outputs),
        Way::Whole => by_one_kernel(rig, model, context, memory, cache, token, &mut outputs),
    }
    let what = format!("{way:?}, {sizes:?}, token {token} at {}", context.position);
    let [head, write] = way.kernels(sizes.heads, context.position);
    assert_same(&rig.read(head, &outputs.chosen), &[expected.chosen], &format!("{what}: the token"));
    if token == NAN_TOKEN {
        // Which NaN it is need not be the same.
        assert_eq!(expected.chosen, u32::MAX);
        return;
    }
    let wanted = if logits { &expected.logits[..] } else { &[] };
    assert_same(&rig.read(head, &outputs.logits), wanted, &format!("{what}: logits"));
    for layer in 0..sizes.layers {
        let found = rig.read(write, &cache.keys[layer]);
        assert_same(&found, &expected.keys[layer], &format!("{what}: keys of layer {layer}"));
        let found = rig.read(write, &cache.values[layer]);
        assert_same(&found, &expected.values[layer], &format!("{what}: values of layer {layer}"));
    }
}

/// The other ways on this device.
fn ways(rig: &Rig) -> Vec<Way> {
    match rig.device.kernel_image() {
        // The only image of the rig's without them.
        Some("sm_80") => {
            println!("decode_step is skipped: the kernels for this GPU are those of sm_80, which has no bulk copies");
            vec![Way::Few]
        }
        Some(_) => vec![Way::Few, Way::Whole],
        None => vec![Way::Few],
    }
}

pub(crate) fn steps(rig: &mut Rig) {
    let ways = ways(rig);
    for (sizes, positions) in cases(rig) {
        let Sizes { layers, hidden, heads, ffn, vocab, .. } = sizes;
        let fits = ops::decode_step_fits(&rig.device, heads, hidden, ffn, layers);
        assert_eq!(fits, ways.contains(&Way::Whole), "{sizes:?}");
        let mut source = Source::new(111, None);
        let model = Model::new(rig, &mut source, sizes);
        // Of all steps, so that each finds the words of those before it.
        let mut used = memory(rig, sizes);
        for &position in &positions {
            let context = Context::new(rig, &mut source, sizes, position, position as u64);
            // A token behind which all is NaN is followed by others: a word that stays is seen. `u32::MAX` is what a step that is
            // computed ahead finds where a row chose nothing.
            let tokens = [NAN_TOKEN, 1, u32::MAX, vocab as u32 - 1];
            let expected = tokens.map(|token| separate(rig, &model, &context, token));
            expected[1..].iter().for_each(|expected| context.check_pages(expected));
            for &way in &ways {
                let mut cache = context.pages(rig);
                for (token, expected) in zip(tokens, &expected) {
                    compare(rig, way, &model, &context, &mut used, &mut cache, (token, expected, true));
                }
                // The last one alone, in fresh memory, and without logits.
                let last = (tokens[3], &expected[3], false);
                compare(rig, way, &model, &context, &mut memory(rig, sizes), &mut context.pages(rig), last);
            }
        }
    }
}

#[test]
fn separate_operations_depend_on_all_that_they_are_given() {
    let rig = Rig::fast();
    let sizes = SMALL;
    let step = |other: Option<&str>, order: u64, token: u32| -> (Outcome, Vec<String>) {
        let mut source = Source::new(112, other);
        let model = Model::new(&rig, &mut source, sizes);
        let context = Context::new(&rig, &mut source, sizes, 70, order);
        let outcome = separate(&rig, &model, &context, token);
        context.check_pages(&outcome);
        assert!(outcome.logits.iter().all(|value| value.is_finite()));
        assert!((outcome.chosen as usize) < sizes.vocab);
        (outcome, source.names)
    };
    let (outcome, names) = step(None, 1, 7);
    let bits = |outcome: &Outcome| -> Vec<u32> { outcome.logits.iter().map(|value| value.to_bits()).collect() };
    assert_eq!(names.len(), 4 + 9 * sizes.layers);
    for name in &names {
        let (other, same) = step(Some(name), 1, 7);
        assert_eq!(names, same);
        assert_ne!(bits(&other), bits(&outcome), "{name} changes nothing");
    }
    assert_ne!(bits(&step(None, 1, 8).0), bits(&outcome), "another token");
    // Where the pages are is of no concern.
    assert_eq!(bits(&step(None, 2, 7).0), bits(&outcome));
}
