//! The guest's initramfs: a gzipped newc archive, the same bytes for the same parts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};
use flate2::{Compression, GzBuilder};

use super::BuildError;
use super::error::IoContext;
use super::pins::{Initramfs, Part};

/// A file to put in.
#[derive(Clone, Debug)]
pub(super) struct Content {
    /// Which part it is, or belongs to.
    pub(super) part: Part,
    /// Its name, for parts that are folders.
    pub(super) name: String,
    /// Where it is now.
    pub(super) file: PathBuf,
}

enum Kind {
    Directory,
    Node { major: u32, minor: u32 },
    Link(String),
    File(PathBuf),
}

struct Entry {
    path: String,
    mode: u32,
    kind: Kind,
}

/// Writes the archive that `manifest` describes.
pub(super) fn write(manifest: &Initramfs, contents: &[Content], dest: &Path) -> Result<(), BuildError> {
    let file = File::create(dest).on("create", dest)?;
    pack(entries(manifest, contents), file, dest)
}

/// Writes the archive `base` with programs added to it, by their paths in the guest; their folders are in `base`. The
/// kernel unpacks archives that follow each other one after the other.
pub(super) fn extend(base: &Path, programs: &[(&str, PathBuf)], dest: &Path) -> Result<(), BuildError> {
    fs::copy(base, dest).on("copy", base)?;
    let file = File::options().append(true).open(dest).on("open", dest)?;
    let program = |(path, file): &(&str, PathBuf)| Entry {
        path: (*path).to_owned(),
        mode: 0o755,
        kind: Kind::File(file.clone()),
    };
    pack(programs.iter().map(program).collect(), file, dest)
}

fn pack(entries: Vec<Entry>, file: File, dest: &Path) -> Result<(), BuildError> {
    // No name and no time in the header.
    let mut archive = GzBuilder::new().write(file, Compression::new(6));
    for (number, entry) in (1_u32..).zip(entries) {
        let builder = Builder::new(&entry.path).ino(number).nlink(1).mtime(0).uid(0).gid(0).mode(entry.mode);
        let (builder, bytes) = match entry.kind {
            Kind::Directory => (builder.set_mode_file_type(ModeFileType::Directory), Vec::new()),
            Kind::Node { major, minor } => (
                builder.set_mode_file_type(ModeFileType::Char).rdev_major(major).rdev_minor(minor),
                Vec::new(),
            ),
            Kind::Link(target) => (builder.set_mode_file_type(ModeFileType::Symlink), target.into_bytes()),
            Kind::File(source) => {
                (builder.set_mode_file_type(ModeFileType::Regular), fs::read(&source).on("read", &source)?)
            }
        };
        let size = u32::try_from(bytes.len())
            .map_err(|_| io::Error::other("larger than a cpio member may be"))
            .on("write", dest)?;
        let mut member = builder.write(&mut archive, size);
        member.write_all(&bytes).on("write", dest)?;
        member.finish().on("write", dest)?;
    }
    trailer(&mut archive).on("write", dest)?;
    archive.finish().on("write", dest)?;
    Ok(())
}

