//! The random choice: Philox against its authors' vectors, the kept tokens at their boundaries, the distribution.

use host::ops::{self, RowParameters, SampleParams};
use host::testing::TestRng;

use crate::compare::{assert_distribution, assert_same};
use crate::logits::{LARGE, ranked};
use crate::rig::Rig;

/// Philox4x32-10, written from the paper: its own copy, so that the kernel's noise has an independent reference.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let high = |a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32;
        let (m0, m1) = (0xD251_1F53, 0xCD9E_8D57);
        counter = [
            high(m1, counter[2]) ^ counter[1] ^ key[0],
            m1.wrapping_mul(counter[2]),
            high(m0, counter[0]) ^ counter[3] ^ key[1],
            m0.wrapping_mul(counter[0]),
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[test]
fn philox_gives_the_published_vectors() {
    // From the known-answer tests of Random123.
    let ones = u32::MAX;
    for (counter, key, expected) in [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ] {
        assert_eq!(philox(counter, key), expected, "the reference");
        assert_eq!(kernels_gpu::philox::philox4x32_10(counter, key), expected, "the kernels' own");
    }
}

/// Gumbel noise of a token in f64: u is uniform in the open unit interval with 23 bits.
fn gumbel(seed: u64, position: u32, id: u32) -> f64 {
    let words = philox([id / 4, position, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let u = (f64::from(words[id as usize % 4] >> 9) + 0.5) / 8_388_608.0;
    -(-u.ln()).ln()
}

/// How a row is sampled.
#[derive(Clone, Copy, Debug)]
struct Filter {
    top_k: u32,
    top_p: f32,
    min_p: f32,
}

const ALL: Filter = Filter { top_k: 0, top_p: 1.0, min_p: 0.0 };

/// The kept tokens by sorting, most likely first; and whether a boundary is too close for f64 and the kernel to be sure
/// to agree.
fn kept(logits: &[f32], filter: Filter) -> (Vec<u32>, bool) {
    let mut order = ranked(logits);
    let logit = |id: u32| f64::from(logits[id as usize]);
    let max = logit(order[0]);
    let mut close = false;
    if filter.top_k > 0 {
        order.truncate(filter.top_k as usize);
    }
    if filter.top_p < 1.0 {
        // Masses are integers, multiples of 2^-40 rounded down: exact where e^x is, off by a rounding elsewhere.
        let mass = |id: u32| ((logit(id) - max).exp() * 2.0_f64.powi(40)).floor();
        let total: f64 = order.iter().map(|&id| mass(id)).sum();
        let wanted = total * f64::from(filter.top_p.max(0.0));
        let flat = order.iter().all(|&id| logit(id) == max || mass(id) == 0.0);
        let (mut sum, mut count) = (0.0, order.len());
        for (index, &id) in order.iter().enumerate() {
            sum += mass(id);
            close |= !flat && (sum - wanted).abs() < total * 1e-6;
            if sum >= wanted {
                count = index + 1;
                break;
            }
        }
        order.truncate(count);
    }
    if filter.min_p > 0.0 {
        let lowest = max + f64::from(filter.min_p).ln();
        close |= order.iter().any(|&id| (logit(id) - lowest).abs() < 1e-4);
        order.retain(|&id| logit(id) >= lowest);
    }
    (order, close)
}

/// The token with the largest logit and noise among `ids`, and by how much it leads.
fn winner(logits: &[f32], ids: &[u32], seed: u64, position: u32) -> (u32, f64) {
    let score = |id: u32| f64::from(logits[id as usize]) + gumbel(seed, position, id);
    let (mut best, mut first, mut second) = (u32::MAX, f64::NEG_INFINITY, f64::NEG_INFINITY);
    for &id in ids {
        let score = score(id);
        if score > first {
            (best, first, second) = (id, score, first);
        } else if score > second {
            second = score;
        }
    }
    (best, first - second)
}

/// No filter, no temperature, no penalty.
pub(crate) const PLAIN: RowParameters = RowParameters {
    seed: 0,
    position: 0,
    top_k: 0,
    temperature: 0.0,
    top_p: 1.0,
    min_p: 0.0,
    repetition: 1.0,
    frequency: 0.0,
    presence: 0.0,
};

/// A row's parameters.
fn parameters(&(seed, position, filter): &(u64, u32, Filter)) -> RowParameters {
    let Filter { top_k, top_p, min_p } = filter;
    RowParameters { seed, position, top_k, top_p, min_p, ..PLAIN }
}

/// Samples rows of one vocabulary.
fn draw(rig: &mut Rig, logits: &[f32], rows: &[(u64, u32, Filter)]) -> Vec<u32> {
    let parameters: Vec<_> = rows.iter().map(parameters).collect();
    draw_with(rig, logits, &parameters)
}

/// Samples rows by one block each, and by passes of many blocks: with the whole mass and without, in as few parts as can be
/// and in more. All must agree.
fn draw_with(rig: &mut Rig, logits: &[f32], parameters: &[RowParameters]) -> Vec<u32> {
    let mut drawn = draw_ways(rig, logits, parameters, &WAYS);
    for (other, way) in drawn.iter().zip(WAYS) {
        assert_same(other, &drawn[0], way.kernel);
    }
    drawn.swap_remove(0)
}

/// A way to sample, under the name of a kernel that it needs.
#[derive(Clone, Copy)]
struct Way {
    kernel: &'static str,
    /// How often as much scratch memory as is needed; 0 is none.
    scratch: usize,
    whole_mass: bool,
}

const WAYS: [Way; 4] = [
    Way { kernel: "sample", scratch: 0, whole_mass: false },
    Way { kernel: "sample_candidates", scratch: 1, whole_mass: false },
    Way { kernel: "sample_masses", scratch: 1, whole_mass: true },
    Way { kernel: "sample_choose", scratch: 2, whole_mass: true },
];

/// What each of the ways draws.
fn draw_ways(rig: &mut Rig, logits: &[f32], parameters: &[RowParameters], ways: &[Way]) -> Vec<Vec<u32>> {
    let (rows, vocab) = (parameters.len(), logits.len() / parameters.len());
    let words: Vec<u32> = parameters.iter().flat_map(|row| row.words()).collect();
    let (logits, words) = (rig.filled(logits), rig.filled(&words));
    let mut drawn = Vec::new();
    for way in ways {
        let len = way.scratch * ops::sample_scratch_len(rows, vocab);
        let mut scratch = (len > 0).then(|| rig.unwritten::<u64>(len));
        let mut ids = rig.unwritten::<u32>(rows);
        let params = SampleParams {
            rows: words.view(),
            whole_mass: way.whole_mass,
            scratch: scratch.as_mut().map(|memory| memory.view_mut()),
        };
        ops::sample(&rig.device, &logits.view(), params, &mut ids.view_mut()).unwrap();
        drawn.push(rig.read(way.kernel, &ids));
    }
    drawn
}

/// Checks that exactly the tokens of the reference are kept. The filters keep a prefix of the ranking, so it is enough to
/// see that its last token is in and the next one is out: by a seed with which the last one wins, and one with
/// which the next one would win if it were kept. And a few seeds as they come.
fn check_filter(rig: &mut Rig, logits: &[f32], filter: Filter) {
    let (ids, close) = kept(logits, filter);
    assert!(!close, "a boundary of {filter:?} is too close to call: choose another case");
    let order = ranked(logits);
    assert_eq!(ids, order[..ids.len()], "the filters keep a prefix");
    let search = |among: &[u32], wanted: u32| {
        (0..20_000_u64)
            .map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5555, 1000 + index as u32 % 7))
            .find(|&(seed, position)| {
                let (id, lead) = winner(logits, among, seed, position);
                id == wanted && lead > 1e-4
            })
            .unwrap_or_else(|| panic!("{filter:?}: no seed lets {wanted} win; choose a flatter case"))
    };
    let mut seeds = vec![search(&ids, *ids.last().unwrap())];
    // Far down the tail it would not win either way.
    let near = |id: u32| logits[id as usize] > logits[order[0] as usize] - 4.0;
    if let Some(&next) = order.get(ids.len()).filter(|&&next| near(next)) {
        let more = &order[..=ids.len()];
        seeds.push(search(more, next));
    }
    seeds.extend([(0, 0), (u64::MAX, u32::MAX), (0x1234_5678_9abc_def0, 77)]);
    seeds.retain(|&(seed, position)| winner(logits, &ids, seed, position).1 > 1e-4);
    let rows: Vec<(u64, u32, Filter)> = seeds.iter().map(|&(seed, position)| (seed, position, filter)).collect();
    let result = draw(rig, &logits.repeat(rows.len()), &rows);
    let expected: Vec<u32> = seeds.iter().map(|&(seed, position)| winner(logits, &ids, seed, position).0).collect();
    assert_same(&result, &expected, &format!("{filter:?} of {} tokens keeps {}", logits.len(), ids.len()));
}

/// Logits of a model's kind: a head of `head` likely tokens at scattered ids, and a tail far below.
fn peaked(vocab: usize, head: usize, spread: f32, seed: u64) -> Vec<f32> {
    let mut rng = TestRng::new(seed);
    let mut logits: Vec<f32> = rng.f32s(vocab).iter().map(|value| value * 3.0 - 9.0).collect();
    for _ in 0..head {
        let id = rng.below(vocab as u64) as usize;
        logits[id] = 10.0 + rng.next_f32() * spread;
    }
    logits
}

pub(crate) fn filters(rig: &mut Rig) {
    let filter = |top_k: u32, top_p: f32, min_p: f32| Filter { top_k, top_p, min_p };
    for &vocab in rig.pick(&[600][..], &[40, 513, 5000]) {
        let head = rig.pick(6, 30);
        let continuous = peaked(vocab, head, 1.0, 71);
        // Levels of a quarter: ties across every boundary.
        let ties: Vec<f32> = continuous.iter().map(|value| (value * 4.0).round() / 4.0).collect();
        // A plateau: masses are exact, so top-p is exact to the token.
        let plateau: Vec<f32> = continuous.iter().map(|&value| if value > 5.0 { 10.0 } else { -30.0 }).collect();
        for logits in [&continuous, &ties, &plateau] {
            let filters = [
                filter(1, 1.0, 0.0),
                filter(4, 1.0, 0.0),
                filter(0, 0.5, 0.0),
                filter(0, 0.731, 0.0),
                filter(0, 1e-9, 0.0),
                filter(5, 0.613, 0.0),
                filter(0, 1.0, 0.523),
                filter(4, 0.9, 0.523),
            ];
            for filter in filters.into_iter().skip(rig.pick(1, 0)).step_by(rig.pick(2, 1)) {
                check_filter(rig, logits, filter);
            }
        }
        // Thousands of equal tokens: top-k cuts through them.
        let flat: Vec<f32> = TestRng::new(72).f32s(vocab).iter().map(|value| (value * 4.0).round()).collect();
        check_filter(rig, &flat, filter(rig.pick(3, 20), 1.0, 0.0));
        check_filter(rig, &flat, filter(rig.pick(5, 20), 0.52, 0.0));
        // More than there are, and everything.
        let (seed, position) = (99, 3);
        let ids = ranked(&continuous);
        let (expected, lead) = winner(&continuous, &ids, seed, position);
        assert!(lead > 1e-4);
        let rows: Vec<_> = [0, vocab as u32, u32::MAX].map(|top_k| (seed, position, filter(top_k, 1.0, 0.0))).to_vec();
        assert_same(&draw(rig, &continuous.repeat(3), &rows), &[expected; 3], "no filter");
    }
}

/// A few filters over a vocabulary of today's models: likely tokens scattered, and side by side.
pub(crate) fn large(rig: &mut Rig) {
    let vocab = rig.pick(600, LARGE);
    let scattered = peaked(vocab, 30, 1.0, 74);
    check_filter(rig, &scattered, Filter { top_k: 20, top_p: 0.9, min_p: 0.0 });
    check_filter(rig, &scattered, Filter { top_p: 0.613, ..ALL });
    // More neighbours than a part has candidates: they do not decide, and the whole row is looked at.
    let mut neighbours = vec![-30.0; vocab];
    for (id, logit) in (vocab - 130..vocab).enumerate().map(|(index, id)| (id, index as f32 * 0.01)) {
        neighbours[id] = logit;
    }
    check_filter(rig, &neighbours, Filter { top_k: 120, ..ALL });
}

/// Odd sizes, rows of every kind side by side, at temperatures: against the reference on logits divided before.
pub(crate) fn shapes(rig: &mut Rig) {
    let small: &[(usize, usize)] = &[(7, 3), (600, 2)];
    let full = &[(7, 64), (513, 3), (1000, 64), (10_241, 3), (LARGE, 1)];
    for &(vocab, rows) in rig.pick(small, full) {
        let most = vocab as u32;
        let kinds = [
            Filter { top_k: 50, top_p: 0.95, min_p: 0.0 },
            ALL,
            Filter { top_k: 1, ..ALL },
            Filter { top_p: 0.9, ..ALL },
            Filter { min_p: 0.07, ..ALL },
            Filter { top_k: most, ..ALL },
            Filter { top_k: most + 1, top_p: 0.5, min_p: 0.2 },
            Filter { top_k: 130, top_p: 0.99, min_p: 0.01 },
            Filter { top_p: 1e-9, ..ALL },
        ];
        let mut rng = TestRng::new(75);
        let (mut logits, mut parameters, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        while parameters.len() < rows {
            let temperature = [0.8, 1.0, 0.35, 2.5][parameters.len() % 4];
            let kind = kinds[parameters.len() % kinds.len()];
            let raw: Vec<f32> = rng.f32s(vocab).iter().map(|value| value * 8.0).collect();
            // Rounding the f64 quotient to f32 is the rounding of the exact one.
            let divided: Vec<f32> =
                raw.iter().map(|&logit| (f64::from(logit) / f64::from(temperature)) as f32).collect();
            let (ids, close) = kept(&divided, kind);
            let (seed, position) = (rng.next_u64(), rng.below(4000) as u32);
            let (id, lead) = winner(&divided, &ids, seed, position);
            if !close && lead > 1e-4 {
                logits.extend(raw);
                parameters.push(RowParameters { temperature, ..self::parameters(&(seed, position, kind)) });
                expected.push(id);
            }
        }
        assert_same(&draw_with(rig, &logits, &parameters), &expected, &format!("{rows} rows of {vocab}"));
    }
}

/// Rows that leave a selection nothing to go by: equal logits, one finite logit, logits that differ in their last bits only.
pub(crate) fn level(rig: &mut Rig) {
    let filter = |top_k: u32, top_p: f32, min_p: f32| Filter { top_k, top_p, min_p };
    let filters = [
        ALL,
        filter(1, 1.0, 0.0),
        filter(50, 0.95, 0.0),
        filter(400, 1.0, 0.0),
        filter(0, 0.5, 0.0),
        filter(0, 1.0, 1.0),
        filter(3, 0.5, 0.5),
    ];
    for &vocab in rig.pick(&[150][..], &[7, 513, 1000, 20_480]) {
        let equal = vec![-1.25_f32; vocab];
        let mut single = vec![f32::NEG_INFINITY; vocab];
        single[vocab * 2 / 3] = -3.0;
        // The same upper bits: all in one place of a histogram of them. Ids fall while logits rise.
        let dense: Vec<f32> =
            (0..vocab as u32).map(|id| f32::from_bits(1.0_f32.to_bits() + vocab as u32 - id)).collect();
        let lowest = vec![f32::MIN; vocab];
        let empty = vec![f32::NEG_INFINITY; vocab];
        for (what, logits) in
            [("equal", equal), ("single", single), ("dense", dense), ("lowest", lowest), ("empty", empty)]
        {
            let mut seed = 0;
            let (mut rows, mut expected) = (Vec::new(), Vec::new());
            for filter in filters {
                let order = ranked(&logits);
                let ids = match order.len() {
                    0 => Vec::new(),
                    // Masses of logits that differ in the last bits are too close for f64: the count alone is exact.
                    _ if what == "dense" && filter.top_p < 1.0 => continue,
                    _ if filter.min_p > 0.0 && filter.top_k == 0 && what == "dense" => vec![order[0]],
                    _ if what == "dense" => order[..filter.top_k.clamp(1, vocab as u32) as usize].to_vec(),
                    _ => kept_level(&order, filter),
                };
                if what == "dense" && filter.top_k == 0 && filter.min_p == 0.0 {
                    continue;
                }
                // A draw that f32 and f64 agree on.
                let (id, _) = loop {
                    seed += 1;
                    let drawn = winner(&logits, &ids, seed, 5);
                    if drawn.1 > 1e-4 || ids.len() < 2 || logits[0] == f32::MIN {
                        break drawn;
                    }
                };
                rows.push((seed, 5, filter));
                expected.push(id);
            }
            let drawn = draw(rig, &logits.repeat(rows.len()), &rows);
            // Noise is lost beside the lowest float: all kept tokens tie, the lowest id is drawn.
            let expected = if what == "lowest" { vec![0; rows.len()] } else { expected };
            assert_same(&drawn, &expected, &format!("{what}, {vocab} tokens"));
        }
    }
}

/// What filters keep of tokens with one logit, in their order.
fn kept_level(order: &[u32], filter: Filter) -> Vec<u32> {
    let first = if filter.top_k == 0 { order.len() } else { order.len().min(filter.top_k as usize) };
    let share = (first as f64 * f64::from(filter.top_p).min(1.0)).ceil() as usize;
    order[..if filter.top_p < 1.0 { share.max(1) } else { first }].to_vec()
}

/// NaN, infinities, degenerate parameters; a low temperature is the greedy choice; rows do not touch each other.
pub(crate) fn edges(rig: &mut Rig) {
    let (nan, low, high) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    let everything = [
        ALL,
        Filter { top_k: 2, ..ALL },
        Filter { top_p: 0.5, ..ALL },
        Filter { min_p: 0.1, ..ALL },
        Filter { top_k: 3, top_p: 0.9, min_p: 0.5 },
        Filter { top_p: 0.0, ..ALL },
        Filter { top_k: 1, top_p: 0.0, min_p: 1.0 },
    ];
    let rows: Vec<_> = everything.iter().map(|&filter| (5, 6, filter)).collect();
    for (logits, id) in [
        ([nan, low, nan, low, low], u32::MAX),
        ([nan, low, 1.0, nan, low], 2),
        ([low, low, low, low, -3e38], 4),
        ([1.0, high, nan, low, 2.0], 1),
        ([-50.0, -49.0, 100.0, 0.0, nan], 2),
    ] {
        let result = draw(rig, &logits.repeat(rows.len()), &rows);
        assert_same(&result, &vec![id; rows.len()], &format!("{logits:?}"));
    }
    // NaN and negative infinity are no candidates: they fill no place of top-k and have no mass.
    let logits = [nan, 1.0, low, 1.0, nan, 1.0, 1.0, low];
    for filter in [Filter { top_k: 2, ..ALL }, Filter { top_p: 0.5, ..ALL }, ALL] {
        check_filter(rig, &logits, filter);
    }

    // Distinct logits over a low temperature: the greedy choice, whatever the noise.
    let vocab = rig.pick(100, 3000);
    let logits: Vec<f32> = (0..vocab).map(|id| ((id * 37) % vocab) as f32 * 0.01).collect();
    let expected = ranked(&logits)[0];
    let rows: Vec<_> =
        (0..rig.pick(3, 40)).map(|seed| RowParameters { temperature: 1e-5, ..parameters(&(seed, 1, ALL)) }).collect();
    let result = draw_with(rig, &logits.repeat(rows.len()), &rows);
    assert_same(&result, &vec![expected; rows.len()], "a low temperature");

    // A row alone gives what it gives in a batch of others.
    let rows: Vec<_> = everything.iter().zip(0..).map(|(&filter, seed)| (seed * 1000 + 1, 8, filter)).collect();
    let logits: Vec<f32> = (0..rows.len() as u64).flat_map(|row| peaked(vocab, 20, 1.0, 80 + row)).collect();
    let batch = draw(rig, &logits, &rows);
    for (row, logits) in logits.chunks(vocab).enumerate() {
        assert_same(&draw(rig, logits, &rows[row..=row]), &batch[row..=row], "a row alone");
        assert!(kept(logits, rows[row].2).0.contains(&batch[row]), "a token that is not kept");
    }
}

/// Draws come with the probabilities of the softmax.
pub(crate) fn distribution(rig: &mut Rig) {
    // That all ways agree is tested elsewhere: here thousands of rows go the way of a GPU.
    let draw = |rig: &mut Rig, logits: &[f32], rows: &[(u64, u32, Filter)]| {
        let parameters: Vec<_> = rows.iter().map(parameters).collect();
        draw_ways(rig, logits, &parameters, &WAYS[2..3]).remove(0)
    };
    let softmax = |logits: &[f32], ids: &[u32]| -> Vec<f64> {
        let weights: Vec<f64> = logits
            .iter()
            .zip(0..)
            .map(|(&logit, id)| if ids.contains(&id) { f64::from(logit).exp() } else { 0.0 })
            .collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    };
    let logits = [0.3_f32, -1.0, 2.0, 1.5, -2.0, 0.0, 2.0, -0.5, f32::NEG_INFINITY, 0.9, 1.1];
    let combined = Filter { top_k: 5, top_p: 0.9, min_p: 0.2 };
    let (few, many) = (rig.pick(30, 600), rig.pick(60, 20_000));
    // Seeds in a row, or positions in a row of one seed.
    for (filter, draws, by_seed) in [
        (ALL, many, true),
        (ALL, few, false),
        (Filter { top_k: 4, ..ALL }, few, true),
        (Filter { top_p: 0.8, ..ALL }, few, true),
        (Filter { min_p: 0.2, ..ALL }, few, false),
        (combined, few, false),
    ] {
        let row = |index: u64| if by_seed { (index, 12, filter) } else { (77, index as u32, filter) };
        let rows: Vec<_> = (0..draws).map(row).collect();
        let mut counts = vec![0; logits.len()];
        for id in draw(rig, &logits.repeat(rows.len()), &rows) {
            counts[id as usize] += 1;
        }
        // Of the rarest tokens a few hundred draws give too few: they count as one class.
        let probabilities = softmax(&logits, &kept(&logits, filter).0);
        let rare = |id: &usize| draws as f64 * probabilities[*id] < 5.0 && probabilities[*id] > 0.0;
        let (rare, common): (Vec<usize>, Vec<usize>) = (0..logits.len()).partition(rare);
        let mut classes: Vec<usize> = common.iter().map(|&id| counts[id]).collect();
        let mut expected: Vec<f64> = common.iter().map(|&id| probabilities[id]).collect();
        let mass: f64 = rare.iter().map(|&id| probabilities[id]).sum();
        if draws as f64 * mass >= 5.0 {
            classes.push(rare.iter().map(|&id| counts[id]).sum());
            expected.push(mass);
        }
        assert_distribution(&classes, &expected);
    }
    if rig.pick(true, false) {
        return;
    }
    // A larger vocabulary, in 40 classes of 125 neighbours; 500 rows a launch.
    let vocab = 5000;
    let logits: Vec<f32> = TestRng::new(73).f32s(vocab).iter().map(|value| value * 2.0).collect();
    let every: Vec<u32> = (0..vocab as u32).collect();
    let probabilities: Vec<f64> = softmax(&logits, &every).chunks(125).map(|class| class.iter().sum()).collect();
    let many = logits.repeat(500);
    let mut counts = vec![0; 40];
    for start in (0..2500).step_by(500) {
        let rows: Vec<_> = (start..start + 500).map(|seed| (seed, 4, ALL)).collect();
        for id in draw(rig, &many, &rows) {
            counts[id as usize / 125] += 1;
        }
    }
    assert_distribution(&counts, &probabilities);
}
