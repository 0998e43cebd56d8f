//! The report's page in a real browser: on a phone and on a desktop, in the light and in the dark it has no sideways
//! scroll, enough contrast, names for all that is not text, and it asks nobody for anything.
//!
//! Needs Chromium (Debian's `chromium`); where there is none the test says so and passes, and `ci/test` counts it as
//! skipped. The browser is spoken to over its debugging pipe: JSON, each message ended by a NUL. What it showed is left in
//! `target/tmp/report-WIDTH-SCHEME.png`.

mod sample;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// For an answer of the browser on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is wrong with the page, as a list.
const CHECKS: &str = include_str!("data/report/checks.js");

struct Browser {
    process: Child,
    to: File,
    from: Receiver<Value>,
    asked: u64,
    events: Vec<Value>,
}

impl Browser {
    fn start(program: &str, folder: &Path) -> Self {
        let (to, from) = (folder.join("to"), folder.join("from"));
        let made = Command::new("mkfifo").args([&to, &from]).status().expect("mkfifo");
        assert!(made.success());
        // Opened for both directions neither side waits for the other.
        let open = |path: &Path| File::options().read(true).write(true).open(path).expect("a pipe");
        let (to_file, mut from_file) = (open(&to), open(&from));
        let script = "exec \"$0\" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
                      --disable-background-networking --disable-component-update --remote-debugging-pipe \
                      --user-data-dir=\"$1\" about:blank 3<\"$2\" 4>\"$3\"";
        let process = Command::new("bash")
            .args(["-c", script, program])
            .arg(folder.join("profile"))
            .args([&to, &from])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("bash");
        let (sender, receiver) = channel();
        thread::spawn(move || {
            let (mut message, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
            while let Ok(read @ 1..) = from_file.read(&mut buffer) {
                for byte in &buffer[..read] {
                    if *byte != 0 {
                        message.push(*byte);
                        continue;
                    }
                    let value = serde_json::from_slice(&message).expect("JSON of the browser");
                    message.clear();
                    if sender.send(value).is_err() {
                        return;
                    }
                }
            }
        });
        Self { process, to: to_file, from: receiver, asked: 0, events: Vec::new() }
    }

    fn call(&mut self, session: Option<&str>, method: &str, parameters: Value) -> Value {
        self.asked += 1;
        let mut message = json!({ "id": self.asked, "method": method, "params": parameters });
        if let Some(session) = session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("sent");
        loop {
            let answer = self.from.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{method}: {error}"));
            if answer["id"] == self.asked {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    /// Waits for an event, which may have come already.
    fn wait(&mut self, method: &str) {
        while !self.events.iter().any(|event| event["method"] == method) {
            let event = self.from.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{method}: {error}"));
            self.events.push(event);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn chromium() -> Option<String> {
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = names.iter().find(|name| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()));
    found.map(|name| (*name).to_owned())
}

fn page(folder: &Path) -> String {
    let mut records = sample::matrix(6);
    records.push(sample::hostile());
    let lines: Vec<String> = records.iter().map(|record| format!("{record}\n")).collect();
    let file = folder.join("runs.jsonl");
    fs::write(&file, lines.concat() + "{\"torn").expect("records");
    let page = folder.join("report.html");
    let status = Command::new(env!("CARGO_BIN_EXE_hmmstorm"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .env("HMMSTORM_CACHE", folder.join("cache"))
        .args(["--quiet", "report"])
        .arg(&file)
        .arg("--out")
        .arg(&page)
        .status();
    assert!(status.expect("hmmstorm").success());
    format!("file://{}", page.display())
}

#[test]
fn page_is_sound_on_a_phone_and_in_the_dark() {
    let Some(program) = chromium() else {
        println!("skipped: there is no Chromium here (Debian: apt-get install chromium)");
        return;
    };
    let folder = tempfile::tempdir().expect("folder");
    let url = page(folder.path());
    let mut browser = Browser::start(&program, folder.path());
    let target = browser.call(None, "Target.createTarget", json!({ "url": "about:blank" }));
    let attach = json!({ "targetId": target["targetId"], "flatten": true });
    let session =
        browser.call(None, "Target.attachToTarget", attach)["sessionId"].as_str().map(str::to_owned);
    let session = session.as_deref();
    for domain in ["Page", "Runtime", "Network", "Log"] {
        browser.call(session, &format!("{domain}.enable"), json!({}));
    }
    for (width, scheme) in [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")] {
        let phone = width < 600;
        let metrics = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": phone });
        browser.call(session, "Emulation.setDeviceMetricsOverride", metrics);
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        browser.call(session, "Emulation.setEmulatedMedia", media);
        browser.events.clear();
        browser.call(session, "Page.navigate", json!({ "url": url }));
        browser.wait("Page.loadEventFired");
        let checks = json!({ "expression": CHECKS, "returnByValue": true });
        let answer = browser.call(session, "Runtime.evaluate", checks);
        let size = &browser.call(session, "Page.getLayoutMetrics", json!({}))["cssContentSize"];
        let clip = json!({ "x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1 });
        let shot = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let shot = browser.call(session, "Page.captureScreenshot", shot);
        let shot = STANDARD.decode(shot["data"].as_str().expect("a picture")).expect("Base64");
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("report-{width}-{scheme}.png"));
        fs::write(file, shot).expect("written");
        let wrong = answer["result"]["value"].as_array().unwrap_or_else(|| panic!("{answer:#}")).clone();
        assert!(wrong.is_empty(), "at {width} px, {scheme}: {wrong:#?}");
        for event in &browser.events {
            let says = &event["params"];
            match event["method"].as_str().unwrap_or_default() {
                "Network.requestWillBeSent" => {
                    let asked = says["request"]["url"].as_str().unwrap_or_default();
                    assert!(asked == url || asked.starts_with("data:"), "the page asks for {asked}");
                }
                "Log.entryAdded"
                | "Runtime.consoleAPICalled"
                | "Runtime.exceptionThrown"
                | "Page.javascriptDialogOpening" => panic!("at {width} px, {scheme}: {event:#}"),
                _ => {}
            }
        }
    }
}
