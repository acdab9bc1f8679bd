//! Writes a Hugging Face directory tensor by tensor, in bounded memory.
//!
//! A [`HfPlan`] fixes everything that needs no data: which tensor goes into which shard, every header, the index, the
//! number of bytes. [`write_hf`] then asks the caller for the data of one tensor after the other, in the order of the
//! files.
//!
//! # Alignment
//! The format forbids holes between tensors, so alignment can come from the header's padding and the order alone. The
//! header is padded with spaces (which every reader accepts) until the data starts at a multiple of 64. Within a file,
//! tensors whose size is a multiple of 64 bytes come first, in the order of the plan; they are therefore all 64-byte
//! aligned and can be used in place when mapped. The others follow, those with the larger power of two in their
//! size first, so that each of them is aligned to that power, which is at least the size of one element. In a
//! transformer that leaves only scalars and the like unaligned.

use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use fs_err as fs;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tensor::{DType, Shape};

use crate::commit::{CommitError, StagedDir, check_space};
use crate::hf::{INDEX_FILE, SINGLE_FILE};
use crate::manifest::{MANIFEST_FILE, Manifest, ManifestFile, hex};
use crate::safetensors::MAX_HEADER_LEN;

/// Alignment of the data section and of every tensor whose size is a multiple of it, in bytes.
pub const ALIGNMENT: u64 = 64;

/// Bytes handed over to the file and to the checksum at a time.
const PIECE: usize = 4 << 20;
/// Pieces in flight between the writer and the checksum thread.
const PIECES: usize = 3;

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Shape,
}

/// How to lay out a directory.
#[derive(Debug, Clone)]
pub struct PlanOptions {
    /// Largest size of one weights file in bytes of data; a single larger tensor gets a file of its own. `None`: one
    /// file, whatever its size.
    pub max_shard_bytes: Option<u64>,
    /// Metadata of every weights file.
    pub metadata: Vec<(String, String)>,
}

impl Default for PlanOptions {
    /// One file, with the metadata that other readers expect.
    fn default() -> Self {
        PlanOptions { max_shard_bytes: None, metadata: vec![("format".to_owned(), "pt".to_owned())] }
    }
}

/// How to write a directory.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions {
    /// Replace an existing checkpoint.
    pub force: bool,
    /// Leave out `lapidary_manifest.json`.
    pub no_manifest: bool,
    /// Small files to put beside the weights, such as `config.json`: name and content.
    pub extra_files: Vec<(String, Vec<u8>)>,
}

/// What can go wrong when a directory is planned or written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Two tensors have one name.
    #[error("tensor {0:?} is planned twice")]
    Duplicate(String),
    /// A name with a meaning of its own in the format.
    #[error("tensor name {0:?} is reserved by the format")]
    Reserved(String),
    /// A shape whose size overflows.
    #[error("tensor {tensor:?}: {source}")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The shape.
        source: tensor::ShapeError,
    },
    /// The header would be longer than the format allows.
    #[error("the header of {file} would have {len} bytes, more than the format's limit of {MAX_HEADER_LEN}")]
    HeaderTooLarge {
        /// The file.
        file: String,
        /// Its size.
        len: usize,
    },
    /// An extra file's name is no plain name or collides with another file.
    #[error("extra file {0:?} has no usable name")]
    ExtraName(String),
    /// The source of a tensor's data failed.
    #[error("cannot produce tensor {tensor:?}: {source}")]
    Source {
        /// The tensor.
        tensor: String,
        /// What happened.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The source gave another number of bytes than the plan says.
    #[error("tensor {tensor:?} has {expected} bytes, its source gave {found}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Bytes in the plan.
        expected: u64,
        /// Bytes given (at least, when it is more).
        found: u64,
    },
    /// The output directory cannot be staged or committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A file cannot be written; the source names it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One tensor's place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTensor {
    /// Its place in the list that the plan was made from.
    pub index: usize,
    /// Name, dtype and shape.
    pub tensor: TensorPlan,
    /// Where its bytes begin, from the start of the file.
    pub offset: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// One weights file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedFile {
    /// Name within the directory.
    pub name: String,
    /// Everything before the data: length field, JSON, padding.
    pub header: Vec<u8>,
    /// The tensors in the order of their data.
    pub tensors: Vec<PlacedTensor>,
    /// Size of the whole file.
    pub bytes: u64,
}

