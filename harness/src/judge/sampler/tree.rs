//! Whether a CPU stays in one kernel call tree: the host's own evidence for a loop that never leaves the kernel.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Mode, Sample};
use crate::judge::stack::{base_name, is_entry};

/// When samples count as one call tree.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TreeRules {
    /// Samples of a window.
    pub window: usize,
    /// Windows needed.
    pub windows: usize,
    /// Share of all samples that must be in the tree.
    pub share: f64,
}

impl Default for TreeRules {
    fn default() -> Self {
        Self { window: 5, windows: 3, share: 0.95 }
    }
}

impl TreeRules {
    /// How many of the samples since the last completion are judged: the latest three quarters, and all of few. The
    /// last completion is known only to the next heartbeat, so the first samples may be of work that still went on.
    fn recent(&self, samples: usize) -> usize {
        (samples - samples / 4).max(self.window * self.windows).min(samples)
    }
}

/// What a CPU did over a span of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuSummary {
    /// CPU number.
    pub cpu: u32,
    /// Samples taken.
    pub samples: usize,
    /// Of these, in user mode.
    pub user: usize,
    /// Of these, in kernel mode.
    pub kernel: usize,
    /// Of these, halted.
    pub halted: usize,
    /// Functions that the samples have in common from the root of the stack, **leaf first**: the tree's trunk.
    pub trunk: Vec<String>,
    /// The latest samples, of which the tree and idleness are judged.
    pub judged: usize,
    /// Of these, those whose stack has the trunk.
    pub in_tree: usize,
    /// Of these, those in kernel mode whose stack changed while it was read: they say nothing of the tree, neither way.
    pub torn: usize,
    /// Whole windows in which enough samples have it, in a row up to the last sample.
    pub windows: usize,
    /// Distinct instruction pointers.
    pub distinct_ips: usize,
    /// Distinct contents of instruction pointer and general registers: 1 means that the CPU did not move at all. A loop
    /// around `pause` is seen at one address only: the emulator lets the monitor in there and nowhere else.
    #[serde(default)]
    pub distinct_states: usize,
    /// Functions just above the trunk or deeper, by the number of samples that they were seen in, most frequent first.
    pub above: Vec<(String, usize)>,
    /// Spins in one kernel call tree by the rules.
    pub spins: bool,
    /// Halted in enough windows by the rules.
    pub idle: bool,
}

impl CpuSummary {
    /// Summarises samples of one CPU, oldest first.
    #[must_use]
    pub fn of(cpu: u32, samples: &[&Sample], rules: &TreeRules) -> Self {
        let mut summary = Self { cpu, samples: samples.len(), ..Self::default() };
        let recent = &samples[samples.len() - rules.recent(samples.len())..];
        for sample in samples {
            match sample.mode {
                Mode::User => summary.user += 1,
                Mode::Kernel => summary.kernel += 1,
                Mode::Halted => summary.halted += 1,
            }
        }
        let mut ips: Vec<u64> = recent.iter().map(|sample| sample.ip).collect();
        ips.sort_unstable();
        ips.dedup();
        summary.distinct_ips = ips.len();
        let mut states: Vec<(u64, u64)> = recent.iter().map(|sample| (sample.ip, sample.values)).collect();
        states.sort_unstable();
        states.dedup();
        summary.distinct_states = states.len();

        // The trunk goes on only where nearly all agree: one that is as long as the share just allows would fall below it
        // with the next sample.
        let trunk = trunk(recent, 1.0 - (1.0 - rules.share) / 2.0);
        let in_tree: Vec<bool> = recent.iter().map(|sample| has_trunk(sample, &trunk)).collect();
        summary.in_tree = in_tree.iter().filter(|&&yes| yes).count();
        let torn = |(sample, &in_tree): (&&Sample, &bool)| {
            sample.mode == Mode::Kernel && !sample.complete && !in_tree
        };
        let telling: Vec<bool> =
            recent.iter().zip(&in_tree).filter(|&pair| !torn(pair)).map(|(_, &in_tree)| in_tree).collect();
        summary.judged = recent.len();
        summary.torn = recent.len() - telling.len();
        summary.windows = windows(&telling, rules);
        summary.above = above(recent, &trunk);
        // Entry frames alone say "in a system call", which every busy task is.
        let meaningful = trunk.iter().any(|function| !is_entry(function));
        summary.spins = meaningful
            && summary.windows >= rules.windows
            && enough(summary.in_tree, telling.len(), rules.share)
            && telling.len() >= summary.torn;
        summary.trunk = trunk.into_iter().rev().collect();

        let halted: Vec<bool> = recent.iter().map(|sample| sample.mode == Mode::Halted).collect();
        let idle = halted.iter().filter(|&&yes| yes).count();
        summary.idle = windows(&halted, rules) >= rules.windows && enough(idle, halted.len(), rules.share);
        summary
    }

