//! `lockstep verify`: the numeric contract on this device with this model, as a table.

use std::process::ExitCode;

use host::model::{ModelConfig, self_test};

use crate::cli::VerifyArguments;
use crate::model_folder;
use crate::start::{describe, load};

/// Tokens of the sequences that are cut into steps in several ways: one, within a span, across spans, and a long one.
const SEQUENCE_TOKENS: [usize; 4] = [1, 17, 131, 1000];
/// The CPU computes the long one in minutes; what could differ there shows in the shorter ones.
const MOST_TOKENS_ON_CPU: usize = 131;
/// Rows of a linear layer, at most, on the CPU, for the same reason.
const MOST_ROWS_ON_CPU: usize = 129;

/// Prints a line per promise; exits with 1 when one does not hold.
pub(crate) fn run(arguments: &VerifyArguments) -> anyhow::Result<ExitCode> {
    let folder = model_folder::find(arguments.source.model.as_deref())?;
    ModelConfig::load(&folder)?;
    let model = load(&arguments.source, &folder)?;
    let on_cpu = !model.device().is_cuda();
    println!("device  {}\nmodel   {}\n", describe(model.device()), model_folder::name(&folder));
    let at_most = |counts: &[usize], most: usize| -> Vec<usize> {
        counts.iter().copied().filter(|count| !on_cpu || *count <= most).collect()
    };
    let mut findings = self_test::linear_layers(&model, &at_most(&self_test::ROW_COUNTS, MOST_ROWS_ON_CPU))?;
    findings.extend(self_test::sequences(&model, &at_most(&SEQUENCE_TOKENS, MOST_TOKENS_ON_CPU))?);
    for finding in &findings {
        println!("{finding}");
    }
    let failed = findings.iter().filter(|finding| !finding.holds()).count();
    if failed > 0 {
        anyhow::bail!("{failed} of {} lines fail: the numeric contract does not hold on this device", findings.len());
    }
    println!("\nthe numeric contract holds");
    Ok(ExitCode::SUCCESS)
}
