//! Small model folders for tests, written the way transformers 5.23 writes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder that is removed when dropped, and what will be written to it.
pub(crate) struct TestFolder {
    folder: TempDir,
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, TestTensor>,
}

#[derive(Clone)]
pub(crate) struct TestTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl TestTensor {
    /// Every element is the two bytes of `mark`, so that pieces can be told apart.
    pub(crate) fn bf16(shape: &[usize], mark: u16) -> Self {
        let count: usize = shape.iter().product();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), bytes: mark.to_le_bytes().repeat(count) }
    }
}

impl TestFolder {
    /// Two layers, hidden 64, 2 query heads over 1, head width 32, ffn 48, vocab 20; biased and tied.
    pub(crate) fn qwen2() -> Self {
        let config = json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 48, "vocab_size": 20, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
            "tie_word_embeddings": true, "use_sliding_window": false, "sliding_window": null, "bos_token_id": null,
            "layer_types": ["full_attention", "full_attention"], "eos_token_id": 3,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        });
        Self::new(config, true, false)
    }

    /// The same sizes without bias, with a head of its own and Llama 3 scaling in the older spelling.
    pub(crate) fn llama() -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "hidden_act": "silu", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 48, "vocab_size": 20, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "tie_word_embeddings": false, "attention_bias": false,
            "mlp_bias": false, "bos_token_id": 1, "eos_token_id": [2, 5], "rope_theta": 500000.0,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        });
        Self::new(config, false, true)
    }

    fn new(config: Value, bias: bool, head: bool) -> Self {
        let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![20, 64])];
        for layer in 0..2 {
            let mut push = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            push("input_layernorm.weight", &[64]);
            for (name, rows) in [("q", 64), ("k", 32), ("v", 32)] {
                push(&format!("self_attn.{name}_proj.weight"), &[rows, 64]);
                if bias {
                    push(&format!("self_attn.{name}_proj.bias"), &[rows]);
                }
            }
            push("self_attn.o_proj.weight", &[64, 64]);
            push("post_attention_layernorm.weight", &[64]);
            push("mlp.gate_proj.weight", &[48, 64]);
            push("mlp.up_proj.weight", &[48, 64]);
            push("mlp.down_proj.weight", &[64, 48]);
        }
        shapes.push(("model.norm.weight".into(), vec![64]));
        if head {
            shapes.push(("lm_head.weight".into(), vec![20, 64]));
        }
        let mark = |index: usize| 0x3f80 + u16::try_from(index).unwrap();
        let tensors = shapes
            .into_iter()
            .enumerate()
            .map(|(index, (name, shape))| (name, TestTensor::bf16(&shape, mark(index))))
            .collect();
        Self { folder: tempfile::tempdir().unwrap(), config, tensors }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The two bytes of every element of this tensor.
    pub(crate) fn mark(&self, name: &str) -> [u8; 2] {
        self.tensors[name].bytes[..2].try_into().unwrap()
    }

    pub(crate) fn set(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    pub(crate) fn remove(mut self, field: &str) -> Self {
        self.config.as_object_mut().unwrap().remove(field);
        self
    }

    pub(crate) fn write_config(self) -> Self {
        std::fs::write(self.file("config.json"), serde_json::to_vec_pretty(&self.config).unwrap()).unwrap();
        self
    }

    pub(crate) fn write(self) -> Self {
        let folder = self.write_config();
        folder.write_shard("model.safetensors", |_| true);
        folder
    }

    /// Layer 1 in the second shard, everything else in the first, and the index.
    pub(crate) fn write_sharded(self) -> Self {
        let folder = self.write_config();
        let in_second = |name: &str| name.contains("layers.1.");
        folder.write_shard("model-00001-of-00002.safetensors", |name| !in_second(name));
        folder.write_shard("model-00002-of-00002.safetensors", in_second);
        let map: BTreeMap<&String, String> = folder
            .tensors
            .keys()
            .map(|name| (name, format!("model-0000{}-of-00002.safetensors", 1 + usize::from(in_second(name)))))
            .collect();
        folder.write_index(&json!({"metadata": {"total_size": 1}, "weight_map": map}));
        folder
    }

    pub(crate) fn write_index(&self, index: &Value) {
        std::fs::write(self.file("model.safetensors.index.json"), serde_json::to_vec(index).unwrap()).unwrap();
    }

    pub(crate) fn write_shard(&self, name: &str, keep: impl Fn(&str) -> bool) {
        let views = self.tensors.iter().filter(|(name, _)| keep(name)).map(|(name, tensor)| {
            (name.clone(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
        });
        std::fs::write(self.file(name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
}
