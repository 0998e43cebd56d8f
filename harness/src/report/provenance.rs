//! What ran, and with what: the same for every format that says it.

use super::Report;
use super::findings::{Patch, patches};
use super::run::Run;
use super::text::cut;

/// The fix candidates that ran, each with what it is and its patches.
pub(super) fn under_test(report: &Report) -> Vec<(String, Option<String>, Vec<Patch>)> {
    let mut seen: Vec<(String, Option<String>, Vec<Patch>)> = Vec::new();
    for run in &report.runs {
        let name = &run.record.run.variant;
        let own: Vec<Patch> =
            patches(run).into_iter().filter(|patch| patch.origin != "abstraction").collect();
        if !seen.iter().any(|(known, _, patches)| known == name && *patches == own) {
            let about =
                report.variants.iter().find(|(known, _)| known == name).map(|(_, about)| about.clone());
            seen.push((name.clone(), about, own));
        }
    }
    let rank = |name: &str| report.variants.iter().position(|(known, _)| known == name).unwrap_or(usize::MAX);
    seen.sort_by_key(|(name, _, _)| (rank(name), name.clone()));
    seen
}

/// What the runs ran with: a name, and each value that occurs.
pub(super) fn provenance(report: &Report) -> Vec<(&'static str, Vec<String>)> {
    let image = |field: &'static str| move |run: &Run| run.image(field).map(str::to_owned);
    type Value<'a> = Box<dyn Fn(&Run) -> Option<String> + 'a>;
    let fields: Vec<(&'static str, Value<'_>)> = vec![
        (
            "hmmstorm",
            Box::new(|run| {
                let provenance = &run.record.provenance;
                let commit = provenance.harness_commit.as_deref().map(|commit| format!(" at {commit}"));
                Some(format!("{}{}", provenance.harness_version, commit.unwrap_or_default()))
            }),
        ),
        ("kernel source, SHA-256", Box::new(image("kernel_source_sha256"))),
        ("kernel configuration, SHA-256", Box::new(image("config_sha256"))),
        ("driver, SHA-256", Box::new(image("driver_sha256"))),
        (
            "compilers",
            Box::new(|run| {
                let tools = ["cc", "rustc", "bindgen"].iter().filter_map(|tool| run.image(tool));
                Some(tools.collect::<Vec<_>>().join(", ")).filter(|tools| !tools.is_empty())
            }),
        ),
        ("QEMU", Box::new(|run| run.record.provenance.qemu_version.clone())),
        ("host", Box::new(|run| Some(run.record.provenance.host.clone()).filter(|host| !host.is_empty()))),
    ];
    let values = |value: &Value<'_>| {
        let mut values: Vec<String> = Vec::new();
        for said in report.runs.iter().filter_map(value) {
            let said = cut(&said, 300);
            if !values.contains(&said) {
                values.push(said);
            }
        }
        values
    };
    fields
        .iter()
        .map(|(name, value)| (*name, values(value)))
        .filter(|(_, values)| !values.is_empty())
        .collect()
}
