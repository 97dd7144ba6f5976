//! Steps in which every row is one new token of its sequence. On a GPU such a step is recorded once for each bucket of rows and
//! contexts and then started as a whole; its layers are fused with their neighbours. None of this changes a bit.

use std::ops::Range;

use half::bf16;

use super::KvCache;
use super::arena::LayerValues;
use super::layout::{PADDING_DRAW, Wanted};
use super::ways::{DecodeWay, Linear, Tiled};
use super::workspace::DRAW_ALIGN;
use super::{Choosing, Model, Step, Workspace};
use crate::device::{DeviceError, LinearBackend, Slice, SliceMut, Weight, contract};
use crate::ops::{
    self, BlockTokens, DecodeBlocks, DecodeScratch, FEW, NO_ROW, Norm, PAGE, PagesMut, Places, QkvBlocks, ROW_WORDS,
    StepEnds, StepLayer, TensorMaps,
};

/// Where a step's tokens come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tokens {
    /// From the step.
    Given,
    /// They are what the step before chose, row by row; the host need not know them yet.
    Chosen,
}

/// What a recording is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Rows, padding included.
    rows: usize,
    way: DecodeWay,
    tiled: Tiled,
    /// Spans of the longest context.
    spans: usize,
    attention: DecodeBlocks,
    wanted: Wanted,
    /// The cache's memory: a recording has its addresses in it.
    cache: u64,
}

impl Bucket {
    /// Where the page tables start among the step's indices: behind its tokens, positions and row tables, and its draws.
    fn page_tables(&self) -> usize {
        if matches!(self.wanted, Wanted::Draws { .. }) { self.draws().end } else { 3 * self.rows }
    }

    /// Where the records of draws are.
    fn draws(&self) -> Range<usize> {
        let start = (3 * self.rows).next_multiple_of(DRAW_ALIGN);
        start..start + self.rows * ROW_WORDS
    }
}

/// Rows of the smallest tile.
const TILE: usize = 16;

/// Most rows for which our own tiles compute the head where logits are wanted.
const HEAD_ROWS: usize = 32;

/// Most rows that warps multiply where warpgroups could: on an H100 steps of 32 rows make 35,900 tokens/s by warps and 36,200 by
/// warpgroups, the same within what is measured, and of 64 rows 61,900 and 70,400 (`benches/results/2026-11-24-h100-large-batches.md`).
const WARP_ROWS: usize = 32;

/// How many recordings are kept. One is about a hundred launches; buckets in use at a time are few.
pub(super) const RECORDINGS: usize = 128;

