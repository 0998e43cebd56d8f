//! Patches of the user's own: columns of a matrix beside the built-in variants, and a reject that says what is wrong. The
//! patches are defects on purpose, so that the oracles which have to find them are tested as well.

use hmmstorm_smoke::{code, evidence, hmmstorm, text};

const PLAN: &str = r#"
format = 1
name = "own"
summary = "the stock kernel, to stand beside"

[[group]]
name = "smoke"
about = "Nothing is wrong with the stock kernel."
scenario = "smoke"
variant = "trylock"
preempt = "none"
cpus = 2
mode = "deterministic"
seeds = 1
"#;

/// Verdict of each variant, with the invariants that its run says are broken.
fn outcomes(folder: &std::path::Path) -> Vec<(String, String, Vec<String>)> {
    let records = std::fs::read_to_string(folder.join("runs.jsonl")).expect("records");
    let mut outcomes: Vec<_> = records
        .lines()
        .map(|line| {
            let record: serde_json::Value = serde_json::from_str(line).expect("a record");
            let logs = folder.join(record["folder"].as_str().expect("a folder"));
            let events = std::fs::read_to_string(logs.join("events.jsonl")).expect("events");
            let broken = ["soft-dirty", "uffd-write-protection"]
                .into_iter()
                .filter(|name| events.lines().any(|line| line.contains(&format!("\"name\":\"{name}\""))));
            let word = |value: &serde_json::Value| value.as_str().expect("a word").to_owned();
            (word(&record["run"]["variant"]), word(&record["verdict"]), broken.map(str::to_owned).collect())
        })
        .collect();
    outcomes.sort();
    outcomes
}

#[test]
fn patch_and_mailbox_are_columns_and_lost_bits_are_corruption() {
    let folder = evidence("own-patches");
    let plan = folder.join("own.toml");
    std::fs::write(&plan, PLAN).expect("a plan");
    let out = folder.join("matrix");
    let ran = hmmstorm()
        .arg("matrix")
        .arg(&plan)
        .args(["--patch", "ci/patches/lose-soft-dirty.patch", "--mbox", "ci/patches/lose-bits.mbox"])
        .arg("--out")
        .arg(&out)
        .output()
        .expect("hmmstorm runs");
    assert_eq!(code(&ran), 1, "{}", text(&ran));
    let outcome = |variant: &str, verdict: &str, broken: &[&str]| {
        (variant.to_owned(), verdict.to_owned(), broken.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let expected = [
        outcome("lose-bits.mbox", "corruption", &["soft-dirty", "uffd-write-protection"]),
        outcome("lose-soft-dirty.patch", "corruption", &["soft-dirty"]),
        outcome("trylock", "pass", &[]),
    ];
    assert_eq!(outcomes(&out), expected, "{}", text(&ran));
    let report =
        hmmstorm().arg("report").arg(&out).args(["--format", "markdown"]).output().expect("a report");
    for variant in ["lose-bits.mbox", "lose-soft-dirty.patch", "trylock"] {
        assert!(text(&report).contains(variant), "{}", text(&report));
    }
}

#[test]
fn a_patch_that_does_not_fit_is_a_usage_error_with_its_reject() {
    let folder = evidence("own-patches-reject");
    let patch = folder.join("stale.patch");
    let good = std::fs::read_to_string("patches/lose-soft-dirty.patch").expect("a patch");
    std::fs::write(&patch, good.replace("pte_uffd_wp(pte)", "pte_of_yesterday(pte)")).expect("a stale one");
    for command in [["matrix", "ci/plans/small.toml"], ["storm", "smoke"]] {
        let ran = hmmstorm().args(command).arg("--patch").arg(&patch).output().expect("hmmstorm runs");
        let says = text(&ran);
        assert_eq!(code(&ran), 2, "{says}");
        for part in [
            "stale.patch does not apply to kernel 6.19.6",
            "mm/migrate_device.c:449: this hunk finds no place:",
            "what is there, mm/migrate_device.c:",
            "!\t\t\t\tif (pte_uffd_wp(pte))",
        ] {
            assert!(says.contains(part), "{part} is not in: {says}");
        }
        assert!(!says.contains("panicked"), "{says}");
    }
}
