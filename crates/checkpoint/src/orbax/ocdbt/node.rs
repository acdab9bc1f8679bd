//! B+tree nodes.

use super::bytes::{Cursor, FormatError, put_varint};
use super::envelope;
use super::files::{self, DataFile};
use super::manifest::{Location, lookup};

/// Longest key.
pub const MAX_KEY: usize = 65_535;
/// Most entries of one node.
pub const MAX_ENTRIES: usize = 1_048_576;
/// Largest value inside a node.
const MAX_INLINE: usize = 1 << 20;

/// Memory that decoding may still use for keys and paths. Shared prefixes let a small node describe very long keys, so the
/// decoded size needs a bound of its own.
#[derive(Debug, Clone)]
pub struct Budget {
    bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        // A checkpoint of a thousand hosts with optimizer state has some million keys of a hundred bytes.
        Budget { bytes: 512 << 20 }
    }
}

impl Budget {
    /// A budget of this many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Budget { bytes }
    }

    pub(super) fn spend(&mut self, n: usize) -> Result<(), FormatError> {
        let limit = self.bytes;
        self.bytes = limit.checked_sub(n).ok_or(FormatError::Limit {
            what: "memory for keys",
            value: n as u64,
            limit: limit as u64,
        })?;
        Ok(())
    }
}

/// A value, or where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// The bytes themselves.
    Inline(Vec<u8>),
    /// A range of a data file.
    Indirect(Location),
}

impl Value {
    /// Number of bytes of the value.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Value::Inline(b) => b.len() as u64,
            Value::Indirect(l) => l.length,
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A child of an interior node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// First key below it, relative to this node's prefix.
    pub key: Vec<u8>,
    /// How many leading bytes of `key` all keys below share; they are left out there.
    pub common_prefix: usize,
    /// Where it lies.
    pub location: Location,
    /// Keys below it.
    pub num_keys: u64,
    /// Bytes of all nodes from it down.
    pub num_tree_bytes: u64,
    /// Bytes of values outside the nodes.
    pub num_indirect_value_bytes: u64,
}

/// A decoded node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Keys with their values, ascending.
    Leaf(Vec<(Vec<u8>, Value)>),
    /// Children, ascending.
    Interior {
        /// Levels below this node, at least 1.
        height: u8,
        /// The children.
        children: Vec<Child>,
    },
}

impl Node {
    /// Decodes and checks a node. Keys come out relative to the node's own prefix.
    ///
    /// # Errors
    /// When any byte of it is not as it must be, or the keys do not fit the budget.
    pub fn decode(block: &[u8], budget: &mut Budget) -> Result<Self, FormatError> {
        let body = envelope::open(envelope::NODE, block)?;
        let mut c = Cursor::new(&body);
        let height = c.u8("height")?;
        let table = files::decode(&mut c, &mut budget.bytes)?;
        let n = c.count("number of entries", 3)?;
        if n == 0 || n > MAX_ENTRIES {
            return Err(FormatError::Limit { what: "number of entries", value: n as u64, limit: MAX_ENTRIES as u64 });
        }
        let prefix = c.lengths(n - 1, MAX_KEY, "key prefix length")?;
        let suffix = c.lengths(n, MAX_KEY, "key suffix length")?;
        let common = if height > 0 { c.lengths(n, MAX_KEY, "shared prefix length")? } else { Vec::new() };
        let keys = keys(&mut c, &prefix, &suffix, budget)?;
        let node = if height == 0 {
            Node::Leaf(leaf(&mut c, keys, &table, budget)?)
        } else {
            Node::Interior { height, children: interior(&mut c, keys, &common, &table)? }
        };
        c.finish()?;
        Ok(node)
    }

    /// Levels below this node.
    #[must_use]
    pub fn height(&self) -> u8 {
        match self {
            Node::Leaf(_) => 0,
            Node::Interior { height, .. } => *height,
        }
    }

    /// Encodes a node. Keys must be ascending and within the format's limits.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut b = vec![self.height()];
        match self {
            Node::Leaf(entries) => encode_leaf(&mut b, entries),
            Node::Interior { children, .. } => encode_interior(&mut b, children),
        }
        envelope::seal(envelope::NODE, &b)
    }
}

fn keys(
    c: &mut Cursor<'_>,
    prefix: &[usize],
    suffix: &[usize],
    budget: &mut Budget,
) -> Result<Vec<Vec<u8>>, FormatError> {
    let mut keys: Vec<Vec<u8>> = Vec::with_capacity(suffix.len());
    for (i, &tail) in suffix.iter().enumerate() {
        let shared: &[u8] = match i {
            0 => &[],
            _ => keys[i - 1]
                .get(..prefix[i - 1])
                .ok_or_else(|| FormatError::Invalid(format!("key {i} shares more bytes than the key before it has")))?,
        };
        let n = shared.len() + tail;
        if n > MAX_KEY {
            return Err(FormatError::Limit { what: "key length", value: n as u64, limit: MAX_KEY as u64 });
        }
        budget.spend(n + size_of::<Vec<u8>>())?;
        let mut key = Vec::with_capacity(n);
        key.extend_from_slice(shared);
        key.extend_from_slice(c.take(tail as u64, "key")?);
        if i > 0 && keys[i - 1] >= key {
            return Err(FormatError::Invalid(format!("key {i} is not above the key before it")));
        }
        keys.push(key);
    }
    Ok(keys)
}

