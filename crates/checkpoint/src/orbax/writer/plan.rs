//! What is to be written, and where each chunk of it goes.

use std::collections::HashSet;
use std::path::PathBuf;

use serde_json::{Map, Value};
use tensor::{DType, Shape};

use super::OrbaxWriteError;
use crate::orbax::checksums::CHECKSUMS;
use crate::orbax::tree::{CHECKPOINT_METADATA, COMMIT, Key, METADATA};
use crate::orbax::zarr::{ArrayBytes, ArrayMeta, BytesCodec, Chain, Endian, KeyEncoding};

/// Values up to this size lie inside the tree, as Orbax has it.
pub(super) const INLINE: usize = 1024;

/// Chunks start at multiples of this, so that they can be used in place.
const ALIGN: u64 = 64;

/// How arrays are kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Many chunks to a file, found through a tree.
    Ocdbt,
    /// A directory per array and a file per chunk.
    Files,
}

/// Version of the array metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZarrVersion {
    /// Version 2, which Pathways reads. It knows no checksums.
    V2,
    /// Version 3.
    V3,
}

/// How a checkpoint is written.
#[derive(Debug, Clone)]
pub struct OrbaxOptions {
    /// How arrays are kept.
    pub layout: Layout,
    /// Version of the array metadata.
    pub zarr: ZarrVersion,
    /// Compression level, if chunks are to be compressed. Saves about a quarter of bfloat16 weights at several times the
    /// processor time.
    pub zstd: Option<i32>,
    /// Whether every chunk carries a checksum that other readers check too (version 3 only).
    pub crc32c: bool,
    /// Arrays are split into this many chunks along their first dimension, if it divides by that, else along the second;
    /// as MaxText does, so that many hosts can read parts.
    pub split: usize,
    /// Arrays up to this many bytes are one chunk.
    pub split_above: usize,
    /// A data file is closed when it would grow beyond this.
    pub data_file_bytes: u64,
    /// What goes into `custom_metadata`: `scan_layers` for MaxText, provenance for people.
    pub custom_metadata: Map<String, Value>,
    /// Time of writing in nanoseconds since 1970, for output that is to be the same on every run; now if absent.
    pub time: Option<u64>,
    /// Replace a checkpoint that lies at the destination.
    pub force: bool,
    /// Continue an interrupted write of the same plan; chunks on disk are verified by checksum and not asked for again.
    pub resume: bool,
    /// Anything that identifies the source, so that a write is continued only from the same one.
    pub source_id: String,
}

impl Default for OrbaxOptions {
    fn default() -> Self {
        OrbaxOptions {
            layout: Layout::Ocdbt,
            zarr: ZarrVersion::V3,
            zstd: None,
            crc32c: true,
            split: 16,
            split_above: 1 << 20,
            data_file_bytes: 512 << 20,
            custom_metadata: Map::new(),
            time: None,
            force: false,
            resume: false,
            source_id: String::new(),
        }
    }
}

impl OrbaxOptions {
    /// What Pathways can read: plain files, version 2, compressed (with a checksum inside each frame).
    #[must_use]
    pub fn pathways() -> Self {
        OrbaxOptions { layout: Layout::Files, zarr: ZarrVersion::V2, zstd: Some(1), ..Self::default() }
    }
}

/// Where a checkpoint goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `<base>/<step>/items`, as checkpoint managers have it.
    Step {
        /// The directory with the steps.
        base: PathBuf,
        /// The step.
        step: u64,
    },
    /// The directory itself, without a step around it.
    Items(PathBuf),
}

/// A file outside that becomes part of a checkpoint by a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedFile {
    /// Its path below the item directory, such as `linked/model.safetensors`.
    pub name: String,
    /// Where it lies.
    pub target: PathBuf,
    /// Whether to make a hard link (the same file system only); a symbolic one otherwise.
    pub hard: bool,
}

/// A chunk that lies in a linked file: little-endian elements and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkedChunk {
    /// Index into [`OrbaxPlan::links`].
    pub file: usize,
    /// First byte.
    pub offset: u64,
}

/// Where the elements of an array come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// They will be pushed chunk by chunk.
    Pushed,
    /// They are known: the whole array, row-major and little-endian.
    Bytes(Vec<u8>),
    /// They lie in linked files already.
    Linked {
        /// Stored dimension `k` is dimension `order[k]` of the array; `None` if it is stored as it is.
        order: Option<Vec<usize>>,
        /// One for every chunk, row-major over the grid.
        chunks: Vec<LinkedChunk>,
    },
}

