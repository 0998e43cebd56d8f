//! Finds functions by what people call them, in vmlinux and in modules, Rust's mangled names included.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use serde::Serialize;

/// Where a function begins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Function {
    /// The name, demangled.
    pub name: String,
    /// The module it is in; none: vmlinux.
    pub module: Option<String>,
    /// The section, for a module.
    pub section: Option<String>,
    /// Address in vmlinux, or offset in the module's section.
    pub address: u64,
}

/// A file has no symbols to offer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no ELF file.
    #[error("{} is no ELF file: {source}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        source: object::Error,
    },
}

/// All functions of an ELF file. `module` is its name; none: it is vmlinux.
pub(super) fn functions(path: &Path, module: Option<&str>) -> Result<Vec<Function>, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let parse = |source| Error::Parse { path: path.into(), source };
    let file = object::File::parse(&*bytes).map_err(parse)?;
    let mut functions = Vec::new();
    for symbol in file.symbols().filter(|s| s.kind() == SymbolKind::Text && s.is_definition()) {
        let Ok(raw) = symbol.name() else { continue };
        // The padding before a function, and the part of one that was split off.
        if raw.starts_with("__pfx_") || raw.ends_with(".cold") {
            continue;
        }
        let section = match (module, symbol.section_index()) {
            (None, _) => None,
            (Some(_), Some(index)) => {
                let section = file.section_by_index(index).map_err(parse)?;
                Some(section.name().map_err(parse)?.to_owned())
            }
            (Some(_), None) => continue,
        };
        functions.push(Function {
            name: format!("{:#}", rustc_demangle::demangle(raw)),
            module: module.map(Into::into),
            section,
            address: symbol.address(),
        });
    }
    functions.sort();
    functions.dedup();
    Ok(functions)
}

/// The functions that `wish` means: those of exactly this name; if there are none, those whose last path component it
/// is; if there are none, those whose name it is part of.
pub(super) fn find(functions: &[Function], wish: &str) -> Vec<Function> {
    let tiers: [&dyn Fn(&str) -> bool; 3] =
        [&|name| without_suffix(name) == wish, &|name| last_component(name) == wish, &|name| {
            name.contains(wish)
        }];
    for matches in tiers {
        let found: Vec<Function> = functions.iter().filter(|f| matches(&f.name)).cloned().collect();
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

/// Without what gcc appends to specialised copies: `.constprop.0`, `.isra.3`, `.part.1`.
fn without_suffix(name: &str) -> &str {
    [".constprop.", ".isra.", ".part."]
        .iter()
        .filter_map(|s| name.find(s))
        .min()
        .map_or(name, |at| &name[..at])
}

/// `b` of `a::b`, `<a::C<d::E> as f::G>::b`, `a::b::<C>`.
fn last_component(name: &str) -> &str {
    let mut depth = 0usize;
    let mut start = 0;
    let mut end = name.len();
    let bytes = name.as_bytes();
    for (i, byte) in bytes.iter().enumerate() {
        match byte {
            b'<' => {
                // Generic arguments at the end are not the name: `a::b::<C>`.
                if depth == 0 && i >= 2 && &name[i - 2..i] == "::" {
                    end = i - 2;
                }
                depth += 1;
            }
            b'>' => depth = depth.saturating_sub(1),
            b':' if depth == 0 && bytes.get(i + 1) == Some(&b':') && bytes.get(i + 2) != Some(&b'<') => {
                start = i + 2;
                end = name.len();
            }
            _ => {}
        }
    }
    name.get(start..end).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str) -> Function {
        Function { name: name.into(), module: None, section: None, address: 0 }
    }

    #[test]
    fn last_components() {
        for (name, last) in [
            ("do_swap_page", "do_swap_page"),
            ("a::b", "b"),
            ("<a::C<d::E> as f::G<h::I>>::migrate_to_ram", "migrate_to_ram"),
            ("a::b::<c::D>", "b"),
            ("<a::B>::new::{closure#0}", "{closure#0}"),
        ] {
            assert_eq!(last_component(name), last, "{name}");
        }
    }

    #[test]
    fn the_closest_match_wins() {
        let all = [
            "do_swap_page",
            "do_swap_page_more",
            "a::migrate_to_ram_callback",
            "<b::C as d::E>::migrate_to_ram",
            "f.isra.0",
        ]
        .map(function);
        let names = |wish: &str| find(&all, wish).into_iter().map(|f| f.name).collect::<Vec<_>>();
        assert_eq!(names("do_swap_page"), ["do_swap_page"]);
        assert_eq!(names("migrate_to_ram"), ["<b::C as d::E>::migrate_to_ram"]);
        assert_eq!(names("ram_call"), ["a::migrate_to_ram_callback"]);
        assert_eq!(names("f"), ["f.isra.0"]);
        assert!(names("nothing_like_it").is_empty());
    }

    #[test]
    fn reads_the_functions_of_this_very_program() {
        let me = std::env::current_exe().expect("path");
        let all = functions(&me, None).expect("ELF");
        assert!(!find(&all, "reads_the_functions_of_this_very_program").is_empty());
    }
}
