//! One safetensors file: a strict header reader over a mapped file.
//!
//! The format is an 8-byte little-endian header length, a JSON object that gives every tensor's dtype, shape and byte
//! range, and the data. The header is parsed here and not by the `safetensors` crate because a checkpoint tool must
//! say which tensor is wrong in which file, and must see what a map silently merges: two entries of one name.
//!
//! Checked before any tensor is handed out: the header fits the file and the format's limit of 100 MB, names are
//! unique, dtypes known, sizes equal to dtype times shape without overflow, and the byte ranges cover the data exactly
//! once, without overlap, hole or rest (the format's own rule).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tensor::{DType, Shape};

use crate::mmap::{MappedBytes, MappedFile};

/// The longest header that the format allows, in bytes.
pub const MAX_HEADER_LEN: u64 = 100_000_000;

/// More dimensions than any tensor has; a longer list is an attack on memory.
const MAX_RANK: usize = 64;

/// What can be wrong with the bytes of a safetensors file. Every message names the tensor where there is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer than 8 bytes.
    #[error("the file has {len} bytes, too few for a safetensors header")]
    TooShort {
        /// Size of the file.
        len: u64,
    },
    /// The header ends beyond the file.
    #[error("the header claims {header} bytes, but only {available} follow; the file is truncated or not safetensors")]
    HeaderBeyondFile {
        /// Length that the file gives for its header.
        header: u64,
        /// Bytes after the length field.
        available: u64,
    },
    /// The header is longer than the format allows.
    #[error("the header claims {header} bytes, more than the format's limit of {MAX_HEADER_LEN}")]
    HeaderTooLarge {
        /// Length that the file gives for its header.
        header: u64,
    },
    /// The header is not the JSON it should be.
    #[error("bad header: {0}")]
    Json(String),
    /// Two entries have one name.
    #[error("tensor {0:?} occurs twice in the header")]
    Duplicate(String),
    /// A dtype this project does not know.
    #[error("tensor {tensor:?} has the unknown dtype {dtype:?}")]
    DType {
        /// Name of the tensor.
        tensor: String,
        /// What the header says.
        dtype: String,
    },
    /// The shape's size overflows.
    #[error("tensor {tensor:?}: shape {shape} is too large for this machine's address space")]
    Overflow {
        /// Name of the tensor.
        tensor: String,
        /// Shape in the header.
        shape: Shape,
    },
    /// The byte range is reversed.
    #[error("tensor {tensor:?}: its data ends at offset {end}, before it begins at {begin}")]
    Reversed {
        /// Name of the tensor.
        tensor: String,
        /// First offset.
        begin: u64,
        /// Second offset.
        end: u64,
    },
    /// The byte range ends beyond the file.
    #[error("tensor {tensor:?}: its data ends at offset {end}, but the file has only {len} bytes of data")]
    OutOfRange {
        /// Name of the tensor.
        tensor: String,
        /// Where its data should end.
        end: u64,
        /// Bytes of data in the file.
        len: u64,
    },
    /// The byte range has another size than dtype and shape say.
    #[error("tensor {tensor:?}: {dtype} {shape} needs {needed} bytes, but its offsets give {got}")]
    Size {
        /// Name of the tensor.
        tensor: String,
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        shape: Shape,
        /// Bytes the two need.
        needed: u64,
        /// Bytes between its offsets.
        got: u64,
    },
    /// Two tensors share bytes.
    #[error("tensor {second:?} begins at offset {begin}, inside the data of tensor {first:?}, which ends at {end}")]
    Overlap {
        /// The earlier one.
        first: String,
        /// The later one.
        second: String,
        /// Where the later one begins.
        begin: u64,
        /// Where the earlier one ends.
        end: u64,
    },
    /// Bytes that belong to no tensor, which the format forbids.
    #[error("{len} bytes before tensor {before:?} (offset {begin}) belong to no tensor")]
    Hole {
        /// The tensor after the hole.
        before: String,
        /// Where the hole begins.
        begin: u64,
        /// Bytes in it.
        len: u64,
    },
    /// Bytes after the last tensor.
    #[error("the file has {rest} bytes after the data of its last tensor")]
    Trailing {
        /// How many.
        rest: u64,
    },
}

/// What can go wrong when a safetensors file is opened.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// The file cannot be read; the source names it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is not valid.
    #[error("{path}: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
}

/// One tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Shape,
    /// Where its bytes lie, from the start of the file.
    pub range: Range<u64>,
}

