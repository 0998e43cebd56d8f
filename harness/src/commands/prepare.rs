//! From options to a machine that has said hello: what `run`, `storm` and `gdb` have in common.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmmstorm_abi::wire::event::Event;

use crate::build::{BuildError, Builder, Image};
use crate::cli::{Accel, Context, Error, ImageArgs, MachineArgs, Preempt};
use crate::vm::command::{BootFiles, QemuProgram, Sockets};
use crate::vm::{self, Boot, Engine, Guest, Machine, Occurrence, RunFolder, Spec, accel};

/// Default run folders that are kept in the cache.
const KEPT_RUNS: usize = 100;

/// What is to be booted, with what, and where its logs go.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The machine.
    pub boot: Boot,
    /// The image it boots.
    pub image: Image,
    /// Whether TCG may take over when KVM turns out not to work.
    pub accel: Accel,
    /// Why this engine was chosen, for people.
    pub engine_reason: String,
    /// `--folder`.
    folder: Option<PathBuf>,
}

/// What boots and what it boots in.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The image.
    pub image: Image,
    /// QEMU.
    pub qemu: QemuProgram,
    /// The device's process.
    pub device: PathBuf,
}

/// Decides everything that is decided before a machine starts; fetches and builds what is missing.
pub fn prepare(
    image: &ImageArgs,
    machine: &MachineArgs,
    guest: Guest,
    ctx: &Context,
) -> Result<Prepared, Error> {
    prepare_with(machine, guest, ctx, || programs(image, machine, ctx))
}

/// The same with programs of the caller's, which are asked for when nothing else is left that could be wrong.
pub fn prepare_with(
    machine: &MachineArgs,
    guest: Guest,
    ctx: &Context,
    programs: impl FnOnce() -> Result<Programs, Error>,
) -> Result<Prepared, Error> {
    let memory = accel::Memory::new(&ctx.cache);
    let (engine, engine_reason) = accel::choose(machine.accel, machine.deterministic, &memory)?;
    // Before anything is built: a wrong option should not cost a kernel build first.
    let mut spec = Spec::new(&ctx.repo.join("qemu-config"), machine, engine, guest).map_err(usage)?;
    let Programs { image, qemu, device } = programs()?;
    if let Some(known) = Builder::new(ctx).map_err(BuildError::into_cli)?.preempt_models(&image) {
        spec.profile.preempt = choose_preempt(machine.preempt, spec.profile.preempt, known)?;
    }
    let files = BootFiles { kernel: image.boot_kernel.clone(), initramfs: image.initramfs.clone() };
    Ok(Prepared {
        boot: Boot { spec, qemu, device, files },
        image,
        accel: machine.accel,
        engine_reason,
        folder: machine.folder.clone(),
    })
}

/// What the options name, or else what this tree builds and fetches.
pub fn programs(image: &ImageArgs, machine: &MachineArgs, ctx: &Context) -> Result<Programs, Error> {
    check_preempt(image, machine, ctx)?;
    find_programs(machine, ctx, |builder| builder.image(image)).map_err(BuildError::into_cli)
}

/// The same with the test programs of the kernel's own tree in the guest.
pub fn programs_with_selftests(
    image: &ImageArgs,
    machine: &MachineArgs,
    ctx: &Context,
) -> Result<Programs, Error> {
    check_preempt(image, machine, ctx)?;
    find_programs(machine, ctx, |builder| builder.image_with_selftests(image)).map_err(BuildError::into_cli)
}

fn find_programs(
    machine: &MachineArgs,
    ctx: &Context,
    image: impl FnOnce(&Builder) -> Result<Image, BuildError>,
) -> Result<Programs, BuildError> {
    let builder = Builder::new(ctx)?;
    let qemu = match &machine.qemu {
        Some(program) => QemuProgram { program: program.clone(), leading_args: Vec::new() },
        None => {
            let qemu = builder.qemu()?;
            QemuProgram { program: qemu.program, leading_args: qemu.leading_args }
        }
    };
    let device = machine.device.clone().map_or_else(|| builder.device(), Ok)?;
    Ok(Programs { image: image(&builder)?, qemu, device })
}

/// Refuses a preemption model that the kernel does not have, before that kernel is built.
fn check_preempt(image: &ImageArgs, machine: &MachineArgs, ctx: &Context) -> Result<(), Error> {
    let (Some(asked), None) = (machine.preempt, &image.image) else { return Ok(()) };
    let builder = Builder::new(ctx).map_err(BuildError::into_cli)?;
    let kernel = builder.kernel(&image.into()).map_err(BuildError::into_cli)?;
    choose_preempt(Some(asked), asked, &kernel.preempt).map(|_| ())
}

/// The preemption model: what was asked for, if the kernel has it; else the profile's, if the kernel has that; else the
/// kernel's own.
fn choose_preempt(asked: Option<Preempt>, profile: Preempt, known: &[Preempt]) -> Result<Preempt, Error> {
    match (asked, known.first()) {
        (Some(asked), _) if !known.contains(&asked) => {
            let known = known.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(Error::usage(format!("this kernel has no preempt={asked}; it has: {known}")))
        }
        (None, Some(&own)) if !known.contains(&profile) => Ok(own),
        _ => Ok(asked.unwrap_or(profile)),
    }
}

