//! Kernel stack frames, whether printed by the guest or walked from the host, and what makes two stacks *the same*.

use serde::{Deserialize, Serialize};
use std::fmt;

/// One frame of a kernel stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Function, Rust names demangled.
    pub function: String,
    /// Offset of the return address (or instruction pointer) in the function, bytes.
    pub offset: u64,
    /// Module that the function is in; none for the kernel itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// False for addresses that the kernel's unwinder found on the stack but not in the call chain (`? `).
    pub reliable: bool,
    /// The frame belongs to an interrupt that was taken on top of the task.
    #[serde(default, skip_serializing_if = "is_false")]
    pub interrupt: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_false(value: &bool) -> bool {
    !value
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.reliable {
            f.write_str("? ")?;
        }
        write!(f, "{}+{:#x}", self.function, self.offset)?;
        match &self.module {
            Some(module) => write!(f, " [{module}]"),
            None => Ok(()),
        }
    }
}

impl Frame {
    /// Parses `func+0x12/0x34 [module]`, with or without the leading `? `, as `%pB` prints it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (reliable, text) = match text.strip_prefix("? ") {
            Some(rest) => (false, rest),
            None => (true, text),
        };
        let (symbol, rest) = text.split_once("+0x")?;
        let plausible = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$');
        if symbol.is_empty()
            || symbol.starts_with(|c: char| c.is_ascii_digit())
            || !symbol.chars().all(plausible)
        {
            return None;
        }
        let (place, module) = match rest.split_once(' ') {
            Some((place, module)) => (place, Some(module.strip_prefix('[')?.strip_suffix(']')?)),
            None => (rest, None),
        };
        let (offset, size) = place.split_once("/0x")?;
        u64::from_str_radix(size, 16).ok()?;
        Some(Self {
            function: demangle(symbol),
            offset: u64::from_str_radix(offset, 16).ok()?,
            // With CONFIG_STACKTRACE_BUILD_ID the module's build id follows its name.
            module: module.and_then(|module| module.split(' ').next()).map(str::to_owned),
            reliable,
            interrupt: false,
        })
    }
}

/// The readable form of a symbol: Rust names demangled without their hash, others as they are.
#[must_use]
pub fn demangle(symbol: &str) -> String {
    match rustc_demangle::try_demangle(symbol) {
        Ok(name) => format!("{name:#}"),
        Err(_) => symbol.to_owned(),
    }
}

/// A function's name without what the compiler appended (`.isra.0`, `.constprop.0`, `.part.0`, `.cold`), so that two
/// builds name one function alike.
#[must_use]
pub fn base_name(function: &str) -> &str {
    const SUFFIXES: [&str; 6] = [".isra.", ".constprop.", ".part.", ".cold", ".llvm.", ".lto_priv."];
    // Most names have no dot, and this is asked of every frame of every sample.
    let mut dots = function.match_indices('.').map(|(dot, _)| dot);
    let cut = dots.find(|&dot| SUFFIXES.iter().any(|suffix| function[dot..].starts_with(suffix)));
    &function[..cut.unwrap_or(function.len())]
}

/// Frames by which every task enters the kernel or every thread starts: they say nothing about what it does there.
#[must_use]
pub fn is_entry(function: &str) -> bool {
    const EXACT: [&str; 24] = [
        "entry_SYSCALL_64_after_hwframe",
        "entry_SYSCALL_64",
        "do_syscall_64",
        "x64_sys_call",
        "__x64_sys_ioctl",
        "__se_sys_ioctl",
        "vfs_ioctl",
        "ret_from_fork",
        "ret_from_fork_asm",
        "kthread",
        "worker_thread",
        "process_one_work",
        "process_scheduled_works",
        "smpboot_thread_fn",
        "cpu_startup_entry",
        "do_idle",
        "start_secondary",
        "secondary_startup_64",
        "common_startup_64",
        "start_kernel",
        "rest_init",
        "asm_exc_page_fault",
        "exc_page_fault",
        "do_user_addr_fault",
    ];
    EXACT.contains(&base_name(function))
        || function.starts_with("__x64_sys_")
        || function.starts_with("__do_sys_")
}

/// Functions that have no caller: where every kernel stack begins.
#[must_use]
pub fn is_root(function: &str) -> bool {
    const STARTS: [&str; 6] =
        ["entry_SYSCALL", "asm_", "ret_from_fork", "common_startup", "secondary_startup", "x86_64_start"];
    STARTS.iter().any(|start| function.starts_with(start))
}

/// Frames that only say *that* a task sleeps or spins in a primitive, not why.
#[must_use]
pub fn is_waiting_primitive(function: &str) -> bool {
    const PREFIXES: [&str; 22] = [
        "__schedule",
        "schedule",
        "preempt_schedule",
        "io_schedule",
        "context_switch",
        "__switch_to",
        "wait_for_common",
        "wait_for_completion",
        "__wait_for_common",
        "do_wait_for_common",
        "__flush_work",
        "flush_work",
        "_raw_spin_",
        "native_queued_spin_lock",
        "queued_spin_lock",
        "mutex_",
        "__mutex_",
        "down_",
        "rwsem_",
        "__down_",
        "folio_wait_bit",
        "__folio_lock",
    ];
    PREFIXES.iter().any(|prefix| function.starts_with(prefix))
}

/// Frames of a CPU that busily waits for an answer or a lock of another CPU: its loop is that CPU's fault.
#[must_use]
pub fn waits_for_another_cpu(function: &str) -> bool {
    const EXACT: [&str; 7] = [
        "smp_call_function_many_cond",
        "smp_call_function_single",
        "csd_lock_wait",
        "__csd_lock_wait",
        "multi_cpu_stop",
        "native_queued_spin_lock_slowpath",
        "queued_spin_lock_slowpath",
    ];
    EXACT.contains(&base_name(function))
}

