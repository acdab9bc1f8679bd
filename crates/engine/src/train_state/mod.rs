//! Training checkpoints: everything a run needs to continue exactly, in directories that are models as well.
//!
//! `<run>/checkpoints/<step>/` is a Hugging Face model directory (`config.json`, `model-*.safetensors` with an index, the
//! tokenizer's files) with two more files: `optimizer.safetensors` (moments, named `mu:NAME` and `nu:NAME`) and
//! `trainer.json` ([`TrainerState`], and length and SHA-256 of every other file). `lapidary_manifest.json` covers
//! `trainer.json` too.
//!
//! - A step appears complete or not at all ([`checkpoint::commit`]). What a killed run left is cleared by
//!   [`Store::open`].
//! - Parameters without moments are frozen. They lie in files of their own, which later checkpoints link to.
//! - [`Store::load`] believes nothing: lengths, digests, names, shapes and element types are checked first.
//!
//! | module | what it does |
//! |---|---|
//! | `record` | `trainer.json` |
//! | `save` | a snapshot becomes a directory |
//! | `check` | whether snapshots are complete and fit the architecture |
//! | `share` | several processes write one checkpoint |
//! | `frozen` | where tensors come from that a snapshot does not hold |
//! | `load` | a directory is checked and read |
//! | `tidy` | removes old steps and what killed runs left |
//! | `saver` | saves on a thread |

mod check;
mod error;
mod frozen;
mod load;
mod record;
mod save;
mod saver;
mod share;
mod tidy;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err as fs;
use serde::{Deserialize, Serialize};
use tensor::{DType, HostArray, Shape};

use crate::rows::RowTable;

pub use error::StateError;
pub use load::Loaded;
use record::Record;
pub use record::{FORMAT, STATE_FILE};
pub use save::Saved;
pub use saver::AsyncSaver;
pub use share::Share;

/// Name of the file of moments within a checkpoint. Where several processes wrote it, `optimizer-p*.safetensors` hold the rest.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Begins the names of those.
const OPTIMIZER_PARTS: &str = "optimizer-p";

/// Before a parameter's name in that file: the numbers of the rows that its moments are of, where they are not of all.
pub const ROWS: &str = "rows:";

/// What a run needs besides arrays to continue exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Format of the file: [`FORMAT`].
    pub format: u32,
    /// Steps finished.
    pub step: u64,
    /// The place in the training data; opaque here.
    pub cursor: serde_json::Value,
    /// The optimizer, such as `adamw`. One whose name begins with `adam` has both moments of every trained parameter.
    pub optimizer: String,
    /// Hugging Face names, without a prefix, of the parameters that are trained: those with moments.
    pub trained: Vec<String>,
    /// Configuration keys that must not change on resume, by name.
    pub keys: BTreeMap<String, serde_json::Value>,
    /// The program that wrote it, for people.
    pub written_by: String,
}

/// A named array.
#[derive(Debug, Clone)]
pub struct Array {
    /// Hugging Face name without a prefix; for moments with `mu:` or `nu:` before it.
    pub name: String,
    /// The values, in the shape of the parameter table.
    pub data: Data,
}

/// Values of an array.
#[derive(Debug, Clone)]
pub enum Data {
    /// They are here.
    Here(HostArray),
    /// They are asked for when they are written, so that no more than one array is held.
    Later(DType, Shape),
}

impl Data {
    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Data::Here(array) => array.dtype(),
            Data::Later(dtype, _) => *dtype,
        }
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        match self {
            Data::Here(array) => array.shape(),
            Data::Later(_, shape) => shape,
        }
    }
}

/// Gives the values of an array by its name, for those that are [`Data::Later`].
pub type Fetch<'a> = dyn FnMut(&str) -> Result<HostArray, StateError> + 'a;

/// A parameter of which a run has changed some rows, and has moments for these alone.
#[derive(Debug, Clone)]
pub struct TableSnapshot {
    /// Hugging Face name without a prefix.
    pub name: String,
    /// All other rows.
    pub base: Arc<RowTable>,
    /// Numbers of the changed rows, ascending; at least one.
    pub rows: Vec<i32>,
    /// These rows, in the dtype in which the whole table is written.
    pub weights: HostArray,
    /// Their moments: `mu:NAME` and `nu:NAME`.
    pub moments: Vec<(String, HostArray)>,
}

