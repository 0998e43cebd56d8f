//! Pairwise covering: a few cells in which every two values of different factors meet, where all cells are too many.

use std::collections::BTreeSet;

/// Indices into `rows` such that every pair of values that meets in some row meets in one of those chosen. A row has one
/// value of each factor, as a number, and all rows are of one length; leaving a combination out of `rows` is how it is
/// forbidden. Each choice is the row with the most pairs that are not covered yet, the first of equals: the same rows
/// always give the same choice.
#[must_use]
pub fn pairwise(rows: &[Vec<usize>]) -> Vec<usize> {
    let mut open: BTreeSet<Pair> = rows.iter().flat_map(|row| pairs(row)).collect();
    let mut chosen = Vec::new();
    while !open.is_empty() {
        let gain = |row: &[usize]| pairs(row).filter(|pair| open.contains(pair)).count();
        // Of equal gains the first: max_by_key would take the last.
        let best = (0..rows.len()).rev().max_by_key(|&index| gain(&rows[index]));
        let Some(best) = best else { break };
        for pair in pairs(&rows[best]) {
            open.remove(&pair);
        }
        chosen.push(best);
    }
    if rows.first().is_some_and(|row| row.len() < 2) {
        // With fewer than two factors there are no pairs, and every value is to be seen.
        return (0..rows.len()).collect();
    }
    chosen.sort_unstable();
    chosen
}

/// Two factors and the values that they have.
type Pair = (usize, usize, usize, usize);

fn pairs(row: &[usize]) -> impl Iterator<Item = Pair> {
    (0..row.len()).flat_map(move |a| (a + 1..row.len()).map(move |b| (a, b, row[a], row[b])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All combinations of factors with so many values.
    fn product(sizes: &[usize]) -> Vec<Vec<usize>> {
        sizes.iter().fold(vec![Vec::new()], |rows, &size| {
            let extend = |row: &Vec<usize>, value| row.iter().copied().chain([value]).collect::<Vec<_>>();
            rows.iter().flat_map(|row| (0..size).map(move |value| extend(row, value))).collect()
        })
    }

    #[test]
    fn far_fewer_than_all() {
        // Ten variants, four preemption models, three sizes of machine, two of folio: 240 cells; at least 40 are needed,
        // since every variant must meet every model.
        let rows = product(&[10, 4, 3, 2]);
        let chosen = pairwise(&rows);
        assert!((40..=48).contains(&chosen.len()), "{}", chosen.len());
        assert_eq!(pairwise(&product(&[2, 2, 2])).len(), 4);
        assert_eq!(pairwise(&product(&[3])), [0, 1, 2]);
        assert!(pairwise(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn every_pair_that_can_meet_meets(
            sizes in prop::collection::vec(1..5_usize, 2..5),
            keep in prop::collection::vec(any::<bool>(), 625),
        ) {
            let rows: Vec<_> = product(&sizes).into_iter().zip(keep).filter(|(_, k)| *k).map(|(r, _)| r).collect();
            let chosen = pairwise(&rows);
            let covered: BTreeSet<Pair> = chosen.iter().flat_map(|&index| pairs(&rows[index])).collect();
            let all: BTreeSet<Pair> = rows.iter().flat_map(|row| pairs(row)).collect();
            prop_assert_eq!(covered, all);
            let distinct: BTreeSet<_> = chosen.iter().collect();
            prop_assert_eq!(distinct.len(), chosen.len());
        }
    }
}
