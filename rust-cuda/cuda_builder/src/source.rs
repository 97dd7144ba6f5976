//! The kernel sources: a hash that tells whether PTX was made from them, and the kernels they declare.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::Error;

/// The SHA-256 of `bytes`, in hexadecimal.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Which files decide the PTX: paths relative to one root, whole folders or single files, less exceptions.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    root: PathBuf,
    included: Vec<String>,
    excluded: Vec<String>,
}

impl Sources {
    /// No file yet, below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), included: Vec::new(), excluded: Vec::new() }
    }

    /// Adds a file, or a folder with all that is in it.
    #[must_use]
    pub fn include(mut self, path: &str) -> Self {
        self.included.push(path.to_owned());
        self
    }

    /// Leaves out a file, or a folder with all that is in it: code that never reaches the GPU.
    #[must_use]
    pub fn exclude(mut self, path: &str) -> Self {
        self.excluded.push(path.to_owned());
        self
    }

    /// The included files and folders as paths, for `cargo::rerun-if-changed`.
    pub fn watched(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.included.iter().map(|path| self.root.join(path))
    }

    /// Every file, by its path relative to the root with `/` between the names.
    ///
    /// # Errors
    /// An included path is missing or cannot be read.
    pub fn files(&self) -> Result<BTreeMap<String, PathBuf>, Error> {
        let mut found = BTreeMap::new();
        for path in &self.included {
            self.collect(path, &mut found)?;
        }
        Ok(found)
    }

    fn collect(&self, relative: &str, found: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
        if self.excluded.iter().any(|excluded| excluded == relative) {
            return Ok(());
        }
        let path = self.root.join(relative);
        if !fs::metadata(&path).map_err(Error::io("read", &path))?.is_dir() {
            found.insert(relative.to_owned(), path);
            return Ok(());
        }
        for entry in fs::read_dir(&path).map_err(Error::io("list", &path))? {
            let name = entry.map_err(Error::io("list", &path))?.file_name();
            self.collect(&format!("{relative}/{}", name.to_string_lossy()), found)?;
        }
        Ok(())
    }

    /// SHA-256 over the files in the order of their names: name, length, content. Line ends count as LF, so that
    /// a checkout that turns them into CRLF is the same source.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn hash(&self) -> Result<String, Error> {
        let mut hasher = Sha256::new();
        for (name, path) in self.files()? {
            let content = without_carriage_returns(fs::read(&path).map_err(Error::io("read", &path))?);
            hasher.update(name.as_bytes());
            hasher.update([0]);
            hasher.update((content.len() as u64).to_le_bytes());
            hasher.update(&content);
        }
        Ok(hex(&hasher.finalize()))
    }
}

/// Turns CRLF into LF.
fn without_carriage_returns(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut kept = 0;
    for read in 0..bytes.len() {
        if bytes[read] != b'\r' || bytes.get(read + 1) != Some(&b'\n') {
            bytes[kept] = bytes[read];
            kept += 1;
        }
    }
    bytes.truncate(kept);
    bytes
}

/// The kernels that the Rust files under `folder` declare: the function below each `#[kernel]` attribute, with its place.
///
/// It reads lines, not Rust, so that it owes nothing to the macro it is a check on: the attribute stands at the start
/// of a line, and the function's name is written out. In a `macro_rules!` whose function is called `$something`, each
/// use of the macro in the same file is a kernel, named by its first argument.
///
/// # Errors
/// A file cannot be read, an attribute has no function, a macro has no use, or two kernels share a name.
pub fn declared_kernels(folder: &Path) -> Result<BTreeMap<String, String>, Error> {
    Ok(declared(folder)?.into_iter().map(|(kernel, (place, _))| (kernel, place)).collect())
}

/// The parameters of every kernel that [`declared_kernels`] finds: name, and how many parameters of the PTX it is (2 for
/// the pointer and length of a buffer).
///
/// # Errors
/// As there.
pub fn declared_parameters(folder: &Path) -> Result<BTreeMap<String, Vec<(String, usize)>>, Error> {
    Ok(declared(folder)?.into_iter().map(|(kernel, (_, parameters))| (kernel, parameters)).collect())
}

