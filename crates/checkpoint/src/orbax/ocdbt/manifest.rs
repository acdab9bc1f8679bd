//! The manifest: configuration and the list of versions.

use super::bytes::{Cursor, FormatError, put_varint};
use super::envelope;
use super::files::{self, DataFile};

/// How values and nodes are stored; written into the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Identifies the store.
    pub uuid: [u8; 16],
    /// Values up to this size lie inside the node.
    pub max_inline_value_bytes: u64,
    /// Largest node body.
    pub max_decoded_node_bytes: u64,
    /// Logarithm of the version tree's arity.
    pub version_tree_arity_log2: u8,
    /// The zstd level of nodes, if they are compressed.
    pub zstd_level: Option<i32>,
}

/// Where a version's root node lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub file: DataFile,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// One version of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Counts up from 1.
    pub generation: u64,
    /// Levels below the root node.
    pub root_height: u8,
    /// The root node; `None` for an empty store.
    pub root: Option<Location>,
    /// Number of keys.
    pub num_keys: u64,
    /// Bytes of all nodes.
    pub num_tree_bytes: u64,
    /// Bytes of all values outside the nodes.
    pub num_indirect_value_bytes: u64,
    /// Nanoseconds since 1970.
    pub commit_time: u64,
}

/// A decoded manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The configuration.
    pub config: Config,
    /// The newest versions, oldest first; `None` when the content lies in numbered files beside this one.
    pub versions: Option<Vec<Version>>,
}

impl Manifest {
    /// Decodes and checks a manifest.
    ///
    /// # Errors
    /// When any byte of it is not as it must be.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let body = envelope::open(envelope::MANIFEST, block)?;
        let mut c = Cursor::new(&body);
        let uuid = c.uuid()?;
        let kind = c.u8("manifest kind")?;
        let max_inline_value_bytes = c.varint("inline value limit")?;
        let max_decoded_node_bytes = c.varint("node size limit")?;
        let version_tree_arity_log2 = c.u8("version tree arity")?;
        let zstd_level = match c.varint("compression method")? {
            0 => None,
            1 => Some(c.u32("compression level")? as i32),
            value => return Err(FormatError::Unsupported { what: "compression method", value }),
        };
        let config =
            Config { uuid, max_inline_value_bytes, max_decoded_node_bytes, version_tree_arity_log2, zstd_level };
        let versions = match kind {
            0 => Some(versions(&mut c, body.len())?),
            1 => None,
            value => return Err(FormatError::Unsupported { what: "manifest kind", value: value.into() }),
        };
        c.finish()?;
        Ok(Manifest { config, versions })
    }

    /// The newest version.
    #[must_use]
    pub fn latest(&self) -> Option<&Version> {
        self.versions.as_ref().and_then(|v| v.last())
    }

    /// Encodes a manifest without older versions than those listed.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::new();
        b.extend(self.config.uuid);
        b.push(u8::from(self.versions.is_none()));
        put_varint(&mut b, self.config.max_inline_value_bytes);
        put_varint(&mut b, self.config.max_decoded_node_bytes);
        b.push(self.config.version_tree_arity_log2);
        match self.config.zstd_level {
            None => put_varint(&mut b, 0),
            Some(level) => {
                put_varint(&mut b, 1);
                b.extend(level.to_le_bytes());
            }
        }
        if let Some(versions) = &self.versions {
            encode_versions(&mut b, versions);
        }
        envelope::seal(envelope::MANIFEST, &b)
    }
}

fn versions(c: &mut Cursor<'_>, body: usize) -> Result<Vec<Version>, FormatError> {
    // Paths of a handful of files: no honest manifest needs more.
    let mut budget = body.saturating_mul(64).saturating_add(1 << 20);
    let table = files::decode(c, &mut budget)?;
    // Seven single bytes at least and the eight of the time.
    let n = c.count("number of versions", 15)?;
    let generation = c.varints(n, "generation")?;
    if generation.first() == Some(&0) || !generation.is_sorted_by(|a, b| a < b) {
        return Err(FormatError::Invalid("its versions are not in ascending order".into()));
    }
    let heights = c.take(n as u64, "root height")?;
    let file = c.varints(n, "root file")?;
    let offset = c.varints(n, "root offset")?;
    let length = c.varints(n, "root length")?;
    let keys = c.varints(n, "number of keys")?;
    let tree = c.varints(n, "tree bytes")?;
    let indirect = c.varints(n, "value bytes")?;
    let mut out = Vec::with_capacity(n);
    for i in 0..n {
        let commit_time = c.u64("commit time")?;
        let root = if offset[i] == u64::MAX && length[i] == u64::MAX {
            None
        } else {
            Some(Location { file: lookup(&table, file[i])?.clone(), offset: offset[i], length: length[i] })
        };
        if root.is_none() && (heights[i] != 0 || keys[i] != 0) {
            return Err(FormatError::Invalid("an empty version counts keys".into()));
        }
        out.push(Version {
            generation: generation[i],
            root_height: heights[i],
            root,
            num_keys: keys[i],
            num_tree_bytes: tree[i],
            num_indirect_value_bytes: indirect[i],
            commit_time,
        });
    }
    skip_version_nodes(c, &table)?;
    Ok(out)
}