    /// The CPU executes: its instruction pointer or its registers changed. A stopped emulator looks like the tightest of
    /// loops.
    #[must_use]
    pub fn advances(&self) -> bool {
        self.distinct_ips > 1 || self.distinct_states > 1
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of samples are small")]
fn enough(part: usize, whole: usize, share: f64) -> bool {
    whole > 0 && part as f64 >= share * whole as f64
}

/// The functions of a sample from the root on.
fn from_root(sample: &Sample) -> impl Iterator<Item = &str> {
    sample.stack.iter().rev().map(|frame| base_name(&frame.function))
}

/// The longest list of functions from the root that at least `share` of all samples agree on. Walks that missed the root
/// do not vote.
fn trunk(samples: &[&Sample], share: f64) -> Vec<String> {
    let mut voters: Vec<Vec<&str>> =
        samples.iter().filter(|sample| sample.complete).map(|sample| from_root(sample).collect()).collect();
    let complete = voters.len();
    let mut trunk: Vec<String> = Vec::new();
    loop {
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        for voter in &voters {
            if let Some(&function) = voter.get(trunk.len()) {
                *votes.entry(function).or_default() += 1;
            }
        }
        let Some((&winner, &count)) = votes.iter().max_by_key(|&(_, &count)| count) else { break };
        if !enough(count, complete, share) {
            break;
        }
        let depth = trunk.len();
        trunk.push(winner.to_owned());
        voters.retain(|voter| voter.get(depth) == Some(&winner));
    }
    trunk
}

/// Whether a sample is in the tree. A walk that was torn before the root is in it if it holds the trunk's last function.
fn has_trunk(sample: &Sample, trunk: &[String]) -> bool {
    let Some(last) = trunk.last() else { return false };
    if sample.mode != Mode::Kernel {
        return false;
    }
    if sample.complete {
        let mut functions = from_root(sample);
        trunk.iter().all(|function| functions.next() == Some(function))
    } else {
        from_root(sample).any(|function| function == last)
    }
}

/// Whole windows in a row, counted back from the last sample, of which at least `share` holds.
fn windows(holds: &[bool], rules: &TreeRules) -> usize {
    let whole = holds.rchunks(rules.window.max(1)).filter(|window| window.len() == rules.window);
    // One torn walk in a short window must not break the row; the share is asked of all samples together.
    let tolerant = |window: &[bool]| window.iter().filter(|&&yes| yes).count() + 1 >= window.len();
    whole.take_while(|window| tolerant(window)).count()
}

fn above(samples: &[&Sample], trunk: &[String]) -> Vec<(String, usize)> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.complete && has_trunk(sample, trunk)) {
        let mut functions: Vec<&str> = from_root(sample).skip(trunk.len()).collect();
        functions.sort_unstable();
        functions.dedup();
        for function in functions {
            *seen.entry(function).or_default() += 1;
        }
    }
    let mut seen: Vec<(String, usize)> =
        seen.into_iter().map(|(function, count)| (function.to_owned(), count)).collect();
    seen.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    seen.truncate(16);
    seen
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::judge::stack::Frame;

    const ENTRY: [&str; 3] = ["entry_SYSCALL_64_after_hwframe", "do_syscall_64", "__x64_sys_ioctl"];

    /// A kernel sample: functions from below the system call entry on, root first.
    fn kernel(ip: u64, functions: &[&str]) -> Sample {
        let frame = |function: &&str| Frame {
            function: (*function).to_owned(),
            offset: 1,
            module: None,
            reliable: true,
            interrupt: false,
        };
        let stack = ENTRY.iter().chain(functions).rev().map(frame).collect();
        Sample { at: Duration::ZERO, mode: Mode::Kernel, ip, values: 0, stack, complete: true }
    }

