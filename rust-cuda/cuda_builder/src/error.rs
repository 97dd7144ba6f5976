//! What can go wrong on the way to PTX, in words that say what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why there is no PTX.
#[derive(Debug)]
pub enum Error {
    /// A file or a program could not be used.
    Io {
        /// What was being done, as in "read".
        action: &'static str,
        /// The file or program.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernels have to be compiled and nothing here can.
    NoCompiler {
        /// Why the committed PTX does not do.
        reason: String,
        /// Each compiler that was looked at, and why it does not do.
        rejected: Vec<String>,
    },
    /// The compiler that `LOCKSTEP_DEVICE_RUSTC` names cannot compile for the GPU.
    NamedCompiler {
        /// The value of the variable.
        rustc: PathBuf,
        /// What it lacks.
        reason: String,
    },
    /// The compiler refused the kernels.
    Compile {
        /// The GPU compiled for, as in `sm_80`.
        target: String,
        /// What it said.
        output: String,
    },
    /// The compiler's PTX is not what the host can load.
    Ptx {
        /// The GPU compiled for.
        target: String,
        /// Every fault found.
        faults: Vec<String>,
    },
    /// A manifest does not read.
    Manifest {
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// ptxas is missing or refused the PTX.
    Ptxas(String),
    /// A kernel source does not read.
    Source(String),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { action, path, source } => write!(f, "cannot {action} {}: {source}", path.display()),
            Self::NoCompiler { reason, rejected } => {
                write!(
                    f,
                    "the GPU kernels have to be compiled ({reason}), and no compiler for the GPU was found.\n\
                     Install one of these and build again:\n    \
                     rustup toolchain install nightly --component rust-src\n    \
                     apt-get install rustc-web rust-web-src cargo-web    (Debian)\n\
                     or set LOCKSTEP_DEVICE_RUSTC to a rustc that has the sources of its library.\n\
                     Looked at:"
                )?;
                if rejected.is_empty() {
                    write!(f, "\n    no rustup nightly and no rustc in PATH")?;
                }
                rejected.iter().try_for_each(|line| write!(f, "\n    {line}"))
            }
            Self::NamedCompiler { rustc, reason } => write!(
                f,
                "LOCKSTEP_DEVICE_RUSTC={}: {reason}. Name another rustc, or unset the variable to search for one.",
                rustc.display()
            ),
            Self::Compile { target, output } => {
                write!(f, "the GPU kernels do not compile for {target}:\n{}", output.trim_end())
            }
            Self::Ptx { target, faults } => {
                write!(f, "the PTX for {target} cannot be used:")?;
                faults.iter().try_for_each(|fault| write!(f, "\n    {fault}"))
            }
            Self::Manifest { line, reason } => write!(f, "PTX manifest, line {line}: {reason}"),
            Self::Ptxas(reason) | Self::Source(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
