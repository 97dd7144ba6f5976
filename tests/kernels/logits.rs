//! Penalties, the greedy choice, log-probabilities.

use host::ops::{self, LogProbs, RowParameters};
use host::testing::{TestRng, Tolerance, assert_close};

use crate::compare::assert_same;
use crate::rig::Rig;

/// A vocabulary of today's models.
pub(crate) const LARGE: usize = 151_936;

/// The ids by falling logit, ties by rising id, without NaN and negative infinity: by sorting.
pub(crate) fn ranked(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|&id| logits[id as usize] > f32::NEG_INFINITY).collect();
    // A stable sort keeps the lower of two equal ids first; 0.0 and -0.0 are equal.
    ids.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap());
    ids
}

pub(crate) fn penalties(rig: &mut Rig) {
    for &(rows, vocab, entries) in rig.pick(&[(2, 50, 20)][..], &[(1, 10, 1), (3, 300, 129), (4, LARGE, 2000)]) {
        let mut rng = TestRng::new(62);
        let logits: Vec<f32> = rng.f32s(rows * vocab).iter().map(|value| value * 20.0).collect();
        let (mut entry_rows, mut tokens, mut counts, mut biases) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        // A step that shares no factor with the sizes lists no element twice.
        for index in (0..rows * vocab).step_by((rows * vocab / entries).max(1)).take(entries) {
            entry_rows.push((index / vocab) as u32);
            tokens.push((index % vocab) as u32);
            counts.push([1, 0, 3, 200][rng.below(4) as usize]);
            biases.push([0.0, -100.0, 2.5][rng.below(3) as usize]);
        }
        let entries = entry_rows.len();
        let repetition: Vec<f32> = (0..rows).map(|row| [1.3, 1.0, 0.5, 1.05][row]).collect();
        let frequency: Vec<f32> = (0..rows).map(|row| [0.2, -1.5, 0.0, 2.0][row]).collect();
        let presence: Vec<f32> = (0..rows).map(|row| [0.6, 0.0, -2.0, 1.1][row]).collect();
        let mut out = rig.filled(&logits);
        let words: Vec<u32> = (0..entries)
            .flat_map(|entry| [entry_rows[entry], tokens[entry], counts[entry], f32::to_bits(biases[entry])])
            .collect();
        let parameters: Vec<u32> = (0..rows)
            .flat_map(|row| {
                let (repetition, frequency, presence) = (repetition[row], frequency[row], presence[row]);
                RowParameters { repetition, frequency, presence, ..crate::sample::PLAIN }.words()
            })
            .collect();
        let (words, parameters) = (rig.filled(&words), rig.filled(&parameters));
        ops::penalties(&rig.device, &mut out.view_mut(), &words.view(), &parameters.view()).unwrap();
        let result = rig.read("penalties", &out);
        let (mut expected, mut touched) = (logits.clone(), vec![false; logits.len()]);
        for entry in 0..entries {
            let (row, count) = (entry_rows[entry] as usize, f64::from(counts[entry]));
            let index = row * vocab + tokens[entry] as usize;
            let mut logit = f64::from(logits[index]);
            if count > 0.0 {
                let penalty = f64::from(repetition[row]);
                logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
                logit -= count * f64::from(frequency[row]) + f64::from(presence[row]);
            }
            expected[index] = (logit + f64::from(biases[entry])) as f32;
            touched[index] = true;
        }
        // Numbers up to 400 in size, a few roundings.
        assert_close(&result, &expected, Tolerance { absolute: 1e-4, relative: 0.0 });
        for index in (0..logits.len()).filter(|&index| !touched[index]) {
            assert_same(&result[index..=index], &logits[index..=index], "a token that is not listed");
        }
    }
}

fn greedy(rig: &mut Rig, logits: &[f32], vocab: usize) -> Vec<u32> {
    let mut ids = rig.unwritten::<u32>(logits.len() / vocab);
    let logits = rig.filled(logits);
    ops::argmax(&rig.device, &logits.view(), &mut ids.view_mut()).unwrap();
    rig.read("argmax", &ids)
}

