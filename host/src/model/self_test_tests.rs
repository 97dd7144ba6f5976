//! The self-test on the CPU holds for a small model, and sees what is planted.

use super::*;
use crate::device::CpuOptions;
use crate::model::test_folder::TestFolder;

fn model(folder: TestFolder) -> Model {
    let device = Device::cpu(CpuOptions::default()).unwrap();
    Model::load(&device, folder.write().path(), None, &mut |_, _| {}).unwrap()
}

#[test]
fn row_counts_are_all_small_ones_and_ten_larger_ones() {
    assert!(ROW_COUNTS[..64].iter().copied().eq(1..=64));
    assert!(ROW_COUNTS.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!(ROW_COUNTS.len(), 74);
}

#[test]
fn a_small_model_holds_on_the_cpu() {
    for folder in [TestFolder::qwen2().random(1), TestFolder::llama().random(2)] {
        let model = model(folder);
        let findings = linear_layers(&model, &[1, 2, 7, 33]).unwrap();
        assert_eq!(findings.len(), 5);
        assert!(findings.iter().all(|finding| finding.holds() && finding.cases == 4), "{findings:?}");
        let findings = sequences(&model, &[1, 17, 70]).unwrap();
        assert_eq!(findings.len(), 3);
        assert!(findings.iter().all(|finding| finding.holds() && finding.cases == 3), "{findings:?}");
        assert!(choose_linear_backend(&model).unwrap().iter().all(Finding::holds));
    }
}

#[test]
fn lengths_beyond_the_context_are_not_compared_and_that_is_no_success() {
    let model = model(TestFolder::qwen2().random(1));
    let findings = sequences(&model, &[129]).unwrap();
    assert!(findings.iter().all(|finding| finding.cases == 0 && !finding.holds()), "{findings:?}");
    assert!(findings[0].to_string().contains("nothing was compared"));
}

#[test]
fn a_difference_of_one_bit_is_found_and_so_is_nan() {
    let expected = [1.0, -2.0, 0.0, 3.5];
    assert_eq!(first_difference(&expected, &expected, 2), None);
    for (index, value) in [(1, f32::from_bits((-2f32).to_bits() ^ 1)), (2, -0.0), (3, f32::NAN)] {
        let mut found = expected;
        found[index] = value;
        let text = first_difference(&found, &expected, 2).unwrap();
        assert!(text.starts_with(&format!("row {}, column {}:", index / 2, index % 2)), "{text}");
    }
    assert!(first_difference(&[f32::NAN], &[f32::NAN], 1).is_some());
    assert!(first_difference(&expected[..3], &expected, 1).is_some());
}

#[test]
fn a_finding_says_its_verdict() {
    let mut finding = Finding { what: "this = that".into(), cases: 3, difference: None };
    assert!(finding.to_string().starts_with("equal "));
    finding.difference = Some("row 1".into());
    assert!(!finding.holds() && finding.to_string().ends_with("this = that: row 1"), "{finding}");
}

#[test]
fn inputs_have_sums_that_depend_on_order() {
    let values: Vec<f32> = inputs(4096, 3).iter().map(|value| value.to_f32()).collect();
    let forward: f32 = values.iter().sum();
    let backward: f32 = values.iter().rev().sum();
    let squares = |values: &mut dyn Iterator<Item = &f32>| values.fold(0f32, |sum, value| sum + value * value * value);
    assert!(values.iter().all(|value| value.is_finite() && *value != 0.0));
    assert!(
        forward.to_bits() != backward.to_bits()
            || squares(&mut values.iter()).to_bits() != squares(&mut values.iter().rev()).to_bits()
    );
}