/// Reliable task frames of a stack, leaf first, without interrupts.
pub fn task_frames(stack: &[Frame]) -> impl DoubleEndedIterator<Item = &Frame> {
    stack.iter().filter(|frame| frame.reliable && !frame.interrupt)
}

/// Whether a function of this (base) name is in the call chain of a stack.
#[must_use]
pub fn contains(stack: &[Frame], function: &str) -> bool {
    task_frames(stack).any(|frame| base_name(&frame.function) == function)
}

/// The frames of a stack that survive a rebuild and a reschedule, leaf first: no entry frames, no waiting primitives,
/// at most `limit`.
#[must_use]
pub fn stable(stack: &[Frame], limit: usize) -> Vec<String> {
    task_frames(stack)
        .map(|frame| base_name(&frame.function))
        .filter(|function| !is_entry(function) && !is_waiting_primitive(function))
        .take(limit)
        .map(str::to_owned)
        .collect()
}

/// Functions of the kernel that retry for ever by themselves: where one is in a stack, it names the loop, whatever is
/// above it at the moment.
const LOOPS: [&str; 1] = ["hmm_range_fault"];

/// The functions that name a loop, leaf first: from the innermost known loop on, or all of them; no entry frames.
#[must_use]
pub fn from_loop(functions: &[String]) -> Vec<String> {
    let mut frames: Vec<String> = functions.iter().filter(|function| !is_entry(function)).cloned().collect();
    if let Some(anchor) = frames.iter().position(|function| LOOPS.contains(&base_name(function))) {
        frames.drain(..anchor);
    }
    frames
}

/// `leaf ← caller ← caller`, at most `limit` frames, Rust names shortened.
#[must_use]
pub fn chain<S: AsRef<str>>(functions: &[S], limit: usize) -> String {
    let shown: Vec<String> = functions.iter().take(limit).map(|function| short(function.as_ref())).collect();
    shown.join(" ← ")
}

/// A Rust name without crate, modules, generic arguments and the trait implemented:
/// `<hsgpu::file::OpenFile as kernel::miscdevice::MiscDevice>::ioctl` is `OpenFile::ioctl`. Other names stay.
#[must_use]
pub fn short(function: &str) -> String {
    let last = |path: &str| path.rsplit("::").next().unwrap_or(path).to_owned();
    let Some(rest) = function.strip_prefix('<') else {
        // A free function keeps its module: `new` alone says nothing.
        let parts: Vec<&str> = function.split("::").collect();
        return parts[parts.len().saturating_sub(2)..].join("::");
    };
    // The self type ends at the `>` that closes the first `<`.
    let mut depth = 1;
    let end = rest.char_indices().find(|&(_, c)| {
        depth += match c {
            '<' => 1,
            '>' => -1,
            _ => 0,
        };
        depth == 0
    });
    let Some((end, _)) = end else { return function.to_owned() };
    let (inside, method) = (&rest[..end], rest[end + 1..].trim_start_matches("::"));
    let this = inside.split(" as ").next().unwrap_or(inside);
    let this = this.split('<').next().unwrap_or(this);
    format!("{}::{}", last(this), last(method))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_as_the_kernel_prints_them() {
        let frame = Frame::parse("  dmirror_fault+0x145/0x320 [test_hmm]").expect("a frame");
        assert_eq!((frame.function.as_str(), frame.offset), ("dmirror_fault", 0x145));
        assert_eq!(frame.module.as_deref(), Some("test_hmm"));
        assert!(frame.reliable);
        let unsure = Frame::parse(" ? hmm_vma_fault.isra.0+0x4b/0x90").expect("a frame");
        assert!(!unsure.reliable);
        assert_eq!(base_name(&unsure.function), "hmm_vma_fault");
        let id = Frame::parse("f+0x1/0x2 [hsgpu 0123456789abcdef]").expect("a frame");
        assert_eq!(id.module.as_deref(), Some("hsgpu"));
    }

    #[test]
    fn rust_names_are_readable() {
        let frame = Frame::parse("_RNvMs0_NtCs5Hc9Yb3x1Zk_5hsgpu7migrateNtB5_5Guard4wait+0x10/0x40 [hsgpu]")
            .expect("a frame");
        assert!(frame.function.contains("hsgpu"), "{}", frame.function);
        assert!(!frame.function.starts_with("_R"), "{}", frame.function);
    }

    #[test]
    fn short_names() {
        for (long, expected) in [
            ("hmm_range_fault", "hmm_range_fault"),
            ("<hsgpu_main::mirror::Mirror>::access", "Mirror::access"),
            ("<hsgpu_main::file::OpenFile as kernel::miscdevice::MiscDevice>::ioctl", "OpenFile::ioctl"),
            (
                "<kernel::miscdevice::MiscdeviceVTable<hsgpu_main::file::OpenFile>>::ioctl",
                "MiscdeviceVTable::ioctl",
            ),
            ("hsgpu_main::vram::free", "vram::free"),
            ("<unclosed", "<unclosed"),
        ] {
            assert_eq!(short(long), expected);
        }
    }

    #[test]
    fn other_lines_are_no_frames() {
        for line in [
            "RSP: 0018:ffff888002b6f778 EFLAGS: 00010286",
            "<TASK>",
            "0x44061b",
            "a+b",
            "1f+0x1/0x2",
            "f+0x1",
            "x y+0x1/0x2",
        ] {
            assert_eq!(Frame::parse(line), None, "{line}");
        }
    }
}
