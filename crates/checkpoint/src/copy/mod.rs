//! The one streaming engine behind every conversion: arrays of one or more sources, each with an operation, into a new
//! checkpoint of either format.
//!
//! Work is cut into boxes of a few megabytes of the *target*. Worker threads fill a box from wherever its elements lie
//! and write it to its place, which is known beforehand; so the result does not depend on the order in which they
//! finish, memory is bounded by a few boxes, and an interrupted run can be continued. Nothing is visible under the
//! target's name before everything is complete.

mod convert;
mod journal;
mod link;
mod read;
mod source;
mod to_hf;
mod to_orbax;

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use fs_err as fs;
use sha2::{Digest, Sha256};
use tensor::{DType, ParamSpec, Shape};

use crate::commit::CommitError;
use crate::hf::HfDirectory;
use crate::manifest::hex;
use crate::orbax::{OrbaxCheckpoint, OrbaxError, OrbaxWriteError};
use crate::write::WriteError;

pub use convert::Op;
pub use read::ItemReader;
pub use to_hf::{HfReport, HfTarget, copy_to_hf};
pub use to_orbax::{OrbaxReport, OrbaxTarget, copy_to_orbax};

/// Bytes of one box, as a rule: the boxes in flight stay in the last-level cache, where they are checksummed and written.
const PIECE: usize = 2 << 20;

/// Where arrays come from.
#[derive(Debug, Clone, Copy)]
pub enum Store<'a> {
    /// A Hugging Face directory.
    Hf(&'a HfDirectory),
    /// An Orbax checkpoint.
    Orbax(&'a OrbaxCheckpoint),
}

/// One array to be copied.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Which of the stores it comes from.
    pub store: usize,
    /// Its name there: the full name of a tensor; the stored or parameter name of an array.
    pub from: String,
    /// Its name in the target: the full name of a tensor; the path of an array, joined by dots.
    pub to: String,
    /// Its shape in the target.
    pub shape: Shape,
    /// Its element type in the target.
    pub dtype: DType,
    /// What is done to it.
    pub op: Op,
}

impl Item {
    /// A parameter on its way from Hugging Face to MaxText. `from` and `to` are full names.
    #[must_use]
    pub fn to_maxtext(spec: &ParamSpec, from: String, to: String, dtype: DType) -> Self {
        Item { store: 0, from, to, shape: spec.maxtext_shape.clone(), dtype, op: Op::forward(spec.transform) }
    }

    /// A parameter on its way from MaxText to Hugging Face. `from` and `to` are full names.
    #[must_use]
    pub fn to_hf(spec: &ParamSpec, from: String, to: String, dtype: DType) -> Self {
        Item { store: 0, from, to, shape: spec.shape.clone(), dtype, op: Op::backward(spec.transform) }
    }
}

/// How to run.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Number of worker threads; `None` for one per processor.
    pub threads: Option<usize>,
    /// Bytes that may be held in memory at a time.
    pub memory: usize,
    /// Continue what an interrupted run of the same copy left.
    pub resume: bool,
    /// Leave what was done on disk when this run fails or is cancelled, for a later one with `resume`.
    pub keep_partial: bool,
    /// Replace an existing checkpoint.
    pub force: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        CopyOptions { threads: None, memory: 256 << 20, resume: false, keep_partial: false, force: false }
    }
}

impl CopyOptions {
    fn workers(&self) -> usize {
        let wanted = self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        // Each worker may hold a box, its source in another type, and a panel of the source.
        wanted.clamp(1, (self.memory / (4 * PIECE)).max(1))
    }
}

/// How far a copy has come, in bytes of the target's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done, those found by `resume` included.
    pub done: u64,
    /// Bytes in total.
    pub total: u64,
}

/// Called from worker threads whenever bytes were written. [`ControlFlow::Break`] cancels the copy.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) -> ControlFlow<()> + Sync);

/// What can go wrong in a copy. The target is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Items that cannot be copied, all of them.
    #[error("{} cannot be copied: {}", count(.0.len()), .0.join("; "))]
    Items(Vec<String>),
    /// A source array cannot be read.
    #[error(transparent)]
    Orbax(#[from] OrbaxError),
    /// An Orbax target cannot be written.
    #[error(transparent)]
    WriteOrbax(#[from] OrbaxWriteError),
    /// A Hugging Face target cannot be planned or written.
    #[error(transparent)]
    WriteHf(#[from] WriteError),
    /// The output directory cannot be staged or committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A file cannot be read or written; the source names it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The progress callback said so.
    #[error("the copy was cancelled")]
    Cancelled,
}

fn count(n: usize) -> String {
    if n == 1 { "one array".to_owned() } else { format!("{n} arrays") }
}

/// Prepares every item, or lists everything that is wrong with any.
fn readers<'a>(stores: &[Store<'a>], items: &'a [Item]) -> Result<Vec<source::Reader<'a>>, CopyError> {
    let mut readers = Vec::with_capacity(items.len());
    let mut problems = Vec::new();
    for item in items {
        match source::Reader::new(stores, item) {
            Ok(reader) => readers.push(reader),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(readers) } else { Err(CopyError::Items(problems)) }
}

/// A text that changes when sources or items do: a copy may be continued only if it is the same.
fn fingerprint(stores: &[Store<'_>], items: &[Item]) -> io::Result<String> {
    let mut hasher = Sha256::new();
    for store in stores {
        let path = match store {
            Store::Hf(dir) => dir.path(),
            Store::Orbax(checkpoint) => checkpoint.path(),
        };
        let mut files = Vec::new();
        list(&fs::canonicalize(path)?, &mut files)?;
        files.sort();
        hasher.update(format!("{files:?}\n"));
    }
    hasher.update(format!("{items:?}\n"));
    Ok(hex(&hasher.finalize()))
}

/// Path, size and time of change of every file.
fn list(path: &Path, out: &mut Vec<(PathBuf, u64, Option<std::time::SystemTime>)>) -> io::Result<()> {
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            list(&entry?.path(), out)?;
        }
    } else {
        out.push((path.to_owned(), meta.len(), meta.modified().ok()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
