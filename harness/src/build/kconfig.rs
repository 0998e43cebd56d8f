//! Kernel configuration: fragments, and the check that each of their lines survived.

use std::collections::BTreeMap;

/// What a line of a configuration says about an option.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Setting {
    /// `CONFIG_X=value`.
    Value(String),
    /// `# CONFIG_X is not set`.
    Unset,
}

impl Setting {
    fn show(&self, option: &str) -> String {
        match self {
            Self::Value(value) => format!("{option}={value}"),
            Self::Unset => format!("# {option} is not set"),
        }
    }
}

/// The lines of `fragments`, later fragments on top, that `config` does not hold; each with what it holds instead.
pub(super) fn lost(fragments: &[String], config: &str) -> Vec<String> {
    let wanted: BTreeMap<_, _> = fragments.iter().flat_map(|f| f.lines().filter_map(parse)).collect();
    let found: BTreeMap<_, _> = config.lines().filter_map(parse).collect();
    wanted
        .iter()
        .filter_map(|(option, wanted)| match (wanted, found.get(option)) {
            // An option that cannot even be asked for is not set either.
            (Setting::Unset, None) => None,
            (wanted, Some(found)) if wanted == found => None,
            (wanted, Some(found)) => Some(format!("{} (is: {})", wanted.show(option), found.show(option))),
            (wanted, None) => Some(format!("{} (there is no such option now)", wanted.show(option))),
        })
        .collect()
}

fn parse(line: &str) -> Option<(String, Setting)> {
    let line = line.trim();
    if let Some(rest) = line.strip_prefix("# ") {
        let option = rest.strip_suffix(" is not set")?;
        return option.starts_with("CONFIG_").then(|| (option.to_owned(), Setting::Unset));
    }
    let (option, value) = line.split_once('=')?;
    if !option.starts_with("CONFIG_") {
        return None;
    }
    let setting = if value == "n" { Setting::Unset } else { Setting::Value(value.to_owned()) };
    Some((option.to_owned(), setting))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "#\n# Automatically generated\n#\nCONFIG_RUST=y\n# CONFIG_KASAN is not set\nCONFIG_HZ=100\n\
                          CONFIG_CMDLINE=\"a=b\"\nCONFIG_TEST_HMM=y\n";

    fn lost_of(fragments: &[&str]) -> Vec<String> {
        lost(&fragments.iter().map(|f| (*f).to_owned()).collect::<Vec<_>>(), CONFIG)
    }

    #[test]
    fn what_survived() {
        let good = "# about it\nCONFIG_RUST=y\n# CONFIG_KASAN is not set\nCONFIG_CMDLINE=\"a=b\"\nCONFIG_NONE=n\n\
                    # CONFIG_NEITHER is not set\n";
        assert!(lost_of(&[good]).is_empty());
    }

    #[test]
    fn every_kind_of_loss_is_listed() {
        let lost = lost_of(&[
            "CONFIG_KASAN=y\nCONFIG_TEST_HMM=m\nCONFIG_GONE=y\nCONFIG_HZ=250\n# CONFIG_RUST is not set\n",
        ]);
        assert_eq!(
            lost,
            [
                "CONFIG_GONE=y (there is no such option now)",
                "CONFIG_HZ=250 (is: CONFIG_HZ=100)",
                "CONFIG_KASAN=y (is: # CONFIG_KASAN is not set)",
                "# CONFIG_RUST is not set (is: CONFIG_RUST=y)",
                "CONFIG_TEST_HMM=m (is: CONFIG_TEST_HMM=y)",
            ]
        );
    }

    #[test]
    fn later_fragment_wins() {
        assert!(lost_of(&["CONFIG_HZ=250\n", "CONFIG_HZ=100\n"]).is_empty());
        assert_eq!(lost_of(&["CONFIG_HZ=100\n", "CONFIG_HZ=250\n"]).len(), 1);
    }
}
