//! `lockstep verify`.

use std::process::ExitCode;

use crate::cli::VerifyArguments;

pub(crate) fn run(arguments: &VerifyArguments) -> anyhow::Result<ExitCode> {
    let _ = arguments;
    anyhow::bail!("not connected yet")
}
