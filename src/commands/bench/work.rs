//! What a step has to move and to compute at least, from the model's dimensions alone.

use host::model::ModelConfig;

/// Bytes of a weight, a key or a value: bf16.
const BYTES: f64 = 2.0;

/// The work of one model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// Parameters of all linear layers without the head.
    layers: f64,
    /// Parameters of the head.
    head: f64,
    /// Norms and biases.
    vectors: f64,
    /// Bytes of the keys and values of one token.
    token_bytes: f64,
    /// Operations of one query over one token of its context.
    pair_flops: f64,
}

impl Work {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let layers = config.layers as f64;
        let (hidden, query) = (config.hidden as f64, config.query_width() as f64);
        let (kv, qkv) = (config.kv_width() as f64, config.qkv_rows() as f64);
        let bias = if config.architecture.has_qkv_bias() { qkv } else { 0.0 };
        Self {
            layers: layers * hidden * (qkv + query + 3.0 * config.ffn as f64),
            head: config.vocab as f64 * hidden,
            vectors: layers * (2.0 * hidden + bias) + hidden,
            token_bytes: 2.0 * layers * kv * BYTES,
            // A product and a sum, for the score and for the value.
            pair_flops: 4.0 * layers * query,
        }
    }

    /// Bytes of a decode step: every weight once, and the keys and values of `batch` contexts of `context` tokens.
    pub(super) fn decode_bytes(&self, batch: usize, context: f64) -> f64 {
        (self.layers + self.head + self.vectors) * BYTES + batch as f64 * context * self.token_bytes
    }

    /// Operations of the prefill of one prompt with the logits of its last token: attention is causal.
    pub(super) fn prefill_flops(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        2.0 * tokens * self.layers + 2.0 * self.head + self.pair_flops * tokens * (tokens + 1.0) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen2.5-0.5B, whose card says 494,032,768 parameters with a tied head.
    fn qwen() -> Work {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896,
            "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
            "rope_theta": 1e6,
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        Work::new(&ModelConfig::load(folder.path()).unwrap())
    }

    #[test]
    fn a_decode_step_moves_every_parameter_once() {
        assert_eq!(qwen().decode_bytes(1, 0.0), 2.0 * 494_032_768.0);
        // 24 layers, keys and values, 2 heads of 64, 2 bytes.
        assert_eq!(qwen().decode_bytes(3, 10.0) - qwen().decode_bytes(3, 0.0), 30.0 * 12_288.0);
    }

    #[test]
    fn prefill_grows_with_the_square_of_the_prompt() {
        let near = |value: f64, expected: f64| assert!((value / expected - 1.0).abs() < 0.01, "{value} {expected}");
        // Counted by hand: 2.93 T in linear layers and 0.72 T in attention at 4096 tokens.
        near(qwen().prefill_flops(4096), 2.93e12 + 0.72e12);
        near(qwen().prefill_flops(1), 2.0 * 494e6);
    }
}
