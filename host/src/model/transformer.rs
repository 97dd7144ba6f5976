//! The transformer: one step of any number of rows, each a token of some sequence.
//!
//! Rounding points, all of them (everything between is f32): the normalised rows; queries, keys and values after bias
//! and rotation; attention probabilities; attention's output; gate and up; their product. The residual stream stays f32.

use std::ops::Range;
use std::path::Path;

use half::bf16;

use super::arena::{Arena, ArenaSizes, LayerValues, Logits};
use super::decode::{Recordings, Tokens};
use super::load::{self, LoadError, Parameters};
use super::ways::Ways;
use super::{Checkpoint, KvCache, ModelConfig};
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, Weight, contract};
use crate::ops::{
    self, DecodeBlocks, DecodeScratch, HeadShape, PAGE, PagesMut, Places, PrefillTiles, ROW_WORDS, RowParameters,
    SampleParams, Segment,
};

/// A model on a device.
#[derive(Debug)]
pub struct Model {
    device: Device,
    config: ModelConfig,
    context_tokens: usize,
    fingerprint: [u8; 32],
    pub(super) parameters: Parameters,
    pub(super) rope_table: Buffer<f32>,
    /// How it computes decode steps.
    pub(super) ways: Ways,
}

/// A linear layer of a model.
#[derive(Clone, Copy, Debug)]
pub struct LinearLayer<'a> {
    /// What it is called.
    pub name: &'static str,
    /// Its weight.
    pub weight: &'a Weight,
    /// The segments of K that the contract gives it.
    pub segments: usize,
}

impl<'a> LinearLayer<'a> {
    fn whole(name: &'static str, weight: &'a Weight) -> Self {
        Self { name, weight, segments: 1 }
    }

    /// One whose output is added to the residual stream.
    fn to_residual(name: &'static str, weight: &'a Weight) -> Self {
        Self { name, weight, segments: contract::segments(weight.n(), weight.k()) }
    }
}

/// Some rows of a step that are consecutive tokens of one sequence, more than one or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// Their first row in the step.
    pub first_row: usize,
    /// How many.
    pub rows: usize,
    /// The first one's position in its sequence.
    pub first_position: usize,
    /// Where their sequence's page table starts in [`Step::page_tables`].
    pub table_start: usize,
    /// Pages in that table.
    pub table_len: usize,
}

impl Prefill {
    fn segment(&self) -> Segment {
        let Self { first_row, rows, first_position, table_start, .. } = *self;
        Segment { first_row, rows, first_position, table_start }
    }
}

/// What a step computes. A row is a token; first the rows that are one new token of a sequence each, then the prefills.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// \[T\] token ids.
    pub tokens: &'a [u32],
    /// \[T\] positions in their sequences.
    pub positions: &'a [u32],
    /// \[T\] where each row's sequence starts in `page_tables`.
    pub row_tables: &'a [u32],
    /// The page tables of all sequences, one after the other.
    pub page_tables: &'a [u32],
    /// Rows that are single tokens: these come first.
    pub decode_rows: usize,
    /// The other rows, in order and without gaps.
    pub prefills: &'a [Prefill],
    /// Rows whose logits are wanted.
    pub logits_rows: &'a [u32],
}

/// Who chooses the tokens of the rows with logits.
#[derive(Clone, Copy, Debug)]
pub enum Choosing<'a> {
    /// Whoever asked for the step: it leaves logits.
    Caller,
    /// The step takes the likeliest token of each row. Where that is faster it writes no logits.
    Likeliest,
    /// The step draws a token of each row, from what the model said of it and these, one for each row.
    Drawn(&'a [RowParameters]),
}

impl Choosing<'_> {
    /// Whether some row is to be drawn by top-p from the whole vocabulary.
    pub(super) fn needs_whole_mass(&self) -> bool {
        matches!(self, Self::Drawn(draws) if draws.iter().any(RowParameters::needs_whole_mass))
    }
}

/// How large a step may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows.
    pub rows: usize,
    /// Rows that are single tokens.
    pub decode_rows: usize,
    /// Rows with logits.
    pub logits_rows: usize,
    /// Entries of all page tables together.
    pub table_entries: usize,
}