pub(crate) fn argmax(rig: &mut Rig) {
    let expected = |logits: &[f32], vocab: usize| -> Vec<u32> {
        logits.chunks(vocab).map(|row| ranked(row).first().copied().unwrap_or(u32::MAX)).collect()
    };
    for &(rows, vocab) in
        rig.pick(&[(3, 5), (2, 600)][..], &[(1, 1), (3, 5), (9, 511), (9, 513), (4, 5000), (5, LARGE)])
    {
        let mut rng = TestRng::new(63);
        let continuous = rng.f32s(rows * vocab);
        // Few levels: hundreds of tokens share the maximum.
        let ties: Vec<f32> = continuous.iter().map(|value| (value * 8.0).round()).collect();
        // The first half NaN, the rest negative.
        let holes: Vec<f32> = continuous
            .iter()
            .enumerate()
            .map(|(index, value)| if index % vocab < vocab / 2 { f32::NAN } else { value - 2.0 })
            .collect();
        for logits in [continuous, ties, holes] {
            assert_same(&greedy(rig, &logits, vocab), &expected(&logits, vocab), "argmax");
        }
        // The maximum at each end, and next to the boundary of a thread's elements.
        for place in [0, vocab - 1, 511.min(vocab - 1), 512.min(vocab - 1)] {
            let mut logits = vec![-5.0; vocab];
            logits[place] = -4.5;
            assert_same(&greedy(rig, &logits, vocab), &[place as u32], "one maximum");
        }
    }
    let (nan, low, high) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    for (logits, id) in [
        ([nan, nan, nan, nan], u32::MAX),
        ([low, nan, low, low], u32::MAX),
        ([low, f32::MIN, low, nan], 1),
        ([-0.0, 0.0, -0.0, nan], 0),
        ([nan, 0.0, -0.0, -1.0], 1),
        ([1.0, high, 3.0, high], 1),
        ([-nan, -1e-45, 1e-45, 0.0], 2),
        ([7.0, 7.0, 7.0, 7.0], 0),
    ] {
        assert_same(&greedy(rig, &logits, 4), &[id], "what cannot be chosen, and ties");
    }
}

pub(crate) fn log_probs(rig: &mut Rig) {
    let full = [(1, 1, 1), (3, 7, 20), (4, 513, 5), (2, 5000, 0), (3, LARGE, 20)];
    for &(rows, vocab, count) in rig.pick(&[(3, 7, 9), (2, 600, 2), (2, 40, 0)][..], &full) {
        for levels in [0.0, 4.0] {
            let mut rng = TestRng::new(64);
            let mut logits: Vec<f32> = rng.f32s(rows * vocab).iter().map(|value| value * 12.0).collect();
            if levels > 0.0 {
                logits.iter_mut().for_each(|value| *value = (*value * levels).round() / levels);
            }
            if vocab > 4 {
                logits[1] = f32::NEG_INFINITY;
            }
            // The last row asks for a token that is not there.
            let mut chosen: Vec<u32> = (0..rows).map(|_| rng.below(vocab as u64) as u32).collect();
            if rows > 1 {
                chosen[rows - 1] = vocab as u32;
            }
            let (logit_buffer, chosen_buffer) = (rig.filled(&logits), rig.filled(&chosen));
            let (mut ids, mut values) = (rig.unwritten::<u32>(rows * count), rig.unwritten::<f32>(rows * (1 + count)));
            ops::log_probs(
                &rig.device,
                &logit_buffer.view(),
                &chosen_buffer.view(),
                &mut LogProbs { ids: ids.view_mut(), values: values.view_mut() },
            )
            .unwrap();
            let (ids, values) = (rig.read("log_probs", &ids), rig.read("log_probs", &values));
            // Sums of up to 151936 terms in f32, of one sign; values down to -36.
            let near = Tolerance { absolute: 2e-5, relative: 0.0 };
            for (row, logits) in logits.chunks(vocab).enumerate() {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let max = f64::from(max);
                let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
                let log_prob = |id: u32| f64::from(logits[id as usize]) - max - sum.ln();
                let (value, top) = values[row * (1 + count)..][..1 + count].split_first().unwrap();
                match chosen[row] {
                    id if id as usize >= vocab => assert!(value.is_nan(), "{value} for a token that is not there"),
                    id if log_prob(id) == f64::NEG_INFINITY => assert_eq!(*value, f32::NEG_INFINITY),
                    id => assert_close(&[*value], &[log_prob(id)], near),
                }
                let order = ranked(logits);
                let there = count.min(order.len());
                assert_same(&ids[row * count..][..there], &order[..there], "the most likely tokens");
                assert_close(&top[..there], &order[..there].iter().map(|&id| log_prob(id)).collect::<Vec<_>>(), near);
                assert!(ids[row * count..][there..count].iter().all(|&id| id == u32::MAX), "places without a token");
                assert!(top[there..].iter().all(|&value| value == f32::NEG_INFINITY), "places without a token");
            }
        }
    }
}
