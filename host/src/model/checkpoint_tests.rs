//! Whole and sharded checkpoints, and every way in which their files can be wrong.

use serde_json::json;

use super::*;
use crate::model::test_folder::TestFolder;

const EMBEDDING: &str = "model.embed_tokens.weight";

fn open_error(folder: &TestFolder) -> ModelError {
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

#[test]
fn a_single_file_gives_its_tensors() {
    let folder = TestFolder::qwen2().write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.tensors().count(), folder.tensors.len());
    for (name, tensor) in &folder.tensors {
        let view = checkpoint.weight(name, &tensor.shape).unwrap();
        assert_eq!((view.bytes, view.shape), (&tensor.bytes[..], &tensor.shape[..]), "{name}");
    }
    let bytes: usize = folder.tensors.values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(checkpoint.content_bytes(), bytes as u64);
    assert!(checkpoint.tensor("model.norm").is_none());
}

#[test]
fn shards_give_the_same_tensors_as_one_file() {
    let whole = TestFolder::llama().write();
    let sharded = TestFolder::llama().write_sharded();
    let (whole, sharded) = (Checkpoint::open(whole.path()).unwrap(), Checkpoint::open(sharded.path()).unwrap());
    let content = |checkpoint: &Checkpoint| -> Vec<(String, Vec<u8>)> {
        checkpoint.tensors().map(|view| (view.name.to_string(), view.bytes.to_vec())).collect()
    };
    assert_eq!(content(&whole), content(&sharded));
    let shard = sharded.tensor("model.layers.1.mlp.up_proj.weight").unwrap().path;
    assert!(shard.ends_with("model-00002-of-00002.safetensors"));
}

#[test]
fn the_values_are_bfloat16_in_order() {
    let mut folder = TestFolder::qwen2();
    let norm = folder.tensors.get_mut("model.norm.weight").unwrap();
    norm.bytes[..4].copy_from_slice(&[0x80, 0x3f, 0x20, 0xc0]);
    let folder = folder.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let values: Vec<bf16> = checkpoint.tensor("model.norm.weight").unwrap().bf16_values().collect();
    assert_eq!(values.len(), 64);
    assert_eq!((values[0].to_f32(), values[1].to_f32()), (1.0, -2.5));
}

#[test]
fn missing_folder_and_files() {
    let folder = TestFolder::qwen2().write_config();
    let error = Checkpoint::open(&folder.file("nowhere")).unwrap_err();
    assert!(matches!(error, ModelError::FolderMissing { .. }), "{error}");
    for (file, advice) in
        [("none.txt", "fetch the model's safetensors"), ("pytorch_model.bin", "pickles"), ("model.gguf", "GGUF")]
    {
        std::fs::write(folder.file(file), b"").unwrap();
        let error = open_error(&folder);
        assert!(matches!(error, ModelError::FileMissing { .. }) && error.to_string().contains(advice), "{error}");
    }
}

#[test]
fn a_truncated_file_is_told_from_a_damaged_one() {
    let folder = TestFolder::qwen2().write();
    let path = folder.file("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for kept in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..kept]).unwrap();
        let error = open_error(&folder);
        let found = kept as u64;
        assert!(matches!(error, ModelError::Truncated { found_bytes, .. } if found_bytes == found), "{kept}: {error}");
    }
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let expected = bytes.len() as u64;
    let error = open_error(&folder);
    assert!(matches!(error, ModelError::Truncated { expected_bytes, .. } if expected_bytes == expected), "{error}");
}

#[test]
fn damaged_headers() {
    let folder = TestFolder::qwen2().write();
    let path = folder.file("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let with_header = |header: &str, content: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; content]);
        bytes
    };
    let mut broken_json = whole.clone();
    broken_json[8] = b'!';
    let mut longer = whole.clone();
    longer.push(0);
    let cases: [(Vec<u8>, &str); 6] = [
        (broken_json, "JSON"),
        (longer, "bytes after its last tensor"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), "git lfs pull"),
        (vec![0xff; 64], "too large"),
        (with_header(r#"{"a":{"dtype":"BF16","shape":[3],"data_offsets":[0,4]}}"#, 4), "shape"),
        (with_header(r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]}}"#, 8), "offset"),
    ];
    for (bytes, part) in cases {
        std::fs::write(&path, bytes).unwrap();
        let error = open_error(&folder);
        let text = error.to_string();
        assert!(matches!(error, ModelError::BadSafetensors { .. }) && text.contains(part), "{part}: {text}");
    }
}