/// The layout of a directory's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfPlan {
    /// The weights files in order.
    pub files: Vec<PlannedFile>,
    /// Content of the index, if there is more than one file.
    pub index: Option<String>,
    /// Bytes of tensor data.
    pub data_bytes: u64,
}

impl HfPlan {
    /// Lays out tensors in files. Shards are filled in the order given.
    ///
    /// # Errors
    /// When names collide or sizes overflow.
    pub fn new(tensors: &[TensorPlan], options: &PlanOptions) -> Result<Self, WriteError> {
        let mut seen = HashSet::new();
        let mut shards: Vec<Vec<(usize, u64)>> = vec![Vec::new()];
        let (mut in_shard, mut data_bytes) = (0u64, 0u64);
        for (index, t) in tensors.iter().enumerate() {
            if t.name == "__metadata__" {
                return Err(WriteError::Reserved(t.name.clone()));
            }
            if !seen.insert(t.name.as_str()) {
                return Err(WriteError::Duplicate(t.name.clone()));
            }
            let overflow = |source| WriteError::Overflow { tensor: t.name.clone(), source };
            let bytes = t.shape.checked_bytes(t.dtype).map_err(overflow)? as u64;
            data_bytes = data_bytes.checked_add(bytes).ok_or_else(|| overflow(tensor::ShapeError(t.shape.clone())))?;
            let full = options.max_shard_bytes.is_some_and(|max| in_shard > 0 && in_shard.saturating_add(bytes) > max);
            if full {
                shards.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push((index, bytes));
            }
        }
        let n = shards.len();
        let name = |i: usize| match n {
            1 => SINGLE_FILE.to_owned(),
            _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let files = shards
            .into_iter()
            .enumerate()
            .map(|(i, shard)| plan_file(name(i), tensors, shard, &options.metadata))
            .collect::<Result<Vec<_>, _>>()?;
        let index = (n > 1).then(|| index_text(&files, data_bytes));
        Ok(HfPlan { files, index, data_bytes })
    }

    /// Bytes of all files together, without extra files.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        let index = self.index.as_ref().map_or(0, String::len) as u64;
        self.files.iter().map(|f| f.bytes).fold(index, u64::saturating_add)
    }
}

fn plan_file(
    name: String,
    tensors: &[TensorPlan],
    mut shard: Vec<(usize, u64)>,
    metadata: &[(String, String)],
) -> Result<PlannedFile, WriteError> {
    // See the module page. A stable sort: equals stay in the order of the plan. Sizes of zero fit anywhere.
    shard.sort_by_key(|&(_, bytes)| {
        let power = if bytes == 0 { ALIGNMENT } else { (1 << bytes.trailing_zeros()).min(ALIGNMENT) };
        std::cmp::Reverse(power)
    });
    let mut json = Map::new();
    let metadata: Map<String, Value> = metadata.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    json.insert("__metadata__".to_owned(), Value::Object(metadata));
    let mut placed = Vec::with_capacity(shard.len());
    let mut at = 0u64;
    for (index, bytes) in shard {
        let Some(t) = tensors.get(index) else { continue };
        let entry = json!({
            "dtype": t.dtype.safetensors_name(),
            "shape": t.shape.dims(),
            "data_offsets": [at, at + bytes],
        });
        json.insert(t.name.clone(), entry);
        placed.push(PlacedTensor { index, tensor: t.clone(), offset: at, bytes });
        at += bytes;
    }
    let mut text = Value::Object(json).to_string().into_bytes();
    let start = (8 + text.len()).next_multiple_of(ALIGNMENT as usize);
    text.resize(start - 8, b' ');
    if text.len() as u64 > MAX_HEADER_LEN {
        return Err(WriteError::HeaderTooLarge { file: name, len: text.len() });
    }
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&text);
    for t in &mut placed {
        t.offset += header.len() as u64;
    }
    let bytes = header.len() as u64 + at;
    Ok(PlannedFile { name, header, tensors: placed, bytes })
}