fn leaf(
    c: &mut Cursor<'_>,
    keys: Vec<Vec<u8>>,
    table: &[DataFile],
    budget: &mut Budget,
) -> Result<Vec<(Vec<u8>, Value)>, FormatError> {
    let n = keys.len();
    let lengths = c.varints(n, "value length")?;
    let kinds = c.take(n as u64, "value kind")?;
    if let Some(&kind) = kinds.iter().find(|&&k| k > 1) {
        return Err(FormatError::Unsupported { what: "value kind", value: kind.into() });
    }
    let indirect = kinds.iter().filter(|&&k| k == 1).count();
    let mut files = c.varints(indirect, "value file")?.into_iter();
    let mut offsets = c.varints(indirect, "value offset")?.into_iter();
    let mut out = Vec::with_capacity(n);
    for (i, key) in keys.into_iter().enumerate() {
        let value = if kinds[i] == 1 {
            let (Some(file), Some(offset)) = (files.next(), offsets.next()) else {
                return Err(FormatError::Invalid("value locations do not add up".into()));
            };
            let file = lookup(table, file)?.clone();
            budget.spend(file.base.len() + file.relative.len() + size_of::<Location>())?;
            if offset.checked_add(lengths[i]).is_none() {
                return Err(FormatError::Invalid(format!("value {i} ends beyond any file")));
            }
            Value::Indirect(Location { file, offset, length: lengths[i] })
        } else {
            if lengths[i] > MAX_INLINE as u64 {
                return Err(FormatError::Limit {
                    what: "inline value length",
                    value: lengths[i],
                    limit: MAX_INLINE as u64,
                });
            }
            Value::Inline(c.take(lengths[i], "inline value")?.to_vec())
        };
        out.push((key, value));
    }
    Ok(out)
}

fn interior(
    c: &mut Cursor<'_>,
    keys: Vec<Vec<u8>>,
    common: &[usize],
    table: &[DataFile],
) -> Result<Vec<Child>, FormatError> {
    let n = keys.len();
    let file = c.varints(n, "child file")?;
    let offset = c.varints(n, "child offset")?;
    let length = c.varints(n, "child length")?;
    let num_keys = c.varints(n, "child key count")?;
    let tree = c.varints(n, "child tree bytes")?;
    let values = c.varints(n, "child value bytes")?;
    keys.into_iter()
        .enumerate()
        .map(|(i, key)| {
            if common[i] > key.len() {
                return Err(FormatError::Invalid(format!("child {i} shares more bytes than its key has")));
            }
            if offset[i].checked_add(length[i]).is_none() {
                return Err(FormatError::Invalid(format!("child {i} ends beyond any file")));
            }
            Ok(Child {
                key,
                common_prefix: common[i],
                location: Location { file: lookup(table, file[i])?.clone(), offset: offset[i], length: length[i] },
                num_keys: num_keys[i],
                num_tree_bytes: tree[i],
                num_indirect_value_bytes: values[i],
            })
        })
        .collect()
}

fn table<'a>(locations: impl Iterator<Item = &'a Location>) -> Vec<DataFile> {
    let mut table: Vec<DataFile> = locations.map(|l| l.file.clone()).collect();
    table.sort();
    table.dedup();
    table
}

fn index(table: &[DataFile], file: &DataFile) -> u64 {
    table.binary_search(file).unwrap_or(0) as u64
}

fn encode_keys(b: &mut Vec<u8>, keys: &[&[u8]], common: Option<Vec<usize>>) {
    let mut shared = vec![0];
    shared.extend(keys.windows(2).map(|w| w[0].iter().zip(w[1]).take_while(|(x, y)| x == y).count()));
    put_varint(b, keys.len() as u64);
    for &n in &shared[1..] {
        put_varint(b, n as u64);
    }
    for (key, n) in keys.iter().zip(&shared) {
        put_varint(b, (key.len() - n) as u64);
    }
    for n in common.unwrap_or_default() {
        put_varint(b, n as u64);
    }
    for (key, &n) in keys.iter().zip(&shared) {
        b.extend(&key[n..]);
    }
}

fn encode_leaf(b: &mut Vec<u8>, entries: &[(Vec<u8>, Value)]) {
    let indirect = || {
        entries.iter().filter_map(|(_, v)| match v {
            Value::Indirect(l) => Some(l),
            Value::Inline(_) => None,
        })
    };
    let table = table(indirect());
    files::encode(b, &table);
    encode_keys(b, &entries.iter().map(|(k, _)| k.as_slice()).collect::<Vec<_>>(), None);
    entries.iter().for_each(|(_, v)| put_varint(b, v.len()));
    entries.iter().for_each(|(_, v)| b.push(u8::from(matches!(v, Value::Indirect(_)))));
    indirect().for_each(|l| put_varint(b, index(&table, &l.file)));
    indirect().for_each(|l| put_varint(b, l.offset));
    for (_, v) in entries {
        if let Value::Inline(bytes) = v {
            b.extend(bytes);
        }
    }
}