impl Prepared {
    /// The command lines, for `--dry-run`: exact but for the sockets' folder, which is made anew for every run.
    pub fn dry_run(&self) -> String {
        let sockets = Sockets { dir: "/tmp/hmmstorm-XXXXXX".into() };
        let folder = RunFolder::at(self.folder.clone().unwrap_or_else(|| "RUN-FOLDER".into()));
        let (device, qemu) = self.boot.command_lines(&sockets, &folder);
        device.into_iter().chain([qemu]).map(|line| format!("{line}\n")).collect()
    }

    /// The folder for the logs: `--folder`, or a new one in the cache, named after the time and `kind`.
    pub fn folder(&self, kind: &str, ctx: &Context) -> Result<RunFolder, Error> {
        let dir = self.folder.clone().unwrap_or_else(|| {
            prune(&ctx.cache.join("runs"));
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            ctx.cache.join("runs").join(format!("{seconds}-{}-{kind}", process::id()))
        });
        RunFolder::create(&dir)
            .map_err(|e| Error::harness(format!("cannot make the run folder {}: {e}", dir.display())))
    }

    /// Boots, and waits for the guest's hello. Everything seen until then, the hello included, is still to be had
    /// from [`Machine::next`]. If `--accel auto` chose KVM and no hello comes, TCG takes over, and this is remembered.
    pub fn start(&mut self, folder: RunFolder, ctx: &Context) -> Result<Machine, Error> {
        match boot_to_hello(&self.boot, folder.clone(), ctx) {
            Err(error)
                if self.accel == Accel::Auto && self.boot.spec.engine == Engine::Kvm && hopeless(&error) =>
            {
                let reason = "no guest got as far as its first process";
                ctx.note(format_args!("KVM does not work here ({error}); TCG takes over"));
                accel::Memory::new(&ctx.cache).remember(false, reason)?;
                self.boot.spec.engine = Engine::Tcg;
                self.engine_reason = reason.into();
                let folder = RunFolder::create(folder.dir())?;
                Ok(boot_to_hello(&self.boot, folder, ctx)?)
            }
            result => Ok(result?),
        }
    }
}

/// Removes the oldest default run folders but [`KEPT_RUNS`]. A failure is of no consequence.
fn prune(runs: &Path) {
    let entries = fs::read_dir(runs).into_iter().flatten().flatten();
    let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    dirs.sort(); // their names begin with the time
    for dir in dirs.iter().rev().skip(KEPT_RUNS) {
        let _ = fs::remove_dir_all(dir);
    }
}

/// Whether an error of a boot speaks against the engine.
fn hopeless(error: &vm::Error) -> bool {
    matches!(error, vm::Error::Timeout { .. } | vm::Error::Ended { .. } | vm::Error::Qmp { .. })
}

fn boot_to_hello(boot: &Boot, folder: RunFolder, ctx: &Context) -> Result<Machine, vm::Error> {
    let limits = &boot.spec.profile.limits;
    let limit = match boot.spec.engine {
        Engine::Kvm => limits.hello_kvm,
        Engine::Tcg => limits.hello,
    };
    let mut machine = Machine::boot(boot, folder, &ctx.interrupt)?;
    let mut seen = Vec::new();
    machine.wait_for("the guest's hello", Duration::from_secs(limit.into()), |occurrence| {
        seen.push(occurrence.clone());
        matches!(occurrence, Occurrence::Record(record) if matches!(record.event, Event::Hello { .. }))
            .then_some(())
    })?;
    machine.unread(seen);
    Ok(machine)
}

fn usage(error: vm::spec::Error) -> Error {
    use vm::profile::Error as Profile;
    match error {
        vm::spec::Error::Contradiction(_) | vm::spec::Error::Profile(Profile::Unknown { .. }) => {
            Error::usage(error.to_string())
        }
        vm::spec::Error::Profile(_) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preemption_models_are_those_of_the_kernel() {
        let all = [Preempt::None, Preempt::Voluntary, Preempt::Lazy, Preempt::Full];
        let since_7_0 = [Preempt::Lazy, Preempt::Full];
        let choose = |asked, known: &[Preempt]| choose_preempt(asked, Preempt::None, known);
        assert_eq!(choose(None, &all).expect("the profile's"), Preempt::None);
        assert_eq!(choose(Some(Preempt::Full), &all).expect("as asked"), Preempt::Full);
        assert_eq!(choose(None, &since_7_0).expect("the kernel's"), Preempt::Lazy);
        let error = choose(Some(Preempt::Voluntary), &since_7_0).expect_err("it has none");
        assert_eq!(error.exit_code(), 2);
        assert!(error.report().contains("preempt=voluntary; it has: lazy, full"), "{}", error.report());
    }
}
