//! Names for addresses of the guest kernel: `vmlinux`, and modules where the guest said it put them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};

use super::stack::{Frame, demangle, is_root};

/// Why symbols could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read symbols of {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no ELF object.
    #[error("{path} is no ELF file with symbols: {source}; build it again with `hmmstorm build`")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: object::Error,
    },
    /// It has no code symbols.
    #[error("{path} has no code symbols; it must be the unstripped one")]
    Stripped {
        /// Which file.
        path: PathBuf,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Symbol {
    start: u64,
    /// First address behind it.
    end: u64,
    name: String,
    /// Index into [`Symbols::modules`]; none for the kernel.
    module: Option<usize>,
}

/// A table from addresses to functions.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// By start address.
    symbols: Vec<Symbol>,
    /// Code that is known to be code.
    text: Vec<std::ops::Range<u64>>,
    modules: Vec<String>,
}

impl Symbols {
    /// Reads `vmlinux`. The guest must run it where it was linked (`nokaslr`).
    pub fn from_vmlinux(path: &Path) -> Result<Self, Error> {
        let data = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let file =
            object::File::parse(&*data).map_err(|source| Error::Parse { path: path.into(), source })?;
        let mut symbols = Self::default();
        for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
            symbols.text.push(section.address()..section.address() + section.size());
        }
        symbols.text.retain(|range| !range.is_empty());
        let code: Vec<Symbol> = file
            .symbols()
            .filter(|symbol| is_code(symbol.kind()) && symbols.is_text(symbol.address()))
            .filter_map(|symbol| {
                Some(Symbol::new(symbol.address(), symbol.size(), symbol.name().ok()?, None))
            })
            .collect();
        if code.is_empty() {
            return Err(Error::Stripped { path: path.into() });
        }
        symbols.insert(code);
        Ok(symbols)
    }

    /// Adds a module: its unstripped `.ko` and the addresses of its text sections in the guest.
    pub fn add_module(
        &mut self,
        name: &str,
        path: &Path,
        sections: &BTreeMap<String, u64>,
    ) -> Result<(), Error> {
        let data = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let file =
            object::File::parse(&*data).map_err(|source| Error::Parse { path: path.into(), source })?;
        let index = self.modules.len();
        let mut code = Vec::new();
        for section in file.sections() {
            let base = section.name().ok().and_then(|name| sections.get(name)).copied();
            let Some(base) = base.filter(|_| section.size() > 0) else { continue };
            self.text.push(base..base.saturating_add(section.size()));
            code.extend(
                file.symbols()
                    .filter(|symbol| {
                        is_code(symbol.kind()) && symbol.section_index() == Some(section.index())
                    })
                    .filter_map(|symbol| {
                        Some(Symbol::new(
                            base.wrapping_add(symbol.address()),
                            symbol.size(),
                            symbol.name().ok()?,
                            Some(index),
                        ))
                    }),
            );
        }
        if code.is_empty() {
            return Err(Error::Stripped { path: path.into() });
        }
        self.modules.push(name.to_owned());
        self.insert(code);
        Ok(())
    }

    /// A table from `(start, size, name)`, for tests.
    #[cfg(test)]
    pub(crate) fn from_table(table: &[(u64, u64, &str)]) -> Self {
        let mut symbols = Self::default();
        for &(start, size, _) in table {
            symbols.text.push(start..start + size);
        }
        symbols
            .insert(table.iter().map(|&(start, size, name)| Symbol::new(start, size, name, None)).collect());
        symbols
    }

    fn insert(&mut self, code: Vec<Symbol>) {
        self.symbols.extend(code);
        self.symbols.sort_by(|a, b| (a.start, a.module, &a.name).cmp(&(b.start, b.module, &b.name)));
        // Aliases: one name an address is enough, the one with the largest extent.
        self.symbols.dedup_by(|later, kept| {
            let same = later.start == kept.start;
            if same && later.end > kept.end {
                std::mem::swap(later, kept);
            }
            same
        });
        // Assembly symbols have no size: they reach to the next one.
        for index in 0..self.symbols.len() {
            let next = self.symbols.get(index + 1).map(|next| next.start);
            let symbol = &mut self.symbols[index];
            if symbol.end == symbol.start {
                let limit = self
                    .text
                    .iter()
                    .find(|range| range.contains(&symbol.start))
                    .map_or(symbol.start + 1, |range| range.end);
                symbol.end = next.unwrap_or(limit).min(limit);
            }
        }
    }

    /// Whether this is the address of known code.
    #[must_use]
    pub fn is_text(&self, address: u64) -> bool {
        self.text.iter().any(|range| range.contains(&address))
    }

    /// Whether the function of this address has no caller; none if the address is no code.
    #[must_use]
    pub fn is_root(&self, address: u64) -> Option<bool> {
        if self.is_text(address) {
            Some(self.find(address).is_some_and(|symbol| is_root(&symbol.name)))
        } else {
            is_module_area(address).then_some(false)
        }
    }

    fn find(&self, address: u64) -> Option<&Symbol> {
        let after = self.symbols.partition_point(|symbol| symbol.start <= address);
        after.checked_sub(1).map(|index| &self.symbols[index]).filter(|symbol| address < symbol.end)
    }

    /// The frame of an address. Code of a module that is not known is `[module]+address`.
    #[must_use]
    pub fn frame(&self, address: u64) -> Frame {
        match self.find(address) {
            Some(symbol) => Frame {
                function: symbol.name.clone(),
                offset: address - symbol.start,
                module: symbol.module.map(|index| self.modules[index].clone()),
                reliable: true,
                interrupt: false,
            },
            None => Frame {
                function: format!("{address:#x}"),
                offset: 0,
                module: is_module_area(address).then(|| "?".to_owned()),
                reliable: true,
                interrupt: false,
            },
        }
    }
}

