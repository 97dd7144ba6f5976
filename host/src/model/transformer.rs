//! The transformer: one step of any number of rows, each a token of some sequence.
//!
//! Rounding points, all of them (everything between is f32): the normalised rows; queries, keys and values after bias
//! and rotation; attention probabilities; attention's output; gate and up; their product. The residual stream stays f32.

use std::ops::Range;
use std::path::Path;

use half::bf16;

use super::arena::{Arena, LayerValues, Logits};
use super::decode::Tokens;
use super::layout::{Layout, Wanted};
use super::load::{self, LoadError, Parameters};
use super::ways::Ways;
use super::{Checkpoint, Choosing, KvCache, ModelConfig, Prefill, Step, Workspace};
use crate::device::{Buffer, Device, DeviceError, MemoryKind, Slice, SliceMut, Weight, contract};
use crate::ops::{
    self, BlockHeads, BlockOutputs, BlockTokens, DecodeBlocks, DecodeScratch, HeadShape, PAGE, PagesMut, Places,
    PrefillTiles, SampleParams, TensorMaps,
};

/// What computes the layers of a step that is not recorded from single tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layers {
    /// The library, and separate operations behind it.
    Separate,
    /// Our own tiles for many rows, where there are such, with what stands behind them.
    Fused,
}

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
        step.check(self, cache, workspace.limits())?;
        self.compute(step, Choosing::Caller, cache, workspace, Tokens::Given, Layers::Separate)
    }

    fn any(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<(), DeviceError> {
        step.check(self, cache, workspace.limits())?;
        if let Choosing::Drawn(draws) = choosing
            && draws.len() != step.logits_rows.len()
        {
            let (draws, rows) = (draws.len(), step.logits_rows.len());
            return Err(DeviceError::InvalidParameter(format!("{draws} draws for {rows} rows with logits")));
        }
        if self.decode(step, choosing, cache, workspace, tokens)?
            || self.prefill(step, choosing, cache, workspace, tokens)?
        {
            return Ok(());
        }
        self.compute(step, choosing, cache, workspace, tokens, self.layers(step.tokens.len()))
    }

    /// Whether the head's own kernel finds the likeliest tokens of a step whose logits nobody wants.
    fn finds_best(&self, layout: Layout) -> bool {
        layout.wanted == Wanted::Tokens && layout.logits_rows <= BEST_ROWS && self.ways.has_tiles()
    }

    /// Adds a layer's output to the residual stream and, where there is a gain, normalises what comes of it.
    fn add_and_normalise(
        &self,
        maps: Option<&TensorMaps>,
        x: &Slice<'_, bf16>,
        weight: &Weight,
        scratch: &mut SliceMut<'_, f32>,
        residual: &mut SliceMut<'_, f32>,
        gain: Option<Slice<'_, bf16>>,
        normed: &mut SliceMut<'_, bf16>,
    ) -> Result<(), DeviceError> {
        let (device, eps) = (&self.device, self.config.rms_norm_eps);
        let (n, k) = (weight.n(), weight.k());
        if let Some(maps) = maps.filter(|_| ops::wgmma_long_residual_pays(device, x.len() / k, n)) {
            let (block, segments) = (BlockOutputs::Chosen, contract::segments(n, k));
            ops::wgmma_long_residual(device, block, maps, segments, x, weight, residual)?;
            return match gain {
                Some(gain) => ops::rms_norm(device, &residual.as_slice(), &gain, normed, eps),
                None => Ok(()),
            };
        }
        let output = ops::linear_to_residual(device, x, weight, scratch)?;
        match gain {
            Some(gain) => ops::residual_norm(device, residual, &output, &gain, normed, eps),
            None => ops::residual_add(device, residual, &output),
        }
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

    /// Any step, launched piece by piece and without padding.
    pub(super) fn compute(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
        layers: Layers,
    ) -> Result<(), DeviceError> {
        let tiles = self.tiles(step)?;
        let layout = Layout {
            rows: step.tokens.len(),
            logits_rows: step.logits_rows.len(),
            tiles: tiles.count(),
            wanted: Wanted::of(choosing),
        };
        self.give(step, choosing, layout, &tiles, workspace, tokens)?;
        let groups = decode_groups(&step.positions[..step.decode_rows], self.heads(), workspace.arena.scratch_len());
        let tables_end = layout.page_tables() + step.page_tables.len();
        self.launch_step(layout, layers, &tiles, &groups, tables_end, cache, workspace)
    }

    /// The tiles of a step's prefills.
    pub(super) fn tiles(&self, step: &Step<'_>) -> Result<PrefillTiles, DeviceError> {
        let segments = step.prefills.iter().map(Prefill::segment);
        let tiles = PrefillTiles::new(&self.device, segments, self.heads())?;
        Ok(tiles.with_wide_warps(self.ways.has_wide_warps()))
    }

    /// Uploads a step's numbers to where `layout` has them, and puts chosen tokens among them.
    pub(super) fn give(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        layout: Layout,
        tiles: &PrefillTiles,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<(), DeviceError> {
        let staging = &mut workspace.staging;
        layout.stage(step, choosing, tiles, staging);
        self.device.upload(workspace.indices.slice_mut(..staging.len())?, staging)?;
        workspace.take_tokens(&self.device, tokens, step.tokens.len())
    }

    /// The launches of a step whose numbers are there: `groups` are its single tokens, `tiles` its prefills, and its page tables
    /// are before `tables_end`. What is launched, and over which memory, follows from these, the workspace and the cache.
    pub(super) fn launch_step(
        &self,
        layout: Layout,
        layers: Layers,
        tiles: &PrefillTiles,
        groups: &[Group],
        tables_end: usize,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<(), DeviceError> {
        let (config, heads, device) = (&self.config, self.heads(), &self.device);
        let (rows, hidden, eps) = (layout.rows, config.hidden, config.rms_norm_eps);
        let rope_table = self.rope_table.as_slice();
        let Workspace { indices, residual, normed, qkv, counters, attended, arena, feed_rows, tensor_maps, .. } =
            workspace;
        let maps = tensor_maps.as_ref().filter(|_| layers == Layers::Fused);
        let tokens = indices.slice(..rows)?;
        let places = Places {
            positions: indices.slice(rows..2 * rows)?,
            row_tables: indices.slice(2 * rows..3 * rows)?,
            page_tables: indices.slice(layout.page_tables()..tables_end)?,
        };
        let tile_numbers = indices.slice(layout.tiles())?;

        let mut residual = residual.slice_mut(..rows * hidden)?;
        let mut normed = normed.slice_mut(..rows * hidden)?;
        let mut qkv = qkv.slice_mut(..rows * heads.qkv_width())?;
        let mut attended = attended.slice_mut(..rows * heads.query_width())?;
        let LayerValues { mut gate_up, mut gated, mut scratch } = arena.layers()?;

        let table = self.parameters.embedding.rows()?.as_slice();
        ops::embedding(device, &tokens, &table, &mut residual, hidden)?;
        if let Some(first) = self.parameters.layers.first() {
            ops::rms_norm(device, &residual.as_slice(), &first.input_norm.as_slice(), &mut normed, eps)?;
        }
        for (index, layer) in self.parameters.layers.iter().enumerate() {
            let (bias, (keys, values)) = (layer.bias()?, cache.pages_mut(index));
            let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
            let (x, weight) = (normed.as_slice(), &layer.qkv);
            if let Some(maps) = maps.filter(|_| ops::wgmma_long_qkv_fits(heads)) {
                let (block, pages) = (BlockHeads::Chosen, &mut pages);
                ops::wgmma_long_qkv(
                    device,
                    block,
                    maps,
                    &x,
                    weight,
                    &bias,
                    &rope_table,
                    places,
                    &mut qkv,
                    pages,
                    heads,
                )?;
            } else {
                ops::linear(device, &x, weight, &mut qkv)?;
                ops::rotary_kv_write(device, &mut qkv, &bias, &rope_table, places, &mut pages, heads)?;
            }
            let pages = cache.pages(index);
            for Group { rows, longest } in groups {
                let queries = rows.start * heads.qkv_width()..rows.end * heads.qkv_width();
                // Where steps are recorded, in the one layout that takes contexts of any length: what they choose is compared
                // with it. Elsewhere in the faster one.
                let blocks = match device.tensor_cores() {
                    true => DecodeBlocks::PerSpan,
                    false => {
                        let spans = longest.div_ceil(PAGE);
                        DecodeBlocks::for_contexts(device, heads, rows.len(), spans, rows.len() * spans)
                    }
                };
                ops::attention_decode(
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
            if tiles.count() > 0 {
                ops::attention_prefill(
                    device,
                    &qkv.as_slice(),
                    pages,
                    cache.maps(),
                    &places.page_tables,
                    tiles,
                    &tile_numbers,
                    &mut attended,
                    heads,
                )?;
            }
            let gain = Some(layer.post_norm.as_slice());
            let attended = attended.as_slice();
            self.add_and_normalise(maps, &attended, &layer.output, &mut scratch, &mut residual, gain, &mut normed)?;
            for part in feed_parts(rows, *feed_rows) {
                let (start, end) = (part.start * hidden, part.end * hidden);
                let mut gated = gated.slice_mut(..part.len() * config.ffn)?;
                if let Some(maps) = maps {
                    let block = BlockOutputs::Chosen;
                    ops::wgmma_long_gate_up(device, block, maps, &normed.as_slice(), part, &layer.gate_up, &mut gated)?;
                } else {
                    let mut gate_up = gate_up.slice_mut(..part.len() * 2 * config.ffn)?;
                    ops::linear(device, &normed.as_slice().slice(start..end)?, &layer.gate_up, &mut gate_up)?;
                    ops::silu_mul(device, &gate_up.as_slice(), &mut gated, config.ffn)?;
                }
                let (mut residual, mut normed) = (residual.slice_mut(start..end)?, normed.slice_mut(start..end)?);
                // Only the rows with logits are normalised after the last layer.
                let gain = self.parameters.layers.get(index + 1).map(|next| next.input_norm.as_slice());
                let gated = gated.as_slice();
                self.add_and_normalise(maps, &gated, &layer.down, &mut scratch, &mut residual, gain, &mut normed)?;
            }
        }

        let wanted = layout.logits_rows;
        if wanted > 0 {
            let chosen = workspace.indices.slice(layout.logits_rows())?;
            let mut rows = workspace.head_rows.slice_mut(..wanted * hidden)?;
            let mut normed = workspace.head_normed.slice_mut(..wanted * hidden)?;
            ops::gather_rows(device, &residual.as_slice(), &chosen, &mut rows, hidden)?;
            let final_norm = self.parameters.final_norm.as_slice();
            ops::rms_norm(device, &rows.as_slice(), &final_norm, &mut normed, eps)?;
            let normed = normed.as_slice();
            // Logits that nobody wants need not be written, and the best of them is found while they are computed.
            if let Some(maps) = tensor_maps.as_ref().filter(|_| self.finds_best(layout)) {
                let (best, mut none) = (&mut workspace.best.as_slice_mut(), workspace.arena.logits(0)?.values);
                let (block, mut chosen) = (BlockTokens::Chosen, workspace.chosen.slice_mut(..wanted)?);
                return ops::wgmma_logits(device, block, maps, &normed, self.head(), &mut none, best, &mut chosen);
            }
            let mut logits = workspace.arena.logits(wanted * config.vocab)?.values;
            ops::linear(device, &normed, self.head(), &mut logits)?;
            match layout.wanted {
                Wanted::Logits => {}
                Wanted::Tokens => {
                    ops::argmax(device, &logits.as_slice(), &mut workspace.chosen.slice_mut(..wanted)?)?;
                }
                Wanted::Draws { whole_mass } => {
                    let draws = workspace.indices.slice(layout.draws())?;
                    self.draw(&mut workspace.arena, wanted, draws, whole_mass, &mut workspace.chosen)?;
                }
            }
        }
        Ok(())
    }
}

/// Most rows whose likeliest tokens the head finds by itself: those of a block of tokens. With one row an argmax behind the library's
/// head takes 26 us on an H100.
const BEST_ROWS: usize = 64;

/// Rows of a tile of a large product: parts are whole tiles.
const TILE_ROWS: usize = 128;

/// Cuts `rows` rows into parts of about one size of at most `most` rows.
fn feed_parts(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let granule = if most.is_multiple_of(TILE_ROWS) { TILE_ROWS } else { 1 };
    let part = rows.div_ceil(rows.div_ceil(most.max(1)).max(1)).next_multiple_of(granule).max(1);
    (0..rows).step_by(part).map(move |start| start..rows.min(start + part))
}
/// Single-token rows whose attention is computed at once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Group {
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
