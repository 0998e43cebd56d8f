//! What is said of a patch that does not apply: which hunk, where, what is there instead, and on top of what.

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
            shown(&mut lines, hunk.iter().map(|line| format!("  {line}")));
            if let Ok(text) = fs::read(dir.join(file)) {
                there(&mut lines, file, &hunk, place, &String::from_utf8_lossy(&text));
            }
        }
    }
    if hunks > HUNKS {
        lines.push(format!("... and {} more hunks", hunks - HUNKS));
    }
    // What is no reject: a file that is not there, a patch that was cut short.
    let complaints = said.lines().filter_map(|line| line.strip_prefix("error: "));
    let of_hunk =
        |line: &&str| line.starts_with("patch failed: ") || line.starts_with("while searching for:");
    lines.extend(complaints.filter(|line| !of_hunk(line)).map(str::to_owned));
    lines.join("\n")
}

/// Adds as many lines as are shown, and says how many are not.
fn shown(lines: &mut Vec<String>, all: impl ExactSizeIterator<Item = String>) {
    let count = all.len();
    lines.extend(all.take(HUNK_LINES));
    if count > HUNK_LINES {
        lines.push(format!("  ... {} more lines", count - HUNK_LINES));
    }
}

/// Adds what the file has where the hunk resembles it most, or else where the hunk would be. Lines that the hunk does not
/// know are marked.
fn there(lines: &mut Vec<String>, file: &Path, hunk: &[&str], place: &str, text: &str) {
    let old: Vec<&str> = hunk
        .iter()
        .skip(1)
        .filter(|line| !line.starts_with('+') && !line.starts_with('\\'))
        .map(|line| line.get(1..).unwrap_or_default())
        .collect();
    let has: Vec<&str> = text.lines().collect();
    let stated = place.parse::<usize>().unwrap_or(1).saturating_sub(1);
    let knows = |line: &str| old.contains(&line);
    // Lines that are known, first those that are not everywhere, as braces and blank lines are.
    let known = |at: usize| {
        let window = || has.iter().skip(at).take(old.len()).filter(|line| knows(line));
        (window().filter(|line| line.trim().len() > 2).count(), window().count())
    };
    let at = (0..has.len()).max_by_key(|&at| (known(at), std::cmp::Reverse(at.abs_diff(stated))));
    let Some(at) = at else { return };
    if known(at).0 == 0 && stated >= has.len() {
        lines.push(format!("{} ends at line {}", file.display(), has.len()));
        return;
    }
    lines.push(format!("what is there, {}:{} (! is not in the hunk):", file.display(), at + 1));
    let end = (at + old.len()).min(has.len());
    let marked = has[at..end].iter().map(|line| format!("  {}{line}", if knows(line) { ' ' } else { '!' }));
    shown(lines, marked);
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
    fn what_is_there_is_found_wherever_it_moved() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let text = "a\nb\nc\nint first(void)\n{\n\treturn 7;\n}\nint last(void)\n";
        fs::write(dir.path().join("x.c"), text).expect("write");
        let hunk = "@@ -1,4 +1,4 @@\n int first(void)\n {\n-\treturn 1;\n+\treturn 2;\n }\n";
        fs::write(dir.path().join("x.c.rej"), hunk).expect("write");
        let text = report(dir.path(), &["x.c".into()].into(), "");
        let there =
            "what is there, x.c:4 (! is not in the hunk):\n   int first(void)\n   {\n  !\treturn 7;\n   }";
        assert!(text.ends_with(there), "{text}");
        fs::write(dir.path().join("x.c"), "nothing\n").expect("write");
        fs::write(dir.path().join("x.c.rej"), hunk.replace("-1,4", "-90,4")).expect("write");
        assert!(report(dir.path(), &["x.c".into()].into(), "").ends_with("x.c ends at line 1"));
    }

    #[test]
    fn hunks_come_with_file_and_line() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let body: String = (0..40).map(|n| format!("+line {n}\n")).collect();
        let rejects = format!(
            "diff a/x.c b/x.c\t(rejected hunks)\n@@ -7,2 +7,3 @@ f()\n a\n-b\n@@ -90 +91,40 @@\n{body}"
        );
        fs::write(dir.path().join("x.c.rej"), rejects).expect("write");
        let said = "Checking patch x.c...\nerror: while searching for:\n a\nerror: patch failed: x.c:7\nerror: y.c: No such file or directory\n";
        let text = report(dir.path(), &["x.c".into(), "y.c".into()].into(), said);
        for part in
            ["x.c:7: this hunk", "  -b\n", "x.c:90: this hunk", "... 17 more lines", "y.c: No such file"]
        {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
        assert!(
            !text.contains("line 30") && !text.contains("patch failed") && !text.contains("searching"),
            "{text}"
        );
    }
}