/// The state of a run after a step.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Everything but arrays.
    pub state: TrainerState,
    /// The trained parameters at least; any others that the run made itself.
    pub params: Vec<Array>,
    /// Names of all other parameters: unchanged since the source.
    pub frozen: Vec<String>,
    /// Moments of exactly the trained parameters: `mu:NAME` and `nu:NAME`.
    pub moments: Vec<Array>,
    /// A trained parameter that is in neither of these lists.
    pub table: Option<TableSnapshot>,
}

/// How checkpoints are kept.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Complete steps to keep, at least one; `None`: all.
    pub keep: Option<usize>,
    /// Names and configuration of `Gemma4ForConditionalGeneration` (else `Gemma4ForCausalLM`).
    pub conditional: bool,
    /// The architecture.
    pub arch: gemma4::Arch,
    /// The model that the run started from: frozen tensors come from it, and the tokenizer's files are carried over.
    pub source: Option<PathBuf>,
    /// Of several processes that save together, each gives in its snapshots what falls to it ([`Share::deal`]), process 0
    /// everything that is not an array of a device besides.
    pub share: Share,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    options: StoreOptions,
    #[cfg(test)]
    fault: std::sync::Mutex<Option<&'static str>>,
}

impl Snapshot {
    /// How many arrays are asked for when they are written.
    #[must_use]
    pub fn later(&self) -> usize {
        self.params.iter().chain(&self.moments).filter(|a| matches!(a.data, Data::Later(..))).count()
    }
}

impl Store {
    /// Opens the directory of checkpoints, which need not exist, and removes what killed runs left in it.
    ///
    /// # Errors
    /// When `keep` is zero or the file system refuses.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Store, StateError> {
        if options.keep == Some(0) {
            return Err(StateError::Option("the number of checkpoints to keep must be at least 1".to_owned()));
        }
        let store = Store {
            dir: std::path::absolute(dir)?,
            options,
            #[cfg(test)]
            fault: std::sync::Mutex::new(None),
        };
        tidy::remove_leftovers(&store.dir)?;
        Ok(store)
    }

    /// The newest step that is there; `None` if there is none.
    ///
    /// # Errors
    /// When it is visibly damaged: an older one is not taken silently in its place.
    pub fn latest(&self) -> Result<Option<u64>, StateError> {
        let Some(&step) = self.steps().last() else { return Ok(None) };
        Record::read(&self.path(step), step).map_err(|reason| self.damaged(step, reason))?;
        Ok(Some(step))
    }

    /// Every step that is there, damaged or not, in ascending order.
    #[must_use]
    pub fn steps(&self) -> Vec<u64> {
        let names =
            fs::read_dir(&self.dir).into_iter().flatten().filter_map(|e| e.ok()?.file_name().into_string().ok());
        // Only the name that `path` gives is a step: `007` is not.
        let mut steps: Vec<u64> = names
            .filter_map(|n| n.parse().ok().filter(|s: &u64| s.to_string() == n))
            .filter(|&s| self.path(s).is_dir())
            .collect();
        steps.sort_unstable();
        steps
    }

    /// Where a step lies.
    #[must_use]
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(step.to_string())
    }

    /// The steps that look complete, with their records, newest first.
    fn complete(&self) -> impl Iterator<Item = (u64, Record)> {
        self.steps().into_iter().rev().filter_map(|s| Some((s, Record::read(&self.path(s), s).ok()?)))
    }

    fn damaged(&self, step: u64, reason: String) -> StateError {
        let others: Vec<String> = self.complete().filter(|(s, _)| *s != step).map(|(s, _)| s.to_string()).collect();
        let hint = if others.is_empty() {
            "Remove the directory and start again; there is no other complete step".to_owned()
        } else {
            format!("Remove the directory and resume from another step ({})", others.join(", "))
        };
        StateError::Damaged { path: self.path(step), reason, hint }
    }

    /// A place where tests can make a save fail.
    #[cfg(test)]
    fn reach(&self, place: &'static str) -> Result<(), StateError> {
        let fault = self.fault.lock().ok().and_then(|f| *f);
        if fault == Some(place) { Err(std::io::Error::other(place).into()) } else { Ok(()) }
    }

    /// Whether a failed save leaves its directory, as a kill would; else it is removed.
    #[cfg(test)]
    fn leaves_staged(&self) -> bool {
        self.fault.lock().is_ok_and(|f| f.is_some())
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    fn leaves_staged(&self) -> bool {
        false
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn reach(&self, _: &'static str) -> Result<(), StateError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
