//! What `replay` and `minimise` share: from a capsule to a runner that makes its run here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::prepare::Programs;
use super::storm::runner::{Bench, Configured, Runner, Wish, configure};
use crate::build::patches::{Origin, UserPatch};
use crate::build::{BuildError, Builder, Image, Request};
use crate::capsule::{Capsule, PatchText};
use crate::cli::{Accel, Context, Error, MachineArgs, Preempt};
use crate::judge::scenario::Scenario;
use crate::judge::verdict::Verdict;
use crate::vm::command::QemuProgram;

/// Options that say where to take the parts from.
#[derive(Debug, clap::Args)]
pub struct Parts {
    /// Kernel source tree of your own, for a capsule whose kernel is not in the list
    #[arg(long, value_name = "DIR", id = "tree")]
    tree: Option<PathBuf>,
    /// QEMU of your own: 10.1 or later, with vfio-user-pci
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
    /// GPU process of your own, in place of this tree's hmmstorm-device
    #[arg(long, value_name = "PROGRAM", env = "HMMSTORM_DEVICE")]
    device: Option<PathBuf>,
}

/// A run to make again, possibly with other numbers.
#[derive(Clone, Debug)]
pub(super) struct Again {
    /// Scenario parameters to set.
    pub(super) parameters: Vec<(String, String)>,
    /// CPUs.
    pub(super) cpus: u32,
    /// In deterministic mode.
    pub(super) deterministic: bool,
}

/// A capsule with everything that it takes to run it here.
#[derive(Debug)]
pub(super) struct Reproduction<'a> {
    capsule: &'a Capsule,
    programs: Programs,
    bench: Arc<Bench>,
    ctx: &'a Context,
}

impl<'a> Reproduction<'a> {
    /// Builds the capsule's kernel, with its own patches.
    pub(super) fn new(capsule: &'a Capsule, parts: &Parts, ctx: &'a Context) -> Result<Self, Error> {
        let programs = programs(capsule, parts, ctx).map_err(BuildError::into_cli)?;
        let configured = configured(capsule, &capsule_as_it_is(capsule), programs.clone(), ctx)?;
        let bench = Arc::new(Bench::new(&configured.prepared, ctx)?);
        Ok(Self { capsule, programs, bench, ctx })
    }

    /// A runner of the run as it is in the capsule, or with other numbers.
    pub(super) fn runner(&self, again: &Again) -> Result<Runner<'a>, Error> {
        let configured = configured(self.capsule, again, self.programs.clone(), self.ctx)?;
        let expected = vec![self.capsule.record.judgement.verdict];
        Ok(Runner::new(configured, expected, self.bench.clone(), self.ctx))
    }
}

/// The numbers of the capsule itself.
pub(super) fn capsule_as_it_is(capsule: &Capsule) -> Again {
    Again {
        parameters: capsule.parameters(),
        cpus: capsule.record.run.cpus,
        deterministic: capsule.record.run.mode == "deterministic",
    }
}

