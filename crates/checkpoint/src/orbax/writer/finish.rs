//! Everything that is written after the chunks: tree, metadata, marks of completion.

use std::io;
use std::path::Path;

use fs_err as fs;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::plan::{LinkedFile, OrbaxOptions};
use crate::orbax::checksums::Checksums;
use crate::orbax::container::MANIFEST;
use crate::orbax::ocdbt::{Child, Config, DataFile, Location, Manifest, Node, Value as Stored, Version};

/// Entries of one leaf; a checkpoint of more gets a tree of two levels.
const LEAF_ENTRIES: usize = 1 << 18;

/// File with the nodes of the tree.
const NODES: &str = "d/tree";

const HANDLER: &str = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler";

/// Writes a small file of an item directory and records its checksum.
pub(super) fn put(items: &Path, name: &str, bytes: &[u8], sums: &mut Checksums) -> io::Result<()> {
    let path = items.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, bytes)?;
    sums.insert(name.to_owned(), bytes.len() as u64, crc32c::crc32c(bytes));
    Ok(())
}

/// Cuts the entries into leaves and puts a root on top if there are several. Gives all blocks and where the root is.
fn tree(entries: Vec<(Vec<u8>, Stored)>, per_leaf: usize) -> (Vec<u8>, Location, u8) {
    let at = |offset: usize, length: usize| Location {
        file: DataFile::new(NODES),
        offset: offset as u64,
        length: length as u64,
    };
    let mut bytes = Vec::new();
    let mut children = Vec::new();
    for leaf in entries.chunks(per_leaf) {
        let indirect = leaf.iter().map(|(_, v)| if let Stored::Indirect(l) = v { l.length } else { 0 }).sum();
        let block = Node::Leaf(leaf.to_vec()).encode();
        children.push(Child {
            key: leaf[0].0.clone(),
            common_prefix: 0,
            location: at(bytes.len(), block.len()),
            num_keys: leaf.len() as u64,
            num_tree_bytes: block.len() as u64,
            num_indirect_value_bytes: indirect,
        });
        bytes.extend(block);
    }
    if let [only] = children.as_slice() {
        let location = only.location.clone();
        return (bytes, location, 0);
    }
    let block = Node::Interior { height: 1, children }.encode();
    let location = at(bytes.len(), block.len());
    bytes.extend(block);
    (bytes, location, 1)
}

/// Writes the tree and the manifest of a store. `entries` must not be empty.
pub(super) fn store(
    items: &Path,
    mut entries: Vec<(Vec<u8>, Stored)>,
    time: u64,
    sums: &mut Checksums,
) -> io::Result<()> {
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let num_keys = entries.len() as u64;
    let indirect = entries.iter().map(|(_, v)| if let Stored::Indirect(l) = v { l.length } else { 0 }).sum();
    let (blocks, root, root_height) = tree(entries, LEAF_ENTRIES);
    put(items, NODES, &blocks, sums)?;
    let mut uuid = [0; 16];
    // The same content has the same name, so that writing it again gives the same bytes.
    uuid.copy_from_slice(&Sha256::digest(&blocks)[..16]);
    let manifest = Manifest {
        config: Config {
            uuid,
            max_inline_value_bytes: super::plan::INLINE as u64,
            max_decoded_node_bytes: 100_000_000,
            version_tree_arity_log2: 4,
            zstd_level: None,
        },
        versions: Some(vec![Version {
            generation: 1,
            root_height,
            root: Some(root),
            num_keys,
            num_tree_bytes: blocks.len() as u64,
            num_indirect_value_bytes: indirect,
            commit_time: time,
        }]),
    };
    put(items, MANIFEST, &manifest.encode(), sums)
}

/// `_CHECKPOINT_METADATA` of an item, or of the step around it.
pub(super) fn checkpoint_metadata(options: &OrbaxOptions, time: u64, of_step: bool) -> Vec<u8> {
    let handlers: Value = if of_step { json!({"items": HANDLER}) } else { json!(HANDLER) };
    let mut o = Map::new();
    o.insert("item_handlers".into(), handlers);
    o.insert("metrics".into(), json!({}));
    o.insert("performance_metrics".into(), json!({}));
    o.insert("init_timestamp_nsecs".into(), json!(time));
    o.insert("commit_timestamp_nsecs".into(), json!(time));
    o.insert("custom_metadata".into(), Value::Object(options.custom_metadata.clone()));
    Value::Object(o).to_string().into_bytes()
}

/// Puts a link to a file into the item directory.
pub(super) fn link(items: &Path, link: &LinkedFile) -> io::Result<()> {
    let path = items.join(&link.name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let target = fs::canonicalize(&link.target)?;
    if path.symlink_metadata().is_ok() {
        fs::remove_file(&path)?;
    }
    if link.hard { fs::hard_link(target, path) } else { fs::os::unix::fs::symlink(target, path) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orbax::ocdbt::{Kept, Store};

    #[test]
    fn many_keys_make_a_tree_of_two_levels() {
        let entries: Vec<(Vec<u8>, Stored)> =
            (0..25u8).map(|i| (format!("key {i:02}").into_bytes(), Stored::Inline(vec![i]))).collect();
        let (blocks, root, height) = tree(entries.clone(), 10);
        assert_eq!(height, 1);
        let tmp = tempfile::tempdir().unwrap();
        let mut sums = Checksums::default();
        store(tmp.path(), entries.clone(), 1, &mut sums).unwrap();
        let flat = Store::open(tmp.path()).unwrap();
        assert_eq!((flat.entries().len(), flat.nodes()), (25, 1));
        // The same store with the deeper tree under it.
        put(tmp.path(), NODES, &blocks, &mut sums).unwrap();
        let mut m = Manifest::decode(&fs::read(tmp.path().join(MANIFEST)).unwrap()).unwrap();
        let v = &mut m.versions.as_mut().unwrap()[0];
        (v.root, v.root_height) = (Some(root), 1);
        fs::write(tmp.path().join(MANIFEST), m.encode()).unwrap();
        let deep = Store::open(tmp.path()).unwrap();
        assert_eq!((deep.entries(), deep.nodes()), (flat.entries(), 4));
        assert_eq!(deep.get(b"key 13"), Some(&Kept::Inline([13].into())));
    }
}
