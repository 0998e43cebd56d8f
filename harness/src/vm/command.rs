//! The exact command lines of device and QEMU: pure functions of what is to be run and where.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use hmmstorm_abi::wire::event::PORT_NAME;
use serde_json::json;

use super::{Clock, Console, Engine, RunFolder, Spec};

/// PCI slot of GPU 0; GPU n is n slots further. Fixed, so that a GPU has the same name in every run.
const FIRST_GPU_SLOT: u32 = 0x10;

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// What is executed.
    pub program: PathBuf,
    /// Its arguments, without the program.
    pub args: Vec<OsString>,
}

impl CommandLine {
    fn arg(&mut self, arg: impl Into<OsString>) {
        self.args.push(arg.into());
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) {
        self.arg(option);
        self.arg(value);
    }
}

/// Quoted for a POSIX shell, one option a line.
impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quote(self.program.as_os_str()))?;
        for arg in &self.args {
            let dash = arg.to_string_lossy().starts_with('-');
            f.write_str(if dash { " \\\n    " } else { " " })?;
            f.write_str(&quote(arg))?;
        }
        Ok(())
    }
}

fn quote(arg: &OsStr) -> String {
    let text = arg.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// How to start QEMU, apart from the machine: the program and what must come before all else (a private loader,
/// firmware folders).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuProgram {
    /// What is executed.
    pub program: PathBuf,
    /// Its first arguments.
    pub leading_args: Vec<OsString>,
}

/// What the guest boots from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// A PVH vmlinux or a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// Unix sockets of one machine, in a folder of its own with a short name: a socket's path has 107 bytes at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// The folder.
    pub dir: PathBuf,
}

impl Sockets {
    /// QMP; the harness listens.
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The interactive console; the harness listens.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// QEMU's gdb stub; QEMU listens.
    pub fn gdb(&self) -> PathBuf {
        self.dir.join("gdb.sock")
    }

    /// A GPU; the device listens.
    pub fn gpu(&self, index: u32) -> PathBuf {
        self.dir.join(format!("gpu{index}.sock"))
    }

    /// The device's control socket; the device listens.
    pub fn control(&self) -> PathBuf {
        self.dir.join("control.sock")
    }
}

/// The device's command line.
pub fn device(spec: &Spec, program: &Path, sockets: &Sockets) -> CommandLine {
    let mut line = CommandLine { program: program.into(), args: Vec::new() };
    line.pair("--gpus", spec.profile.gpus.to_string());
    line.pair("--socket-dir", &sockets.dir);
    line.pair("--vram", spec.profile.vram.to_string());
    line.pair("--mode", if spec.deterministic() { "synchronous" } else { "threaded" });
    if let Some(plan) = &spec.chaos {
        line.pair("--chaos", plan);
    }
    line.arg("--exit-with-stdin");
    line
}

/// QEMU's command line.
pub fn qemu(
    spec: &Spec,
    qemu: &QemuProgram,
    boot: &BootFiles,
    sockets: &Sockets,
    folder: &RunFolder,
) -> CommandLine {
    let mut line = CommandLine { program: qemu.program.clone(), args: qemu.leading_args.clone() };
    line.pair("-name", "hmmstorm,debug-threads=on");
    line.arg("-no-user-config");
    line.arg("-nodefaults");
    line.pair("-display", "none");
    // A reset ends QEMU, as a panic does through panic=-1: there is nothing to gain from a second boot.
    line.arg("-no-reboot");
    // pvpanic only reports: the kernel has more to print after it has rung.
    line.pair("-action", "panic=none");

    // KVM's own interrupt controller knows nothing of interrupt remapping.
    let split = spec.vfio && spec.engine == Engine::Kvm;
    line.pair(
        "-machine",
        if split { "q35,memory-backend=m0,kernel-irqchip=split" } else { "q35,memory-backend=m0" },
    );
    // The device maps guest memory, hence a memfd that both sides share.
    line.pair("-object", format!("memory-backend-memfd,id=m0,size={},share=on", spec.profile.memory));
    line.pair("-smp", spec.profile.cpus.to_string());
    match (spec.engine, &spec.clock) {
        (Engine::Kvm, _) => {
            line.pair("-accel", "kvm");
            line.pair("-cpu", "host");
        }
        (Engine::Tcg, Clock::Real) => line.pair("-accel", "tcg,thread=multi"),
        (Engine::Tcg, Clock::Counted(clock)) => {
            line.pair("-accel", "tcg,thread=single");
            line.pair("-icount", format!("shift={},sleep=off", clock.shift));
            line.pair("-seed", clock.seed.to_string());
            line.pair("-rtc", format!("base={},clock=vm", clock.rtc));
        }
    }

    if spec.vfio {
        // Before every device that stands behind it. Caching mode tells vfio-user of every mapping.
        line.pair("-device", "intel-iommu,intremap=on,caching-mode=on");
    }
    line.pair("-kernel", &boot.kernel);
    line.pair("-initrd", &boot.initramfs);
    line.pair("-append", spec.kernel_command_line());

    match spec.console {
        Console::Log => line.pair("-chardev", file_chardev("console", &folder.console())),
        Console::Interactive => line.pair(
            "-chardev",
            join(
                &["socket,id=console,server=off,path=", ",logfile="],
                &[&sockets.console(), &folder.console()],
            ),
        ),
    }
    line.pair("-serial", "chardev:console");
    // Without an eventfd QEMU serves the guest's notification at the instant of the write, and not when the host's
    // scheduler lets it: deterministic runs depend on it.
    line.pair("-device", "virtio-serial-pci,addr=4,ioeventfd=off");
    line.pair("-chardev", file_chardev("events", &folder.events()));
    line.pair("-device", format!("virtserialport,chardev=events,name={PORT_NAME}"));
    line.pair("-device", "pvpanic-pci,addr=5");
    line.pair("-chardev", join(&["socket,id=qmp,server=off,path="], &[&sockets.qmp()]));
    line.pair("-qmp", "chardev:qmp");
    if spec.gdb {
        line.pair("-chardev", join(&["socket,id=gdb,server=on,wait=off,path="], &[&sockets.gdb()]));
        line.pair("-gdb", "chardev:gdb");
    }
    // A deterministic machine starts when its surroundings stand still.
    if spec.gdb || spec.deterministic() {
        line.arg("-S");
    }
    for index in 0..spec.profile.gpus {
        line.pair("-device", gpu(index, spec.deterministic(), sockets));
    }
    line
}

