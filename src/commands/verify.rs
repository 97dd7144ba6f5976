//! `lockstep verify`: the numeric contract on this device with this model, as a table.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use host::model::ModelConfig;
use host::verify::{self, Goldens, Line, Size};

use crate::cli::VerifyArguments;
use crate::model_folder;
use crate::start::{describe, load};

/// Prints a line per promise; exits with 1 when one does not hold.
pub(crate) fn run(arguments: &VerifyArguments) -> anyhow::Result<ExitCode> {
    let folder = model_folder::find(arguments.source.model.as_deref())?;
    ModelConfig::load(&folder)?;
    // A file that is no such file is found before gigabytes are loaded.
    let golden = arguments.golden.as_deref().map(Goldens::read).transpose()?;
    let recorded = arguments.write_golden.as_deref().map(read_or_begin).transpose()?;
    let model = Arc::new(load(&arguments.source, &folder, None)?);
    let name = model_folder::name(&folder);
    println!("device  {}\nmodel   {name}\n", describe(model.device()));
    let (mut lines, mut failed) = (0, 0);
    let mut print = |line: &Line| {
        lines += 1;
        failed += usize::from(!line.holds);
        println!("{}", row(line));
    };
    if let Some(others) = arguments.batch {
        verify::batch(&model, Size::with_company(others), &mut print)?;
    }
    if let Some(golden) = &golden {
        golden.check(&model, &name)?.iter().for_each(&mut print);
    }
    if arguments.batch.is_none() && golden.is_none() && recorded.is_none() {
        verify::full(&model, &mut print)?;
    }
    if let (Some(mut goldens), Some(path)) = (recorded, &arguments.write_golden) {
        let device = goldens.record(&model, &name)?;
        goldens.write(path)?;
        println!("recorded the golden digests of {name} on {device} in {}", path.display());
    }
    if failed > 0 {
        bail!("{failed} of {lines} lines fail: the numeric contract does not hold on this device");
    }
    if lines > 0 {
        println!("\nthe numeric contract holds");
    }
    Ok(ExitCode::SUCCESS)
}

/// What others have recorded stays.
fn read_or_begin(path: &Path) -> anyhow::Result<Goldens> {
    if path.exists() { Ok(Goldens::read(path)?) } else { Ok(Goldens::default()) }
}

fn row(line: &Line) -> String {
    let verdict = if line.holds { "ok  " } else { "FAIL" };
    format!("{verdict}  {:<72}  {}", line.claim, line.detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_begins_empty_and_a_wrong_one_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("golden.json");
        assert_eq!(read_or_begin(&path).unwrap(), Goldens::default());
        std::fs::write(&path, "no golden").unwrap();
        assert!(read_or_begin(&path).is_err());
    }

    #[test]
    fn a_line_that_fails_says_so() {
        let line = Line { claim: "a = b".to_owned(), detail: "3 of 4 differ".to_owned(), holds: false };
        assert!(row(&line).starts_with("FAIL  a = b "));
        assert!(row(&Line { holds: true, ..line }).starts_with("ok    a = b "));
    }
}
