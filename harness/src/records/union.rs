//! Merging: the union of records by run id.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::judge::record::Record;
use crate::judge::verdict::Verdict;

/// Runs that should have been equal and were not: the bench, or the emulator under it, is not deterministic there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Conflict {
    /// Their id.
    pub id: String,
    /// What differs: `verdict`, or the name of a log file.
    pub what: String,
    /// One of the two values, the lesser.
    pub one: String,
    /// The other.
    pub other: String,
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { id, what, one, other } = self;
        write!(f, "not deterministic: run {id} has two values of {what}: {one} and {other}")
    }
}

/// Records without doubles. The same set of records gives the same union, whatever their order and however often each
/// comes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Union {
    records: BTreeMap<String, Record>,
    /// Every value that a deterministic run's verdict and logs had: by id, then by what.
    seen: BTreeMap<String, BTreeMap<String, std::collections::BTreeSet<String>>>,
}

impl Union {
    /// Of these records.
    pub fn of(records: impl IntoIterator<Item = Record>) -> Self {
        let mut union = Self::default();
        union.extend(records);
        union
    }

    /// Adds a record. Of two with one id, a verdict on the kernel goes before a harness error, then the earlier goes
    /// before the later.
    pub fn insert(&mut self, mut record: Record) {
        if record.id.is_empty() {
            // Written before runs had ids.
            record.id = super::id::run_id(&record.run, &record.provenance);
        }
        if record.run.mode == "deterministic" && record.judgement.verdict != Verdict::HarnessError {
            let seen = self.seen.entry(record.id.clone()).or_default();
            let verdict = record.judgement.verdict.name().to_owned();
            let hashes = record.files.iter().map(|(name, file)| (name.clone(), file.sha256.clone()));
            for (what, value) in [("verdict".to_owned(), verdict)].into_iter().chain(hashes) {
                seen.entry(what).or_default().insert(value);
            }
        }
        match self.records.entry(record.id.clone()) {
            Entry::Vacant(entry) => _ = entry.insert(record),
            Entry::Occupied(mut entry) if rank(&record) < rank(entry.get()) => _ = entry.insert(record),
            Entry::Occupied(_) => {}
        }
    }

    /// Whether there is a record of this run that says something about the kernel.
    #[must_use]
    pub fn judged(&self, id: &str) -> Option<&Record> {
        self.records.get(id).filter(|record| record.judgement.verdict != Verdict::HarnessError)
    }

    /// The records, by id.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The records, by id.
    #[must_use]
    pub fn into_records(self) -> Vec<Record> {
        self.records.into_values().collect()
    }

    /// Deterministic runs that came out in more than one way.
    #[must_use]
    pub fn conflicts(&self) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        for (id, seen) in &self.seen {
            for (what, values) in seen {
                let mut values = values.iter();
                let Some(one) = values.next() else { continue };
                conflicts.extend(values.map(|other| Conflict {
                    id: id.clone(),
                    what: what.clone(),
                    one: one.clone(),
                    other: other.clone(),
                }));
            }
        }
        conflicts
    }
}

impl Extend<Record> for Union {
    fn extend<I: IntoIterator<Item = Record>>(&mut self, records: I) {
        for record in records {
            self.insert(record);
        }
    }
}

