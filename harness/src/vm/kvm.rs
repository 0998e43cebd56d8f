//! Proves KVM by running 64-bit code in a guest.
//!
//! That `/dev/kvm` opens proves nothing: nested and restricted hosts have it and cannot run a 64-bit kernel. The guest
//! here does what every kernel does first: it starts in long mode with paging on, programs interrupt controller and
//! timer, enters user mode, computes, takes three timer interrupts there, and makes a system call that hands in the
//! result. A host that cannot do it may also never come back from `KVM_RUN`, so this belongs into a process that can
//! be killed: see [`super::accel`].

use kvm_bindings::{kvm_dtable, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest memory: everything below, in the first 2 MiB, identity-mapped by one large page that user mode may use.
const SIZE: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
/// Top of the stack that interrupts of user mode use; user mode's own ends at 0x7000.
const KERNEL_STACK: u64 = 0x7800;
const CODE: u64 = 0x8000;
/// The product, and after it the number of timer interrupts.
const RESULT: u64 = 0x9000;
/// Three pages for KVM's own use on Intel, outside guest memory.
const KVM_TSS: usize = 0xfffb_d000;

const KERNEL_CODE: u16 = 1 << 3;
const KERNEL_DATA: u16 = 2 << 3;
/// Null, kernel code and data, user code and data, task state in two halves.
const DESCRIPTORS: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x0000_8900_0000_0067 | TSS << 16,
    0,
];
const TIMER: u64 = 0x20;
const SYSTEM_CALL: u64 = 0x80;
/// Offsets of the two interrupt handlers in [`PROGRAM`].
const ON_TIMER: u64 = 0x70;
const ON_SYSTEM_CALL: u64 = 0x80;
/// The port that the system call writes to, which ends `KVM_RUN`.
const DONE: u16 = 0xf4;

#[rustfmt::skip]
const PROGRAM: [u8; 0x8b] = [
    0xb0, 0x11, 0xe6, 0x20,                         // 00 8259: initialise,
    0xb0, 0x20, 0xe6, 0x21,                         //    vectors from 0x20,
    0xb0, 0x04, 0xe6, 0x21,
    0xb0, 0x01, 0xe6, 0x21,
    0xb0, 0xfe, 0xe6, 0x21,                         //    only the timer unmasked
    0xb0, 0x34, 0xe6, 0x43,                         // 14 8254: counter 0, periodic,
    0xb0, 0x9c, 0xe6, 0x40,                         //    100 Hz
    0xb0, 0x2e, 0xe6, 0x40,
    0x66, 0xb8, 0x28, 0x00,                         // 20 mov ax, 0x28
    0x0f, 0x00, 0xd8,                               //    ltr ax
    0x6a, 0x23,                                     // 27 push user data
    0x68, 0x00, 0x70, 0x00, 0x00,                   //    push user stack
    0x68, 0x02, 0x02, 0x00, 0x00,                   //    push flags, interrupts on
    0x6a, 0x1b,                                     //    push user code
    0x68, 0x3c, 0x80, 0x00, 0x00,                   //    push CODE + 0x3c
    0x48, 0xcf,                                     //    iretq
    0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // 3c mov rax, A
    0x48, 0xbb, 0x00, 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, //    mov rbx, B
    0x48, 0x0f, 0xaf, 0xc3,                         //    imul rax, rbx
    0xf3, 0x90,                                     // 54 pause
    0x83, 0x3c, 0x25, 0x08, 0x90, 0x00, 0x00, 0x03, //    cmp dword [RESULT + 8], 3
    0x72, 0xf4,                                     //    jb 54
    0xcd, 0x80,                                     // 60 int 0x80
    0x0f, 0x0b,                                     //    ud2
    0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
    0xff, 0x04, 0x25, 0x08, 0x90, 0x00, 0x00,       // 70 timer: inc dword [RESULT + 8]
    0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58,             //    end of interrupt, rax kept
    0x48, 0xcf, 0xcc,                               //    iretq
    0x48, 0x89, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00, // 80 system call: mov [RESULT], rax
    0xe6, 0xf4,                                     //    out DONE, al
    0xf4,                                           //    hlt
];

