//! Every verdict, and the near misses that must not get it.

mod ended;
mod stuck;
mod unserved;

use std::collections::BTreeMap;

use hmmstorm_abi::wire::control::GpuStats;
use hmmstorm_abi::wire::event::{Event, Record};

use super::*;
use crate::judge::console::{Scanner, Task};
use crate::judge::sampler::CpuSummary;

const S: u64 = 1_000_000_000;

fn limits() -> Limits {
    Limits { detectors: Duration::from_secs(14), ..Limits::new(Duration::from_secs(5), 1.0) }
}

/// A run whose guest and host clocks go alike.
struct Run {
    judge: Judge,
    now: f64,
    stats: GpuStats,
    progress: Progress,
    console: Scanner,
}

impl Run {
    fn new(limits: Limits) -> Self {
        let mut run = Self {
            judge: Judge::new(limits),
            now: 0.0,
            stats: GpuStats::default(),
            progress: Progress {
                outstanding: 4,
                workers: vec![0; 4],
                pids: vec![1, 53, 54, 55],
                ..Progress::default()
            },
            console: Scanner::new(),
        };
        run.at(1.0).storm(Event::Hello { version: "1".into(), kernel: "6.19.6".into(), cpus: 4 });
        run.at(1.5).storm(Event::Bound { gpus: 2, modules: BTreeMap::new() });
        let workers = ["migrator", "faulter-0", "faulter-1", "faulter-2"].map(str::to_owned).to_vec();
        run.at(2.0).storm(Event::Start {
            scenario: "drain-livelock".into(),
            seed: 1,
            parameters: BTreeMap::new(),
            workers,
        });
        run
    }

    fn at(&mut self, seconds: f64) -> &mut Self {
        self.now = seconds;
        self
    }

    fn host(&self) -> Duration {
        Duration::from_secs_f64(self.now)
    }

    fn observe(&mut self, observation: Observation) -> &mut Self {
        self.judge.observe(self.host(), observation);
        self
    }

    fn storm(&mut self, event: Event) -> &mut Self {
        let t = self.host().as_nanos() as u64;
        self.observe(Observation::Storm(Record { t, event }))
    }

    fn beat(&mut self) -> &mut Self {
        let progress = self.progress.clone();
        self.storm(Event::Progress(progress))
    }

    fn work(&mut self, operations: u64) -> &mut Self {
        self.progress.operations += operations;
        self.progress.faults += operations / 2;
        self.progress.workers[1] += operations;
        self.beat()
    }

    fn device(&mut self, completions: u64, queued: u64) -> &mut Self {
        self.stats.completions += completions;
        self.stats.queued = queued;
        let stats = self.stats;
        self.observe(Observation::Device(vec![stats, GpuStats::default()]))
    }

    fn console(&mut self, lines: &[&str]) -> &mut Self {
        for line in lines {
            self.console.feed(format!("[{:12.6}] {line}\n", self.now).as_bytes());
        }
        let findings = self.console.findings();
        self.observe(Observation::Console(findings))
    }

    fn soft_lockup(&mut self, cpu: u32, pid: u32, comm: &str, function: &str) -> &mut Self {
        let lines = [
            format!("watchdog: BUG: soft lockup - CPU#{cpu} stuck for 13s! [{comm}:{pid}]"),
            format!(
                "CPU: {cpu} UID: 0 PID: {pid} Comm: {comm} Tainted: G           O        6.19.6 #1 PREEMPT(none) "
            ),
            "RIP: 0010:do_swap_page+0x1/0x2".to_owned(),
            "Call Trace:".to_owned(),
            " <TASK>".to_owned(),
            format!(" {function}+0x1/0x2"),
            " </TASK>".to_owned(),
        ];
        self.console(&lines.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn hung_task(&mut self) -> &mut Self {
        self.console(&[
            "INFO: task migrator:1 blocked for more than 6 seconds.",
            "task:migrator        state:D stack:0     pid:1     tgid:1     ppid:0      task_flags:0x400100 flags:0x00080000",
            "Call Trace:",
            " <TASK>",
            " __flush_work+0x1/0x2",
            " __lru_add_drain_all+0x1/0x2",
            " migrate_device_unmap+0x1/0x2",
            " </TASK>",
        ])
    }

    fn workqueue_lockup(&mut self, cpu: u32) -> &mut Self {
        self.console(&[&format!(
            "BUG: workqueue lockup - pool cpus={cpu} node=0 flags=0x0 nice=0 stuck for 7s!"
        )])
    }

    fn samples(&mut self, cpus: &[CpuSummary]) -> &mut Self {
        self.observe(Observation::Samples(cpus.to_vec()))
    }

    fn ended(&mut self, ended: Ended) -> &mut Self {
        self.observe(Observation::Ended(ended))
    }

    fn done(&mut self) -> &mut Self {
        let progress = self.progress.clone();
        self.storm(Event::Done { progress, elapsed_ns: 8 * S, stats: Vec::new() }).storm(Event::Bye)
    }

    fn decide(&self) -> Option<Judgement> {
        self.judge.decide(self.host())
    }

    fn verdict(&self) -> Option<Verdict> {
        self.decide().map(|judgement| judgement.verdict)
    }

    /// The livelock's first seven seconds: progress until 3 s, then heartbeats alone.
    fn stall(&mut self) -> &mut Self {
        self.at(2.5).work(10).device(20, 0);
        self.at(3.0).work(10).device(20, 0);
        for half in 7..=20 {
            self.at(f64::from(half) / 2.0).beat().device(0, 0);
        }
        self
    }
}

fn spinning(cpu: u32) -> CpuSummary {
    let trunk = ["walk_page_range", "hmm_range_fault", "hsgpu_access", "__x64_sys_ioctl", "do_syscall_64"];
    CpuSummary {
        cpu,
        samples: 50,
        judged: 50,
        kernel: 50,
        trunk: trunk.map(str::to_owned).to_vec(),
        in_tree: 50,
        windows: 10,
        distinct_ips: 40,
        spins: true,
        ..CpuSummary::default()
    }
}

fn idle(cpu: u32) -> CpuSummary {
    CpuSummary {
        cpu,
        samples: 50,
        halted: 50,
        distinct_ips: 1,
        windows: 0,
        idle: true,
        ..CpuSummary::default()
    }
}

fn busy(cpu: u32) -> CpuSummary {
    CpuSummary { cpu, samples: 50, kernel: 25, user: 25, distinct_ips: 50, ..CpuSummary::default() }
}

fn livelocked_cpus() -> Vec<CpuSummary> {
    vec![idle(0), spinning(1), spinning(2), spinning(3)]
}
