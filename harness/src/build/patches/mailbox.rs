//! Mailboxes: a series of patches as it was sent, in the order of its numbers.

use std::fs::{self, File};
use std::path::Path;

use super::super::error::IoContext;
use super::super::process::{capture, which};
use super::super::{BuildError, Cache};
use super::{Origin, Patch, git};

/// A mail with a patch.
#[derive(Debug, PartialEq, Eq)]
struct Mail {
    /// Its place in the file, from 1.
    number: usize,
    subject: String,
    diff: Vec<u8>,
}

/// Whether a file's text is a mailbox: every mail of one begins with a line of that kind.
pub(super) fn is_mailbox(text: &[u8]) -> bool {
    text.starts_with(b"From ")
}

/// The patches of a mailbox, in order. Cover letters and answers hold none.
pub(super) fn patches(
    file: &Path,
    name: &str,
    origin: &Origin,
    cache: &Cache,
) -> Result<Vec<Patch>, BuildError> {
    let mut mails = mails(file, cache)?;
    sort(&mut mails, name)?;
    if mails.is_empty() {
        return Err(BuildError::Usage(format!("{name} is a mailbox in which no mail holds a patch")));
    }
    let only = mails.len() == 1;
    mails
        .into_iter()
        .map(|mail| {
            let name = match only {
                true => name.to_owned(),
                false => format!("{name}, mail {} ({})", mail.number, title(&mail.subject)),
            };
            Patch::new(name, origin.clone(), mail.diff)
        })
        .collect()
}

/// Takes a mailbox apart, whatever the encoding of its mails.
fn mails(file: &Path, cache: &Cache) -> Result<Vec<Mail>, BuildError> {
    if which("git").is_none() {
        return Err(BuildError::Tool {
            tool: "git".into(),
            reason: "is needed to take a mailbox apart".into(),
        });
    }
    let scratch = cache.scratch()?;
    let dir = scratch.path();
    let mut split = git(dir);
    split
        .arg("mailsplit")
        .arg(format!("-o{}", dir.display()))
        .arg(std::path::absolute(file).on("find", file)?);
    let count: usize = capture(&mut split)?.parse().unwrap_or(0);
    let mut mails = Vec::new();
    for number in 1..=count {
        let mail = dir.join(format!("{number:04}"));
        let (message, diff) = (dir.join("message"), dir.join("diff"));
        let mut info = git(dir);
        // -k: the series' numbers are in what it would take off the subject.
        info.args(["mailinfo", "-k"]).args([&message, &diff]);
        info.stdin(File::open(&mail).on("open", &mail)?);
        let output = info.output().on("take apart", file)?;
        let headers = String::from_utf8_lossy(&output.stdout).into_owned();
        let subject = headers.lines().find_map(|l| l.strip_prefix("Subject: ")).unwrap_or_default();
        let diff = fs::read(&diff).on("read", &diff)?;
        let is_answer = subject.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("re:"));
        if !diff.is_empty() && !is_answer {
            mails.push(Mail { number, subject: subject.to_owned(), diff });
        }
    }
    Ok(mails)
}

/// Puts mails in the order of the numbers in their subjects, if all of them have one: archives sort by time of arrival.
fn sort(mails: &mut [Mail], name: &str) -> Result<(), BuildError> {
    let Some(mut places) = mails.iter().map(|mail| place(&mail.subject)).collect::<Option<Vec<_>>>() else {
        return Ok(());
    };
    places.sort_unstable();
    if let Some([(place, of), _]) = places.array_windows().find(|[a, b]| a == b || a.1 != b.1) {
        return Err(BuildError::Usage(format!(
            "{name} holds more than one series, or more than one version of it (see {place}/{of}): keep one"
        )));
    }
    mails.sort_by_key(|mail| place(&mail.subject));
    Ok(())
}

/// `[PATCH v2 3/7] ...`: 3 and 7.
fn place(subject: &str) -> Option<(u32, u32)> {
    let (brackets, _) = subject.trim_start().strip_prefix('[')?.split_once(']')?;
    brackets.split_whitespace().find_map(|word| {
        let (number, of) = word.split_once('/')?;
        Some((number.parse().ok()?, of.parse().ok()?))
    })
}

/// The subject without what is in brackets in front of it.
fn title(subject: &str) -> &str {
    let mut rest = subject.trim();
    while let Some((_, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        rest = after.trim_start();
    }
    if rest.is_empty() { "no subject" } else { rest }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mail with a patch of `file`.
    fn mail(subject: &str, file: &str) -> String {
        format!(
            "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\nFrom: A <a@b.c>\n\
             Date: Sun, 22 Nov 2026 00:00:00 +0000\nSubject: {subject}\n\nWhy.\n---\n {file} | 2 +-\n\n\
             diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-one\n+two\n-- \n2.47\n\n"
        )
    }

    fn read(text: &str) -> Result<Vec<Patch>, BuildError> {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(&dir.path().join("cache")).expect("cache");
        let file = dir.path().join("x.mbox");
        fs::write(&file, text).expect("write");
        patches(&file, "x.mbox", &Origin::User, &cache)
    }

    fn files(patches: &[Patch]) -> Vec<String> {
        patches.iter().flat_map(|p| p.files()).map(|f| f.display().to_string()).collect()
    }

    #[test]
    fn a_series_is_applied_in_the_order_of_its_numbers() {
        let cover = mail("[PATCH 0/2] both", "x").split("---\n").next().expect("mail").to_owned() + "\n";
        let text =
            [mail("[PATCH v3 2/2] two", "mm/y.c"), cover, mail("[PATCH v3 1/2] one", "mm/x.c")].concat();
        let patches = read(&text).expect("two patches");
        assert_eq!(files(&patches), ["mm/x.c", "mm/y.c"]);
        assert_eq!(patches[0].name, "x.mbox, mail 3 (one)");
    }

    #[test]
    fn answers_with_a_diff_are_no_part_of_it() {
        let text = [mail("[PATCH 1/1] one", "mm/x.c"), mail("Re: [PATCH 1/1] one", "mm/y.c")].concat();
        let patches = read(&text).expect("one patch");
        assert_eq!(files(&patches), ["mm/x.c"]);
        assert_eq!(patches[0].name, "x.mbox");
    }

    #[test]
    fn mails_without_numbers_keep_their_order() {
        let text = [mail("[PATCH] b", "mm/y.c"), mail("a", "mm/x.c")].concat();
        assert_eq!(files(&read(&text).expect("two patches")), ["mm/y.c", "mm/x.c"]);
    }

    #[test]
    fn two_versions_of_a_series_are_refused() {
        let twice = [mail("[PATCH 1/2] a", "mm/x.c"), mail("[PATCH v2 1/2] a", "mm/x.c")].concat();
        let error = read(&twice).expect_err("two versions").to_string();
        assert!(error.contains("x.mbox") && error.contains("1/2"), "{error}");
        let other = [mail("[PATCH 1/2] a", "mm/x.c"), mail("[PATCH 2/3] a", "mm/x.c")].concat();
        assert!(read(&other).is_err());
    }

    #[test]
    fn a_mailbox_without_patches_is_an_error() {
        let text = mail("[PATCH 0/2] both", "x").split("---\n").next().expect("mail").to_owned();
        assert!(read(&text).expect_err("no patch").to_string().contains("no mail holds a patch"));
    }
}