fn index_text(files: &[PlannedFile], data_bytes: u64) -> String {
    let mut map: Vec<(&str, &str)> =
        files.iter().flat_map(|f| f.tensors.iter().map(|t| (t.tensor.name.as_str(), f.name.as_str()))).collect();
    map.sort_unstable();
    let map: Map<String, Value> = map.into_iter().map(|(t, f)| (t.to_owned(), json!(f))).collect();
    let parameters: u64 = files.iter().flat_map(|f| &f.tensors).map(|t| t.tensor.shape.elements() as u64).sum();
    let index = json!({"metadata": {"total_parameters": parameters, "total_size": data_bytes}, "weight_map": map});
    // Printing a value of strings and numbers cannot fail.
    let mut text = serde_json::to_string_pretty(&index).unwrap_or_default();
    text.push('\n');
    text
}

/// Takes the bytes of one tensor, in order and in pieces of any size.
pub struct TensorSink<'a> {
    out: &'a mut HashedFile,
    tensor: &'a PlacedTensor,
    given: u64,
    before: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl fmt::Debug for TensorSink<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorSink({}, {} of {} bytes)", self.tensor.tensor.name, self.given, self.tensor.bytes)
    }
}

impl TensorSink<'_> {
    /// Appends bytes of the tensor.
    ///
    /// # Errors
    /// When they exceed the tensor, or the file cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let found = self.given.saturating_add(bytes.len() as u64);
        if found > self.tensor.bytes {
            let tensor = self.tensor.tensor.name.clone();
            return Err(WriteError::Length { tensor, expected: self.tensor.bytes, found });
        }
        for piece in bytes.chunks(PIECE) {
            self.out.write(piece)?;
            self.given += piece.len() as u64;
            (self.progress)(self.before + self.given);
        }
        Ok(())
    }

    /// Bytes still to come.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.tensor.bytes - self.given
    }
}

/// Writes the planned directory. `fill` is called once per tensor, in the order of the files, with the tensor's index
/// in the list that the plan was made from; `progress` gets the bytes of data written so far, of
/// [`HfPlan::data_bytes`].
///
/// Nothing is visible at `target` before everything is on disk; after an error nothing is left. Returns the digests of
/// what was written.
///
/// # Errors
/// When the target exists without `force`, space is short, `fill` fails or gives another number of bytes than planned,
/// or the file system refuses.
pub fn write_hf(
    target: &Path,
    plan: &HfPlan,
    options: &WriteOptions,
    mut fill: impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), Box<dyn Error + Send + Sync>>,
    mut progress: impl FnMut(u64),
) -> Result<Manifest, WriteError> {
    let taken: HashSet<&str> = plan.files.iter().map(|f| f.name.as_str()).chain([INDEX_FILE, MANIFEST_FILE]).collect();
    check_extra_files(&options.extra_files, &taken)?;
    let extra: u64 = options.extra_files.iter().map(|(_, b)| b.len() as u64).sum();
    check_space(target, plan.total_bytes().saturating_add(extra))?;
    let staged = StagedDir::create(target, options.force)?;
    let mut manifest = Manifest::default();
    let mut done = 0;
    for file in &plan.files {
        manifest.files.push(write_file(staged.path(), file, &mut fill, &mut |written| progress(done + written))?);
        done += file.tensors.iter().map(|t| t.bytes).sum::<u64>();
    }
    let index = plan.index.iter().map(|text| (INDEX_FILE, text.as_bytes()));
    let extra = options.extra_files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    for (name, bytes) in index.chain(extra) {
        fs::write(staged.path().join(name), bytes)?;
        manifest.files.push(ManifestFile::of_bytes(name, bytes));
    }
    if !options.no_manifest {
        manifest.write(staged.path())?;
    }
    staged.commit()?;
    Ok(manifest)
}

