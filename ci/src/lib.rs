//! What the smoke tests share: running the `hmmstorm` command and reading what it left.
//!
//! The tests are in `tests/`. They drive the release binary that `ci/test` built, as a user would, and judge by exit
//! code and `verdict.json`, never by a line of text alone. Each run's folder stays under `target/smoke/`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("ci/ stands in the repository")
}

/// The command under test, with the repository as working directory.
pub fn hmmstorm() -> Command {
    let mut command = Command::new(root().join("target/release/hmmstorm"));
    command.current_dir(root());
    command
}

/// A fresh folder for the evidence of the test `name`.
pub fn evidence(name: &str) -> PathBuf {
    let folder = root().join("target/smoke").join(name);
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            panic!("cannot clear {}: {error}", folder.display())
        }
        _ => {}
    }
    std::fs::create_dir_all(&folder).expect("create the evidence folder");
    folder
}

/// One finished `hmmstorm storm`.
#[derive(Debug)]
pub struct Storm {
    /// Exit code.
    pub code: i32,
    /// The `verdict.json` of each run, in order of seeds.
    pub verdicts: Vec<serde_json::Value>,
    /// All that it printed, for messages.
    pub output: String,
}

impl Storm {
    /// Runs `hmmstorm storm` with `arguments`, keeping its evidence under `name`.
    pub fn run<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        let folder = evidence(name);
        let output = hmmstorm()
            .arg("storm")
            .args(arguments)
            .arg("--out")
            .arg(&folder)
            .output()
            .expect("target/release/hmmstorm runs; build it with `make hmmstorm`");
        Self { code: code(&output), verdicts: verdicts(&folder), output: text(&output) }
    }

    /// The only run's verdict.
    pub fn verdict(&self) -> &str {
        assert_eq!(self.verdicts.len(), 1, "one run expected:\n{}", self.output);
        self.verdicts[0]["verdict"].as_str().expect("verdict.json names a verdict")
    }
}

/// Exit code of a process that was not killed.
pub fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("killed by a signal: {}", text(output)))
}

/// Both streams as text.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Every `verdict.json` below `folder`, sorted by path.
fn verdicts(folder: &Path) -> Vec<serde_json::Value> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).expect("read the evidence folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name() == Some(OsStr::new("verdict.json")) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
        .iter()
        .map(|path| {
            let bytes = std::fs::read(path).expect("read verdict.json");
            serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        })
        .collect()
}

/// Ids of processes whose command line contains `needle`, this one excluded.
pub fn processes_with(needle: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("proc is mounted").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        if pid != std::process::id() && String::from_utf8_lossy(&line).contains(needle) {
            found.push(pid);
        }
    }
    found
}
