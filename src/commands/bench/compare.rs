//! Two runs side by side.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use super::figure::{Figure, Report, short};

/// A figure of both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Pair<'a> {
    what: &'a str,
    batch: Option<usize>,
    context: Option<usize>,
    unit: &'a str,
    before: Option<f64>,
    after: Option<f64>,
    /// `after / before`.
    ratio: Option<f64>,
    /// The spreads of both have values in common: the difference may be chance.
    overlap: bool,
}

/// Reads what `--json` printed.
pub(super) fn read(path: &Path) -> anyhow::Result<Report> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    serde_json::from_str(&text)
        .map_err(|error| anyhow::anyhow!("{} is not what lockstep bench --json prints: {error}", path.display()))
}

/// Every figure of either run, in the order of `after`, then what only `before` has.
pub(super) fn pairs<'a>(before: &'a Report, after: &'a Report) -> Vec<Pair<'a>> {
    let old: HashMap<_, _> = before.figures.iter().map(|figure| (figure.key(), figure)).collect();
    let new: HashMap<_, _> = after.figures.iter().map(|figure| (figure.key(), figure)).collect();
    let gone = before.figures.iter().filter(|figure| !new.contains_key(&figure.key()));
    let both = after.figures.iter().map(|figure| pair(old.get(&figure.key()).copied(), Some(figure), figure));
    both.chain(gone.map(|figure| pair(Some(figure), None, figure))).collect()
}

fn pair<'a>(before: Option<&'a Figure>, after: Option<&'a Figure>, named: &'a Figure) -> Pair<'a> {
    let both = before.zip(after);
    Pair {
        what: &named.what,
        batch: named.batch,
        context: named.context,
        unit: &named.unit,
        before: before.map(|figure| figure.value),
        after: after.map(|figure| figure.value),
        ratio: both.map(|(before, after)| after.value / before.value).filter(|ratio| ratio.is_finite()),
        overlap: both.is_some_and(|(before, after)| before.min <= after.max && after.min <= before.max),
    }
}

/// The pairs as a table. `~` marks a difference that may be chance.
pub(super) fn table(before: &Report, after: &Report) -> String {
    let mut text = format!(
        "before\n{}\nafter\n{}\n{:<34} {:>5} {:>7} {:>12} {:>12} {:<8} {:>7}\n",
        before.conditions(),
        after.conditions(),
        "",
        "batch",
        "context",
        "before",
        "after",
        "",
        "ratio"
    );
    for pair in pairs(before, after) {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
        let size = |value: Option<usize>| value.map_or_else(String::new, |value| value.to_string());
        let ratio = pair.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        let mark = if pair.overlap { " ~" } else { "" };
        let (batch, context) = (size(pair.batch), size(pair.context));
        let (before, after) = (number(pair.before), number(pair.after));
        let _ = writeln!(
            text,
            "{:<34} {batch:>5} {context:>7} {before:>12} {after:>12} {:<8} {ratio:>7}{mark}",
            pair.what, pair.unit
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(figures: Vec<Figure>) -> Report {
        Report {
            version: "1".into(),
            device: "d".into(),
            driver: None,
            kernels: None,
            linear_library: None,
            model: "m".into(),
            runs: 1,
            tokens: 4,
            figures,
        }
    }

    fn decode(batch: usize, values: &[f64]) -> Figure {
        Figure::of("decode", "tokens/s", values).batch(batch).context(128)
    }

    #[test]
    fn the_ratio_is_after_over_before_of_the_same_figure() {
        let before = report(vec![decode(1, &[90.0, 100.0, 110.0]), decode(8, &[500.0])]);
        let after = report(vec![decode(8, &[250.0]), decode(1, &[200.0, 210.0, 190.0])]);
        let pairs = pairs(&before, &after);
        let seen: Vec<_> = pairs.iter().map(|pair| (pair.batch, pair.before, pair.after, pair.ratio)).collect();
        assert_eq!(
            seen,
            [(Some(8), Some(500.0), Some(250.0), Some(0.5)), (Some(1), Some(100.0), Some(200.0), Some(2.0)),]
        );
    }

    #[test]
    fn spreads_that_touch_may_be_chance() {
        let overlap = |before: &[f64], after: &[f64]| {
            let (before, after) = (report(vec![decode(1, before)]), report(vec![decode(1, after)]));
            pairs(&before, &after)[0].overlap
        };
        assert!(
            overlap(&[1.0, 5.0], &[5.0, 9.0]) && overlap(&[1.0, 9.0], &[4.0, 5.0]) && overlap(&[5.0, 9.0], &[1.0, 5.0])
        );
        assert!(!overlap(&[1.0, 5.0], &[5.1, 9.0]) && !overlap(&[5.1, 9.0], &[1.0, 5.0]));
    }

    #[test]
    fn what_one_run_lacks_has_no_ratio() {
        let (before, after) =
            (report(vec![decode(1, &[1.0]), decode(2, &[0.0])]), report(vec![decode(2, &[3.0]), decode(4, &[7.0])]));
        let pairs = pairs(&before, &after);
        assert_eq!(pairs.iter().map(|pair| pair.batch).collect::<Vec<_>>(), [Some(2), Some(4), Some(1)]);
        assert!(pairs.iter().all(|pair| pair.ratio.is_none()), "{pairs:?}");
        assert_eq!((pairs[2].before, pairs[2].after), (Some(1.0), None));
        assert!(table(&before, &after).lines().last().unwrap().trim_end().ends_with('-'));
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        assert!(read(&path).unwrap_err().to_string().contains("run.json"));
        std::fs::write(&path, "{}").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("lockstep bench --json"));
        let kept = report(vec![decode(1, &[1.0])]);
        std::fs::write(&path, serde_json::to_string(&kept).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), kept);
    }
}
