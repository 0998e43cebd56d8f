//! The kernel's workqueue dump (`show_all_workqueues()`), line by line.

use super::finding::{WorkItem, WorkState};

/// The dump's context from one line to the next.
#[derive(Clone, Debug, Default)]
pub(super) struct Dump {
    workqueue: Option<String>,
    cpus: Vec<u32>,
}

impl Dump {
    /// Reads one line of the dump into `items`; false if the line is none.
    pub(super) fn line(&mut self, number: u64, message: &str, items: &mut Vec<WorkItem>) -> bool {
        if let Some(rest) = message.strip_prefix("workqueue ") {
            let Some((name, _)) = rest.split_once(": flags=") else { return false };
            self.workqueue = Some(name.to_owned());
            self.cpus.clear();
            return true;
        }
        if let Some(rest) = message.strip_prefix("  pwq ") {
            self.cpus = pool_cpus(rest);
            return true;
        }
        if message.starts_with("pool ") {
            return true;
        }
        let states = [
            ("    in-flight:", WorkState::InFlight),
            ("    pending:", WorkState::Pending),
            ("    inactive:", WorkState::Inactive),
        ];
        for (prefix, state) in states {
            if let (Some(rest), Some(workqueue)) = (message.strip_prefix(prefix), &self.workqueue) {
                items.extend(parse_items(workqueue, &self.cpus, state, rest, number));
                return true;
            }
        }
        false
    }
}

fn pool_cpus(text: &str) -> Vec<u32> {
    text.split(' ').find_map(|word| word.strip_prefix("cpus=")).map(cpu_list).unwrap_or_default()
}

/// Parses a CPU list of the kernel (`0,2-3`); what does not parse is left out.
pub(super) fn cpu_list(text: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            // No machine of ours has more, and a garbled line must not ask for memory.
            cpus.extend(first..=last.min(first.saturating_add(4095)));
        }
    }
    cpus
}

/// `10:tsc_refine, 12(RESCUER):f BAR(3)`, `lru_add_drain_per_cpu BAR(1), vmstat_update`, `2*kfree_rcu_monitor`.
fn parse_items(workqueue: &str, cpus: &[u32], state: WorkState, text: &str, line: u64) -> Vec<WorkItem> {
    let mut items: Vec<WorkItem> = Vec::new();
    for word in text.split([' ', ',']).filter(|word| !word.is_empty()) {
        if let Some(pid) = word.strip_prefix("BAR(").and_then(|rest| rest.strip_suffix(')')) {
            // A barrier is linked behind the item that it waits for.
            if let Some(item) = items.last_mut() {
                item.flusher = pid.parse().ok();
            }
            continue;
        }
        let (worker, function) = match word.split_once(':') {
            Some((worker, function)) if state == WorkState::InFlight => {
                (worker.trim_end_matches("(RESCUER)").parse().ok(), function)
            }
            _ => (None, word),
        };
        let (count, function) = match function.split_once('*') {
            Some((count, function)) => (count.parse().unwrap_or(1), function),
            None => (1, function),
        };
        items.push(WorkItem {
            workqueue: workqueue.to_owned(),
            cpus: cpus.to_vec(),
            state,
            function: function.to_owned(),
            count,
            worker,
            flusher: None,
            line,
        });
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_names_who_waits_for_what_and_where() {
        let mut dump = Dump::default();
        let mut items = Vec::new();
        for (number, line) in [
            (1, "workqueue events: flags=0x100"),
            (2, "  pwq 2: cpus=0 node=0 flags=0x0 nice=0 active=2 refcnt=3"),
            (3, "    in-flight: 10:tsc_refine_calibration_work, 12(RESCUER):other BAR(9)"),
            (4, "workqueue kvfree_rcu_reclaim: flags=0xa"),
            (5, "  pwq 17: cpus=0-3 node=0 flags=0x4 nice=0 active=2 refcnt=3"),
            (6, "    pending: 2*kfree_rcu_monitor"),
            (7, "workqueue mm_percpu_wq: flags=0x8"),
            (8, "  pwq 6: cpus=1 node=0 flags=0x0 nice=0 active=2 refcnt=4"),
            (9, "    pending: lru_add_drain_per_cpu BAR(57), vmstat_update"),
            (10, "pool 2: cpus=0 node=0 flags=0x0 nice=0 hung=7s workers=2 idle: 8"),
        ] {
            assert!(dump.line(number, line, &mut items), "{line}");
        }
        assert!(!dump.line(11, "watchdog: BUG: soft lockup", &mut items));
        let drain = items.iter().find(|item| item.function == "lru_add_drain_per_cpu").expect("the drain");
        assert_eq!((drain.workqueue.as_str(), drain.cpus.as_slice()), ("mm_percpu_wq", [1].as_slice()));
        assert_eq!((drain.flusher, drain.state, drain.line), (Some(57), WorkState::Pending, 9));
        assert_eq!(
            items.iter().find(|item| item.function == "vmstat_update").and_then(|item| item.flusher),
            None
        );
        assert_eq!(items[0].worker, Some(10));
        assert_eq!((items[1].worker, items[1].flusher), (Some(12), Some(9)));
        assert_eq!((items[2].count, items[2].cpus.as_slice()), (2, [0, 1, 2, 3].as_slice()));
    }
}
