//! An open checkpoint.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde_json::{Map, Value};
use tensor::{DType, HostArray, Shape};

use super::OrbaxError;
use super::checksums::Checksums;
use super::container::{Blob, Container};
use super::leaf::{Leaf, Of, visit};
use super::locate::{Located, locate};
use super::region::{Region, advance};
use super::tree::{CHECKPOINT_METADATA, COMMIT, Key, METADATA, TreeKind, TreeLeaf, TreeMetadata, read_json};
use super::zarr::{ArrayMeta, ChunkError, Endian, ZSTD_MAX_RATIO};
use crate::mmap::MappedBytes;

/// Which arrays of a checkpoint are of interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// Parameters, and small things beside them such as the step. Optimizer state is counted and not looked at.
    #[default]
    Parameters,
    /// Everything.
    All,
}

/// Top-level entries that [`Scope::Parameters`] passes over.
const SKIPPED: [&str; 3] = ["opt_state", "optimizer", "nnx_aux"];

/// One array of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct ArrayInfo {
    /// The name under which it is stored: path elements joined by dots.
    pub name: String,
    /// The name of the parameter without what the tree puts around it, such as `params.params`; `None` for anything
    /// that is no parameter.
    pub param_name: Option<String>,
    /// Element type.
    #[serde(serialize_with = "display")]
    pub dtype: DType,
    /// Extent of every dimension.
    #[serde(serialize_with = "dims")]
    pub shape: Shape,
    /// Extent of a chunk; those at the edge may reach beyond the array.
    pub chunk_shape: Vec<usize>,
    /// Number of chunks.
    pub chunks: usize,
    /// How chunks are encoded: `zarr3 bytes+crc32c`.
    pub format: String,
    /// Whether a checksum covers every stored element.
    pub checksummed: bool,
    /// Whether it is compressed.
    pub compressed: bool,
    /// Bytes of its chunks as stored.
    pub stored_bytes: u64,
    /// What the tree calls it: `np.ndarray`, `jax.Array`, `scalar`; `None` if there is no `_METADATA`.
    pub value_type: Option<String>,
}

fn display<S: serde::Serializer>(d: &DType, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(d)
}

fn dims<S: serde::Serializer>(d: &Shape, s: S) -> Result<S::Ok, S::Error> {
    d.dims().serialize(s)
}

/// Arrays that were counted and not looked at.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Skipped {
    /// Top-level entry of the tree.
    pub subtree: String,
    /// Number of arrays.
    pub arrays: usize,
}

/// Something that is not as it should be, though the checkpoint could be opened.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Problem {
    /// The array it concerns.
    pub array: Option<String>,
    /// What is wrong.
    pub message: String,
}

/// Chunks beyond this size leave the process's memory once they were handed out.
const DROP_BEHIND: usize = 256 << 10;

#[derive(Debug)]
struct Stored {
    meta: ArrayMeta,
    /// Key of the first chunk that is absent.
    missing: Option<String>,
    /// Chunks (and inner chunks) whose checksum was right when they were first read.
    verified: Mutex<HashSet<(usize, usize)>>,
}

/// An open checkpoint. All methods take `&self`; threads may read different arrays, or chunks of one, at the same time.
#[derive(Debug)]
pub struct OrbaxCheckpoint {
    located: Located,
    container: Container,
    checksums: Checksums,
    kind: TreeKind,
    arrays: Vec<ArrayInfo>,
    stored: Vec<Stored>,
    index: HashMap<String, usize>,
    parameters: HashMap<String, usize>,
    not_stored: HashSet<String>,
    empty: Vec<TreeLeaf>,
    skipped: Vec<Skipped>,
    metadata: Map<String, Value>,
    problems: Vec<Problem>,
}

impl OrbaxCheckpoint {
    /// Opens the parameters of a checkpoint. `path` is the item directory (`.../0/items`), a step, or a run of which
    /// the newest finished step is taken.
    ///
    /// # Errors
    /// When there is no finished checkpoint, or its structure is damaged. A missing chunk is listed by
    /// [`problems`](Self::problems) and becomes an error when its array is read.
    pub fn open(path: &Path) -> Result<Self, OrbaxError> {
        Self::open_scope(path, Scope::Parameters)
    }

