//! Finds the Debian archive in the host's own apt sources, in both of their formats.

use std::fs;
use std::path::{Path, PathBuf};

use super::BuildError;

/// Overrides what the host's sources say: URI of any Debian mirror.
pub const MIRROR_VARIABLE: &str = "HMMSTORM_DEBIAN_MIRROR";

/// Names of Debian releases, by which an archive is known to be Debian's.
const DEBIAN_SUITES: [&str; 12] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "experimental",
];

/// An archive that the host uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where it is.
    pub(super) uri: String,
    /// Its releases.
    pub(super) suites: Vec<String>,
    /// Keyring files that it must be signed with, if it says so.
    pub(super) signed_by: Vec<PathBuf>,
}

/// The archive to fetch from: `$HMMSTORM_DEBIAN_MIRROR`, else the one that the host's apt uses.
pub(super) fn debian_archive() -> Result<Entry, BuildError> {
    if let Some(uri) = std::env::var_os(MIRROR_VARIABLE) {
        let uri = uri.to_string_lossy().into_owned();
        return Ok(Entry { uri, suites: Vec::new(), signed_by: Vec::new() });
    }
    choose(host_entries(Path::new("/etc/apt"))).ok_or_else(|| {
        BuildError::NoArchive(format!(
            "this host's apt sources (/etc/apt/sources.list, /etc/apt/sources.list.d/) name no Debian archive to fetch \
             from: set {MIRROR_VARIABLE}=URI to any Debian mirror. Its signing keys are in the package \
             debian-archive-keyring, which Ubuntu has too. Without a mirror you can bring your own: QEMU (10.1 or \
             newer) as a host package, `rustup component add rust-src`, and a kernel with --tree or --tarball"
        ))
    })
}

/// All archives that apt would use, with `etc` in the place of `/etc/apt`.
pub(super) fn host_entries(etc: &Path) -> Vec<Entry> {
    let mut files = vec![etc.join("sources.list")];
    let mut parts: Vec<_> =
        fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    parts.sort();
    files.append(&mut parts);
    let mut entries = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => entries.extend(text.lines().filter_map(one_line)),
            Some("sources") => entries.extend(deb822(&text)),
            _ => {} // apt ignores it too
        }
    }
    entries
}

/// The first entry that is Debian's main archive: by the names of its releases, and not a security or overlay archive.
fn choose(entries: Vec<Entry>) -> Option<Entry> {
    entries.into_iter().find(|entry| {
        entry.suites.iter().any(|s| DEBIAN_SUITES.contains(&s.as_str())) && !entry.uri.contains("-security")
    })
}

/// `deb [options] URI suite component...`
fn one_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None; // deb-src, or something else altogether
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    let suite = words.next()?.to_owned();
    let signed_by = options
        .split_whitespace()
        .find_map(|o| o.strip_prefix("signed-by="))
        .map(|v| v.split(',').map(PathBuf::from).collect())
        .unwrap_or_default();
    Some(Entry { uri, suites: vec![suite], signed_by })
}

/// Stanzas of `Field: value`, continued by indented lines, parted by empty lines.
fn deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            entries.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    entries
}

fn stanza(fields: &[(String, String)]) -> Vec<Entry> {
    let field = |name: &str| fields.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v.as_str());
    let words = |name: &str| field(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let is_off = ["no", "false", "0", "off", "disable", "without"].contains(&field("enabled"));
    if is_off || !words("types").contains(&"deb".to_owned()) {
        return Vec::new();
    }
    // A key given in place, instead of a file's name, starts with a PGP header.
    let signed_by = if field("signed-by").contains("BEGIN PGP") {
        Vec::new()
    } else {
        words("signed-by").into_iter().map(PathBuf::from).collect()
    };
    let suites = words("suites");
    words("uris")
        .into_iter()
        .map(|uri| Entry { uri, suites: suites.clone(), signed_by: signed_by.clone() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(files: &[(&str, &str)]) -> Vec<Entry> {
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::create_dir(dir.path().join("sources.list.d")).expect("folder");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("write");
        }
        host_entries(dir.path())
    }

    #[test]
    fn deb822_of_a_fresh_debian() {
        let found = entries(&[(
            "sources.list.d/debian.sources",
            "# a comment\nTypes: deb\n# in between\nURIs: http://security.example/debian-security\n\
             Suites: bookworm-security\nComponents: main\nSigned-By: /k/a.gpg\n\nTypes: deb deb-src\n\
             URIs: http://one.example/debian\n http://two.example/debian\nSuites: bookworm bookworm-updates\n\
             Components: main\nSigned-By: /k/a.gpg /k/b.gpg\n",
        )]);
        assert_eq!(found.len(), 3);
        let chosen = choose(found).expect("there is one");
        assert_eq!(chosen.uri, "http://one.example/debian");
        assert_eq!(chosen.signed_by, [PathBuf::from("/k/a.gpg"), "/k/b.gpg".into()]);
    }

    #[test]
    fn one_line_format() {
        let found = entries(&[(
            "sources.list",
            "# deb http://off.example/debian bookworm main\n\
             deb-src http://src.example/debian bookworm main\n\
             deb http://x.example/debian-security bookworm-security main\n\
             deb [arch=amd64 signed-by=/k/a.gpg] http://m.example/debian trixie main contrib # why\n",
        )]);
        assert_eq!(found.len(), 2);
        let chosen = choose(found).expect("there is one");
        assert_eq!(
            (chosen.uri.as_str(), chosen.signed_by),
            ("http://m.example/debian", vec!["/k/a.gpg".into()])
        );
    }

    #[test]
    fn ubuntu_is_not_taken_for_debian() {
        let found = entries(&[(
            "sources.list.d/ubuntu.sources",
            "Types: deb\nURIs: http://u.example/ubuntu\nSuites: noble noble-updates\nComponents: main\n",
        )]);
        assert_eq!(found.len(), 1);
        assert_eq!(choose(found), None);
    }

    #[test]
    fn what_apt_ignores_is_ignored() {
        let text = "Types: deb\nURIs: http://m.example/debian\nSuites: trixie\n";
        assert!(entries(&[("sources.list.d/debian.sources.disabled", text)]).is_empty());
        assert!(entries(&[("sources.list.d/a.sources", &format!("Enabled: no\n{text}"))]).is_empty());
        let inline = format!("{text}Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n xyz\n");
        assert_eq!(
            entries(&[("sources.list.d/a.sources", &inline)]).first().map(|e| e.signed_by.len()),
            Some(0)
        );
    }
}
