//! Cells: runs that differ in nothing but their seed and in what built them.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::judge::measures::{Latency, aborts};
use crate::judge::record::Record;
use crate::judge::verdict::Verdict;
use crate::statistics::Share;

/// What the runs of a cell have in common. Sorted as a table would be: scenario first, then what it runs on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CellKey {
    /// Scenario.
    pub scenario: String,
    /// Control of it.
    pub control: Option<String>,
    /// Every parameter in force.
    pub parameters: BTreeMap<String, String>,
    /// `uname -r`.
    pub kernel: String,
    /// Kind of build.
    pub flavour: String,
    /// Fix candidates and the user's patches, joined by `+`.
    pub variant: String,
    /// Hash of these patches' texts and of a user's tree, none of no patches on a kernel of the list: what was changed is
    /// another one, whatever its name.
    pub patches: String,
    /// Preemption model.
    pub preempt: String,
    /// CPUs.
    pub cpus: u32,
    /// GPUs.
    pub gpus: u32,
    /// `real-time` or `deterministic`.
    pub mode: String,
    /// `kvm` or `tcg`.
    pub engine: String,
    /// Machine profile, memory of guest and GPUs, fault plan, further kernel parameters.
    pub machine: Vec<String>,
}

impl CellKey {
    /// Of a record.
    #[must_use]
    pub fn of(record: &Record) -> Self {
        let run = &record.run;
        let image = &record.provenance.image;
        let text = |name: &str| image[name].as_str().unwrap_or_default().to_owned();
        let machine = [&run.profile, &run.memory, &run.vram].map(Clone::clone).into_iter();
        let chaos = run.chaos.iter().map(|plan| format!("chaos {plan}"));
        Self {
            scenario: run.scenario.clone(),
            control: run.control.clone(),
            parameters: run.parameters.clone(),
            kernel: text("kernel_version"),
            flavour: text("flavour"),
            variant: run.variant.clone(),
            patches: patches(image),
            preempt: run.preempt.clone(),
            cpus: run.cpus,
            gpus: run.gpus,
            mode: run.mode.clone(),
            engine: run.engine.clone(),
            machine: machine.chain(chaos).chain(run.append.iter().cloned()).collect(),
        }
    }

    /// The same cell of another variant: what a comparison puts side by side.
    #[must_use]
    pub fn without_variant(&self) -> Self {
        Self { variant: String::new(), patches: String::new(), ..self.clone() }
    }
}

/// Hash of the tree and of the patches that are under test; those that the driver stands on are not.
fn patches(image: &serde_json::Value) -> String {
    let tree = image["kernel_source_sha256"].as_str().filter(|_| image["tree"].is_string());
    let patches = image["patches"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|patch| patch["origin"] != "abstraction")
        .filter_map(|patch| patch["sha256"].as_str());
    let under_test: Vec<&str> = tree.into_iter().chain(patches).collect();
    if under_test.is_empty() {
        return String::new();
    }
    let digest = Sha256::digest(under_test.join("\n"));
    digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// The runs of a cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell<'a> {
    /// What they have in common.
    pub key: CellKey,
    /// The runs that say something about the kernel, by seed.
    pub runs: Vec<&'a Record>,
    /// Harness errors that no later try made up for.
    pub harness_errors: usize,
}

