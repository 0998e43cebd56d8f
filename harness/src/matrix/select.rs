//! Selectors: the part of a plan that picks cells.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::CellSpec;
use super::plan::{Mode, NO_CONTROL, OneOrMany, Parameter};
use crate::cli::Preempt;

/// Cells whose values are all among those named; a factor that is not named may have any.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    scenario: Option<OneOrMany<String>>,
    control: Option<OneOrMany<String>>,
    kernel: Option<OneOrMany<String>>,
    variant: Option<OneOrMany<String>>,
    preempt: Option<OneOrMany<Preempt>>,
    cpus: Option<OneOrMany<u32>>,
    mode: Option<OneOrMany<Mode>>,
    #[serde(default)]
    parameters: BTreeMap<String, OneOrMany<Parameter>>,
}

fn among<T: PartialEq<U>, U: ?Sized>(named: &Option<OneOrMany<T>>, value: &U) -> bool {
    named.as_ref().is_none_or(|named| named.as_slice().iter().any(|one| one == value))
}

impl Selector {
    /// Whether it picks this cell. A parameter that the cell does not set has no value to be picked by.
    #[must_use]
    pub fn picks(&self, cell: &CellSpec) -> bool {
        let parameter = |(name, named): (&String, &OneOrMany<Parameter>)| {
            let value = cell.parameters.get(name);
            named.as_slice().iter().any(|one| value == Some(&one.to_string()))
        };
        among(&self.scenario, cell.scenario.as_str())
            && among(&self.control, cell.control.as_deref().unwrap_or(NO_CONTROL))
            && among(&self.kernel, cell.kernel.as_str())
            && among(&self.variant, cell.variant.as_str())
            && among(&self.preempt, &cell.preempt)
            && among(&self.cpus, &cell.cpus)
            && among(&self.mode, &cell.mode)
            && self.parameters.iter().all(parameter)
    }
}
