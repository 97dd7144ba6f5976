//! The self-test of the numeric contract, on the models that ship with the repository.
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod devices;
mod random_model;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use host::device::{CpuOptions, Device, LinearBackend};
use host::model::{DecodeWay, Model};
use host::verify::{self, Goldens, Line};
use random_model::Sizes;

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

/// Prefill, chunks and decode steps of a model whose layers are cut.
fn a_model_in_segments_keeps_the_contract(device: &Device) {
    // Narrow and deep: the attention output and the down projection are both cut in four segments.
    let folder = tempfile::tempdir().unwrap();
    Sizes { hidden: 128, heads: 16, head_width: 128, ffn: 2048 }.write(folder.path());
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
    let way = |rows| model.decode_way(rows, 1);
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
fn recorded_prefills_keep_their_bits_on_a_cpu_like_a_gpu() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let load = |device| Model::load(&device, &folder, Some(512), &mut |_, _| {}).unwrap();
    let model = load(devices::cpu_like_a_gpu());
    let line = verify::recorded_prefills(&model, &[(1, 1), (5, 2), (20, 3), (65, 1)]).unwrap().unwrap();
    assert!(line.holds, "{line:?}");
    model.give_up_recorded_prefills();
    assert_eq!(verify::recorded_prefills(&model, &[(5, 1)]).unwrap(), None, "nothing is left to be in doubt");
    assert_eq!(verify::recorded_prefills(&load(devices::cpu()), &[(5, 1)]).unwrap(), None, "nothing is recorded there");
}

/// On a CPU that computes like a GPU the choice is slow, but it is the same steps.
#[test]
fn our_own_tiles_are_timed_where_there_is_a_choice() {
    let folder = tempfile::tempdir().unwrap();
    Sizes { hidden: 64, heads: 2, head_width: 32, ffn: 64 }.write(folder.path());
    let device = devices::cpu_like_a_gpu();
    let model = Model::load(&device, folder.path(), Some(512), &mut |_, _| {}).unwrap();
    let budget = Duration::from_millis(100);
    assert!(model.choose_tiles(budget).unwrap().is_empty(), "no library to compare with");
    device.set_linear_backend(LinearBackend::CublasLt);
    let choices = model.choose_tiles(budget).unwrap();
    assert!(!choices.is_empty(), "a budget is enough for the first number of rows");
    for choice in &choices {
        assert!(choice.time <= choice.guess && choice.time > Duration::ZERO, "{choice:?}");
        let way = match choice.what.as_str() {
            "one kernel" => DecodeWay::Whole,
            "fused layers" => DecodeWay::Few,
            "no tiles of ours" => DecodeWay::Recorded,
            _ => DecodeWay::Tiles,
        };
        assert_eq!(model.decode_way(choice.rows, 1), Some(way), "{choice:?}");
    }
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
