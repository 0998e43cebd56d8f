//! What the kernel tells of this process's memory.

use std::fs;

use crate::scenario::WorkError;
use crate::sys::pagemap;
pub(super) use crate::sys::pagemap::UFFD_WP;
use crate::sys::vma::Vma;

/// The pagemap entry of every page of `vma`.
pub(super) fn pagemap(vma: &Vma) -> Result<Vec<u64>, WorkError> {
    pagemap::entries(vma).map_err(WorkError::system("read(/proc/self/pagemap)"))
}

/// The field `name` (in kB) of the VMA that begins at `vma`, from /proc/self/smaps.
pub(super) fn smaps(vma: &Vma, name: &str) -> Result<u64, WorkError> {
    let text = fs::read_to_string("/proc/self/smaps").map_err(WorkError::system("read(/proc/self/smaps)"))?;
    field(&text, vma.address(0), name).ok_or_else(|| {
        WorkError::Condition(format!("no {name} of {:#x} in /proc/self/smaps", vma.address(0)))
    })
}

fn field(smaps: &str, start: u64, name: &str) -> Option<u64> {
    let head = format!("{start:08x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
    lines.next()?;
    // The next VMA's head has no colon behind its first word.
    let line = lines
        .take_while(|line| line.split_ascii_whitespace().next().is_some_and(|word| word.ends_with(':')))
        .find(|line| line.split(':').next() == Some(name))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Forgets which pages were written since the last time (`clear_refs`, 4).
pub(super) fn clear_soft_dirty() -> Result<(), WorkError> {
    pagemap::clear_soft_dirty().map_err(WorkError::system("write(/proc/self/clear_refs)"))
}

/// The kernel's count of anonymous folios of 2 MiB.
pub(super) fn anonymous_huge_folios() -> Result<i64, WorkError> {
    const COUNT: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/nr_anon";
    let text =
        fs::read_to_string(COUNT).map_err(WorkError::system("read(hugepages-2048kB/stats/nr_anon)"))?;
    text.trim().parse().map_err(|_| WorkError::Condition(format!("{COUNT} holds {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn finds_the_field_of_one_vma() {
        let text = "7f00-7f10 rw-p 0 00:00 0\nSize: 4 kB\nLazyFree: 8 kB\n00007f20-7f30 rw-p 0 00:00 0\nLazyFree: 12 kB\n";
        assert_eq!(field(text, 0x7f20, "LazyFree"), Some(12));
        assert_eq!(field(text, 0x7f20, "Size"), None);
    }
}