/// Place and parameters.
type Declared = (String, Vec<(String, usize)>);

fn declared(folder: &Path) -> Result<BTreeMap<String, Declared>, Error> {
    let sources = Sources::new(folder.parent().unwrap_or(folder));
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut kernels = BTreeMap::new();
    for (file, path) in sources.include(&name).files()? {
        if !file.ends_with(".rs") {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
        for (index, line) in lines.iter().enumerate() {
            if !["#[kernel", "#[cuda_std::kernel"].iter().any(|attribute| line.starts_with(attribute)) {
                continue;
            }
            let function = (index..lines.len()).find(|at| function_name(lines[*at]).is_some()).unwrap_or(index);
            let of_function = parameters(&lines[function..]);
            let found = match function_name(lines[function]) {
                Some("") => macro_uses(&lines, index),
                Some(function) => vec![(index, function)],
                None => Vec::new(),
            };
            if found.is_empty() {
                let place = format!("{file}:{}", index + 1);
                return Err(Error::Source(format!("{place}: no function with a name follows #[kernel]")));
            }
            for (line, function) in found {
                let place = format!("{file}:{}", line + 1);
                if let Some((other, _)) = kernels.insert(function.to_owned(), (place.clone(), of_function.clone())) {
                    return Err(Error::Source(format!("kernel {function} is declared twice: {other} and {place}")));
                }
            }
        }
    }
    Ok(kernels)
}

/// The parameters of the function whose text starts with these lines.
fn parameters(lines: &[&str]) -> Vec<(String, usize)> {
    let mut text = String::new();
    for line in lines {
        text.push_str(line.split("//").next().unwrap_or(""));
        if text.contains(')') {
            break;
        }
    }
    let list = text.split_once('(').map_or("", |(_, rest)| rest.split(')').next().unwrap_or(""));
    let words = |ty: &str| if ["In<", "Out<", "InOut<"].iter().any(|name| ty.starts_with(name)) { 2 } else { 1 };
    let one = |text: &str| text.split_once(':').map(|(name, ty)| (name.trim().to_owned(), words(ty.trim())));
    list.split(',').filter_map(one).collect()
}

/// The uses of the macro that line `inside` belongs to: line and first argument.
fn macro_uses<'a>(lines: &[&'a str], inside: usize) -> Vec<(usize, &'a str)> {
    let Some(definition) = lines[..inside].iter().rev().find_map(|line| line.strip_prefix("macro_rules! ")) else {
        return Vec::new();
    };
    let name = identifier(definition);
    let arguments = |line: &&'a str| line.strip_prefix(name)?.strip_prefix("!(").map(identifier);
    let uses = lines.iter().enumerate().filter_map(|(index, line)| Some((index, arguments(line)?)));
    uses.filter(|(_, argument)| !argument.is_empty()).collect()
}

/// The identifier that a text starts with; empty when it starts with something else.
fn identifier(text: &str) -> &str {
    &text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())]
}

