//! The weights of a model folder: safetensors files, mapped, with a directory of all tensors.
//!
//! Either one `model.safetensors`, or the shards that `model.safetensors.index.json` names. Nothing is copied: a
//! [`TensorView`] borrows the mapped file. The files must not be rewritten in place while the checkpoint lives.

mod shard;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use self::shard::Shard;
use super::ModelError;

/// The whole content enters the fingerprint up to this size; beyond it, a sample does.
const WHOLE_CONTENT_BYTES: u64 = 64 << 20;
/// Blocks sampled from each file of a larger checkpoint, evenly spaced, the first and the last byte among them.
const SAMPLE_BLOCKS: u64 = 1024;
/// Bytes of a sampled block: a page.
const SAMPLE_BLOCK_BYTES: u64 = 4096;

/// The mapped weights of one model.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor in a mapped file: row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// The type of its numbers.
    pub dtype: Dtype,
    /// Lengths, slowest first.
    pub shape: &'a [usize],
    /// Its content. Aligned to nothing in particular.
    pub bytes: &'a [u8],
    /// The file it is in.
    pub path: &'a Path,
}

impl TensorView<'_> {
    /// The numbers of a bfloat16 tensor, in order.
    pub fn bf16_values(&self) -> impl Iterator<Item = bf16> {
        self.bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]))
    }
}

impl Checkpoint {
    /// Maps the weights of the model in `folder` and reads their directory.
    ///
    /// # Errors
    /// Missing, truncated and damaged files; an index that does not fit its shards; a tensor that is in two of them.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        if !folder.is_dir() {
            return Err(ModelError::FolderMissing { folder: folder.to_path_buf() });
        }
        let single = folder.join("model.safetensors");
        let index_path = folder.join("model.safetensors.index.json");
        if single.exists() {
            return Self::from_files(folder, &[single]);
        }
        if !index_path.exists() {
            return Err(ModelError::FileMissing { path: single, advice: advice_for_missing_weights(folder) });
        }
        let index = read_index(&index_path)?;
        let names: BTreeSet<&String> = index.values().collect();
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            files.push(shard_path(folder, &index_path, name)?);
        }
        let checkpoint = Self::from_files(folder, &files)?;
        checkpoint.check_index(&index_path, &index)?;
        Ok(checkpoint)
    }

    fn from_files(folder: &Path, files: &[PathBuf]) -> Result<Self, ModelError> {
        let mut shards: Vec<Shard> = Vec::with_capacity(files.len());
        let mut tensors: BTreeMap<String, Entry> = BTreeMap::new();
        for path in files {
            let (shard, listed) = Shard::open(path)?;
            for tensor in listed {
                let entry =
                    Entry { shard: shards.len(), dtype: tensor.dtype, shape: tensor.shape, bytes: tensor.bytes };
                if let Some(earlier) = tensors.insert(tensor.name.clone(), entry) {
                    let first = shards.get(earlier.shard).map_or_else(|| path.clone(), |shard| shard.path.clone());
                    return Err(ModelError::DuplicateTensor { tensor: tensor.name, first, second: path.clone() });
                }
            }
            shards.push(shard);
        }
        Ok(Self { folder: folder.to_path_buf(), shards, tensors })
    }

    fn check_index(&self, path: &Path, index: &BTreeMap<String, String>) -> Result<(), ModelError> {
        for (tensor, shard) in index {
            let found = self.tensor(tensor).and_then(|view| view.path.file_name());
            if found != Some(shard.as_ref()) {
                let (index, tensor, shard) = (path.to_path_buf(), tensor.clone(), shard.clone());
                return Err(ModelError::IndexMismatch { index, tensor, shard });
            }
        }
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        Some(self.view(name, entry))
    }

    /// All tensors in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|(name, entry)| self.view(name, entry))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorView<'a> {
        let shard = &self.shards[entry.shard];
        let bytes = shard.content(&entry.bytes);
        TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes, path: &shard.path }
    }

    /// A weight: the tensor of this name, which must be bfloat16 and of this shape.
    ///
    /// # Errors
    /// [`ModelError::TensorMissing`], [`ModelError::WrongDtype`], [`ModelError::WrongShape`].
    pub fn weight(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, ModelError> {
        let Some(view) = self.tensor(name) else {
            return Err(ModelError::TensorMissing { tensor: name.into(), folder: self.folder.clone() });
        };
        let (tensor, path) = (name.to_string(), view.path.to_path_buf());
        if view.dtype != Dtype::BF16 {
            return Err(ModelError::WrongDtype { tensor, path, dtype: view.dtype.to_string() });
        }
        if view.shape != shape {
            let (expected, found) = (shape.to_vec(), view.shape.to_vec());
            return Err(ModelError::WrongShape { tensor, path, expected, found });
        }
        Ok(view)
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// What tells these weights from others: the SHA-256 of every file's size and header, and of the whole content
    /// where the files have at most 64 MiB together. Of larger ones, 1024 evenly spaced blocks of 4 KiB per file are
    /// hashed instead, because reading gigabytes would delay every start. Training changes every block, so a
    /// checkpoint that was trained further or rounded otherwise has another fingerprint; one whose few bytes were changed by
    /// hand or by a bad disk may not.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let total_bytes: u64 = self.shards.iter().map(|shard| shard.bytes().len() as u64).sum();
        let whole = total_bytes <= WHOLE_CONTENT_BYTES;
        let mut hash = Sha256::new();
        hash.update(b"lockstep weights 1\n");
        for shard in &self.shards {
            let bytes = shard.bytes();
            hash.update((bytes.len() as u64).to_le_bytes());
            if whole {
                hash.update(bytes);
            } else {
                hash.update(shard.header());
                for block in sampled_blocks(bytes.len() as u64) {
                    hash.update(bytes.get(block.start as usize..block.end as usize).unwrap_or(&[]));
                }
            }
        }
        hash.finalize().into()
    }
}

