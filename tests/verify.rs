//! The self-test of the numeric contract, on the models that ship with the repository.
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod devices;

use std::path::Path;
use std::sync::Arc;

use host::device::{CpuOptions, Device};
use host::model::{DecodeWay, Model};
use host::verify::{self, Goldens};

fn all_lines_hold(device: &Device, folder: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let model = Arc::new(Model::load(device, &folder, Some(512), &mut |_, _| {}).unwrap());
    let mut lines = Vec::new();
    let all = verify::full(&model, &mut |line| lines.push(line.clone())).unwrap();
    let failed: Vec<_> = lines.iter().filter(|line| !line.holds).collect();
    assert!(all && failed.is_empty(), "{failed:#?}");
    assert!(lines.len() >= 10, "{} lines", lines.len());
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
    assert_eq!([1, 9].map(|rows| model.decode_way(rows)), [Some(DecodeWay::Few), Some(DecodeWay::Many)]);
    let lines = verify::decode_ways(&model, &[1, 3, 8, 9, 18]).unwrap();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.holds), "{lines:#?}");
    model.give_up(DecodeWay::Few);
    assert_eq!([1, 9].map(|rows| model.decode_way(rows)), [Some(DecodeWay::Many); 2]);
    model.give_up(DecodeWay::Many);
    assert_eq!([1, 9].map(|rows| model.decode_way(rows)), [None; 2]);
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