/// The name in a line that starts a function; empty when it is not a plain identifier (`$name` of a macro).
fn function_name(line: &str) -> Option<&str> {
    if line.starts_with("//") {
        return None;
    }
    let at = if line.starts_with("fn ") { 3 } else { line.find(" fn ")? + 4 };
    Some(identifier(line[at..].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::tests::scratch;

    #[test]
    fn sha256_of_abc_is_the_published_one() {
        // FIPS 180-4, the example of one block.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex(b"abc"), expected);
    }

    #[test]
    fn one_byte_a_new_file_or_a_new_name_changes_the_hash_and_excluded_files_do_not() {
        let root = scratch("source-hash");
        fs::create_dir_all(root.join("a/src/cpu")).unwrap();
        fs::write(root.join("a/src/lib.rs"), "fn x() {}\n").unwrap();
        fs::write(root.join("a/src/cpu/run.rs"), "1").unwrap();
        let hash = || Sources::new(&*root).include("a/src").exclude("a/src/cpu").hash().unwrap();
        let first = hash();
        assert_eq!(first, hash());

        fs::write(root.join("a/src/cpu/run.rs"), "2").unwrap();
        assert_eq!(first, hash(), "an excluded file counted");
        fs::write(root.join("a/src/lib.rs"), "fn x() {}\r\n").unwrap();
        assert_eq!(first, hash(), "line ends counted");

        fs::write(root.join("a/src/lib.rs"), "fn y() {}\n").unwrap();
        assert_ne!(first, hash());
        fs::write(root.join("a/src/lib.rs"), "fn x() {}\n").unwrap();
        fs::write(root.join("a/src/b.rs"), "").unwrap();
        let with_b = hash();
        assert_ne!(first, with_b, "an empty file did not count");
        fs::rename(root.join("a/src/b.rs"), root.join("a/src/c.rs")).unwrap();
        assert_ne!(with_b, hash(), "a name did not count");
    }

    #[test]
    fn a_missing_source_is_an_error() {
        let error = Sources::new(&*scratch("source-missing")).include("nowhere").hash().unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }

    #[test]
    fn kernels_are_found_by_their_attribute() {
        let root = scratch("source-kernels");
        fs::create_dir_all(root.join("src/sub")).unwrap();
        let text = "/// `#[kernel]` in prose does not count.\n// #[kernel]\nuse cuda_std::kernel;\n\
                    #[kernel(block = 256)]\n// a fn in a comment\n#[allow(unused)]\npub unsafe fn scale_row(x: u32) {}\n\
                    fn not_a_kernel() {}\n";
        fs::write(root.join("src/lib.rs"), text).unwrap();
        fs::write(root.join("src/sub/copy.rs"), "    #[cuda_std::kernel(\n        block = 32\n    )]\nfn copy() {}")
            .unwrap();
        let kernels = declared_kernels(&root.join("src")).unwrap();
        let found: Vec<_> = kernels.iter().map(|(name, place)| (name.as_str(), place.as_str())).collect();
        assert_eq!(found, [("copy", "src/sub/copy.rs:1"), ("scale_row", "src/lib.rs:4")]);

        fs::write(root.join("src/twice.rs"), "#[kernel(block = 1)]\nfn copy() {}").unwrap();
        assert!(declared_kernels(&root.join("src")).unwrap_err().to_string().contains("declared twice"));
        fs::write(root.join("src/twice.rs"), "#[kernel(block = 1)]\nfn $name() {}").unwrap();
        assert!(declared_kernels(&root.join("src")).unwrap_err().to_string().contains("twice.rs:1: no function"));

        let text =
            "macro_rules! sized {\n($name:ident, $n:literal) => {\n#[kernel(block = 32)]\npub fn $name() {}\n};\n}\n";
        fs::write(root.join("src/twice.rs"), text).unwrap();
        assert!(declared_kernels(&root.join("src")).unwrap_err().to_string().contains("twice.rs:3: no function"));
        fs::write(root.join("src/twice.rs"), format!("{text}sized!(sum_32, 1);\nsized!(sum_64, 2);\n")).unwrap();
        let kernels = declared_kernels(&root.join("src")).unwrap();
        assert_eq!((kernels.len(), kernels["sum_64"].as_str()), (4, "src/twice.rs:8"));

        let with_parameters =
            text.replace("$name()", "$name(\n    x: In<bf16>, // :\n    out: InOut<f32>,\n    n: u32,\n)");
        fs::write(root.join("src/twice.rs"), format!("{with_parameters}sum!();\nsized!(sum_32, 1);\n")).unwrap();
        let parameters = declared_parameters(&root.join("src")).unwrap();
        assert_eq!(parameters["sum_32"], [("x".into(), 2), ("out".into(), 2), ("n".into(), 1)]);
        assert_eq!((parameters["copy"].len(), parameters["scale_row"].as_slice()), (0, &[("x".to_owned(), 1)][..]));
    }
}