/// At most [`SAMPLE_BLOCKS`] blocks of a file, evenly spaced, the first at its start and the last at its end.
fn sampled_blocks(file_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let last_start = file_bytes.saturating_sub(SAMPLE_BLOCK_BYTES);
    (0..SAMPLE_BLOCKS).map(move |block| {
        let start = (u128::from(last_start) * u128::from(block) / u128::from(SAMPLE_BLOCKS - 1)) as u64;
        start..(start + SAMPLE_BLOCK_BYTES).min(file_bytes)
    })
}

/// Tensor name to shard file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read(path)
        .map_err(|error| ModelError::Unreadable { path: path.to_path_buf(), reason: error.to_string() })?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| ModelError::BadJson { path: path.to_path_buf(), reason: error.to_string() })?;
    if index.weight_map.is_empty() {
        let (path, field) = (path.to_path_buf(), "weight_map".to_string());
        return Err(ModelError::BadField { path, field, reason: "names no tensor".into() });
    }
    Ok(index.weight_map)
}

/// The path of a shard, which must be a file of the folder itself: an index must not point elsewhere on the machine.
fn shard_path(folder: &Path, index: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let relative = Path::new(name);
    if relative.file_name() != Some(relative.as_os_str()) {
        let (path, field) = (index.to_path_buf(), "weight_map".to_string());
        return Err(ModelError::BadField { path, field, reason: format!("names {name:?}, which is not a file name") });
    }
    let path = folder.join(relative);
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(ModelError::ShardMissing { index: index.to_path_buf(), shard: name.to_string() })
        }
        Err(error) => Err(ModelError::Unreadable { path, reason: error.to_string() }),
    }
}

/// What to do when neither weights nor an index are there.
fn advice_for_missing_weights(folder: &Path) -> &'static str {
    let has = |suffix: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(suffix))
    };
    if has(".gguf") {
        "GGUF files are not read; fetch the model's safetensors files"
    } else if has(".bin") || has(".pth") || has(".pt") {
        "PyTorch pickles are not read; convert them with transformers: \
         AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).save_pretrained(NEW_FOLDER)"
    } else if has(".safetensors") {
        "the shards are there but model.safetensors.index.json is not; fetch it"
    } else {
        "fetch the model's safetensors files into this folder"
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
