//! Compiles a small package of kernels for real. Run with `-- --ignored` where a device compiler is installed.
#![allow(clippy::unwrap_used, reason = "a test's own files")]

use std::fs;
use std::path::{Path, PathBuf};

use cuda_builder::{Builder, Entry, Error, Sources, Target};

/// A copy of the fixture in a folder of the test's own, with one replacement in its source.
fn fixture(name: &str, from: &str, to: &str) -> PathBuf {
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture");
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(copy.join("src")).unwrap();
    for file in ["Cargo.toml", "Cargo.lock"] {
        fs::copy(original.join(file), copy.join(file)).unwrap();
    }
    let source = fs::read_to_string(original.join("src/lib.rs")).unwrap();
    assert!(source.contains(from), "`{from}` is not in the fixture");
    fs::write(copy.join("src/lib.rs"), source.replacen(from, to, 1)).unwrap();
    copy
}

fn builder(package: &Path) -> Builder {
    let sources = Sources::new(package).include("Cargo.toml").include("src");
    Builder::new(package, "fixture", sources, package.join("work"))
}

fn sm_80() -> Vec<Target> {
    vec![Target::new("sm_80", "ptx74")]
}

#[test]
#[ignore = "needs a device compiler"]
fn every_target_of_the_gate_compiles_and_says_its_kernels() {
    let package = fixture("all-targets", "", "");
    let targets = cuda_builder::workspace::gate_targets();
    let (toolchain, modules) = builder(&package).targets(targets.clone()).compile().unwrap();
    assert!(toolchain.version.starts_with("rustc 1."), "{}", toolchain.version);
    let entry = |name: &str, param_bytes: &[u32], block| Entry {
        name: name.into(),
        param_bytes: param_bytes.to_vec(),
        block: Some(block),
    };
    for (module, target) in modules.iter().zip(&targets) {
        assert_eq!(module.entries, [entry("nothing", &[], 32), entry("scale", &[8, 4, 4], 256)]);
        assert!(module.ptx.contains(&format!(".target {}\n", target.cpu)), "{}", module.ptx);
        let version = format!(".version {}.{}\n", &target.isa[3..4], &target.isa[4..]);
        assert!(module.ptx.contains(&version), "{}", module.ptx);
        assert!(module.ptx.contains(".maxntid 256, 1, 1\n{"), "{}", module.ptx);
    }
}

#[test]
#[ignore = "needs a device compiler"]
fn the_same_sources_give_the_same_bytes_wherever_they_lie() {
    let ptx = |name| builder(&fixture(name, "", "")).targets(sm_80()).compile().unwrap().1.remove(0).ptx;
    assert_eq!(ptx("here"), ptx("some/where/else"));
}

#[test]
#[ignore = "needs a device compiler"]
fn a_second_build_comes_from_the_cache_and_a_changed_source_does_not() {
    let package = fixture("cache", "", "");
    let build = || builder(&package).targets(sm_80()).build().unwrap().files.remove(0).1;
    let first = build();
    let made = fs::metadata(&first).unwrap().modified().unwrap();
    assert_eq!((build(), fs::metadata(&first).unwrap().modified().unwrap()), (first.clone(), made));

    fixture("cache", "usize) *= factor", "usize) += factor");
    let second = build();
    assert_ne!(second, first);
    let text = fs::read_to_string(&second).unwrap();
    assert!(text.contains("add.rn.f32"), "{text}");
    // A damaged file of the cache is made again.
    fs::write(&second, "").unwrap();
    assert!(fs::read_to_string(build()).unwrap().contains("add.rn.f32"));
}

#[test]
#[ignore = "needs a device compiler"]
fn an_error_of_the_compiler_shows_the_kernel_s_own_line() {
    let package = fixture("broken", "*x.add(index as usize) *= factor;", "*x.add(index) *= factor;");
    let error = builder(&package).targets(sm_80()).compile().unwrap_err();
    assert!(matches!(error, Error::Compile { .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("src/lib.rs:25") && said.contains("*x.add(index) *= factor;"), "{said}");
}

#[test]
#[ignore = "needs a device compiler"]
fn a_call_that_nothing_defines_and_a_kernel_without_block_are_named() {
    let declaration = "unsafe extern \"C\" { fn missing(); }\n/// x";
    let package = fixture("undefined", "/// x", declaration);
    let path = package.join("src/lib.rs");
    let source = fs::read_to_string(&path).unwrap();
    fs::write(&path, source.replacen("if index < length {", "if index < length { missing();", 1)).unwrap();
    let error = builder(&package).targets(sm_80()).compile().unwrap_err().to_string();
    assert!(error.contains("missing is called and defined nowhere; called from kernel: scale"), "{error}");

    let package = fixture("no-block", "asm!(\"// lockstep.block 32\"", "asm!(\"// nothing\"");
    let error = builder(&package).targets(sm_80()).compile().unwrap_err().to_string();
    assert!(error.contains("kernel nothing does not say its block size"), "{error}");
}
