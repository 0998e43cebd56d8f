//! The kernel's counters of anonymous huge pages.

use std::collections::BTreeMap;
use std::fs;

use super::field;

/// Anonymous THP mapped as a whole, in `/proc/vmstat`.
const MAPPED: &str = "nr_anon_transparent_hugepages";
/// Folder with one folder a size of huge page.
const SIZES: &str = "/sys/kernel/mm/transparent_hugepage";
/// Counters of things that are there now, in each size's folder `stats`; the others there only grow.
const STANDING: [&str; 2] = ["nr_anon", "nr_anon_partially_mapped"];

/// Some of them at one moment, by name.
#[derive(Debug)]
pub(super) struct HugePages {
    look: fn() -> BTreeMap<String, u64>,
    then: BTreeMap<String, u64>,
}

impl HugePages {
    /// Those that are mapped as a whole.
    pub(super) fn mapped() -> Self {
        Self::new(|| {
            let count = fs::read_to_string("/proc/vmstat").ok().and_then(|text| field(&text, MAPPED));
            count.map(|count| (MAPPED.to_owned(), count)).into_iter().collect()
        })
    }

    /// Those of each size, however they are mapped. A kernel without huge pages has none.
    pub(super) fn by_size() -> Self {
        Self::new(|| {
            let mut counters = BTreeMap::new();
            for size in fs::read_dir(SIZES).into_iter().flatten().flatten() {
                for name in STANDING {
                    let path = size.path().join("stats").join(name);
                    if let Some(count) =
                        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok())
                    {
                        counters.insert(format!("{}/{name}", size.file_name().to_string_lossy()), count);
                    }
                }
            }
            counters
        })
    }

    fn new(look: fn() -> BTreeMap<String, u64>) -> Self {
        Self { look, then: look() }
    }

    /// What is not as it was.
    pub(super) fn changed(&self) -> Option<String> {
        difference(&self.then, &(self.look)())
    }
}

fn difference(then: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>) -> Option<String> {
    let changed: Vec<_> = then
        .iter()
        .filter_map(|(name, then)| Some((name, then, now.get(name)?)))
        .filter(|(_, then, now)| then != now)
        .map(|(name, then, now)| format!("{name} was {then} before the run and is {now}"))
        .collect();
    (!changed.is_empty()).then(|| changed.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_counters_that_changed() {
        let counters =
            |thp, m2| BTreeMap::from([(MAPPED.to_owned(), thp), ("hugepages-2048kB/nr_anon".to_owned(), m2)]);
        assert_eq!(difference(&counters(1, 2), &counters(1, 2)), None);
        assert_eq!(
            difference(&counters(1, 2), &counters(1, 5)).as_deref(),
            Some("hugepages-2048kB/nr_anon was 2 before the run and is 5")
        );
    }
}
