//! Findings without doubles: what was found, how often, where, and the capsule that makes it happen again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;

use crate::capsule;
use crate::judge::record::Record;
use crate::judge::verdict::Verdict;

/// One finding, of all runs that have its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Verdict and stable frames, hashed.
    pub identity: String,
    /// The verdict.
    pub verdict: Verdict,
    /// In a line.
    pub title: String,
    /// Its runs: the clearest first, i.e. deterministic ones before others, then few CPUs before many, then by seed.
    pub runs: Vec<Run>,
    /// Variants that have it.
    pub variants: BTreeSet<String>,
    /// Preemption models under which it showed.
    pub preempt: BTreeSet<String>,
    /// Numbers of CPUs with which it showed.
    pub cpus: BTreeSet<u32>,
    /// The capsule of the first of its runs whose folder is known; seen from the records file's folder.
    pub capsule: Option<PathBuf>,
}

/// A run that has a finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Run {
    /// Its id.
    pub id: String,
    /// Its seed.
    pub seed: u64,
    /// Where its logs are.
    pub folder: Option<PathBuf>,
}

/// The findings of some records, the most frequent first.
pub fn findings<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<Finding> {
    let mut by_identity: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in records {
        if let Some(identity) = &record.identity {
            by_identity.entry(identity).or_default().push(record);
        }
    }
    let mut findings: Vec<Finding> = by_identity.into_iter().filter_map(finding).collect();
    findings.sort_by(|a, b| (b.runs.len(), &a.identity).cmp(&(a.runs.len(), &b.identity)));
    findings
}

fn finding((identity, mut records): (&str, Vec<&Record>)) -> Option<Finding> {
    let clearest = |record: &&Record| {
        (record.run.mode != "deterministic", record.run.cpus, record.run.seed, record.id.clone())
    };
    records.sort_by_key(clearest);
    let first = records.first()?;
    let run = |record: &&Record| Run {
        id: record.id.clone(),
        seed: record.run.seed,
        folder: record.folder.clone(),
    };
    let folder = records.iter().find_map(|record| record.folder.as_ref());
    Some(Finding {
        identity: identity.to_owned(),
        verdict: first.judgement.verdict,
        title: first.title.clone().unwrap_or_default(),
        runs: records.iter().map(run).collect(),
        variants: records.iter().map(|record| record.run.variant.clone()).collect(),
        preempt: records.iter().map(|record| record.run.preempt.clone()).collect(),
        cpus: records.iter().map(|record| record.run.cpus).collect(),
        capsule: folder.map(|folder| folder.join(capsule::FILE)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::union::tests::record;

    #[test]
    fn runs_that_found_the_same_are_one_finding() {
        let found = |seed, identity: &str, mode: &str, folder: Option<&str>| {
            let mut record = record(seed);
            record.identity = Some(identity.into());
            record.judgement.verdict = Verdict::Livelock;
            record.run.mode = mode.into();
            record.folder = folder.map(PathBuf::from);
            record
        };
        let records = [
            found(1, "livelock-b", "real-time", Some("runs/1")),
            found(3, "livelock-a", "real-time", Some("runs/3")),
            found(9, "livelock-a", "deterministic", Some("runs/9")),
            found(5, "livelock-a", "deterministic", None),
            record(7),
        ];
        let findings = findings(&records);
        assert_eq!(findings.len(), 2);
        assert_eq!(findings[0].identity, "livelock-a");
        assert_eq!(findings[0].runs.iter().map(|run| run.seed).collect::<Vec<_>>(), [5, 9, 3]);
        assert_eq!(findings[0].capsule.as_deref(), Some("runs/9/capsule.json".as_ref()));
        assert_eq!(findings[1].runs.len(), 1);
    }
}
