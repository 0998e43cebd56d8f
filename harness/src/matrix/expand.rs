//! From a plan's groups to cells.

use std::collections::BTreeMap;
use std::path::Path;

use super::candidate::{Candidate, Own};
use super::plan::{Cover, Error, Group, Mode, NO_CONTROL, OneOrMany, Plan};
use crate::build::Request;
use crate::cli::Preempt;
use crate::judge::scenario::Scenario;
use crate::judge::verdict::Verdict;
use crate::statistics::Sprt;
use crate::statistics::covering::pairwise;
use crate::vm::Size;

/// How selectors and lines name the kernel of a cell that is a tree of the user's.
const TREE: &str = "tree";

/// A cell of a plan: runs that differ in their seed alone.
#[derive(Clone, Debug, PartialEq)]
pub struct CellSpec {
    /// Group that asks for it, the first of several.
    pub group: String,
    /// Scenario.
    pub scenario: String,
    /// Control of it.
    pub control: Option<String>,
    /// Kernel of the list.
    pub kernel: String,
    /// Kind of build.
    pub flavour: Option<String>,
    /// Fix candidates, joined by `+`, or the name of the user's own.
    pub variant: String,
    /// The user's own.
    pub own: Option<Own>,
    /// Preemption model.
    pub preempt: Preempt,
    /// CPUs.
    pub cpus: u32,
    /// Mode.
    pub mode: Mode,
    /// Parameters that the plan sets, in its own words.
    pub parameters: BTreeMap<String, String>,
    /// What the guest is told of them: one that is given its default makes no other run.
    told: BTreeMap<String, String>,
    /// GPUs.
    pub gpus: Option<u32>,
    /// Guest memory.
    pub memory: Option<Size>,
    /// Memory of each GPU.
    pub vram: Option<Size>,
    /// Fault plan of the device.
    pub chaos: Option<String>,
    /// Further words of the kernel's command line.
    pub append: Vec<String>,
    /// Verdicts that are as expected; never empty.
    pub expected: Vec<Verdict>,
    /// Seed of the first run.
    pub first_seed: u64,
    /// Runs, at most.
    pub seeds: u64,
    /// When fewer are enough.
    pub stop: Option<Sprt>,
}

impl CellSpec {
    /// The command that makes one of its runs by itself.
    #[must_use]
    pub fn command(&self, seed: u64) -> String {
        let mut words = vec![format!("hmmstorm storm {}", self.scenario)];
        let mut option = |name: &str, value: Option<String>| {
            words.extend(value.map(|value| format!("--{name} {}", quoted(&value))));
        };
        option("kernel", Some(self.kernel.clone()).filter(|_| !self.is_of_tree()));
        option("control", self.control.clone());
        option("flavour", self.flavour.clone());
        match &self.own {
            None => option("variant", Some(self.variant.clone())),
            Some(own) => own.options().into_iter().for_each(|(name, value)| option(name, Some(value))),
        }
        option("preempt", Some(self.preempt.to_string()));
        option("cpus", Some(self.cpus.to_string()));
        for (name, value) in &self.parameters {
            option("param", Some(format!("{name}={value}")));
        }
        option("gpus", self.gpus.map(|gpus| gpus.to_string()));
        option("memory", self.memory.map(|size| size.to_string()));
        option("vram", self.vram.map(|size| size.to_string()));
        option("chaos", self.chaos.clone());
        for word in &self.append {
            option("append", Some(word.clone()));
        }
        option("seed", Some(seed.to_string()));
        option("expect", self.expected.first().map(|verdict| verdict.name().to_owned()));
        if self.mode == Mode::Deterministic {
            words.push("--deterministic".to_owned());
        }
        words.join(" ")
    }

    /// What to build for it.
    #[must_use]
    pub fn request(&self) -> Request {
        let flavour = self.flavour.as_deref();
        match &self.own {
            Some(own) => own.request(&self.kernel, flavour),
            None => Request {
                kernel: Some(self.kernel.clone()),
                variant: Some(self.variant.clone()),
                flavour: flavour.map(str::to_owned),
                ..Request::default()
            },
        }
    }

    /// Whether its kernel is a tree of the user's, and not one of the list.
    #[must_use]
    pub fn is_of_tree(&self) -> bool {
        self.own.as_ref().is_some_and(|own| own.tree.is_some())
    }

