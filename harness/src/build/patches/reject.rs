//! What is said of a patch that does not apply: which hunk, where, and on top of what.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of each hunk that are shown.
const HUNK_LINES: usize = 24;
/// Hunks that are shown.
const HUNKS: usize = 4;

/// The report: each hunk that found no place with file and line, and what else git had to say.
///
/// `dir` is where `git apply --reject` left its `.rej` files, `said` is what it printed.
pub(super) fn report(dir: &Path, files: &BTreeSet<PathBuf>, said: &str) -> String {
    let mut lines = Vec::new();
    let mut hunks = 0;
    for file in files {
        let Ok(rejects) = fs::read(dir.join(format!("{}.rej", file.display()))) else { continue };
        let rejects = String::from_utf8_lossy(&rejects).into_owned();
        for hunk in split(&rejects) {
            hunks += 1;
            if hunks > HUNKS {
                continue;
            }
            let place = hunk.first().and_then(|head| start(head)).unwrap_or_default();
            lines.push(format!("{}:{place}: this hunk finds no place:", file.display()));
            lines.extend(hunk.iter().take(HUNK_LINES).map(|line| format!("  {line}")));
            if hunk.len() > HUNK_LINES {
                lines.push(format!("  ... {} more lines", hunk.len() - HUNK_LINES));
            }
        }
    }
    if hunks > HUNKS {
        lines.push(format!("... and {} more hunks", hunks - HUNKS));
    }
    // What is no reject: a file that is not there, a patch that was cut short.
    let complaints = said.lines().filter_map(|line| line.strip_prefix("error: "));
    lines.extend(complaints.filter(|line| !line.starts_with("patch failed: ")).map(str::to_owned));
    lines.join("\n")
}

/// The hunks of a `.rej` file.
fn split(rejects: &str) -> Vec<Vec<&str>> {
    let mut hunks: Vec<Vec<&str>> = Vec::new();
    for line in rejects.lines() {
        if line.starts_with("@@ -") {
            hunks.push(Vec::new());
        }
        if let Some(hunk) = hunks.last_mut() {
            hunk.push(line);
        }
    }
    hunks
}

/// `@@ -4684,7 +4684,8 @@`: 4684, as text.
fn start(head: &str) -> Option<&str> {
    head.strip_prefix("@@ -")?.split([',', ' ']).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hunks_come_with_file_and_line() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let body: String = (0..40).map(|n| format!("+line {n}\n")).collect();
        let rejects = format!(
            "diff a/x.c b/x.c\t(rejected hunks)\n@@ -7,2 +7,3 @@ f()\n a\n-b\n@@ -90 +91,40 @@\n{body}"
        );
        fs::write(dir.path().join("x.c.rej"), rejects).expect("write");
        let said =
            "Checking patch x.c...\nerror: patch failed: x.c:7\nerror: y.c: No such file or directory\n";
        let text = report(dir.path(), &["x.c".into(), "y.c".into()].into(), said);
        for part in
            ["x.c:7: this hunk", "  -b\n", "x.c:90: this hunk", "... 17 more lines", "y.c: No such file"]
        {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
        assert!(!text.contains("line 30") && !text.contains("patch failed"), "{text}");
    }
}
