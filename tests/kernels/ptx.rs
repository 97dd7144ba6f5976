//! The kernel images have exactly the kernels of the table, with parameters of the sizes that the host passes.

use std::collections::BTreeMap;

pub(crate) const SM_80: &str = include_str!(env!("LOCKSTEP_PTX_SM_80"));
pub(crate) const SM_90A: &str = include_str!(env!("LOCKSTEP_PTX_SM_90A"));

/// The entries with the bytes of their parameters: each parameter is on a line of its own.
fn entries(ptx: &str) -> BTreeMap<String, Vec<usize>> {
    let mut entries = BTreeMap::new();
    let mut current: Option<String> = None;
    for line in ptx.lines().map(str::trim) {
        if let Some((_, rest)) = line.split_once(".entry ") {
            let name = rest.split('(').next().unwrap().trim().to_owned();
            entries.insert(name.clone(), Vec::new());
            current = (!line.ends_with("()")).then_some(name);
        } else if let (Some(name), true) = (&current, line.starts_with(".param")) {
            let ty = line.split_whitespace().nth(1).unwrap();
            let bytes = match ty {
                ".u64" | ".b64" | ".s64" | ".f64" => 8,
                ".u32" | ".b32" | ".s32" | ".f32" => 4,
                _ => panic!("{name} has a parameter of an unexpected type: {line}"),
            };
            entries.get_mut(name).unwrap().push(bytes);
        } else if line.starts_with(')') {
            current = None;
        }
    }
    entries
}

#[test]
fn images_have_the_kernels_of_the_table() {
    let table: BTreeMap<String, Vec<usize>> = kernels_gpu::KERNELS
        .iter()
        .map(|kernel| (kernel.name.to_owned(), kernel.ptx_param_bytes().collect()))
        .collect();
    assert_eq!(table.len(), kernels_gpu::KERNELS.len(), "a name is there twice");
    for (target, ptx) in [("sm_80", SM_80), ("sm_90a", SM_90A)] {
        assert!(ptx.contains(&format!(".target {target}")), "{target} is another target's");
        assert_eq!(entries(ptx), table, "{target}");
    }
}
