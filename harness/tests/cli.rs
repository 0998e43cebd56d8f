//! The command as a user sees it: exit codes and messages.

use std::path::Path;
use std::process::Command;

/// `hmmstorm` with a cache of its own, in this source tree.
fn hmmstorm(cache: &Path) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmmstorm"));
    command
        .current_dir(root)
        .env("HMMSTORM_CACHE", cache)
        .env_remove("HMMSTORM_QEMU")
        .env_remove("HMMSTORM_DEVICE");
    command
}

struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn say(args: &[&str]) -> Said {
    let cache = tempfile::tempdir().expect("folder");
    let output = hmmstorm(cache.path()).args(args).output().expect("hmmstorm");
    Said {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[test]
fn a_wrong_command_line_is_exit_code_2_with_a_reason() {
    for (args, reason) in [
        (&["run", "--no-such-option"][..], "--no-such-option"),
        (&["rum"][..], "rum"),
        (&["run", "--memory", "12"][..], "'12' is no size"),
        (&["run", "--cpus", "0"][..], "0 is not in"),
        (&["run", "--profile", "smok"][..], "no machine profile 'smok'; there are: selftest, smoke"),
        (&["run", "--deterministic", "--accel", "kvm"][..], "--deterministic"),
        (&["run", "--gpus", "0", "--chaos", "dead=true"][..], "--chaos needs a GPU"),
        (&["run", "--variant", "x", "--image", "y"][..], "cannot be used with"),
        (&["gdb", "--batch"][..], "--break"),
        (&["list", "sins"][..], "kernels"),
    ] {
        let said = say(args);
        assert_eq!(said.code, Some(2), "{args:?}: {}", said.stderr);
        assert!(said.stderr.contains(reason), "{args:?}: {}", said.stderr);
        assert_eq!(said.stdout, "", "{args:?}");
    }
}

#[test]
fn missing_tools_are_named_and_nothing_is_begun() {
    let (cache, path) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
    let output = hmmstorm(cache.path()).arg("build").env("PATH", path.path()).output().expect("hmmstorm");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    for package in ["make", "flex", "gdb"] {
        assert!(error.contains(package), "{package}: {error}");
    }
    assert!(!cache.path().join("trees").exists(), "a kernel tree was made");
}

#[test]
fn a_tarball_that_is_another_is_refused_and_not_kept() {
    let cache = tempfile::tempdir().expect("folder");
    let tarball = cache.path().join("linux.tar.xz");
    std::fs::write(&tarball, "not a kernel").expect("file");
    let output =
        hmmstorm(cache.path()).args(["setup", "--tarball"]).arg(&tarball).output().expect("hmmstorm");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("SHA-256") && error.contains("linux.tar.xz"), "{error}");
    assert!(!cache.path().join("downloads").exists(), "something was kept");
}

#[test]
fn help_is_no_error_and_tells_the_exit_codes() {
    let said = say(&["--help"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    for word in ["doctor", "setup", "build", "run", "storm", "gdb", "list", "Exit codes"] {
        assert!(said.stdout.contains(word), "{word} in {}", said.stdout);
    }
    assert!(!said.stdout.contains("kvm-probe"), "a command for ourselves");
}

#[test]
fn lists_come_from_the_data_files() {
    for (what, name) in [
        ("kernels", "6.19.6"),
        ("variants", "wait-on-locked"),
        ("scenarios", "drain-livelock"),
        ("flavours", "default"),
        ("profiles", "smoke"),
    ] {
        let said = say(&["list", what]);
        assert_eq!(said.code, Some(0), "{}", said.stderr);
        assert!(said.stdout.lines().any(|l| l.starts_with(name)), "{what}: {}", said.stdout);
        let json = say(&["list", what, "--json"]).stdout;
        let entries: Vec<serde_json::Value> = serde_json::from_str(&json).expect("JSON");
        assert!(entries.iter().any(|e| e["name"] == name), "{what}: {json}");
    }
}

#[test]
fn an_image_that_is_not_there_is_exit_code_3_and_names_the_file() {
    let said = say(&[
        "run",
        "--accel",
        "tcg",
        "--image",
        "/no/such/image.json",
        "--qemu",
        "true",
        "--device",
        "true",
    ]);
    assert_eq!(said.code, Some(3), "{}", said.stderr);
    assert!(said.stderr.contains("/no/such/image.json"), "{}", said.stderr);
}

#[test]
fn doctor_answers_for_kvm_and_remembers() {
    let cache = tempfile::tempdir().expect("folder");
    let doctor = || {
        let output = hmmstorm(cache.path()).args(["doctor", "--json"]).output().expect("hmmstorm");
        assert!(matches!(output.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&output.stderr));
        let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).expect("JSON");
        findings.into_iter().find(|f| f["what"] == "KVM").expect("KVM")
    };
    let first = doctor();
    assert!(first["found"].as_str().is_some_and(|s| !s.is_empty()));
    assert!(cache.path().join("host/kvm.json").is_file());
    assert_eq!(doctor(), first);
}
