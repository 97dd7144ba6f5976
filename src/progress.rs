//! How far loading is, on standard error: one line that rewrites itself on a terminal, a few plain lines elsewhere.

use std::io::{IsTerminal, Write};

/// Percent between two plain lines.
const PLAIN_STEP: u64 = 25;

/// The display of one load. Drop ends the line.
pub(crate) struct Progress<W: Write> {
    out: W,
    rewrites: bool,
    label: String,
    shown_percent: Option<u64>,
}

impl Progress<std::io::Stderr> {
    pub(crate) fn on_stderr(label: impl Into<String>) -> Self {
        let out = std::io::stderr();
        let rewrites = out.is_terminal();
        Self::new(out, rewrites, label.into())
    }
}

impl<W: Write> Progress<W> {
    fn new(out: W, rewrites: bool, label: String) -> Self {
        Self { out, rewrites, label, shown_percent: None }
    }

    /// Shows `done_bytes` of `total_bytes`. A display that cannot be written is no reason to stop loading.
    pub(crate) fn show(&mut self, done_bytes: u64, total_bytes: u64) {
        let percent = (u128::from(done_bytes) * 100).checked_div(u128::from(total_bytes)).unwrap_or(100);
        let percent = percent.min(100) as u64;
        let due = match self.shown_percent {
            None => true,
            Some(shown) if self.rewrites => percent > shown,
            Some(shown) => percent / PLAIN_STEP > shown / PLAIN_STEP,
        };
        if !due {
            return;
        }
        self.shown_percent = Some(percent);
        let (start, end) = if self.rewrites { ("\r", "") } else { ("", "\n") };
        let _ = write!(self.out, "{start}{} {percent:>3} %{end}", self.label);
        let _ = self.out.flush();
    }
}

impl<W: Write> Drop for Progress<W> {
    fn drop(&mut self) {
        if self.rewrites && self.shown_percent.is_some() {
            let _ = writeln!(self.out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(rewrites: bool, steps: &[(u64, u64)]) -> String {
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, rewrites, "loading".into());
        for (done, total) in steps {
            progress.show(*done, *total);
        }
        drop(progress);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_terminal_line_rewrites_itself_once_per_percent() {
        let text = shown(true, &[(0, 1000), (1, 1000), (10, 1000), (19, 1000), (1000, 1000)]);
        assert_eq!(text, "\rloading   0 %\rloading   1 %\rloading 100 %\n");
    }

    #[test]
    fn plain_lines_are_few() {
        let steps: Vec<(u64, u64)> = (0..=1000).map(|done| (done, 1000)).collect();
        let text = shown(false, &steps);
        assert_eq!(text, "loading   0 %\nloading  25 %\nloading  50 %\nloading  75 %\nloading 100 %\n");
    }

    #[test]
    fn odd_totals_do_no_harm() {
        assert_eq!(shown(false, &[(0, 0)]), "loading 100 %\n");
        assert_eq!(shown(false, &[(u64::MAX, u64::MAX)]), "loading 100 %\n");
        assert_eq!(shown(false, &[(7, 5)]), "loading 100 %\n");
        assert_eq!(shown(true, &[]), "");
    }
}
