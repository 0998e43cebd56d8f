//! `conformance`: the kernel's own `hmm-tests`, unmodified; its output goes to the host line by line.

use std::fs;
use std::io::{BufRead, BufReader, PipeReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hmmstorm_abi::wire::event::Event;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::clock::poll;
use crate::machine::unpin;

/// The program; `hmmstorm conformance` puts it there.
const PROGRAM: &str = "/bin/hmm-tests";
/// Guest time that processes of tests get to end once they are killed.
const REAP: Duration = Duration::from_secs(10);
/// Words with which the harness of the kernel's selftests tells of a test (`__run_test()` of `kselftest_harness.h`).
const RUN: &str = "#  RUN ";
const RESULTS: [&str; 2] = ["ok ", "not ok "];

/// The workload.
#[derive(Debug)]
pub(crate) struct Conformance {
    filter: String,
}

impl Conformance {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        Self { filter: parameters.text("filter").to_owned() }
    }
}

impl Workload for Conformance {
    fn workers(&self) -> Vec<String> {
        vec!["hmm-tests".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        let slot = context.board.slot(0);
        slot.enter("conformance");
        run(&self.filter, slot, context).map_err(|error| {
            error.post(slot);
            Stopped
        })
    }
}

fn run(filter: &str, slot: Slot<'_>, context: &Context<'_>) -> Result<(), WorkError> {
    // The tests are written for a scheduler that is free to move them.
    unpin().map_err(WorkError::system("sched_setaffinity"))?;
    // Each test is a process group of its own; what one leaves behind comes to us instead of PID 1.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(WorkError::system("prctl(PR_SET_CHILD_SUBREAPER)"))?;
    let emit = |event| context.sink.emit(event).map_err(WorkError::system("write an event"));

    let all = list()?;
    let chosen: Vec<&String> = all.iter().filter(|name| matches(filter, name)).collect();
    emit(Event::Tests { names: chosen.iter().copied().cloned().collect() })?;
    if chosen.is_empty() {
        return Err(WorkError::Condition(format!("no test's name matches `{filter}`")));
    }
    let part = chosen.iter().filter(|_| chosen.len() < all.len());
    let (mut program, mut output) = spawn(part.flat_map(|name| ["-r", name]))?;
    let mut line = Vec::new();
    // A process that outlives the program holds the pipe too, so its end is not waited for, but the plan's is.
    let mut left = chosen.len();
    while left > 0 {
        line.clear();
        match output.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => (),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(WorkError::system("read hmm-tests' output")(error)),
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.starts_with(RUN) {
            slot.begin();
        } else if RESULTS.iter().any(|result| text.starts_with(result)) {
            slot.complete(0);
            left -= 1;
        }
        emit(Event::Output { line: text.to_owned() })?;
    }
    let status = program.wait().map_err(WorkError::system("wait for hmm-tests"))?;
    // 0 and 1 are its own words on the tests.
    if left > 0 || !matches!(status.code(), Some(0 | 1)) {
        return Err(WorkError::Condition(format!("hmm-tests ended with {status} and {left} tests to go")));
    }
    reap()
}

/// Starts hmm-tests; gives all that it prints.
pub(super) fn spawn<'a>(
    arguments: impl IntoIterator<Item = &'a str>,
) -> Result<(Child, BufReader<PipeReader>), WorkError> {
    let (output, pipe) = std::io::pipe().map_err(WorkError::system("pipe"))?;
    let stderr = pipe.try_clone().map_err(WorkError::system("dup"))?;
    // The command holds the pipe's write ends, and is gone when this returns.
    let program = Command::new(PROGRAM)
        .args(arguments)
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(pipe)
        .stderr(stderr)
        .spawn()
        .map_err(WorkError::system("exec(/bin/hmm-tests)"))?;
    Ok((program, BufReader::new(output)))
}

/// Sees that no process of a test is left: one that a time limit killed may hang in the kernel.
fn reap() -> Result<(), WorkError> {
    let ended = poll(REAP, || {
        for pid in children() {
            // One that has ended meanwhile is what is wanted.
            let _gone = kill_process(pid, Signal::KILL);
        }
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => (),
                Ok(None) => return None,
                Err(_no_children) => return Some(()),
            }
        }
    });
    if ended.is_some() {
        return Ok(());
    }
    let stuck = children().into_iter().map(|pid| {
        let number = pid.as_raw_nonzero();
        let stack = fs::read_to_string(format!("/proc/{number}/stack")).unwrap_or_default();
        let frames = stack.lines().filter_map(|line| line.split_whitespace().last()).collect::<Vec<_>>();
        format!("pid {number} in {}", if frames.is_empty() { "?".to_owned() } else { frames.join(" <- ") })
    });
    Err(WorkError::Condition(format!(
        "processes of tests cannot be killed: {}",
        stuck.collect::<Vec<_>>().join("; ")
    )))
}

