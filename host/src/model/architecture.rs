//! Which tensor of a checkpoint is which weight of the transformer.
//!
//! An adapter says what a family calls each [`Role`]; the shape follows from the role and the configuration. [`weights`]
//! looks every tensor up, checks dtype and shape, refuses tensors nobody asked for, and hands out the weights in the pieces
//! the device holds: query, key and value as one matrix, gate and up as another. Nothing is copied; a piece is the list of
//! its parts, top to bottom, so that loading can upload part by part.

mod llama;
mod qwen2;

use std::collections::BTreeSet;

use super::{Architecture, Checkpoint, ModelConfig, ModelError, TensorView};

/// A weight's place in the transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `[vocab, hidden]`, row `t` is token `t`.
    Embedding,
    /// `[hidden]`, the scale of the RMSNorm after the last layer.
    FinalNorm,
    /// `[vocab, hidden]`, residual stream to logits.
    Head,
    /// A weight of a layer.
    Layer(usize, LayerRole),
}

/// A weight's place in a layer. Matrices are `[outputs, inputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerRole {
    /// `[hidden]`, before attention.
    InputNorm,
    /// `[query_width, hidden]`.
    Query,
    /// `[kv_width, hidden]`.
    Key,
    /// `[kv_width, hidden]`.
    Value,
    /// `[query_width]`.
    QueryBias,
    /// `[kv_width]`.
    KeyBias,
    /// `[kv_width]`.
    ValueBias,
    /// `[hidden, query_width]`.
    Output,
    /// `[hidden]`, before the feed-forward network.
    PostNorm,
    /// `[ffn, hidden]`, the half that goes through SiLU.
    Gate,
    /// `[ffn, hidden]`, the half it multiplies.
    Up,
    /// `[hidden, ffn]`.
    Down,
}

impl Role {
    /// The shape the configuration implies.
    #[must_use]
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let (hidden, ffn) = (config.hidden, config.ffn);
        match self {
            Self::Embedding | Self::Head => vec![config.vocab, hidden],
            Self::FinalNorm | Self::Layer(_, LayerRole::InputNorm | LayerRole::PostNorm) => vec![hidden],
            Self::Layer(_, LayerRole::Query) => vec![config.query_width(), hidden],
            Self::Layer(_, LayerRole::Key | LayerRole::Value) => vec![config.kv_width(), hidden],
            Self::Layer(_, LayerRole::QueryBias) => vec![config.query_width()],
            Self::Layer(_, LayerRole::KeyBias | LayerRole::ValueBias) => vec![config.kv_width()],
            Self::Layer(_, LayerRole::Output) => vec![hidden, config.query_width()],
            Self::Layer(_, LayerRole::Gate | LayerRole::Up) => vec![ffn, hidden],
            Self::Layer(_, LayerRole::Down) => vec![hidden, ffn],
        }
    }
}

/// What the checkpoint of this family calls the role.
#[must_use]
pub fn tensor_name(architecture: Architecture, role: Role) -> String {
    match architecture {
        Architecture::Qwen2 => qwen2::tensor_name(role),
        Architecture::Llama => llama::tensor_name(role),
    }
}

/// One weight as the device holds it: bfloat16, `[rows, columns]`, row-major, the parts' rows one after the other.
#[derive(Clone, Debug)]
pub struct Weight<'a> {
    /// The parts, top to bottom; all of them have `columns` columns.
    pub parts: Vec<TensorView<'a>>,
    /// Rows of all parts together; of a vector, its length.
    pub rows: usize,
    /// Columns; of a vector, 1.
    pub columns: usize,
}

impl Weight<'_> {
    /// Bytes of all parts together.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }

    /// Numbers of all parts together.
    #[must_use]
    pub fn element_count(&self) -> usize {
        self.rows * self.columns
    }

    /// Widened to f32, in order. For vectors; a matrix would take twice its bytes.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        self.parts.iter().flat_map(|part| part.bf16_values().map(f32::from)).collect()
    }
}

/// The weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerWeights<'a> {
    /// `[hidden]`.
    pub input_norm: Weight<'a>,
    /// Query, key, value: `[query_width + 2 * kv_width, hidden]`.
    pub qkv: Weight<'a>,
    /// Their biases in the same order, where the architecture has them.
    pub qkv_bias: Option<Weight<'a>>,
    /// `[hidden, query_width]`.
    pub output: Weight<'a>,
    /// `[hidden]`.
    pub post_norm: Weight<'a>,
    /// Gate above up: `[2 * ffn, hidden]`.
    pub gate_up: Weight<'a>,
    /// `[hidden, ffn]`.
    pub down: Weight<'a>,
}

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    /// `[vocab, hidden]`.
    pub embedding: Weight<'a>,
    /// One entry per layer, first to last.
    pub layers: Vec<LayerWeights<'a>>,
    /// `[hidden]`.
    pub final_norm: Weight<'a>,
    /// `[vocab, hidden]`; `None` when the embedding is the head.
    pub head: Option<Weight<'a>>,
}

