//! What can go wrong when a model meets a device.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, EngineError>;

/// An engine operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The plugin or device.
    #[error(transparent)]
    Pjrt(#[from] pjrt::PjrtError),
    /// No plugin could be found or fetched.
    #[error(transparent)]
    Plugin(#[from] pjrt::plugins::LocateError),
    /// A checkpoint directory.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::hf::HfError),
    /// A safetensors file.
    #[error(transparent)]
    Safetensors(#[from] checkpoint::safetensors::SafetensorsError),
    /// Tensors do not fit the model.
    #[error(transparent)]
    Bind(#[from] checkpoint::binding::BindError),
    /// An Orbax checkpoint.
    #[error(transparent)]
    Orbax(#[from] checkpoint::orbax::OrbaxError),
    /// Checkpoint data could not be read, converted or written.
    #[error(transparent)]
    Copy(#[from] checkpoint::copy::CopyError),
    /// A MaxText checkpoint whose architecture nothing tells.
    #[error("{path} does not say which architecture it is of, as no checkpoint written by MaxText does")]
    NoArchitecture {
        /// The checkpoint.
        path: PathBuf,
    },
    /// A directory of quantised weights, where weights are needed as they were.
    #[error(
        "{path} holds weights quantized to {format}, with which only generate, chat, score and bench can work; use the \
         directory it was made from"
    )]
    Quantized {
        /// The directory.
        path: PathBuf,
        /// How they are stored.
        format: &'static str,
    },
    /// A checkpoint could not be written.
    #[error(transparent)]
    Write(#[from] checkpoint::write::WriteError),
    /// The configuration in a checkpoint.
    #[error("{path}: {source}")]
    Arch {
        /// The configuration file.
        path: PathBuf,
        /// What is wrong with it.
        source: gemma4::ArchError,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An argument does not fit the model.
    #[error("{0}")]
    Input(String),
    /// A program could not be built. This is a fault of the project.
    #[error("the program could not be built: {0}")]
    Graph(#[from] graph::GraphError),
    /// A host array.
    #[error(transparent)]
    Host(#[from] tensor::HostError),
    /// Input or output.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
