//! Over a real socket, with the crate's own client and with clients that break the rules.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use hmmstorm_abi::pci::{BAR_MSIX, BAR_REGS, BAR_VRAM, DEVICE_ID, VECTOR_CHANNEL0, VECTORS, VENDOR_ID};
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Location};
use hmmstorm_device::gpu::Region;
use hmmstorm_device::transport::{SocketError, Transport};
use tempfile::TempDir;
use vfio_bindings::bindings::vfio as v;
use vfio_user::Client;

use crate::bench::{Bench, RAM, RESERVED, eventfd_pair, signals, wait_for};

const CONFIG: u32 = v::VFIO_PCI_CONFIG_REGION_INDEX;

struct Served {
    bench: Bench,
    transports: Vec<Transport>,
    dir: TempDir,
}

impl Served {
    fn new(trap: bool) -> Self {
        let bench = Bench::unmapped(&[], 1 << 20);
        let dir = TempDir::new().expect("a folder");
        let mut served = Self { bench, transports: Vec::new(), dir };
        for gpu in served.bench.machine.gpus() {
            let path = served.socket(usize::from(gpu.index()));
            served.transports.push(Transport::serve(Arc::clone(gpu), &path, trap).expect("a socket"));
        }
        served
    }

    fn socket(&self, gpu: usize) -> PathBuf {
        self.dir.path().join(format!("gpu{gpu}.sock"))
    }

    fn connect(&self, gpu: usize) -> Client {
        Client::new(&self.socket(gpu)).expect("a session")
    }
}

/// Registers through a client.
struct Regs(Client);

impl Regs {
    fn read(&mut self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.0.region_read(BAR_REGS, offset as u64, &mut data).expect("an answer");
        u32::from_le_bytes(data)
    }
    fn write(&mut self, offset: usize, value: u32) {
        self.0.region_write(BAR_REGS, offset as u64, &value.to_le_bytes()).expect("an answer");
    }
    fn channel(&mut self, register: usize, value: u32) {
        self.write(regs::channel_reg(0, register), value);
    }
}

#[test]
fn the_regions_are_those_of_the_manual() {
    let served = Served::new(false);
    let mut client = served.connect(0);
    let size = |client: &Client, index| client.region(index).map_or(0, |region| region.size);
    assert_eq!(size(&client, BAR_REGS), 64 << 10);
    assert_eq!(size(&client, BAR_MSIX), 8 << 10);
    assert_eq!(size(&client, CONFIG), 4096);
    for absent in [1, 3, 5, 6, 8] {
        assert_eq!(size(&client, absent), 0);
    }
    let vram = client.region(BAR_VRAM).expect("VRAM");
    assert_eq!(vram.size, 1 << 20);
    assert_eq!((vram.sparse_areas[0].offset, vram.sparse_areas[0].size), (0, 1 << 20));
    // The file is the VRAM itself.
    let file: &File = vram.file_offset.as_ref().expect("a file").file();
    file.write_all_at(b"through the file", 4096).expect("writable");
    let mut window = [0; 16];
    served.bench.gpu(0).region_read(Region::Vram, 4096, &mut window);
    assert_eq!(&window, b"through the file");
    let mut id = [0; 4];
    client.region_read(CONFIG, 0, &mut id).expect("an answer");
    assert_eq!(u32::from_le_bytes(id), u32::from(DEVICE_ID) << 16 | u32::from(VENDOR_ID));
    let msix = client.get_irq_info(v::VFIO_PCI_MSIX_IRQ_INDEX).expect("MSI-X");
    assert_eq!(msix.count, VECTORS as u32);
}

#[test]
fn with_trapping_there_is_no_file() {
    let served = Served::new(true);
    let mut client = served.connect(0);
    let vram = client.region(BAR_VRAM).expect("VRAM");
    assert!(vram.file_offset.is_none() && vram.sparse_areas.is_empty());
    client.region_write(BAR_VRAM, 8, &[1, 2, 3, 4]).expect("an answer");
    let mut data = [0; 4];
    client.region_read(BAR_VRAM, 8, &mut data).expect("an answer");
    assert_eq!(data, [1, 2, 3, 4]);
}

