//! The GPUs on the PCI bus, and who drives them.

use std::fs;
use std::path::{Path, PathBuf};

use hmmstorm_abi::pci::{DEVICE_ID, VENDOR_ID};

use crate::scenario::WorkError;

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVER: &str = "vfio-pci";

/// The folder of the function at `address` (`0000:00:10.0`).
pub(super) fn folder(address: &str) -> PathBuf {
    Path::new(DEVICES).join(address)
}

/// Addresses of all hsgpu, sorted.
pub(super) fn functions() -> Result<Vec<String>, WorkError> {
    let id = |folder: &Path, name: &str| {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        u16::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
    };
    let entries = fs::read_dir(DEVICES).map_err(WorkError::system("read_dir(/sys/bus/pci/devices)"))?;
    let mut found: Vec<String> = entries
        .flatten()
        .filter(|entry| {
            id(&entry.path(), "vendor") == Some(VENDOR_ID) && id(&entry.path(), "device") == Some(DEVICE_ID)
        })
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    found.sort();
    Ok(found)
}

/// Binds the function at `address` to `vfio-pci`, unless it is.
pub(super) fn to_vfio(address: &str) -> Result<(), WorkError> {
    let driver =
        || fs::read_link(folder(address).join("driver")).ok()?.file_name().map(|name| name.to_owned());
    if driver().is_some_and(|name| name == DRIVER) {
        return Ok(());
    }
    let refused = |what: &'static str| move |source| WorkError::System { call: what, source };
    fs::write(folder(address).join("driver_override"), DRIVER).map_err(refused("write(driver_override)"))?;
    fs::write("/sys/bus/pci/drivers_probe", address).map_err(refused("write(drivers_probe)"))?;
    match driver() {
        Some(name) if name == DRIVER => Ok(()),
        other => Err(WorkError::Condition(format!(
            "{address} is bound to {} and not to {DRIVER}; is there an IOMMU (intel_iommu=on)? The console says more",
            other.map_or("nothing".to_owned(), |name| name.to_string_lossy().into_owned())
        ))),
    }
}
