//! The identity of a run: a hash of everything that defines it.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::judge::record::{Provenance, Run};

/// Parts of an image's provenance that define what runs; the others describe or name it.
const IMAGE: [&str; 10] = [
    "kernel_version",
    "kernel_source_sha256",
    "flavour",
    "config_sha256",
    "driver_sha256",
    "storm_sha256",
    "rustc",
    "bindgen",
    "cc",
    "libclang",
];

/// The run's id: 16 hex digits. In deterministic mode runs with equal ids have equal logs; in real-time mode they are
/// repetitions of each other. Names that people gave (variant, control) do not matter, what they stand for does.
#[must_use]
pub fn run_id(run: &Run, provenance: &Provenance) -> String {
    let image = &provenance.image;
    let parts: Vec<&Value> = IMAGE.iter().map(|part| image.get(part).unwrap_or(&Value::Null)).collect();
    let patches: Vec<&Value> = image
        .get("patches")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|patch| patch.get("sha256").unwrap_or(&Value::Null))
        .collect();
    let Run { scenario, parameters, preempt, cpus, gpus, mode, engine, profile, seed, .. } = run;
    let identity = json!({
        "format": 1,
        "image": parts,
        "patches": patches,
        "device": provenance.binaries.get("device"),
        "qemu": provenance.qemu_version,
        "run": [scenario, parameters, preempt, cpus, gpus, mode, engine, profile, seed],
        "machine": [run.chaos, run.memory, run.vram, run.append],
    });
    // serde_json's maps are sorted by key, so the text is the same for the same values.
    let digest = Sha256::digest(identity.to_string());
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::union::tests::record;

    type Change = dyn Fn(&mut Run, &mut Provenance);

    #[test]
    fn what_defines_a_run_changes_its_id_and_names_do_not() {
        let base = record(1);
        let id = |change: &Change| {
            let (mut run, mut provenance) = (base.run.clone(), base.provenance.clone());
            change(&mut run, &mut provenance);
            run_id(&run, &provenance)
        };
        let same = id(&|_, _| ());
        assert_eq!(same.len(), 16);
        assert_eq!(id(&|_, p| p.command_line.push("--quiet".into())), same);
        assert_eq!(id(&|r, _| r.control = Some("x".into())), same);
        assert_eq!(id(&|r, _| r.variant = "renamed".into()), same);
        let changes: [&Change; 9] = [
            &|r, _| r.seed = 2,
            &|r, _| r.cpus += 1,
            &|r, _| r.mode = "real-time".into(),
            &|r, _| r.append.push("x=1".into()),
            &|r, _| _ = r.parameters.insert("rounds".into(), "3".into()),
            &|_, p| p.image["config_sha256"] = json!("other"),
            &|_, p| p.image["patches"] = json!([{ "sha256": "other" }]),
            &|_, p| _ = p.binaries.insert("device".into(), "other".into()),
            &|_, p| p.qemu_version = Some("other".into()),
        ];
        let mut ids: Vec<_> = changes.iter().map(|change| id(change)).collect();
        ids.push(same);
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), changes.len() + 1);
    }
}
