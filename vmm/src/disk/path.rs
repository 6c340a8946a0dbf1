//! From a path to a file, in a tree that a guest has made.

use std::collections::VecDeque;

/// Symbolic links on one way, as Linux has it (MAXSYMLINKS).
const LINKS_MAX: usize = 40;
/// Names on one way, those that links lead to included.
const NAMES_MAX: usize = 4096;

/// Directories and what is in them.
pub(crate) trait Tree {
    /// A file, a directory, a link.
    type Node;
    /// Why something cannot be read.
    type Error;

    /// The root directory.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    fn root(&self) -> Result<Self::Node, Self::Error>;

    /// What has this name in a directory; `None` if nothing has, or it is no directory.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    fn child(&self, directory: &Self::Node, name: &[u8])
    -> Result<Option<Self::Node>, Self::Error>;

    /// Where a symbolic link leads; `None` if it is none.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    fn link(&self, node: &Self::Node) -> Result<Option<Vec<u8>>, Self::Error>;
}

/// A file of a guest, with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeFile {
    /// Its kind and permissions, as in `st_mode`.
    pub mode: u32,
    /// Its user and group.
    pub owner: (u32, u32),
    /// When it was last written, in seconds since 1970.
    pub modified: u32,
    /// What is in it, or where it leads if it is a symbolic link.
    pub content: Vec<u8>,
}

impl TreeFile {
    /// The longest that is looked at.
    pub(crate) const BYTES_MAX: u64 = 512 << 20;
    const KIND: u32 = 0o170_000;

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.mode & TreeFile::KIND == 0o100_000
    }

    /// Whether it is a symbolic link.
    pub fn is_link(&self) -> bool {
        self.mode & TreeFile::KIND == 0o120_000
    }
}

/// What a path leads to, from the root; if that is a symbolic link and `follow` says so, what it leads to. `None` if there
/// is nothing, or links lead in a circle.
///
/// # Errors
///
/// What is on the way cannot be read.
pub(crate) fn resolve<T: Tree>(
    tree: &T,
    path: &[u8],
    follow: bool,
) -> Result<Option<T::Node>, T::Error> {
    let names = |path: &[u8]| -> VecDeque<Vec<u8>> {
        path.split(|byte| *byte == b'/')
            .map(<[u8]>::to_vec)
            .collect()
    };
    let mut left = names(path);
    // The directories on the way from the root, and at the end what was found.
    let mut way = vec![tree.root()?];
    let (mut links, mut count) = (0, 0);
    while let Some(name) = left.pop_front() {
        count += 1;
        if count > NAMES_MAX {
            return Ok(None);
        }
        match &*name {
            b"" | b"." => continue,
            b".." => {
                // Above the root is the root.
                way.truncate((way.len() - 1).max(1));
                continue;
            }
            _ => {}
        }
        let here = way.last().expect("the root stays");
        let Some(node) = tree.child(here, &name)? else {
            return Ok(None);
        };
        let is_last = left.iter().all(|name| name.is_empty());
        let target = match follow || !is_last {
            true => tree.link(&node)?,
            false => None,
        };
        let Some(target) = target else {
            way.push(node);
            continue;
        };
        links += 1;
        if links > LINKS_MAX {
            return Ok(None);
        }
        if target.starts_with(b"/") {
            way.truncate(1);
        }
        let mut longer = names(&target);
        longer.append(&mut left);
        left = longer;
        if left.len() > NAMES_MAX {
            return Ok(None);
        }
    }
    Ok(way.pop())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use super::*;

    /// Paths, and where those of them lead that are links.
    struct Toy(BTreeMap<&'static str, Option<&'static str>>);

    impl Tree for Toy {
        type Node = String;
        type Error = Infallible;

        fn root(&self) -> Result<String, Infallible> {
            Ok(String::new())
        }

        fn child(&self, directory: &String, name: &[u8]) -> Result<Option<String>, Infallible> {
            let path = format!("{directory}/{}", String::from_utf8_lossy(name));
            Ok(self.0.contains_key(&*path).then_some(path))
        }

        fn link(&self, node: &String) -> Result<Option<Vec<u8>>, Infallible> {
            let target = self.0.get(&**node).copied().flatten();
            Ok(target.map(|target| target.as_bytes().to_vec()))
        }
    }

    #[test]
    fn a_path_leads_where_links_and_dots_lead_and_never_out_of_the_tree_nor_round_for_ever() {
        let toy = Toy(BTreeMap::from([
            ("/lib", Some("usr/lib")),
            ("/usr", None),
            ("/usr/lib", None),
            ("/usr/lib/libc.so.6", Some("libc-2.36.so")),
            ("/usr/lib/libc-2.36.so", None),
            ("/usr/lib/absolute", Some("/usr/../lib/libc.so.6")),
            ("/usr/lib/above", Some("../../../../usr")),
            ("/round", Some("/round")),
            ("/there", Some("/back")),
            ("/back", Some("there")),
            ("/longer", Some("longer/x")),
        ]));
        let leads = |path: &str, follow| {
            let Ok(found) = resolve(&toy, path.as_bytes(), follow);
            found
        };
        let libc = Some("/usr/lib/libc-2.36.so".to_string());
        for path in [
            "/lib/libc.so.6",
            "lib//./libc.so.6",
            "/usr/lib/absolute",
            "/../lib/above/lib/libc-2.36.so",
        ] {
            assert_eq!(leads(path, true), libc, "{path}");
        }
        assert_eq!(
            leads("/lib/libc.so.6", false),
            Some("/usr/lib/libc.so.6".into())
        );
        assert_eq!(leads("/", true), Some(String::new()));
        for path in [
            "/round",
            "/there",
            "/longer",
            "/usr/lib/none",
            "/lib/libc.so.6/x",
        ] {
            assert_eq!(leads(path, true), None, "{path}");
        }
    }
}
