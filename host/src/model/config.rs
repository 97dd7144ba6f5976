//! What `config.json` and `generation_config.json` say, checked against what the kernels serve.
//!
//! Every field that changes the arithmetic is either understood or refused. The dtype fields are not read: the tensors
//! themselves say what they are, and [`Checkpoint`](super::Checkpoint) refuses any weight that is not bfloat16.

mod fields;

use std::path::{Path, PathBuf};

use self::fields::Fields;
use super::{ModelError, Rope, RopeScaling};

/// Head widths the attention kernels are built for.
pub const HEAD_WIDTHS: [usize; 4] = [32, 64, 96, 128];
/// Query heads per key-value head, at most.
pub const MAX_HEAD_RATIO: usize = 16;
/// Widths of linear layers are multiples of this: one step of the matrix instruction.
pub const WIDTH_MULTIPLE: usize = 16;
/// Layers, at most; a larger number is a damaged file.
const MAX_LAYERS: usize = 1024;

/// A family of models that differ in numbers only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `Qwen2ForCausalLM` (Qwen2, Qwen2.5): bias on query, key and value.
    Qwen2,
    /// `LlamaForCausalLM` (Llama 2 and 3, and what follows them): no bias.
    Llama,
}

impl Architecture {
    /// The name in `architectures`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }

    /// True when query, key and value projections have a bias.
    #[must_use]
    pub fn has_qkv_bias(self) -> bool {
        matches!(self, Self::Qwen2)
    }
}

/// A model's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Where this was read, for messages.
    pub path: PathBuf,
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key-value heads; divides `query_heads`.
    pub kv_heads: usize,
    /// Width of one head: one of [`HEAD_WIDTHS`].
    pub head_width: usize,
    /// Width between the two halves of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding; token ids are below it.
    pub vocab: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// How positions become angles.
    pub rope: Rope,
    /// Tokens that end an answer: those of `generation_config.json`, else those of `config.json`; may be empty.
    pub eos_ids: Vec<u32>,
    /// The token some tokenizers put first.
    pub bos_id: Option<u32>,
}

impl ModelConfig {
    /// Reads and checks the configuration of the model in `folder`.
    ///
    /// # Errors
    /// A file that is missing or malformed, and every setting that is not served; the message names it.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        if !folder.is_dir() {
            return Err(ModelError::FolderMissing { folder: folder.to_path_buf() });
        }
        let fields = Fields::read(folder.join("config.json"))?;
        let generation = Fields::read_optional(folder.join("generation_config.json"))?;
        let config = Self::from_fields(&fields, generation.as_ref())?;
        config.check(&fields)?;
        Ok(config)
    }

    /// Query rows plus key and value rows of the fused projection.
    #[must_use]
    pub fn qkv_rows(&self) -> usize {
        (self.query_heads + 2 * self.kv_heads) * self.head_width
    }

    /// Width of all query heads together: the input of the output projection.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.query_heads * self.head_width
    }

    /// Width of all key heads together, which is that of all value heads.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_width
    }

    /// The context to serve: what was asked for, or all the model has.
    ///
    /// # Errors
    /// [`ModelError::ContextOutOfRange`] for 0 and for more than the model has.
    pub fn context_tokens(&self, asked: Option<usize>) -> Result<usize, ModelError> {
        match asked {
            None => Ok(self.max_positions),
            Some(asked) if (1..=self.max_positions).contains(&asked) => Ok(asked),
            Some(asked) => Err(ModelError::ContextOutOfRange { asked, limit: self.max_positions }),
        }
    }

    fn from_fields(fields: &Fields, generation: Option<&Fields>) -> Result<Self, ModelError> {
        let architecture = architecture(fields)?;
        refuse_unserved(fields, architecture)?;
        let hidden = fields.count("hidden_size")?;
        let query_heads = fields.count("num_attention_heads")?;
        let head_width = match fields.optional_count("head_dim")? {
            Some(width) => width,
            None if hidden.is_multiple_of(query_heads) => hidden / query_heads,
            None => {
                let reason = format!("is {hidden}, which {query_heads} heads do not divide; give `head_dim`");
                return Err(fields.bad("hidden_size", reason));
            }
        };
        let max_positions = fields.count("max_position_embeddings")?;
        let eos_ids = match generation.map(|generation| generation.token_ids("eos_token_id")).transpose()? {
            Some(ids) if !ids.is_empty() => ids,
            _ => fields.token_ids("eos_token_id")?,
        };
        Ok(Self {
            path: fields.path().to_path_buf(),
            architecture,
            hidden,
            layers: fields.count("num_hidden_layers")?,
            query_heads,
            kv_heads: kv_heads(fields, architecture, query_heads)?,
            head_width,
            ffn: fields.count("intermediate_size")?,
            vocab: fields.count("vocab_size")?,
            rms_norm_eps: fields.positive("rms_norm_eps")? as f32,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            max_positions,
            rope: rope(fields, max_positions)?,
            eos_ids,
            bos_id: fields.token_ids("bos_token_id")?.first().copied(),
        })
    }

    /// The limits of the kernels.
    fn check(&self, fields: &Fields) -> Result<(), ModelError> {
        if self.layers > MAX_LAYERS {
            return Err(fields.unsupported(&format!("{} layers", self.layers), "at most 1024 layers"));
        }
        if !HEAD_WIDTHS.contains(&self.head_width) {
            return Err(
                fields.unsupported(&format!("head width {}", self.head_width), "head widths 32, 64, 96 and 128")
            );
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) || self.query_heads / self.kv_heads > MAX_HEAD_RATIO {
            let what = format!("{} query heads over {} key-value heads", self.query_heads, self.kv_heads);
            return Err(fields.unsupported(&what, "a whole number of 1 to 16 query heads per key-value head"));
        }
        for (name, width) in [("hidden_size", self.hidden), ("intermediate_size", self.ffn)] {
            if !width.is_multiple_of(WIDTH_MULTIPLE) {
                return Err(fields.unsupported(&format!("{name} {width}"), "multiples of 16"));
            }
        }
        for id in self.eos_ids.iter().chain(&self.bos_id) {
            if *id as usize >= self.vocab {
                let reason =
                    format!("is {id}, outside the vocabulary of {} (see also generation_config.json)", self.vocab);
                return Err(fields.bad("eos_token_id or bos_token_id", reason));
            }
        }
        Ok(())
    }
}

