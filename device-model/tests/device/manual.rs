//! The hardware manual's tables are those of the ABI.

use std::path::Path;

use hmmstorm_device::registers::manual;

const BEGIN: &str =
    "<!-- registers: generated from abi; to renew, run the device's tests with HMMSTORM_BLESS=1 -->\n";
const END: &str = "<!-- end of registers -->\n";

#[test]
fn the_manuals_register_tables_are_the_abis() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/hardware.md");
    let text = std::fs::read_to_string(&path).expect("docs/hardware.md");
    let (before, rest) = text.split_once(BEGIN).expect("the beginning of the tables");
    let (tables, after) = rest.split_once(END).expect("the end of the tables");
    if tables == manual() {
        return;
    }
    if std::env::var_os("HMMSTORM_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", manual())).expect("docs/hardware.md");
        return;
    }
    panic!(
        "docs/hardware.md is behind abi/src/spec/regs.rs; run this test with HMMSTORM_BLESS=1 and look at the diff"
    );
}
