//! `lockstep replay`: recorded requests once more, and whether the answers are the same.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{anyhow, bail};
use host::server::replay::{Counts, Outcome, replay};

use crate::cli::ReplayArguments;

/// Prints a line for each request whose answer is not the same, and the counts; exits with 1 if there is one.
pub(crate) fn run(arguments: &ReplayArguments) -> anyhow::Result<ExitCode> {
    let path = arguments.file.display();
    let file = File::open(&arguments.file).map_err(|error| anyhow!("cannot read {path}: {error}"))?;
    let failure = Arc::new(Mutex::new(None));
    let lines = lines(file, Arc::clone(&failure));
    let mut out = std::io::stdout().lock();
    let listens = AtomicBool::new(true);
    let counts = replay(lines, &arguments.url, arguments.concurrency, &mut |line, outcome| {
        if let Some(text) = row(line, outcome)
            && listens.load(Ordering::Relaxed)
        {
            // Whoever reads may have seen enough; the exit code still counts.
            listens.store(writeln!(out, "{text}").is_ok(), Ordering::Relaxed);
        }
    })?;
    if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        bail!("cannot read {path}: {error}");
    }
    let _ = writeln!(out, "{}", summary(counts));
    if counts.total() == 0 {
        bail!("{path} holds no request");
    }
    Ok(if counts.same == counts.total() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Lines that are not empty, with their numbers from 1 on. After an error, which is kept, there are no more.
fn lines(
    file: File,
    failure: Arc<Mutex<Option<std::io::Error>>>,
) -> impl Iterator<Item = (usize, String)> + Send + 'static {
    let keep = move |line: std::io::Result<String>| match line {
        Ok(line) => Some(line),
        Err(error) => {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            None
        }
    };
    let lines = BufReader::new(file).lines().map_while(keep);
    (1..).zip(lines).filter(|(_, line)| !line.trim().is_empty())
}

fn row(line: usize, outcome: &Outcome) -> Option<String> {
    match outcome {
        Outcome::Same => None,
        Outcome::Different(what) => Some(format!("line {line}: differs: {what}")),
        Outcome::Failed(why) => Some(format!("line {line}: no answer: {why}")),
        Outcome::Unreadable(why) => Some(format!("line {line}: not readable: {why}")),
    }
}

fn summary(counts: Counts) -> String {
    let Counts { same, different, failed, unreadable } = counts;
    let total = counts.total();
    format!(
        "{total} requests: {same} the same, {different} different, {failed} not answered, {unreadable} not readable"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_everything_but_the_same() {
        assert_eq!(row(3, &Outcome::Same), None);
        for outcome in [Outcome::Different("x".into()), Outcome::Failed("x".into()), Outcome::Unreadable("x".into())] {
            let text = row(3, &outcome).unwrap();
            assert!(text.starts_with("line 3: ") && text.ends_with(": x"), "{text}");
        }
    }

    #[test]
    fn lines_keep_their_numbers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"a\n\n \nb\n\xff\nc\n").unwrap();
        let failure = Arc::default();
        let read: Vec<_> = lines(file.reopen().unwrap(), Arc::clone(&failure)).collect();
        assert_eq!(read, [(1, "a".to_owned()), (4, "b".to_owned())]);
        assert!(failure.lock().unwrap().is_some(), "what is no text ends the reading");
    }
}
