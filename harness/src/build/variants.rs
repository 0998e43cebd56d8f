//! Stacks of fix candidates: `--variant a+b` is what a changes, then what b changes.

use std::path::{Path, PathBuf};

use super::BuildError;
use super::patches::{Origin, Patch, no_doubles};
use super::pins::{Kernel, Pins, Variant};

/// What joins names of variants.
const JOINT: char = '+';

/// One variant, or several on top of each other.
#[derive(Clone, Debug)]
pub struct Stack<'a> {
    /// Bottom first; never empty.
    variants: Vec<(&'a Variant, &'a [PathBuf])>,
}

impl<'a> Stack<'a> {
    /// The stack of this name (`a+b`) for a kernel, or what that kernel is by itself. Each part is named once, exists for
    /// the kernel, and changes something unless it is alone.
    pub fn parse(name: Option<&str>, kernel: &Kernel, pins: &'a Pins) -> Result<Self, BuildError> {
        let name = name.unwrap_or(&kernel.variant);
        let parts: Vec<_> = name.split(JOINT).map(str::trim).collect();
        let mut variants: Vec<(&Variant, &[PathBuf])> = Vec::new();
        for part in &parts {
            if part.is_empty() {
                return Err(usage(name, "a name is missing beside a '+'"));
            }
            let variant = pins.variant(Some(part))?;
            let Some(patches) = variant.patches(&kernel.name) else {
                return Err(usage(
                    name,
                    &format!("{part} makes no sense on kernel {}: {}", kernel.name, variant.summary),
                ));
            };
            if variants.iter().any(|(v, _)| v.name == variant.name) {
                return Err(usage(name, &format!("{part} is named twice")));
            }
            if parts.len() > 1 && patches.is_empty() {
                return Err(usage(
                    name,
                    &format!(
                        "{part} changes nothing on kernel {} and needs no place in a stack",
                        kernel.name
                    ),
                ));
            }
            variants.push((variant, patches));
        }
        Ok(Self { variants })
    }

    /// Its name, as it can be given again.
    pub fn name(&self) -> String {
        self.variants.iter().map(|(v, _)| v.name.as_str()).collect::<Vec<_>>().join("+")
    }

    /// Its patches from `dir`, in order.
    pub(super) fn patches(&self, dir: &Path) -> Result<Vec<Patch>, BuildError> {
        let mut patches = Vec::new();
        for (variant, files) in &self.variants {
            for file in *files {
                patches.push(Patch::read(&dir.join(file), Origin::Variant(variant.name.clone()))?);
            }
        }
        no_doubles(&patches)?;
        Ok(patches)
    }
}

fn usage(stack: &str, what: &str) -> BuildError {
    BuildError::Usage(format!("--variant {stack}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins() -> Pins {
        Pins::load(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("repository")).expect("pins")
    }

    fn patches(name: &str) -> Result<Vec<String>, BuildError> {
        let pins = pins();
        let stack = Stack::parse(Some(name), pins.kernel(None)?, &pins)?;
        assert_eq!(stack.name(), name);
        let patches = stack.patches(&pins.repo.join("images/variants"))?;
        Ok(patches.into_iter().map(|p| p.name).collect())
    }

    #[test]
    fn patches_come_in_the_order_of_the_names() {
        let stack = "wait-on-locked+unmap-before-drain+resched-in-hmm";
        let expected = ["wait-on-locked.patch", "unmap-before-drain.patch", "resched-in-hmm.patch"];
        assert_eq!(patches(stack).expect("patches"), expected);
        let reversed = ["resched-in-hmm.patch", "wait-on-locked.patch"];
        assert_eq!(patches("resched-in-hmm+wait-on-locked").expect("patches"), reversed);
        assert_eq!(patches("trylock").expect("patches"), [""; 0]);
        let pins = pins();
        for (kernel, stock) in [("6.19.6", "trylock"), ("7.1.13", "wait-on-locked")] {
            let kernel = pins.kernel(Some(kernel)).expect("kernel");
            let stack = Stack::parse(None, kernel, &pins).expect("the default");
            assert_eq!(stack.name(), stock);
            assert!(stack.patches(&pins.repo.join("images/variants")).expect("patches").is_empty());
        }
    }

    #[test]
    fn what_makes_no_stack_is_said() {
        for (name, reason) in [
            ("wait-on-locked+nonsense", "no variant 'nonsense'; there is trylock,"),
            ("wait-on-locked+wait-on-locked", "wait-on-locked is named twice"),
            ("wait-on-locked+", "a name is missing"),
            ("trylock+wait-on-locked", "trylock changes nothing on kernel 6.19.6"),
            (
                "wait-on-locked+wait-on-locked-pmd",
                "the same patch as wait-on-locked.patch, which is part of variant wait-on-locked:",
            ),
        ] {
            let error = patches(name).expect_err(name);
            assert!(error.to_string().contains(reason), "{name}: {error}");
            assert!(matches!(error.into_cli(), crate::cli::Error::Usage(_)), "{name}");
        }
    }

    #[test]
    fn every_variant_says_why() {
        for variant in &pins().variants.variant {
            assert!(!variant.summary.is_empty());
            for file in variant.patches.iter().chain(variant.patches_for.values().flatten()) {
                let path = pins().repo.join("images/variants").join(file);
                let text = std::fs::read_to_string(&path).expect("patch");
                // A candidate names the mail that it comes from, the cure of a known bug the case that shows it.
                let (subject, origin) = if file.starts_with("known-bugs") {
                    ("\nSubject: [PATCH] ", "bug=")
                } else {
                    ("\nSubject: [PATCH] mm", "linux.intel.com>")
                };
                for part in [subject, "\nExpected", origin, "\nSigned-off-by: "] {
                    assert!(text.contains(part), "{} lacks {part:?}", path.display());
                }
            }
        }
    }
}
