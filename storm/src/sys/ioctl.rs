//! The ioctls of `/dev/hmm_dmirror*`, one function each. Addresses in their arguments are those of [`Mapping`]s.
//!
//! [`Mapping`]: super::memory::Mapping

#![expect(
    unsafe_code,
    reason = "ioctl(2) is as unsafe as its command; each wrapper names the structure it passes"
)]

use std::os::fd::AsFd;

use hmmstorm_abi::job::{Job, Op};
use hmmstorm_abi::uapi;
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl};

use super::memory::{Addresses, Mapping, PageSpan};

/// Passes `value` with command `OPCODE`.
///
/// # Safety
/// `OPCODE` must take a `T` that it reads and writes, and every user address in `value` that the kernel or the device
/// stores through must belong to a [`Mapping`], whose memory is only ever seen as atomics.
unsafe fn update<const OPCODE: Opcode, T>(fd: impl AsFd, value: &mut T) -> io::Result<()> {
    // SAFETY: the caller vouches for the pairing of opcode and type.
    let call = unsafe { Updater::<OPCODE, T>::new(value) };
    // SAFETY: as above; `value` lives across the call.
    unsafe { ioctl(fd, call) }
}

/// [`uapi::HSGPU_MIGRATE`] over `range`.
///
/// # Errors
/// What the driver answers.
pub(crate) fn migrate(
    fd: impl AsFd,
    range: impl Into<Addresses>,
    request: uapi::Migrate,
) -> io::Result<uapi::Migrate> {
    let range = range.into();
    let mut request = uapi::Migrate { addr: range.start(), npages: range.pages() as u64, ..request };
    // SAFETY: HSGPU_MIGRATE takes a `Migrate`; migration moves pages, whoever's they are, and keeps their contents.
    unsafe { update::<{ uapi::HSGPU_MIGRATE }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_ACCESS`]: the device reads `range` into `buffer`, or (`request.write`) writes `buffer` to `range`. How far
/// it came is in `request` in any case.
///
/// # Errors
/// `EINVAL` for a buffer shorter than the range; else what the driver answers.
pub(crate) fn access(
    fd: impl AsFd,
    range: PageSpan<'_>,
    buffer: &Mapping,
    request: &mut uapi::Access,
) -> io::Result<()> {
    let buffer = buffer.span(0..range.pages()).ok_or(io::Errno::INVAL)?;
    *request = uapi::Access {
        addr: range.address(),
        ptr: buffer.address(),
        npages: range.pages() as u64,
        ..*request
    };
    // SAFETY: HSGPU_ACCESS takes an `Access`; it stores into `range` or `buffer`, both in mappings and long enough.
    unsafe { update::<{ uapi::HSGPU_ACCESS }, _>(fd, request) }
}

/// [`uapi::HSGPU_ACCESS`] to read: the device reads `range`, whatever is there, into `buffer`.
///
/// # Errors
/// As [`access`].
pub(crate) fn read(
    fd: impl AsFd,
    range: Addresses,
    buffer: &Mapping,
    owner: u32,
) -> io::Result<uapi::Access> {
    let buffer = buffer.span(0..range.pages()).ok_or(io::Errno::INVAL)?;
    let mut request = uapi::Access {
        addr: range.start(),
        ptr: buffer.address(),
        npages: range.pages() as u64,
        write: 0,
        owner,
        ..Default::default()
    };
    // SAFETY: HSGPU_ACCESS takes an `Access`; as it does not write, it stores into `buffer` only, which is long enough.
    unsafe { update::<{ uapi::HSGPU_ACCESS }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HMM_DMIRROR_SNAPSHOT`]: one protection byte a page of `range` into `buffer`.
///
/// # Errors
/// `EINVAL` for a buffer that is too short; else what the driver answers.
pub(crate) fn snapshot(fd: impl AsFd, range: PageSpan<'_>, buffer: &Mapping) -> io::Result<()> {
    let needed = range.pages().div_ceil(uapi::PAGE_SIZE);
    let buffer = buffer.span(0..needed).ok_or(io::Errno::INVAL)?;
    let mut request = uapi::DmirrorCmd {
        addr: range.address(),
        ptr: buffer.address(),
        npages: range.pages() as u64,
        ..Default::default()
    };
    // SAFETY: HMM_DMIRROR_SNAPSHOT takes a `DmirrorCmd`; it stores one byte a page into `buffer`, which holds that many.
    unsafe { update::<{ uapi::HMM_DMIRROR_SNAPSHOT }, _>(fd, &mut request) }
}

/// [`uapi::HSGPU_SUBMIT`]: starts `request.job`, which accesses `range` and nothing else.
///
/// # Errors
/// `EINVAL` for a job that leaves `range`; else what the driver answers.
pub(crate) fn submit(
    fd: impl AsFd,
    range: PageSpan<'_>,
    job: Job,
    request: uapi::Submit,
) -> io::Result<uapi::Submit> {
    let end = range.address() + (range.pages() * uapi::PAGE_SIZE) as u64;
    if job.va < range.address() || job.va.checked_add(job.window).is_none_or(|window| window > end) {
        return Err(io::Errno::INVAL);
    }
    let mut request = uapi::Submit { job: job.to_words(), ..request };
    // SAFETY: HSGPU_SUBMIT takes a `Submit`; the job stores into `range`, which is in a mapping. Who unmaps memory under a
    // job does so under one that only reads.
    unsafe { update::<{ uapi::HSGPU_SUBMIT }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_SUBMIT`] of a job that only loads, wherever it does.
///
/// # Errors
/// `EINVAL` for a job that stores; else what the driver answers.
pub(crate) fn submit_load(fd: impl AsFd, job: Job) -> io::Result<uapi::Submit> {
    if !matches!(job.op, Op::Load | Op::Check) {
        return Err(io::Errno::INVAL);
    }
    let mut request = uapi::Submit { job: job.to_words(), ..Default::default() };
    // SAFETY: HSGPU_SUBMIT takes a `Submit`; the job stores nothing.
    unsafe { update::<{ uapi::HSGPU_SUBMIT }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_WAIT`].
///
/// # Errors
/// What the driver answers.
pub(crate) fn wait(fd: impl AsFd, handle: u64, timeout_ms: u32) -> io::Result<uapi::Wait> {
    let mut request = uapi::Wait { handle, timeout_ms, ..Default::default() };
    // SAFETY: HSGPU_WAIT takes a `Wait` and no address.
    unsafe { update::<{ uapi::HSGPU_WAIT }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_POLICY`].
///
/// # Errors
/// What the driver answers.
pub(crate) fn policy(fd: impl AsFd, mut policy: uapi::Policy) -> io::Result<()> {
    // SAFETY: HSGPU_POLICY takes a `Policy` and no address.
    unsafe { update::<{ uapi::HSGPU_POLICY }, _>(fd, &mut policy) }
}

/// [`uapi::HSGPU_EVICT`] over `range`.
///
/// # Errors
/// What the driver answers.
pub(crate) fn evict(fd: impl AsFd, range: PageSpan<'_>) -> io::Result<uapi::Evict> {
    let mut request = uapi::Evict { addr: range.address(), npages: range.pages() as u64, evicted: 0 };
    // SAFETY: HSGPU_EVICT takes an `Evict`; migration moves the pages of a `Mapping` and keeps their contents.
    unsafe { update::<{ uapi::HSGPU_EVICT }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_PEER_MIGRATE`] over `range`, from GPU `from`.
///
/// # Errors
/// What the driver answers.
pub(crate) fn peer_migrate(fd: impl AsFd, range: PageSpan<'_>, from: u32) -> io::Result<uapi::PeerMigrate> {
    let mut request =
        uapi::PeerMigrate { addr: range.address(), npages: range.pages() as u64, from, ..Default::default() };
    // SAFETY: HSGPU_PEER_MIGRATE takes a `PeerMigrate`; migration moves the pages of a `Mapping` and keeps their contents.
    unsafe { update::<{ uapi::HSGPU_PEER_MIGRATE }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HMM_DMIRROR_MIGRATE_TO_DEV`]: `range` to the device, and the device's copy of it into `buffer`. The kernel's own
/// test_hmm knows it too.
///
/// # Errors
/// `EINVAL` for a buffer that is too short; else what the driver answers.
pub(crate) fn migrate_to_device(fd: impl AsFd, range: PageSpan<'_>, buffer: &Mapping) -> io::Result<()> {
    let buffer = buffer.span(0..range.pages()).ok_or(io::Errno::INVAL)?;
    let mut request = uapi::DmirrorCmd {
        addr: range.address(),
        ptr: buffer.address(),
        npages: range.pages() as u64,
        ..Default::default()
    };
    // SAFETY: HMM_DMIRROR_MIGRATE_TO_DEV takes a `DmirrorCmd`; it keeps the contents of `range` and stores as many pages
    // into `buffer`.
    unsafe { update::<{ uapi::HMM_DMIRROR_MIGRATE_TO_DEV }, _>(fd, &mut request) }
}

/// [`uapi::HSGPU_HOLD`] over `range`.
///
/// # Errors
/// What the driver answers.
pub(crate) fn hold(fd: impl AsFd, range: PageSpan<'_>, request: uapi::Hold) -> io::Result<uapi::Hold> {
    let mut request = uapi::Hold { addr: range.address(), npages: range.pages() as u64, ..request };
    // SAFETY: HSGPU_HOLD takes a `Hold`; it locks pages of a `Mapping` for a while and stores nothing.
    unsafe { update::<{ uapi::HSGPU_HOLD }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_REFUSE`].
///
/// # Errors
/// What the driver answers.
pub(crate) fn refuse(fd: impl AsFd, request: uapi::Refuse) -> io::Result<uapi::Refuse> {
    let mut request = request;
    // SAFETY: HSGPU_REFUSE takes a `Refuse` and no address.
    unsafe { update::<{ uapi::HSGPU_REFUSE }, _>(fd, &mut request) }?;
    Ok(request)
}

/// [`uapi::HSGPU_STATS`].
///
/// # Errors
/// What the driver answers.
pub(crate) fn stats(fd: impl AsFd) -> io::Result<uapi::Stats> {
    let mut stats = uapi::Stats::default();
    // SAFETY: HSGPU_STATS takes a `Stats` and no address.
    unsafe { update::<{ uapi::HSGPU_STATS }, _>(fd, &mut stats) }?;
    Ok(stats)
}