fn encode_interior(b: &mut Vec<u8>, children: &[Child]) {
    let table = table(children.iter().map(|c| &c.location));
    files::encode(b, &table);
    let keys: Vec<&[u8]> = children.iter().map(|c| c.key.as_slice()).collect();
    encode_keys(b, &keys, Some(children.iter().map(|c| c.common_prefix).collect()));
    let mut column = |f: &dyn Fn(&Child) -> u64| children.iter().for_each(|c| put_varint(b, f(c)));
    column(&|c| index(&table, &c.location.file));
    column(&|c| c.location.offset);
    column(&|c| c.location.length);
    column(&|c| c.num_keys);
    column(&|c| c.num_tree_bytes);
    column(&|c| c.num_indirect_value_bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A leaf whose bytes another implementation reads.
    const KNOWN: &str =
        "0cdb20de3300000000000000000000010300642f7602020509772f632f307a6172722e6a736f6e0a02010000007b7d4bd8fea5";

    fn hex(s: &str) -> Vec<u8> {
        (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
    }

    fn at(file: &str, offset: u64, length: u64) -> Location {
        Location { file: DataFile::new(file), offset, length }
    }

    #[test]
    fn known_answer() {
        let node = Node::Leaf(vec![
            (b"w/c/0".to_vec(), Value::Indirect(at("d/v", 0, 10))),
            (b"w/zarr.json".to_vec(), Value::Inline(b"{}".to_vec())),
        ]);
        assert_eq!(Node::decode(&hex(KNOWN), &mut Budget::default()).unwrap(), node);
        assert_eq!(node.encode(), hex(KNOWN));
    }

    #[test]
    fn disorder_is_an_error() {
        let entry = |k: &str| (k.as_bytes().to_vec(), Value::Inline(vec![]));
        for keys in [["b", "a"], ["a", "a"]] {
            let node = Node::Leaf(keys.map(entry).to_vec());
            assert!(matches!(Node::decode(&node.encode(), &mut Budget::default()), Err(FormatError::Invalid(_))));
        }
        assert!(Node::decode(&Node::Leaf(vec![]).encode(), &mut Budget::default()).is_err());
    }

    #[test]
    fn long_shared_prefixes_do_not_fill_memory() {
        let long = vec![b'x'; 60_000];
        let entries: Vec<_> = (0..9000u32)
            .map(|i| {
                let mut key = long.clone();
                key.extend(i.to_be_bytes());
                (key, Value::Inline(vec![]))
            })
            .collect();
        let block = Node::Leaf(entries).encode();
        assert!(block.len() < 200_000);
        assert!(matches!(
            Node::decode(&block, &mut Budget::new(1 << 20)),
            Err(FormatError::Limit { what: "memory for keys", .. })
        ));
    }

    #[test]
    fn an_absurd_inline_length_is_an_error() {
        let mut body = vec![0, 0, 1, 1, b'k'];
        put_varint(&mut body, u64::MAX);
        body.push(0);
        let block = envelope::seal(envelope::NODE, &body);
        assert!(matches!(Node::decode(&block, &mut Budget::default()), Err(FormatError::Limit { .. })));
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..20).prop_map(Value::Inline),
            ("[a-z]{1,3}(/[a-z]{1,3})?", any::<u32>(), any::<u32>()).prop_map(|(f, o, l)| Value::Indirect(at(
                &f,
                o.into(),
                l.into()
            ))),
        ]
    }

    proptest! {
        #[test]
        fn leaves_round_trip(map in prop::collection::btree_map(prop::collection::vec(any::<u8>(), 0..12), value(), 1..40)) {
            let node = Node::Leaf(map.into_iter().collect());
            prop_assert_eq!(Node::decode(&node.encode(), &mut Budget::default()).unwrap(), node);
        }

        #[test]
        fn interior_nodes_round_trip(
            map in prop::collection::btree_map(prop::collection::vec(any::<u8>(), 1..12), any::<(u8, u32, u32, u64)>(), 1..40),
            height in 1u8..,
        ) {
            let children = map.into_iter().map(|(key, (p, o, l, s))| Child {
                common_prefix: usize::from(p) % (key.len() + 1),
                key,
                location: at(&format!("d/{}", p % 4), o.into(), l.into()),
                num_keys: s,
                num_tree_bytes: s / 2,
                num_indirect_value_bytes: s / 3,
            }).collect();
            let node = Node::Interior { height, children };
            prop_assert_eq!(Node::decode(&node.encode(), &mut Budget::default()).unwrap(), node);
        }

        #[test]
        fn foreign_bodies_never_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Node::decode(&envelope::seal(envelope::NODE, &body), &mut Budget::default());
            let _ = Node::decode(&envelope::seal_zstd(envelope::NODE, &body), &mut Budget::default());
            let _ = super::super::Manifest::decode(&envelope::seal(envelope::MANIFEST, &body));
        }
    }
}