fn programs(capsule: &Capsule, parts: &Parts, ctx: &Context) -> Result<Programs, BuildError> {
    let builder = Builder::new(ctx)?;
    let image = &capsule.record.provenance.image;
    let text = |name: &str| image[name].as_str().unwrap_or_default();
    let source = text("kernel_source_sha256");
    let kernel = builder.pins().kernels.kernel.iter().find(|kernel| kernel.sha256 == source);
    if kernel.is_none() && parts.tree.is_none() {
        return Err(BuildError::Usage(format!(
            "the capsule's kernel {} (source {source:.12}...) is none of `hmmstorm list kernels`: give its source with --tree",
            text("kernel_version")
        )));
    }
    let under_test: Vec<&PatchText> =
        capsule.patches.iter().filter(|patch| patch.patch.origin != Some(Origin::Abstraction)).collect();
    let sums: Vec<&str> = under_test.iter().map(|patch| patch.patch.sha256.as_str()).collect();
    let known = builder.variant_patches(&capsule.record.run.variant, text("kernel_version"));
    let scratch = tempfile::tempdir().map_err(|source| BuildError::Io {
        action: "create",
        path: std::env::temp_dir(),
        source,
    })?;
    let mut request = Request {
        kernel: kernel.map(|kernel| kernel.name.clone()),
        tree: parts.tree.clone(),
        flavour: Some(text("flavour").to_owned()).filter(|name| !name.is_empty()),
        // Its files have other names here.
        name: Some(capsule.record.run.variant.clone()),
        ..Request::default()
    };
    if known.is_some_and(|known| known == sums) {
        request.variant = Some(capsule.record.run.variant.clone());
    } else {
        request.patches = unpack(&under_test, scratch.path())?;
    }
    let qemu = match &parts.qemu {
        Some(program) => QemuProgram { program: program.clone(), leading_args: Vec::new() },
        None => {
            let qemu = builder.qemu()?;
            QemuProgram { program: qemu.program, leading_args: qemu.leading_args }
        }
    };
    let device = parts.device.clone().map_or_else(|| builder.device(), Ok)?;
    Ok(Programs { image: Image::load(&builder.prepare(&request)?)?, qemu, device })
}

/// Writes the capsule's own patches to files, as if the user had given them.
fn unpack(patches: &[&PatchText], folder: &Path) -> Result<Vec<UserPatch>, BuildError> {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
    let mut files = Vec::new();
    for (number, PatchText { patch, text }) in patches.iter().enumerate() {
        let name: String = patch.name.chars().map(plain).collect();
        let path = folder.join(format!("{number:04}-{name}"));
        let failed = |source| BuildError::Io { action: "write", path: path.clone(), source };
        std::fs::write(&path, text.bytes().map_err(failed)?).map_err(failed)?;
        files.push(UserPatch::Patch(path));
    }
    Ok(files)
}

fn configured(
    capsule: &Capsule,
    again: &Again,
    programs: Programs,
    ctx: &Context,
) -> Result<Configured, Error> {
    let run = &capsule.record.run;
    let bad = |what: &str, value: &str| {
        Error::usage(format!("the capsule has a {what} that this hmmstorm does not know: '{value}'"))
    };
    let size = |what: &str, text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| bad(what, text)),
    };
    let preempt = <Preempt as clap::ValueEnum>::from_str(&run.preempt, true);
    // Words that the scenario adds are added again.
    let scenario = Scenario::load(&ctx.repo.join("storm/scenarios"), &run.scenario)
        .map_err(|error| Error::usage(error.to_string()))?;
    let own = scenario.command_line();
    let append = run.append.strip_prefix(own).unwrap_or(&run.append).to_vec();
    let machine = MachineArgs {
        profile: Some(run.profile.clone()),
        accel: if again.deterministic { Accel::Auto } else { accel(&run.engine) },
        cpus: Some(again.cpus),
        memory: size("memory size", &run.memory)?,
        gpus: Some(run.gpus),
        vram: size("VRAM size", &run.vram)?,
        preempt: Some(preempt.map_err(|_| bad("preemption model", &run.preempt))?),
        deterministic: again.deterministic,
        append,
        chaos: run.chaos.clone(),
        ..MachineArgs::default()
    };
    // What the control set is among the parameters, and its preemption model in the machine.
    let wish = Wish { scenario: &run.scenario, control: None, parameters: &again.parameters, seed: run.seed };
    configure(wish, &machine, ctx, || Ok(programs))
}

fn accel(engine: &str) -> Accel {
    match engine {
        "tcg" => Accel::Tcg,
        _ => Accel::Auto,
    }
}

/// Whether a verdict is one that a capsule is made for.
pub(super) fn is_finding(verdict: Verdict) -> bool {
    !matches!(verdict, Verdict::Pass | Verdict::HarnessError)
}