    fn other(mode: Mode) -> Sample {
        Sample { at: Duration::ZERO, mode, ip: 7, values: 0, stack: Vec::new(), complete: true }
    }

    fn summary(samples: &[Sample]) -> CpuSummary {
        CpuSummary::of(1, &samples.iter().collect::<Vec<_>>(), &TreeRules::default())
    }

    fn spin(n: u64) -> Sample {
        let above: [&[&str]; 3] = [&[], &["walk_page_range"], &["walk_page_range", "do_swap_page"]];
        let functions: Vec<&str> =
            ["hsgpu_access", "hmm_range_fault"].iter().chain(above[n as usize % 3]).copied().collect();
        kernel(n, &functions)
    }

    #[test]
    fn a_wandering_leaf_over_one_trunk_spins() {
        let samples: Vec<Sample> = (0..20).map(spin).collect();
        let summary = summary(&samples);
        assert!(summary.spins && summary.advances(), "{summary:#?}");
        assert_eq!(summary.trunk[..2], ["hmm_range_fault", "hsgpu_access"]);
        assert_eq!((summary.judged, summary.windows), (15, 3));
        assert_eq!(summary.above[0].0, "walk_page_range");
    }

    #[test]
    fn work_in_many_places_of_one_system_call_does_not() {
        let places = ["migrate_vma_setup", "migrate_vma_pages", "hmm_range_fault", "copy_from_user"];
        let samples: Vec<Sample> = (0..20).map(|n| kernel(n, &[places[n as usize % 4]])).collect();
        let summary = summary(&samples);
        assert!(!summary.spins, "{summary:#?}");
    }

    #[test]
    fn work_that_ended_as_the_loop_began_does_not_hide_it() {
        let before = (0..4).map(|n| kernel(n, &["migrate_vma_setup"]));
        let samples: Vec<Sample> = before.chain((0..16).map(spin)).collect();
        let summary = summary(&samples);
        assert!(summary.spins && summary.judged == 15, "{summary:#?}");
    }

    #[test]
    fn a_task_that_returns_to_user_mode_does_not() {
        let samples: Vec<Sample> =
            (0..20).map(|n| if n % 5 == 0 { other(Mode::User) } else { spin(n) }).collect();
        assert!(!summary(&samples).spins);
    }

    #[test]
    fn too_few_samples_prove_nothing() {
        let samples: Vec<Sample> = (0..14).map(spin).collect();
        assert!(!summary(&samples).spins);
    }

    #[test]
    fn a_loop_at_one_address_advances_by_its_registers() {
        let samples: Vec<Sample> = (0..20).map(|n| Sample { values: n, ..spin(1) }).collect();
        let summary = summary(&samples);
        assert!(summary.spins && summary.advances() && summary.distinct_ips == 1, "{summary:#?}");
    }

    #[test]
    fn a_frozen_cpu_spins_but_does_not_advance() {
        let samples: Vec<Sample> = (0..20).map(|_| spin(1)).collect();
        let summary = summary(&samples);
        assert!(summary.spins && !summary.advances());
    }

    #[test]
    fn torn_walks_are_forgiven_when_they_agree() {
        let mut samples: Vec<Sample> = (0..40).map(spin).collect();
        for sample in samples.iter_mut().step_by(4) {
            sample.complete = false;
            sample.stack.truncate(sample.stack.len() - 2);
        }
        assert!(summary(&samples).spins);
        for sample in samples.iter_mut().step_by(4) {
            sample.stack.clear();
        }
        assert_eq!(
            (summary(&samples).judged, summary(&samples).torn, summary(&samples).spins),
            (30, 7, true)
        );
        for sample in &mut samples[20..] {
            sample.stack.clear();
            sample.complete = false;
        }
        assert!(!summary(&samples).spins, "most walks were torn");
    }

    #[test]
    fn an_idle_cpu() {
        let samples: Vec<Sample> =
            (0..20).map(|n| if n == 3 { spin(n) } else { other(Mode::Halted) }).collect();
        let summary = summary(&samples);
        assert!(summary.idle && !summary.spins, "{summary:#?}");
    }
}
