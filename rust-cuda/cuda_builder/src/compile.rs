//! The cargo inside cargo that compiles the kernels for one GPU.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, Target, Toolchain};

const TRIPLE: &str = "nvptx64-nvidia-cuda";

/// What of `CARGO_*` describes the user's network and registry, and is no part of the outer build.
const KEPT: [&str; 6] =
    ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_", "CARGO_SOURCE_"];

/// Variables that cargo sets for a build script, and that would mean something else to the nested build.
const OF_BUILD_SCRIPTS: [&str; 9] =
    ["OUT_DIR", "TARGET", "HOST", "NUM_JOBS", "OPT_LEVEL", "PROFILE", "DEBUG", "MAKEFLAGS", "MFLAGS"];

/// Whether a variable of the outer build must not reach the nested one.
fn is_of_the_outer_build(name: &str) -> bool {
    name == "RUSTUP_TOOLCHAIN"
        || name == "CARGO"
        || ["RUSTC", "RUSTDOC", "RUSTFLAGS"].iter().any(|prefix| name.starts_with(prefix))
        || name.starts_with("CARGO_") && !KEPT.iter().any(|kept| name.starts_with(kept))
        || OF_BUILD_SCRIPTS.contains(&name)
}

/// Takes the outer cargo, rustc and rustup out of a command's environment.
pub(crate) fn clean_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if is_of_the_outer_build(&name.to_string_lossy()) {
            command.env_remove(&name);
        }
    }
    // Rustup's proxies put their own toolchain's libraries first; another rustc must not load that LLVM.
    if let Some(paths) = env::var_os("LD_LIBRARY_PATH") {
        let kept =
            env::split_paths(&paths).filter(|path| !path.components().any(|part| part.as_os_str() == "toolchains"));
        match env::join_paths(kept) {
            Ok(kept) if !kept.is_empty() => command.env("LD_LIBRARY_PATH", kept),
            _ => command.env_remove("LD_LIBRARY_PATH"),
        };
    }
}

/// Compiles the library `library` of the package in `package` and returns the PTX as LLVM wrote it.
///
/// `--emit=asm` needs no linker, so `true` stands in for one. Fat LTO and one codegen unit put everything into one
/// module; they come by the environment because a profile in a manifest would hold for the host too.
pub(crate) fn compile(
    toolchain: &Toolchain,
    package: &Path,
    library: &str,
    target: &Target,
    target_dir: &Path,
) -> Result<String, Error> {
    let rustflags = [
        format!("-Ctarget-cpu={}", target.cpu),
        format!("-Ctarget-feature=+{}", target.isa),
        "-Clinker=true".to_owned(),
        // Kernels keep tiles in small arrays; a loop over one that is not unrolled would move it to local memory.
        "-Cllvm-args=-unroll-threshold=20000".to_owned(),
        // The same text wherever the checkout, the registry and the compiler are.
        format!("--remap-path-prefix={}=/kernels", workspace_root(package).display()),
        format!("--remap-path-prefix={}=/rust", toolchain.sysroot.display()),
    ];
    let mut command = Command::new(&toolchain.cargo);
    clean_environment(&mut command);
    command
        .current_dir(package)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_WRAPPER", "")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\u{1f}"))
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "false")
        .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "false")
        .args(["rustc", "--lib", "--crate-type", "cdylib", "--release", "-Zbuild-std=core", "--target", TRIPLE])
        .arg("--target-dir")
        .arg(target_dir);
    if toolchain.needs_bootstrap {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    if workspace_root(package).join("Cargo.lock").is_file() {
        command.arg("--locked");
    }
    command.args(["--", "--emit=asm"]);

    let output = command.output().map_err(Error::io("start", &toolchain.cargo))?;
    if !output.status.success() {
        let output = without_noise(&String::from_utf8_lossy(&output.stderr));
        return Err(Error::Compile { target: target.cpu.clone(), output });
    }
    let mut found = Vec::new();
    assembly_files(&target_dir.join(TRIPLE), library, &mut found);
    let newest = found.into_iter().max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok());
    let Some(path) = newest else {
        let output = format!("cargo left no {library}.s in {}; remove that folder", target_dir.display());
        return Err(Error::Compile { target: target.cpu.clone(), output });
    };
    fs::read_to_string(&path).map_err(Error::io("read", &path))
}

/// What the compiler said, less what it says about any kernel: the choice of PTX version is "unstable", a lock was waited for.
fn without_noise(said: &str) -> String {
    let (mut kept, mut in_noise) = (String::new(), false);
    for line in said.lines() {
        let is_noise = line.starts_with("warning: unstable feature specified for `-Ctarget-feature`");
        in_noise = is_noise || in_noise && !line.trim().is_empty();
        let is_progress = line.trim_start().starts_with("Blocking waiting for file lock");
        let is_count = line.starts_with("warning: `") && line.contains("` (lib) generated ");
        if !(in_noise || is_progress || is_count) {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// The nearest folder upwards with a Cargo.lock: cargo's workspace root.
pub(crate) fn workspace_root(package: &Path) -> &Path {
    package.ancestors().find(|folder| folder.join("Cargo.lock").is_file()).unwrap_or(package)
}

/// Every `LIBRARY.s` and `LIBRARY-HASH.s` below `folder`; which folder and whether with a hash is cargo's own affair.
fn assembly_files(folder: &Path, library: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            assembly_files(&path, library, found);
        } else if path.extension() == Some(OsStr::new("s")) {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let rest = stem.strip_prefix(library);
            if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-')) {
                found.push(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_lines_and_loses_the_noise() {
        let said = "    Blocking waiting for file lock on package cache\n   Compiling k v0.1.0\n\
                    warning: unstable feature specified for `-Ctarget-feature`: `ptx74`\n  |\n  = note: x\n\n\
                    error[E0308]: mismatched types\n  --> src/lib.rs:1:2\n\nwarning: unused\n\n\
                    warning: `k` (lib) generated 2 warnings\nerror: could not compile `k`\n";
        let kept = "   Compiling k v0.1.0\n\nerror[E0308]: mismatched types\n  --> src/lib.rs:1:2\n\nwarning: unused\n\n\
                    error: could not compile `k`\n";
        assert_eq!(without_noise(said), kept);
    }

    #[test]
    fn the_nested_build_gets_nothing_of_the_outer_one_but_its_network() {
        for name in [
            "RUSTUP_TOOLCHAIN",
            "CARGO",
            "CARGO_MANIFEST_DIR",
            "CARGO_TARGET_DIR",
            "CARGO_PROFILE_RELEASE_DEBUG",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_MAKEFLAGS",
            "RUSTC",
            "RUSTC_WRAPPER",
            "RUSTC_BOOTSTRAP",
            "RUSTFLAGS",
            "OUT_DIR",
            "TARGET",
        ] {
            assert!(is_of_the_outer_build(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_HTTP_CAINFO", "CARGO_NET_OFFLINE", "HOME", "PATH", "RUSTUP_HOME"] {
            assert!(!is_of_the_outer_build(name), "{name}");
        }
    }
}