/// The memory of a step's intermediate values, allocated once and used again by each step.
#[derive(Debug)]
pub struct Workspace {
    limits: StepLimits,
    vocab: usize,
    /// Tokens, positions, row tables, logits rows, page tables, prefill tiles and draws of a step: one upload.
    pub(super) indices: Buffer<u32>,
    pub(super) staging: Vec<u32>,
    pub(super) residual: Buffer<f32>,
    pub(super) normed: Buffer<bf16>,
    pub(super) qkv: Buffer<f32>,
    pub(super) counters: Buffer<u32>,
    pub(super) attended: Buffer<bf16>,
    /// Gate and up, gated, attention partials, parts of a layer's output; then logits.
    pub(super) arena: Arena,
    /// Rows that a feed-forward layer takes at once.
    feed_rows: usize,
    head_rows: Buffer<f32>,
    pub(super) head_normed: Buffer<bf16>,
    /// The best token that each block of the head found.
    pub(super) best: Buffer<u64>,
    /// The tokens chosen by the step, of the rows with logits.
    pub(super) chosen: Buffer<u32>,
    pub(super) recordings: Recordings,
}

impl Model {
    /// Loads the model in `folder`. It serves contexts of up to `context_tokens` (the model's own maximum where none is
    /// given). `progress(done, total)` is told bytes.
    ///
    /// # Errors
    /// [`LoadError`], whose text names the file or tensor, or the memory that was missing.
    pub fn load(
        device: &Device,
        folder: &Path,
        context_tokens: Option<usize>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let config = ModelConfig::load(folder)?;
        let context_tokens = config.context_tokens(context_tokens)?;
        let checkpoint = Checkpoint::open(folder)?;
        let parameters = load::parameters(device, &config, &checkpoint, progress)?;
        let table = config.rope.table(context_tokens, config.head_width);
        let rope_table = device.alloc_from(table.as_flat(), MemoryKind::Weights, "rotary table")?;
        device.verify_residency()?;
        let heads = HeadShape { query_heads: config.query_heads, kv_heads: config.kv_heads, width: config.head_width };
        Ok(Self {
            device: device.clone(),
            ways: Ways::new(device, heads, &config),
            config,
            context_tokens,
            fingerprint: checkpoint.fingerprint(),
            parameters,
            rope_table,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens of a context, prompt and answer together.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// A digest of its weights.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Its attention heads.
    #[must_use]
    pub fn heads(&self) -> HeadShape {
        HeadShape {
            query_heads: self.config.query_heads,
            kv_heads: self.config.kv_heads,
            width: self.config.head_width,
        }
    }

    /// Every linear layer of the first block, and the head: the shapes whose numeric contract is tested.
    #[must_use]
    pub fn linear_layers(&self) -> Vec<LinearLayer<'_>> {
        let mut layers = Vec::new();
        if let Some(layer) = self.parameters.layers.first() {
            layers.push(LinearLayer::whole("qkv", &layer.qkv));
            layers.push(LinearLayer::to_residual("attention output", &layer.output));
            layers.push(LinearLayer::whole("gate and up", &layer.gate_up));
            layers.push(LinearLayer::to_residual("down", &layer.down));
        }
        layers.push(LinearLayer::whole("head", self.head()));
        layers
    }

    /// A KV cache of `page_count` pages for this model.
    ///
    /// # Errors
    /// No memory.
    pub fn kv_cache(&self, page_count: usize) -> Result<KvCache, DeviceError> {
        KvCache::new(&self.device, self.config.layers, self.heads(), page_count)
    }

    /// A workspace for steps up to `limits`.
    ///
    /// # Errors
    /// No memory, or a limit of 0.
    pub fn workspace(&self, limits: StepLimits) -> Result<Workspace, DeviceError> {
        let (config, heads, device) = (&self.config, self.heads(), &self.device);
        let spans = self.context_tokens.div_ceil(PAGE);
        let partials = |rows| ops::partials_len(heads, rows, spans);
        let bounded_partials = partials(limits.decode_rows).min(PARTIALS.max(partials(1)));
        let tiles = PrefillTiles::max_numbers(limits.rows);
        let draws = limits.logits_rows * ROW_WORDS + DRAW_ALIGN;
        let indices = 3 * limits.rows + limits.logits_rows + limits.table_entries + tiles + draws;
        let counters = ops::counters_len(heads, limits.decode_rows.max(1));
        let segments = |k| contract::segments(config.hidden, k);
        let feed_rows = limits.rows.min(FEED_ROWS.max(limits.decode_rows));
        let part_rows = (segments(heads.query_width()) * limits.rows).max(segments(config.ffn) * feed_rows);
        let activation = |len: usize, label: &str| device.alloc_unwritten::<f32>(len, MemoryKind::Activations, label);
        let operand = |len: usize, label: &str| device.alloc_unwritten::<bf16>(len, MemoryKind::Activations, label);
        Ok(Workspace {
            limits,
            vocab: config.vocab,
            indices: device.alloc_unwritten(indices, MemoryKind::Activations, "step indices")?,
            staging: Vec::with_capacity(indices),
            residual: activation(limits.rows * config.hidden, "residual stream")?,
            normed: operand(limits.rows * config.hidden, "normalised rows")?,
            qkv: activation(limits.rows * heads.qkv_width(), "queries, keys and values")?,
            counters: device.alloc(counters, MemoryKind::Activations, "attention counters")?,
            attended: operand(limits.rows * heads.query_width(), "attention output")?,
            arena: Arena::new(
                device,
                ArenaSizes {
                    gate_up: feed_rows * 2 * config.ffn,
                    gated: feed_rows * config.ffn,
                    scratch: bounded_partials.max(part_rows * config.hidden),
                    logits: limits.logits_rows * config.vocab,
                    spare: ops::spare_for_choosing(device, limits.logits_rows, config.vocab),
                },
            )?,
            feed_rows: FEED_ROWS,
            head_rows: activation(limits.logits_rows * config.hidden, "rows with logits")?,
            head_normed: operand(limits.logits_rows * config.hidden, "normalised rows with logits")?,
            best: device.alloc_unwritten(
                ops::best_len(device).max(ops::tile_best_len(device)),
                MemoryKind::Activations,
                "best tokens",
            )?,
            chosen: device.alloc_unwritten(limits.logits_rows, MemoryKind::Activations, "chosen tokens")?,
            recordings: Recordings::default(),
        })
    }

    pub(super) fn head(&self) -> &Weight {
        self.parameters.head.as_ref().unwrap_or(&self.parameters.embedding)
    }

    /// Computes a step: stores its keys and values in `cache`, and leaves the logits of [`Step::logits_rows`] in
    /// [`Workspace::logits`].
    ///
    /// # Errors
    /// A step beyond the workspace's limits or the vocabulary, or the device's error.
    pub fn forward(&self, step: &Step<'_>, cache: &mut KvCache, workspace: &mut Workspace) -> Result<(), DeviceError> {
        self.forward_choosing(step, Choosing::Caller, cache, workspace)
    }

    /// As [`Self::forward`], but unless the caller chooses, it leaves a token of each of the rows in [`Workspace::chosen`]:
    /// `u32::MAX` where no logit is finite.
    ///
    /// # Errors
    /// As for `forward`; draws that are not as many as the rows.
    pub fn forward_choosing(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<(), DeviceError> {
        self.any(step, choosing, cache, workspace, Tokens::Given)
    }

    /// As [`Self::forward_choosing`], for a step whose tokens are those that the call before has chosen, row by row, whatever
    /// `step.tokens` says: so it can be given to the device before the host knows them.
    ///
    /// # Errors
    /// As for `forward_choosing`.
    pub fn forward_ahead(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<(), DeviceError> {
        self.any(step, choosing, cache, workspace, Tokens::Chosen)
    }

    /// As [`Self::forward`], by separate operations alone: what every other way of computing a step is compared with.
    ///
    /// # Errors
    /// As for `forward_choosing`.
    pub fn forward_plain(
        &self,
        step: &Step<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<(), DeviceError> {
        self.check(step, cache, workspace)?;
        self.compute(step, Choosing::Caller, cache, workspace, Tokens::Given)
    }

    fn any(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<(), DeviceError> {
        self.check(step, cache, workspace)?;
        if let Choosing::Drawn(draws) = choosing
            && draws.len() != step.logits_rows.len()
        {
            let (draws, rows) = (draws.len(), step.logits_rows.len());
            return Err(DeviceError::InvalidParameter(format!("{draws} draws for {rows} rows with logits")));
        }
        if self.decode(step, choosing, cache, workspace, tokens)? {
            return Ok(());
        }
        self.compute(step, choosing, cache, workspace, tokens)
    }

    /// Leaves a token of each of `rows` rows, whose logits are there, in `chosen`; `draws` are their records.
    pub(super) fn draw(
        &self,
        arena: &mut Arena,
        rows: usize,
        draws: Slice<'_, u32>,
        whole_mass: bool,
        chosen: &mut Buffer<u32>,
    ) -> Result<(), DeviceError> {
        let (device, vocab) = (&self.device, self.config.vocab);
        let Logits { values, spare } = arena.logits(rows * vocab)?;
        let scratch = if device.tensor_cores() {
            Some(spare.cast()?.into_slice(..ops::sample_scratch_len(rows, vocab))?)
        } else {
            None
        };
        let params = SampleParams { rows: draws, whole_mass, scratch };
        ops::sample(device, &values.as_slice(), params, &mut chosen.slice_mut(..rows)?)
    }

    /// Any step.
    fn compute(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<(), DeviceError> {
        let (config, heads, device) = (&self.config, self.heads(), &self.device);
        let (rows, hidden, eps) = (step.tokens.len(), config.hidden, config.rms_norm_eps);
        let rope_table = self.rope_table.as_slice();

        let tiles = PrefillTiles::new(device, step.prefills.iter().map(Prefill::segment), heads)?
            .with_wide_warps(self.ways.has_wide_warps());
        workspace.staging.clear();
        for part in
            [step.tokens, step.positions, step.row_tables, step.page_tables, step.logits_rows, &tiles.numbers[..]]
        {
            workspace.staging.extend_from_slice(part);
        }
        let draws_start = workspace.staging.len().next_multiple_of(DRAW_ALIGN);
        if let Choosing::Drawn(draws) = choosing {
            workspace.staging.resize(draws_start, 0);
            workspace.staging.extend(draws.iter().flat_map(|draw| draw.words()));
        }
        device.upload(workspace.indices.slice_mut(..workspace.staging.len())?, &workspace.staging)?;
        workspace.take_tokens(device, tokens, rows)?;
        let Workspace { indices, residual, normed, qkv, counters, attended, arena, feed_rows, .. } = workspace;
        let tokens = indices.slice(..rows)?;
        let tables_end = 3 * rows + step.page_tables.len();
        let places = Places {
            positions: indices.slice(rows..2 * rows)?,
            row_tables: indices.slice(2 * rows..3 * rows)?,
            page_tables: indices.slice(3 * rows..tables_end)?,
        };
        let tiles_start = tables_end + step.logits_rows.len();
        let tile_numbers = indices.slice(tiles_start..tiles_start + tiles.numbers.len())?;

        let mut residual = residual.slice_mut(..rows * hidden)?;
        let mut normed = normed.slice_mut(..rows * hidden)?;
        let mut qkv = qkv.slice_mut(..rows * heads.qkv_width())?;
        let mut attended = attended.slice_mut(..rows * heads.query_width())?;
        let LayerValues { mut gate_up, mut gated, mut scratch } = arena.layers()?;
        let groups = decode_groups(&step.positions[..step.decode_rows], heads, scratch.len());

        let table = self.parameters.embedding.rows()?.as_slice();
        ops::embedding(device, &tokens, &table, &mut residual, hidden)?;
        if let Some(first) = self.parameters.layers.first() {
            ops::rms_norm(device, &residual.as_slice(), &first.input_norm.as_slice(), &mut normed, eps)?;
        }
        for (index, layer) in self.parameters.layers.iter().enumerate() {
            ops::linear(device, &normed.as_slice(), &layer.qkv, &mut qkv)?;
            let (keys, values) = cache.pages_mut(index);
            let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
            ops::rotary_kv_write(device, &mut qkv, &layer.bias()?, &rope_table, places, &mut pages, heads)?;
            let pages = cache.pages(index);
            for Group { rows, longest } in &groups {
                let queries = rows.start * heads.qkv_width()..rows.end * heads.qkv_width();
                // Where steps are recorded, in the one layout that takes contexts of any length: what they choose is compared
                // with it. Elsewhere in the faster one.
                let blocks = match device.tensor_cores() {
                    true => DecodeBlocks::PerSpan,
                    false => {
                        let spans = longest.div_ceil(PAGE);
                        DecodeBlocks::for_contexts(device, heads, spans, rows.len() * spans)
                    }
                };
                ops::attention_decode_in(
                    device,
                    blocks,
                    &qkv.as_slice().slice(queries)?,
                    pages,
                    &places.positions.slice(rows.clone())?,
                    &places.row_tables.slice(rows.clone())?,
                    &places.page_tables,
                    &mut DecodeScratch { partials: scratch.slice_mut(..)?, counters: counters.as_slice_mut() },
                    &mut attended.slice_mut(rows.start * heads.query_width()..rows.end * heads.query_width())?,
                    heads,
                    *longest,
                )?;
            }
            if !step.prefills.is_empty() {
                ops::attention_prefill(
                    device,
                    &qkv.as_slice(),
                    pages,
                    &places.page_tables,
                    &tiles,
                    &tile_numbers,
                    &mut attended,
                    heads,
                )?;
            }
            let output = ops::linear_to_residual(device, &attended.as_slice(), &layer.output, &mut scratch)?;
            let gain = layer.post_norm.as_slice();
            ops::residual_norm(device, &mut residual, &output, &gain, &mut normed, eps)?;
            for part in feed_parts(rows, *feed_rows) {
                let (start, end) = (part.start * hidden, part.end * hidden);
                let mut gate_up = gate_up.slice_mut(..part.len() * 2 * config.ffn)?;
                let mut gated = gated.slice_mut(..part.len() * config.ffn)?;
                let (mut residual, mut normed) = (residual.slice_mut(start..end)?, normed.slice_mut(start..end)?);
                ops::linear(device, &normed.as_slice(), &layer.gate_up, &mut gate_up)?;
                ops::silu_mul(device, &gate_up.as_slice(), &mut gated, config.ffn)?;
                let down = ops::linear_to_residual(device, &gated.as_slice(), &layer.down, &mut scratch)?;
                if let Some(next) = self.parameters.layers.get(index + 1) {
                    let gain = next.input_norm.as_slice();
                    ops::residual_norm(device, &mut residual, &down, &gain, &mut normed, eps)?;
                } else {
                    // Only the rows with logits are normalised after the last layer.
                    ops::residual_add(device, &mut residual, &down)?;
                }
            }
        }

        let wanted = step.logits_rows.len();
        if wanted > 0 {
            let chosen = workspace.indices.slice(tables_end..tables_end + wanted)?;
            let mut rows = workspace.head_rows.slice_mut(..wanted * hidden)?;
            let mut normed = workspace.head_normed.slice_mut(..wanted * hidden)?;
            let mut logits = workspace.arena.logits(wanted * config.vocab)?.values;
            ops::gather_rows(device, &residual.as_slice(), &chosen, &mut rows, hidden)?;
            let final_norm = self.parameters.final_norm.as_slice();
            ops::rms_norm(device, &rows.as_slice(), &final_norm, &mut normed, eps)?;
            ops::linear(device, &normed.as_slice(), self.head(), &mut logits)?;
            match choosing {
                Choosing::Caller => {}
                Choosing::Likeliest => {
                    ops::argmax(device, &logits.as_slice(), &mut workspace.chosen.slice_mut(..wanted)?)?;
                }
                Choosing::Drawn(_) => {
                    let draws = workspace.indices.slice(draws_start..draws_start + wanted * ROW_WORDS)?;
                    let whole_mass = choosing.needs_whole_mass();
                    self.draw(&mut workspace.arena, wanted, draws, whole_mass, &mut workspace.chosen)?;
                }
            }
        }
        Ok(())
    }

    /// An error where a kernel would otherwise fault.
    fn check(&self, step: &Step<'_>, cache: &KvCache, workspace: &Workspace) -> Result<(), DeviceError> {
        let (rows, limits) = (step.tokens.len(), workspace.limits);
        let ordered = step.prefills.iter().try_fold(step.decode_rows, |next, prefill| {
            (prefill.first_row == next && prefill.table_start + prefill.table_len <= step.page_tables.len())
                .then_some(next + prefill.rows)
        });
        let wrong = if rows == 0 || step.positions.len() != rows || step.row_tables.len() != rows {
            Some("tokens, positions and row tables have one length, not 0")
        } else if ordered != Some(rows) {
            Some("decode rows and prefills follow each other without gaps")
        } else if rows > limits.rows
            || step.decode_rows > limits.decode_rows
            || step.logits_rows.len() > limits.logits_rows
            || step.page_tables.len() > limits.table_entries
        {
            Some("the step is inside the workspace's limits")
        } else if step.tokens.iter().any(|&id| id as usize >= self.config.vocab) {
            Some("every token is in the vocabulary")
        } else if step.positions.iter().any(|&position| position as usize >= self.context_tokens) {
            Some("every position is in the context")
        } else if step.page_tables.iter().any(|&page| page as usize >= cache.page_count()) {
            Some("every page is in the cache")
        } else if step
            .row_tables
            .iter()
            .zip(step.positions)
            .any(|(&start, &position)| start as usize + position as usize / PAGE >= step.page_tables.len())
        {
            Some("every row has a page for its position")
        } else if step.logits_rows.iter().any(|&row| row as usize >= rows) {
            Some("logits are of rows of the step")
        } else {
            None
        };
        wrong.map_or(Ok(()), |rule| Err(DeviceError::InvalidParameter(format!("a step must be such that {rule}"))))
    }
}

/// f32 elements of attention partials (64 MiB) that a step has at most, as long as one row needs no more. Hundreds of
/// long contexts would need gigabytes; beyond this they are computed in groups, one after the other.
const PARTIALS: usize = 1 << 24;

/// Rows that a feed-forward layer takes at once: a long prefill goes through it in parts. Between gate, up and down a row has
/// 3 times the feed-forward width in bf16, which parts of about 1024 rows keep in a GPU's second-level cache, at the price of
/// products whose tiles fill a GPU less well. `cargo test --test kernels -- --ignored --nocapture prefill::speed` measures
/// both. At least the longest prefill of a step: not cut. It changes no bit.
const FEED_ROWS: usize = 4096;

/// Rows of a tile of a large product: parts are whole tiles.
const TILE_ROWS: usize = 128;

/// Cuts `rows` rows into parts of about one size of at most `most` rows.
fn feed_parts(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let granule = if most.is_multiple_of(TILE_ROWS) { TILE_ROWS } else { 1 };
    let part = rows.div_ceil(rows.div_ceil(most.max(1)).max(1)).next_multiple_of(granule).max(1);
    (0..rows).step_by(part).map(move |start| start..rows.min(start + part))
}
/// The records of draws start at multiples of so many words, 16 bytes.
pub(super) const DRAW_ALIGN: usize = 4;

/// Single-token rows whose attention is computed at once.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    rows: Range<usize>,
    /// Tokens of the longest context among them.
    longest: usize,
}

/// Cuts rows at `positions` into groups whose partials fit `capacity`. Rows are independent: this changes no bit.
fn decode_groups(positions: &[u32], heads: HeadShape, capacity: usize) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (row, &position) in positions.iter().enumerate() {
        let context = position as usize + 1;
        match groups.last_mut() {
            Some(group)
                if ops::partials_len(heads, group.rows.len() + 1, group.longest.max(context).div_ceil(PAGE))
                    <= capacity =>
            {
                group.rows.end = row + 1;
                group.longest = group.longest.max(context);
            }
            _ => groups.push(Group { rows: row..row + 1, longest: context }),
        }
    }
    groups
}

impl Workspace {
    /// How large a step may be.
    #[must_use]
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// From now on feed-forward layers take at most `rows` rows at once, or as many as there is memory for. It changes no bit;
    /// for tests and measurements.
    pub fn feed_at_once(&mut self, rows: usize) {
        self.feed_rows = rows.clamp(1, FEED_ROWS);
    }

    /// Overwrites every intermediate value with NaN. For tests: whoever reads one before it is written shows it.
    ///
    /// # Errors
    /// The device's error.
    pub fn poison(&mut self, device: &Device) -> Result<(), DeviceError> {
        let Self {
            residual,
            normed,
            qkv,
            attended,
            arena,
            head_rows,
            head_normed,
            best,
            chosen,
            // Uploaded for each step, or left as they were found, or no values.
            limits: _,
            vocab: _,
            feed_rows: _,
            indices: _,
            staging: _,
            recordings: _,
            counters: _,
        } = self;
        arena.poison(device)?;
        for buffer in [residual, qkv, head_rows] {
            let poison = vec![f32::NAN; buffer.len()];
            device.upload(buffer, &poison)?;
        }
        for buffer in [normed, attended, head_normed] {
            let poison = vec![bf16::NAN; buffer.len()];
            device.upload(buffer, &poison)?;
        }
        let poison = vec![u64::MAX; best.len()];
        device.upload(best, &poison)?;
        let poison = vec![u32::MAX; chosen.len()];
        device.upload(chosen, &poison)?;
        Ok(())
    }

    /// Puts the chosen tokens in the place of the step's, where they are wanted.
    pub(super) fn take_tokens(&mut self, device: &Device, tokens: Tokens, rows: usize) -> Result<(), DeviceError> {
        if tokens == Tokens::Given {
            return Ok(());
        }
        device.copy(self.chosen.slice(..rows)?, self.indices.slice_mut(..rows)?)
    }

    /// The tokens \[R\] that the last [`Model::forward_choosing`] with `rows` = R logits rows chose.
    ///
    /// # Errors
    /// More rows than the workspace has.
    pub fn chosen(&self, rows: usize) -> Result<Slice<'_, u32>, DeviceError> {
        self.chosen.slice(..rows)
    }

    /// The logits \[R, V\] of the last step with `rows` = R logits rows.
    ///
    /// # Errors
    /// More rows than the workspace has.
    pub fn logits(&self, rows: usize) -> Result<Slice<'_, f32>, DeviceError> {
        self.arena.written_logits(rows * self.vocab)
    }

    /// As [`Self::logits`], with memory for choosing tokens among them.
    ///
    /// # Errors
    /// As for `logits`.
    pub fn logits_and_spare(&mut self, rows: usize) -> Result<Logits<'_>, DeviceError> {
        self.arena.logits(rows * self.vocab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_row_once_in_order_and_fit() {
        for most in [1, 3, 128, 1000, 1024, 1280, 4096] {
            for rows in (1..300).chain([1024, 1025, 2000, 4095, 4096, 4097, 10_000]) {
                let parts: Vec<_> = feed_parts(rows, most).collect();
                assert!(parts.iter().all(|part| (1..=most).contains(&part.len())), "{rows} by {most}: {parts:?}");
                assert!(parts.len() == rows.div_ceil(most) || most % TILE_ROWS == 0, "{rows} by {most}: {parts:?}");
                let all: Vec<usize> = parts.into_iter().flatten().collect();
                assert!(all.into_iter().eq(0..rows), "{rows} by {most}");
            }
        }
        assert_eq!(feed_parts(4096, 1024).count(), 4);
        assert_eq!(feed_parts(1100, 1024).collect::<Vec<_>>(), [0..640, 640..1100]);
    }

    #[test]
    fn groups_cover_every_row_once_and_fit() {
        let heads = HeadShape { query_heads: 4, kv_heads: 2, width: 64 };
        let one = |spans| ops::partials_len(heads, 1, spans);
        let positions = [0, 63, 64, 500, 1, 2, 127, 128];
        let ranges = |capacity| {
            let groups = decode_groups(&positions, heads, capacity);
            groups.into_iter().map(|group| (group.rows.start, group.rows.end, group.longest)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(8 * one(8)), [(0, 8, 501)]);
        assert_eq!(ranges(8 * one(8) - 1), [(0, 7, 501), (7, 8, 129)]);
        assert_eq!(ranges(one(8)), [(0, 3, 65), (3, 4, 501), (4, 7, 128), (7, 8, 129)]);
        assert_eq!(decode_groups(&[], heads, 1), []);
    }
}
