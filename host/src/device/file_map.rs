//! A file mapped into memory, read-only: weights are uploaded from the page cache without a second copy in memory.
//! The one place of the host that maps files.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

/// The bytes of a file. The file must not be shortened or rewritten in place while it is mapped: the system then ends
/// the process (SIGBUS) or the bytes change. Replacing it by rename is fine.
#[derive(Debug)]
pub struct FileMap {
    /// `None` for an empty file, which cannot be mapped everywhere.
    map: Option<Mmap>,
}

impl FileMap {
    /// Maps the whole file.
    ///
    /// # Errors
    /// What the system says when the file cannot be opened or mapped; a folder is refused.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is private to this value, read-only and never handed out as mutable, and it lives as
        // long as the slices borrowed from it. That nobody shortens or rewrites the file meanwhile is the documented
        // condition of this type; a process cannot enforce it.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Some(map) })
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_the_bytes_of_a_file_and_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, b"one two").unwrap();
        assert_eq!(&*FileMap::open(&path).unwrap(), b"one two");
        std::fs::write(folder.path().join("empty"), b"").unwrap();
        assert!(FileMap::open(&folder.path().join("empty")).unwrap().is_empty());
    }

    #[test]
    fn a_missing_file_and_a_folder_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(FileMap::open(&folder.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(FileMap::open(folder.path()).is_err());
    }
}
