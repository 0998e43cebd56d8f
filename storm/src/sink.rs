//! Where events go: to the host, one JSON record a line, or to a person at a terminal.

use std::fs::File;
use std::io::{self, IsTerminal, Write};

use hmmstorm_abi::wire::event::{Event, Measured, Progress, Record};

use crate::clock::monotonic_ns;

/// A place for events. Processes may share one: each event is one `write()`.
#[derive(Debug)]
pub(crate) enum Sink {
    /// The host's port.
    Port(File),
    /// Standard output, for a person.
    Terminal,
    /// Nowhere, when a person boots a guest that has no port.
    Nowhere,
}

impl Sink {
    /// Tells.
    ///
    /// # Errors
    /// Of `write`.
    pub(crate) fn emit(&self, event: Event) -> io::Result<()> {
        match self {
            Self::Port(file) => {
                let mut file = file;
                file.write_all(line(event)?.as_bytes())
            }
            Self::Terminal => {
                let mut out = io::stdout();
                let text = render(&event, out.is_terminal());
                out.write_all(text.as_bytes())?;
                out.flush()
            }
            Self::Nowhere => Ok(()),
        }
    }
}

/// The record of `event`, as of now.
fn line(event: Event) -> io::Result<String> {
    let mut line = serde_json::to_string(&Record { t: monotonic_ns(), event })?;
    line.push('\n');
    Ok(line)
}

/// `event` for a person; progress rewrites its line on a terminal.
fn render(event: &Event, terminal: bool) -> String {
    // Back to the first column, and whatever stood there away.
    let clear = if terminal { "\r\x1b[K" } else { "" };
    match event {
        Event::Start { scenario, seed, parameters, workers } => {
            let parameters: Vec<_> =
                parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!(
                "{scenario}, seed {seed}: {}\n{} workers: {}\n",
                parameters.join(" "),
                workers.len(),
                workers.join(" ")
            )
        }
        Event::Progress(progress) => {
            format!("{clear}{}{}", describe(progress), if terminal { "" } else { "\n" })
        }
        Event::Corruption { worker, page, expected, found } => {
            format!(
                "{clear}CORRUPTION: {worker} found page {page} wrong\n  expected: {expected}\n  found:    {found}\n"
            )
        }
        Event::Unserved(unserved) => format!(
            "{clear}UNSERVED: {}: {}, page {}, given up after {:.1} s, {} calls of hmm_range_fault() and {} of handle_mm_fault(); {:.1} s without anybody's completion\n",
            unserved.worker,
            unserved.call,
            unserved.page,
            unserved.waited_ns as f64 / 1e9,
            unserved.tries,
            unserved.mm_faults,
            unserved.idle_ns as f64 / 1e9
        ),
        Event::Tests { names } => format!("{clear}{} tests\n", names.len()),
        Event::Sample { series, round, name, value } => {
            format!("{clear}{series}, round {round}: {name} {value:.3}\n")
        }
        Event::Output { line } => format!("{clear}{line}\n"),
        Event::Invariant { name, detail } => format!("{clear}ACCOUNTING: {name}: {detail}\n"),
        Event::Done { progress, elapsed_ns, stats } => {
            let ms = (elapsed_ns / 1_000_000).max(1);
            let mut text = format!(
                "{clear}Done in {}.{:03} s: {} ({} faults/s)\n",
                ms / 1000,
                ms % 1000,
                describe(progress),
                progress.faults * 1000 / ms
            );
            for (gpu, stats) in stats.iter().enumerate() {
                let counts: Vec<_> = stats
                    .iter()
                    .filter(|(_, count)| **count != 0)
                    .map(|(name, count)| format!("{name} {count}"))
                    .collect();
                text += &format!("GPU {gpu} since its probe: {}\n", counts.join(", "));
            }
            text
        }
        Event::Error { message } => format!("{clear}storm: {message}\n"),
        Event::Measured(measured) => format!("{clear}{}", describe_measured(measured)),
        Event::Hello { .. } | Event::Bound { .. } | Event::Counters { .. } | Event::Bye => String::new(),
    }
}

fn describe(progress: &Progress) -> String {
    let Progress { round, operations, faults, outstanding, .. } = progress;
    format!("round {round}, {operations} operations, {faults} device faults, {outstanding} outstanding")
}

fn describe_measured(measured: &Measured) -> String {
    let Measured { latency_ns, resolved, retries, unswitched_ns, .. } = measured;
    let timed: u64 = latency_ns.iter().map(|(_, count)| count).sum();
    let longest = latency_ns.last().map_or(0, |(value, _)| *value);
    format!(
        "{timed} operations with faults, the longest of {} us; {resolved} faults, {retries} tries in vain; \
         a CPU was kept for {} us at most\n",
        longest / 1000,
        unswitched_ns / 1000
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_record_is_one_line_that_parses_back() {
        let event = Event::Error { message: "two\nlines \"quoted\"".to_owned() };
        let line = line(event.clone()).expect("encodes");
        assert_eq!(line.matches('\n').count(), 1);
        let record: Record = serde_json::from_str(&line).expect("parses");
        assert_eq!(record.event, event);
        assert!(record.t > 0);
    }

    #[test]
    fn people_get_words() {
        let progress = Progress { round: 3, operations: 2000, faults: 1500, ..Progress::default() };
        let text = render(&Event::Progress(progress.clone()), true);
        assert!(text.ends_with("round 3, 2000 operations, 1500 device faults, 0 outstanding"), "{text:?}");
        let stats = vec![BTreeMap::from([("vram_free".to_owned(), 7), ("fences_failed".to_owned(), 0)])];
        let text = render(&Event::Done { progress, elapsed_ns: 1_500_000_000, stats }, false);
        assert!(text.contains("Done in 1.500 s") && text.contains("1000 faults/s"), "{text}");
        assert!(text.contains("GPU 0 since its probe: vram_free 7\n"), "{text}");
    }
}
