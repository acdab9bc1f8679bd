//! A Hugging Face directory: one `model.safetensors`, or shards with `model.safetensors.index.json`, and the
//! configuration files beside them.
//!
//! Shards are opened by the names that the index gives; a name may not leave the directory. Links are followed, because
//! a hub cache consists of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::commit::is_incomplete;
use crate::safetensors::{SafetensorsError, SafetensorsFile, TensorEntry, TensorView};

/// Name of the only weights file of an unsharded directory.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of the index of a sharded directory.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the model configuration.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the generation settings.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Largest index or configuration file that is read, in bytes. Real ones have less than 1 MB.
const MAX_JSON_LEN: u64 = 64 << 20;

/// What can go wrong when a directory is opened.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// A file cannot be read; the source names it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A weights file is not valid; the source names it.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// Nothing lies at the path.
    #[error("{path} does not exist")]
    NotFound {
        /// The path asked for.
        path: PathBuf,
    },
    /// The directory is an unfinished write.
    #[error("{path} is an unfinished or interrupted write, not a complete checkpoint; write it again")]
    Incomplete {
        /// The directory.
        path: PathBuf,
    },
    /// The directory holds no weights.
    #[error("{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// What was found instead, as a clause; may be empty.
        found: String,
    },
    /// The directory holds a single file and an index that names other files.
    #[error("{path} has both {SINGLE_FILE} and an index of other files ({shard}, ...); remove the one that is stale")]
    Ambiguous {
        /// The directory.
        path: PathBuf,
        /// One of the other files.
        shard: String,
    },
    /// A JSON file is too large to be what it should be.
    #[error("{path} has {len} bytes, more than the limit of {MAX_JSON_LEN}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        len: u64,
    },
    /// A JSON file does not parse.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// The index gives one tensor twice.
    #[error("{path}: tensor {tensor:?} occurs twice in weight_map")]
    DuplicateInIndex {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The index names a file outside its directory.
    #[error("{path}: tensor {tensor:?} is mapped to {shard:?}, which is no plain file name")]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The name given.
        shard: String,
    },
    /// The index names files that are not there.
    #[error("{path} names files that are missing: {}", .shards.join(", "))]
    MissingShards {
        /// The index.
        path: PathBuf,
        /// All of them.
        shards: Vec<String>,
    },
    /// The index names tensors that its shards do not hold.
    #[error("{path} names tensors that are not where it says: {}", list(.tensors, |(t, s)| format!("{t} in {s}")))]
    MissingTensors {
        /// The index.
        path: PathBuf,
        /// Tensor and shard, all of them.
        tensors: Vec<(String, String)>,
    },
    /// Two shards hold a tensor of one name.
    #[error("{path}: tensor {tensor:?} is in both {first} and {second}")]
    DuplicateTensor {
        /// The directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// Another shard.
        second: String,
    },
}

fn list<T>(items: &[T], f: impl Fn(&T) -> String) -> String {
    items.iter().map(f).collect::<Vec<_>>().join(", ")
}

/// Weights and configuration of one model, opened and checked. No tensor data is read before it is used.
#[derive(Debug)]
pub struct HfDirectory {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    // Name -> file and place in the file.
    tensors: BTreeMap<String, (usize, usize)>,
    unindexed: Vec<String>,
    config: Option<Value>,
    generation_config: Option<Value>,
}