impl Symbol {
    fn new(start: u64, size: u64, name: &str, module: Option<usize>) -> Self {
        Self { start, end: start.saturating_add(size), name: demangle(name), module }
    }
}

fn is_code(kind: SymbolKind) -> bool {
    matches!(kind, SymbolKind::Text | SymbolKind::Unknown)
}

/// Where x86-64 loads modules (`MODULES_VADDR..MODULES_END`; `Documentation/arch/x86/x86_64/mm.rst`).
#[must_use]
pub fn is_module_area(address: u64) -> bool {
    (0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000).contains(&address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_within_functions() {
        let symbols = Symbols::from_table(&[(0x1000, 0x10, "a"), (0x1010, 0x20, "b"), (0x2000, 0x8, "c")]);
        assert_eq!(symbols.frame(0x1000).function, "a");
        assert_eq!((symbols.frame(0x101f).function.as_str(), symbols.frame(0x101f).offset), ("b", 0xf));
        assert_eq!(symbols.frame(0x1fff).function, "0x1fff");
        assert!(symbols.is_text(0x2007) && !symbols.is_text(0x2008));
        assert_eq!(symbols.frame(0xffff_ffff_a000_1234).module.as_deref(), Some("?"));
    }

    #[test]
    fn an_address_before_all_symbols_has_no_name() {
        assert_eq!(Symbols::from_table(&[(0x1000, 0x10, "a")]).frame(5).function, "0x5");
        assert_eq!(Symbols::default().frame(5).function, "0x5");
    }

    /// This test binary is an ELF file with code symbols; its own functions must be found in it.
    #[test]
    fn reads_an_elf_file() {
        let path = std::env::current_exe().expect("the test's own path");
        let symbols = Symbols::from_vmlinux(&path).expect("symbols of the test binary");
        let names: Vec<&str> = symbols.symbols.iter().map(|symbol| symbol.name.as_str()).collect();
        assert!(names.iter().any(|name| name.contains("reads_an_elf_file")), "{} symbols", names.len());
        let symbol = symbols.symbols.iter().find(|symbol| symbol.end - symbol.start > 1).expect("a function");
        assert_eq!(symbols.frame(symbol.start + 1).offset, 1);
    }

    #[test]
    fn a_file_that_is_no_elf_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let error = Symbols::from_vmlinux(file.path()).expect_err("an empty file");
        assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
    }
}