/// One array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrayPlan {
    /// Its path in the tree.
    pub path: Vec<Key>,
    /// Element type.
    pub dtype: DType,
    /// Extent of every dimension.
    pub shape: Shape,
    /// Chunk extents; by the options' rule if absent.
    pub chunk_shape: Option<Vec<usize>>,
    /// What the tree calls it: `np.ndarray` or `scalar`.
    pub value_type: &'static str,
    /// Where its elements come from.
    pub source: Source,
}

impl ArrayPlan {
    /// An array whose elements will be pushed. `path` is split at dots.
    #[must_use]
    pub fn pushed(path: &str, dtype: DType, shape: impl Into<Shape>) -> Self {
        ArrayPlan {
            path: dotted(path),
            dtype,
            shape: shape.into(),
            chunk_shape: None,
            value_type: "np.ndarray",
            source: Source::Pushed,
        }
    }

    /// A scalar such as the step.
    #[must_use]
    pub fn scalar_i64(path: &str, value: i64) -> Self {
        ArrayPlan {
            value_type: "scalar",
            source: Source::Bytes(value.to_le_bytes().to_vec()),
            ..Self::pushed(path, DType::I64, Shape::scalar())
        }
    }

    /// The name of the array.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.iter().map(Key::text).collect::<Vec<_>>().join(".")
    }
}

/// A path whose elements are separated by dots, all of them dictionary keys.
#[must_use]
pub fn dotted(path: &str) -> Vec<Key> {
    path.split('.').map(|s| Key::Dict(s.to_owned())).collect()
}

/// Everything that is to be written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrbaxPlan {
    /// The arrays, in the order in which they lie in the data files.
    pub arrays: Vec<ArrayPlan>,
    /// Leaves that hold nothing, with what they are: `Dict`, `List` or `None`.
    pub empty: Vec<(Vec<Key>, &'static str)>,
    /// Files that arrays refer to.
    pub links: Vec<LinkedFile>,
}

/// Where a chunk goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// Into the tree, or into a file of its own should it turn out too large.
    Inline,
    /// To a fixed place in a data file.
    Range { file: usize, offset: u64 },
    /// Into a file of its own, by path below the item directory.
    Own(String),
    /// It lies in a linked file.
    Linked(LinkedChunk),
}

/// A planned array with everything decided.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) name: String,
    pub(super) meta: ArrayMeta,
    pub(super) places: Vec<Place>,
    /// Bytes of one decoded chunk.
    pub(super) chunk_bytes: usize,
}

impl Resolved {
    /// The grid index of a chunk number.
    pub(super) fn index(&self, mut number: usize) -> Vec<usize> {
        let grid = self.meta.grid();
        let mut index = vec![0; grid.len()];
        for (i, n) in index.iter_mut().zip(&grid).rev() {
            *i = number % n;
            number /= n;
        }
        index
    }
}

/// All arrays of a plan, and the size of every data file.
#[derive(Debug)]
pub(super) struct Arrangement {
    pub(super) arrays: Vec<Resolved>,
    pub(super) files: Vec<u64>,
}

/// Path of a data file below the item directory.
pub(super) fn data_file(number: usize) -> String {
    format!("d/data-{number:05}")
}

/// Decides chunk shapes, codecs and places.
pub(super) fn arrange(plan: &OrbaxPlan, options: &OrbaxOptions) -> Result<Arrangement, OrbaxWriteError> {
    let mut out = Arrangement { arrays: Vec::new(), files: Vec::new() };
    let mut names = HashSet::new();
    for array in &plan.arrays {
        let name = array.name();
        let refuse = |why: String| OrbaxWriteError::Plan { array: name.clone(), why };
        check_name(array, options).map_err(&refuse)?;
        if !names.insert(name.clone()) {
            return Err(refuse("another array has the same name".to_owned()));
        }
        let meta = describe(array, options).map_err(&refuse)?;
        // What is written must be readable: the same checks as on reading.
        let json = meta.to_json().map_err(|e| refuse(e.to_string()))?;
        let read = if meta.version == 2 { ArrayMeta::parse_v2(&json) } else { ArrayMeta::parse_v3(&json) };
        read.map_err(|e| refuse(e.to_string()))?;
        let chunk_bytes = meta.chunk_bytes().map_err(|e| refuse(e.to_string()))?;
        let count = meta.chunk_count();
        // A file, a key and a record each: beyond this nothing would work with it.
        if count > 10_000_000 {
            return Err(refuse(format!("{count} chunks are too many; choose a larger chunk shape")));
        }
        match &array.source {
            Source::Bytes(b) if b.len() != meta.shape.elements() * meta.dtype.size() => {
                return Err(refuse(format!("{} bytes do not fill {} of {}", b.len(), meta.shape, meta.dtype)));
            }
            Source::Linked { chunks, .. } => check_links(plan, options, &meta, chunks, chunk_bytes).map_err(&refuse)?,
            _ => {}
        }
        let mut resolved = Resolved { name: name.clone(), meta, places: Vec::with_capacity(count), chunk_bytes };
        for number in 0..count {
            let place = match &array.source {
                Source::Linked { chunks, .. } => Place::Linked(chunks[number]),
                _ => out.place(&resolved, number, out.arrays.len(), options),
            };
            resolved.places.push(place);
        }
        out.arrays.push(resolved);
    }
    for (path, _) in &plan.empty {
        let name: String = path.iter().map(Key::text).collect::<Vec<_>>().join(".");
        if path.is_empty() || !names.insert(name.clone()) {
            return Err(OrbaxWriteError::Plan { array: name, why: "another leaf has the same name".to_owned() });
        }
    }
    Ok(out)
}

