//! Steps that are prefills alone, of few enough rows that a GPU would wait for the host to launch them piece by piece. A kind of
//! step that comes again is recorded, for a bucket of rows that it is filled up to, and then started as a whole. None of this
//! changes a bit: rows are independent of how many there are, and those that fill up a bucket belong to no sequence.

use super::decode::{self, Tokens};
use super::layout::{Layout, Wanted};
use super::transformer::Layers;
use super::{Choosing, KvCache, Model, Step, StepLimits, Workspace};
use crate::device::{DeviceError, LinearBackend, Recording};
use crate::ops::{PrefillTiles, TileKind};

/// Rows of the largest step that is recorded: a GPU computes more for longer than the host takes to launch them.
const MOST_ROWS: usize = 1024;

/// Rows of the smallest step whose layers are our own tiles', with what stands behind them, where there are such: on an H100 prefills of
/// 128 tokens take 1.09 ms so, and 1.15 by the library. Fewer rows leave most of a tile empty.
const FUSED_ROWS: usize = 65;

/// How many recordings are kept. One is about 9 launches a layer.
pub(super) const RECORDINGS: usize = 64;

/// What a recording is of: all that its launches depend on but the model and the workspace's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Padding included.
    layout: Layout,
    tile_kind: TileKind,
    /// Rows that a feed-forward layer takes at once.
    feed_rows: usize,
    backend: LinearBackend,
    /// The cache's memory: a recording has its addresses in it.
    cache: u64,
}

/// Rows of the bucket that `rows` rows fall into. Few rows cost their weights' way from memory, many their products: those come
/// in tiles of 128 rows as it is, so that rows up to the next such tile cost little. Each bucket more is a recording more.
fn bucket_rows(rows: usize) -> usize {
    match rows {
        0..=16 => 16,
        17..=32 => 32,
        33..=512 => rows.next_multiple_of(64),
        _ => rows.next_multiple_of(128),
    }
}

/// Tiles of the bucket that `tiles` tiles of up to `tile_rows` of `rows` rows fall into. One prompt from a tile's boundary on has
/// as few as there can be, and gets no more.
fn bucket_tiles(tiles: usize, rows: usize, tile_rows: usize) -> usize {
    let fewest = rows.div_ceil(tile_rows);
    if tiles <= fewest { fewest } else { tiles.next_multiple_of((tiles.next_power_of_two() / 4).max(4)) }
}

impl Layout {
    /// That of the bucket into which a step with this layout falls.
    fn bucket(self, tile_rows: usize, limits: StepLimits) -> Self {
        let rows = bucket_rows(self.rows).min(limits.rows);
        let (logits_rows, wanted) = match self.logits_rows {
            0 => (0, Wanted::Logits),
            wanted => (decode::bucket_rows(wanted).min(limits.logits_rows), self.wanted),
        };
        // The workspace has room for a tile a row.
        let tiles = bucket_tiles(self.tiles, rows, tile_rows).min(limits.rows);
        Self { rows, logits_rows, tiles, wanted }
    }
}

impl Model {
    /// Whether prefills of so many rows are recorded when they come again.
    #[must_use]
    pub fn records_prefill(&self, rows: usize) -> bool {
        self.ways.has_recorded_prefills() && (1..=MOST_ROWS).contains(&rows)
    }

    /// Whether layers of a step of so many rows, prefills among them, are our own tiles' instead of the library's.
    #[must_use]
    pub fn fuses_prefill(&self, rows: usize) -> bool {
        self.layers(rows) == Layers::Fused
    }

    pub(super) fn layers(&self, rows: usize) -> Layers {
        if self.ways.has_fused_prefills() && rows >= FUSED_ROWS { Layers::Fused } else { Layers::Separate }
    }

    /// Computes all prefills by separate operations from now on: the self-test's verdict.
    pub fn give_up_recorded_prefills(&self) {
        self.ways.give_up_recorded_prefills();
    }