impl<'a> Weights<'a> {
    /// Every piece, in the order the transformer uses them.
    pub fn pieces(&self) -> impl Iterator<Item = &Weight<'a>> {
        let layers = self.layers.iter().flat_map(|layer| {
            let before = [&layer.input_norm, &layer.qkv];
            let after = [&layer.output, &layer.post_norm, &layer.gate_up, &layer.down];
            before.into_iter().chain(&layer.qkv_bias).chain(after)
        });
        [&self.embedding].into_iter().chain(layers).chain([&self.final_norm]).chain(&self.head)
    }

    /// Bytes to upload: the total of a progress display.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.pieces().map(Weight::byte_len).sum()
    }
}

/// Finds and checks every weight of the model.
///
/// # Errors
/// A tensor that is missing, of another dtype or shape, or that the architecture does not know; a stored head that differs
/// from the embedding although the configuration ties them.
pub fn weights<'a>(config: &ModelConfig, checkpoint: &'a Checkpoint) -> Result<Weights<'a>, ModelError> {
    let finder = Finder { config, checkpoint };
    let embedding = finder.piece(&[Role::Embedding])?;
    let layers = (0..config.layers).map(|layer| finder.layer(layer)).collect::<Result<Vec<_>, _>>()?;
    let final_norm = finder.piece(&[Role::FinalNorm])?;
    let head = if config.tie_word_embeddings {
        finder.check_tied_head(&embedding)?;
        None
    } else {
        Some(finder.piece(&[Role::Head])?)
    };
    let weights = Weights { embedding, layers, final_norm, head };
    finder.refuse_unexpected(&weights)?;
    Ok(weights)
}

struct Finder<'a, 'c> {
    config: &'c ModelConfig,
    checkpoint: &'a Checkpoint,
}

impl<'a> Finder<'a, '_> {
    fn name(&self, role: Role) -> String {
        tensor_name(self.config.architecture, role)
    }

    fn piece(&self, roles: &[Role]) -> Result<Weight<'a>, ModelError> {
        let mut piece = Weight { parts: Vec::with_capacity(roles.len()), rows: 0, columns: 1 };
        for role in roles {
            let shape = role.shape(self.config);
            piece.parts.push(self.checkpoint.weight(&self.name(*role), &shape)?);
            piece.rows += shape.first().copied().unwrap_or(0);
            piece.columns = shape.get(1).copied().unwrap_or(1);
        }
        Ok(piece)
    }

    fn layer(&self, layer: usize) -> Result<LayerWeights<'a>, ModelError> {
        use LayerRole as L;
        let piece = |roles: &[LayerRole]| {
            let roles: Vec<Role> = roles.iter().map(|role| Role::Layer(layer, *role)).collect();
            self.piece(&roles)
        };
        let has_bias = self.config.architecture.has_qkv_bias();
        Ok(LayerWeights {
            input_norm: piece(&[L::InputNorm])?,
            qkv: piece(&[L::Query, L::Key, L::Value])?,
            qkv_bias: has_bias.then(|| piece(&[L::QueryBias, L::KeyBias, L::ValueBias])).transpose()?,
            output: piece(&[L::Output])?,
            post_norm: piece(&[L::PostNorm])?,
            gate_up: piece(&[L::Gate, L::Up])?,
            down: piece(&[L::Down])?,
        })
    }

    /// Some writers store a tied head a second time; then it must be the embedding.
    fn check_tied_head(&self, embedding: &Weight<'_>) -> Result<(), ModelError> {
        let name = self.name(Role::Head);
        if self.checkpoint.tensor(&name).is_none() {
            return Ok(());
        }
        let head = self.checkpoint.weight(&name, &Role::Head.shape(self.config))?;
        if embedding.parts.iter().any(|part| part.bytes != head.bytes) {
            return Err(ModelError::HeadNotTied { path: self.config.path.clone() });
        }
        Ok(())
    }

    fn refuse_unexpected(&self, weights: &Weights<'_>) -> Result<(), ModelError> {
        let head = self.name(Role::Head);
        let mut known: BTreeSet<&str> =
            weights.pieces().flat_map(|piece| piece.parts.iter().map(|part| part.name)).collect();
        known.insert(&head);
        let mut unknown = self.checkpoint.tensors().filter(|view| !known.contains(view.name) && !is_derived(view.name));
        let Some(first) = unknown.next() else { return Ok(()) };
        Err(ModelError::UnexpectedTensor {
            tensor: first.name.to_string(),
            path: first.path.to_path_buf(),
            architecture: self.config.architecture.name(),
            count: 1 + unknown.count(),
        })
    }
}

/// Tables that old writers stored although they follow from the configuration.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

#[cfg(test)]
#[path = "architecture_tests.rs"]
mod tests;
