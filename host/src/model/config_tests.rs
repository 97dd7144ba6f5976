//! Configurations as their writers write them, and one refusal for every setting that is not served.

use serde_json::{Value, json};

use super::*;
use crate::model::test_folder::TestFolder;

fn load(folder: TestFolder) -> Result<ModelConfig, ModelError> {
    ModelConfig::load(folder.write_config().path())
}

/// The refusal's text, which must name the file and be one line.
fn refusal(folder: TestFolder, code: &str) -> String {
    let error = load(folder).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.code(), code, "{text}");
    assert!(text.contains("config.json") && !text.contains('\n'), "{text}");
    text
}

fn refused(field: &str, value: Value, part: &str) {
    let text = refusal(TestFolder::llama().set(field, value), "MODEL_UNSUPPORTED");
    assert!(text.contains(part), "{text}");
}

fn invalid(folder: TestFolder, part: &str) {
    let text = refusal(folder, "MODEL_CONFIG_INVALID");
    assert!(text.contains(part), "{text}");
}

#[test]
fn reads_qwen2_with_rope_parameters() {
    let folder = TestFolder::qwen2();
    let path = folder.file("config.json");
    let folder = folder.write_config();
    let config = ModelConfig::load(folder.path()).unwrap();
    let expected = ModelConfig {
        path,
        architecture: Architecture::Qwen2,
        hidden: 64,
        layers: 2,
        query_heads: 2,
        kv_heads: 1,
        head_width: 32,
        ffn: 48,
        vocab: 20,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        max_positions: 128,
        rope: Rope { theta: 1_000_000.0, scaling: RopeScaling::None },
        eos_ids: vec![3],
        bos_id: None,
    };
    assert_eq!(config, expected);
    assert_eq!((config.qkv_rows(), config.query_width(), config.kv_width()), (128, 64, 32));
}

#[test]
fn reads_llama_with_rope_scaling() {
    let config = load(TestFolder::llama()).unwrap();
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };
    assert_eq!(config.rope, Rope { theta: 500_000.0, scaling });
    assert_eq!((config.architecture, config.tie_word_embeddings), (Architecture::Llama, false));
    assert_eq!((config.eos_ids, config.bos_id), (vec![2, 5], Some(1)));
}

#[test]
fn both_rope_spellings_mean_the_same() {
    let old = load(TestFolder::llama()).unwrap();
    let mut parameters = TestFolder::llama().config["rope_scaling"].clone();
    parameters["rope_theta"] = json!(500_000.0);
    let folder = TestFolder::llama().remove("rope_theta").remove("rope_scaling").set("rope_parameters", parameters);
    assert_eq!(load(folder).unwrap().rope, old.rope);
}

#[test]
fn the_plain_and_the_linear_rope_in_the_older_spelling() {
    let plain = TestFolder::llama().set("rope_scaling", Value::Null).set("rope_theta", json!(12345));
    assert_eq!(load(plain).unwrap().rope, Rope { theta: 12345.0, scaling: RopeScaling::None });
    let linear = TestFolder::llama().set("rope_scaling", json!({"type": "linear", "factor": 2.5})).remove("rope_theta");
    let expected = Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 2.5 } };
    assert_eq!(load(linear).unwrap().rope, expected);
}

#[test]
fn the_architecture_may_come_from_model_type() {
    let folder = TestFolder::qwen2().remove("architectures");
    assert_eq!(load(folder).unwrap().architecture, Architecture::Qwen2);
}

#[test]
fn llama_without_grouped_queries_and_head_width() {
    let folder = TestFolder::llama().remove("num_key_value_heads").remove("head_dim");
    let config = load(folder).unwrap();
    assert_eq!((config.kv_heads, config.head_width), (2, 32));
}

#[test]
fn a_head_width_of_its_own_is_taken() {
    let config = load(TestFolder::llama().set("head_dim", json!(128))).unwrap();
    assert_eq!((config.head_width, config.query_width()), (128, 256));
}

