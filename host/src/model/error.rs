//! Why a model folder cannot be loaded. Each message is one line that names the file or tensor and says what to do.

use std::path::PathBuf;

/// Why a model cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// There is no such folder.
    #[error("there is no model folder {}; give the path of a folder with config.json and *.safetensors", folder.display())]
    FolderMissing {
        /// What was asked for.
        folder: PathBuf,
    },
    /// A file that every model needs is not there.
    #[error("{} is missing: {advice}", path.display())]
    FileMissing {
        /// The file.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// The system could not read a file.
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A JSON file does not parse.
    #[error("{} is not valid JSON: {reason}; fetch it again", path.display())]
    BadJson {
        /// The file.
        path: PathBuf,
        /// Where it stops being JSON.
        reason: String,
    },
    /// A field of a JSON file is missing or has the wrong type or an impossible value.
    #[error("{}: `{field}` {reason}", path.display())]
    BadField {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model asks for something this program does not do.
    #[error("{}: {what} is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What would work.
        supported: &'static str,
    },
    /// A safetensors file is shorter than its header says.
    #[error(
        "{} is truncated: {found_bytes} bytes, its header needs {expected_bytes}; fetch it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes its header announces.
        expected_bytes: u64,
        /// Bytes it has.
        found_bytes: u64,
    },
    /// A file is not safetensors, or its header is damaged.
    #[error("{} is not a usable safetensors file: {reason}", path.display())]
    BadSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index names a shard that is not in the folder.
    #[error("{} names the shard {shard}, which is not in the folder; fetch that file", index.display())]
    ShardMissing {
        /// The index.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
    },
    /// The index says a tensor is in a shard that does not have it.
    #[error("{} says tensor {tensor} is in {shard}, but it is not; index and shards are of different models", index.display())]
    IndexMismatch {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard's file name.
        shard: String,
    },
    /// A tensor the architecture needs is in no file.
    #[error("tensor {tensor} is missing from {}; the checkpoint is incomplete or of another architecture", folder.display())]
    TensorMissing {
        /// The tensor.
        tensor: String,
        /// The folder.
        folder: PathBuf,
    },
    /// A tensor's numbers are of a type that is not served.
    #[error(
        "tensor {tensor} in {} is {dtype}, but weights must be BF16; convert with transformers: \
         AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).save_pretrained(NEW_FOLDER)",
        path.display()
    )]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// Its type, as the file spells it.
        dtype: String,
    },
    /// A tensor's shape is not what the configuration implies.
    #[error(
        "tensor {tensor} in {} has shape {found:?}, but config.json implies {expected:?}; \
         config.json and weights are of different models",
        path.display()
    )]
    WrongShape {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// What the configuration implies.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A tensor is in two files.
    #[error("tensor {tensor} is both in {} and in {}; remove the file that does not belong", first.display(), second.display())]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// A file that has it.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// A tensor that the architecture has no use for: ignoring it could change the model's answers.
    #[error("tensor {tensor} in {} is unknown to {architecture} ({count} such in all); the model is of another architecture", path.display())]
    UnexpectedTensor {
        /// The first such tensor in the order of names.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// The architecture that was expected.
        architecture: &'static str,
        /// How many there are.
        count: usize,
    },
    /// The head is said to be the embedding, and another one is stored.
    #[error(
        "{}: `tie_word_embeddings` is true, but lm_head.weight differs from the embedding; set it to false or remove lm_head.weight",
        path.display()
    )]
    HeadNotTied {
        /// The configuration.
        path: PathBuf,
    },
    /// A context longer than the model was made for.
    #[error("a context of {asked} tokens was asked for, but the model has between 1 and {limit}")]
    ContextOutOfRange {
        /// Tokens asked for.
        asked: usize,
        /// `max_position_embeddings`.
        limit: usize,
    },
}

impl ModelError {
    /// A stable code for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::FolderMissing { .. } | Self::FileMissing { .. } | Self::ShardMissing { .. } => "MODEL_NOT_FOUND",
            Self::Unreadable { .. } => "MODEL_UNREADABLE",
            Self::BadJson { .. } | Self::BadField { .. } | Self::HeadNotTied { .. } => "MODEL_CONFIG_INVALID",
            Self::Unsupported { .. } | Self::UnexpectedTensor { .. } | Self::WrongDtype { .. } => "MODEL_UNSUPPORTED",
            Self::Truncated { .. }
            | Self::BadSafetensors { .. }
            | Self::IndexMismatch { .. }
            | Self::TensorMissing { .. }
            | Self::WrongShape { .. }
            | Self::DuplicateTensor { .. } => "MODEL_WEIGHTS_INVALID",
            Self::ContextOutOfRange { .. } => "CONTEXT_OUT_OF_RANGE",
        }
    }
}
