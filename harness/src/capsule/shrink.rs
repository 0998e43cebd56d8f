//! Makes a finding smaller, number by number, as long as it stays.

/// One number of a run, which can be anything from `least` to what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dimension {
    /// Its name.
    pub name: String,
    /// The least that it may be.
    pub least: u64,
    /// What it is.
    pub now: u64,
}

/// Finds the smallest values, in each dimension by itself, for which `holds` still says yes: at the end none of them can be
/// one less with the others as they are (as far as `holds` always gives the same answer). Dimensions that come first are
/// made small first, so those that cost most time should. Each is bisected, so the number of questions is about the
/// number of dimensions times the logarithm of their values, times two to three.
///
/// # Errors
/// Of `holds`, whose first error ends it.
pub fn shrink<E>(
    dimensions: &[Dimension],
    mut holds: impl FnMut(&[u64]) -> Result<bool, E>,
) -> Result<Vec<u64>, E> {
    let mut values: Vec<u64> = dimensions.iter().map(|dimension| dimension.now).collect();
    let mut known = std::collections::BTreeMap::new();
    let mut ask = |values: &[u64]| {
        if let Some(&answer) = known.get(values) {
            return Ok(answer);
        }
        let answer = holds(values)?;
        known.insert(values.to_vec(), answer);
        Ok(answer)
    };
    loop {
        let before = values.clone();
        for (index, dimension) in dimensions.iter().enumerate() {
            let mut with = |value: u64| {
                let mut values = values.clone();
                values[index] = value;
                ask(&values)
            };
            let mut yes = before[index];
            if yes <= dimension.least {
                continue;
            }
            if with(dimension.least)? {
                values[index] = dimension.least;
                continue;
            }
            let mut no = dimension.least;
            while yes - no > 1 {
                let middle = no + (yes - no) / 2;
                if with(middle)? {
                    yes = middle;
                } else {
                    no = middle;
                }
            }
            values[index] = yes;
        }
        if values == before {
            return Ok(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn dimensions(now: &[u64]) -> Vec<Dimension> {
        now.iter()
            .enumerate()
            .map(|(index, &now)| Dimension { name: format!("d{index}"), least: 1, now })
            .collect()
    }

    #[test]
    fn few_questions_lead_to_the_least() {
        let mut asked = 0;
        let found = shrink(&dimensions(&[60, 32, 4]), |values| {
            asked += 1;
            Ok::<_, Infallible>(values[0] >= 1 && values[1] >= 3 && values[2] >= 2)
        });
        assert_eq!(found, Ok(vec![1, 3, 2]));
        assert!(asked <= 20, "{asked}");
    }

    #[test]
    fn an_error_ends_it() {
        assert_eq!(shrink(&dimensions(&[9]), |_| Err::<bool, _>("stop")), Err("stop"));
        assert_eq!(shrink(&dimensions(&[1, 1]), |_| Err::<bool, _>("stop")), Ok(vec![1, 1]));
    }

    proptest! {
        #[test]
        fn the_end_holds_and_nothing_next_to_it_does(
            start in prop::collection::vec(1..40_u64, 1..4),
            // Any rule at all, monotonic or not, under which the start holds.
            rule in prop::collection::vec(any::<bool>(), 64),
        ) {
            let holds = |values: &[u64]| {
                let mixed = values.iter().fold(7_u64, |sum, value| sum.wrapping_mul(31).wrapping_add(*value));
                values == start || rule[(mixed % 64) as usize]
            };
            let found = shrink(&dimensions(&start), |values| Ok::<_, Infallible>(holds(values))).expect("no error");
            prop_assert!(holds(&found));
            for index in 0..found.len() {
                prop_assert!(found[index] >= 1 && found[index] <= start[index]);
                if found[index] > 1 {
                    let mut less = found.clone();
                    less[index] -= 1;
                    prop_assert!(!holds(&less), "{:?} is smaller than {:?}", less, found);
                }
            }
        }
    }
}
