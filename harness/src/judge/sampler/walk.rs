//! Walks a guest kernel stack by frame pointer, from outside, on memory that may change meanwhile.
//!
//! The guest is built with `CONFIG_UNWINDER_FRAME_POINTER=y`: `[rbp]` is the caller's `rbp`, `[rbp+8]` the return
//! address. An odd `rbp` is an encoded `struct pt_regs` pointer (`ENCODE_FRAME_POINTER`,
//! `arch/x86/include/asm/frame.h`): an interrupt or exception was taken there. A zero `rbp` is the system call entry.

use super::CpuRegisters;

/// `THREAD_SIZE` without KASAN. Stacks are aligned to it, and so are interrupt stacks.
const STACK: u64 = 16 << 10;
/// Most bytes of a stack read at once: deep call chains use 3 KiB.
const READ: u64 = 8 << 10;
/// Most frames of a walk.
const DEEPEST: usize = 64;
/// Most reads of one walk: the task's stack and the interrupt stacks on top of it, each perhaps from two places.
const READS: usize = 5;
/// Bytes of `push %rbp; mov %rsp,%rbp`.
const PROLOGUE: u64 = 4;
/// First address of the kernel half.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// Offsets in `struct pt_regs` (`arch/x86/include/asm/ptrace.h`).
mod pt_regs {
    pub(super) const BP: u64 = 4 * 8;
    pub(super) const IP: u64 = 16 * 8;
    pub(super) const CS: u64 = 17 * 8;
}

/// What a walk found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Walk {
    /// Instruction pointer and return addresses, leaf first. Frames near the leaf may be missing.
    pub(super) addresses: Vec<u64>,
    /// The walk reached the stack's root. If not, frames near the root are missing.
    pub(super) complete: bool,
}

/// Walks the stack of a CPU that is in kernel mode. `read` gives guest memory at a virtual address of that CPU, possibly
/// less than asked for; `is_root` says of an address that its function has no caller, and of one that is no code nothing;
/// `into` is how far into its function the CPU is, bytes.
///
/// The guest runs on between the reading of its registers and of its memory, so the frames near the leaf may be gone by
/// then. The frames near the root do not change while a function near the root runs: where the chain from `rbp` is torn,
/// the first frame above `rsp` from which a chain reaches the root is taken up instead.
pub(super) fn walk(
    registers: &CpuRegisters,
    into: Option<u64>,
    mut read: impl FnMut(u64, usize) -> Option<Vec<u8>>,
    is_root: impl Fn(u64) -> Option<bool>,
) -> Walk {
    let is_text = |address| is_root(address).is_some();
    let mut memory = Memory { blocks: Vec::new(), reads: 0, read: &mut read };
    memory.load(registers.rsp);
    // Before `push %rbp; mov %rsp,%rbp` have run, rbp is the caller's, and the caller's own address is only on the stack.
    let caller = match into {
        Some(0) => memory.cached(registers.rsp),
        Some(1..PROLOGUE) => memory.cached(registers.rsp.wrapping_add(8)),
        _ => None,
    };
    let mut walk = chain(&mut memory, registers.rbp, &is_root);
    if !walk.complete {
        // On an interrupt stack, whose last word is the stack pointer of what was interrupted (`call_on_irqstack`,
        // arch/x86/include/asm/irq_stack.h), the frames near the root are on the other stack.
        let top = (registers.rsp | (STACK - 1)) - 7;
        if let Some(interrupted) =
            memory.cached(top).filter(|&rsp| rsp > KERNEL && rsp / STACK != registers.rsp / STACK)
        {
            memory.load(interrupted);
        }
        let mut candidates = memory.slots().into_iter();
        if let Some(resumed) = candidates.find_map(|slot| resume(&mut memory, slot, &is_root)) {
            walk = resumed;
        }
    }
    let missed =
        caller.filter(|&caller| walk.complete && is_text(caller) && walk.addresses.first() != Some(&caller));
    walk.addresses.splice(0..0, [registers.rip].into_iter().chain(missed));
    walk
}

/// The chain from a word of the stack, if that looks like a frame and the chain reaches the root.
fn resume(memory: &mut Memory<'_>, slot: u64, is_root: &impl Fn(u64) -> Option<bool>) -> Option<Walk> {
    let next = memory.cached(slot)?;
    let linked = next == 0 || next > slot;
    memory.cached(slot + 8).filter(|&address| linked && is_root(address).is_some())?;
    let walk = chain(memory, slot, is_root);
    walk.complete.then_some(walk)
}