impl Arrangement {
    fn place(&mut self, array: &Resolved, number: usize, position: usize, options: &OrbaxOptions) -> Place {
        let key = || array.meta.chunk_key(&array.index(number));
        if options.layout == Layout::Files {
            return Place::Own(format!("{}/{}", array.name, key()));
        }
        if options.zstd.is_some() {
            // Sizes are not known in advance, and places must not depend on the order in which threads finish.
            return Place::Own(format!("d/{position:05}-{number:05}"));
        }
        let stored = array.chunk_bytes as u64 + 4 * array.meta.codecs.bytes.len() as u64;
        if stored <= INLINE as u64 {
            return Place::Inline;
        }
        let offset = self.files.last().map(|n| n.next_multiple_of(ALIGN));
        match (self.files.last_mut(), offset) {
            (Some(size), Some(offset)) if offset + stored <= options.data_file_bytes => {
                *size = offset + stored;
                Place::Range { file: self.files.len() - 1, offset }
            }
            _ => {
                self.files.push(stored);
                Place::Range { file: self.files.len() - 1, offset: 0 }
            }
        }
    }
}

fn check_name(array: &ArrayPlan, options: &OrbaxOptions) -> Result<(), String> {
    let name = array.name();
    if array.path.is_empty() || array.path.iter().any(|k| k.text().is_empty()) {
        return Err("its path has an empty element".to_owned());
    }
    if name.contains(['/', '\\', '\0']) || name.len() > 1000 {
        return Err("its name cannot be that of a file".to_owned());
    }
    // A file name has at most 255 bytes.
    let too_long = options.layout == Layout::Files && name.len() > 255;
    let reserved =
        ["d", "manifest.ocdbt", "array_metadatas", "_sharding", METADATA, CHECKPOINT_METADATA, COMMIT, CHECKSUMS];
    if too_long || reserved.contains(&name.as_str()) || name.starts_with("ocdbt.process_") {
        return Err("its name cannot be used in this layout".to_owned());
    }
    Ok(())
}

fn describe(array: &ArrayPlan, options: &OrbaxOptions) -> Result<ArrayMeta, String> {
    let bytes = array.shape.checked_bytes(array.dtype).map_err(|e| e.to_string())?;
    let chunk_shape = match &array.chunk_shape {
        Some(shape) => shape.clone(),
        None => split(&array.shape, bytes, options),
    };
    let linked = matches!(array.source, Source::Linked { .. });
    let mut codecs = Chain { order: None, array: ArrayBytes::Bytes(Endian::Little), bytes: vec![] };
    if let Source::Linked { order, .. } = &array.source {
        codecs.order.clone_from(order);
    }
    if let (Some(level), false) = (options.zstd, linked) {
        // Version 3 has a checksum outside the frame, which covers every stored bit; version 2 has none but this.
        let checksum = options.zarr == ZarrVersion::V2 || !options.crc32c;
        codecs.bytes.push(BytesCodec::Zstd { level, checksum });
    }
    if options.zarr == ZarrVersion::V3 && options.crc32c && !linked {
        codecs.bytes.push(BytesCodec::Crc32c);
    }
    let (version, keys) = match options.zarr {
        ZarrVersion::V2 => (2, KeyEncoding::V2('.')),
        ZarrVersion::V3 => (3, KeyEncoding::Default('/')),
    };
    Ok(ArrayMeta { version, shape: array.shape.clone(), dtype: array.dtype, chunk_shape, keys, codecs })
}

/// The chunk shape of an array: split along the first dimension that divides, of the first two.
fn split(shape: &[usize], bytes: usize, options: &OrbaxOptions) -> Vec<usize> {
    let mut chunk: Vec<usize> = shape.iter().map(|&n| n.max(1)).collect();
    if bytes > options.split_above
        && let Some(n) = chunk.iter_mut().take(2).find(|n| n.is_multiple_of(options.split.max(1)))
    {
        *n /= options.split.max(1);
    }
    chunk
}

