//! The `lockstep` command: serves a model over HTTP, answers one prompt, checks the numeric contract, asks a server
//! recorded requests again, or measures how fast it is.
//!
//! Exit codes: 0 done, 1 failed (one line on standard error says why and what to do), 2 wrong usage.

mod cli;
mod commands;
mod fingerprint;
mod model_folder;
mod progress;
mod start;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let command = Cli::parse().command.unwrap_or_else(Command::serve_demo_model);
    log_to_stderr(&command);
    if cfg!(feature = "planted-batch-dependence") {
        eprintln!("warning: this build makes wrong answers on purpose; it is for tests of the tests");
    }
    let outcome = match command {
        Command::Serve(arguments) => commands::serve::run(&arguments),
        Command::Generate(arguments) => commands::generate::run(&arguments),
        Command::Verify(arguments) => commands::verify::run(&arguments),
        Command::Bench(arguments) => commands::bench::run(&arguments),
        Command::Replay(arguments) => commands::replay::run(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {}", one_line(&error.to_string()));
        ExitCode::FAILURE
    })
}

/// A server tells what it does; the other commands speak up only when something is wrong.
fn log_to_stderr(command: &Command) {
    let level = match command {
        Command::Serve(_) => tracing_subscriber::filter::LevelFilter::INFO,
        Command::Generate(_) | Command::Verify(_) | Command::Bench(_) | Command::Replay(_) => {
            tracing_subscriber::filter::LevelFilter::WARN
        }
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        // A log that nobody reads any more would be reported by a panic in whoever logs.
        .log_internal_errors(false)
        .init();
}

/// Messages of compilers and drivers may have several lines; scripts read one.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn errors_are_one_line() {
        assert_eq!(super::one_line("cannot load:\n  line 3\n\n  expected }"), "cannot load:; line 3; expected }");
    }
}
