//! The self-test of the numeric contract, on the models that ship with the repository.
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod devices;

use std::path::Path;
use std::sync::Arc;

use host::device::Device;
use host::model::Model;
use host::verify;

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
