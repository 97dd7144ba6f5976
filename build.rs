//! Takes the committed PTX of the GPU kernels, or compiles them when their sources changed, and names the files to the
//! binary, the tests and the benchmarks of this package: `include_str!(env!("LOCKSTEP_PTX_SM_80"))`. And names the build,
//! by its sources and its compiler, to the fingerprint: `env!("LOCKSTEP_BUILD")`.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use cuda_builder::{Sources, workspace};

fn main() -> ExitCode {
    let folder = |name| env::var_os(name).map(PathBuf::from).unwrap_or_default();
    let (root, out_dir) = (folder("CARGO_MANIFEST_DIR"), folder("OUT_DIR"));
    let builder = workspace::builder(&root, workspace::work_folder(&out_dir));
    let built = match builder.build() {
        Ok(built) => built,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    // After a failure cargo runs this again anyway, and prints only the error.
    for path in builder.watched() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rerun-if-env-changed=LOCKSTEP_DEVICE_RUSTC");
    if let Some(reason) = built.compiled {
        println!("cargo::warning=GPU kernels: {reason}");
    }
    for (target, path) in built.files {
        println!("cargo::rustc-env=LOCKSTEP_PTX_{}={}", target.cpu.to_uppercase(), path.display());
    }
    // What the CPU computes, and what happens around the kernels, is a part of the build that no PTX names.
    let sources =
        ["Cargo.lock", "src", "host/src", "kernels-gpu/src", "rust-cuda/cuda_std/src", "rust-cuda/cuda_std_macros/src"]
            .into_iter()
            .fold(Sources::new(&root), Sources::include);
    for path in sources.watched() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let compiler = env::var_os("RUSTC").and_then(|rustc| Command::new(rustc).arg("-vV").output().ok());
    match (sources.hash(), compiler) {
        (Ok(hash), Some(compiler)) => {
            let version = String::from_utf8_lossy(&compiler.stdout).replace('\n', ", ");
            println!("cargo::rustc-env=LOCKSTEP_BUILD={hash} {version}");
            ExitCode::SUCCESS
        }
        (Err(error), _) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
        (_, None) => {
            eprintln!("error: the compiler does not say its version");
            ExitCode::FAILURE
        }
    }
}
