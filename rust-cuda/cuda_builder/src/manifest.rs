//! What committed PTX says about itself: the sources and compiler it was made by, its files and its kernels.
//!
//! A text of lines, so that a change of it reads well in a diff:
//! ```text
//! # a comment
//! format 1
//! source 3f0c...
//! compiler rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8
//! target sm_80 ptx74 sm_80.ptx 91ab...
//! kernel scale block 256 params 8 4 4
//! ```

use std::fmt::Write as _;

use crate::{Entry, Error};

/// One PTX file that the manifest vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestTarget {
    /// The GPU, as in `sm_80`.
    pub cpu: String,
    /// The version of the PTX language, as in `ptx74`.
    pub isa: String,
    /// The file beside the manifest.
    pub file: String,
    /// The SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// One kernel, the same in every file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestKernel {
    /// The entry point's name.
    pub name: String,
    /// Threads per block that it is compiled for.
    pub block: u32,
    /// The size of each parameter in bytes, in order.
    pub param_bytes: Vec<u32>,
}

impl From<&Entry> for ManifestKernel {
    fn from(entry: &Entry) -> Self {
        Self { name: entry.name.clone(), block: entry.block.unwrap_or(0), param_bytes: entry.param_bytes.clone() }
    }
}

/// The manifest of a folder of PTX.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The hash of the sources, see [`crate::Sources::hash`].
    pub source: String,
    /// The compiler, see [`crate::Toolchain::version`].
    pub compiler: String,
    /// The files.
    pub targets: Vec<ManifestTarget>,
    /// The kernels, in the order of their names.
    pub kernels: Vec<ManifestKernel>,
}

impl Manifest {
    /// The name of the manifest in its folder.
    pub const FILE: &'static str = "manifest.txt";

    /// The manifest as text; [`Manifest::parse`] reads it back.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::from(
            "# Made by: cargo run -p lockstep-cuda-builder --bin ptx -- build\n\
             # The build uses this PTX while `source` is the hash of the kernel sources, and compiles otherwise.\n\
             format 1\n",
        );
        // Writing to a String cannot fail.
        let _ = writeln!(text, "source {}\ncompiler {}", self.source, self.compiler);
        for target in &self.targets {
            let _ = writeln!(text, "target {} {} {} {}", target.cpu, target.isa, target.file, target.sha256);
        }
        for kernel in &self.kernels {
            let _ = write!(text, "kernel {} block {} params", kernel.name, kernel.block);
            for bytes in &kernel.param_bytes {
                let _ = write!(text, " {bytes}");
            }
            text.push('\n');
        }
        text
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// A line is not one that [`Manifest::render`] writes, or the source, compiler or targets are missing.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut manifest = Self::default();
        let mut format = None;
        for (index, line) in text.lines().enumerate() {
            let fault = |reason: String| Error::Manifest { line: index + 1, reason };
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let fields: Vec<&str> = rest.split(' ').collect();
            match (word, fields.as_slice()) {
                ("format", ["1"]) => format = Some(1),
                ("source", [hash]) => manifest.source = (*hash).to_owned(),
                ("compiler", _) => manifest.compiler = rest.to_owned(),
                ("target", &[cpu, isa, file, sha256]) => manifest.targets.push(ManifestTarget {
                    cpu: cpu.to_owned(),
                    isa: isa.to_owned(),
                    file: file.to_owned(),
                    sha256: sha256.to_owned(),
                }),
                ("kernel", &[name, "block", block, "params", ref params @ ..]) => {
                    let number = |text: &str| text.parse::<u32>().map_err(|_| fault(format!("`{text}` is no number")));
                    manifest.kernels.push(ManifestKernel {
                        name: name.to_owned(),
                        block: number(block)?,
                        param_bytes: params.iter().map(|text| number(text)).collect::<Result<_, _>>()?,
                    });
                }
                _ => return Err(fault(format!("`{line}` is not a line this version knows"))),
            }
        }
        let missing = [
            ("format", format.is_none()),
            ("source", manifest.source.is_empty()),
            ("compiler", manifest.compiler.is_empty()),
            ("target", manifest.targets.is_empty()),
        ];
        match missing.iter().find(|(_, missing)| *missing) {
            Some((word, _)) => {
                Err(Error::Manifest { line: text.lines().count(), reason: format!("there is no `{word}` line") })
            }
            None => Ok(manifest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        Manifest {
            source: "ab12".into(),
            compiler: "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8".into(),
            targets: vec![
                ManifestTarget {
                    cpu: "sm_80".into(),
                    isa: "ptx74".into(),
                    file: "sm_80.ptx".into(),
                    sha256: "01".into(),
                },
                ManifestTarget {
                    cpu: "sm_90a".into(),
                    isa: "ptx80".into(),
                    file: "sm_90a.ptx".into(),
                    sha256: "02".into(),
                },
            ],
            kernels: vec![
                ManifestKernel { name: "nothing".into(), block: 1, param_bytes: vec![] },
                ManifestKernel { name: "scale".into(), block: 256, param_bytes: vec![8, 4, 4] },
            ],
        }
    }

    #[test]
    fn a_manifest_reads_back_as_it_was() {
        assert_eq!(Manifest::parse(&sample().render()).unwrap(), sample());
    }

    #[test]
    fn a_damaged_manifest_is_refused_with_its_line() {
        let text = sample().render();
        for (from, to, said) in [
            ("format 1", "format 2", "line 3: `format 2`"),
            ("source ab12\n", "", "no `source` line"),
            ("block 256", "block many", "`many` is no number"),
            ("target sm_80 ptx74", "target sm_80", "is not a line"),
            ("kernel scale", "kernels scale", "is not a line"),
        ] {
            assert!(text.contains(from), "{from} is not in the sample");
            let error = Manifest::parse(&text.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(said), "{from} -> {to}: {error}");
        }
    }
}
