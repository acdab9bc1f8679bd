//! What can go wrong with training data.

use std::path::PathBuf;

/// Training data that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be read. The message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A safetensors file of batches.
    #[error(transparent)]
    Safetensors(#[from] checkpoint::safetensors::SafetensorsError),
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A key of the configuration does not fit the data.
    #[error("{key}: {reason}")]
    Key {
        /// The key.
        key: &'static str,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A size that no batch can have.
    #[error("{name} cannot be {size}: it must be from 1 to {}", i32::MAX)]
    Size {
        /// What it is the size of.
        name: &'static str,
        /// The size.
        size: usize,
    },
    /// Batches in memory that do not fit together.
    #[error("batches of {ids} ids are not [{steps}, {rows}, {seq}]")]
    Shape {
        /// Number of ids.
        ids: usize,
        /// Batches.
        steps: usize,
        /// Rows.
        rows: usize,
        /// Tokens per row.
        seq: usize,
    },
    /// A document that cannot be used, where that is fatal.
    #[error("{0} (`abort_on_bad_data=false` leaves such documents out)")]
    Document(super::BadDocument),
    /// Nothing to train on.
    #[error("{files}: {reason}")]
    Empty {
        /// The files.
        files: String,
        /// Why.
        reason: String,
    },
    /// Not even one batch.
    #[error(
        "the documents fill {ready} sequences, and a batch has {rows}: use a smaller batch, more epochs (`num_epoch`), or \
         `generate_padding_batch_train=true`"
    )]
    TooFew {
        /// Sequences there are.
        ready: usize,
        /// Sequences of a batch.
        rows: usize,
    },
    /// A token id that the model has no row for.
    #[error("{at}: token id {id} is outside the model's vocabulary of {vocab_size}")]
    Vocabulary {
        /// Where it was found.
        at: String,
        /// The id.
        id: i64,
        /// Number of ids the model knows.
        vocab_size: usize,
    },
    /// A cursor belongs to something else.
    #[error("cannot go on where the data stood: {0}")]
    Cursor(String),
    /// The thread that reads ahead ended without an answer. This is a fault of the project.
    #[error("the thread that reads ahead stopped: {0}")]
    Thread(String),
}
