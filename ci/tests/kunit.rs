//! The KUnit suites of the kernel abstractions and of the driver, in a real guest.

use hmmstorm_smoke::Storm;

#[test]
fn kunit_suites_pass() {
    let storm = Storm::run("kunit", ["kunit"]);
    assert_eq!(storm.verdict(), "pass", "{}", storm.output);
}

/// Without results there is nothing to pass.
#[test]
fn kunit_suites_that_did_not_run_are_an_error() {
    let storm = Storm::run("kunit-off", ["kunit", "--append", "kunit.enable=0"]);
    assert_eq!(storm.code, 3, "{}", storm.output);
    assert!(storm.output.contains("kunit.enable=1"), "{}", storm.output);
}
