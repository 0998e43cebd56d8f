//! Tasks that sleep and cannot be interrupted: with no work left, nobody has a reason to.

use std::fs;

/// A task in uninterruptible sleep, and where it sleeps if the kernel tells.
pub(super) fn uninterruptible() -> Option<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let tasks = processes
        .filter(|process| process.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
        .flat_map(|process| fs::read_dir(process.path().join("task")).into_iter().flatten().flatten());
    tasks.into_iter().find_map(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        let name = name_if_uninterruptible(&stat)?;
        let at = fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
        Some(format!("{name} is in uninterruptible sleep {at}"))
    })
}

/// `comm (pid)` of a line of `/proc/PID/stat` whose state is D.
fn name_if_uninterruptible(stat: &str) -> Option<String> {
    // The name may itself hold blanks and parentheses.
    let (before, after) = stat.rsplit_once(')')?;
    let (pid, name) = before.split_once(" (")?;
    (after.split_ascii_whitespace().next()? == "D").then(|| format!("{name} (pid {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_state_behind_any_name() {
        assert_eq!(name_if_uninterruptible("7 (a) D (b) S 1 2"), None);
        assert_eq!(name_if_uninterruptible("7 (a (b) S) D 1 2").as_deref(), Some("a (b) S (pid 7)"));
        assert_eq!(name_if_uninterruptible(""), None);
    }
}
