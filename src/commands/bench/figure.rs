//! Figures: what is measured, kept as JSON and printed as a table.

use serde::{Deserialize, Serialize};

/// One figure: the median of several runs, with the least and the most of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Figure {
    pub(super) what: String,
    /// Requests at once, where there are any.
    pub(super) batch: Option<usize>,
    /// Tokens of their prompts.
    pub(super) context: Option<usize>,
    pub(super) unit: String,
    pub(super) value: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// Bytes that a step, a prefill or a copy has to move at least.
    pub(super) bytes: Option<f64>,
    /// Floating-point operations that it has to do at least.
    pub(super) flops: Option<f64>,
    /// Which part of the device's own copy bandwidth or matrix product, measured in the same run, `value` comes to.
    pub(super) share_of_ceiling: Option<f64>,
}

/// All figures of a run, with what they were measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) version: String,
    pub(super) device: String,
    pub(super) driver: Option<String>,
    /// The image of the GPU kernels.
    pub(super) kernels: Option<String>,
    pub(super) linear_library: Option<String>,
    pub(super) model: String,
    pub(super) runs: usize,
    /// Tokens that each request generated.
    pub(super) tokens: u32,
    pub(super) figures: Vec<Figure>,
}

impl Figure {
    /// The median of `values`, of which there must be one at least.
    pub(super) fn of(what: &str, unit: &str, values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let count = sorted.len();
        Self {
            what: what.to_owned(),
            batch: None,
            context: None,
            unit: unit.to_owned(),
            value: f64::midpoint(at(count.saturating_sub(1) / 2), at(count / 2)),
            min: at(0),
            max: at(count.saturating_sub(1)),
            bytes: None,
            flops: None,
            share_of_ceiling: None,
        }
    }

    pub(super) fn batch(self, batch: usize) -> Self {
        Self { batch: Some(batch), ..self }
    }

    pub(super) fn context(self, context: usize) -> Self {
        Self { context: Some(context), ..self }
    }

    /// Where it stands: what is compared with what.
    pub(super) fn key(&self) -> (&str, Option<usize>, Option<usize>, &str) {
        (&self.what, self.batch, self.context, &self.unit)
    }

    /// The columns of a table that name it.
    pub(super) fn name_columns(&self) -> String {
        let number = |value: Option<usize>| value.map_or_else(String::new, |value| value.to_string());
        format!("{:<34} {:>5} {:>7}", self.what, number(self.batch), number(self.context))
    }

    pub(super) fn row(&self) -> String {
        let share = self.share_of_ceiling.map_or_else(String::new, |share| format!("{:.1} %", share * 100.0));
        let spread = format!("{} .. {}", short(self.min), short(self.max));
        let row = format!("{} {:>12} {:<8} {spread:>23} {share:>9}", self.name_columns(), short(self.value), self.unit);
        row.trim_end().to_owned()
    }
}

/// The heads of the columns of [`Figure::row`].
pub(super) fn heading() -> String {
    format!(
        "{:<34} {:>5} {:>7} {:>12} {:<8} {:>23} {:>9}",
        "", "batch", "context", "median", "", "min .. max", "ceiling"
    )
}

/// Four significant digits, or all of the whole number.
pub(super) fn short(value: f64) -> String {
    let digits = if value == 0.0 || !value.is_finite() { 0 } else { value.abs().log10().floor() as i32 };
    format!("{value:.*}", (3 - digits).clamp(0, 6) as usize)
}

impl Report {
    /// What it was measured on, in lines.
    pub(super) fn conditions(&self) -> String {
        let Self { version, device, driver, kernels, linear_library, model, runs, tokens, .. } = self;
        let kernels = kernels.as_ref().map(|image| format!("{image} kernels"));
        let computes: Vec<&str> = [&kernels, linear_library].into_iter().flatten().map(String::as_str).collect();
        let kernels = if computes.is_empty() { String::new() } else { format!("kernels  {}\n", computes.join(", ")) };
        let driver = driver.as_ref().map_or_else(String::new, |driver| format!(", {driver}"));
        format!(
            "device   {device}{driver}\n{kernels}model    {model}\nlockstep {version}, \
             medians of {runs}, {tokens} tokens a request\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_median_with_its_spread() {
        let of = |values: &[f64]| {
            let figure = Figure::of("x", "ms", values);
            (figure.value, figure.min, figure.max)
        };
        assert_eq!(of(&[3.0]), (3.0, 3.0, 3.0));
        assert_eq!(of(&[3.0, 1.0]), (2.0, 1.0, 3.0));
        assert_eq!(of(&[9.0, 1.0, 2.0]), (2.0, 1.0, 9.0));
        assert_eq!(of(&[4.0, 100.0, 1.0, 2.0]), (3.0, 1.0, 100.0));
        assert!(of(&[]).0.is_nan());
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0.000"),
            (0.012_345, "0.01235"),
            (1.0, "1.000"),
            (12.345, "12.35"),
            (165_432.1, "165432"),
            (1e-9, "0.000000"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn json_keeps_everything() {
        let figure = Figure { bytes: Some(5.0), ..Figure::of("decode", "tokens/s", &[1.5]).batch(3).context(7) };
        let text = serde_json::to_string(&figure).unwrap();
        assert_eq!(serde_json::from_str::<Figure>(&text).unwrap(), figure);
        assert!(figure.row().starts_with("decode ") && figure.row().contains("1.500 tokens/s"), "{}", figure.row());
    }
}
