//! Which of the algorithms that give a linear layer the same bits computes it: the fastest by timing, at a ladder of rows.

/// Numbers of rows at which algorithms are timed. A layer of other rows takes the choice of the next larger rung, which has
/// the same number of tiles or few more.
pub const LINEAR_RUNGS: [usize; 16] = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096];

/// The rung that stands for `rows` rows.
pub(super) fn rung(rows: usize) -> usize {
    let last = LINEAR_RUNGS[LINEAR_RUNGS.len() - 1];
    LINEAR_RUNGS.into_iter().find(|&rung| rung >= rows).unwrap_or(last)
}

/// What timing has chosen for a linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearChoice {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Rows.
    pub rows: usize,
    /// Algorithms that the library offered.
    pub offered: usize,
    /// The chosen one's place among them, which the library orders by what it expects.
    pub index: usize,
    /// What the library's own first choice takes, in microseconds.
    pub first_us: f64,
    /// What the chosen one takes, in microseconds.
    pub chosen_us: f64,
    /// The chosen one in words.
    pub algorithm: String,
}

/// The fastest of some candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fastest {
    pub(super) index: usize,
    /// Microseconds of a launch of the first candidate.
    pub(super) first_us: f64,
    /// Of the chosen one.
    pub(super) us: f64,
}

/// Candidates that take up to this much longer than the best in the first round are timed again.
const CLOSE: f64 = 1.25;

/// The first candidate stays unless another takes less than this share of its time: noise is no reason to change.
const GAIN: f64 = 0.98;

/// How long candidates of the second round are timed, in microseconds: about a hundred times the clock's resolution.
const SPAN_US: f64 = 60.0;

/// Times `candidates` candidates and chooses. `time(candidate, launches)` says how many microseconds a launch takes.
///
/// # Errors
/// The first error of `time`.
pub(super) fn fastest<E>(
    candidates: usize,
    mut time: impl FnMut(usize, usize) -> Result<f64, E>,
) -> Result<Option<Fastest>, E> {
    let mut times = Vec::with_capacity(candidates);
    for candidate in 0..candidates {
        // The first launch of an algorithm loads its code.
        time(candidate, 1)?;
        times.push(time(candidate, 2)?);
    }
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    for (candidate, us) in times.iter_mut().enumerate() {
        if *us <= best * CLOSE || candidate == 0 {
            let launches = (SPAN_US / us.max(1.0)).clamp(2.0, 8.0) as usize;
            for _ in 0..2 {
                *us = us.min(time(candidate, launches)?);
            }
        }
    }
    let Some(&first_us) = times.first() else { return Ok(None) };
    let (index, us) = times
        .iter()
        .copied()
        .enumerate()
        .min_by(|(_, a), (_, b)| a.total_cmp(b))
        .filter(|&(_, us)| us < first_us * GAIN)
        .unwrap_or((0, first_us));
    Ok(us.is_finite().then_some(Fastest { index, first_us, us }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chooses among candidates of fixed times; how often each was launched.
    fn choose(times: &[f64]) -> (Option<Fastest>, Vec<usize>) {
        let mut launched = vec![0; times.len()];
        let outcome = fastest::<()>(times.len(), |candidate, launches| {
            // The first launch of a candidate is slow.
            let slow = if launched[candidate] == 0 { 1000.0 } else { 0.0 };
            launched[candidate] += launches;
            Ok(times[candidate] + slow)
        });
        (outcome.unwrap(), launched)
    }

    #[test]
    fn rows_take_the_next_rung() {
        assert!(LINEAR_RUNGS.is_sorted());
        assert_eq!([1, 16, 17, 100, 4096, 9000].map(rung), [16, 16, 32, 128, 4096, 4096]);
        assert!(LINEAR_RUNGS.into_iter().all(|rows| rung(rows) == rows));
    }

    #[test]
    fn the_fastest_is_chosen() {
        let (found, launched) = choose(&[10.0, 30.0, 8.0, 9.0]);
        assert_eq!(found, Some(Fastest { index: 2, first_us: 10.0, us: 8.0 }));
        // What is far behind is not timed twice.
        assert_eq!(launched, [3 + 2 * 6, 3, 3 + 2 * 7, 3 + 2 * 6]);
    }

    #[test]
    fn the_first_stays_where_nothing_is_gained() {
        assert_eq!(choose(&[10.0, 9.9, 10.1]).0.unwrap().index, 0);
        assert_eq!(choose(&[10.0]).0, Some(Fastest { index: 0, first_us: 10.0, us: 10.0 }));
        assert_eq!(choose(&[]).0, None);
    }

    #[test]
    fn what_does_not_run_is_not_chosen() {
        assert_eq!(choose(&[f64::INFINITY, 20.0]).0.unwrap().index, 1);
        assert_eq!(choose(&[20.0, f64::INFINITY]).0.unwrap().index, 0);
        assert_eq!(choose(&[f64::INFINITY]).0, None);
    }

    #[test]
    fn an_error_ends_the_timing() {
        let mut calls = 0;
        let outcome = fastest(3, |_, _| {
            calls += 1;
            if calls == 4 { Err("gone") } else { Ok(1.0) }
        });
        assert_eq!((outcome, calls), (Err("gone"), 4));
    }
}
