//! What can go wrong with training checkpoints.

use std::io;
use std::path::PathBuf;

/// A training checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An option makes no sense.
    #[error("{0}")]
    Option(String),
    /// What the trainer gave cannot be written as a checkpoint. This is a fault of the caller.
    #[error("step {step} cannot be saved: {reason}")]
    Snapshot {
        /// The step.
        step: u64,
        /// What does not fit, with the array's name.
        reason: String,
    },
    /// The step is there already and differs in identity.
    #[error(
        "{path} exists and is of another run: its {what} differs; move it away, or let this run write into another directory"
    )]
    Exists {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// Frozen tensors are nowhere to be found.
    #[error("no earlier checkpoint and no source directory holds the frozen tensor {name}{}; {hint}", more(.others))]
    NoSource {
        /// One of the tensors.
        name: String,
        /// How many others there are.
        others: usize,
        /// What to do.
        hint: String,
    },
    /// There is no such step.
    #[error("{dir} holds no checkpoint of step {step}; {available}")]
    NoStep {
        /// The directory of checkpoints.
        dir: PathBuf,
        /// The step asked for.
        step: u64,
        /// What there is.
        available: String,
    },
    /// A checkpoint is damaged or mixed from several.
    #[error("{path} cannot be resumed from: {reason}. {hint}")]
    Damaged {
        /// The checkpoint.
        path: PathBuf,
        /// File or tensor, and what is wrong with it.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A checkpoint holds no array of this name.
    #[error("{path} holds no {what} {name}")]
    NoArray {
        /// The checkpoint.
        path: PathBuf,
        /// `parameter` or `moment`.
        what: &'static str,
        /// The name asked for.
        name: String,
    },
    /// Several processes save, and one of them did not do its part.
    #[error("step {step} is not saved: the files of process {process}: {reason}")]
    Part {
        /// Which one.
        process: usize,
        /// The step.
        step: u64,
        /// What is wrong.
        reason: String,
    },
    /// The directory could not be staged or committed.
    #[error(transparent)]
    Commit(#[from] checkpoint::commit::CommitError),
    /// A file of arrays could not be planned or written.
    #[error(transparent)]
    Write(#[from] checkpoint::write::WriteError),
    /// The model that the run started from cannot be read.
    #[error("the source of the frozen tensors: {0}")]
    Source(#[source] Box<crate::EngineError>),
    /// A host array.
    #[error(transparent)]
    Host(#[from] tensor::HostError),
    /// The saving thread ended without a result.
    #[error("the thread that saves checkpoints ended early, so that {0} was perhaps not saved")]
    Thread(String),
    /// Input or output; the source names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn more(others: &usize) -> String {
    if *others == 0 { String::new() } else { format!(" (and {others} others)") }
}