/// References to older versions: checked for form, never followed.
fn skip_version_nodes(c: &mut Cursor<'_>, table: &[DataFile]) -> Result<(), FormatError> {
    let n = c.count("number of version nodes", 14)?;
    c.varints(n, "version node generation")?;
    for file in c.varints(n, "version node file")? {
        lookup(table, file)?;
    }
    c.varints(n, "version node offset")?;
    c.varints(n, "version node length")?;
    c.varints(n, "version node size")?;
    c.take(8 * n as u64, "version node time")?;
    c.take(n as u64, "version node height")?;
    Ok(())
}

pub(super) fn lookup(table: &[DataFile], id: u64) -> Result<&DataFile, FormatError> {
    let file = usize::try_from(id).ok().and_then(|i| table.get(i)).ok_or(FormatError::Limit {
        what: "data file number",
        value: id,
        limit: (table.len() as u64).saturating_sub(1),
    })?;
    if file.is_safe() { Ok(file) } else { Err(FormatError::Invalid("it refers to a data file without a name".into())) }
}

fn encode_versions(b: &mut Vec<u8>, versions: &[Version]) {
    let mut table: Vec<DataFile> = versions.iter().filter_map(|v| v.root.as_ref()).map(|r| r.file.clone()).collect();
    table.sort();
    table.dedup();
    files::encode(b, &table);
    let index = |v: &Version| v.root.as_ref().and_then(|r| table.binary_search(&r.file).ok()).unwrap_or(0) as u64;
    put_varint(b, versions.len() as u64);
    let mut column = |f: &dyn Fn(&Version) -> u64| versions.iter().for_each(|v| put_varint(b, f(v)));
    column(&|v| v.generation);
    // A single byte equals its varint only below 128; heights stay far below.
    column(&|v| u64::from(v.root_height.min(127)));
    column(&index);
    column(&|v| v.root.as_ref().map_or(u64::MAX, |r| r.offset));
    column(&|v| v.root.as_ref().map_or(u64::MAX, |r| r.length));
    column(&|v| v.num_keys);
    column(&|v| v.num_tree_bytes);
    column(&|v| v.num_indirect_value_bytes);
    for v in versions {
        b.extend(v.commit_time.to_le_bytes());
    }
    put_varint(b, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest whose bytes another implementation reads: one version of two keys.
    const KNOWN: &str = "0cdb3a2a43000000000000000000000102030405060708090a0b0c0d0e0f00800880c2d72f0400010300642f6e\
                         01010000003302330a00ca9a3b000000000017b0775d";

    fn hex(s: &str) -> Vec<u8> {
        (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
    }

    fn known() -> Manifest {
        Manifest {
            config: Config {
                uuid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
                max_inline_value_bytes: 1024,
                max_decoded_node_bytes: 100_000_000,
                version_tree_arity_log2: 4,
                zstd_level: None,
            },
            versions: Some(vec![Version {
                generation: 1,
                root_height: 0,
                root: Some(Location { file: DataFile::new("d/n"), offset: 0, length: 51 }),
                num_keys: 2,
                num_tree_bytes: 51,
                num_indirect_value_bytes: 10,
                commit_time: 1_000_000_000,
            }]),
        }
    }

    #[test]
    fn known_answer() {
        assert_eq!(Manifest::decode(&hex(KNOWN)).unwrap(), known());
        assert_eq!(known().encode(), hex(KNOWN));
    }

    #[test]
    fn several_versions_numbered_and_empty() {
        let mut m = known();
        let mut second = m.versions.as_ref().unwrap()[0].clone();
        second.generation = 7;
        second.root_height = 3;
        second.root = Some(Location { file: DataFile::new("d/z"), offset: 1 << 40, length: 99 });
        m.versions.as_mut().unwrap().push(second.clone());
        m.config.zstd_level = Some(-5);
        let back = Manifest::decode(&m.encode()).unwrap();
        assert_eq!(back, m);
        assert_eq!(back.latest(), Some(&second));

        let v = m.versions.as_mut().unwrap();
        v.truncate(1);
        (v[0].root, v[0].num_keys) = (None, 0);
        assert_eq!(Manifest::decode(&m.encode()).unwrap(), m);

        m.versions = None;
        assert_eq!(Manifest::decode(&m.encode()).unwrap(), m);
    }

    #[test]
    fn descending_versions_and_absent_files_are_errors() {
        let mut m = known();
        let v = m.versions.as_mut().unwrap();
        v.push(v[0].clone());
        assert!(matches!(Manifest::decode(&m.encode()), Err(FormatError::Invalid(_))));
        let mut bytes = hex(KNOWN);
        let at = bytes.len() - 4 - 1 - 8 - 6;
        assert_eq!(bytes[at], 0, "the file number");
        bytes[at] = 9;
        let end = bytes.len() - 4;
        let crc = crc32c::crc32c(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&crc);
        assert!(matches!(Manifest::decode(&bytes), Err(FormatError::Limit { what: "data file number", .. })));
    }
}
