//! Each weight is found under its name, in the order the device wants, and nothing unknown passes.

use safetensors::Dtype;
use serde_json::json;

use super::*;
use crate::model::test_folder::{TestFolder, TestTensor};

/// Loads what the folder holds and hands the outcome on.
fn with_weights<T>(folder: &TestFolder, then: impl FnOnce(Result<&Weights<'_>, ModelError>) -> T) -> T {
    let config = ModelConfig::load(folder.path()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let weights = weights(&config, &checkpoint);
    then(weights.as_ref().map_err(Clone::clone))
}

fn error_of(folder: &TestFolder) -> ModelError {
    with_weights(folder, |weights| weights.map(|_| ()).unwrap_err())
}

/// The bytes of all parts, as they will lie on the device.
fn bytes(weight: &Weight<'_>) -> Vec<u8> {
    weight.parts.iter().flat_map(|part| part.bytes.to_vec()).collect()
}

/// What the parts must be: so many elements of each named tensor's mark.
fn marks(folder: &TestFolder, parts: &[(&str, usize)]) -> Vec<u8> {
    parts.iter().flat_map(|(name, count)| folder.mark(name).repeat(*count)).collect()
}

#[test]
fn qwen2_pieces_are_fused_in_order_and_the_head_is_tied() {
    let folder = TestFolder::qwen2().write();
    with_weights(&folder, |weights| {
        let weights = weights.unwrap();
        assert!(weights.head.is_none());
        assert_eq!(weights.layers.len(), 2);
        let layer = &weights.layers[1];
        let name = |part: &str| format!("model.layers.1.{part}");
        let (q, k, v) =
            (name("self_attn.q_proj.weight"), name("self_attn.k_proj.weight"), name("self_attn.v_proj.weight"));
        let expected = marks(&folder, &[(&q, 64 * 64), (&k, 32 * 64), (&v, 32 * 64)]);
        assert_eq!((layer.qkv.rows, layer.qkv.columns, bytes(&layer.qkv)), (128, 64, expected));
        let (q, k, v) = (name("self_attn.q_proj.bias"), name("self_attn.k_proj.bias"), name("self_attn.v_proj.bias"));
        let bias = layer.qkv_bias.as_ref().unwrap();
        assert_eq!((bias.rows, bias.columns), (128, 1));
        assert_eq!(bytes(bias), marks(&folder, &[(&q, 64), (&k, 32), (&v, 32)]));
        assert_eq!(bias.to_f32().len(), 128);
        assert_eq!(bias.to_f32()[64], bf16_of(folder.mark(&k)));
        let (gate, up) = (name("mlp.gate_proj.weight"), name("mlp.up_proj.weight"));
        let expected = marks(&folder, &[(&gate, 48 * 64), (&up, 48 * 64)]);
        assert_eq!((layer.gate_up.rows, layer.gate_up.columns, bytes(&layer.gate_up)), (96, 64, expected));
        assert_eq!((layer.down.rows, layer.down.columns), (64, 48));
        assert_eq!(bytes(&layer.down), marks(&folder, &[(&name("mlp.down_proj.weight"), 64 * 48)]));
        assert_eq!(bytes(&layer.input_norm), marks(&folder, &[(&name("input_layernorm.weight"), 64)]));
        assert_eq!(bytes(&layer.post_norm), marks(&folder, &[(&name("post_attention_layernorm.weight"), 64)]));
        assert_eq!(bytes(&layer.output), marks(&folder, &[(&name("self_attn.o_proj.weight"), 64 * 64)]));
        assert_eq!(bytes(&weights.final_norm), marks(&folder, &[("model.norm.weight", 64)]));
        assert_eq!(bytes(&weights.embedding), marks(&folder, &[("model.embed_tokens.weight", 20 * 64)]));
        let total: usize = folder.tensors.values().map(|tensor| tensor.bytes.len()).sum();
        assert_eq!(weights.byte_len(), total);
    });
}

fn bf16_of(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

#[test]
fn llama_has_a_head_of_its_own_and_no_bias_from_shards_too() {
    for folder in [TestFolder::llama().write(), TestFolder::llama().write_sharded()] {
        with_weights(&folder, |weights| {
            let weights = weights.unwrap();
            assert!(weights.layers.iter().all(|layer| layer.qkv_bias.is_none()));
            let head = weights.head.as_ref().unwrap();
            assert_eq!((head.rows, head.columns), (20, 64));
            assert_eq!(bytes(head), marks(&folder, &[("lm_head.weight", 20 * 64)]));
            let parts: usize = weights.pieces().map(|piece| piece.parts.len()).sum();
            assert_eq!(parts, folder.tensors.len());
        });
    }
}

#[test]
fn every_tensor_is_needed() {
    let names: Vec<String> = TestFolder::llama().tensors.into_keys().collect();
    for name in names {
        let mut folder = TestFolder::llama();
        folder.tensors.remove(&name);
        let error = error_of(&folder.write());
        assert!(matches!(&error, ModelError::TensorMissing { tensor, .. } if *tensor == name), "{error}");
    }
}

#[test]
fn every_tensor_is_checked_for_dtype_and_shape() {
    let names: Vec<String> = TestFolder::qwen2().tensors.into_keys().collect();
    for name in names {
        let mut folder = TestFolder::qwen2();
        folder.tensors.get_mut(&name).unwrap().dtype = Dtype::F16;
        let error = error_of(&folder.write());
        assert!(matches!(&error, ModelError::WrongDtype { tensor, .. } if *tensor == name), "{error}");

        let mut folder = TestFolder::qwen2();
        let tensor = folder.tensors.get_mut(&name).unwrap();
        tensor.shape.reverse();
        tensor.shape.insert(0, 1);
        let error = error_of(&folder.write());
        assert!(matches!(&error, ModelError::WrongShape { tensor, .. } if *tensor == name), "{error}");
    }
}

#[test]
fn unknown_tensors_are_refused_but_stored_rotary_tables_are_not() {
    let mut folder = TestFolder::llama();
    let table = TestTensor { dtype: Dtype::F32, shape: vec![16], bytes: vec![0; 64] };
    folder.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), table);
    with_weights(&folder.write(), |weights| assert!(weights.is_ok()));

    let mut folder = TestFolder::llama();
    for name in ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias"] {
        folder.tensors.insert(name.into(), TestTensor::bf16(&[64], 0));
    }
    let error = error_of(&folder.write());
    let ModelError::UnexpectedTensor { tensor, count, architecture, .. } = &error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), *count), ("model.layers.0.self_attn.q_norm.weight", 2));
    assert_eq!(*architecture, "LlamaForCausalLM");
}