/// All members, folders before what is in them.
fn entries(manifest: &Initramfs, contents: &[Content]) -> Vec<Entry> {
    let directories = manifest.directories.iter().map(|path| Entry {
        path: path.clone(),
        mode: 0o755,
        kind: Kind::Directory,
    });
    let nodes = manifest.node.iter().map(|node| Entry {
        path: node.path.clone(),
        mode: node.mode,
        kind: Kind::Node { major: node.major, minor: node.minor },
    });
    let links = manifest.link.iter().map(|link| Entry {
        path: link.path.clone(),
        mode: 0o777,
        kind: Kind::Link(link.target.clone()),
    });
    let files = manifest.file.iter().flat_map(|member| {
        contents.iter().filter(|c| c.part == member.from).map(|content| Entry {
            path: match member.from {
                Part::Modules => format!("{}/{}", member.path, content.name),
                Part::Storm | Part::Busybox => member.path.clone(),
            },
            mode: member.mode,
            kind: Kind::File(content.file.clone()),
        })
    });
    let mut entries: Vec<_> = directories.chain(nodes).chain(links).chain(files).collect();
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;
    use flate2::read::GzDecoder;
    use std::io::Read;

    const MANIFEST: &str = "directories = ['lib', 'lib/modules', 'dev']\n\
        [[node]]\npath = 'dev/console'\nmode = 0o600\nmajor = 5\nminor = 1\n\
        [[link]]\npath = 'lib/init'\ntarget = '/init'\n\
        [[file]]\npath = 'init'\nfrom = 'storm'\nmode = 0o755\n\
        [[file]]\npath = 'lib/modules'\nfrom = 'modules'\nmode = 0o644\n";

    #[test]
    fn programs_are_added_behind_the_archive() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let manifest: Initramfs = toml::from_str(MANIFEST).expect("manifest");
        let (base, all) = (dir.path().join("base"), dir.path().join("all"));
        write(&manifest, &[], &base).expect("write");
        let program = dir.path().join("hmm-tests");
        fs::write(&program, "tests").expect("write");
        extend(&base, &[("bin/hmm-tests", program)], &all).expect("extend");
        let (base, all) = (fs::read(&base).expect("read"), fs::read(&all).expect("read"));
        let added = all.strip_prefix(&base[..]).expect("the base comes first");
        let mut plain = Vec::new();
        GzDecoder::new(added).read_to_end(&mut plain).expect("gzip");
        let mut reader = Reader::new(&plain[..]).expect("member");
        assert_eq!((reader.entry().name(), reader.entry().mode()), ("bin/hmm-tests", 0o100_755));
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("content");
        assert_eq!(text, "tests");
        assert!(Reader::new(reader.finish().expect("next")).expect("member").entry().is_trailer());
    }

    #[test]
    fn archive_is_whole_and_always_the_same() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let manifest: Initramfs = toml::from_str(MANIFEST).expect("manifest");
        let content = |part, name: &str, text: &str| {
            let file = dir.path().join(name);
            fs::write(&file, text).expect("write");
            Content { part, name: name.to_owned(), file }
        };
        let mut contents = vec![
            content(Part::Storm, "storm", "program"),
            content(Part::Modules, "b.ko", "module b"),
            content(Part::Modules, "a.ko", "module a"),
        ];
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        write(&manifest, &contents, &one).expect("write");
        contents.reverse();
        contents.push(content(Part::Storm, "storm", "program")); // a newer file of the same content
        contents.remove(2);
        write(&manifest, &contents, &two).expect("write");
        let bytes = fs::read(&one).expect("read");
        assert_eq!(bytes, fs::read(&two).expect("read"));

        let mut plain = Vec::new();
        GzDecoder::new(&bytes[..]).read_to_end(&mut plain).expect("gzip");
        let mut rest = &plain[..];
        let mut seen = Vec::new();
        loop {
            let mut reader = Reader::new(rest).expect("member");
            if reader.entry().is_trailer() {
                break;
            }
            let mut text = String::new();
            reader.read_to_string(&mut text).expect("content");
            let entry = reader.entry();
            assert_eq!(entry.mtime(), 0);
            seen.push(format!(
                "{} {:o} {},{} {text}",
                entry.name(),
                entry.mode(),
                entry.rdev_major(),
                entry.rdev_minor()
            ));
            rest = reader.finish().expect("next");
        }
        assert_eq!(
            seen,
            [
                "dev 40755 0,0 ",
                "dev/console 20600 5,1 ",
                "init 100755 0,0 program",
                "lib 40755 0,0 ",
                "lib/init 120777 0,0 /init",
                "lib/modules 40755 0,0 ",
                "lib/modules/a.ko 100644 0,0 module a",
                "lib/modules/b.ko 100644 0,0 module b",
            ]
        );
    }
}