fn children() -> Vec<Pid> {
    let path = format!("/proc/self/task/{}/children", rustix::thread::gettid().as_raw_nonzero());
    let list = fs::read_to_string(path).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// All tests, in the order in which they run.
fn list() -> Result<Vec<String>, WorkError> {
    let output = Command::new(PROGRAM).arg("-l").stdin(Stdio::null()).output();
    let output = output.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => WorkError::Condition(format!(
            "{PROGRAM} is not in this guest: only `hmmstorm conformance` and `hmmstorm bench` put it there"
        )),
        _ => WorkError::system("exec(/bin/hmm-tests -l)")(error),
    })?;
    let names = parse_list(&String::from_utf8_lossy(&output.stderr));
    if names.is_empty() {
        return Err(WorkError::Condition(format!("{PROGRAM} -l lists no test")));
    }
    Ok(names)
}

/// Reads what `-l` prints: for each fixture, separated by rules of dashes, three columns that have nothing to do with
/// each other: the fixture's name, its variants, its tests (`test_harness_list_tests()`: `%-20s %-25s %s`).
fn parse_list(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut lines = text.lines().skip_while(|line| !line.starts_with("# FIXTURE")).skip(1).peekable();
    while lines.peek().is_some() {
        let (mut fixture, mut variants, mut tests) = ("", Vec::new(), Vec::new());
        for line in lines.by_ref().take_while(|line| !line.starts_with("---")) {
            let mut columns = line.splitn(2, ' ');
            let mut rest = line;
            if !line.starts_with(' ') {
                fixture = columns.next().unwrap_or_default();
                rest = line.get(fixture.len()..).unwrap_or_default();
            }
            // A name that is longer than its column is followed by one blank.
            let start = 21_usize.saturating_sub(line.len() - rest.len()).max(1);
            let rest = rest.get(start..).unwrap_or_default();
            let variant = if rest.starts_with(' ') { "" } else { rest.split(' ').next().unwrap_or_default() };
            variants.extend(Some(variant).filter(|variant| !variant.is_empty()));
            let test = rest.get(variant.len()..).unwrap_or_default().trim();
            tests.extend(Some(test).filter(|test| !test.is_empty()));
        }
        if variants.is_empty() {
            names.extend(tests.iter().map(|test| format!("{fixture}.{test}")));
        }
        for variant in variants {
            names.extend(tests.iter().map(|test| format!("{fixture}.{variant}.{test}")));
        }
    }
    names
}

/// Whether `name` contains the words between the `*` of `filter`, in this order.
fn matches(filter: &str, name: &str) -> bool {
    let mut rest = name;
    filter.split('*').all(|word| match rest.find(word) {
        Some(at) => {
            rest = rest.get(at + word.len()..).unwrap_or_default();
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = concat!(
        "# FIXTURE            VARIANT                   TEST\n",
        "hmm                  hmm_device_private        open_close\n",
        "                     hmm_device_coherent       anon_read\n",
        "                                               a_test_with_a_very_long_name_indeed\n",
        "--------------------------------------------------------------------------------\n",
        "hmm2                 hmm2_device_private_with_a_long_name migrate_mixed\n",
        "                     hmm2_device_coherent      \n",
        "--------------------------------------------------------------------------------\n",
        "global                                         plain\n",
    );

    #[test]
    fn the_list_is_read() {
        let expected = [
            "hmm.hmm_device_private.open_close",
            "hmm.hmm_device_private.anon_read",
            "hmm.hmm_device_private.a_test_with_a_very_long_name_indeed",
            "hmm.hmm_device_coherent.open_close",
            "hmm.hmm_device_coherent.anon_read",
            "hmm.hmm_device_coherent.a_test_with_a_very_long_name_indeed",
            "hmm2.hmm2_device_private_with_a_long_name.migrate_mixed",
            "hmm2.hmm2_device_coherent.migrate_mixed",
            "global.plain",
        ];
        assert_eq!(parse_list(LIST), expected);
        assert!(parse_list("Usage: hmm-tests").is_empty());
    }

    #[test]
    fn filters_match_parts_of_names() {
        let name = "hmm.hmm_device_private.migrate_fault";
        for filter in ["", "*", "migrate", "private.migrate", "private*fault", "hmm.*.migrate_fault"] {
            assert!(matches(filter, name), "{filter}");
        }
        for filter in ["coherent", "fault*private", "migrate_faults"] {
            assert!(!matches(filter, name), "{filter}");
        }
    }
}
