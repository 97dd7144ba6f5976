//! Finds a rustc that can compile for the GPU: one that takes `-Z` flags and has the sources of its library.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

/// The oldest release that compiles this workspace, from its `rust-version`.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");

/// A compiler for the GPU and the cargo that goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// Its cargo.
    pub cargo: PathBuf,
    /// Release, commit and LLVM, as in `rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8`: what the PTX depends on.
    pub version: String,
    /// Where its library's sources and the compiler live.
    pub sysroot: PathBuf,
    /// Whether it takes `-Z` flags only with `RUSTC_BOOTSTRAP=1`, being a stable release.
    pub needs_bootstrap: bool,
}

/// Where to look for a compiler. [`Search::from_env`] looks where a user would expect it.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// `LOCKSTEP_DEVICE_RUSTC`: this compiler and no other.
    pub named: Option<PathBuf>,
    /// The folder of rustup's toolchains; of them, those called nightly are tried.
    pub rustup_toolchains: Option<PathBuf>,
    /// Folders that may hold a `rustc`, in order.
    pub path: Vec<PathBuf>,
}

impl Search {
    /// `LOCKSTEP_DEVICE_RUSTC`; else a rustup nightly; else a rustc in `PATH` or `/usr/bin`.
    #[must_use]
    pub fn from_env() -> Self {
        let set = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty());
        let home = set("RUSTUP_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".rustup")));
        let path = set("PATH").unwrap_or_default();
        let mut folders: Vec<PathBuf> = Vec::new();
        for folder in env::split_paths(&path).chain([PathBuf::from("/usr/bin")]) {
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        Self {
            named: set("LOCKSTEP_DEVICE_RUSTC").map(PathBuf::from),
            rustup_toolchains: home.map(|home| home.join("toolchains")),
            path: folders,
        }
    }

    /// The first compiler that does. `reason` is why one is needed, for the error.
    ///
    /// # Errors
    /// None does; or one is named and does not.
    pub fn find(&self, reason: &str) -> Result<Toolchain, Error> {
        if let Some(rustc) = &self.named {
            return probe(rustc).map_err(|reason| Error::NamedCompiler { rustc: rustc.clone(), reason });
        }
        let mut rejected = Vec::new();
        for rustc in self.candidates() {
            match probe(&rustc) {
                Ok(toolchain) => return Ok(toolchain),
                Err(reason) => rejected.push(format!("{}: {reason}", rustc.display())),
            }
        }
        Err(Error::NoCompiler { reason: reason.to_owned(), rejected })
    }

    fn candidates(&self) -> Vec<PathBuf> {
        let mut nightlies: Vec<PathBuf> = Vec::new();
        if let Some(entries) = self.rustup_toolchains.as_ref().and_then(|folder| fs::read_dir(folder).ok()) {
            let folders = entries.flatten().map(|entry| entry.path());
            nightlies.extend(
                folders
                    .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nightly"))),
            );
        }
        // The undated nightly-HOST sorts behind every nightly-YEAR-MONTH-DAY-HOST: it comes first, then the newest.
        nightlies.sort_by(|a, b| b.cmp(a));
        let installed = self.path.iter().map(|folder| folder.join("rustc")).filter(|rustc| rustc.is_file());
        nightlies.iter().map(|folder| folder.join("bin/rustc")).chain(installed).collect()
    }
}

/// What the rustc lacks, or the toolchain.
fn probe(rustc: &Path) -> Result<Toolchain, String> {
    let verbose = ask(rustc, &["-vV"])?;
    let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let (Some(release), Some(llvm)) = (field("release:"), field("LLVM version:")) else {
        return Err("`-vV` names no release and no LLVM".into());
    };
    if number(release) < number(OLDEST) {
        return Err(format!("release {release} is older than {OLDEST}"));
    }
    let sysroot = PathBuf::from(ask(rustc, &["--print", "sysroot"])?.trim());
    let core = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !core.is_file() {
        return Err(format!("has no sources of its library ({} is missing)", core.display()));
    }
    // A rustup proxy finds its toolchain by the environment, which the nested cargo does not get: use the real ones.
    let real = Some(sysroot.join("bin/rustc")).filter(|path| path.is_file()).unwrap_or_else(|| rustc.to_path_buf());
    let beside = [sysroot.join("bin/cargo"), rustc.with_file_name("cargo")];
    let Some(cargo) = beside.iter().find(|path| path.is_file()) else {
        return Err(format!("has no cargo ({} is missing)", beside[0].display()));
    };
    let first = verbose.lines().next().unwrap_or_default();
    Ok(Toolchain {
        rustc: real,
        cargo: cargo.clone(),
        version: format!("{}, LLVM {llvm}", first.split(" (built from").next().unwrap_or(first)),
        sysroot,
        needs_bootstrap: !release.contains("nightly") && !release.contains("dev"),
    })
}

/// The standard output of a rustc, asked without what an outer cargo or rustup put into the environment.
fn ask(rustc: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(rustc);
    crate::compile::clean_environment(&mut command);
    let output = command.args(arguments).output().map_err(|error| format!("does not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("`{}` fails: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Major and minor of a release.
fn number(release: &str) -> (u32, u32) {
    let mut parts = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::workspace::tests::scratch;

    /// A toolchain folder whose rustc is a script that answers as `release` would.
    fn fake(folder: &Path, release: &str, with_sources: bool) -> PathBuf {
        let (bin, core) = (folder.join("bin"), folder.join("lib/rustlib/src/rust/library/core/src"));
        fs::create_dir_all(&bin).unwrap();
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = -vV ]; then\n  echo 'rustc {release} (0123abcd 2026-01-02) (built from a tarball)'\n  \
             echo 'release: {release}'\n  echo 'LLVM version: 22.1.8'\nelse\n  echo '{}'\nfi\n",
            folder.display()
        );
        for (name, text) in [("rustc", script.as_str()), ("cargo", "#!/bin/sh\n")] {
            fs::write(bin.join(name), text).unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        if with_sources {
            fs::create_dir_all(&core).unwrap();
            fs::write(core.join("lib.rs"), "").unwrap();
        }
        bin.join("rustc")
    }

    // One test, because a script that another thread's fork still holds open for writing cannot be executed.
    #[test]
    fn the_order_is_named_then_nightly_then_installed_and_each_refusal_says_why() {
        let root = scratch("toolchains");
        let toolchains = root.join("toolchains");
        fake(&toolchains.join("nightly-x86_64-unknown-linux-gnu"), "1.99.0-nightly", false);
        fake(&toolchains.join("stable-x86_64-unknown-linux-gnu"), "1.98.0", true);
        let old = fake(&root.join("old"), "1.80.0", true);
        let usr = fake(&root.join("usr"), "1.96.0", true);
        let path = vec![root.join("nowhere"), root.join("old/bin"), root.join("usr/bin")];
        let search = Search { named: None, rustup_toolchains: Some(toolchains.clone()), path };

        // The nightly has no sources, the first rustc in PATH is too old: the second one it is.
        let found = search.find("test").unwrap();
        assert_eq!((found.rustc.clone(), found.needs_bootstrap), (usr.clone(), true));
        assert_eq!(found.cargo, root.join("usr/bin/cargo"));
        assert_eq!(found.version, "rustc 1.96.0 (0123abcd 2026-01-02), LLVM 22.1.8");

        // A nightly with sources goes first; the undated one before a dated one.
        let dated = fake(&toolchains.join("nightly-2026-01-02-x86_64-unknown-linux-gnu"), "1.97.0-nightly", true);
        let found = search.find("test").unwrap();
        assert_eq!((found.rustc, found.needs_bootstrap), (dated, false));
        let nightly = fake(&toolchains.join("nightly-x86_64-unknown-linux-gnu"), "1.99.0-nightly", true);
        assert_eq!(search.find("test").unwrap().rustc, nightly);

        // The named one goes before all, and nothing replaces it.
        let named = Search { named: Some(usr.clone()), ..search.clone() };
        assert_eq!(named.find("test").unwrap().rustc, usr);
        let error = Search { named: Some(old), ..search.clone() }.find("test").unwrap_err().to_string();
        assert!(error.starts_with("LOCKSTEP_DEVICE_RUSTC=") && error.contains("1.80.0 is older"), "{error}");

        // Without its cargo a compiler is of no use.
        fs::remove_file(root.join("usr/bin/cargo")).unwrap();
        let nothing = Search { named: None, rustup_toolchains: None, path: search.path };
        let error = nothing.find("the sources changed").unwrap_err().to_string();
        for said in [
            "the sources changed",
            "rustup toolchain install nightly --component rust-src",
            "apt-get install rustc-web rust-web-src cargo-web",
            "LOCKSTEP_DEVICE_RUSTC",
            "old/bin/rustc: release 1.80.0 is older than",
            "usr/bin/rustc: has no cargo",
        ] {
            assert!(error.contains(said), "`{said}` is not in: {error}");
        }
        let error = Search::default().find("x").unwrap_err().to_string();
        assert!(error.contains("no rustup nightly and no rustc in PATH"), "{error}");
    }
}