    /// Names the cell in a line.
    #[must_use]
    pub fn name(&self) -> String {
        let control = self.control.iter().map(|control| format!("/{control}"));
        let parameters = self.parameters.iter().map(|(name, value)| format!(" {name}={value}"));
        format!(
            "{}{}{} {} {} preempt={} {} CPUs {}",
            self.scenario,
            control.collect::<String>(),
            parameters.collect::<String>(),
            self.kernel,
            self.variant,
            self.preempt,
            self.cpus,
            self.mode
        )
    }

    /// Whether the runs are the same, whatever is expected of them and how many there are.
    fn same_runs(&self, other: &Self) -> bool {
        let strip = |cell: &Self| Self {
            group: String::new(),
            parameters: BTreeMap::new(),
            expected: Vec::new(),
            first_seed: 0,
            seeds: 0,
            stop: None,
            ..cell.clone()
        };
        strip(self) == strip(other)
    }
}

/// For a POSIX shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-=,/:".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The cells of a plan, in its order. `scenarios` is the folder of scenario definitions, `kernel` the reference kernel's
/// name. A cell that two groups ask for is one, with the greater number of runs.
///
/// # Errors
/// [`Error::Group`].
pub fn expand(plan: &Plan, scenarios: &Path, kernel: &str) -> Result<Vec<CellSpec>, Error> {
    let mut cells: Vec<CellSpec> = Vec::new();
    for group in &plan.groups {
        let error = |why: String| Error::Group { group: group.name.clone(), why };
        let candidates = candidates(group, plan.folder(), scenarios, kernel).map_err(error)?;
        if candidates.is_empty() {
            return Err(error("no combination is left to run".to_owned()));
        }
        for cell in candidates {
            match cells.iter_mut().find(|other| other.same_runs(&cell)) {
                None => cells.push(cell),
                Some(other) if other.expected != cell.expected => {
                    return Err(error(format!(
                        "group '{}' expects something else of {}",
                        other.group,
                        cell.name()
                    )));
                }
                Some(other) => {
                    let end = (other.first_seed + other.seeds).max(cell.first_seed + cell.seeds);
                    other.first_seed = other.first_seed.min(cell.first_seed);
                    other.seeds = end - other.first_seed;
                    other.stop = other.stop.and(cell.stop);
                }
            }
        }
    }
    Ok(cells)
}

fn candidates(group: &Group, folder: &Path, scenarios: &Path, kernel: &str) -> Result<Vec<CellSpec>, String> {
    let reference = OneOrMany::One(kernel.to_owned());
    let kernels = group.kernel.as_ref().unwrap_or(&reference).as_slice();
    let mut definitions = BTreeMap::new();
    for name in group.scenario.as_slice() {
        definitions.insert(name, Scenario::load(scenarios, name).map_err(|error| error.to_string())?);
    }
    let sizes: Vec<usize> = [
        group.scenario.as_slice().len(),
        group.control.as_slice().len(),
        kernels.len(),
        group.variant.as_slice().len(),
        group.preempt.as_slice().len(),
        group.cpus.as_slice().len(),
        group.mode.as_slice().len(),
    ]
    .into_iter()
    .chain(group.parameters.values().map(|values| values.as_slice().len()))
    .collect();
    let mut cells: Vec<CellSpec> = Vec::new();
    let mut rows = Vec::new();
    for row in combinations(&sizes) {
        let [scenario, control, kernel, variant, preempt, cpus, mode] =
            [0, 1, 2, 3, 4, 5, 6].map(|factor| row[factor]);
        let scenario = &group.scenario.as_slice()[scenario];
        let definition = &definitions[scenario];
        let control = Some(&group.control.as_slice()[control]).filter(|name| *name != NO_CONTROL);
        let control = control.map(|name| definition.control(name)).transpose().map_err(|e| e.to_string())?;
        let values = group.parameters.iter().zip(&row[7..]);
        let parameters: Vec<(String, String)> = values
            .map(|((name, values), &index)| (name.clone(), values.as_slice()[index].to_string()))
            .collect();
        let told = definition.parameters(control, &parameters).map_err(|error| error.to_string())?;
        let variant = &group.variant.as_slice()[variant];
        let own = match variant {
            Candidate::Listed(_) => None,
            Candidate::Own(own) if own.is_for(&kernels[kernel]) => Some(own.resolved(folder)),
            Candidate::Own(_) => continue,
        };
        let tree = own.as_ref().and_then(|own| own.tree.as_deref());
        let mut cell = CellSpec {
            group: group.name.clone(),
            scenario: scenario.clone(),
            control: control.map(|control| control.name.clone()),
            // A tree is the same whichever kernel it stands beside.
            kernel: tree.map_or_else(|| kernels[kernel].clone(), |_| TREE.to_owned()),
            flavour: group.flavour.clone(),
            variant: variant.to_string(),
            own,
            // A control that changes the preemption model is that change.
            preempt: control.and_then(|control| control.preempt).unwrap_or(group.preempt.as_slice()[preempt]),
            cpus: group.cpus.as_slice()[cpus],
            mode: group.mode.as_slice()[mode],
            parameters: parameters.into_iter().collect(),
            told,
            gpus: group.gpus,
            memory: group.memory,
            vram: group.vram,
            chaos: group.chaos.clone(),
            append: group.append.clone(),
            expected: vec![control.map_or(Verdict::Pass, |control| control.expect)],
            first_seed: group.first_seed,
            seeds: group.seeds,
            stop: group.stop,
        };
        if let Some(rule) = group.expect.iter().find(|rule| rule.when.picks(&cell)) {
            cell.expected = rule.verdict.as_slice().to_vec();
        }
        if !group.skip.iter().any(|skip| skip.picks(&cell)) && !cells.contains(&cell) {
            cells.push(cell);
            rows.push(row);
        }
    }
    if group.cover == Cover::Pairs {
        let chosen = pairwise(&rows);
        cells = chosen.into_iter().map(|index| cells[index].clone()).collect();
    }
    Ok(cells)
}

