//! One safetensors file: mapped, its header read and checked against the file's size.

use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::device::FileMap;
use crate::model::ModelError;

/// The length of the header comes first, in this many bytes.
const LENGTH_BYTES: usize = 8;
/// Headers above this are not read; the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A mapped file.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    map: FileMap,
    header_bytes: usize,
}

/// A line of a file's header; `bytes` counts from the end of the header.
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<Listed>), ModelError> {
        let map = FileMap::open(path).map_err(|error| {
            let path = path.to_path_buf();
            match error.kind() {
                ErrorKind::NotFound => {
                    ModelError::FileMissing { path, advice: "fetch the model's safetensors files into this folder" }
                }
                _ => ModelError::Unreadable { path, reason: error.to_string() },
            }
        })?;
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| header_error(path, &map, &error))?;
        let mut listed: Vec<Listed> = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| Listed {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: info.data_offsets.0..info.data_offsets.1,
            })
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((Self { path: path.to_path_buf(), map, header_bytes }, listed))
    }

    /// The whole file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The header, its length included.
    pub(super) fn header(&self) -> &[u8] {
        self.map.get(..LENGTH_BYTES + self.header_bytes).unwrap_or(&[])
    }

    /// A tensor's content; the reader of the header has checked that every range lies in the file.
    pub(super) fn content(&self, range: &Range<usize>) -> &[u8] {
        let start = LENGTH_BYTES + self.header_bytes;
        self.map.get(start + range.start..start + range.end).unwrap_or(&[])
    }
}

/// The reader's complaint, told apart by what the user has to do.
fn header_error(path: &Path, bytes: &[u8], error: &SafeTensorError) -> ModelError {
    let path = path.to_path_buf();
    let found_bytes = bytes.len() as u64;
    if bytes.starts_with(b"version https://git-lfs") {
        let reason = "it is a Git LFS pointer, not the weights; run `git lfs pull`".into();
        return ModelError::BadSafetensors { path, reason };
    }
    match error {
        SafeTensorError::HeaderTooSmall => {
            return ModelError::Truncated { path, expected_bytes: LENGTH_BYTES as u64, found_bytes };
        }
        SafeTensorError::InvalidHeaderLength | SafeTensorError::MetadataIncompleteBuffer => {
            let expected_bytes = announced_bytes(bytes);
            if let Some(expected_bytes) = expected_bytes.filter(|expected| *expected > found_bytes) {
                return ModelError::Truncated { path, expected_bytes, found_bytes };
            }
            if expected_bytes.is_some() {
                let reason = "there are bytes after its last tensor, or its header lists a name twice".into();
                return ModelError::BadSafetensors { path, reason };
            }
        }
        _ => {}
    }
    ModelError::BadSafetensors { path, reason: format!("{error}; fetch it again") }
}

/// Bytes the file must have: the whole of it where the header is readable, else at least the header.
fn announced_bytes(bytes: &[u8]) -> Option<u64> {
    let length = u64::from_le_bytes(bytes.get(..LENGTH_BYTES)?.try_into().ok()?);
    let header_end = LENGTH_BYTES as u64 + Some(length).filter(|length| *length <= MAX_HEADER_BYTES)?;
    let Some(header) = bytes.get(LENGTH_BYTES..usize::try_from(header_end).ok()?) else { return Some(header_end) };
    let metadata: Metadata = serde_json::from_slice(header).ok()?;
    header_end.checked_add(metadata.data_len() as u64)
}
