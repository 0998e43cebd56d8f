//! Upstream's own tests of device memory, built from the tree of the kernel under test without a change, on our driver.

use hmmstorm_smoke::{code, evidence, hmmstorm, text};

#[test]
fn every_hmm_test_passes_and_none_is_skipped() {
    let folder = evidence("conformance");
    let results = folder.join("results.json");
    let output = hmmstorm()
        .args(["conformance", "--json"])
        .arg(&results)
        .arg("--folder")
        .arg(folder.join("run"))
        .output()
        .expect("hmmstorm runs");
    assert_eq!(code(&output), 0, "{}", text(&output));
    let results = std::fs::read(&results).expect("results");
    let results: serde_json::Value = serde_json::from_slice(&results).expect("JSON");
    let totals = &results["totals"];
    // 37 tests on private and on coherent memory; later kernels have more.
    assert!(totals["tests"].as_u64() >= Some(74), "{totals}");
    assert_eq!(totals["pass"], totals["tests"], "{totals}");
}