fn check_links(
    plan: &OrbaxPlan,
    options: &OrbaxOptions,
    meta: &ArrayMeta,
    chunks: &[LinkedChunk],
    chunk_bytes: usize,
) -> Result<(), String> {
    if options.layout == Layout::Files {
        return Err("only a tree can refer to parts of other files".to_owned());
    }
    if chunks.len() != meta.chunk_count() {
        return Err(format!("{} places are given for {} chunks", chunks.len(), meta.chunk_count()));
    }
    if meta.shape.iter().zip(&meta.chunk_shape).any(|(n, c)| n % c != 0) {
        return Err("its chunks do not divide it, and files have no padding".to_owned());
    }
    for chunk in chunks {
        let link = plan.links.get(chunk.file).ok_or_else(|| format!("there is no linked file {}", chunk.file))?;
        let size = fs_err::metadata(&link.target).map_err(|e| e.to_string())?.len();
        if chunk.offset.checked_add(chunk_bytes as u64).is_none_or(|end| end > size) {
            let path = link.target.display();
            return Err(format!("{path} has {size} bytes; {chunk_bytes} at byte {} are referred to", chunk.offset));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_arrays_are_split_as_maxtext_does() {
        let o = OrbaxOptions::default();
        let check = |shape: &[usize], want: &[usize]| {
            assert_eq!(split(shape, shape.iter().product::<usize>() * 2, &o), want, "{shape:?}");
        };
        check(&[262_144, 1536], &[16_384, 1536]);
        check(&[1537, 1024], &[1537, 64]);
        check(&[1537, 1023], &[1537, 1023]);
        check(&[1536, 256], &[1536, 256]);
        check(&[1], &[1]);
        check(&[], &[]);
        check(&[0, 5], &[1, 5]);
        check(&[33, 31, 1600], &[33, 31, 1600]);
    }

    #[test]
    fn places_are_aligned_and_files_bounded() {
        let plan = OrbaxPlan {
            arrays: vec![
                ArrayPlan::pushed("a", DType::U8, [1000]),
                ArrayPlan::pushed("b", DType::U8, [1500]),
                ArrayPlan { chunk_shape: Some(vec![2000]), ..ArrayPlan::pushed("c", DType::U8, [6000]) },
            ],
            ..OrbaxPlan::default()
        };
        let a = arrange(&plan, &OrbaxOptions { data_file_bytes: 4000, ..OrbaxOptions::default() }).unwrap();
        let places: Vec<Place> = a.arrays.into_iter().flat_map(|a| a.places).collect();
        let range = |file, offset| Place::Range { file, offset };
        assert_eq!(places, [Place::Inline, range(0, 0), range(0, 1536), range(1, 0), range(2, 0)]);
        assert_eq!(a.files, [1536 + 2004, 2004, 2004]);
    }

    #[test]
    fn impossible_plans_are_refused() {
        let refuse = |arrays: Vec<ArrayPlan>, options: OrbaxOptions, why: &str| {
            let e = arrange(&OrbaxPlan { arrays, ..OrbaxPlan::default() }, &options).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        };
        let a = || ArrayPlan::pushed("a.b", DType::F32, [4, 4]);
        let o = OrbaxOptions::default;
        refuse(vec![a(), a()], o(), "same name");
        refuse(vec![ArrayPlan::pushed("a..b", DType::F32, [1])], o(), "empty element");
        refuse(vec![ArrayPlan::pushed("a/b", DType::F32, [1])], o(), "name");
        refuse(vec![ArrayPlan::pushed("d", DType::F32, [1])], o(), "name");
        refuse(vec![ArrayPlan { chunk_shape: Some(vec![0, 4]), ..a() }], o(), "extent is 0");
        refuse(vec![ArrayPlan { chunk_shape: Some(vec![4]), ..a() }], o(), "dimensions");
        refuse(vec![ArrayPlan { source: Source::Bytes(vec![0; 63]), ..a() }], o(), "63 bytes");
        let linked = |n| Source::Linked { order: None, chunks: vec![LinkedChunk { file: 0, offset: 0 }; n] };
        refuse(vec![ArrayPlan { source: linked(2), ..a() }], o(), "2 places are given for 1 chunks");
        refuse(vec![ArrayPlan { source: linked(1), ..a() }], o(), "no linked file");
        refuse(vec![ArrayPlan { source: linked(1), ..a() }], OrbaxOptions::pathways(), "only a tree");
    }
}
