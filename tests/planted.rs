//! `lockstep verify --batch` can fail: a build in which one operation's result depends on how many rows a step has.
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::path::Path;
use std::process::{Command, Output};

/// The program with the planted fault, built where it is in nobody's way. The packages it depends on are not optimised:
/// that takes half the time, and the suite spends little of its own in them.
fn planted(arguments: &[&str]) -> Output {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted");
    let built = Command::new(env!("CARGO"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--bin", "lockstep", "--features", "planted-batch-dependence", "--target-dir"])
        .arg(&target)
        .args(["--config", "profile.dev.package.\"*\".opt-level=0"])
        .status()
        .unwrap();
    assert!(built.success());
    Command::new(target.join("debug/lockstep")).args(arguments).output().unwrap()
}

#[test]
#[ignore = "builds the program again"]
fn a_planted_batch_dependence_is_found() {
    let found = planted(&["verify", "--device", "cpu", "--batch=9"]);
    let (stdout, stderr) = (String::from_utf8(found.stdout).unwrap(), String::from_utf8(found.stderr).unwrap());
    assert_eq!(found.status.code(), Some(1), "{stdout}{stderr}");
    for claim in ["among 1 others", "among 9 others", "in steps of 16 tokens"] {
        assert!(stdout.lines().any(|line| line.starts_with("FAIL") && line.contains(claim)), "{claim}: {stdout}");
    }
    assert!(stderr.contains("the numeric contract does not hold"), "{stderr}");
    println!("{stdout}{stderr}");
}
