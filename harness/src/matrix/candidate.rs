//! What a plan puts in a column: a variant of the list, or a patch, a series or a tree of the user's own.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::plan::OneOrMany;
use crate::build::Request;
use crate::build::patches::UserPatch;

/// One value of a group's factor `variant`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Candidate {
    /// A variant of `hmmstorm list variants`, or several as A+B.
    Listed(String),
    /// The user's.
    Own(Own),
}

/// A word or a table. Without this a list of words would be a table as well, for serde reads a structure's fields in order
/// from a list.
impl<'de> Deserialize<'de> for Candidate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordOrTable;

        impl<'de> Visitor<'de> for WordOrTable {
            type Value = Candidate;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a variant, or a table with a patch, a mbox or a tree")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Candidate, E> {
                Ok(Candidate::Listed(name.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Candidate, A::Error> {
                Own::deserialize(MapAccessDeserializer::new(table)).map(Candidate::Own)
            }
        }

        deserializer.deserialize_any(WordOrTable)
    }
}

/// A candidate of the user's: a patch or a series, on a kernel of the list or on a tree of theirs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// What to call it, in selectors and reports; by default the names of its parts, joined by `+`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Variants of the list below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
    /// Kernel source tree, in place of the group's kernels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<PathBuf>,
    /// Kernels of the list that it is for; by default all of the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<OneOrMany<String>>,
    /// Diffs or mails, applied in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch: Option<OneOrMany<PathBuf>>,
    /// Mailboxes, applied after every patch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mbox: Option<OneOrMany<PathBuf>>,
}

fn all<T>(given: Option<&OneOrMany<T>>) -> &[T] {
    given.map_or(&[], OneOrMany::as_slice)
}

impl Own {
    /// The candidate that is one `--patch`.
    #[must_use]
    pub fn of_patch(file: &Path) -> Self {
        Self { patch: Some(OneOrMany::One(file.into())), ..Self::default() }
    }

    /// The candidate that is one `--mbox`.
    #[must_use]
    pub fn of_mailbox(file: &Path) -> Self {
        Self { mbox: Some(OneOrMany::One(file.into())), ..Self::default() }
    }

    /// The candidate that is one `--tree`.
    #[must_use]
    pub fn of_tree(dir: &Path) -> Self {
        Self { tree: Some(dir.into()), ..Self::default() }
    }

    /// What is wrong with it.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.tree.is_none() && all(self.patch.as_ref()).is_empty() && all(self.mbox.as_ref()).is_empty() {
            return Err("a variant of your own needs a patch, a mbox or a tree".into());
        }
        if self.tree.is_some() && self.kernel.is_some() {
            return Err("a tree is a kernel by itself: leave out its 'kernel'".into());
        }
        Ok(())
    }

    /// With the paths as they are from `folder`.
    pub(super) fn resolved(&self, folder: &Path) -> Self {
        let join = |given: &Option<OneOrMany<PathBuf>>| {
            let files = all(given.as_ref()).iter().map(|file| folder.join(file)).collect();
            given.as_ref().map(|_| OneOrMany::Many(files))
        };
        Self {
            tree: self.tree.as_ref().map(|dir| folder.join(dir)),
            patch: join(&self.patch),
            mbox: join(&self.mbox),
            ..self.clone()
        }
    }

    /// Whether it is for this kernel of the group; a tree stands beside any.
    pub(super) fn is_for(&self, kernel: &str) -> bool {
        self.kernel.as_ref().is_none_or(|kernels| kernels.as_slice().iter().any(|name| name == kernel))
    }

    fn files(&self) -> Vec<UserPatch> {
        let patches = all(self.patch.as_ref()).iter().cloned().map(UserPatch::Patch);
        patches.chain(all(self.mbox.as_ref()).iter().cloned().map(UserPatch::Mailbox)).collect()
    }

    /// What to build for it: on its tree, or on this kernel of the list.
    #[must_use]
    pub fn request(&self, kernel: &str, flavour: Option<&str>) -> Request {
        Request {
            kernel: self.tree.is_none().then(|| kernel.to_owned()),
            tree: self.tree.clone(),
            variant: self.on.clone(),
            patches: self.files(),
            flavour: flavour.map(str::to_owned),
            name: self.name.clone(),
        }
    }

    /// The options of `hmmstorm storm` that ask for the same, as name and value.
    pub(super) fn options(&self) -> Vec<(&'static str, String)> {
        let tree = self.tree.iter().map(|dir| ("tree", dir.display().to_string()));
        let on = self.on.iter().map(|on| ("variant", on.clone()));
        let files = self.files();
        let files = files.iter().map(|given| {
            let option = match given {
                UserPatch::Patch(_) => "patch",
                UserPatch::Mailbox(_) => "mbox",
            };
            (option, given.file().display().to_string())
        });
        tree.chain(on).chain(files).collect()
    }
}

impl fmt::Display for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => f.write_str(&self.request("", None).variant_name("")),
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listed(name) => f.write_str(name),
            Self::Own(own) => own.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_it_is_made_of() {
        let own = Own::of_patch(Path::new("a/my.patch"));
        assert_eq!(own.to_string(), "my.patch");
        assert_eq!(Own { on: Some("entry-wait".into()), ..own.clone() }.to_string(), "entry-wait+my.patch");
        assert_eq!(Own { name: Some("v2".into()), ..own.clone() }.to_string(), "v2");
        let tree =
            Own { mbox: Some(OneOrMany::One("x.mbox".into())), ..Own::of_tree(Path::new("/src/linux/")) };
        assert_eq!(tree.to_string(), "tree-linux+x.mbox");
        assert_eq!(tree.options(), [("tree", "/src/linux/".to_owned()), ("mbox", "x.mbox".to_owned())]);
    }

    #[test]
    fn paths_are_the_plan_files() {
        let own = Own::of_patch(Path::new("my.patch")).resolved(Path::new("/plans"));
        assert_eq!(own.request("6.19.6", None).patches, [UserPatch::Patch("/plans/my.patch".into())]);
        let absolute = Own::of_patch(Path::new("/x/my.patch")).resolved(Path::new("/plans"));
        assert_eq!(absolute.request("6.19.6", None).patches, [UserPatch::Patch("/x/my.patch".into())]);
    }

    #[test]
    fn nothing_is_no_candidate() {
        assert!(Own::default().check().is_err());
        let tree = Own { kernel: Some(OneOrMany::One("6.19.6".into())), ..Own::of_tree(Path::new("x")) };
        assert!(tree.check().is_err());
        assert!(Own::of_mailbox(Path::new("x")).check().is_ok());
    }
}