#[test]
fn fewer_layers_in_the_configuration_than_in_the_file_is_refused() {
    let folder = TestFolder::llama().set("num_hidden_layers", json!(1)).write();
    let error = error_of(&folder);
    assert!(matches!(&error, ModelError::UnexpectedTensor { tensor, .. } if tensor.contains("layers.1.")), "{error}");
}

#[test]
fn a_tied_head_stored_twice_must_be_the_embedding() {
    let mut folder = TestFolder::qwen2();
    let embedding = folder.tensors["model.embed_tokens.weight"].clone();
    folder.tensors.insert("lm_head.weight".into(), embedding.clone());
    with_weights(&folder.write(), |weights| assert!(weights.unwrap().head.is_none()));

    let mut folder = TestFolder::qwen2();
    let mut other = embedding;
    *other.bytes.last_mut().unwrap() ^= 1;
    folder.tensors.insert("lm_head.weight".into(), other);
    let error = error_of(&folder.write());
    assert!(matches!(error, ModelError::HeadNotTied { .. }), "{error}");
}

#[test]
fn an_untied_configuration_needs_a_head() {
    let folder = TestFolder::qwen2().set("tie_word_embeddings", json!(false)).write();
    let error = error_of(&folder);
    assert!(matches!(&error, ModelError::TensorMissing { tensor, .. } if tensor == "lm_head.weight"), "{error}");
}