/// All rows with one value of each factor, the last factor changing fastest.
fn combinations(sizes: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let sizes = sizes.to_vec();
    let count: usize = sizes.iter().product();
    (0..count).map(move |mut number| {
        let mut row = vec![0; sizes.len()];
        for (value, size) in row.iter_mut().zip(&sizes).rev() {
            *value = number % size;
            number /= size;
        }
        row
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::plan;
    use super::*;

    fn cells(group: &str) -> Result<Vec<CellSpec>, Error> {
        let scenarios = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/scenarios");
        expand(&plan(group).expect("a plan"), &scenarios, "6.19.6")
    }

    const GROUP: &str = "variant = ['trylock', 'wait-on-locked']\npreempt = ['none', 'full']\ncpus = [2, 4]\n\
        seeds = 3\nparameters = { rounds = 5, order = ['system-first', 'device-first'] }\n\
        expect = [{ when = { variant = 'trylock', preempt = 'none', parameters = { order = 'system-first' } }, \
        verdict = 'livelock' }]\n";

    #[test]
    fn all_combinations_with_what_is_expected_of_each() {
        let all = cells(GROUP).expect("cells");
        assert_eq!(all.len(), 16);
        assert_eq!(all.iter().filter(|cell| cell.expected == [Verdict::Livelock]).count(), 2);
        assert_eq!(
            all[0].command(7),
            "hmmstorm storm drain-livelock --kernel 6.19.6 --variant trylock --preempt none --cpus 2 \
             --param order=system-first --param rounds=5 --seed 7 --expect livelock --deterministic"
        );
        let skipped = cells(&format!("{GROUP}skip = [{{ cpus = 4, preempt = ['full'] }}]\n")).expect("cells");
        assert_eq!(skipped.len(), 12);
        let pairs = cells(&format!("{GROUP}cover = 'pairs'\n")).expect("cells");
        assert!((4..=6).contains(&pairs.len()), "{}", pairs.len());
    }

    #[test]
    fn a_control_brings_its_model_and_its_expectation() {
        let group = "variant = 'trylock'\npreempt = ['none', 'voluntary']\ncpus = 4\nseeds = 1\n\
            control = ['none', 'preempt-full', 'mapcount-1']\nexpect = [{ when = { control = 'none' }, verdict = 'livelock' }]\n";
        let cells = cells(group).expect("cells");
        let said: Vec<_> = cells
            .iter()
            .map(|cell| (cell.control.as_deref().unwrap_or("-"), cell.preempt, cell.expected[0]))
            .collect();
        assert_eq!(
            said,
            [
                ("-", Preempt::None, Verdict::Livelock),
                ("-", Preempt::Voluntary, Verdict::Livelock),
                ("preempt-full", Preempt::Full, Verdict::Pass),
                ("mapcount-1", Preempt::None, Verdict::Pass),
                ("mapcount-1", Preempt::Voluntary, Verdict::Pass),
            ]
        );
    }

    #[test]
    fn a_column_of_the_user() {
        let mut plan = plan(&GROUP.replace("cpus = [2, 4]", "cpus = 2")).expect("a plan");
        let hash = plan.hash();
        plan.add(&Own::of_patch(Path::new("/x/my.patch")), "6.19.6").expect("added");
        plan.add(&Own::of_tree(Path::new("/src/linux")), "6.19.6").expect("added");
        assert_ne!(plan.hash(), hash);
        let scenarios = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/scenarios");
        let cells = expand(&plan, &scenarios, "6.19.6").expect("cells");
        assert_eq!(cells.len(), 16);
        let of = |name: &str| cells.iter().filter(|cell| cell.variant == name).collect::<Vec<_>>();
        assert_eq!(of("my.patch").len(), 4);
        assert!(of("my.patch").iter().all(|cell| cell.expected == [Verdict::Pass]));
        assert_eq!(
            of("my.patch")[0].command(1),
            "hmmstorm storm drain-livelock --kernel 6.19.6 --patch /x/my.patch --preempt none --cpus 2 \
             --param order=system-first --param rounds=5 --seed 1 --expect pass --deterministic"
        );
        let tree = of("tree-linux")[0];
        assert!(
            tree.command(1).contains("drain-livelock --tree /src/linux --preempt"),
            "{}",
            tree.command(1)
        );
        assert_eq!(tree.request().kernel, None);
        let other = GROUP.replace("cpus = [2, 4]", "kernel = '7.1.13'\ncpus = 2");
        let mut other = super::super::plan::tests::plan(&other).expect("a plan");
        assert!(other.add(&Own::of_patch(Path::new("/x/my.patch")), "6.19.6").is_err());
        assert!(other.add(&Own::of_tree(Path::new("/src/linux")), "6.19.6").is_ok());
    }

    #[test]
    fn groups_share_cells() {
        let two = format!(
            "{GROUP}[[group]]\nname = 'h'\nabout = 'a'\nscenario = 'drain-livelock'\nmode = 'deterministic'\n{}",
            GROUP.replace("seeds = 3", "seeds = 9").replace("['trylock', 'wait-on-locked']", "'trylock'")
        );
        let all = cells(&two).expect("cells");
        assert_eq!(all.len(), 16);
        assert_eq!(all.iter().map(|cell| cell.seeds).sum::<u64>(), 8 * 3 + 8 * 9);
        let spelt = two.replacen("parameters = { rounds = 5,", "parameters = { rounds = '05', lead = 4,", 1);
        assert_eq!(cells(&spelt).expect("cells").len(), 16, "the same runs in other words");
        let contradiction = two.replacen("verdict = 'livelock'", "verdict = 'deadlock'", 1);
        let error = cells(&contradiction).expect_err("a contradiction").to_string();
        assert!(error.contains("expects something else"), "{error}");
    }

    #[test]
    fn mistakes_name_the_group() {
        for (from, to, says) in [
            ("rounds = 5", "rounds = 0", "rounds"),
            ("rounds = 5", "turns = 5", "turns"),
            ("seeds = 3", "seeds = 3\ncontrol = 'x'", "no control 'x'"),
            ("seeds = 3", "seeds = 3\nskip = [{}]", "no combination"),
        ] {
            let error = cells(&GROUP.replace(from, to)).expect_err(to).to_string();
            assert!(error.contains("group 'g'") && error.contains(says), "{error}");
        }
    }

    #[test]
    fn shipped_plans_can_be_expanded() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for entry in std::fs::read_dir(root.join("ci/plans")).expect("ci/plans") {
            let plan = Plan::load(&entry.expect("an entry").path()).expect("a plan");
            let cells = expand(&plan, &root.join("storm/scenarios"), "6.19.6");
            assert!(!cells.unwrap_or_else(|error| panic!("{}: {error}", plan.name)).is_empty());
        }
    }
}