/// The least of these is the one that stays. The text decides last, so that equal ranks are equal records.
fn rank(record: &Record) -> (bool, u64, String) {
    let text = serde_json::to_string(record).unwrap_or_default();
    (record.judgement.verdict == Verdict::HarnessError, record.began, text)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A deterministic run of this seed that passed.
    pub(crate) fn record(seed: u64) -> Record {
        let value = json!({
            "schema": 1, "began": 1_700_000_000,
            "run": {
                "scenario": "smoke", "control": null, "parameters": {"rounds": "2"}, "variant": "trylock",
                "preempt": "none", "cpus": 2, "gpus": 2, "mode": "deterministic", "engine": "tcg",
                "profile": "smoke", "seed": seed, "chaos": null,
            },
            "expected": "pass", "as_expected": true, "verdict": "pass", "reason": "", "frames": [], "evidence": [],
            "progress": {"round": 2, "operations": 10, "faults": 4, "workers": {}},
            "device": [],
            "timings": {"verdict_ms": 5, "total_ms": 6},
            "provenance": {
                "image": {"kernel_version": "6.19.6", "flavour": "default", "patches": []},
                "binaries": {}, "harness_version": "0", "command_line": [], "qemu_command_line": "",
                "kernel_command_line": "", "host": "",
            },
            "files": {"console.log": {"bytes": 1, "sha256": "aa"}},
        });
        let mut record: Record = serde_json::from_value(value).expect("a record");
        record.id = crate::records::id::run_id(&record.run, &record.provenance);
        record
    }

    fn with(mut record: Record, verdict: Verdict, hash: &str, began: u64, deterministic: bool) -> Record {
        record.judgement.verdict = verdict;
        record.began = began;
        if !deterministic {
            record.run.mode = "real-time".into();
            record.id = crate::records::id::run_id(&record.run, &record.provenance);
        }
        record.files.get_mut("console.log").expect("a file").sha256 = hash.to_owned();
        record
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let verdict = prop::sample::select(vec![Verdict::Pass, Verdict::Livelock, Verdict::HarnessError]);
        (0..4_u64, verdict, prop::sample::select(vec!["aa", "bb"]), 0..3_u64, any::<bool>())
            .prop_map(|(seed, verdict, hash, began, mode)| with(record(seed), verdict, hash, began, mode))
    }

    proptest! {
        #[test]
        fn a_union_is_idempotent_and_knows_no_order(
            records in prop::collection::vec(any_record(), 0..20),
            split in 0..20_usize,
        ) {
            let whole = Union::of(records.clone());
            let mut twice = whole.clone();
            twice.extend(records.iter().cloned());
            prop_assert_eq!(&twice, &whole);
            let reversed = Union::of(records.iter().rev().cloned());
            prop_assert_eq!(&reversed, &whole);
            // Merging shards, of which either may have been merged before.
            let (a, b) = records.split_at(split.min(records.len()));
            let mut shards = Union::of(b.to_vec());
            shards.extend(a.iter().cloned());
            prop_assert_eq!(&shards, &whole);
            // Every id is there once, and the model says with which kind of verdict.
            for record in whole.records() {
                let same: Vec<_> = records.iter().filter(|r| r.id == record.id).collect();
                let judged = same.iter().any(|r| r.judgement.verdict != Verdict::HarnessError);
                prop_assert_eq!(whole.judged(&record.id).is_some(), judged);
            }
        }
    }

    #[test]
    fn another_verdict_or_log_of_a_deterministic_run_is_told() {
        let base = |verdict, hash, mode| with(record(1), verdict, hash, 0, mode);
        let pass = base(Verdict::Pass, "aa", true);
        assert!(Union::of([pass.clone(), pass.clone()]).conflicts().is_empty());
        let conflicts = Union::of([pass.clone(), base(Verdict::Pass, "bb", true)]).conflicts();
        assert_eq!(conflicts.len(), 1);
        assert_eq!((conflicts[0].what.as_str(), conflicts[0].other.as_str()), ("console.log", "bb"));
        let conflicts = Union::of([pass.clone(), base(Verdict::Livelock, "aa", true)]).conflicts();
        assert_eq!(conflicts[0].what, "verdict");
        // A failed bench says nothing, and real time is not deterministic.
        assert!(Union::of([pass, base(Verdict::HarnessError, "cc", true)]).conflicts().is_empty());
        let real = [base(Verdict::Pass, "aa", false), base(Verdict::Livelock, "bb", false)];
        assert!(Union::of(real).conflicts().is_empty());
    }
}
