//! The guest under gdb: a breakpoint in the Rust driver is reached by name, and one that is not is said so.

use hmmstorm_smoke::{code, evidence, hmmstorm, text};

fn gdb(name: &str, arguments: &[&str]) -> std::process::Output {
    let folder = evidence(name);
    hmmstorm()
        .args(["gdb", "--batch"])
        .args(arguments)
        .arg("--folder")
        .arg(&folder)
        .output()
        .expect("hmmstorm runs")
}

#[test]
fn stops_in_the_drivers_migrate_to_ram() {
    let output = gdb("gdb", &["--break", "migrate_to_ram"]);
    assert_eq!(code(&output), 0, "{}", text(&output));
    let said = text(&output);
    for frame in ["migrate_to_ram", "do_swap_page", "handle_mm_fault"] {
        assert!(said.contains(frame), "no {frame} in the backtrace:\n{said}");
    }
    assert!(said.contains("fn migrate_to_ram("), "no line of the driver's source:\n{said}");
}

#[test]
fn breakpoint_that_is_not_reached_is_a_failure() {
    let output = gdb("gdb-not-reached", &["--break", "kernel_kexec_that_is_not_there"]);
    assert_ne!(code(&output), 0, "{}", text(&output));
    assert!(text(&output).contains("kernel_kexec_that_is_not_there"), "{}", text(&output));
}
