//! The command as a person meets it. The scenarios that need no GPU run on any Linux machine, with the fork, the
//! supervision and the accounting of all others.

use std::process::{Command, Output};

fn storm(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_storm")).args(arguments).output().expect("storm runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn lists_scenarios_and_describes_one() {
    let (status, list, _) = storm(&["list"]);
    assert_eq!(status, Some(0));
    assert!(list.contains("drain-livelock") && list.contains("smoke"), "{list}");
    let (status, one, _) = storm(&["list", "drain-livelock"]);
    assert_eq!(status, Some(0));
    assert!(one.contains("fork_every=20") && one.contains("mapcount-1"), "{one}");
    let (status, _, error) = storm(&["list", "nothing"]);
    assert_eq!(status, Some(2));
    assert!(error.contains("no scenario `nothing`"), "{error}");
}

#[test]
fn a_run_that_cannot_be_says_why_and_is_usage() {
    for (arguments, wanted) in [
        (&["run", "smoke", "-p", "pages=3"][..], "an integer from 4 to 65536"),
        (&["run", "smoke", "-p", "page=3"], "no parameter `page`"),
        (&["run", "drain-livelock", "--control", "x"], "no control `x`"),
        (&["run", "smoke"], "needs 1 GPU and this guest has 0"),
    ] {
        let (status, _, error) = storm(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {error}");
        assert!(error.contains(wanted), "{arguments:?}: {error}");
    }
}

#[test]
fn a_supervised_run_ends_well() {
    let (status, output, error) = storm(&["run", "boot", "--seed", "5"]);
    assert_eq!(status, Some(0), "{output}{error}");
    assert!(output.contains("boot, seed 5") && output.contains("Done in"), "{output}");
    assert!(output.contains("everything was given back"), "{output}");
}

#[test]
fn a_worker_that_fails_fails_the_run_with_its_reason() {
    let (status, output, error) = storm(&["run", "kunit", "-p", "suites=1000"]);
    assert_eq!(status, Some(3), "{output}{error}");
    assert!(output.contains("storm: kunit: "), "{output}");
    assert!(!output.contains("Done in"), "{output}");
}

#[test]
fn statistics_without_a_gpu_say_so() {
    let (status, output, _) = storm(&["stats"]);
    assert_eq!(status, Some(3));
    assert!(output.contains("no GPU"), "{output}");
}
