//! `hmmstorm conformance`: the kernel's own hmm-tests, unmodified, on our driver or on the stock one.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hmmstorm_abi::wire::event;
use serde::Serialize;

use super::prepare::programs_with_selftests;
use super::storm::runner::{Bench, Runner, Wish, configure};
use crate::cli::{Context, Error, ImageArgs, MachineArgs, Outcome};
use crate::judge::kselftest::{self, Reader, Status, TestResult, Totals};
use crate::judge::record::{self, Record};
use crate::judge::verdict::Verdict;
use crate::vm::Size;

/// The scenario that runs the tests in the guest.
const SCENARIO: &str = "conformance";
/// Version of the JSON; grows when a field changes its meaning or goes away.
const SCHEMA: u32 = 1;
/// Memory of each coherent device of the stock driver, MiB: `DEVMEM_CHUNK_SIZE` of `lib/test_hmm.c`.
const SPM_MIB: u64 = 256;
/// Guest memory up to which a q35 machine has it all below the PCI hole (`hw/i386/pc_q35.c`).
const Q35_LOW_MEMORY: u64 = 0xb000_0000;

/// Options of `hmmstorm conformance`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Driver that serves /dev/hmm_dmirror0..3
    #[arg(long, value_enum, default_value_t)]
    driver: Driver,
    /// Run only the tests whose name (fixture.variant.test) contains this; '*' stands for anything
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true, value_parser = word)]
    filter: String,
    /// Skipped tests are no failure
    #[arg(long)]
    allow_skips: bool,
    /// Guest seconds that a test may take [default: the scenario's]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    test_timeout: Option<u64>,
    /// Write results, verdict and provenance to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

fn word(text: &str) -> Result<String, String> {
    if text.contains(char::is_whitespace) { Err("names have no blanks".into()) } else { Ok(text.into()) }
}

/// Which driver is tested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// Ours, on the emulated GPUs
    #[default]
    Hsgpu,
    /// The kernel's own lib/test_hmm.ko, which needs no device, for comparison
    #[value(name = "test_hmm")]
    TestHmm,
}

impl Driver {
    fn name(self) -> &'static str {
        match self {
            Self::Hsgpu => "hsgpu",
            Self::TestHmm => "test_hmm",
        }
    }
}

/// What the JSON file holds.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: u32,
    driver: Driver,
    filter: &'a str,
    passed: bool,
    totals: Totals,
    tests: &'a [TestResult],
    /// Verdict on the kernel, its complaints, and what ran.
    run: &'a Record,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let mut machine = args.machine.clone();
    if args.driver == Driver::TestHmm {
        match machine.gpus {
            None | Some(0) => machine.gpus = Some(0),
            Some(_) => return Err(Error::usage("--driver test_hmm serves no GPU: leave out --gpus")),
        }
    }
    let filter = (!args.filter.is_empty()).then(|| ("filter".to_owned(), args.filter.clone()));
    let parameters: Vec<_> = filter.into_iter().collect();
    let wish = Wish { scenario: SCENARIO, control: None, parameters: &parameters, seed: 0 };
    let programs = || programs_with_selftests(&args.image, &machine, ctx);
    let mut configured = configure(wish, &machine, ctx, programs)?;
    if let Some(seconds) = args.test_timeout {
        configured.scenario.set_no_progress(Duration::from_secs(seconds));
    }
    let prepared = &mut configured.prepared;
    if args.driver == Driver::TestHmm {
        prepared.boot.spec.modules = vec!["test_hmm".into()];
        let memory = &mut prepared.boot.spec.profile.memory;
        prepared.boot.spec.append.extend(special_purpose(memory));
    }
    if machine.dry_run {
        print!("{}", prepared.dry_run());
        return Ok(Outcome::Pass);
    }
    let folder = prepared.folder(SCENARIO, ctx)?;
    let bench = Arc::new(Bench::new(prepared, ctx)?);
    let runner = Runner::new(configured, vec![Verdict::Pass], bench, ctx);
    ctx.note(format_args!(
        "hmm-tests on {}, driver {}; logs in {}",
        runner.kernel(),
        args.driver.name(),
        folder.dir().display()
    ));
    let mut reader = Reader::default();
    let mut printed = Ok(());
    let listen = |record: &event::Record| {
        if printed.is_ok() {
            printed = show(&mut reader, record);
        }
    };
    let record = runner.run_listening(0, folder.dir(), |_| (), listen)?;
    printed?;
    if reader.plan().is_some_and(<[String]>::is_empty) {
        return Err(Error::usage(format!("no test of this kernel matches '{}'", args.filter)));
    }
    let shown = reader.results().len();
    let results = reader.finish();
    let totals = kselftest::totals(&results);
    let verdict = record.judgement.verdict;
    let all_passed = totals.tests > 0 && totals.pass + totals.skip == totals.tests;
    let passed = verdict == Verdict::Pass && all_passed && (totals.skip == 0 || args.allow_skips);
    print!("{}", rest(&results, shown, totals, &record));
    let report = Report {
        schema: SCHEMA,
        driver: args.driver,
        filter: &args.filter,
        passed,
        totals,
        tests: &results,
        run: &record,
    };
    record::write_json(&folder.dir().join("conformance.json"), &report)?;
    if let Some(file) = &args.json {
        record::write_json(file, &report)?;
    }
    if verdict == Verdict::HarnessError && results.iter().all(|result| result.status != Status::Hung) {
        return Err(Error::harness(format!(
            "the tests were not finished: {}; evidence: {}",
            record.judgement.reason,
            folder.dir().display()
        )));
    }
    if !passed {
        ctx.note(format_args!("evidence: {}", folder.dir().display()));
    }
    Ok(if passed { Outcome::Pass } else { Outcome::Problem })
}

