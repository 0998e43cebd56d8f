//! Which complaint names a crash.

use crate::judge::console::{Class, Finding, Kind};
use crate::judge::stack::{contains, stable};

/// The complaint that a crash is named by: the first one. A panic only says that there was one, so what came with it
/// goes before it.
pub(super) fn first(findings: &[Finding]) -> Option<&Finding> {
    let mut crashes = findings.iter().filter(|finding| finding.class() == Class::Crash);
    crashes.next()
}

/// All crashes but the one that names it.
pub(super) fn others(findings: &[Finding]) -> impl Iterator<Item = &Finding> {
    findings.iter().filter(|finding| finding.class() == Class::Crash).skip(1)
}

/// The frames that name a crash: those of its stack without the machinery that reports it.
pub(super) fn frames(finding: &Finding) -> Vec<String> {
    let mut frames = stable(&finding.stack, 8);
    let reporting = |function: &str| {
        [
            "dump_stack",
            "show_stack",
            "bad_page",
            "panic",
            "__warn",
            "report_bug",
            "handle_bug",
            "asm_exc_",
            "exc_",
            "kasan_",
            "rust_helper_BUG",
        ]
        .iter()
        .any(|prefix| function.starts_with(prefix))
            || function.contains("panic_fmt")
            || function.contains("rust_begin_unwind")
    };
    if contains(&finding.stack, "dump_stack_lvl") || frames.iter().any(|function| reporting(function)) {
        frames.retain(|function| !reporting(function));
    }
    frames.truncate(3);
    frames
}

/// The kind of a crash in a word.
pub(super) fn word(finding: &Finding) -> &'static str {
    match finding.kind {
        Kind::Oops => "oops",
        Kind::KernelBug => "BUG",
        Kind::Warning => "WARN",
        Kind::BadPage => "bad page",
        Kind::BadAccounting => "bad accounting",
        Kind::Sanitizer => "sanitizer report",
        Kind::RustPanic => "Rust panic",
        Kind::Panic { .. } => "panic",
        Kind::UnexpectedReboot => "unexpected reboot",
        _ => "complaint",
    }
}
