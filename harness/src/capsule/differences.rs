//! What is not as it was when a capsule was made.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::judge::record::{Provenance, Run};

/// Something that has another value here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What.
    pub what: String,
    /// Its value in the capsule.
    pub then: String,
    /// Its value here.
    pub now: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = |value: &str| match value.len() {
            // Checksums are told apart by their beginnings.
            64 if value.bytes().all(|b| b.is_ascii_hexdigit()) => format!("{}...", &value[..12]),
            _ => value.to_owned(),
        };
        write!(f, "{}: {} in the capsule, {} here", self.what, short(&self.then), short(&self.now))
    }
}

/// Parts of an image's provenance that are only names, or are compared apart.
const APART: [&str; 2] = ["variant", "patches"];

/// Everything that was different when the capsule was made, the causes before the consequences: what defines the run,
/// then sources and tools, then the binaries made of them.
#[must_use]
pub fn differences(then: (&Run, &Provenance), now: (&Run, &Provenance)) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut compare = |what: &str, then: String, now: String| {
        if then != now {
            found.push(Difference { what: what.to_owned(), then, now });
        }
    };
    let (old, new) = (&then.1.image, &now.1.image);
    compare(
        "the guest kernel's command line",
        then.1.kernel_command_line.clone(),
        now.1.kernel_command_line.clone(),
    );
    for (what, of) in [
        ("GPUs", (|run| run.gpus.to_string()) as fn(&Run) -> String),
        ("CPUs", |run| run.cpus.to_string()),
        ("memory", |run| run.memory.clone()),
        ("memory of each GPU", |run| run.vram.clone()),
        ("mode", |run| run.mode.clone()),
        ("engine", |run| run.engine.clone()),
        ("fault plan", |run| run.chaos.clone().unwrap_or_default()),
    ] {
        compare(what, of(then.0), of(now.0));
    }
    let names = |image: &Value| {
        let keys = image.as_object().into_iter().flat_map(|map| map.keys().cloned());
        keys.filter(|key| !APART.contains(&key.as_str())).collect::<BTreeSet<_>>()
    };
    for name in names(old).union(&names(new)) {
        compare(name, text(&old[name]), text(&new[name]));
    }
    let patches = |image: &Value| -> Vec<(String, String)> {
        let all = image["patches"].as_array().into_iter().flatten();
        all.map(|patch| (text(&patch["sha256"]), text(&patch["name"]))).collect()
    };
    let (before, after) = (patches(old), patches(new));
    for (only, list, other) in [("missing here", &before, &after), ("new here", &after, &before)] {
        for (sum, name) in list {
            if !other.iter().any(|(same, _)| same == sum) {
                let (then, now) = if only == "new here" { ("", name.as_str()) } else { (name.as_str(), "") };
                compare(&format!("patch {name}, {only}"), then.to_owned(), now.to_owned());
            }
        }
    }
    compare(
        "QEMU",
        then.1.qemu_version.clone().unwrap_or_default(),
        now.1.qemu_version.clone().unwrap_or_default(),
    );
    let roles: BTreeSet<_> = then.1.binaries.keys().chain(now.1.binaries.keys()).collect();
    for role in roles {
        let of = |provenance: &Provenance| provenance.binaries.get(role).cloned().unwrap_or_default();
        compare(&format!("the {role}'s bytes"), of(then.1), of(now.1));
    }
    found
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::records::union::tests::record;

    #[test]
    fn each_difference_is_named_and_names_do_not_count() {
        let then = record(1);
        let mut now = record(1);
        let said = |now: &crate::judge::record::Record| {
            let found = differences((&then.run, &then.provenance), (&now.run, &now.provenance));
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        now.run.variant = "renamed".into();
        now.provenance.image["variant"] = "renamed".into();
        now.provenance.command_line = vec!["replay".into()];
        assert!(said(&now).is_empty());
        now.run.cpus = 8;
        now.provenance.image["config_sha256"] = json!("b".repeat(64));
        now.provenance.image["patches"] = json!([{ "name": "x.patch", "sha256": "1" }]);
        now.provenance.binaries.insert("kernel".into(), "c".repeat(64));
        let said = said(&now);
        assert_eq!(said.len(), 4, "{said:?}");
        for (line, part) in
            said.iter().zip(["CPUs: 2 in", "config_sha256", "x.patch, new here", "kernel's bytes"])
        {
            assert!(line.contains(part), "{line}");
        }
        assert!(said[1].contains("bbbbbbbbbbbb..."));
    }
}
