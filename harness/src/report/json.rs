//! What the other formats are made from, as JSON: cells with their counts, findings with their runs.

use serde::Serialize;
use std::collections::BTreeMap;

use super::compare::Shown;
use super::findings::reproducer;
use super::planned::Missing;
use super::{Error, Report};
use crate::judge::verdict::Verdict;
use crate::records::Conflict;
use crate::statistics::Share;

/// Version of this format; grows when a field changes its meaning or goes away.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Whole<'a> {
    format: u32,
    runs: usize,
    common: BTreeMap<&'a str, &'a str>,
    cells: Vec<CellJson<'a>>,
    findings: Vec<FindingJson<'a>>,
    comparisons: &'a [Shown],
    missing: &'a [Missing],
    conflicts: &'a [Conflict],
    troubles: Vec<TroubleJson<'a>>,
}

#[derive(Serialize)]
struct CellJson<'a> {
    cell: BTreeMap<&'a str, &'a str>,
    runs: Vec<&'a str>,
    verdicts: BTreeMap<Verdict, Share>,
    failures: Share,
    harness_errors: u64,
    unexpected: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<Verdict>,
    #[serde(skip_serializing_if = "Option::is_none")]
    faults_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ns: Option<BTreeMap<&'static str, u64>>,
}

#[derive(Serialize)]
struct FindingJson<'a> {
    identity: &'a str,
    title: &'a str,
    verdict: Verdict,
    unexpected: usize,
    runs: Vec<&'a str>,
    reproduce: String,
}

#[derive(Serialize)]
struct TroubleJson<'a> {
    place: &'a str,
    what: &'a str,
}

/// The report as JSON.
pub(super) fn json(report: &Report) -> Result<String, Error> {
    let ids = |runs: &[usize]| runs.iter().map(|&index| report.runs[index].record.id.as_str()).collect();
    let cells = report.layout.cells.iter().map(|cell| CellJson {
        cell: report
            .layout
            .axes
            .iter()
            .map(|axis| axis.name())
            .zip(cell.key.iter().map(String::as_str))
            .collect(),
        runs: ids(&cell.runs),
        verdicts: cell
            .verdicts
            .iter()
            .map(|&(verdict, n)| (verdict, Share::wilson(n, cell.judged)))
            .collect(),
        failures: cell.failures,
        harness_errors: cell.harness_errors,
        unexpected: cell.unexpected,
        expected: cell.expected,
        faults_per_second: cell.measures.fault_rate,
        latency_ns: cell.measures.latency.as_ref().map(|latency| {
            BTreeMap::from([
                ("p50", latency.value_at_quantile(0.5)),
                ("p99", latency.value_at_quantile(0.99)),
                ("p99.9", latency.value_at_quantile(0.999)),
                ("max", latency.max()),
                ("count", latency.len()),
            ])
        }),
    });
    let findings = report.findings.iter().map(|found| FindingJson {
        identity: &found.identity,
        title: &found.title,
        verdict: found.verdict,
        unexpected: found.unexpected,
        runs: ids(&found.runs),
        reproduce: reproducer(&report.runs[found.shown_by]),
    });
    let whole = Whole {
        format: FORMAT,
        runs: report.runs.len(),
        common: report.layout.common.iter().map(|(axis, value)| (axis.name(), value.as_str())).collect(),
        cells: cells.collect(),
        findings: findings.collect(),
        comparisons: report.comparisons.as_ref().map_or(&[], |comparisons| &comparisons.shown),
        missing: &report.missing,
        conflicts: &report.conflicts,
        troubles: report
            .troubles
            .iter()
            .map(|trouble| TroubleJson { place: &trouble.place, what: &trouble.what })
            .collect(),
    };
    Ok(serde_json::to_string_pretty(&whole)? + "\n")
}