impl TensorEntry {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// A parsed header: every tensor in the order of its data, and the free-form metadata.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// The tensors, ordered by offset.
    pub tensors: Vec<TensorEntry>,
    /// The `__metadata__` entries in file order; usually `format = pt`.
    pub metadata: Vec<(String, String)>,
    /// Offset of the first data byte from the start of the file.
    pub data_start: u64,
}

impl Header {
    /// Reads and checks the header of a whole file's bytes.
    ///
    /// # Errors
    /// When anything that the module page lists is violated.
    pub fn parse(file: &[u8]) -> Result<Self, FormatError> {
        let len = file.len() as u64;
        let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
            return Err(FormatError::TooShort { len });
        };
        let header = u64::from_le_bytes(*prefix);
        let available = rest.len() as u64;
        if header > available {
            return Err(FormatError::HeaderBeyondFile { header, available });
        }
        if header > MAX_HEADER_LEN {
            return Err(FormatError::HeaderTooLarge { header });
        }
        // Fits: it is no longer than `rest`.
        let (json, data) = rest.split_at(header as usize);
        parse_json(json, 8 + header, data.len() as u64)
    }
}

fn parse_json(json: &[u8], data_start: u64, data_len: u64) -> Result<Header, FormatError> {
    if json.first() != Some(&b'{') {
        return Err(FormatError::Json("it does not begin with '{'".to_owned()));
    }
    let mut de = serde_json::Deserializer::from_slice(json);
    let raw = RawHeaderSeed.deserialize(&mut de).and_then(|raw| de.end().map(|()| raw)).map_err(|e| json_error(&e))?;
    if let Some(name) = raw.duplicate {
        return Err(FormatError::Duplicate(name));
    }
    let mut tensors =
        raw.tensors.into_iter().map(|t| check_entry(t, data_start, data_len)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|t| (t.range.start, t.range.end));
    check_cover(&tensors, data_start, data_len)?;
    Ok(Header { tensors, metadata: raw.metadata, data_start })
}

/// A parser's message may quote the input; a foreign name must not fill a screen.
fn json_error(e: &serde_json::Error) -> FormatError {
    let mut text = e.to_string();
    if text.len() > 500 {
        let at = text.floor_char_boundary(400);
        let tail = format!(" at line {} column {}", e.line(), e.column());
        text.truncate(at);
        text.push_str("...");
        text.push_str(&tail);
    }
    FormatError::Json(text)
}

fn check_entry(raw: RawTensor, data_start: u64, data_len: u64) -> Result<TensorEntry, FormatError> {
    let RawTensor { name: tensor, dtype, shape, offsets: [begin, end] } = raw;
    let Some(dtype) = DType::from_safetensors(&dtype) else {
        return Err(FormatError::DType { tensor, dtype });
    };
    let Some(shape) = shape.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>().map(Shape::from)
    else {
        return Err(FormatError::Overflow { tensor, shape: Shape::from([usize::MAX]) });
    };
    let Ok(needed) = shape.checked_bytes(dtype) else {
        return Err(FormatError::Overflow { tensor, shape });
    };
    let Some(got) = end.checked_sub(begin) else {
        return Err(FormatError::Reversed { tensor, begin, end });
    };
    if end > data_len {
        return Err(FormatError::OutOfRange { tensor, end, len: data_len });
    }
    let needed = needed as u64;
    if needed != got {
        return Err(FormatError::Size { tensor, dtype, shape, needed, got });
    }
    // Both ends are at most the length of a file, so these sums fit.
    Ok(TensorEntry { name: tensor, dtype, shape, range: data_start + begin..data_start + end })
}

/// `tensors` are ordered by offset.
fn check_cover(tensors: &[TensorEntry], data_start: u64, data_len: u64) -> Result<(), FormatError> {
    let mut end = data_start;
    let mut last: Option<&TensorEntry> = None;
    for t in tensors {
        let begin = t.range.start;
        if begin < end {
            return Err(FormatError::Overlap {
                first: last.map(|l| l.name.clone()).unwrap_or_default(),
                second: t.name.clone(),
                begin: begin - data_start,
                end: end - data_start,
            });
        }
        if begin > end {
            return Err(FormatError::Hole { before: t.name.clone(), begin: end - data_start, len: begin - end });
        }
        end = t.range.end;
        last = Some(t);
    }
    match data_start + data_len - end {
        0 => Ok(()),
        rest => Err(FormatError::Trailing { rest }),
    }
}

struct RawHeader {
    tensors: Vec<RawTensor>,
    metadata: Vec<(String, String)>,
    duplicate: Option<String>,
}