#[test]
fn an_index_must_fit_its_shards() {
    let folder = TestFolder::llama().write_sharded();
    let second = "model-00002-of-00002.safetensors";
    folder.write_index(&json!({"weight_map": {EMBEDDING: second}}));
    let error = open_error(&folder);
    assert!(matches!(&error, ModelError::IndexMismatch { tensor, .. } if tensor == EMBEDDING), "{error}");
    folder.write_index(&json!({"weight_map": {EMBEDDING: "model-00003-of-00003.safetensors"}}));
    let error = open_error(&folder);
    assert!(
        matches!(&error, ModelError::ShardMissing { shard, .. } if shard == "model-00003-of-00003.safetensors"),
        "{error}"
    );
    for name in ["../model.safetensors", "/etc/hostname", "a/b.safetensors", "..", ""] {
        folder.write_index(&json!({"weight_map": {EMBEDDING: name}}));
        let error = open_error(&folder);
        assert!(matches!(error, ModelError::BadField { .. }), "{name}: {error}");
    }
    for (text, is_json) in [("{}", false), ("{\"weight_map\": {}}", true), ("", false)] {
        std::fs::write(folder.file("model.safetensors.index.json"), text).unwrap();
        let error = open_error(&folder);
        assert_eq!(matches!(error, ModelError::BadField { .. }), is_json, "{error}");
        assert_eq!(error.code(), "MODEL_CONFIG_INVALID", "{error}");
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let folder = TestFolder::llama().write_sharded();
    folder.write_shard("model-00002-of-00002.safetensors", |name| name.contains("layers.1.") || name == EMBEDDING);
    let error = open_error(&folder);
    let ModelError::DuplicateTensor { tensor, first, second } = &error else { panic!("{error}") };
    assert_eq!(tensor, EMBEDDING);
    assert!(first.ends_with("model-00001-of-00002.safetensors"), "{error}");
    assert!(second.ends_with("model-00002-of-00002.safetensors"), "{error}");
}

#[test]
fn a_weight_must_be_there_in_bfloat16_and_in_shape() {
    let mut folder = TestFolder::qwen2();
    folder.tensors.get_mut("model.norm.weight").unwrap().dtype = Dtype::F16;
    let folder = folder.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = checkpoint.weight("lm_head.weight", &[20, 64]).unwrap_err();
    assert!(matches!(&error, ModelError::TensorMissing { tensor, .. } if tensor == "lm_head.weight"), "{error}");
    let error = checkpoint.weight("model.norm.weight", &[64]).unwrap_err();
    assert!(matches!(&error, ModelError::WrongDtype { dtype, .. } if dtype == "F16"), "{error}");
    let text = error.to_string();
    assert!(text.contains("model.norm.weight") && text.contains("torch.bfloat16"), "{text}");
    let error = checkpoint.weight(EMBEDDING, &[20, 96]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("[20, 64]") && text.contains("[20, 96]"), "{text}");
}

#[test]
fn the_fingerprint_changes_with_any_bit_of_a_small_checkpoint() {
    let folder = TestFolder::qwen2().write();
    let path = folder.file("model.safetensors");
    let fingerprint = |folder: &TestFolder| Checkpoint::open(folder.path()).unwrap().fingerprint();
    let before = fingerprint(&folder);
    assert_eq!(before, fingerprint(&TestFolder::qwen2().write()));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() - 1001;
    bytes[middle] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert_ne!(before, fingerprint(&folder));
}

#[test]
fn sampled_blocks_cover_both_ends_in_order() {
    for file_bytes in [WHOLE_CONTENT_BYTES + 1, 5_000_000_123, 1] {
        let blocks: Vec<_> = sampled_blocks(file_bytes).collect();
        assert_eq!(blocks.len() as u64, SAMPLE_BLOCKS);
        assert_eq!((blocks[0].start, blocks[blocks.len() - 1].end), (0, file_bytes));
        assert!(blocks.windows(2).all(|pair| pair[0].start <= pair[1].start));
    }
}
