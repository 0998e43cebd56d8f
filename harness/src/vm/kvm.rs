//! Proves KVM by running 64-bit code in a guest.
//!
//! That `/dev/kvm` opens proves nothing: nested and restricted hosts have it and cannot run a 64-bit guest. The guest
//! here starts in long mode with paging on, computes, stores the result, and halts. A host that cannot do it may also
//! never come back from `KVM_RUN`, so this belongs into a process that can be killed: see [`super::accel`].

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest memory: page tables, code and result, in the first 2 MiB, identity-mapped by one large page.
const SIZE: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x8000;
const RESULT: u64 = 0x9000;

/// `CR0`: protected mode, extension type, numeric errors, write protect, paging.
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// `CR4`: physical address extension.
const CR4: u64 = 1 << 5;
/// `EFER`: long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// Factors whose product needs 64-bit registers.
const A: u64 = 0x1_2345_6789;
const B: u64 = 0x0_0badf00d;

/// What a guest of this host cannot do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a step.
    #[error("{step}: {source}")]
    Refused {
        /// Which ioctl.
        step: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// Guest memory could not be made or reached.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The guest did something else than to halt.
    #[error("64-bit guest code ended with {0} in place of a halt")]
    Exit(String),
    /// The guest halted and computed something else.
    #[error("64-bit guest code computed {found:#x} in place of {expected:#x}")]
    Wrong {
        /// What it should be.
        expected: u64,
        /// What it is.
        found: u64,
    },
}

/// Runs the guest. May hang on a host that cannot run it.
pub fn prove() -> Result<(), Error> {
    let step = |step| move |source| Error::Refused { step, source };
    let kvm = Kvm::new().map_err(step("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(step("KVM_CREATE_VM"))?;
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(|e| Error::Memory(e.to_string()))?;
    load(&memory)?;
    let host = memory
        .find_region(GuestAddress(0))
        .and_then(|region| region.get_host_address(vm_memory::MemoryRegionAddress(0)).ok())
        .ok_or_else(|| Error::Memory("no host address".into()))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: SIZE as u64,
        userspace_addr: host as u64,
        flags: 0,
    };
    map(&vm, region).map_err(step("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(step("KVM_CREATE_VCPU"))?;
    enter_long_mode(&vcpu)?;
    let exit = vcpu.run().map_err(step("KVM_RUN"))?;
    if !matches!(exit, VcpuExit::Hlt) {
        return Err(Error::Exit(format!("{exit:?}")));
    }
    let found: u64 = memory.read_obj(GuestAddress(RESULT)).map_err(|e| Error::Memory(e.to_string()))?;
    let expected = A.wrapping_mul(B);
    if found == expected { Ok(()) } else { Err(Error::Wrong { expected, found }) }
}

#[expect(unsafe_code, reason = "KVM is given a raw address of our memory")]
fn map(vm: &kvm_ioctls::VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the region is exactly the mapping that `prove` owns, and that outlives the VM and its only CPU there.
    unsafe { vm.set_user_memory_region(region) }
}

fn load(memory: &GuestMemoryMmap) -> Result<(), Error> {
    const TABLE: u64 = 0b11; // present, writable
    const LARGE: u64 = 1 << 7;
    let mut code = Vec::new();
    code.extend([0x48, 0xb8]); // mov rax, A
    code.extend(A.to_le_bytes());
    code.extend([0x48, 0xbb]); // mov rbx, B
    code.extend(B.to_le_bytes());
    code.extend([0x48, 0x0f, 0xaf, 0xc3]); // imul rax, rbx
    code.extend([0x48, 0x89, 0x04, 0x25]); // mov [RESULT], rax
    code.extend((RESULT as u32).to_le_bytes());
    code.push(0xf4); // hlt
    let failed = |e: vm_memory::GuestMemoryError| Error::Memory(e.to_string());
    memory.write_obj(PDPT | TABLE, GuestAddress(PML4)).map_err(failed)?;
    memory.write_obj(PD | TABLE, GuestAddress(PDPT)).map_err(failed)?;
    memory.write_obj(TABLE | LARGE, GuestAddress(PD)).map_err(failed)?;
    memory.write_slice(&code, GuestAddress(CODE)).map_err(failed)
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Error> {
    let step = |step| move |source| Error::Refused { step, source };
    let mut sregs = vcpu.get_sregs().map_err(step("KVM_GET_SREGS"))?;
    // Code: execute, read, accessed; data: read, write, accessed.
    let segment = |selector, type_, long: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(1 << 3, 0b1011, true);
    let data = segment(2 << 3, 0b0011, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    vcpu.set_sregs(&sregs).map_err(step("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: CODE, rflags: 2, rsp: CODE, ..kvm_regs::default() };
    vcpu.set_regs(&regs).map_err(step("KVM_SET_REGS"))
}