/// Only the JSON form of `-device` takes a socket address.
fn gpu(index: u32, deterministic: bool, sockets: &Sockets) -> String {
    let mut device = json!({
        "driver": "vfio-user-pci",
        "id": format!("gpu{index}"),
        "bus": "pcie.0",
        "addr": format!("{:x}.0", FIRST_GPU_SLOT + index),
        "socket": { "type": "unix", "path": sockets.gpu(index).to_string_lossy() },
    });
    if deterministic {
        // The guest goes on only when the device has answered.
        device["x-no-posted-writes"] = true.into();
    }
    device.to_string()
}

fn file_chardev(id: &str, path: &Path) -> OsString {
    join(&[&format!("file,id={id},path=")], &[path])
}

/// `texts` and `paths` in turn. A comma in a value of a QEMU option is written twice.
fn join(texts: &[&str], paths: &[&Path]) -> OsString {
    let mut option = OsString::new();
    for (text, path) in texts.iter().zip(paths) {
        option.push(text);
        option.push(path.to_string_lossy().replace(',', ",,"));
    }
    option
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cli::{MachineArgs, Preempt};
    use crate::vm::{Guest, Size, profile};

    fn spec(args: &MachineArgs, engine: Engine) -> Spec {
        let guest = Guest::Run {
            scenario: "drain-livelock".into(),
            seed: 7,
            parameters: BTreeMap::from([("rounds".into(), "9".into())]),
        };
        Spec::new(&profile::tests::shipped(), args, engine, guest).expect("specification")
    }

    fn words(spec: &Spec) -> Vec<String> {
        let program =
            QemuProgram { program: "/q/qemu".into(), leading_args: vec!["-L".into(), "/q/share".into()] };
        let boot = BootFiles { kernel: "/i/vmlinux".into(), initramfs: "/i/initramfs".into() };
        let sockets = Sockets { dir: "/s".into() };
        let folder = RunFolder::at("/runs/a,b");
        let line = qemu(spec, &program, &boot, &sockets, &folder);
        assert_eq!(line.program, Path::new("/q/qemu"));
        line.args.iter().map(|a| a.to_str().expect("UTF-8").to_owned()).collect()
    }

    fn values<'a>(words: &'a [String], option: &str) -> Vec<&'a str> {
        words.windows(2).filter(|w| w[0] == option).map(|w| w[1].as_str()).collect()
    }

    #[test]
    fn real_time() {
        let words = words(&spec(&MachineArgs::default(), Engine::Tcg));
        assert_eq!(&words[..2], ["-L", "/q/share"]);
        assert_eq!(values(&words, "-accel"), ["tcg,thread=multi"]);
        assert!(values(&words, "-icount").is_empty());
        assert_eq!(values(&words, "-object"), ["memory-backend-memfd,id=m0,size=1G,share=on"]);
        assert!(values(&words, "-chardev").contains(&"file,id=console,path=/runs/a,,b/console.log"));
        let gpus: Vec<serde_json::Value> = values(&words, "-device")
            .iter()
            .filter(|d| d.starts_with('{'))
            .map(|d| serde_json::from_str(d).expect("JSON"))
            .collect();
        assert_eq!(gpus.len(), 2);
        assert_eq!(gpus[1]["socket"]["path"], "/s/gpu1.sock");
        assert_eq!(gpus[1]["addr"], "11.0");
        assert!(gpus[1].get("x-no-posted-writes").is_none());
        let append = values(&words, "-append")[0].to_owned();
        for part in [
            "console=ttyS0",
            "preempt=none",
            "softlockup_panic=0",
            "storm.mode=run",
            "storm.scenario=drain-livelock",
            "storm.seed=7",
            "storm.p.rounds=9",
            "storm.gpus=2",
            "storm.modules=hsgpu",
        ] {
            assert!(append.split(' ').any(|p| p == part), "{part} in {append}");
        }
    }

    #[test]
    fn deterministic() {
        let args =
            MachineArgs { deterministic: true, preempt: Some(Preempt::Lazy), ..MachineArgs::default() };
        let spec = spec(&args, Engine::Tcg);
        let words = words(&spec);
        assert_eq!(values(&words, "-accel"), ["tcg,thread=single"]);
        assert_eq!(values(&words, "-icount"), ["shift=7,sleep=off"]);
        assert_eq!(values(&words, "-seed"), ["42"]);
        assert_eq!(values(&words, "-rtc"), ["base=2026-01-01,clock=vm"]);
        assert!(
            values(&words, "-device").iter().filter(|d| d.contains("\"x-no-posted-writes\":true")).count()
                == 2
        );
        assert!(values(&words, "-append")[0].contains("preempt=lazy"));
        assert!(values(&words, "-append")[0].contains("softlockup_panic=1"));
        assert!(values(&words, "-append")[0].contains("watchdog_thresh=10"));
        // It starts once QEMU's RCU thread is held.
        assert!(words.iter().any(|word| word == "-S"));
        let line = device(&spec, Path::new("/d"), &Sockets { dir: "/s".into() });
        assert_eq!(
            line.to_string().replace(" \\\n    ", " "),
            "/d --gpus 2 --socket-dir /s --vram 256M --mode synchronous --exit-with-stdin"
        );
    }

    #[test]
    fn kvm_and_no_gpus() {
        let args = MachineArgs { gpus: Some(0), memory: Some(Size::mib(512)), ..MachineArgs::default() };
        let words = words(&spec(&args, Engine::Kvm));
        assert_eq!(values(&words, "-accel"), ["kvm"]);
        assert_eq!(values(&words, "-cpu"), ["host"]);
        assert!(!values(&words, "-device").iter().any(|d| d.contains("vfio-user-pci")));
        assert!(!values(&words, "-append")[0].contains("storm.modules"));
    }

    #[test]
    fn gpus_for_vfio_stand_behind_an_iommu() {
        let mut spec = spec(&MachineArgs::default(), Engine::Tcg);
        spec.give_gpus_to_vfio();
        let words = words(&spec);
        let devices = values(&words, "-device");
        assert!(devices[0].starts_with("intel-iommu"), "{devices:?}");
        assert_eq!(devices.iter().filter(|d| d.contains("vfio-user-pci")).count(), 2);
        let append = values(&words, "-append")[0];
        for part in ["storm.gpus=0", "intel_iommu=on"] {
            assert!(append.split(' ').any(|p| p == part), "{part} in {append}");
        }
        assert!(append.contains("vfio-pci") && !append.contains("hsgpu"), "{append}");
    }

    #[test]
    fn gdb_waits_and_mutes_the_detectors() {
        let mut spec = spec(&MachineArgs::default(), Engine::Tcg);
        spec.gdb = true;
        let words = words(&spec);
        assert_eq!(values(&words, "-gdb"), ["chardev:gdb"]);
        assert!(words.iter().any(|w| w == "-S"));
        assert!(values(&words, "-append")[0].contains("nowatchdog"));
        assert!(!values(&words, "-append")[0].contains("softlockup_panic"));
    }

    #[test]
    fn contradictions_are_refused() {
        let guest = Guest::Shell;
        let dir = profile::tests::shipped();
        let args = MachineArgs { deterministic: true, ..MachineArgs::default() };
        assert!(Spec::new(&dir, &args, Engine::Kvm, guest.clone()).is_err());
        let args = MachineArgs { gpus: Some(0), chaos: Some("dead=true".into()), ..MachineArgs::default() };
        assert!(Spec::new(&dir, &args, Engine::Tcg, guest).is_err());
    }

    #[test]
    fn quoting_survives_a_shell() {
        let nasty = ["plain", "", "two words", "it's", "$(x)", "{\"a\":1}", "a\\b", "*"];
        let line = CommandLine { program: "printf".into(), args: Vec::new() };
        let mut line = CommandLine { args: vec!["%s\\n".into()], ..line };
        line.args.extend(nasty.map(OsString::from));
        let out = std::process::Command::new("sh").arg("-c").arg(line.to_string()).output().expect("sh");
        let lines: Vec<_> = String::from_utf8_lossy(&out.stdout).lines().map(String::from).collect();
        assert_eq!(lines, nasty);
    }
}