    /// Computes a checked step, where it is one of these and has come before. False where it is not.
    pub(super) fn prefill(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<bool, DeviceError> {
        if step.decode_rows > 0 || !self.records_prefill(step.tokens.len()) {
            return Ok(false);
        }
        let tiles = self.tiles(step)?;
        let bucket = self.prefill_bucket(step, choosing, &tiles, cache, workspace);
        let Some(mut recording) = workspace.prefills.take_again(&bucket) else { return Ok(false) };
        let outcome = self.prefill_in(bucket, tiles, &mut recording, step, choosing, cache, workspace, tokens);
        workspace.prefills.put(bucket, recording);
        outcome.map(|()| true)
    }

    /// The bucket of a step of prefills.
    fn prefill_bucket(
        &self,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        tiles: &PrefillTiles,
        cache: &KvCache,
        workspace: &Workspace,
    ) -> Bucket {
        let layout = Layout {
            rows: step.tokens.len(),
            logits_rows: step.logits_rows.len(),
            tiles: tiles.count(),
            wanted: Wanted::of(choosing),
        };
        Bucket {
            layout: layout.bucket(tiles.kind().rows(), workspace.limits()),
            tile_kind: tiles.kind(),
            feed_rows: workspace.feed_rows,
            backend: self.device().linear_backend(),
            cache: cache.identity(),
        }
    }

    /// Computes a step of prefills filled up to its bucket, as it was recorded where the device records.
    fn prefill_in(
        &self,
        bucket: Bucket,
        tiles: PrefillTiles,
        recording: &mut Recording,
        step: &Step<'_>,
        choosing: Choosing<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        tokens: Tokens,
    ) -> Result<(), DeviceError> {
        let layout = bucket.layout;
        let tiles = tiles.filled_up_to(layout.tiles);
        self.give(step, choosing, layout, &tiles, workspace, tokens)?;
        // To the end of the memory: the tables' length is no part of the bucket.
        let tables_end = workspace.indices.len();
        let layers = self.layers(layout.rows);
        let mut launch = || self.launch_step(layout, layers, &tiles, &[], tables_end, cache, workspace);
        self.device().replay(recording, &mut launch)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::device::{CpuOptions, Device};
    use crate::model::{Prefill, StepLimits};
    use crate::ops::{PAGE, ROW_WORDS, RowParameters};
    use crate::testing::TestRng;

    const LIMITS: StepLimits = StepLimits { rows: 256, decode_rows: 1, logits_rows: 12, table_entries: 16 };

    /// Pages of the cache; sequences take them from the last one on.
    const PAGES: usize = 12;

    #[test]
    fn buckets_hold_their_rows_and_waste_little() {
        for rows in 1..=MOST_ROWS {
            let bucket = bucket_rows(rows);
            assert!(bucket >= rows && bucket_rows(bucket) == bucket && bucket <= MOST_ROWS, "{rows}: {bucket}");
            assert!(bucket < rows + 16 || bucket < 2 * rows, "{rows}: {bucket}");
            assert!(bucket < rows + 64 || 4 * bucket < 5 * rows, "{rows}: {bucket}");
        }
        let all: std::collections::BTreeSet<usize> = (1..=MOST_ROWS).map(bucket_rows).collect();
        assert_eq!(all.len(), 14, "{all:?}");
    }

    #[test]
    fn buckets_hold_their_tiles_and_waste_little() {
        for (rows, tile_rows) in [(16_usize, 64), (64, 64), (512, 64), (1024, 128)] {
            let fewest = rows.div_ceil(tile_rows);
            assert_eq!(bucket_tiles(fewest, rows, tile_rows), fewest, "one prompt");
            for tiles in 1..=rows {
                let bucket = bucket_tiles(tiles, rows, tile_rows);
                assert!(bucket >= tiles && bucket_tiles(bucket, rows, tile_rows) == bucket, "{tiles}: {bucket}");
                let little = bucket == fewest || bucket < tiles + 4 || 2 * bucket < 3 * tiles;
                assert!(little, "{tiles} of {rows}: {bucket}");
            }
        }
    }

    /// Every layout's parts follow each other without touching and fit the memory that a workspace has for them.
    #[test]
    fn a_bucket_fits_the_workspace() {
        let mut random = TestRng::new(7);
        let mut below = |end: usize| random.below(end as u64) as usize;
        for _ in 0..20_000 {
            let most = 1 + below(MOST_ROWS + 100);
            let limits = StepLimits { rows: most, decode_rows: 1, logits_rows: 1 + below(most), table_entries: 1 };
            let rows = 1 + below(most.min(MOST_ROWS));
            let wanted = [Wanted::Logits, Wanted::Tokens, Wanted::Draws { whole_mass: false }][below(3)];
            let (logits_rows, tiles) = (below(limits.logits_rows.min(rows) + 1), 1 + below(rows));
            let step = Layout { rows, logits_rows, tiles, wanted };
            let bucket = step.bucket([64, 128][below(2)], limits);
            let holds = bucket.rows >= rows && bucket.logits_rows >= step.logits_rows && bucket.tiles >= step.tiles;
            let fits = bucket.rows <= limits.rows && bucket.logits_rows <= limits.logits_rows;
            assert!(holds && fits && bucket.bucket(64, limits).rows == bucket.rows, "{step:?}: {bucket:?}");
            assert!(step.logits_rows > 0 || bucket.logits_rows == 0, "no head where nobody wants one");
            let draws = bucket.draws();
            assert!(bucket.logits_rows().end <= draws.start && draws.end <= bucket.tiles().start);
            assert!(draws.is_empty() || draws.start.is_multiple_of(4), "records are read in pieces of 16 bytes");
            let room = 3 * limits.rows
                + limits.logits_rows
                + PrefillTiles::numbers_of(limits.rows)
                + limits.logits_rows * ROW_WORDS
                + crate::model::workspace::DRAW_ALIGN;
            assert!(bucket.page_tables() <= room, "{bucket:?} with {limits:?}");
        }
    }

    fn demo(options: CpuOptions) -> Model {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
        Model::load(&Device::cpu(options).unwrap(), &folder, Some(320), &mut |_, _| {}).unwrap()
    }

    /// Rows of a prompt, behind as many tokens of it as are in the cache already.
    #[derive(Clone, Copy)]
    struct Part {
        cached: usize,
        rows: usize,
    }

    /// The numbers of a step.
    #[derive(Default)]
    struct Numbers {
        tokens: Vec<u32>,
        positions: Vec<u32>,
        row_tables: Vec<u32>,
        page_tables: Vec<u32>,
        prefills: Vec<Prefill>,
        logits_rows: Vec<u32>,
    }

    impl Numbers {
        /// The last row of each part has logits.
        fn new(model: &Model, parts: &[Part]) -> Self {
            let (mut numbers, mut pages) = (Self::default(), (0..PAGES as u32).rev());
            for (index, &Part { cached, rows }) in parts.iter().enumerate() {
                let mut random = TestRng::new(index as u64);
                let mut token = || random.below(model.config().vocab as u64) as u32;
                let tokens: Vec<u32> = (0..cached + rows).map(|_| token()).collect();
                let table_len = (cached + rows).div_ceil(PAGE);
                let own: Vec<u32> = pages.by_ref().take(table_len).collect();
                numbers.push(&tokens[cached..], cached, &own);
                numbers.logits_rows.push(numbers.tokens.len() as u32 - 1);
            }
            numbers
        }

        fn push(&mut self, tokens: &[u32], first_position: usize, pages: &[u32]) {
            let (first_row, rows, table_start) = (self.tokens.len(), tokens.len(), self.page_tables.len());
            self.prefills.push(Prefill { first_row, rows, first_position, table_start, table_len: pages.len() });
            self.tokens.extend(tokens);
            self.positions.extend(first_position as u32..(first_position + rows) as u32);
            self.row_tables.resize(first_row + rows, table_start as u32);
            self.page_tables.extend(pages);
        }

        fn step(&self) -> Step<'_> {
            Step {
                tokens: &self.tokens,
                positions: &self.positions,
                row_tables: &self.row_tables,
                page_tables: &self.page_tables,
                decode_rows: 0,
                prefills: &self.prefills,
                logits_rows: &self.logits_rows,
            }
        }
    }

    /// What a step leaves behind: bits of its logits, what it chose, and the bits of every page, of nobody's too.
    #[derive(Debug, PartialEq)]
    struct Left {
        logits: Vec<u32>,
        chosen: Vec<u32>,
        pages: Vec<u16>,
    }

    type Compute<'a> = &'a dyn Fn(&Model, &Step<'_>, &mut KvCache, &mut Workspace);

    /// Computes a step in memory full of NaN, behind what is to be in the cache before it.
    fn left(model: &Model, parts: &[Part], numbers: &Numbers, compute: Compute<'_>) -> Left {
        let device = model.device();
        let (mut cache, mut workspace) = (model.kv_cache(PAGES).unwrap(), model.workspace(LIMITS).unwrap());
        for page in 0..PAGES as u32 {
            cache.poison(device, page).unwrap();
        }
        let before: Vec<Part> = parts.iter().map(|part| Part { cached: 0, rows: part.cached + part.rows }).collect();
        let whole = Numbers::new(model, &before);
        for (part, prefill) in parts.iter().zip(&whole.prefills).filter(|(part, _)| part.cached > 0) {
            let mut numbers = Numbers::default();
            let pages = &whole.page_tables[prefill.table_start..][..prefill.table_len];
            numbers.push(&whole.tokens[prefill.first_row..][..part.cached], 0, pages);
            model.forward_plain(&numbers.step(), &mut cache, &mut workspace).unwrap();
        }
        workspace.poison(device).unwrap();
        let step = numbers.step();
        compute(model, &step, &mut cache, &mut workspace);
        let rows = step.logits_rows.len();
        let logits = device.download(workspace.logits(rows).unwrap()).unwrap();
        assert!(logits.iter().all(|logit| logit.is_finite()));
        let all: Vec<u32> = (0..PAGES as u32).collect();
        Left {
            logits: logits.into_iter().map(f32::to_bits).collect(),
            chosen: device.download(workspace.chosen(rows).unwrap()).unwrap(),
            pages: cache.download(device, &all, PAGES * PAGE).unwrap(),
        }
    }

    fn plain(model: &Model, step: &Step<'_>, cache: &mut KvCache, workspace: &mut Workspace) {
        model.forward_plain(step, cache, workspace).unwrap();
    }

    /// Filled up to its bucket, on a device that records nothing, too.
    fn padded(
        choosing: Choosing<'_>,
        model: &Model,
        step: &Step<'_>,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Layout {
        let tiles = model.tiles(step).unwrap();
        let bucket = model.prefill_bucket(step, choosing, &tiles, cache, workspace);
        let mut recording = Recording::default();
        model.prefill_in(bucket, tiles, &mut recording, step, choosing, cache, workspace, Tokens::Given).unwrap();
        bucket.layout
    }

    const fn prompt(rows: usize) -> Part {
        Part { cached: 0, rows }
    }

    /// Lengths around every boundary, parts of prompts, and several at once.
    #[test]
    fn padding_changes_no_bit_and_touches_no_page() {
        let model = demo(CpuOptions::default());
        let mixed = [prompt(5), Part { cached: 64, rows: 30 }, Part { cached: 70, rows: 65 }, prompt(1), prompt(17)];
        let alone = [1, 2, 15, 16, 17, 33, 63, 64, 65, 130, 200].map(prompt).map(|part| vec![part]);
        let unaligned = vec![Part { cached: 37, rows: 150 }];
        for parts in alone.into_iter().chain([unaligned, mixed.to_vec()]) {
            let numbers = Numbers::new(&model, &parts);
            let expected = left(&model, &parts, &numbers, &plain);
            let found = left(&model, &parts, &numbers, &|model, step, cache, workspace| {
                let layout = padded(Choosing::Caller, model, step, cache, workspace);
                assert_eq!(layout.rows, bucket_rows(step.tokens.len()));
            });
            assert!(found == expected, "{} rows of {} prompts", numbers.tokens.len(), parts.len());
        }
    }

    /// What the test above relies on: another token, and a row of padding that has a place, are both seen.
    #[test]
    fn one_wrong_row_is_seen() {
        let model = demo(CpuOptions::default());
        let parts = [prompt(30)];
        let mut numbers = Numbers::new(&model, &parts);
        let expected = left(&model, &parts, &numbers, &plain);
        numbers.tokens[7] ^= 1;
        let found = left(&model, &parts, &numbers, &plain);
        assert!(found.logits != expected.logits && found.pages != expected.pages);
        numbers.tokens[7] ^= 1;
        numbers.push(&[0], 0, &[0]);
        let found = left(&model, &parts, &numbers, &plain);
        assert!(found.logits == expected.logits && found.pages != expected.pages);
    }

    /// In memory that nobody wrote: nothing reads what padding leaves as it was, and tiles without rows race with nobody. The
    /// exception is attention's output, of which each row of padding takes its own from whatever was there.
    #[test]
    fn checked_mode_finds_nothing_in_padding() {
        let model = demo(CpuOptions { checked: true, ..CpuOptions::default() });
        let (mut cache, mut workspace) = (model.kv_cache(PAGES).unwrap(), model.workspace(LIMITS).unwrap());
        model.device().fill_zero(&mut workspace.attended).unwrap();
        let numbers = Numbers::new(&model, &[2, 1, 2, 1, 3].map(prompt));
        let layout = padded(Choosing::Likeliest, &model, &numbers.step(), &mut cache, &mut workspace);
        assert_eq!((layout.rows, layout.tiles, layout.logits_rows), (16, 8, 8), "of 9, 5 and 5");
        let chosen = model.device().download(workspace.chosen(5).unwrap()).unwrap();
        assert!(chosen.iter().all(|&id| (id as usize) < model.config().vocab), "{chosen:?}");
    }

    #[test]
    fn padding_changes_no_choice() {
        let model = demo(CpuOptions::default());
        let parts = [prompt(40), prompt(3), prompt(20)];
        let numbers = Numbers::new(&model, &parts);
        let draw = |seed, top_p| RowParameters {
            seed,
            position: 9,
            top_k: 0,
            temperature: 1.5,
            top_p,
            min_p: 0.0,
            repetition: 1.0,
            frequency: 0.0,
            presence: 0.0,
        };
        let draws = [draw(1, 1.0), draw(2, 0.9), draw(3, 1.0)];
        for choosing in [Choosing::Likeliest, Choosing::Drawn(&draws)] {
            let expected = left(&model, &parts, &numbers, &|model, step, cache, workspace| {
                model.compute(step, choosing, cache, workspace, Tokens::Given, Layers::Separate).unwrap();
            });
            assert!(expected.chosen.iter().all(|&id| (id as usize) < model.config().vocab), "{:?}", expected.chosen);
            let found = left(&model, &parts, &numbers, &|model, step, cache, workspace| {
                assert_eq!(padded(choosing, model, step, cache, workspace).logits_rows, 4);
            });
            assert_eq!(found.chosen, expected.chosen);
            assert!(found == expected);
        }
    }

    /// The same by the front door, on a CPU that computes as a GPU does: the first time by separate operations, then filled up.
    #[test]
    fn a_step_that_comes_again_is_filled_up() {
        let model = demo(CpuOptions { tensor_cores: true, ..CpuOptions::default() });
        let parts = [prompt(9), Part { cached: 3, rows: 8 }];
        let numbers = Numbers::new(&model, &parts);
        let expected = left(&model, &parts, &numbers, &plain);
        let same = |found: &Left| found.logits == expected.logits && found.pages == expected.pages;

        let found = left(&model, &parts, &numbers, &|model, step, cache, workspace| {
            for kept in [0, 1, 1] {
                model.forward(step, cache, workspace).unwrap();
                assert_eq!(workspace.prefills.len(), kept);
            }
        });
        assert!(same(&found));
        let found = left(&model, &parts, &numbers, &|model, step, cache, workspace| {
            for (feed_rows, kept) in [(4096, 0), (4096, 1), (7, 1), (7, 2)] {
                workspace.feed_at_once(feed_rows);
                model.forward(step, cache, workspace).unwrap();
                assert_eq!(workspace.prefills.len(), kept, "parts are other launches");
            }
        });
        assert!(same(&found));

        // A step of other lengths that falls into the same bucket. Its prompts begin as the others.
        let others = [prompt(11), Part { cached: 4, rows: 7 }];
        let other_numbers = Numbers::new(&model, &others);
        let found = left(&model, &others, &other_numbers, &|model, step, cache, workspace| {
            for step in [&numbers.step(), &numbers.step(), step] {
                model.forward(step, cache, workspace).unwrap();
            }
            assert_eq!(workspace.prefills.len(), 1);
        });
        let other = left(&model, &others, &other_numbers, &plain);
        assert!(found.logits == other.logits && found.pages == other.pages && !same(&found));

        model.give_up_recorded_prefills();
        let found = left(&model, &parts, &numbers, &|model, step, cache, workspace| {
            for _ in 0..3 {
                model.forward(step, cache, workspace).unwrap();
            }
            assert_eq!(workspace.prefills.len(), 0);
        });
        assert!(same(&found));
    }
}
