//! The cycle as a picture: one box for each thing that waits or is waited for, an arrow for each wait.

use svg::Document;
use svg::node::element::{Definitions, Group, Marker, Path, Rectangle, Style, Text};

use super::{By, Closing, Link, Structures};

const WIDTH: usize = 560;
const BOX: usize = 440;
const LINE: usize = 20;
const PADDING: usize = 14;
const GAP: usize = 46;
const MARGIN: usize = 24;

const LOOK: &str = "
  svg { font: 14px system-ui, sans-serif; color-scheme: light dark; }
  rect { fill: #f4f6fa; stroke: #55617a; rx: 8px; }
  rect.spins { fill: #fdeeee; stroke: #b3261e; }
  text { fill: #1b1f29; } text.label { fill: #55617a; font-size: 12px; } text.head { font-weight: 600; }
  path.wait { fill: none; stroke: #55617a; stroke-width: 1.5; } path.back { stroke: #b3261e; }
  marker path { fill: #55617a; }
  @media (prefers-color-scheme: dark) {
    rect { fill: #232936; stroke: #93a0bb; } rect.spins { fill: #43232a; stroke: #f2857d; }
    text { fill: #e7eaf2; } text.label { fill: #a9b4ca; }
    path.wait { stroke: #93a0bb; } path.back { stroke: #f2857d; } marker path { fill: #93a0bb; }
  }";

struct Station {
    head: String,
    lines: Vec<String>,
    /// What leads on from here.
    leads: &'static str,
    spins: bool,
}

/// The picture, or nothing if the cycle does not close.
#[must_use]
pub fn svg(structures: &Structures) -> Option<String> {
    let stations = stations(structures)?;
    let mut top = MARGIN;
    let left = MARGIN;
    let mut body = Group::new();
    let mut first = 0;
    for (index, station) in stations.iter().enumerate() {
        let height = 2 * PADDING + LINE * (1 + station.lines.len());
        let mut rect = Rectangle::new().set("x", left).set("y", top).set("width", BOX).set("height", height);
        if station.spins {
            rect = rect.set("class", "spins");
        }
        body = body.add(rect);
        let baseline = |line: usize| top + PADDING + LINE * line + 14;
        body = body.add(text(&station.head, left + PADDING, baseline(0), "head"));
        for (line, says) in station.lines.iter().enumerate() {
            body = body.add(text(says, left + PADDING, baseline(line + 1), "line"));
        }
        let middle = top + height / 2;
        if index == 0 {
            first = middle;
        }
        top += height;
        if index + 1 < stations.len() {
            let x = left + BOX / 2;
            let arrow = format!("M{x} {top} V{}", top + GAP - 2);
            body = body.add(Path::new().set("class", "wait").set("d", arrow).set("marker-end", "url(#head)"));
            body = body.add(text(station.leads, x + 12, top + GAP / 2 + 4, "label"));
            top += GAP;
        } else {
            let (right, out) = (left + BOX, WIDTH - MARGIN);
            let arrow = format!("M{right} {middle} H{out} V{first} H{}", right + 3);
            let back = Path::new().set("class", "wait back").set("d", arrow).set("marker-end", "url(#head)");
            body = body.add(back);
            body = body.add(text(station.leads, right + 8, middle + 18, "label"));
        }
    }
    let marker = Marker::new()
        .set("id", "head")
        .set("viewBox", "0 0 10 10")
        .set("refX", 9)
        .set("refY", 5)
        .set("markerWidth", 8)
        .set("markerHeight", 8)
        .set("orient", "auto")
        .add(Path::new().set("d", "M0 0 L10 5 L0 10 z"));
    let document = Document::new()
        .set("viewBox", (0, 0, WIDTH + MARGIN, top + MARGIN))
        .set("role", "img")
        .set("aria-label", "who waits for whom")
        .add(Style::new(LOOK))
        .add(Definitions::new().add(marker))
        .add(body);
    Some(document.to_string())
}

fn text(says: &str, x: usize, y: usize, class: &str) -> Text {
    Text::new(says).set("x", x).set("y", y).set("class", class)
}

fn stations(structures: &Structures) -> Option<Vec<Station>> {
    let Closing { holder, held, link, spinner } = structures.closing()?;
    let others = structures
        .reading
        .spinners
        .iter()
        .filter(|other| other.cpu != spinner.cpu && other.pfn == spinner.pfn)
        .map(|other| format!("as does {} on CPU {}", other.task, other.cpu));
    let function = spinner.function.as_deref().unwrap_or("the kernel");
    let mut stations = vec![
        Station {
            head: format!("{} spins on CPU {}", spinner.task, spinner.cpu),
            lines: std::iter::once(format!("{function}() at {:#x}", spinner.address)).chain(others).collect(),
            leads: "wants",
            spins: true,
        },
        Station {
            head: format!("folio of pfn {:#x}, locked", held.pfn),
            lines: vec![spinner.memory.clone().unwrap_or_else(|| "ordinary memory".into())],
            leads: "is locked by",
            spins: false,
        },
        Station {
            head: match link {
                Link::Work(_) => format!("{} sleeps", holder.task),
                Link::Cpu(_) => format!("{} is ready to run", holder.task),
            },
            lines: vec![
                format!("{}()", holder.function),
                match &held.by {
                    By::Index(index) => format!("has the folio as src[{index}] of its migration"),
                    By::Frame(function) => format!("has the folio in its frame of {function}()"),
                },
            ],
            leads: match link {
                Link::Work(_) => "waits for",
                Link::Cpu(_) => "is on the run queue of",
            },
            spins: false,
        },
    ];
    let (cpu, ready) = match link {
        Link::Work(wait) => {
            let queue = wait.workqueue.as_ref().map_or(String::new(), |queue| format!(", workqueue {queue}"));
            stations.push(Station {
                head: format!("work item {}", wait.function),
                lines: vec![if wait.begun {
                    format!("begun on the pool of CPU {}, not done", wait.cpu)
                } else {
                    format!("queued on the pool of CPU {}{queue}", wait.cpu)
                }],
                leads: "needs",
                spins: false,
            });
            (wait.cpu, wait.worker.as_ref())
        }
        Link::Cpu(ready) => (ready.cpu, None),
    };
    stations.push(Station {
        head: format!("CPU {cpu}"),
        lines: ready.map(|worker| format!("{worker} is ready to run")).into_iter().collect(),
        leads: "is taken by",
        spins: false,
    });
    Some(stations)
}

#[cfg(test)]
mod tests {
    use super::super::cycle::tests::{reading, starved};
    use super::*;

    #[test]
    fn a_closed_cycle_is_drawn_with_every_link() {
        let picture = svg(&Structures::of(reading())).expect("a picture");
        for part in
            ["faulter (pid 60)", "0xfcf0003", "migrator (pid 57)", "lru_add_drain_per_cpu", "kworker/2:2"]
        {
            assert!(picture.contains(part), "{part} in {picture}");
        }
    }

    #[test]
    fn a_starved_holder_is_drawn_on_the_run_queue() {
        let picture = svg(&Structures::of(starved())).expect("a picture");
        for part in ["migrator (pid 57) is ready to run", "is on the run queue of", "frame of hold()"] {
            assert!(picture.contains(part), "{part} in {picture}");
        }
        assert!(!picture.contains("work item"), "{picture}");
    }

    #[test]
    fn an_open_one_is_not() {
        let mut open = reading();
        open.holders.clear();
        assert_eq!(svg(&Structures::of(open)), None);
    }
}
