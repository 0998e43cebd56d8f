//! PCI configuration space: initial values and what of them software may write.
//!
//! QEMU keeps its own copy of the header, the BARs and the MSI-X capability and forwards the guest's writes, so what
//! counts here is the identity, the BAR types, the PCI Express capability, bus mastering and FLR. The rest is kept
//! right for clients that do not emulate anything.

use hmmstorm_abi::pci;

/// Size of PCI Express configuration space in bytes.
pub const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;

/// Command register: memory space, bus mastering, parity, SERR and interrupt disable can be written.
const COMMAND_WRITABLE: u16 = 0x0546;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const STATUS_CAPABILITIES: u16 = 1 << 4;

const BAR_64BIT: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// The PCI Express capability (PCI Express Base Specification 5.0, 7.5.3).
const EXPRESS: usize = 0x40;
const EXPRESS_ID: u16 = 0x10;
const EXPRESS_VERSION: u16 = 2;
const DEVICE_CAP: usize = EXPRESS + 0x04;
const DEVICE_CONTROL: usize = EXPRESS + 0x08;
const LINK_CAP: usize = EXPRESS + 0x0c;
const LINK_STATUS: usize = EXPRESS + 0x12;
const LINK_CAP2: usize = EXPRESS + 0x2c;
const LINK_CONTROL2: usize = EXPRESS + 0x30;
const DEVICE_CAP_ROLE_BASED_ERRORS: u32 = 1 << 15;
const DEVICE_CAP_FLR: u32 = 1 << 28;
const DEVICE_CONTROL_FLR: u16 = 1 << 15;
/// 8 GT/s in speed fields; width 16 in width fields.
const LINK_SPEED: u32 = 3;
const LINK_WIDTH: u32 = 16;

/// The MSI-X capability (PCI Local Bus Specification 3.0, 6.8.2).
const MSIX: usize = 0x80;
const MSIX_ID: u16 = 0x11;
const MSIX_CONTROL_WRITABLE: u16 = 0xc000;

/// What a write to configuration space asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A function-level reset.
    FunctionReset,
}

/// The configuration space of one GPU.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
}

impl ConfigSpace {
    /// The space after power-on, for a VRAM aperture of `aperture` bytes, a power of two.
    pub fn new(aperture: u64) -> Self {
        let mut space = Self { bytes: vec![0; SIZE], writable: vec![0; SIZE] };
        space.header();
        space.bar32(pci::BAR_REGS, pci::BAR_REGS_SIZE);
        space.bar64(pci::BAR_VRAM, aperture);
        space.bar32(pci::BAR_MSIX, pci::BAR_MSIX_SIZE);
        space.express();
        space.msix();
        space
    }

    fn header(&mut self) {
        self.set(0x00, &pci::VENDOR_ID.to_le_bytes());
        self.set(0x02, &pci::DEVICE_ID.to_le_bytes());
        self.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        // Revision in the lowest byte, class above it.
        self.set(0x08, &(pci::CLASS_CODE << 8 | u32::from(pci::REVISION_ID)).to_le_bytes());
        self.allow(0x0c, &[0xff]); // cache line size
        self.set(0x2c, &pci::VENDOR_ID.to_le_bytes()); // subsystem
        self.set(0x2e, &pci::DEVICE_ID.to_le_bytes());
        self.set(CAPABILITIES, &[EXPRESS as u8]);
        self.allow(0x3c, &[0xff]); // interrupt line; the pin at 0x3d stays 0: no INTx
    }

    fn bar32(&mut self, bar: u32, size: usize) {
        let mask = !(size as u32 - 1);
        self.allow(BAR0 + bar as usize * 4, &mask.to_le_bytes());
    }

    fn bar64(&mut self, bar: u32, size: u64) {
        let at = BAR0 + bar as usize * 4;
        self.set(at, &(BAR_64BIT | BAR_PREFETCHABLE).to_le_bytes());
        self.allow(at, &(!(size - 1)).to_le_bytes());
    }

    fn express(&mut self) {
        self.capability(EXPRESS, EXPRESS_ID, MSIX);
        self.set(EXPRESS + 2, &EXPRESS_VERSION.to_le_bytes()); // type 0: endpoint
        self.set(DEVICE_CAP, &(DEVICE_CAP_ROLE_BASED_ERRORS | DEVICE_CAP_FLR).to_le_bytes());
        self.allow(DEVICE_CONTROL, &0x7fff_u16.to_le_bytes());
        self.set(LINK_CAP, &(LINK_WIDTH << 4 | LINK_SPEED).to_le_bytes());
        self.set(LINK_STATUS, &((LINK_WIDTH << 4 | LINK_SPEED) as u16).to_le_bytes());
        self.set(LINK_CAP2, &0b1110_u32.to_le_bytes()); // 2.5, 5 and 8 GT/s
        self.set(LINK_CONTROL2, &(LINK_SPEED as u16).to_le_bytes());
    }