/// Follows saved frame pointers from one on.
fn chain(memory: &mut Memory<'_>, mut rbp: u64, is_root: &impl Fn(u64) -> Option<bool>) -> Walk {
    let is_text = |address| is_root(address).is_some();
    let mut walk = Walk::default();
    let mut previous = 0;
    while walk.addresses.len() < DEEPEST {
        if rbp == 0 {
            // Only what has no caller ends a stack: a stale word on it may be zero too.
            walk.complete = walk.addresses.last().is_some_and(|&last| is_root(last) == Some(true));
            break;
        }
        if rbp & 1 == 1 && rbp > KERNEL {
            let regs = rbp & !1;
            // From the lowest word on, so that one read has them all.
            let (Some(bp), Some(ip), Some(cs)) = (
                memory.word(regs, pt_regs::BP),
                memory.word(regs, pt_regs::IP),
                memory.word(regs, pt_regs::CS),
            ) else {
                break;
            };
            if cs & 3 != 0 || ip == 0 {
                walk.complete = walk.addresses.last().is_some_and(|&last| is_root(last) == Some(true));
                break;
            }
            if !is_text(ip) {
                break;
            }
            walk.addresses.push(ip);
            previous = regs;
            rbp = bp;
            continue;
        }
        // Frames lie upwards on one stack; from one stack to another they may lie anywhere.
        let same_stack = previous / STACK == rbp / STACK;
        if rbp < KERNEL || !rbp.is_multiple_of(8) || (same_stack && rbp <= previous) {
            break;
        }
        let (Some(next), Some(address)) = (memory.word(rbp, 0), memory.word(rbp, 8)) else { break };
        if !is_text(address) {
            break;
        }
        walk.addresses.push(address);
        previous = rbp;
        rbp = next;
    }
    walk
}

struct Memory<'a> {
    blocks: Vec<(u64, Vec<u8>)>,
    reads: usize,
    read: &'a mut dyn FnMut(u64, usize) -> Option<Vec<u8>>,
}

