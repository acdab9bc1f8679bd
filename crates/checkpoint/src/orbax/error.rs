//! What can go wrong when an Orbax checkpoint is read.

use std::io;
use std::path::PathBuf;

use super::ocdbt::StoreError;
use super::zarr::{ChunkError, ZarrError};

/// What can go wrong when an Orbax checkpoint is opened or read.
#[derive(Debug, thiserror::Error)]
pub enum OrbaxError {
    /// There is nothing of the kind.
    #[error("{path} holds no Orbax checkpoint: {why}")]
    NotFound {
        /// The path given.
        path: PathBuf,
        /// What was looked for.
        why: String,
    },
    /// The checkpoint was never finished.
    #[error("{path} was never completed: {why}; use an earlier step or write it again")]
    Uncommitted {
        /// The directory.
        path: PathBuf,
        /// How that can be told.
        why: String,
    },
    /// The file system refused; the source names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The key-value store is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A JSON file is damaged.
    #[error("{path} cannot be read: {why}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file differs from what was recorded when the checkpoint was written.
    #[error(
        "{path} is not as it was written ({why}); copy the checkpoint again, or remove {record} if this was on purpose"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// The difference.
        why: String,
        /// The file with the recorded checksums.
        record: PathBuf,
    },
    /// The metadata of an array cannot be used.
    #[error("array {array}: {source}")]
    Array {
        /// The array.
        array: String,
        /// What is wrong.
        source: ZarrError,
    },
    /// No array of this name.
    #[error("{path} has no array {array}")]
    Unknown {
        /// The array asked for.
        array: String,
        /// The checkpoint.
        path: PathBuf,
    },
    /// The tree lists an array that is not stored.
    #[error("array {array} is listed in _METADATA and was never stored: the checkpoint is incomplete")]
    NotStored {
        /// The array.
        array: String,
    },
    /// A chunk of an array is absent.
    #[error("array {array}: chunk {chunk} is missing from {path}: the checkpoint is incomplete")]
    MissingChunk {
        /// The array.
        array: String,
        /// The chunk's key.
        chunk: String,
        /// The checkpoint.
        path: PathBuf,
    },
    /// A chunk of an array is damaged.
    #[error("array {array}: chunk {chunk} of {path} is damaged: {source}")]
    Chunk {
        /// The array.
        array: String,
        /// The chunk's key.
        chunk: String,
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong.
        source: ChunkError,
    },
    /// A region that is not within the array, or a buffer of another size.
    #[error("array {array}: {why}")]
    Region {
        /// The array.
        array: String,
        /// What is wrong.
        why: String,
    },
    /// An array that does not fit memory.
    #[error("array {array} needs {bytes} bytes of memory, which are not to be had")]
    Memory {
        /// The array.
        array: String,
        /// Bytes needed.
        bytes: usize,
    },
}