#[test]
fn a_descriptor_runs_over_the_socket() {
    let served = Served::new(false);
    let bench = &served.bench;
    let mut gpu = Regs(served.connect(0));
    gpu.0.region_write(CONFIG, 4, &[6, 0]).expect("an answer");
    gpu.0.dma_map(0, RAM, 1 << 20, bench.file.as_raw_fd()).expect("an answer");
    let (ours, theirs) = eventfd_pair();
    let flags = v::VFIO_IRQ_SET_DATA_EVENTFD | v::VFIO_IRQ_SET_ACTION_TRIGGER;
    let vector = u32::from(VECTOR_CHANNEL0);
    gpu.0.set_irqs(v::VFIO_PCI_MSIX_IRQ_INDEX, flags, vector, 1, &[theirs.as_raw_fd()]).expect("an answer");
    let fence = RAM + RESERVED;
    let copy = Descriptor::copy(Location::system(RAM + RESERVED + 4096), Location::peer(1, 0), 4096)
        .with_fence(fence, 7, true);
    bench.write(RESERVED + 4096, &[0x42; 4096]);
    bench.write(0, &copy.to_words().iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
    gpu.channel(regs::CH_RING_LO, RAM as u32);
    gpu.channel(regs::CH_RING_ORDER, 4);
    gpu.channel(regs::CH_SHADOW_LO, RAM as u32 + 4096);
    gpu.channel(regs::CH_CONTROL, regs::CH_CONTROL_ENABLE);
    bench.store_u32(4096, 1);
    gpu.channel(regs::CH_DOORBELL, 1);
    wait_for("the interrupt", || (signals(&ours) > 0).then_some(()));
    assert_eq!((bench.load_u64(RESERVED), bench.load_u64(RESERVED + 8)), (7, 0));
    let mut window = [0; 4096];
    bench.gpu(1).region_read(Region::Vram, 0, &mut window);
    assert_eq!(window, [0x42; 4096]);
    // A function reset over the wire.
    gpu.0.reset().expect("an answer");
    assert_eq!(gpu.read(regs::channel_reg(0, regs::CH_STATUS)), 0);
}

#[test]
fn the_next_client_finds_a_gpu_after_power_on() {
    let served = Served::new(false);
    let mut first = served.connect(0);
    first.region_write(BAR_VRAM, 0, &[9; 8]).expect("an answer");
    first.region_write(CONFIG, 4, &[6, 0]).expect("an answer");
    first.dma_map(0, RAM, 1 << 20, served.bench.file.as_raw_fd()).expect("an answer");
    drop(first);
    let mut second = served.connect(0);
    let mut data = [0; 8];
    second.region_read(BAR_VRAM, 0, &mut data).expect("an answer");
    assert_eq!(data, [0; 8]);
    second.region_read(CONFIG, 4, &mut data[..2]).expect("an answer");
    assert_eq!(data[..2], [0, 0]);
    // The range is free again.
    served.bench.map(served.bench.gpu(0), RAM, 0, 1 << 20, true);
}

/// A message of the protocol: header, then body.
fn message(command: u16, size: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = 1_u16.to_le_bytes().to_vec();
    bytes.extend(command.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

#[test]
fn a_client_that_breaks_the_rules_harms_only_itself() {
    let served = Served::new(false);
    let mut neighbour = Regs(served.connect(1));
    let unterminated = message(1, 16 + 4 + 2, &[0, 0, 0, 0, b'{', b'}']);
    let too_short = message(1, 16, &[0; 4]);
    let unknown = message(999, 16, &[]);
    let huge_read =
        message(9, 32, &[&0_u64.to_le_bytes()[..], &[0, 0, 0, 0], &u32::MAX.to_le_bytes()].concat());
    let far_write =
        message(10, 36, &[&u64::MAX.to_le_bytes()[..], &[0; 4], &4_u32.to_le_bytes(), &[1; 4]].concat());
    let half = vec![1, 2, 3];
    for bytes in [unterminated, too_short, unknown, huge_read, far_write, half] {
        let mut stream = UnixStream::connect(served.socket(0)).expect("a connection");
        // It may be gone before it has taken everything.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
        assert_eq!(neighbour.read(regs::ID), regs::ID_MAGIC);
    }
    assert_eq!(Regs(served.connect(0)).read(regs::ID), regs::ID_MAGIC);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = TempDir::new().expect("a folder");
    let path = dir.path().join("gpu0.sock");
    drop(UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists());
    let bench = Bench::unmapped(&[], 4096);
    let serve = || Transport::serve(Arc::clone(bench.gpu(0)), &path, false);
    let transport = serve().expect("the stale socket is replaced");
    assert!(matches!(serve(), Err(SocketError::InUse(_))));
    assert!(path.exists());
    assert_eq!(Regs(Client::new(&path).expect("a session")).read(regs::ID), regs::ID_MAGIC);
    drop(transport);
    assert!(!path.exists());
    std::fs::write(&path, "something of value").expect("writable");
    assert!(matches!(serve(), Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).expect("still there"), b"something of value");
}
