//! A whole store, flattened.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fs_err as fs;

use super::bytes::FormatError;
use super::manifest::{Location, Manifest, Version};
use super::node::{Budget, MAX_KEY, Node, Value};

/// No honest block comes near this.
const MAX_BLOCK: u64 = 256 << 20;

/// Name of the manifest.
const MANIFEST: &str = "manifest.ocdbt";

/// What can go wrong when a store is opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused; the source names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A manifest is damaged.
    #[error("manifest {path} cannot be read: {source}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// A manifest points to numbered manifests, and there are none.
    #[error("{path} says that numbered manifests lie beside it, and there are none")]
    NoNumbered {
        /// The manifest.
        path: PathBuf,
    },
    /// A manifest without any version: nothing was ever committed.
    #[error("{path} holds no version: nothing was ever committed to it")]
    NoVersion {
        /// The manifest.
        path: PathBuf,
    },
    /// A node is damaged.
    #[error("B+tree node at byte {offset} of {path} cannot be read: {source}")]
    Node {
        /// The data file.
        path: PathBuf,
        /// Where the node starts.
        offset: u64,
        /// What is wrong.
        source: FormatError,
    },
    /// Two stores of the same checkpoint disagree.
    #[error("key {key:?} has different values in {first} and in {second}")]
    Conflict {
        /// The key.
        key: String,
        /// One store.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
}

/// A value in a flattened store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// The bytes themselves.
    Inline(Box<[u8]>),
    /// A range of file number `file`.
    Range {
        /// Index into [`Store::files`].
        file: u32,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

impl Kept {
    /// Number of bytes of the value.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Kept::Inline(b) => b.len() as u64,
            Kept::Range { length, .. } => *length,
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Box<[u8]>,
    /// The value.
    pub value: Kept,
}

/// Every key of the newest version of one store, or of several merged.
#[derive(Debug, Clone, Default)]
pub struct Store {
    files: Vec<PathBuf>,
    ids: HashMap<PathBuf, u32>,
    entries: Vec<Entry>,
    versions: usize,
    nodes: usize,
    height: u8,
}

impl Store {
    /// Reads the manifest and all nodes of the store at `root`.
    ///
    /// # Errors
    /// When a file is missing, or any byte of the manifest or a node is not as it must be.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let mut store = Store::default();
        store.add(root, &mut Budget::default())?;
        Ok(store)
    }

    /// Reads several stores whose keys together make one, as the processes of a job leave them when nobody merged them.
    ///
    /// # Errors
    /// As [`open`](Store::open), and when two of them hold different values for one key.
    pub fn open_all(roots: &[PathBuf]) -> Result<Self, StoreError> {
        let mut merged = Store::default();
        let mut budget = Budget::default();
        // Index of the store that each entry came from, for messages.
        let mut origin: Vec<usize> = Vec::new();
        for (i, root) in roots.iter().enumerate() {
            merged.add(root, &mut budget)?;
            origin.resize(merged.entries.len(), i);
        }
        let mut order: Vec<usize> = (0..merged.entries.len()).collect();
        order.sort_by(|&a, &b| merged.entries[a].key.cmp(&merged.entries[b].key));
        let mut kept: Vec<Entry> = Vec::with_capacity(order.len());
        let mut last = 0;
        for i in order {
            let entry = &merged.entries[i];
            match kept.last() {
                Some(before) if before.key == entry.key => {
                    if !merged.same(&before.value, &entry.value)? {
                        return Err(StoreError::Conflict {
                            key: String::from_utf8_lossy(&entry.key).into_owned(),
                            first: roots[origin[last]].clone(),
                            second: roots[origin[i]].clone(),
                        });
                    }
                }
                _ => {
                    kept.push(entry.clone());
                    last = i;
                }
            }
        }
        merged.entries = kept;
        Ok(merged)
    }

    /// The data files, absolute or relative as `root` was.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All entries in key order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of versions in the manifest.
    #[must_use]
    pub fn versions(&self) -> usize {
        self.versions
    }

    /// Number of nodes read.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Height of the tree: 0 when the root is a leaf.
    #[must_use]
    pub fn height(&self) -> u8 {
        self.height
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Kept> {
        self.entries.binary_search_by(|e| (*e.key).cmp(key)).ok().map(|i| &self.entries[i].value)
    }

    /// All entries whose key starts with `prefix`.
    #[must_use]
    pub fn below(&self, prefix: &[u8]) -> &[Entry] {
        let start = self.entries.partition_point(|e| &*e.key < prefix);
        let rest = &self.entries[start..];
        let n = rest.partition_point(|e| e.key.starts_with(prefix));
        &rest[..n]
    }

    /// The bytes of a value.
    ///
    /// # Errors
    /// When the range is not in its file.
    pub fn read(&self, value: &Kept) -> io::Result<Vec<u8>> {
        match value {
            Kept::Inline(b) => Ok(b.to_vec()),
            Kept::Range { file, offset, length } => read_range(&self.files[*file as usize], *offset, *length),
        }
    }

    fn same(&self, a: &Kept, b: &Kept) -> io::Result<bool> {
        // Array metadata is what processes write alike; anything large has one owner.
        Ok(a == b || (a.len() == b.len() && a.len() <= 1 << 20 && self.read(a)? == self.read(b)?))
    }

    fn add(&mut self, root: &Path, budget: &mut Budget) -> Result<(), StoreError> {
        let (path, manifest) = read_manifest(root)?;
        let versions = manifest.versions.as_deref().unwrap_or_default();
        let Some(version) = versions.last() else { return Err(StoreError::NoVersion { path }) };
        self.versions = self.versions.max(versions.len());
        let start = self.entries.len();
        if let Version { root: Some(location), root_height, .. } = version {
            self.height = self.height.max(*root_height);
            let mut walk = Walk { store: self, root, budget, start, seen: HashSet::new() };
            walk.node(location, *root_height, &[], "")?;
        }
        let found = (self.entries.len() - start) as u64;
        if found != version.num_keys {
            let source = FormatError::Invalid(format!("it counts {} keys and the tree has {found}", version.num_keys));
            return Err(StoreError::Manifest { path, source });
        }
        Ok(())
    }

    fn intern(&mut self, path: PathBuf) -> u32 {
        if let Some(&id) = self.ids.get(&path) {
            return id;
        }
        let id = self.files.len() as u32;
        self.files.push(path.clone());
        self.ids.insert(path, id);
        id
    }
}

/// A depth-first walk over one tree.
struct Walk<'a> {
    store: &'a mut Store,
    root: &'a Path,
    budget: &'a mut Budget,
    // Entries of stores read before this one.
    start: usize,
    seen: HashSet<(PathBuf, u64)>,
}