#[test]
fn generation_config_decides_where_answers_end() {
    let folder = TestFolder::qwen2().write_config();
    std::fs::write(folder.file("generation_config.json"), r#"{"eos_token_id": [7, 3], "temperature": 0.7}"#).unwrap();
    assert_eq!(ModelConfig::load(folder.path()).unwrap().eos_ids, vec![7, 3]);
    std::fs::write(folder.file("generation_config.json"), r#"{"eos_token_id": null}"#).unwrap();
    assert_eq!(ModelConfig::load(folder.path()).unwrap().eos_ids, vec![3]);
    std::fs::write(folder.file("generation_config.json"), r#"{"eos_token_id": "end"}"#).unwrap();
    let text = ModelConfig::load(folder.path()).unwrap_err().to_string();
    assert!(text.contains("generation_config.json") && text.contains("eos_token_id"), "{text}");
}

#[test]
fn a_context_is_at_most_what_the_model_has() {
    let config = load(TestFolder::qwen2()).unwrap();
    assert_eq!(config.context_tokens(None), Ok(128));
    assert_eq!(config.context_tokens(Some(128)), Ok(128));
    assert_eq!(config.context_tokens(Some(1)), Ok(1));
    for asked in [0, 129] {
        assert_eq!(config.context_tokens(Some(asked)).unwrap_err().code(), "CONTEXT_OUT_OF_RANGE");
    }
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    refused("architectures", json!(["MistralForCausalLM"]), "MistralForCausalLM");
    refused("hidden_act", json!("gelu"), "gelu");
    refused("attention_bias", json!(true), "attention_bias");
    refused("mlp_bias", json!(true), "mlp_bias");
    refused("use_sliding_window", json!(true), "use_sliding_window");
    refused("layer_types", json!(["full_attention", "sliding_attention"]), "sliding_attention");
    refused("quantization_config", json!({"quant_method": "awq"}), "quantization_config");
    refused("partial_rotary_factor", json!(0.5), "partial_rotary_factor");
    refused("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn");
    refused("rope_scaling", json!({"type": "dynamic", "factor": 4.0}), "dynamic");
    refused("rope_scaling", json!({"full_attention": {"rope_type": "linear", "factor": 2.0}}), "per layer type");
    refused("head_dim", json!(80), "32, 64, 96 and 128");
    refused("num_attention_heads", json!(17), "17 query heads over 1");
    refused("hidden_size", json!(72), "multiples of 16");
    refused("intermediate_size", json!(50), "multiples of 16");
    refused("num_hidden_layers", json!(1025), "1025 layers");
    let other = TestFolder::qwen2().remove("architectures").set("model_type", json!("gpt2"));
    assert!(refusal(other, "MODEL_UNSUPPORTED").contains("gpt2"));
    let uneven = TestFolder::llama().set("num_attention_heads", json!(3)).set("num_key_value_heads", json!(2));
    assert!(refusal(uneven, "MODEL_UNSUPPORTED").contains("3 query heads over 2"));
}

#[test]
fn every_field_that_is_needed_is_asked_for() {
    for field in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ] {
        invalid(TestFolder::qwen2().remove(field), &format!("`{field}` is missing"));
    }
    invalid(TestFolder::qwen2().remove("architectures").remove("model_type"), "`architectures` is missing");
    for field in ["factor", "low_freq_factor", "high_freq_factor"] {
        let mut folder = TestFolder::llama();
        folder.config["rope_scaling"].as_object_mut().unwrap().remove(field);
        invalid(folder, &format!("`rope_scaling.{field}` is missing"));
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    for value in [json!(0), json!(-1), json!(1.5), json!("64"), json!(1u64 << 40)] {
        invalid(TestFolder::qwen2().set("hidden_size", value), "`hidden_size` is");
    }
    invalid(TestFolder::qwen2().set("rms_norm_eps", json!(0)), "rms_norm_eps");
    invalid(TestFolder::qwen2().set("tie_word_embeddings", json!("yes")), "tie_word_embeddings");
    invalid(
        TestFolder::qwen2().set("num_attention_heads", json!(3)),
        "`hidden_size` is 64, which 3 heads do not divide",
    );
    invalid(TestFolder::qwen2().set("eos_token_id", json!(20)), "outside the vocabulary of 20");
    invalid(TestFolder::qwen2().set("architectures", json!("Qwen2ForCausalLM")), "list of texts");
    let mut folder = TestFolder::llama();
    folder.config["rope_scaling"]["high_freq_factor"] = json!(1.0);
    invalid(folder, "must be greater");
}

#[test]
fn missing_and_broken_files() {
    let folder = tempfile::tempdir().unwrap();
    let error = ModelConfig::load(&folder.path().join("nowhere")).unwrap_err();
    assert!(matches!(error, ModelError::FolderMissing { .. }), "{error}");
    let error = ModelConfig::load(folder.path()).unwrap_err();
    assert!(matches!(&error, ModelError::FileMissing { path, .. } if path.ends_with("config.json")), "{error}");
    for text in ["{\"hidden_size\": ", "[]", ""] {
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let error = ModelConfig::load(folder.path()).unwrap_err();
        assert!(matches!(error, ModelError::BadJson { .. }), "{error}");
    }
}