/// Rows of the bucket that `rows` rows fall into.
pub(super) fn bucket_rows(rows: usize) -> usize {
    match rows {
        0..=FEW => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=128 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

/// Spans of the bucket that contexts of `spans` spans fall into: blocks for spans that are not there hold up the kernels
/// behind, so there are few of them.
fn bucket_spans(spans: usize) -> usize {
    spans.next_multiple_of((spans.next_power_of_two() / 8).max(4))
}

impl Model {
    /// The bucket of a step, if it can be computed as one of these.
    fn bucket(&self, step: &Step<'_>, cache: &KvCache, workspace: &Workspace, wanted: Wanted) -> Option<Bucket> {
        let limits = workspace.limits();
        let count = step.tokens.len();
        let all_wanted = step.logits_rows.iter().copied().eq(0..count as u32);
        if !step.prefills.is_empty() || !all_wanted {
            return None;
        }
        let longest = step.positions.iter().max().map_or(1, |&position| position as usize + 1);
        let (way, tiled) = self.ways.of(self.device(), count, longest.div_ceil(PAGE))?;
        let most_spans = self.context_tokens().div_ceil(PAGE);
        let spans = bucket_spans(longest.div_ceil(PAGE)).min(most_spans.max(4));
        // Rows that a tile lacks would all be read as its last one, by all blocks at once: slower than rows of their own.
        let granule = if way == DecodeWay::Tiles { TILE } else { 1 };
        let padded = if way == DecodeWay::Whole { count } else { bucket_rows(count).next_multiple_of(granule) };
        let rows = padded.min(limits.decode_rows).min(limits.logits_rows);
        let fits = rows >= count && ops::partials_len(self.heads(), rows, spans) <= workspace.arena.scratch_len();
        let total = step.positions.iter().map(|&position| position as usize / PAGE + 1).sum();
        let attention = DecodeBlocks::for_contexts(self.device(), self.heads(), rows, longest.div_ceil(PAGE), total);
        fits.then(|| Bucket { rows, way, tiled, spans, attention, wanted, cache: cache.identity() })
    }

    /// How a step of `rows` single tokens with contexts of up to `context` tokens is computed, where it is not by separate
    /// operations.
    #[must_use]
    pub fn decode_way(&self, rows: usize, context: usize) -> Option<DecodeWay> {
        self.ways.of(self.device(), rows, context.div_ceil(PAGE)).map(|(way, _)| way)
    }

    /// Computes no more steps in this way: the self-test's verdict.
    pub fn give_up(&self, way: DecodeWay) {
        self.ways.give_up(way);
    }

    /// Computes a checked step, where it is one of these. False where it is not.
    pub(super) fn decode(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<bool, DeviceError> {
        let Some(bucket) = self.bucket(step, cache, workspace, Wanted::of(choosing)) else { return Ok(false) };
        let padding = bucket.rows - step.tokens.len();
        let staging = &mut workspace.staging;
        staging.clear();
        for (part, pad) in [(step.tokens, 0), (step.positions, NO_ROW), (step.row_tables, 0)] {
            staging.extend_from_slice(part);
            staging.extend(std::iter::repeat_n(pad, padding));
        }
        if let Choosing::Drawn(draws) = choosing {
            staging.resize(bucket.draws().start, 0);
            let padding = std::iter::repeat_n(&PADDING_DRAW, padding);
            staging.extend(draws.iter().chain(padding).flat_map(|draw| draw.words()));
        }
        staging.extend_from_slice(step.page_tables);
        self.device().upload(workspace.indices.slice_mut(..staging.len())?, staging)?;
        workspace.take_tokens(self.device(), tokens, step.tokens.len())?;

        if bucket.way == DecodeWay::Whole {
            let context = step.positions.first().map_or(1, |&position| position as usize + 1);
            return self.decode_whole(bucket, context, cache, workspace).map(|()| true);
        }
        let mut recording = workspace.recordings.take(&bucket);
        let outcome = self.device().replay(&mut recording, &mut || match bucket.way {
            DecodeWay::Few => self.decode_few(bucket, cache, workspace),
            DecodeWay::Whole | DecodeWay::Tiles | DecodeWay::Recorded => self.decode_many(bucket, cache, workspace),
        });
        workspace.recordings.put(bucket, recording);
        outcome.map(|()| true)
    }

    /// A step of one row in one kernel. There is little to launch, and nothing to record: tags differ from step to step.
    fn decode_whole(
        &self,
        bucket: Bucket,
        context: usize,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<(), DeviceError> {
        let config = self.config();
        let id = workspace.indices.slice(..1)?;
        let places = Places {
            positions: workspace.indices.slice(1..2)?,
            row_tables: workspace.indices.slice(2..3)?,
            page_tables: workspace.indices.slice(bucket.page_tables()..)?,
        };
        let ends = StepEnds {
            embedding: self.parameters.embedding.rows()?.as_slice(),
            norm: Norm { gain: self.parameters.final_norm.as_slice(), eps: config.rms_norm_eps },
            head: self.head(),
            rope_table: self.rope_table.as_slice(),
        };
        let layers = self.parameters.layers.iter().zip(cache.all_pages_mut()).map(|(layer, pages)| StepLayer {
            input_gain: layer.input_norm.as_slice(),
            qkv: &layer.qkv,
            bias: layer.qkv_bias.as_ref().map(|bias| bias.as_slice()),
            output: &layer.output,
            post_gain: layer.post_norm.as_slice(),
            gate_up: &layer.gate_up,
            down: &layer.down,
            pages,
        });
        let wanted = if bucket.wanted == Wanted::Tokens { 0 } else { config.vocab };
        ops::decode_step(
            self.device(),
            &mut workspace.step_memory,
            &id,
            places,
            ends,
            layers,
            &mut workspace.arena.logits(wanted)?.values,
            &mut workspace.best.as_slice_mut(),
            &mut workspace.chosen.slice_mut(..1)?,
            context,
        )?;
        self.draw_bucket(bucket, workspace)
    }

    /// The launches of a step of few rows.
    fn decode_few(&self, bucket: Bucket, cache: &mut KvCache, workspace: &mut Workspace) -> Result<(), DeviceError> {
        let (config, heads, device) = (self.config(), self.heads(), self.device());
        let Bucket { rows, spans, .. } = bucket;
        let tokens = workspace.indices.slice(..rows)?;
        let places = Places {
            positions: workspace.indices.slice(rows..2 * rows)?,
            row_tables: workspace.indices.slice(2 * rows..3 * rows)?,
            page_tables: workspace.indices.slice(bucket.page_tables()..)?,
        };
        let mut residual = workspace.residual.slice_mut(..rows * config.hidden)?;
        let mut qkv = workspace.qkv.slice_mut(..rows * heads.qkv_width())?;
        let mut attended = workspace.attended.slice_mut(..rows * heads.query_width())?;
        let LayerValues { gated, mut scratch, .. } = workspace.arena.layers()?;
        let mut gated = gated.into_slice(..rows * config.ffn)?;
        let eps = config.rms_norm_eps;
        let rope_table = self.rope_table.as_slice();

        ops::embedding(device, &tokens, &self.parameters.embedding.rows()?.as_slice(), &mut residual, config.hidden)?;
        let layers = &self.parameters.layers;
        for (index, layer) in layers.iter().enumerate() {
            let norm = Norm { gain: layer.input_norm.as_slice(), eps };
            let bias = layer.qkv_bias.as_ref().map(|bias| bias.as_slice());
            let (keys, values) = cache.pages_mut(index);
            let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
            ops::few_qkv(
                device,
                &residual.as_slice(),
                norm,
                &layer.qkv,
                bias.as_ref(),
                &rope_table,
                places,
                &mut qkv,
                &mut pages,
                heads,
            )?;
            ops::attention_decode(
                device,
                bucket.attention,
                &qkv.as_slice(),
                cache.pages(index),
                &places.positions,
                &places.row_tables,
                &places.page_tables,
                &mut DecodeScratch { partials: scratch.slice_mut(..)?, counters: workspace.counters.as_slice_mut() },
                &mut attended,
                heads,
                spans * PAGE,
            )?;
            ops::few_residual(device, &attended.as_slice(), &layer.output, &mut residual)?;
            let norm = Norm { gain: layer.post_norm.as_slice(), eps };
            ops::few_gate_up(device, &residual.as_slice(), norm, &layer.gate_up, &mut gated)?;
            ops::few_residual(device, &gated.as_slice(), &layer.down, &mut residual)?;
        }
        let wanted = if bucket.wanted == Wanted::Tokens { 0 } else { rows * config.vocab };
        ops::few_logits(
            device,
            &residual.as_slice(),
            Norm { gain: self.parameters.final_norm.as_slice(), eps },
            self.head(),
            &mut workspace.arena.logits(wanted)?.values,
            &mut workspace.best.slice_mut(..ops::best_len(device))?,
            &mut workspace.chosen.slice_mut(..rows)?,
        )?;
        self.draw_bucket(bucket, workspace)
    }

    /// Draws tokens from logits, where that is wanted.
    fn draw_bucket(&self, bucket: Bucket, workspace: &mut Workspace) -> Result<(), DeviceError> {
        let Wanted::Draws { whole_mass } = bucket.wanted else { return Ok(()) };
        let draws = workspace.indices.slice(bucket.draws())?;
        self.draw(&mut workspace.arena, bucket.rows, draws, whole_mass, &mut workspace.chosen)
    }

    /// The launches of a step of more rows: norms as operations of their own.
    fn decode_many(&self, bucket: Bucket, cache: &mut KvCache, workspace: &mut Workspace) -> Result<(), DeviceError> {
        let (config, heads, device) = (self.config(), self.heads(), self.device());
        let Bucket { rows, spans, tiled, .. } = bucket;
        let tokens = workspace.indices.slice(..rows)?;
        let places = Places {
            positions: workspace.indices.slice(rows..2 * rows)?,
            row_tables: workspace.indices.slice(2 * rows..3 * rows)?,
            page_tables: workspace.indices.slice(bucket.page_tables()..)?,
        };
        let mut residual = workspace.residual.slice_mut(..rows * config.hidden)?;
        let mut normed = workspace.normed.slice_mut(..rows * config.hidden)?;
        let mut qkv = workspace.qkv.slice_mut(..rows * heads.qkv_width())?;
        let mut attended = workspace.attended.slice_mut(..rows * heads.query_width())?;
        let LayerValues { gate_up, gated, mut scratch } = workspace.arena.layers()?;
        let mut gate_up = gate_up.into_slice(..rows * 2 * config.ffn)?;
        let mut gated = gated.into_slice(..rows * config.ffn)?;
        let mut head_normed = workspace.head_normed.slice_mut(..rows * config.hidden)?;
        let maps = workspace.tensor_maps.as_ref().filter(|_| rows > WARP_ROWS);
        let eps = config.rms_norm_eps;
        let rope_table = self.rope_table.as_slice();

        ops::embedding(device, &tokens, &self.parameters.embedding.rows()?.as_slice(), &mut residual, config.hidden)?;
        if let Some(first) = self.parameters.layers.first() {
            ops::rms_norm(device, &residual.as_slice(), &first.input_norm.as_slice(), &mut normed, eps)?;
        }
        for (index, layer) in self.parameters.layers.iter().enumerate() {
            let (keys, values) = cache.pages_mut(index);
            let mut pages = PagesMut { keys: keys.as_slice_mut(), values: values.as_slice_mut() };
            let (x, bias) = (normed.as_slice(), layer.bias()?);
            if tiled.takes(Linear::Qkv) {
                let (weight, qkv, pages) = (&layer.qkv, &mut qkv, &mut pages);
                match maps {
                    Some(maps) => {
                        let at_once = QkvBlocks::Chosen;
                        ops::wgmma_qkv(
                            device,
                            at_once,
                            maps,
                            &x,
                            weight,
                            &bias,
                            &rope_table,
                            places,
                            qkv,
                            pages,
                            heads,
                        )?;
                    }
                    None => {
                        let block = BlockTokens::Chosen;
                        ops::tile_qkv(device, block, &x, weight, &bias, &rope_table, places, qkv, pages, heads)?;
                    }
                }
            } else {
                ops::linear(device, &x, &layer.qkv, &mut qkv)?;
                ops::rotary_kv_write(device, &mut qkv, &bias, &rope_table, places, &mut pages, heads)?;
            }
            ops::attention_decode(
                device,
                bucket.attention,
                &qkv.as_slice(),
                cache.pages(index),
                &places.positions,
                &places.row_tables,
                &places.page_tables,
                &mut DecodeScratch { partials: scratch.slice_mut(..)?, counters: workspace.counters.as_slice_mut() },
                &mut attended,
                heads,
                spans * PAGE,
            )?;
            let output =
                self.to_residual(tiled.takes(Linear::Output), maps, &attended.as_slice(), &layer.output, &mut scratch)?;
            let gain = layer.post_norm.as_slice();
            ops::residual_norm(device, &mut residual, &output, &gain, &mut normed, eps)?;
            let x = normed.as_slice();
            if tiled.takes(Linear::GateUp) {
                let block = BlockTokens::Chosen;
                match maps {
                    Some(maps) => ops::wgmma_gate_up(device, block, maps, &x, &layer.gate_up, &mut gated)?,
                    None => ops::tile_gate_up(device, block, &x, &layer.gate_up, &mut gated)?,
                }
            } else {
                ops::linear(device, &x, &layer.gate_up, &mut gate_up)?;
                ops::silu_mul(device, &gate_up.as_slice(), &mut gated, config.ffn)?;
            }
            let down =
                self.to_residual(tiled.takes(Linear::Down), maps, &gated.as_slice(), &layer.down, &mut scratch)?;
            let (gain, out) = match self.parameters.layers.get(index + 1) {
                Some(next) => (&next.input_norm, &mut normed),
                None => (&self.parameters.final_norm, &mut head_normed),
            };
            ops::residual_norm(device, &mut residual, &down, &gain.as_slice(), out, eps)?;
        }
        let x = head_normed.as_slice();
        let mut chosen = workspace.chosen.slice_mut(..rows)?;
        // Without logits a tile saves their way to memory and back; with them, and many rows, the library is faster.
        let library =
            bucket.wanted != Wanted::Tokens && rows > HEAD_ROWS && device.linear_backend() != LinearBackend::Kernel;
        if tiled.takes(Linear::Head) && !library {
            let wanted = if bucket.wanted == Wanted::Tokens { 0 } else { rows * config.vocab };
            let mut logits = workspace.arena.logits(wanted)?.values;
            let best = &mut workspace.best.as_slice_mut();
            let block = BlockTokens::Chosen;
            match maps {
                Some(maps) => {
                    ops::wgmma_logits(device, block, maps, &x, self.head(), &mut logits, best, &mut chosen)?;
                }
                None => ops::tile_logits(device, block, &x, self.head(), &mut logits, best, &mut chosen)?,
            }
            return self.draw_bucket(bucket, workspace);
        }
        let mut logits = workspace.arena.logits(rows * config.vocab)?.values;
        ops::linear(device, &x, self.head(), &mut logits)?;
        if bucket.wanted == Wanted::Tokens {
            ops::argmax(device, &logits.as_slice(), &mut chosen)?;
        }
        self.draw_bucket(bucket, workspace)
    }

    /// A layer whose output is added to the residual stream, in its parts.
    fn to_residual<'a>(
        &self,
        tiles: bool,
        maps: Option<&TensorMaps>,
        x: &Slice<'_, bf16>,
        weight: &Weight,
        scratch: &'a mut SliceMut<'_, f32>,
    ) -> Result<Slice<'a, f32>, DeviceError> {
        let (device, n, k) = (self.device(), weight.n(), weight.k());
        if !tiles {
            return ops::linear_to_residual(device, x, weight, scratch);
        }
        let segments = contract::segments(n, k);
        let len = segments * (x.len() / k) * n;
        let parts = &mut scratch.slice_mut(..len)?;
        let block = BlockTokens::Chosen;
        match maps {
            Some(maps) => ops::wgmma_parts(device, block, maps, segments, x, weight, parts)?,
            None => ops::tile_parts(device, block, segments, x, weight, parts)?,
        }
        scratch.as_slice().slice(..len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_rows_and_waste_little() {
        for rows in 1..=256 {
            let bucket = bucket_rows(rows);
            assert!(bucket >= rows && bucket_rows(bucket) == bucket, "{rows}: {bucket}");
            assert!(bucket < 2 * rows, "{rows}: {bucket}");
        }
        for spans in 1..2000 {
            let bucket = bucket_spans(spans);
            assert!(bucket >= spans && bucket_spans(bucket) == bucket, "{spans}: {bucket}");
            assert!(bucket < spans + 4 || 4 * bucket < 5 * spans, "{spans}: {bucket}");
        }
    }
}