/// Writes one planned file into a directory that the caller has staged; the file must not exist. `fill` and `progress`
/// are as in [`write_hf`], for this file alone. Returns the file's digest.
///
/// # Errors
/// When the file exists, `fill` fails or gives another number of bytes than planned, or the file system refuses.
pub fn write_file(
    dir: &Path,
    file: &PlannedFile,
    fill: &mut dyn FnMut(usize, &mut TensorSink<'_>) -> Result<(), Box<dyn Error + Send + Sync>>,
    progress: &mut dyn FnMut(u64),
) -> Result<ManifestFile, WriteError> {
    let mut done = 0;
    let mut out = HashedFile::create(&dir.join(&file.name))?;
    out.write(&file.header)?;
    for t in &file.tensors {
        let mut sink = TensorSink { out: &mut out, tensor: t, given: 0, before: done, progress: &mut *progress };
        match fill(t.index, &mut sink) {
            Ok(()) => {}
            // The sink's own errors come back as they were, not as the source's.
            Err(e) => match e.downcast::<WriteError>() {
                Ok(own) => return Err(*own),
                Err(source) => return Err(WriteError::Source { tensor: t.tensor.name.clone(), source }),
            },
        }
        if sink.remaining() > 0 {
            let (tensor, found) = (t.tensor.name.clone(), sink.given);
            return Err(WriteError::Length { tensor, expected: t.bytes, found });
        }
        done += t.bytes;
    }
    Ok(out.finish(&file.name)?)
}

pub(crate) fn check_extra_files(files: &[(String, Vec<u8>)], taken: &HashSet<&str>) -> Result<(), WriteError> {
    let mut seen = HashSet::new();
    for (name, _) in files {
        let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
        if !plain || taken.contains(name.as_str()) || !seen.insert(name) {
            return Err(WriteError::ExtraName(name.clone()));
        }
    }
    Ok(())
}

/// A file whose SHA-256 is computed by a second thread while it is written.
#[derive(Debug)]
pub(crate) struct HashedFile {
    path: PathBuf,
    file: fs::File,
    buffer: Vec<u8>,
    written: u64,
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    hasher: JoinHandle<String>,
}

impl HashedFile {
    /// Creates the file; it must not exist.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
        let (full, work) = sync_channel::<Vec<u8>>(PIECES);
        let (give_back, empty) = channel();
        for _ in 0..PIECES {
            // The receiver lives in this function.
            let _ = give_back.send(Vec::new());
        }
        let hasher = std::thread::Builder::new().name("sha256".to_owned()).spawn(move || {
            let mut hasher = Sha256::new();
            for mut piece in work {
                hasher.update(&piece);
                piece.clear();
                // The writer may be gone already; then nobody needs the buffer.
                let _ = give_back.send(piece);
            }
            hex(&hasher.finalize())
        })?;
        let buffer = Vec::with_capacity(PIECE);
        Ok(HashedFile { path: path.to_owned(), file, buffer, written: 0, full, empty, hasher })
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == PIECE {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.written += self.buffer.len() as u64;
        let next = self.empty.recv().map_err(|_| self.lost())?;
        let piece = std::mem::replace(&mut self.buffer, next);
        self.buffer.reserve_exact(PIECE);
        self.full.send(piece).map_err(|_| self.lost())
    }

    fn lost(&self) -> io::Error {
        io::Error::other(format!("the checksum thread of {} ended early", self.path.display()))
    }

    /// Writes what is buffered and returns size and digest. Flushing to the device is left to the commit.
    pub(crate) fn finish(mut self, name: &str) -> io::Result<ManifestFile> {
        self.flush()?;
        let lost = self.lost();
        drop(self.full);
        let sha256 = self.hasher.join().map_err(|_| lost)?;
        Ok(ManifestFile { name: name.to_owned(), bytes: self.written, sha256 })
    }
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