impl HfDirectory {
    /// Opens a model directory, or a single `.safetensors` file (which has no configuration).
    ///
    /// # Errors
    /// When there are no weights, a file is damaged, or index and shards disagree; messages name file and tensor.
    pub fn open(path: &Path) -> Result<Self, HfError> {
        let meta = match fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(HfError::NotFound { path: path.to_owned() });
            }
            other => other?,
        };
        if !meta.is_dir() {
            return Self::gather(path, vec![SafetensorsFile::open(path)?]);
        }
        if is_incomplete(path) {
            return Err(HfError::Incomplete { path: path.to_owned() });
        }
        let single = path.join(SINGLE_FILE);
        let index_path = path.join(INDEX_FILE);
        let index = if exists(&index_path)? { Some(read_index(&index_path)?) } else { None };
        let mut dir = match (exists(&single)?, index) {
            (true, Some(index)) if index.values().any(|shard| shard != SINGLE_FILE) => {
                let shard = index.into_values().find(|shard| shard != SINGLE_FILE).unwrap_or_default();
                return Err(HfError::Ambiguous { path: path.to_owned(), shard });
            }
            (_, Some(index)) => Self::open_shards(path, &index_path, &index)?,
            (true, None) => Self::gather(path, vec![SafetensorsFile::open(&single)?])?,
            (false, None) => return Err(no_weights(path)),
        };
        dir.config = read_json(&path.join(CONFIG_FILE))?;
        dir.generation_config = read_json(&path.join(GENERATION_CONFIG_FILE))?;
        Ok(dir)
    }

    fn open_shards(path: &Path, index_path: &Path, index: &BTreeMap<String, String>) -> Result<Self, HfError> {
        for (tensor, shard) in index {
            if !is_plain_name(shard) {
                let (path, tensor, shard) = (index_path.to_owned(), tensor.clone(), shard.clone());
                return Err(HfError::ShardName { path, tensor, shard });
            }
        }
        let shards: BTreeSet<&String> = index.values().collect();
        let mut missing = Vec::new();
        for shard in &shards {
            if !exists(&path.join(shard))? {
                missing.push((*shard).clone());
            }
        }
        if !missing.is_empty() {
            return Err(HfError::MissingShards { path: index_path.to_owned(), shards: missing });
        }
        let files =
            shards.iter().map(|shard| SafetensorsFile::open(&path.join(shard))).collect::<Result<Vec<_>, _>>()?;
        let order: BTreeMap<&String, usize> = shards.into_iter().zip(0..).collect();
        let mut dir = Self::gather(path, files)?;
        let misplaced = |(tensor, shard): &(&String, &String)| {
            dir.tensors.get(*tensor).map(|(file, _)| *file) != order.get(*shard).copied()
        };
        let tensors: Vec<_> =
            index.iter().filter(misplaced).map(|(tensor, shard)| (tensor.clone(), shard.clone())).collect();
        if !tensors.is_empty() {
            return Err(HfError::MissingTensors { path: index_path.to_owned(), tensors });
        }
        dir.unindexed = dir.tensors.keys().filter(|name| !index.contains_key(*name)).cloned().collect();
        Ok(dir)
    }

    fn gather(path: &Path, files: Vec<SafetensorsFile>) -> Result<Self, HfError> {
        let mut tensors = BTreeMap::new();
        for (f, file) in files.iter().enumerate() {
            for (i, t) in file.tensors().iter().enumerate() {
                if let Some((other, _)) = tensors.insert(t.name.clone(), (f, i)) {
                    return Err(HfError::DuplicateTensor {
                        path: path.to_owned(),
                        tensor: t.name.clone(),
                        first: files.get(other).map(file_name).unwrap_or_default(),
                        second: file_name(file),
                    });
                }
            }
        }
        Ok(HfDirectory {
            path: path.to_owned(),
            files,
            tensors,
            unindexed: Vec::new(),
            config: None,
            generation_config: None,
        })
    }

    /// The path as it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weights files, ordered by name.
    #[must_use]
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// `config.json`, if there is one.
    #[must_use]
    pub fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    /// `generation_config.json`, if there is one.
    #[must_use]
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// Tensors that lie in a shard and that the index does not name. They can be used all the same.
    #[must_use]
    pub fn unindexed(&self) -> &[String] {
        &self.unindexed
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Every tensor of every file, ordered by name.
    pub fn entries(&self) -> impl Iterator<Item = &TensorEntry> {
        self.tensors.values().filter_map(|&(f, i)| self.files.get(f)?.tensors().get(i))
    }

    /// What the header says of the tensor of this full name.
    #[must_use]
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        let &(f, i) = self.tensors.get(name)?;
        self.files.get(f)?.tensors().get(i)
    }

    /// The tensor of this full name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView> {
        let &(f, i) = self.tensors.get(name)?;
        self.files.get(f)?.view(i)
    }
}

fn file_name(file: &SafetensorsFile) -> String {
    file.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether something lies there; a dangling link is "no", any other failure an error.
fn exists(path: &Path) -> io::Result<bool> {
    path.try_exists().map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

/// A name that cannot leave its directory on any system.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

fn no_weights(path: &Path) -> HfError {
    let mut names: Vec<String> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| [".safetensors", ".bin", ".gguf", ".pt"].iter().any(|end| n.ends_with(end)))
        .collect();
    names.sort();
    let found = match names.len() {
        0 => String::new(),
        1..=3 => format!("; it has {}", names.join(", ")),
        n => format!("; it has {} and {} more", names[..2].join(", "), n - 2),
    };
    HfError::NoWeights { path: path.to_owned(), found }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, HfError> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a file", path.display())).into());
    }
    if meta.len() > MAX_JSON_LEN {
        return Err(HfError::TooLarge { path: path.to_owned(), len: meta.len() });
    }
    Ok(fs::read(path)?)
}

fn read_json(path: &Path) -> Result<Option<Value>, HfError> {
    if !exists(path)? {
        return Ok(None);
    }
    let bytes = read_bounded(path)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|source| HfError::Json { path: path.to_owned(), source })
}

/// The `weight_map` of an index: tensor -> file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, HfError> {
    let bytes = read_bounded(path)?;
    match parse_index(&bytes) {
        Err(source) => Err(HfError::Json { path: path.to_owned(), source }),
        Ok(map) => match map.duplicate {
            Some(tensor) => Err(HfError::DuplicateInIndex { path: path.to_owned(), tensor }),
            None => Ok(map.entries),
        },
    }
}

/// Parses the bytes of an index file. Exposed for fuzzing.
///
/// # Errors
/// When they are not JSON with a `weight_map` of strings.
pub fn parse_index(bytes: &[u8]) -> Result<WeightMap, serde_json::Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: WeightMap,
    }
    serde_json::from_slice::<Index>(bytes).map(|index| index.weight_map)
}

/// The `weight_map` of an index, with the first name that it gives twice.
#[derive(Debug, Default)]
pub struct WeightMap {
    /// Tensor -> file name.
    pub entries: BTreeMap<String, String>,
    /// A name that occurs more than once.
    pub duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct MapVisitor;
        impl<'de> Visitor<'de> for MapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of file names as weight_map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut out = WeightMap::default();
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    if out.entries.insert(tensor.clone(), shard).is_some() {
                        out.duplicate.get_or_insert(tensor);
                    }
                }
                Ok(out)
            }
        }
        d.deserialize_map(MapVisitor)
    }
}

#[cfg(test)]
#[path = "hf_tests.rs"]
mod tests;