/// `CR0`: protected mode, extension type, numeric errors, write protect, paging.
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// `CR4`: physical address extension.
const CR4: u64 = 1 << 5;
/// `EFER`: long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// The factors in [`PROGRAM`]; the product needs 64-bit registers.
const A: u64 = 0x1122_3344_5566_7788;
const B: u64 = 0x99aa_bbcc_ddee_ff00;

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
    /// A fault while the guest handled a fault: an interrupt, a descriptor or a privilege change did not work.
    #[error("64-bit guest code that takes interrupts and enters user mode crashes (triple fault)")]
    Crash,
    /// The guest ended otherwise than by its system call.
    #[error("64-bit guest code ended with {0} in place of its system call")]
    Exit(String),
    /// The guest came through and computed something else.
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
    vm.set_tss_address(KVM_TSS).map_err(step("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(step("KVM_CREATE_IRQCHIP"))?;
    vm.create_pit2(kvm_pit_config::default()).map_err(step("KVM_CREATE_PIT2"))?;
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
    match exit {
        VcpuExit::IoOut(DONE, _) => {}
        VcpuExit::Shutdown => return Err(Error::Crash),
        other => return Err(Error::Exit(format!("{other:?}"))),
    }
    let found: u64 = memory.read_obj(GuestAddress(RESULT)).map_err(|e| Error::Memory(e.to_string()))?;
    let expected = A.wrapping_mul(B);
    if found == expected { Ok(()) } else { Err(Error::Wrong { expected, found }) }
}

#[expect(unsafe_code, reason = "KVM is given a raw address of our memory")]
fn map(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the region is exactly the mapping that `prove` owns, and that outlives the VM and its only CPU there.
    unsafe { vm.set_user_memory_region(region) }
}

fn load(memory: &GuestMemoryMmap) -> Result<(), Error> {
    const TABLE: u64 = 0b111; // present, writable, for user mode too
    const LARGE: u64 = 1 << 7;
    let failed = |e: vm_memory::GuestMemoryError| Error::Memory(e.to_string());
    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).map_err(failed);
    put(PDPT | TABLE, PML4)?;
    put(PD | TABLE, PDPT)?;
    put(TABLE | LARGE, PD)?;
    for (descriptor, at) in DESCRIPTORS.into_iter().zip((GDT..).step_by(8)) {
        put(descriptor, at)?;
    }
    // An interrupt gate: present, type, privilege that may call it, selector, and the handler's address in pieces.
    let gate = |vector: u64, privilege: u64, handler: u64| {
        let at = IDT + 16 * vector;
        put(handler & 0xffff | u64::from(KERNEL_CODE) << 16 | (0x8e | privilege << 5) << 40, at)
    };
    gate(TIMER, 0, CODE + ON_TIMER)?;
    gate(SYSTEM_CALL, 3, CODE + ON_SYSTEM_CALL)?;
    // Of the task state only RSP0 matters, at byte 4.
    memory.write_obj(KERNEL_STACK, GuestAddress(TSS + 4)).map_err(failed)?;
    memory.write_slice(&PROGRAM, GuestAddress(CODE)).map_err(failed)
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
    sregs.cs = segment(KERNEL_CODE, 0b1011, true);
    let data = segment(KERNEL_DATA, 0b0011, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable { base: GDT, limit: 8 * DESCRIPTORS.len() as u16 - 1, padding: [0; 3] };
    sregs.idt = kvm_dtable { base: IDT, limit: 0xfff, padding: [0; 3] };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    vcpu.set_sregs(&sregs).map_err(step("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: CODE, rflags: 2, rsp: KERNEL_STACK, ..kvm_regs::default() };
    vcpu.set_regs(&regs).map_err(step("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offsets that the constants name are where the comments in the program say.
    #[test]
    fn handlers_are_where_the_gates_point() {
        assert_eq!(PROGRAM[ON_TIMER as usize..][..3], [0xff, 0x04, 0x25]);
        assert_eq!(PROGRAM[ON_SYSTEM_CALL as usize..][..4], [0x48, 0x89, 0x04, 0x25]);
        assert_eq!(PROGRAM[0x3e..0x46], A.to_le_bytes());
        assert_eq!(PROGRAM[0x48..0x50], B.to_le_bytes());
        assert!(CODE + (PROGRAM.len() as u64) < RESULT);
    }
}
