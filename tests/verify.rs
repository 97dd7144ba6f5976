//! The self-test of the numeric contract, on the models that ship with the repository.
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod devices;

use std::path::Path;
use std::sync::Arc;

use half::bf16;
use host::device::{CpuOptions, Device, LinearBackend};
use host::model::{DecodeWay, Model};
use host::testing::TestRng;
use host::verify::{self, Goldens, Line};

fn all_lines_hold(device: &Device, folder: &str) {
    every_line(device, &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder));
}

fn every_line(device: &Device, folder: &Path) -> Vec<Line> {
    let model = Arc::new(Model::load(device, folder, Some(512), &mut |_, _| {}).unwrap());
    let mut lines = Vec::new();
    let all = verify::full(&model, &mut |line| lines.push(line.clone())).unwrap();
    let failed: Vec<_> = lines.iter().filter(|line| !line.holds).collect();
    assert!(all && failed.is_empty(), "{failed:#?}");
    assert!(lines.len() >= 10, "{} lines", lines.len());
    lines
}

/// Random weights, narrow and deep: the attention output and the down projection are both cut in four segments.
fn write_narrow_deep_model(folder: &Path) {
    const HIDDEN: usize = 128;
    const DEEP: usize = 2048;
    const VOCAB: usize = 272;
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": DEEP / 128, "num_key_value_heads": 2,
        "head_dim": 128, "intermediate_size": DEEP, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024, "tie_word_embeddings": true, "use_sliding_window": false,
        "bos_token_id": null, "eos_token_id": 258, "rope_theta": 10000.0,
    });
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..2 {
        let mut tensor = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensor(&format!("{norm}.weight"), &[HIDDEN]);
        }
        for (name, rows) in [("q", DEEP), ("k", 256), ("v", 256)] {
            tensor(&format!("self_attn.{name}_proj.weight"), &[rows, HIDDEN]);
            tensor(&format!("self_attn.{name}_proj.bias"), &[rows]);
        }
        tensor("self_attn.o_proj.weight", &[HIDDEN, DEEP]);
        tensor("mlp.gate_proj.weight", &[DEEP, HIDDEN]);
        tensor("mlp.up_proj.weight", &[DEEP, HIDDEN]);
        tensor("mlp.down_proj.weight", &[HIDDEN, DEEP]);
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

/// Prefill, chunks and decode steps of a model whose layers are cut.
fn a_model_in_segments_keeps_the_contract(device: &Device) {
    let folder = tempfile::tempdir().unwrap();
    write_narrow_deep_model(folder.path());
    let lines = every_line(device, folder.path());
    for layer in ["attention output [128, 2048] in 4 segments", "down [128, 2048] in 4 segments"] {
        assert!(lines.iter().any(|line| line.claim.starts_with(layer)), "{layer}: {lines:#?}");
    }
}

#[test]
fn a_model_in_segments_keeps_the_contract_on_the_cpu() {
    a_model_in_segments_keeps_the_contract(&devices::cpu());
}

#[test]
#[ignore = "needs a GPU"]
fn a_model_in_segments_keeps_the_contract_on_the_gpu() {
    let device = devices::cuda();
    for backend in [LinearBackend::CublasLt, LinearBackend::Kernel] {
        device.set_linear_backend(backend);
        a_model_in_segments_keeps_the_contract(&device);
    }
}

#[test]
fn the_demo_model_keeps_the_contract_on_the_cpu() {
    all_lines_hold(&devices::cpu(), "models/demo");
}

/// The steps of a GPU, run by the executor.
#[test]
fn every_way_of_decoding_keeps_its_bits_on_a_cpu_like_a_gpu() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let model = Model::load(&devices::cpu_like_a_gpu(), &folder, Some(512), &mut |_, _| {}).unwrap();
    let way = |rows| model.decode_way(rows);
    assert_eq!([1, 9].map(way), [Some(DecodeWay::Few), Some(DecodeWay::Tiles)]);
    let check = |rows: &[usize], ways: usize| {
        let lines = verify::decode_ways(&model, rows).unwrap();
        assert!(lines.len() == ways && lines.iter().all(|line| line.holds), "{lines:#?}");
    };
    check(&[1, 3, 8, 9, 18], 2);
    model.give_up(DecodeWay::Few);
    assert_eq!([1, 9].map(way), [Some(DecodeWay::Tiles); 2]);
    check(&[2], 1);
    model.give_up(DecodeWay::Tiles);
    assert_eq!([1, 9].map(way), [Some(DecodeWay::Recorded); 2]);
    check(&[2, 9], 1);
    model.give_up(DecodeWay::Recorded);
    assert_eq!([1, 9].map(way), [None; 2]);
    assert!(verify::decode_ways(&model, &[1]).unwrap().is_empty(), "nothing is left to be in doubt");
}

#[test]
#[ignore = "needs a GPU"]
fn every_small_model_keeps_the_contract_on_the_gpu() {
    let device = devices::cuda();
    all_lines_hold(&device, "models/demo");
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all_lines_hold(&device, path.to_str().unwrap());
        }
    }
}

fn golden_digests_hold(device: &Device) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let goldens = Goldens::read(&root.join("tests/golden/digests.json")).unwrap();
    let model = Arc::new(Model::load(device, &root.join("models/demo"), Some(512), &mut |_, _| {}).unwrap());
    let lines = goldens.check(&model, "demo").unwrap();
    assert!(lines.len() >= 4 && lines.iter().all(|line| line.holds), "{lines:#?}");
    // A model of which nothing is recorded.
    assert!(goldens.check(&model, "other").unwrap().iter().all(|line| !line.holds));
}

#[test]
fn the_demo_model_answers_as_it_did_on_the_cpu() {
    golden_digests_hold(&devices::cpu());
}

#[test]
fn the_number_of_threads_is_not_in_the_golden_digests() {
    golden_digests_hold(&Device::cpu(CpuOptions { threads: 3, ..CpuOptions::default() }).unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn the_demo_model_answers_as_it_did_on_this_kind_of_gpu() {
    golden_digests_hold(&devices::cuda());
}