/// By `architectures`, else by `model_type`.
fn architecture(fields: &Fields) -> Result<Architecture, ModelError> {
    const SUPPORTED: &str = "Qwen2ForCausalLM and LlamaForCausalLM";
    if let Some(name) = fields.first_text("architectures")? {
        return match name {
            "Qwen2ForCausalLM" => Ok(Architecture::Qwen2),
            "LlamaForCausalLM" => Ok(Architecture::Llama),
            other => Err(fields.unsupported(&format!("architecture {other}"), SUPPORTED)),
        };
    }
    match fields.text("model_type")? {
        Some("qwen2") => Ok(Architecture::Qwen2),
        Some("llama") => Ok(Architecture::Llama),
        Some(other) => Err(fields.unsupported(&format!("model_type {other}"), SUPPORTED)),
        None => Err(fields.bad("architectures", "is missing, and so is `model_type`: what kind of model is this?")),
    }
}

/// Settings that would change the arithmetic and are not served.
fn refuse_unserved(fields: &Fields, architecture: Architecture) -> Result<(), ModelError> {
    if let Some(activation) = fields.text("hidden_act")?
        && activation != "silu"
    {
        return Err(fields.unsupported(&format!("hidden_act {activation}"), "silu"));
    }
    if fields.has("quantization_config") {
        return Err(fields.unsupported("quantization_config", "unquantized bfloat16 weights"));
    }
    if fields.flag("use_sliding_window")? == Some(true) {
        return Err(fields.unsupported("use_sliding_window true", "full attention in every layer"));
    }
    if let Some(kind) = fields.texts("layer_types")?.into_iter().find(|kind| *kind != "full_attention") {
        return Err(fields.unsupported(&format!("layer type {kind}"), "full_attention in every layer"));
    }
    if architecture == Architecture::Llama {
        for (field, supported) in
            [("attention_bias", "Llama without attention bias"), ("mlp_bias", "Llama without feed-forward bias")]
        {
            if fields.flag(field)? == Some(true) {
                return Err(fields.unsupported(&format!("{field} true"), supported));
            }
        }
    }
    Ok(())
}

fn kv_heads(fields: &Fields, architecture: Architecture, query_heads: usize) -> Result<usize, ModelError> {
    match (fields.optional_count("num_key_value_heads")?, architecture) {
        (Some(heads), _) => Ok(heads),
        // Llama files from before grouped queries lack the field, and mean one key-value head per query head.
        (None, Architecture::Llama) => Ok(query_heads),
        (None, Architecture::Qwen2) => Err(fields.bad("num_key_value_heads", "is missing")),
    }
}

/// Both spellings: `rope_parameters` with everything in it, and `rope_theta` beside `rope_scaling`.
fn rope(fields: &Fields, max_positions: usize) -> Result<Rope, ModelError> {
    const SUPPORTED: &str = "rope types default, linear and llama3";
    let inner = match fields.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => fields.object("rope_parameters")?,
    };
    let inner_theta = inner.as_ref().map(|inner| inner.optional_positive("rope_theta")).transpose()?.flatten();
    let theta = match inner_theta {
        Some(theta) => theta,
        // The files of the first Llama models lack the base; it is 10000 by definition of the format.
        None => fields.optional_positive("rope_theta")?.unwrap_or(10_000.0),
    } as f32;
    for part in inner.iter().chain([fields]) {
        if part.optional_positive("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
            return Err(part.unsupported("partial_rotary_factor", "rotary embedding over the whole head"));
        }
    }
    let Some(inner) = inner else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
    let kind = match inner.text("rope_type")? {
        Some(kind) => Some(kind),
        None => inner.text("type")?,
    };
    let scaling = match kind.unwrap_or("default") {
        "default" if inner.has_object_inside() => {
            return Err(inner.unsupported("rope parameters per layer type", SUPPORTED));
        }
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: inner.positive("factor")? },
        "llama3" => llama3(fields, &inner, max_positions)?,
        other => return Err(inner.unsupported(&format!("rope type {other}"), SUPPORTED)),
    };
    Ok(Rope { theta, scaling })
}

fn llama3(fields: &Fields, inner: &Fields, max_positions: usize) -> Result<RopeScaling, ModelError> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let original = match fields.optional_count(ORIGINAL)? {
        Some(count) => count,
        None => inner.optional_count(ORIGINAL)?.unwrap_or(max_positions),
    };
    let low_freq_factor = inner.positive("low_freq_factor")?;
    let high_freq_factor = inner.positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(inner.bad("high_freq_factor", "must be greater than `low_freq_factor`"));
    }
    Ok(RopeScaling::Llama3 {
        factor: inner.positive("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_positions: u32::try_from(original).unwrap_or(u32::MAX),
    })
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
