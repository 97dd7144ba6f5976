//! One word for everything that an answer's bits depend on beside the request.

use std::path::Path;

use host::device::contract;
use host::model::Model;
use sha2::{Digest, Sha256};

/// The files of a model folder that change answers, beside the weights.
const FILES: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// A digest of the weights, the tokenizer and template, this program's sources, compiler and GPU kernels, the version of the
/// numeric contract, and the device's name. Two answers to one request under one fingerprint are equal.
pub(crate) fn fingerprint(model: &Model, folder: &Path, kernels: &[&str]) -> String {
    let mut parts: Vec<Vec<u8>> = vec![
        env!("CARGO_PKG_VERSION").into(),
        env!("LOCKSTEP_BUILD").into(),
        contract::VERSION.to_le_bytes().to_vec(),
        model.device().name().into(),
        model.device().kernel_image().unwrap_or_default().into(),
        model.fingerprint().to_vec(),
    ];
    parts.extend(kernels.iter().map(|ptx| ptx.as_bytes().to_vec()));
    // A file that is not there is an empty part.
    parts.extend(FILES.iter().map(|name| std::fs::read(folder.join(name)).unwrap_or_default()));
    digest(&parts)
}

/// Lengths go in too, so that moving bytes from one part to the next is a change.
fn digest(parts: &[Vec<u8>]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let bytes = hash.finalize();
    bytes.iter().take(8).fold("fp_".to_string(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_and_any_boundary_matters() {
        let of = |parts: &[&str]| digest(&parts.iter().map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>());
        let base = of(&["ab", "c"]);
        assert_eq!(base, of(&["ab", "c"]));
        assert_eq!(base.len(), 3 + 16);
        for other in [&["ab", "d"][..], &["a", "bc"], &["abc", ""], &["ab", "c", ""]] {
            assert_ne!(base, of(other), "{other:?}");
        }
    }
}