impl Walk<'_> {
    /// Adds everything below a node. `prefix` starts every key, `transitive` every file name found in it.
    fn node(&mut self, at: &Location, height: u8, prefix: &[u8], transitive: &str) -> Result<(), StoreError> {
        let file = at.file.below(transitive);
        let path = self.root.join(file.path());
        let broken = |source| StoreError::Node { path: path.clone(), offset: at.offset, source };
        // Levels only ever go down, so a walk ends; but a node with two parents could still make it exponentially long.
        if !self.seen.insert((path.clone(), at.offset)) {
            return Err(broken(FormatError::Invalid("the tree refers to it twice".into())));
        }
        if at.length > MAX_BLOCK {
            return Err(broken(FormatError::Limit { what: "node size", value: at.length, limit: MAX_BLOCK }));
        }
        let node = Node::decode(&read_range(&path, at.offset, at.length)?, self.budget).map_err(broken)?;
        if node.height() != height {
            return Err(broken(FormatError::Invalid(format!(
                "it has height {} where the tree has {height}",
                node.height()
            ))));
        }
        self.store.nodes += 1;
        match node {
            Node::Leaf(entries) => {
                for (key, value) in entries {
                    let key = join(prefix, &key).map_err(broken)?;
                    self.budget.spend(prefix.len()).map_err(broken)?;
                    self.push(key, value, &file.base).map_err(broken)?;
                }
            }
            Node::Interior { children, .. } => {
                for child in children {
                    let shared = join(prefix, &child.key[..child.common_prefix]).map_err(broken)?;
                    let first = join(prefix, &child.key).map_err(broken)?;
                    let before = self.store.entries.len();
                    self.node(&child.location, height - 1, &shared, &file.base)?;
                    let added = &self.store.entries[before..];
                    if added.first().is_some_and(|e| *e.key < *first) {
                        return Err(broken(FormatError::Invalid("a child holds keys below its own range".into())));
                    }
                    if added.len() as u64 != child.num_keys {
                        return Err(broken(FormatError::Invalid(format!(
                            "it counts {} keys below a child that has {}",
                            child.num_keys,
                            added.len()
                        ))));
                    }
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, key: Vec<u8>, value: Value, transitive: &str) -> Result<(), FormatError> {
        // Order across nodes is what makes lookups right.
        if self.store.entries[self.start..].last().is_some_and(|e| *e.key >= *key) {
            return Err(FormatError::Invalid("its keys do not follow those of the node before it".into()));
        }
        let value = match value {
            Value::Inline(b) => Kept::Inline(b.into()),
            Value::Indirect(l) => {
                let file = self.store.intern(self.root.join(l.file.below(transitive).path()));
                Kept::Range { file, offset: l.offset, length: l.length }
            }
        };
        self.store.entries.push(Entry { key: key.into(), value });
        Ok(())
    }
}

fn join(prefix: &[u8], key: &[u8]) -> Result<Vec<u8>, FormatError> {
    let n = prefix.len() + key.len();
    if n > MAX_KEY {
        return Err(FormatError::Limit { what: "key length", value: n as u64, limit: MAX_KEY as u64 });
    }
    Ok([prefix, key].concat())
}

fn read_manifest(root: &Path) -> Result<(PathBuf, Manifest), StoreError> {
    let path = root.join(MANIFEST);
    let manifest = decode_manifest(&path)?;
    if manifest.versions.is_some() {
        return Ok((path, manifest));
    }
    let mut newest: Option<String> = None;
    for entry in fs::read_dir(root)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let numbered = name
            .strip_prefix("manifest.")
            .is_some_and(|s| s.len() == 16 && s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
        if numbered && newest.as_ref().is_none_or(|n| *n < name) {
            newest = Some(name);
        }
    }
    let Some(name) = newest else { return Err(StoreError::NoNumbered { path }) };
    let path = root.join(name);
    let manifest = decode_manifest(&path)?;
    Ok((path, manifest))
}

fn decode_manifest(path: &Path) -> Result<Manifest, StoreError> {
    let size = fs::metadata(path)?.len();
    let broken = |source| StoreError::Manifest { path: path.to_owned(), source };
    if size > MAX_BLOCK {
        return Err(broken(FormatError::Limit { what: "size", value: size, limit: MAX_BLOCK }));
    }
    Manifest::decode(&fs::read(path)?).map_err(broken)
}

/// Reads a range after checking that the file has it, so that an absurd length costs nothing.
fn read_range(path: &Path, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    let end = offset.checked_add(length).filter(|&e| e <= size);
    let (Some(_), Ok(n)) = (end, usize::try_from(length)) else {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{} has {size} bytes; {length} bytes at byte {offset} are needed", path.display()),
        ));
    };
    let mut bytes = vec![0; n];
    file.file()
        .read_exact_at(&mut bytes, offset)
        .map_err(|e| io::Error::new(e.kind(), format!("failed to read from {}: {e}", path.display())))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::node::Child;
    use super::super::{Config, DataFile};
    use super::*;

    fn at(file: &str, offset: u64, length: u64) -> Location {
        Location { file: DataFile::new(file), offset, length }
    }

    fn inline(key: &str) -> (Vec<u8>, Value) {
        (key.into(), Value::Inline(key.as_bytes().to_vec()))
    }

    fn manifest(root: Location, root_height: u8, num_keys: u64) -> Manifest {
        Manifest {
            config: Config {
                uuid: [7; 16],
                max_inline_value_bytes: 1024,
                max_decoded_node_bytes: 1 << 20,
                version_tree_arity_log2: 4,
                zstd_level: None,
            },
            versions: Some(vec![Version {
                generation: 1,
                root_height,
                root: Some(root),
                num_keys,
                num_tree_bytes: 0,
                num_indirect_value_bytes: 0,
                commit_time: 0,
            }]),
        }
    }

    fn child(key: &str, common_prefix: usize, location: Location, num_keys: u64) -> Child {
        let key = key.as_bytes().to_vec();
        Child { key, common_prefix, location, num_keys, num_tree_bytes: 0, num_indirect_value_bytes: 0 }
    }

    /// Writes blocks one after the other into `d/n` and gives their places.
    fn blocks(root: &Path, nodes: &[Node]) -> Vec<Location> {
        fs::create_dir_all(root.join("d")).unwrap();
        let mut all = Vec::new();
        let places = nodes
            .iter()
            .map(|n| {
                let b = n.encode();
                let place = at("d/n", all.len() as u64, b.len() as u64);
                all.extend(b);
                place
            })
            .collect();
        fs::write(root.join("d/n"), all).unwrap();
        places
    }

    fn commit(root: &Path, m: &Manifest) {
        fs::write(root.join(MANIFEST), m.encode()).unwrap();
    }

    #[test]
    fn a_tree_of_height_one_is_flattened() {
        let tmp = tempfile::tempdir().unwrap();
        let leaves = [Node::Leaf(vec![inline("a/x"), inline("a/y")]), Node::Leaf(vec![inline("1"), inline("2")])];
        let p = blocks(tmp.path(), &leaves);
        let children = vec![child("a/x", 0, p[0].clone(), 2), child("b/1", 2, p[1].clone(), 2)];
        let mut nodes = leaves.to_vec();
        nodes.push(Node::Interior { height: 1, children });
        let p = blocks(tmp.path(), &nodes);
        commit(tmp.path(), &manifest(p[2].clone(), 1, 4));
        let store = Store::open(tmp.path()).unwrap();
        let keys: Vec<_> = store.entries().iter().map(|e| String::from_utf8_lossy(&e.key).into_owned()).collect();
        assert_eq!(keys, ["a/x", "a/y", "b/1", "b/2"]);
        assert_eq!(store.read(store.get(b"b/1").unwrap()).unwrap(), b"1");
        assert_eq!(store.below(b"a/").len(), 2);
        assert_eq!((store.nodes(), store.height()), (3, 1));

        // The same, found through a numbered manifest.
        let mut m = manifest(p[2].clone(), 1, 4);
        fs::write(tmp.path().join("manifest.000000000000000a"), m.encode()).unwrap();
        fs::write(tmp.path().join("manifest.0000000000000009"), "old").unwrap();
        m.versions = None;
        commit(tmp.path(), &m);
        assert_eq!(Store::open(tmp.path()).unwrap().entries().len(), 4);
        fs::remove_file(tmp.path().join("manifest.000000000000000a")).unwrap();
        assert!(matches!(Store::open(tmp.path()), Err(StoreError::Manifest { .. })));
        fs::remove_file(tmp.path().join("manifest.0000000000000009")).unwrap();
        assert!(matches!(Store::open(tmp.path()), Err(StoreError::NoNumbered { .. })));
    }

    #[test]
    fn loops_and_shared_children_are_errors() {
        let tmp = tempfile::tempdir().unwrap();
        // A node that names itself as its child: the place is known in advance because the block starts at 0.
        let own = |n: u64| Node::Interior { height: 1, children: vec![child("a", 0, at("d/n", 0, n), 1)] };
        let n = own(100).encode().len() as u64;
        let p = blocks(tmp.path(), &[own(n)]);
        commit(tmp.path(), &manifest(p[0].clone(), 1, 1));
        let e = Store::open(tmp.path()).unwrap_err().to_string();
        assert!(e.contains("refers to it twice"), "{e}");

        // Two parents' worth of one child under different prefixes: without a check, n levels make 2^n leaves.
        let mut nodes = vec![Node::Leaf(vec![inline("k")])];
        for height in 1..40 {
            let place = blocks(tmp.path(), &nodes).pop().unwrap();
            let pair = |p: &Location| vec![child("ak", 1, p.clone(), 1), child("bk", 1, p.clone(), 1)];
            nodes.push(Node::Interior { height, children: pair(&place) });
        }
        let place = blocks(tmp.path(), &nodes).pop().unwrap();
        commit(tmp.path(), &manifest(place, 39, 1 << 39));
        let e = Store::open(tmp.path()).unwrap_err().to_string();
        assert!(e.contains("twice"), "{e}");
    }

    #[test]
    fn ranges_past_the_end_are_errors() {
        let tmp = tempfile::tempdir().unwrap();
        let p = blocks(tmp.path(), &[Node::Leaf(vec![inline("k")])]);
        for (offset, length) in [(0, 1 << 60), (1 << 60, 10), (u64::MAX - 1, 10), (0, 100_000), (p[0].length, 1)] {
            commit(tmp.path(), &manifest(at("d/n", offset, length), 0, 1));
            assert!(Store::open(tmp.path()).is_err(), "{offset} {length}");
        }
        commit(tmp.path(), &manifest(at("d/absent", 0, 10), 0, 1));
        let e = Store::open(tmp.path()).unwrap_err().to_string();
        assert!(e.contains("d/absent"), "{e}");
        commit(tmp.path(), &manifest(p[0].clone(), 1, 1));
        assert!(Store::open(tmp.path()).unwrap_err().to_string().contains("height"));
        commit(tmp.path(), &manifest(p[0].clone(), 0, 2));
        assert!(Store::open(tmp.path()).unwrap_err().to_string().contains("counts 2 keys"));
        commit(tmp.path(), &manifest(p[0].clone(), 0, 1));
        assert!(Store::open(tmp.path()).is_ok());
    }

    #[test]
    fn stores_of_several_processes_make_one() {
        let tmp = tempfile::tempdir().unwrap();
        let roots = [tmp.path().join("ocdbt.process_0"), tmp.path().join("ocdbt.process_1")];
        let write = |root: &Path, entries: Vec<(Vec<u8>, Value)>| {
            let n = entries.len() as u64;
            let p = blocks(root, &[Node::Leaf(entries)]);
            commit(root, &manifest(p[0].clone(), 0, n));
        };
        write(&roots[0], vec![inline("a"), inline("c")]);
        write(&roots[1], vec![inline("a"), inline("b")]);
        let store = Store::open_all(&roots).unwrap();
        let keys: Vec<_> = store.entries().iter().map(|e| e.key[0]).collect();
        assert_eq!(keys, b"abc");
        write(&roots[1], vec![(b"a".to_vec(), Value::Inline(b"other".to_vec()))]);
        assert!(matches!(Store::open_all(&roots), Err(StoreError::Conflict { .. })));
    }
}