impl Memory<'_> {
    fn load(&mut self, address: u64) {
        let start = address & !7;
        let length = (STACK - start % STACK).min(READ);
        self.reads += 1;
        // The kernel half ends where u64 does; a guest's rsp may be anything.
        if start < KERNEL || start.checked_add(length).is_none() {
            return;
        }
        if let Some(bytes) = (self.read)(start, usize::try_from(length).unwrap_or(0)) {
            self.blocks.push((start, bytes));
        }
    }

    /// Addresses of all words read so far, upwards from the stack pointer, then those of the other stacks.
    fn slots(&self) -> Vec<u64> {
        let words = |(start, bytes): &(u64, Vec<u8>)| {
            let start = *start;
            (0..bytes.len() as u64 / 8).map(move |word| start + word * 8)
        };
        self.blocks.iter().flat_map(words).collect()
    }

    fn word(&mut self, base: u64, offset: u64) -> Option<u64> {
        let address = base.checked_add(offset)?;
        if let Some(word) = self.cached(address) {
            return Some(word);
        }
        if self.reads >= READS {
            return None;
        }
        self.load(address);
        self.cached(address)
    }

    fn cached(&self, address: u64) -> Option<u64> {
        self.blocks.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            Some(u64::from_le_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 0xffff_8880_0000_4000;
    const TEXT: u64 = 0xffff_ffff_8100_0000;

    /// Code, of which the last quarter has no caller.
    fn is_root(address: u64) -> Option<bool> {
        (TEXT..TEXT + 0x1000).contains(&address).then_some(address >= ROOT)
    }

    const ROOT: u64 = TEXT + 0xc00;

    /// A stack of 16 KiB at `BASE` with words set at offsets.
    fn stack(words: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; STACK as usize];
        for &(offset, word) in words {
            bytes[offset as usize..offset as usize + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn walk_on(bytes: &[u8], rip: u64, rsp: u64, rbp: u64) -> (Walk, usize) {
        walk_from(bytes, None, rip, rsp, rbp)
    }

    fn walk_from(bytes: &[u8], into: Option<u64>, rip: u64, rsp: u64, rbp: u64) -> (Walk, usize) {
        let registers = CpuRegisters { cpu: 0, rip, rsp, rbp, cpl: 0, halted: false, values: 0 };
        let mut reads = 0;
        let walk = walk(
            &registers,
            into,
            |address, length| {
                reads += 1;
                let from = usize::try_from(address.checked_sub(BASE)?).ok()?;
                Some(bytes.get(from..(from + length).min(bytes.len()))?.to_vec())
            },
            is_root,
        );
        (walk, reads)
    }

    #[test]
    fn a_system_call_from_leaf_to_root_in_one_read() {
        let bytes = stack(&[
            (0x3f00, BASE + 0x3f40),
            (0x3f08, TEXT + 0x100),
            (0x3f40, BASE + 0x3f80),
            (0x3f48, TEXT + 0x200),
            (0x3f80, 0),
            (0x3f88, ROOT),
        ]);
        let (walk, reads) = walk_on(&bytes, TEXT, BASE + 0x3ef0, BASE + 0x3f00);
        assert_eq!(walk.addresses, [TEXT, TEXT + 0x100, TEXT + 0x200, ROOT]);
        assert!(walk.complete);
        assert_eq!(reads, 1);
    }

    #[test]
    fn the_caller_of_a_function_that_has_no_frame_yet() {
        let bytes = stack(&[(0x3ef0, TEXT + 0x80), (0x3ef8, TEXT + 0x90), (0x3f00, 0), (0x3f08, ROOT)]);
        for (into, second) in [(0, TEXT + 0x80), (1, TEXT + 0x90), (4, ROOT)] {
            let (walk, _) = walk_from(&bytes, Some(into), TEXT, BASE + 0x3ef0, BASE + 0x3f00);
            assert_eq!(walk.addresses[..2], [TEXT, second], "{into}");
            assert!(walk.complete);
        }
    }

    #[test]
    fn through_an_interrupt() {
        let regs = 0x3e00;
        let bytes = stack(&[
            (0x3d00, BASE + regs + 1),
            (0x3d08, TEXT + 0x10),
            (regs + pt_regs::BP, BASE + 0x3f00),
            (regs + pt_regs::IP, TEXT + 0x500),
            (regs + pt_regs::CS, 0x10),
            (0x3f00, 0),
            (0x3f08, ROOT),
        ]);
        let (walk, _) = walk_on(&bytes, TEXT, BASE + 0x3cf0, BASE + 0x3d00);
        assert_eq!(walk.addresses, [TEXT, TEXT + 0x10, TEXT + 0x500, ROOT]);
        assert!(walk.complete);
    }

    #[test]
    fn an_exception_from_user_mode_is_a_root() {
        let regs = 0x3e00;
        let bytes = stack(&[
            (0x3d00, BASE + regs + 1),
            (0x3d08, ROOT),
            (regs + pt_regs::IP, 0x4000),
            (regs + pt_regs::CS, 0x33),
        ]);
        let (walk, _) = walk_on(&bytes, TEXT, BASE + 0x3cf0, BASE + 0x3d00);
        assert!(walk.complete);
        assert_eq!(walk.addresses.len(), 2);
    }

    #[test]
    fn a_torn_leaf_is_skipped_up_to_a_chain_that_reaches_the_root() {
        let bytes = stack(&[
            (0x3e00, 0xdead),        // where rbp pointed: overwritten by a later call
            (0x3e10, BASE + 0x3e18), // looks like a frame, and leads nowhere
            (0x3e18, TEXT + 0x50),
            (0x3f00, BASE + 0x3f40),
            (0x3f08, TEXT + 0x100),
            (0x3f20, 0), // and this one ends where nothing begins
            (0x3f28, TEXT + 0x60),
            (0x3f40, 0),
            (0x3f48, ROOT),
        ]);
        let (walk, reads) = walk_on(&bytes, TEXT, BASE + 0x3df0, BASE + 0x3e00);
        assert_eq!(walk.addresses, [TEXT, TEXT + 0x100, ROOT]);
        assert!(walk.complete);
        assert_eq!(reads, 1);
    }

    #[test]
    fn a_torn_leaf_on_an_interrupt_stack_is_skipped_down_to_the_stack_below() {
        // Two stacks of 16 KiB in a row; the CPU is on the first, and its last word points into the second.
        let mut bytes = stack(&[(0x3ff8, BASE + STACK + 0x3e00)]);
        bytes.extend(stack(&[
            (0x3f00, BASE + STACK + 0x3f40),
            (0x3f08, TEXT + 0x100),
            (0x3f40, 0),
            (0x3f48, ROOT),
        ]));
        let (walk, reads) = walk_on(&bytes, TEXT, BASE + 0x3f00, BASE + 0x3f10);
        assert_eq!(walk.addresses, [TEXT, TEXT + 0x100, ROOT]);
        assert!(walk.complete && reads == 2);
    }

    #[test]
    fn torn_stacks_end_the_walk_and_never_loop() {
        // The saved rbp points downwards; the return address is data; rbp is user space.
        for (next, address) in [(BASE + 0x3000, TEXT), (BASE + 0x3f40, 7), (0x7fff_0000, TEXT)] {
            let bytes = stack(&[(0x3f00, next), (0x3f08, address)]);
            let (walk, _) = walk_on(&bytes, TEXT, BASE + 0x3ef0, BASE + 0x3f00);
            assert!(!walk.complete);
            assert!(walk.addresses.len() <= 2);
        }
    }

    proptest! {
        #[test]
        fn any_memory_and_registers_are_survived(
            words in prop::collection::vec((0u64..0x7ff, any::<u64>()), 0..64),
            near in prop::collection::vec((0u64..0x7ff, 0u64..0x4000), 0..64),
            rsp in any::<u64>(),
            rbp in prop_oneof![any::<u64>(), BASE..BASE + STACK],
        ) {
            let mut all: Vec<(u64, u64)> = words.into_iter().map(|(slot, word)| (slot * 8, word)).collect();
            all.extend(near.into_iter().map(|(slot, offset)| (slot * 8, BASE + offset)));
            let bytes = stack(&all);
            let (walk, reads) = walk_on(&bytes, TEXT, rsp, rbp);
            prop_assert!(walk.addresses.len() <= DEEPEST && reads <= READS);
        }
    }
}