struct RawTensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    offsets: [u64; 2],
}

struct RawHeaderSeed;

impl<'de> DeserializeSeed<'de> for RawHeaderSeed {
    type Value = RawHeader;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<RawHeader, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RawHeaderSeed {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut raw = RawHeader { tensors: Vec::new(), metadata: Vec::new(), duplicate: None };
        let mut seen = std::collections::HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                // Remembered and not raised here, so that a syntax error further on is still reported first.
                raw.duplicate.get_or_insert(name);
                map.next_value::<IgnoredAny>()?;
            } else if name == "__metadata__" {
                raw.metadata = map.next_value_seed(MetadataSeed)?;
            } else {
                raw.tensors.push(map.next_value_seed(TensorSeed(name))?);
            }
        }
        Ok(raw)
    }
}

struct MetadataSeed;

impl<'de> DeserializeSeed<'de> for MetadataSeed {
    type Value = Vec<(String, String)>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings as __metadata__")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }
}

/// Carries the tensor's name into every message about its entry.
struct TensorSeed(String);

impl<'de> DeserializeSeed<'de> for TensorSeed {
    type Value = RawTensor;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<RawTensor, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed {
    type Value = RawTensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with dtype, shape and data_offsets for tensor {:?}", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
        let name = self.0;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key::<String>()? {
            let repeated = match field.as_str() {
                "dtype" => dtype.replace(named(&name, map.next_value::<String>())?).is_some(),
                "shape" => shape.replace(named(&name, map.next_value_seed(ShapeSeed))?).is_some(),
                "data_offsets" => offsets.replace(named(&name, map.next_value::<[u64; 2]>())?).is_some(),
                // Unknown fields are ignored, as the reference reader does.
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if repeated {
                return Err(A::Error::custom(format!("tensor {name:?} has two fields {field:?}")));
            }
        }
        let missing = |field: &str| A::Error::custom(format!("tensor {name:?} has no field {field:?}"));
        Ok(RawTensor {
            dtype: dtype.ok_or_else(|| missing("dtype"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
            offsets: offsets.ok_or_else(|| missing("data_offsets"))?,
            name,
        })
    }
}

fn named<T, E: serde::de::Error>(tensor: &str, r: Result<T, E>) -> Result<T, E> {
    r.map_err(|e| E::custom(format!("tensor {tensor:?}: {e}")))
}

/// A list of extents of bounded length.
struct ShapeSeed;

impl<'de> DeserializeSeed<'de> for ShapeSeed {
    type Value = Vec<u64>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Vec<u64>, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shape")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(d) = seq.next_element()? {
            if shape.len() == MAX_RANK {
                return Err(A::Error::custom(format!("more than {MAX_RANK} dimensions")));
            }
            shape.push(d);
        }
        Ok(shape)
    }
}

/// One tensor's bytes in a mapped file.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// Full name in its file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Shape,
    /// Its bytes, row-major and little-endian; they keep the file mapped.
    pub bytes: MappedBytes,
}

/// An opened and checked safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: Arc<MappedFile>,
    header: Header,
    by_name: HashMap<String, usize>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header. No tensor data is read.
    ///
    /// # Errors
    /// When the file cannot be read or its header is not valid; messages name the file and the tensor.
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let file = MappedFile::open(path)?;
        let format = |source| SafetensorsError::Format { path: path.to_owned(), source };
        let header = Header::parse(file.as_slice()).map_err(format)?;
        let mut by_name = HashMap::with_capacity(header.tensors.len());
        for (i, t) in header.tensors.iter().enumerate() {
            match by_name.entry(t.name.clone()) {
                Entry::Vacant(e) => {
                    e.insert(i);
                }
                Entry::Occupied(_) => return Err(format(FormatError::Duplicate(t.name.clone()))),
            }
        }
        Ok(SafetensorsFile { file, header, by_name })
    }

    /// The file's path as it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The mapped file.
    #[must_use]
    pub fn mapped(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// The parsed header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Every tensor, ordered by offset.
    #[must_use]
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.header.tensors
    }

    /// The tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView> {
        self.view(*self.by_name.get(name)?)
    }

    /// The tensor at this place in [`tensors`](SafetensorsFile::tensors).
    #[must_use]
    pub fn view(&self, index: usize) -> Option<TensorView> {
        let t = self.header.tensors.get(index)?;
        let (start, end) = (usize::try_from(t.range.start).ok()?, usize::try_from(t.range.end).ok()?);
        Some(TensorView {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            bytes: self.file.bytes(start..end)?,
        })
    }
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
