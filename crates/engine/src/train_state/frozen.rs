//! Where tensors come from that a snapshot does not hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use checkpoint::hf::HfDirectory;
use checkpoint::manifest::{ManifestFile, sha256_file};
use checkpoint::safetensors::SafetensorsFile;
use fs_err as fs;
use tensor::{DType, Shape};

use super::record::Record;
use super::{StateError, Store};
use crate::Model;
use crate::convert::Checkpoint;

/// A weights file that becomes part of the new checkpoint as it is.
#[derive(Debug)]
pub(super) struct Linked {
    pub(super) from: PathBuf,
    /// Length and digest; the name is given when it is linked.
    pub(super) bytes: u64,
    pub(super) sha256: String,
    /// Full names, elements and bytes of its tensors.
    pub(super) tensors: Vec<(String, u64, u64)>,
    pub(super) widest: Option<DType>,
}

/// Tensors that a snapshot does not hold.
#[derive(Debug, Default)]
pub(super) struct Frozen {
    pub(super) linked: Vec<Linked>,
    /// Names without a prefix, to be copied out of these models; by number of the model.
    pub(super) copied: Vec<(String, usize)>,
    pub(super) models: Vec<Model>,
}

impl Store {
    /// Finds the tensors `names` (without a prefix): in the newest complete checkpoint if they were frozen there too, else
    /// in the source. Files that hold nothing else are linked.
    pub(super) fn find_frozen(
        &self,
        names: &[String],
        shapes: &BTreeMap<&str, &Shape>,
        prefix: &str,
    ) -> Result<Frozen, StateError> {
        let mut need: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mut found = Frozen::default();
        if need.is_empty() {
            return Ok(found);
        }
        if let Some((step, record)) = self.complete().next() {
            let model = Model::open(&self.path(step)).map_err(|e| self.damaged(step, e.to_string()))?;
            let there: BTreeSet<&str> = record.frozen.iter().map(String::as_str).collect();
            found.take(model, &mut need, Some(&there), shapes, prefix, &|name| known(&record, name))?;
        }
        if let (false, Some(source)) = (need.is_empty(), &self.options.source) {
            let model = Model::open(source).map_err(|e| StateError::Source(Box::new(e)))?;
            if *model.arch() != self.options.arch {
                let (path, reason) = (source.clone(), "its architecture is not the one being trained".to_owned());
                return Err(StateError::Source(Box::new(crate::EngineError::File { path, reason })));
            }
            found.take(model, &mut need, None, shapes, prefix, &|_| None)?;
        }
        if let Some(name) = need.first() {
            let hint = match &self.options.source {
                Some(_) => "the source must be the complete model that the run started from",
                None => "name the model that the run started from, or give all parameters with the first save",
            };
            let (name, others) = ((*name).to_owned(), need.len() - 1);
            return Err(StateError::NoSource { name, others, hint: hint.to_owned() });
        }
        Ok(found)
    }
}

/// The digest of a file that an earlier checkpoint knows.
fn known(record: &Record, name: &str) -> Option<ManifestFile> {
    record.files.iter().find(|f| f.name == name).cloned()
}

impl Frozen {
    fn take(
        &mut self,
        model: Model,
        need: &mut BTreeSet<&str>,
        only: Option<&BTreeSet<&str>>,
        shapes: &BTreeMap<&str, &Shape>,
        prefix: &str,
        known: &dyn Fn(&str) -> Option<ManifestFile>,
    ) -> Result<(), StateError> {
        let usable = |name: &str, need: &BTreeSet<&str>| need.contains(name) && only.is_none_or(|o| o.contains(name));
        if let Checkpoint::Hf(dir) = &model.weights().checkpoint {
            for file in linkable(dir) {
                let inner: Option<Vec<&str>> = file.tensors().iter().map(|t| t.name.strip_prefix(prefix)).collect();
                let Some(inner) = inner.filter(|names| !names.is_empty()) else { continue };
                let all = inner.iter().zip(file.tensors()).all(|(name, t)| {
                    usable(name, need)
                        && shapes.get(name) == Some(&&t.shape)
                        && matches!(t.dtype, DType::BF16 | DType::F32)
                });
                if !all {
                    continue;
                }
                self.linked.push(Linked::new(file, known)?);
                for name in inner {
                    need.remove(name);
                }
            }
        }
        let rest: Vec<&str> = need.iter().copied().filter(|name| usable(name, need)).collect();
        for name in rest {
            if model.dtype(name).is_ok() {
                self.copied.push((name.to_owned(), self.models.len()));
                need.remove(name);
            }
        }
        self.models.push(model);
        Ok(())
    }
}

/// Files of a directory whose tensors are all named by its index.
fn linkable(dir: &HfDirectory) -> impl Iterator<Item = &SafetensorsFile> {
    let unindexed: BTreeSet<&String> = dir.unindexed().iter().collect();
    dir.files().iter().filter(move |f| f.tensors().iter().all(|t| !unindexed.contains(&t.name)))
}

impl Linked {
    fn new(file: &SafetensorsFile, known: &dyn Fn(&str) -> Option<ManifestFile>) -> Result<Self, StateError> {
        // Hub caches consist of symbolic links; a hard link to one of those would not outlive its destination.
        let from = fs::canonicalize(file.path())?;
        let name = file.path().file_name().unwrap_or_default().to_string_lossy();
        let (bytes, sha256) = match known(&name) {
            Some(f) => (f.bytes, f.sha256),
            None => (fs::metadata(&from)?.len(), sha256_file(&from)?),
        };
        let tensors = file.tensors().iter().map(|t| (t.name.clone(), t.shape.elements() as u64, t.bytes())).collect();
        let widest = file.tensors().iter().map(|t| t.dtype).max_by_key(|d| d.size());
        Ok(Linked { from, bytes, sha256, tensors, widest })
    }

    /// Makes the file part of `dir` under `name`: by a hard link, or where that is impossible by a copy. The flag tells
    /// which.
    pub(super) fn place(&self, dir: &Path, name: &str) -> Result<(ManifestFile, bool), StateError> {
        let to = dir.join(name);
        let linked = fs::hard_link(&self.from, &to).is_ok();
        if !linked {
            checkpoint::commit::check_space(dir, self.bytes)?;
            fs::copy(&self.from, &to)?;
        }
        Ok((ManifestFile { name: name.to_owned(), bytes: self.bytes, sha256: self.sha256.clone() }, linked))
    }
}
