//! Rebuilds, checks and assembles the PTX of this repository's kernels.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cuda_builder::{Error, workspace};

const USAGE: &str = "usage: ptx [--root DIR] (build | check | gate)
  build   compile the kernels and rewrite kernels-gpu/ptx
  check   compile the kernels aside; fail unless kernels-gpu/ptx is what they give
  gate    compile for every GPU of the gate and assemble with ptxas; fail on a spill, a missing kernel, or one that waits
          too late for the kernels ahead (so does check)
  --root  the repository (default: the one this program was built in)";

fn main() -> ExitCode {
    let mut root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let mut command = None;
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), command.is_none()) {
            ("--root", _) => match arguments.next() {
                Some(folder) => root = PathBuf::from(folder),
                None => return refuse("--root needs a folder"),
            },
            ("build" | "check" | "gate", true) => command = Some(argument),
            _ => return refuse(&format!("`{argument}` is not understood here")),
        }
    }
    let root = match root.canonicalize() {
        Ok(root) => root,
        Err(error) => return refuse(&format!("{}: {error}", root.display())),
    };
    let work = workspace::default_work_folder(&root);
    let done = match command.as_deref() {
        Some("build") => workspace::build(&root, &work),
        Some("check") => workspace::check(&root, &work),
        Some(_) => gate(&root, &work),
        None => return refuse("say build, check or gate"),
    };
    match done {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The table goes out even when the gate fails: it is where one looks next.
fn gate(root: &Path, work: &Path) -> Result<String, Error> {
    let (table, faults) = workspace::gate(root, work)?;
    if faults.is_empty() {
        return Ok(format!("{table}: all assemble, no spill"));
    }
    println!("{table}");
    Err(Error::Ptx { target: "the gate".into(), faults })
}

fn refuse(reason: &str) -> ExitCode {
    eprintln!("error: {reason}\n{USAGE}");
    ExitCode::from(2)
}
