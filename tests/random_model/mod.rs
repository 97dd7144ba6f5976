//! Model folders with random weights, of any size.

use std::path::Path;

use half::bf16;
use host::testing::TestRng;

/// Tokens of the vocabulary.
const VOCAB: usize = 272;
const LAYERS: usize = 2;

/// The sizes of a model of two layers, with two KV heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) head_width: usize,
    pub(crate) ffn: usize,
}

impl Sizes {
    /// Writes `config.json` and `model.safetensors`, the same for the same sizes.
    pub(crate) fn write(self, folder: &Path) {
        let Self { hidden, heads, head_width, ffn } = self;
        let (attended, cached) = (heads * head_width, 2 * head_width);
        let config = serde_json::json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": hidden, "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": 2,
            "head_dim": head_width, "intermediate_size": ffn, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024, "tie_word_embeddings": true, "use_sliding_window": false,
            "bos_token_id": null, "eos_token_id": 258, "rope_theta": 10000.0,
        });
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..LAYERS {
            let mut tensor = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                tensor(&format!("{norm}.weight"), &[hidden]);
            }
            for (name, rows) in [("q", attended), ("k", cached), ("v", cached)] {
                tensor(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
                tensor(&format!("self_attn.{name}_proj.bias"), &[rows]);
            }
            tensor("self_attn.o_proj.weight", &[hidden, attended]);
            tensor("mlp.gate_proj.weight", &[ffn, hidden]);
            tensor("mlp.up_proj.weight", &[ffn, hidden]);
            tensor("mlp.down_proj.weight", &[hidden, ffn]);
        }
        // A safetensors file: the length of its header, the header, the values.
        let (mut header, mut bytes) = (serde_json::Map::new(), Vec::<u8>::new());
        let mut rng = TestRng::new(61);
        for (name, shape) in &shapes {
            let (start, inputs) = (bytes.len(), *shape.last().unwrap() as f32);
            for value in rng.bf16s(shape.iter().product()) {
                // Layers keep the magnitude of what they are given; gains and biases are small numbers as they are.
                let scale = if shape.len() == 1 { 1.0 } else { (3.0 / inputs).sqrt() };
                bytes.extend(bf16::from_f32(value.to_f32() * scale).to_le_bytes());
            }
            let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, bytes.len()]});
            header.insert(name.clone(), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes].concat();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
        std::fs::write(folder.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    }
}
