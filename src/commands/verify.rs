//! `lockstep verify`: the numeric contract on this device with this model, as a table.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use host::model::ModelConfig;
use host::verify::{self, Line};

use crate::cli::VerifyArguments;
use crate::model_folder;
use crate::start::{describe, load};

/// Prints a line per promise; exits with 1 when one does not hold.
pub(crate) fn run(arguments: &VerifyArguments) -> anyhow::Result<ExitCode> {
    let folder = model_folder::find(arguments.source.model.as_deref())?;
    ModelConfig::load(&folder)?;
    let model = Arc::new(load(&arguments.source, &folder, None)?);
    println!("device  {}\nmodel   {}\n", describe(model.device()), model_folder::name(&folder));
    let (mut lines, mut failed) = (0, 0);
    verify::full(&model, &mut |line| {
        lines += 1;
        failed += usize::from(!line.holds);
        println!("{}", row(line));
    })?;
    if failed > 0 {
        bail!("{failed} of {lines} lines fail: the numeric contract does not hold on this device");
    }
    println!("\nthe numeric contract holds");
    Ok(ExitCode::SUCCESS)
}

fn row(line: &Line) -> String {
    let verdict = if line.holds { "ok  " } else { "FAIL" };
    format!("{verdict}  {:<72}  {}", line.claim, line.detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_fails_says_so() {
        let line = Line { claim: "a = b".to_owned(), detail: "3 of 4 differ".to_owned(), holds: false };
        assert!(row(&line).starts_with("FAIL  a = b "));
        assert!(row(&Line { holds: true, ..line }).starts_with("ok    a = b "));
    }
}
