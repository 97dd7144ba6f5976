//! Text to token ids and back, for a model folder.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::Detokenizer;
use super::token_bytes::{Plan, TokenBytes};

/// Why a tokenizer could not be loaded or a text not encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is not there or cannot be read.
    #[error(
        "cannot read {path}: {source}. A model folder holds config.json, tokenizer.json, tokenizer_config.json, \
         generation_config.json and *.safetensors, as published on model hubs; check --model"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not JSON.
    #[error("{path} is not valid JSON: {source}; fetch the file again")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// `tokenizer.json` is JSON, but not a tokenizer that is understood.
    #[error(
        "{path} is not a tokenizer that can be used: {reason}; fetch the file again, or convert it with transformers"
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The vocabulary cannot express the text.
    #[error("the text cannot be encoded: {reason}")]
    Encode {
        /// Why.
        reason: String,
    },
}

/// A tokenizer and the special tokens of its model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// None where tokens cannot be decoded one by one.
    pub(super) pieces: Option<(Plan, TokenBytes)>,
    special: HashSet<u32>,
    vocab_size: usize,
    eos_ids: Vec<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where present, `generation_config.json`, `config.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`TokenizerError`]; it names the file.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
        // Asked first, for an error with a line and a column.
        if let Err(source) = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes) {
            return Err(TokenizerError::Json { path, source });
        }
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| TokenizerError::Invalid { path: path.clone(), reason: e.to_string() })?;
        let tokenizer_config = read_json(&folder.join("tokenizer_config.json"))?;
        let generation_config = read_json(&folder.join("generation_config.json"))?;
        let config = read_json(&folder.join("config.json"))?;

        let mut this = Self::new(inner, Vec::new());
        let token = |name: &str| tokenizer_config.as_ref().and_then(|c| token_text(c.get(name)?));
        this.bos_token = token("bos_token");
        this.eos_token = token("eos_token");
        let ids = |file: &Option<Value>| file.as_ref().map(eos_ids_of).unwrap_or_default();
        let mut eos_ids = ids(&generation_config);
        if eos_ids.is_empty() {
            eos_ids = ids(&config);
        }
        eos_ids.extend(this.eos_token.as_deref().and_then(|t| this.token_to_id(t)));
        let mut seen = HashSet::new();
        eos_ids.retain(|id| seen.insert(*id));
        this.eos_ids = eos_ids;
        Ok(this)
    }

    /// A tokenizer that is already built.
    #[must_use]
    pub fn new(mut inner: tokenizers::Tokenizer, eos_ids: Vec<u32>) -> Self {
        // Some published files carry the settings of their training; a prompt is never cut or padded here.
        inner.with_padding(None);
        // Fails for a stride that is too long only, and there is none.
        let _ = inner.with_truncation(None);
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let special =
            inner.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let plan = inner.get_decoder().and_then(|d| Plan::from_decoder(&serde_json::to_value(d).ok()?));
        let pieces = plan.map(|plan| {
            let ids = 0..u32::try_from(vocab_size).unwrap_or(u32::MAX);
            let table =
                TokenBytes::new(ids.map(|id| inner.id_to_token(id).map(|t| plan.bytes_of(&t)).unwrap_or_default()));
            (plan, table)
        });
        Self { inner, pieces, special, vocab_size, eos_ids, bos_token: None, eos_token: None }
    }

    /// The ids of `text`. `add_special_tokens` adds what the model's template puts around a plain text (often a
    /// beginning-of-sequence token); a rendered chat has them already.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] for a text that the vocabulary has no tokens for.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        self.inner
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| TokenizerError::Encode { reason: e.to_string() })
    }

    /// The text of `ids`, as a stream would have given it.
    #[must_use]
    pub fn decode(self: &Arc<Self>, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut detokenizer = Detokenizer::new(Arc::clone(self), skip_special_tokens);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.flush());
        text
    }

    /// The library's own decoder over all ids at once.
    pub(super) fn decode_at_once(&self, ids: &[u32]) -> String {
        // The decoders in use have no failing case.
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// The bytes a token stands for, special tokens included. Several tokens may share one character.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.pieces {
            Some((_, table)) => table.get(id).to_vec(),
            None => self.id_to_token(id).unwrap_or_default().into_bytes(),
        }
    }

    /// One more than the largest id. A model's own vocabulary may be padded beyond.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact spelling in the vocabulary.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's spelling in the vocabulary.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether the token is a mark of the model's format and no text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Tokens that end an answer.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The beginning-of-sequence token's text.
    #[must_use]
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// The end-of-sequence token's text.
    #[must_use]
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }
}

/// None for a file that is not there.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TokenizerError::Read { path: path.to_owned(), source }),
    };
    serde_json::from_slice(&text).map(Some).map_err(|source| TokenizerError::Json { path: path.to_owned(), source })
}

/// A token in `tokenizer_config.json`: a string, or an object with `content`.
pub(super) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `eos_token_id`: a number or a list of them.
fn eos_ids_of(config: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 3, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}"#;

    struct Folder(PathBuf);

    impl Folder {
        fn new(files: &[(&str, &str)]) -> Self {
            let path = std::env::temp_dir().join(format!("lockstep-tokenizer-{}", uuid::Uuid::new_v4()));
            std::fs::create_dir(&path).unwrap();
            for (name, text) in files {
                std::fs::write(path.join(name), text).unwrap();
            }
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_folder_gives_tokens_and_the_ids_that_end_an_answer() {
        let folder = Folder::new(&[
            ("tokenizer.json", TOKENIZER),
            ("tokenizer_config.json", r#"{"eos_token": {"content": "<end>"}, "bos_token": "a"}"#),
            ("generation_config.json", r#"{"eos_token_id": [1, 1]}"#),
            ("config.json", r#"{"eos_token_id": 0}"#),
        ]);
        let tokenizer = Arc::new(Tokenizer::load(&folder.0).unwrap());
        assert_eq!(tokenizer.eos_ids(), [1, 3]);
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("a"), Some("<end>")));
        assert_eq!(tokenizer.encode("abba<end>", true).unwrap(), [2, 1, 0, 3]);
        assert_eq!(tokenizer.decode(&[2, 3, 0], true), "aba");
        assert_eq!(tokenizer.decode(&[2, 3, 0], false), "ab<end>a");
        assert_eq!((tokenizer.vocab_size(), tokenizer.token_bytes(3)), (4, b"<end>".to_vec()));
        assert_eq!(tokenizer.token_bytes(4), b"");

        std::fs::remove_file(folder.0.join("generation_config.json")).unwrap();
        assert_eq!(Tokenizer::load(&folder.0).unwrap().eos_ids(), [0, 3]);
    }

    #[test]
    fn errors_name_the_file() {
        let error = |files: &[(&str, &str)]| Tokenizer::load(&Folder::new(files).0).err().unwrap().to_string();
        let missing = error(&[]);
        assert!(missing.contains("tokenizer.json") && missing.contains("--model"), "{missing}");
        let broken = error(&[("tokenizer.json", "{\n  \"a\": 1,,")]);
        assert!(broken.contains("tokenizer.json") && broken.contains("line 2"), "{broken}");
        let other = error(&[("tokenizer.json", r#"{"a": 1}"#)]);
        assert!(other.contains("not a tokenizer"), "{other}");
        let config = error(&[("tokenizer.json", TOKENIZER), ("config.json", "[")]);
        assert!(config.contains("config.json"), "{config}");
    }
}
