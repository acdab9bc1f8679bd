//! What can go wrong when an Orbax checkpoint is written.

use std::io;
use std::path::PathBuf;

use crate::commit::CommitError;

/// What can go wrong when an Orbax checkpoint is written. The destination is as it was before, whatever happens.
#[derive(Debug, thiserror::Error)]
pub enum OrbaxWriteError {
    /// The plan cannot be carried out.
    #[error("array {array} cannot be written: {why}")]
    Plan {
        /// The array.
        array: String,
        /// What is wrong.
        why: String,
    },
    /// A chunk got too few or too many bytes, or came twice.
    #[error("array {array}: chunk {chunk} {why}")]
    Chunk {
        /// The array.
        array: String,
        /// The chunk's key.
        chunk: String,
        /// What is wrong.
        why: String,
    },
    /// A linked file is not to be had.
    #[error("cannot link {path} into the checkpoint: {why}")]
    Link {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The compressor failed.
    #[error("array {array} cannot be compressed: {source}")]
    Compress {
        /// The array.
        array: String,
        /// Why.
        source: io::Error,
    },
    /// The output directory cannot be made or finished.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The file system refused; the source names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}
