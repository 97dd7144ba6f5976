//! Takes the committed PTX of the GPU kernels, or compiles them when their sources changed, and names the files to the
//! binary, the tests and the benchmarks of this package: `include_str!(env!("LOCKSTEP_PTX_SM_80"))`.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use cuda_builder::workspace;

fn main() -> ExitCode {
    let folder = |name| env::var_os(name).map(PathBuf::from).unwrap_or_default();
    let (root, out_dir) = (folder("CARGO_MANIFEST_DIR"), folder("OUT_DIR"));
    let builder = workspace::builder(&root, workspace::work_folder(&out_dir));
    for path in builder.watched() {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rerun-if-env-changed=LOCKSTEP_DEVICE_RUSTC");
    let built = match builder.build() {
        Ok(built) => built,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(reason) = built.compiled {
        println!("cargo::warning=GPU kernels: {reason}");
    }
    for (target, path) in built.files {
        println!("cargo::rustc-env=LOCKSTEP_PTX_{}={}", target.cpu.to_uppercase(), path.display());
    }
    ExitCode::SUCCESS
}