    fn msix(&mut self) {
        self.capability(MSIX, MSIX_ID, 0);
        self.set(MSIX + 2, &(pci::VECTORS as u16 - 1).to_le_bytes());
        self.allow(MSIX + 2, &MSIX_CONTROL_WRITABLE.to_le_bytes());
        self.set(MSIX + 4, &(pci::MSIX_TABLE_OFFSET | pci::BAR_MSIX).to_le_bytes());
        self.set(MSIX + 8, &(pci::MSIX_PBA_OFFSET | pci::BAR_MSIX).to_le_bytes());
    }

    fn capability(&mut self, at: usize, id: u16, next: usize) {
        self.set(at, &[id as u8, next as u8]);
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Reads `data` from `offset` on; past the end there are zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let here = data.len().min(SIZE - start);
        data[..here].copy_from_slice(&self.bytes[start..start + here]);
    }

    /// Writes what of `data` is writable, and says what the write asks for.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let start = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let mut effect = Effect::None;
        for (at, &new) in (start..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
            // FLR is a bit that acts and reads as zero, so it is no part of the mask.
            if at == DEVICE_CONTROL + 1 && new & (DEVICE_CONTROL_FLR >> 8) as u8 != 0 {
                effect = Effect::FunctionReset;
            }
        }
        effect
    }

    /// Whether the driver lets the device reach memory.
    pub fn bus_master(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_BUS_MASTER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_identity_is_the_abis() {
        let space = ConfigSpace::new(256 << 20);
        assert_eq!(u32_at(&space, 0x00), u32::from(pci::DEVICE_ID) << 16 | u32::from(pci::VENDOR_ID));
        assert_eq!(u32_at(&space, 0x08) >> 8, pci::CLASS_CODE);
        assert_eq!(u32_at(&space, 0x3c), 0, "no INTx");
    }

    #[test]
    fn bars_give_their_sizes_and_the_rom_none() {
        let mut space = ConfigSpace::new(256 << 20);
        for offset in (0x10..0x28).step_by(4).chain([0x30]) {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(u32_at(&space, 0x10), !(pci::BAR_REGS_SIZE as u32 - 1));
        assert_eq!(u32_at(&space, 0x14), 0);
        assert_eq!(u32_at(&space, 0x18), !((256 << 20) - 1) | BAR_64BIT | BAR_PREFETCHABLE);
        assert_eq!(u32_at(&space, 0x1c), u32::MAX);
        assert_eq!(u32_at(&space, 0x20), !(pci::BAR_MSIX_SIZE as u32 - 1));
        assert_eq!(u32_at(&space, 0x24), 0);
        assert_eq!(u32_at(&space, 0x30), 0, "an expansion ROM that is not there");
    }

    #[test]
    fn a_bar_beyond_4_gib_sizes_by_its_upper_half() {
        let mut space = ConfigSpace::new(8 << 30);
        space.write(0x18, &[0xff; 8]);
        assert_eq!(u32_at(&space, 0x18), BAR_64BIT | BAR_PREFETCHABLE);
        assert_eq!(u32_at(&space, 0x1c), !1);
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let space = ConfigSpace::new(1 << 20);
        let mut ids = Vec::new();
        let mut at = u32_at(&space, 0x34) & 0xff;
        while at != 0 {
            assert!(ids.len() < 48);
            let head = u32_at(&space, u64::from(at));
            ids.push(head as u16 & 0xff);
            at = head >> 8 & 0xff;
        }
        assert_eq!(ids, [EXPRESS_ID, MSIX_ID]);
        assert_eq!(u32_at(&space, MSIX as u64) >> 16, pci::VECTORS as u32 - 1);
    }

    #[test]
    fn read_only_fields_stay_and_flr_acts_without_sticking() {
        let mut space = ConfigSpace::new(1 << 20);
        let before = space.bytes.clone();
        assert_eq!(space.write(0, &[0xff; 4]), Effect::None);
        assert_eq!(space.bytes, before);
        assert_eq!(
            space.write(DEVICE_CONTROL as u64, &DEVICE_CONTROL_FLR.to_le_bytes()),
            Effect::FunctionReset
        );
        assert_eq!(space.u16_at(DEVICE_CONTROL), 0);
        assert!(!space.bus_master());
        space.write(COMMAND as u64, &[0x06, 0]);
        assert!(space.bus_master());
    }

    #[test]
    fn accesses_past_the_end_do_nothing() {
        let mut space = ConfigSpace::new(1 << 20);
        let mut data = [0xaa; 8];
        space.read(SIZE as u64 - 4, &mut data);
        assert_eq!(data, [0; 8]);
        space.read(u64::MAX, &mut data);
        space.write(SIZE as u64 - 1, &[1; 9]);
        space.write(u64::MAX, &[1; 9]);
    }
}