impl Cell<'_> {
    /// How often this verdict came, of all runs.
    #[must_use]
    pub fn share(&self, verdict: Verdict) -> Share {
        let hits = self.runs.iter().filter(|run| run.judgement.verdict == verdict).count();
        Share::wilson(hits as u64, self.runs.len() as u64)
    }

    /// How many runs did not pass, of all.
    #[must_use]
    pub fn failures(&self) -> Share {
        let pass = self.share(Verdict::Pass);
        Share::wilson(pass.runs - pass.hits, pass.runs)
    }

    /// Verdicts with their counts, sorted by verdict.
    #[must_use]
    pub fn verdicts(&self) -> BTreeMap<Verdict, u64> {
        let mut counts = BTreeMap::new();
        for run in &self.runs {
            *counts.entry(run.judgement.verdict).or_insert(0) += 1;
        }
        counts
    }

    /// Fault latencies of all runs together.
    #[must_use]
    pub fn latency(&self) -> Option<Histogram<u64>> {
        Latency::merge(self.runs.iter().filter_map(|run| run.measures.fault_latency.as_ref()))
    }

    /// Faults resolved in a second of guest time, of each run that finished.
    #[must_use]
    pub fn fault_rates(&self) -> Vec<f64> {
        let finished = self.runs.iter().filter(|run| !run.measures.failed);
        finished.filter_map(|run| run.measures.per_second(run.progress.faults)).collect()
    }

    /// Tries beyond the first that a resolved fault took, over all runs.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of runs are far below 2^52")]
    pub fn retries_per_fault(&self) -> Option<f64> {
        let sum = |count: fn(&Record) -> u64| self.runs.iter().map(|run| count(run)).sum::<u64>();
        let (retries, resolved) = (sum(|run| run.measures.retries), sum(|run| run.measures.resolved));
        (resolved > 0).then(|| retries as f64 / resolved as f64)
    }

    /// Times to failure and censored ones, guest milliseconds: what survival is estimated from.
    #[must_use]
    pub fn survival_times(&self) -> Vec<(u64, bool)> {
        let times = self.runs.iter().map(|run| &run.measures);
        times.filter_map(|measures| Some((measures.observed_ms?, measures.failed))).collect()
    }

    /// Pages that migrations did not move, by reason, over all runs.
    #[must_use]
    pub fn aborts(&self) -> BTreeMap<String, u64> {
        let mut sum = BTreeMap::new();
        for (reason, pages) in self.runs.iter().flat_map(|run| aborts(&run.driver)) {
            *sum.entry(reason).or_insert(0) += pages;
        }
        sum
    }
}

/// Groups records, which are without doubles ([`Union`](super::Union)), into cells, sorted by key.
pub fn cells<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<Cell<'a>> {
    let mut cells: BTreeMap<CellKey, (Vec<&Record>, usize)> = BTreeMap::new();
    for record in records {
        let (runs, harness_errors) = cells.entry(CellKey::of(record)).or_default();
        match record.judgement.verdict {
            Verdict::HarnessError => *harness_errors += 1,
            _ => runs.push(record),
        }
    }
    let cell = |(key, (mut runs, harness_errors)): (CellKey, (Vec<&'a Record>, usize))| {
        runs.sort_by(|a, b| (a.run.seed, &a.id).cmp(&(b.run.seed, &b.id)));
        Cell { key, runs, harness_errors }
    };
    cells.into_iter().map(cell).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::records::union::tests::record;

    #[test]
    fn runs_of_one_cell_differ_in_seed_alone() {
        let mut others = [record(1), record(2), record(3), record(4), record(5)];
        others[2].run.preempt = "full".into();
        others[3].provenance.image["patches"] =
            json!([{ "name": "x", "origin": "abstraction", "sha256": "1" }]);
        others[4].judgement.verdict = Verdict::HarnessError;
        let found = cells(&others);
        let sizes: Vec<_> =
            found.iter().map(|c| (c.key.preempt.as_str(), c.runs.len(), c.harness_errors)).collect();
        assert_eq!(sizes, [("full", 1, 0), ("none", 3, 1)]);
        assert_eq!(found[1].share(Verdict::Pass).hits, 3);
        others[3].provenance.image["patches"] = json!([{ "name": "x", "origin": "user", "sha256": "1" }]);
        assert_eq!(cells(&others).len(), 3);
        others[1].provenance.image["kernel_source_sha256"] = "2".into();
        assert_eq!(cells(&others).len(), 3);
        others[1].provenance.image["tree"] = "v6.19-3-g1".into();
        assert_eq!(cells(&others).len(), 4, "a user's tree is not the kernel of its version");
    }

    #[test]
    fn counts_are_summed_over_runs() {
        let mut runs = [record(1), record(2)];
        for (run, tries, ms) in [(0, 5, 1000), (1, 0, 3000)] {
            runs[run].measures.retries = tries;
            runs[run].measures.resolved = 10;
            runs[run].measures.observed_ms = Some(ms);
            runs[run].progress.faults = 10;
        }
        runs[1].measures.failed = true;
        runs[1].judgement.verdict = Verdict::Livelock;
        let found = cells(&runs);
        let cell = &found[0];
        assert_eq!(cell.retries_per_fault(), Some(0.25));
        assert_eq!(cell.survival_times(), [(1000, false), (3000, true)]);
        assert_eq!(cell.fault_rates(), [10.0]);
        assert_eq!((cell.failures().hits, cell.failures().runs), (1, 2));
    }
}