    /// As [`open`](Self::open), for other arrays than parameters too.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_scope(path: &Path, scope: Scope) -> Result<Self, OrbaxError> {
        let located = locate(path)?;
        let items = located.items.clone();
        let recorded = Checksums::read(&items)?;
        let had_record = recorded.is_some();
        let checksums = recorded.unwrap_or_default();
        let tree = TreeMetadata::read(&items)?;
        let container = Container::open(&items)?;
        let is_array_file = match &container {
            Container::Ocdbt { .. } => |_: &str| false,
            // Those of arrays are read and checked one by one below.
            Container::Files { .. } => |p: &str| p.contains('/'),
        };
        checksums.check_files(&items, |p| !is_array_file(p))?;
        let mut out = OrbaxCheckpoint {
            metadata: Map::new(),
            located,
            container,
            checksums,
            kind: TreeKind::Bare,
            arrays: vec![],
            stored: vec![],
            index: HashMap::new(),
            parameters: HashMap::new(),
            not_stored: HashSet::new(),
            empty: vec![],
            skipped: vec![],
            problems: vec![],
        };
        out.read_metadata()?;
        out.note_record(had_record);
        out.collect(tree, scope)?;
        Ok(out)
    }

    fn problem(&mut self, array: Option<&str>, message: impl Into<String>) {
        self.problems.push(Problem { array: array.map(str::to_owned), message: message.into() });
    }

    fn note_record(&mut self, had_record: bool) {
        let items = &self.located.items;
        let mut notes = self.located.notes.clone();
        if had_record {
            for file in [METADATA, CHECKPOINT_METADATA, COMMIT] {
                if !self.checksums.contains(file) {
                    notes.push(format!("{file} has no recorded checksum"));
                }
            }
        }
        if !items.join(COMMIT).is_file() {
            notes.push(format!(
                "no {COMMIT}: written by an Orbax before 0.12.3, or never completed if it comes from an object store"
            ));
        }
        if matches!(self.container, Container::Ocdbt { merged: false, .. }) {
            notes.push(
                "the stores of its processes were never merged: the save was interrupted near its end".to_owned(),
            );
        }
        notes.into_iter().for_each(|n| self.problem(None, n));
    }

    /// Takes the custom metadata of the item and of the step around it.
    fn read_metadata(&mut self) -> Result<(), OrbaxError> {
        let dirs = [Some(self.located.items.clone()), self.located.step_dir.clone()];
        let mut found: Vec<Map<String, Value>> = Vec::new();
        for dir in dirs.into_iter().flatten() {
            let path = dir.join(CHECKPOINT_METADATA);
            let Some(mut o) = read_json(&path)? else { continue };
            match o.remove("custom_metadata") {
                Some(Value::Object(m)) => found.push(m),
                None | Some(Value::Null) => {}
                Some(_) => {
                    return Err(OrbaxError::Json { path, why: "its custom_metadata is no object".to_owned() });
                }
            }
        }
        if let [item, step] = found.as_slice()
            && item != step
        {
            self.problem(None, format!("the {CHECKPOINT_METADATA} of the item and of the step disagree"));
        }
        self.metadata = found.into_iter().next().unwrap_or_default();
        Ok(())
    }

    fn collect(&mut self, tree: Option<TreeMetadata>, scope: Scope) -> Result<(), OrbaxError> {
        let names = self.names(tree.as_ref())?;
        if tree.is_none() {
            self.problem(None, format!("no {METADATA}: some programs cannot restore it"));
        }
        let leaves: HashMap<String, &TreeLeaf> =
            tree.iter().flat_map(|t| &t.leaves).filter(|l| !l.empty).map(|l| (l.name(), l)).collect();
        // Without a tree, the dots of a name are taken for steps of a path.
        let split = |name: &str| name.split('.').map(|s| Key::Dict(s.to_owned())).collect::<Vec<_>>();
        let paths: Vec<Vec<Key>> =
            names.iter().map(|(n, _)| leaves.get(n).map_or_else(|| split(n), |l| l.path.clone())).collect();
        self.kind = TreeKind::detect(paths.iter().map(Vec::as_slice));
        let mut skipped: Vec<Skipped> = Vec::new();
        for ((name, version), path) in names.into_iter().zip(&paths) {
            let top = path.first().map_or("", Key::text);
            if scope == Scope::Parameters && SKIPPED.contains(&top) {
                match skipped.iter_mut().find(|s| s.subtree == top) {
                    Some(s) => s.arrays += 1,
                    None => skipped.push(Skipped { subtree: top.to_owned(), arrays: 1 }),
                }
                continue;
            }
            let value_type = leaves.get(&name).map(|l| l.value_type.clone());
            if tree.is_some() && value_type.is_none() {
                self.problem(Some(&name), format!("it is stored and not listed in {METADATA}"));
            }
            self.add(name, version, self.kind.parameter(path), value_type)?;
        }
        self.skipped = skipped;
        let mut absent: Vec<(String, bool)> = leaves
            .iter()
            .filter(|(name, _)| !self.index.contains_key(*name))
            .map(|(name, leaf)| (name.clone(), SKIPPED.contains(&leaf.path.first().map_or("", Key::text))))
            .collect();
        absent.sort();
        for (name, skippable) in absent {
            if scope == Scope::Parameters && skippable {
                continue;
            }
            self.problem(Some(&name), format!("it is listed in {METADATA} and was never stored"));
            self.not_stored.insert(name);
        }
        self.empty = tree.into_iter().flat_map(|t| t.leaves).filter(|l| l.empty).collect();
        Ok(())
    }

    /// Every array once, with the version of its metadata.
    fn names(&mut self, tree: Option<&TreeMetadata>) -> Result<Vec<(String, u8)>, OrbaxError> {
        let mut names: Vec<(String, u8)> = Vec::new();
        let preferred = tree.and_then(|t| t.use_zarr3).map(|v3| if v3 { 3 } else { 2 });
        for (name, version) in self.container.arrays()? {
            match names.last_mut() {
                Some(last) if last.0 == name => {
                    last.1 = preferred.unwrap_or(3);
                    self.problem(Some(&name), "it has metadata of zarr 2 and of zarr 3");
                }
                _ => names.push((name, version)),
            }
        }
        Ok(names)
    }

    fn add(
        &mut self,
        name: String,
        version: u8,
        param_name: Option<String>,
        value_type: Option<String>,
    ) -> Result<(), OrbaxError> {
        let key = if version == 2 { format!("{name}/.zarray") } else { format!("{name}/zarr.json") };
        let meta = {
            let blob = self.get(&key)?.ok_or_else(|| OrbaxError::NotStored { array: name.clone() })?;
            let parsed = if version == 2 { ArrayMeta::parse_v2(&blob) } else { ArrayMeta::parse_v3(&blob) };
            parsed.map_err(|source| OrbaxError::Array { array: name.clone(), source })?
        };
        let (stored_bytes, missing) = self.survey(&name, &meta)?;
        if let Some(chunk) = &missing {
            self.problem(Some(&name), format!("chunk {chunk} is missing"));
        }
        let recorded = |c: &str| self.checksums.contains(&format!("{name}/{c}"));
        let first = meta.chunk_key(&vec![0; meta.shape.rank()]);
        let info = ArrayInfo {
            dtype: meta.dtype,
            shape: meta.shape.clone(),
            chunk_shape: meta.chunk_shape.clone(),
            chunks: meta.chunk_count(),
            format: meta.describe(),
            checksummed: meta.codecs.has_checksum() || recorded(&first),
            compressed: meta.codecs.is_compressed(),
            stored_bytes,
            value_type,
            param_name: param_name.clone(),
            name: name.clone(),
        };
        let at = self.arrays.len();
        if let Some(p) = param_name
            && let Some(other) = self.parameters.insert(p, at)
        {
            let other = self.arrays[other].name.clone();
            self.problem(Some(&name), format!("it is the same parameter as {other}"));
        }
        self.index.insert(name, at);
        self.arrays.push(info);
        self.stored.push(Stored { meta, missing, verified: Mutex::default() });
        Ok(())
    }

    /// Sums up the chunks of an array until one is missing, so that an absurd grid costs no more than what is there.
    fn survey(&self, name: &str, meta: &ArrayMeta) -> Result<(u64, Option<String>), OrbaxError> {
        let (grid, mut bytes) = (meta.grid(), 0u64);
        if meta.chunk_count() == 0 {
            return Ok((0, None));
        }
        let mut index = vec![0; grid.len()];
        loop {
            let chunk = meta.chunk_key(&index);
            match self.container.len(&format!("{name}/{chunk}"))? {
                Some(n) => bytes = bytes.saturating_add(n),
                None => return Ok((bytes, Some(chunk))),
            }
            if !advance(&mut index, &grid) {
                return Ok((bytes, None));
            }
        }
    }

    /// A value with its recorded checksum verified.
    fn get(&self, key: &str) -> Result<Option<Blob<'_>>, OrbaxError> {
        let blob = self.container.get(key)?;
        if let (Container::Files { .. }, Some(b)) = (&self.container, &blob) {
            self.checksums.check(key, b)?;
        }
        Ok(blob)
    }

    /// The directory with the arrays.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.located.items
    }

    /// The step directory around it, if there is one.
    #[must_use]
    pub fn step_dir(&self) -> Option<&PathBuf> {
        self.located.step_dir.as_ref()
    }

    /// The step in the name of its directory.
    #[must_use]
    pub fn step(&self) -> Option<u64> {
        self.located.step
    }

    /// What is around the parameters.
    #[must_use]
    pub fn kind(&self) -> TreeKind {
        self.kind
    }

    /// `OCDBT` or plain files, with what is worth knowing.
    #[must_use]
    pub fn container(&self) -> String {
        self.container.describe()
    }

    /// Every array in the scope, by name.
    #[must_use]
    pub fn arrays(&self) -> &[ArrayInfo] {
        &self.arrays
    }

    /// The array of this stored name.
    #[must_use]
    pub fn array(&self, name: &str) -> Option<&ArrayInfo> {
        self.index.get(name).map(|&i| &self.arrays[i])
    }

    /// The array of this parameter.
    #[must_use]
    pub fn parameter(&self, param_name: &str) -> Option<&ArrayInfo> {
        self.parameters.get(param_name).map(|&i| &self.arrays[i])
    }

    /// What the scope left out.
    #[must_use]
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Leaves of the tree that hold nothing: empty dictionaries, lists and `None`.
    #[must_use]
    pub fn empty_leaves(&self) -> &[TreeLeaf] {
        &self.empty
    }

    /// `custom_metadata`: MaxText's `scan_layers`, provenance and the like.
    #[must_use]
    pub fn custom_metadata(&self) -> &Map<String, Value> {
        &self.metadata
    }

    /// What is not as it should be.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    fn find(&self, name: &str) -> Result<(&ArrayInfo, &Stored), OrbaxError> {
        match self.index.get(name) {
            Some(&i) => Ok((&self.arrays[i], &self.stored[i])),
            None if self.not_stored.contains(name) => Err(OrbaxError::NotStored { array: name.to_owned() }),
            None => Err(OrbaxError::Unknown { array: name.to_owned(), path: self.located.items.clone() }),
        }
    }

    /// As `find`, for an array of which every chunk is there.
    fn complete(&self, name: &str) -> Result<(&ArrayInfo, &Stored), OrbaxError> {
        let (info, stored) = self.find(name)?;
        match &stored.missing {
            None => Ok((info, stored)),
            Some(chunk) => Err(self.missing(name, chunk.clone())),
        }
    }

    fn missing(&self, name: &str, chunk: String) -> OrbaxError {
        OrbaxError::MissingChunk { array: name.to_owned(), chunk, path: self.located.items.clone() }
    }

    fn damaged(&self, name: &str, chunk: &str, source: ChunkError) -> OrbaxError {
        let (array, chunk, path) = (name.to_owned(), chunk.to_owned(), self.located.items.clone());
        match source {
            ChunkError::Missing(inner) => {
                OrbaxError::MissingChunk { array, chunk: format!("{chunk} (inner {inner:?})"), path }
            }
            source => OrbaxError::Chunk { array, chunk, path, source },
        }
    }

    /// Calls `f` with every leaf of one chunk that has elements in `want`.
    fn leaves(
        &self,
        info: &ArrayInfo,
        stored: &Stored,
        index: &[usize],
        want: &Region,
        f: &mut impl FnMut(&Leaf<'_>, Of<'_>, bool) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let chunk = stored.meta.chunk_key(index);
        let blob = self.get(&format!("{}/{chunk}", info.name))?.ok_or_else(|| self.missing(&info.name, chunk))?;
        self.leaves_of(info, stored, index, &blob, want, f)
    }

    /// As `leaves`, with the chunk's bytes at hand.
    fn leaves_of(
        &self,
        info: &ArrayInfo,
        stored: &Stored,
        index: &[usize],
        blob: &[u8],
        want: &Region,
        f: &mut impl FnMut(&Leaf<'_>, Of<'_>, bool) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let meta = &stored.meta;
        let number = index.iter().zip(meta.grid()).fold(0usize, |n, (i, g)| n.saturating_mul(g).saturating_add(*i));
        let of = Of { shape: &meta.shape, dtype: meta.dtype };
        let outer = Leaf {
            origin: index.iter().zip(&meta.chunk_shape).map(|(i, c)| i * c).collect(),
            order: (0..index.len()).collect(),
            shape: meta.chunk_shape.clone(),
            codecs: &[],
            endian: Endian::Little,
            bytes: blob,
            inner: 0,
        };
        visit(&meta.codecs, outer, want, &mut |leaf: &Leaf<'_>| {
            let id = (number, leaf.inner);
            let known = stored.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(&id);
            f(leaf, of, !known)?;
            if !known {
                stored.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
            }
            Ok(())
        })
        .map_err(|e: Failure| match e {
            Failure::Chunk(e) => self.damaged(&info.name, &meta.chunk_key(index), e).into(),
            other => other,
        })
    }

    /// Reads a whole array.
    ///
    /// # Errors
    /// When there is no such array, a chunk of it is missing or damaged, or it does not fit memory.
    pub fn read_array(&self, name: &str) -> Result<HostArray, OrbaxError> {
        let (info, _) = self.complete(name)?;
        let bytes = info.shape.elements().saturating_mul(info.dtype.size());
        let memory = || OrbaxError::Memory { array: name.to_owned(), bytes };
        // A shape is a claim: no memory for elements that the stored bytes cannot hold.
        let ratio = if info.compressed { ZSTD_MAX_RATIO } else { 1 };
        let stored = info.stored_bytes.min(self.container.file_bytes());
        if bytes as u64 > stored.saturating_mul(ratio) {
            let why = format!("its {stored} stored bytes cannot hold the {bytes} of its shape {}", info.shape);
            return Err(OrbaxError::Region { array: name.to_owned(), why });
        }
        // Asked for first, because running out of memory cannot be caught later.
        Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| memory())?;
        let mut out = HostArray::zeros(info.dtype, info.shape.clone()).map_err(|_| memory())?;
        self.read_region(name, &Region::whole(&info.shape), out.bytes_mut())?;
        Ok(out)
    }

    /// Reads `count` rows along the first dimension, from row `first` on, into `out`.
    ///
    /// # Errors
    /// As [`read_region`](Self::read_region); also for a scalar, which has no rows.
    pub fn read_rows(&self, name: &str, first: usize, count: usize, out: &mut [u8]) -> Result<(), OrbaxError> {
        let (info, _) = self.find(name)?;
        let mut region = Region::whole(&info.shape);
        if region.shape.is_empty() {
            return Err(OrbaxError::Region { array: name.to_owned(), why: "a scalar has no rows".to_owned() });
        }
        (region.origin[0], region.shape[0]) = (first, count);
        self.read_region(name, &region, out)
    }

    /// Reads a box of an array into `out`, dense, row-major and little-endian. Needs no memory of its own beyond a
    /// megabyte unless chunks are compressed *and* transposed.
    ///
    /// # Errors
    /// When there is no such array, the box is not within it, `out` has another size, or a chunk that the box touches is
    /// missing or damaged.
    pub fn read_region(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<(), OrbaxError> {
        let (info, stored) = self.complete(name)?;
        let bad = |why: String| OrbaxError::Region { array: name.to_owned(), why };
        if !region.fits(&info.shape) {
            return Err(bad(format!("{region} is not within {}", info.shape)));
        }
        let wanted = region.elements() * info.dtype.size();
        if out.len() != wanted {
            return Err(bad(format!("{region} needs {wanted} bytes and {} are given", out.len())));
        }
        if wanted == 0 {
            return Ok(());
        }
        let first: Vec<usize> = region.origin.iter().zip(&info.chunk_shape).map(|(o, c)| o / c).collect();
        let counts: Vec<usize> = (0..first.len())
            .map(|i| (region.origin[i] + region.shape[i]).div_ceil(info.chunk_shape[i]) - first[i])
            .collect();
        let mut step = vec![0; first.len()];
        loop {
            let index: Vec<usize> = first.iter().zip(&step).map(|(a, b)| a + b).collect();
            self.leaves(info, stored, &index, region, &mut |leaf, of, verify| {
                Ok(leaf.copy_into(of, region, out, verify)?)
            })
            .map_err(Failure::into_orbax)?;
            if !advance(&mut step, &counts) {
                break;
            }
        }
        if info.dtype == DType::Bool && out.iter().any(|&b| b > 1) {
            return Err(self.damaged(name, "?", ChunkError::Bool));
        }
        Ok(())
    }

    fn check_index(&self, info: &ArrayInfo, stored: &Stored, index: &[usize]) -> Result<(), OrbaxError> {
        let grid = stored.meta.grid();
        if index.len() != grid.len() || index.iter().zip(&grid).any(|(i, g)| i >= g) {
            let why = format!("there is no chunk {index:?} in a grid of {grid:?}");
            return Err(OrbaxError::Region { array: info.name.clone(), why });
        }
        Ok(())
    }

    /// The chunk grid of an array: number of chunks along every dimension.
    ///
    /// # Errors
    /// When there is no such array.
    pub fn grid(&self, name: &str) -> Result<Vec<usize>, OrbaxError> {
        Ok(self.find(name)?.1.meta.grid())
    }

    /// Hands out one chunk in boxes of at most `max_bytes` (at least one element each): where a box lies in the array,
    /// and its elements, dense, row-major and little-endian. Boxes come in row-major order within the chunk. Elements
    /// that are stored as they are needed come straight from the mapped file.
    ///
    /// A checksum of stored bytes is verified before the first box. Damage inside a compressed stream may show only
    /// after some boxes: on an error, discard what was handed out.
    ///
    /// # Errors
    /// When there is no such chunk, or it is missing or damaged; and whatever `f` returns.
    pub fn chunk_pieces<E: From<OrbaxError>>(
        &self,
        name: &str,
        index: &[usize],
        max_bytes: usize,
        mut f: impl FnMut(&Region, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (info, stored) = self.complete(name)?;
        self.check_index(info, stored, index)?;
        let mut refused: Option<E> = None;
        let whole = Region::whole(&info.shape);
        let chunk = stored.meta.chunk_key(index);
        let blob = self.get(&format!("{name}/{chunk}"))?.ok_or_else(|| self.missing(name, chunk))?;
        let result = self.leaves_of(info, stored, index, &blob, &whole, &mut |leaf, of, verify| {
            leaf.pieces(of, max_bytes, verify, &mut |region, bytes| {
                if info.dtype == DType::Bool && bytes.iter().any(|&b| b > 1) {
                    return Err(Failure::Chunk(ChunkError::Bool));
                }
                f(region, bytes).map_err(|e| {
                    refused = Some(e);
                    Failure::Refused
                })
            })
        });
        if let Blob::Mapped(map) = &blob
            && map.as_slice().len() > DROP_BEHIND
        {
            // A stream is not read again soon; without this, memory would seem to grow by the whole checkpoint.
            map.advise_dont_need();
        }
        match (result, refused) {
            (_, Some(e)) => Err(e),
            (result, None) => Ok(result.map_err(Failure::into_orbax)?),
        }
    }

    /// Hands out a whole array as [`chunk_pieces`](Self::chunk_pieces) does, chunk after chunk.
    ///
    /// # Errors
    /// As [`chunk_pieces`](Self::chunk_pieces).
    pub fn for_each_piece<E: From<OrbaxError>>(
        &self,
        name: &str,
        max_bytes: usize,
        mut f: impl FnMut(&Region, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (_, stored) = self.complete(name)?;
        if stored.meta.chunk_count() == 0 {
            return Ok(());
        }
        let grid = stored.meta.grid();
        let mut index = vec![0; grid.len()];
        loop {
            self.chunk_pieces(name, &index, max_bytes, &mut f)?;
            if !advance(&mut index, &grid) {
                return Ok(());
            }
        }
    }

    /// A chunk as a part of a mapped file, checksum verified; `None` if it is not stored as it is needed (compressed,
    /// transposed, padded, big-endian, or inside the tree).
    ///
    /// # Errors
    /// When there is no such chunk, or it is missing or damaged.
    pub fn mapped_chunk(&self, name: &str, index: &[usize]) -> Result<Option<MappedBytes>, OrbaxError> {
        let (info, stored) = self.complete(name)?;
        self.check_index(info, stored, index)?;
        let key = format!("{}/{}", info.name, stored.meta.chunk_key(index));
        let Some(Blob::Mapped(map)) = self.get(&key)? else { return Ok(None) };
        let (base, mut found) = (map.as_slice().as_ptr() as usize, None);
        let whole = stored.meta.chunk_region(index);
        self.leaves_of(info, stored, index, &map, &whole, &mut |leaf, of, verify| {
            if leaf.region(of) == whole
                && let Some(bytes) = leaf.in_place(of, verify)?
            {
                found = Some((bytes.as_ptr() as usize, bytes.len()));
            }
            Ok(())
        })
        .map_err(Failure::into_orbax)?;
        Ok(found.and_then(|(at, n)| at.checked_sub(base).and_then(|o| map.slice(o..o.checked_add(n)?))))
    }

    /// Reads all stored bytes of an array and checks every checksum and size there is.
    ///
    /// # Errors
    /// As [`for_each_piece`](Self::for_each_piece).
    pub fn verify_array(&self, name: &str) -> Result<(), OrbaxError> {
        let (info, stored) = self.complete(name)?;
        let grid = stored.meta.grid();
        if stored.meta.chunk_count() == 0 {
            return Ok(());
        }
        let whole = Region::whole(&info.shape);
        let mut index = vec![0; grid.len()];
        loop {
            self.leaves(info, stored, &index, &whole, &mut |leaf, of, _| Ok(leaf.check(of)?))
                .map_err(Failure::into_orbax)?;
            if !advance(&mut index, &grid) {
                return Ok(());
            }
        }
    }
}

/// Why a walk over leaves ended.
enum Failure {
    Orbax(OrbaxError),
    Chunk(ChunkError),
    /// The caller's own error, kept elsewhere.
    Refused,
}

impl Failure {
    fn into_orbax(self) -> OrbaxError {
        match self {
            Failure::Orbax(e) => e,
            // Both are replaced before a walk returns.
            Failure::Chunk(source) => {
                OrbaxError::Chunk { array: String::new(), chunk: String::new(), path: PathBuf::new(), source }
            }
            Failure::Refused => OrbaxError::Region { array: String::new(), why: "reading was stopped".to_owned() },
        }
    }
}

impl From<OrbaxError> for Failure {
    fn from(e: OrbaxError) -> Self {
        Failure::Orbax(e)
    }
}

impl From<ChunkError> for Failure {
    fn from(e: ChunkError) -> Self {
        Failure::Chunk(e)
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Failure::Orbax(e.into())
    }
}
