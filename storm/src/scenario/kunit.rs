//! `kunit`: what the kernel's KUnit suites found when they ran at boot (`kunit.enable=1`).

use std::fs;
use std::path::Path;

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};

/// Where KUnit leaves a folder with a file `results` for each suite (`lib/kunit/debugfs.c`).
const SUITES: &str = "/sys/kernel/debug/kunit";

/// The workload.
#[derive(Debug)]
pub(crate) struct Kunit {
    suites: usize,
}

impl Kunit {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        Self { suites: parameters.integer("suites") as usize }
    }
}

impl Workload for Kunit {
    fn workers(&self) -> Vec<String> {
        vec!["kunit".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        let slot = context.board.slot(0);
        slot.enter("kunit");
        slot.begin();
        match check(Path::new(SUITES), self.suites) {
            Ok(()) => {
                slot.complete(0);
                Ok(())
            }
            Err(error) => {
                error.post(slot);
                Err(Stopped)
            }
        }
    }
}

/// Reads every suite's results.
fn check(folder: &Path, expected: usize) -> Result<(), WorkError> {
    let mut passed = 0;
    let entries = fs::read_dir(folder).map_err(WorkError::system("read_dir(/sys/kernel/debug/kunit)"))?;
    for entry in entries {
        let entry = entry.map_err(WorkError::system("read_dir(/sys/kernel/debug/kunit)"))?;
        let suite = entry.file_name().to_string_lossy().into_owned();
        let results = fs::read_to_string(entry.path().join("results"))
            .map_err(WorkError::system("read a suite's results"))?;
        verdict(&results).map_err(|why| WorkError::Condition(format!("KUnit suite {suite}: {why}")))?;
        passed += 1;
    }
    if passed < expected {
        let why = format!(
            "{passed} KUnit suites ran and {expected} were expected; was the guest booted with kunit.enable=1?"
        );
        return Err(WorkError::Condition(why));
    }
    Ok(())
}

/// Whether a suite's KTAP says that cases ran and none failed.
fn verdict(ktap: &str) -> Result<(), String> {
    let lines = || ktap.lines().map(str::trim);
    let failed: Vec<_> = lines().filter(|line| line.starts_with("not ok ")).collect();
    if !failed.is_empty() {
        return Err(failed.join("; "));
    }
    // A case is indented below its suite; the suite's own line alone says that nothing ran.
    let cases = ktap.lines().filter(|line| line.starts_with(' ') && line.trim().starts_with("ok ")).count();
    if cases == 0 { Err("no case ran".to_owned()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::verdict;

    const PASSED: &str =
        "KTAP version 1\n\n    KTAP version 1\n    # Subtest: s\n    1..2\n    ok 1 a\n    ok 2 b\nok 1 s\n";

    #[test]
    fn results_are_read() {
        assert_eq!(verdict(PASSED), Ok(()));
        assert_eq!(verdict(&PASSED.replace("ok 2 b", "not ok 2 b")), Err("not ok 2 b".to_owned()));
        assert_eq!(verdict("KTAP version 1\n1..0\nok 1 s\n"), Err("no case ran".to_owned()));
        assert_eq!(verdict(""), Err("no case ran".to_owned()));
    }
}