/// Gives the guest memory for two coherent devices of the stock driver, hidden from its kernel: behind what it has, as long
/// as the q35 machine keeps it in one piece. Otherwise the coherent tests skip themselves.
fn special_purpose(memory: &mut Size) -> Vec<String> {
    let start = memory.bytes();
    let needed = 2 * SPM_MIB;
    if start + (needed << 20) > Q35_LOW_MEMORY {
        return Vec::new();
    }
    *memory = Size::mib((start >> 20) + needed);
    vec![
        format!("memmap={needed}M${start:#x}"),
        format!("test_hmm.spm_addr_dev0={start:#x}"),
        format!("test_hmm.spm_addr_dev1={:#x}", start + (SPM_MIB << 20)),
    ]
}

/// Prints what a record adds to the KTAP.
fn show(reader: &mut Reader, record: &event::Record) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let number = reader.results().len() + 1;
    let planned = reader.plan().is_some();
    if let Some(result) = reader.record(record) {
        out.write_all(ktap(number, result).as_bytes())?;
    } else if let (false, Some(plan)) = (planned, reader.plan()) {
        write!(out, "KTAP version 1\n1..{}\n", plan.len())?;
    }
    out.flush()
}

/// A test's result, with what it printed if it did not pass.
fn ktap(number: usize, result: &TestResult) -> String {
    let mut text = String::new();
    if !matches!(result.status, Status::Pass | Status::Skip) {
        for line in &result.output {
            let _ = writeln!(text, "# {}", line.strip_prefix("# ").unwrap_or(line));
        }
    }
    let (word, directive) = match result.status {
        Status::Pass => ("ok", String::new()),
        Status::Skip => ("ok", format!(" # SKIP {}", result.reason.as_deref().unwrap_or_default())),
        Status::Fail => ("not ok", String::new()),
        Status::Timeout => ("not ok", " # timeout".to_owned()),
        Status::Hung => ("not ok", " # hung".to_owned()),
        Status::NotRun => ("not ok", " # not run".to_owned()),
    };
    let _ = writeln!(text, "{word} {number} {}{}", result.name, directive.trim_end());
    text
}

/// What is printed at the end: tests without a result, the kernel's complaints, totals.
fn rest(results: &[TestResult], shown: usize, totals: Totals, record: &Record) -> String {
    let mut text = String::new();
    for (number, result) in (1..).zip(results).skip(shown) {
        text.push_str(&ktap(number, result));
    }
    let judgement = &record.judgement;
    if judgement.verdict != Verdict::Pass {
        let _ = writeln!(text, "# {}: {}", judgement.verdict, judgement.reason);
        for also in &judgement.also {
            let _ = writeln!(text, "# also: {also}");
        }
    }
    let Totals { pass, fail, skip, lost, .. } = totals;
    let _ = writeln!(text, "# Totals: pass:{pass} fail:{fail} skip:{skip} hung-or-not-run:{lost}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(status: Status, reason: Option<&str>) -> TestResult {
        TestResult {
            name: "f.v.t".into(),
            status,
            milliseconds: None,
            reason: reason.map(str::to_owned),
            output: vec!["# t.c:1:t:Expected".into()],
        }
    }

    #[test]
    fn results_are_ktap() {
        assert_eq!(ktap(1, &result(Status::Pass, None)), "ok 1 f.v.t\n");
        assert_eq!(ktap(2, &result(Status::Skip, Some("no THP"))), "ok 2 f.v.t # SKIP no THP\n");
        assert_eq!(ktap(3, &result(Status::Fail, None)), "# t.c:1:t:Expected\nnot ok 3 f.v.t\n");
        assert_eq!(ktap(4, &result(Status::Hung, None)), "# t.c:1:t:Expected\nnot ok 4 f.v.t # hung\n");
    }

    #[test]
    fn coherent_memory_of_the_stock_driver_is_at_the_top() {
        let mut memory = Size::mib(2048);
        let words = special_purpose(&mut memory);
        assert_eq!(memory, Size::mib(2560));
        assert_eq!(words[0], "memmap=512M$0x80000000");
        assert_eq!(words[2], "test_hmm.spm_addr_dev1=0x90000000");
        let mut memory = Size::mib(2560);
        assert!(special_purpose(&mut memory).is_empty() && memory == Size::mib(2560));
    }
}
