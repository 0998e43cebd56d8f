//! What ran, to the byte.

use maud::{Markup, html};

use crate::report::findings::patches;
use crate::report::provenance::{provenance, under_test};
use crate::report::{Counted, Report};

/// The section.
pub(super) fn section(report: &Report) -> Markup {
    let under_test = under_test(report);
    let abstractions: Vec<_> = report
        .runs
        .first()
        .map(|run| patches(run).into_iter().filter(|patch| patch.origin == "abstraction").collect())
        .unwrap_or_default();
    html! {
        h3 { "Under test" }
        dl.pairs {
            @for (name, about, patches) in &under_test {
                dt { code { (name) } }
                dd {
                    @if let Some(about) = about { (about) }
                    @for patch in patches { div.small { code { (patch.name) } " " span.faint.mono { (patch.sha256) } } }
                }
            }
        }
        h3 { "With what" }
        dl.pairs {
            @for (name, values) in provenance(report) {
                dt { (name) }
                dd { @for value in values { div { (value) } } }
            }
        }
        @if !abstractions.is_empty() {
            details {
                summary { (Counted(abstractions.len(), "patch")) "es that the driver stands on" }
                div.inside { ul { @for patch in &abstractions { li { code { (patch.name) } " " span.faint.mono.small { (patch.sha256) } } } } }
            }
        }
        @if let Some(run) = report.runs.first() {
            @let provenance = &run.record.provenance;
            details {
                summary { "Command lines of the first run" }
                div.inside {
                    h4 { "Guest kernel" } pre { code { (provenance.kernel_command_line) } }
                    @if let Some(device) = &provenance.device_command_line { h4 { "Device" } pre { code { (device) } } }
                    h4 { "QEMU" } pre { code { (provenance.qemu_command_line) } }
                }
            }
        }
    }
}
