//! The judge judged: guests in known states get their right verdict. And the GPU without a driver of ours.

use hmmstorm_smoke::{Storm, code, evidence, hmmstorm, text};

/// The cheapest cases of each kind; `hmmstorm selftest` has them all.
#[test]
fn known_states_get_their_verdicts() {
    let folder = evidence("selftest");
    let output = hmmstorm()
        .args(["selftest", "short-loop", "loop", "irq-off", "sleep", "device-stall", "warn", "--out"])
        .arg(&folder)
        .output()
        .expect("hmmstorm runs");
    assert_eq!(code(&output), 0, "{}", text(&output));
    assert!(text(&output).contains("6 of 6 verdicts are right"), "{}", text(&output));
}

#[test]
fn the_gpu_keeps_to_its_manual_without_a_driver() {
    let storm = Storm::run("vfio-selftest", ["vfio-selftest"]);
    assert_eq!(storm.verdict(), "pass", "{}", storm.output);
}

/// A pass means that data was looked at.
#[test]
fn a_gpu_that_damages_copies_is_seen_without_a_driver() {
    let broken = ["vfio-selftest", "--chaos", "corrupt_every=7", "--expect", "corruption"];
    let storm = Storm::run("vfio-selftest-corrupt", broken);
    assert_eq!((storm.verdict(), storm.code), ("corruption", 0), "{}", storm.output);
}
