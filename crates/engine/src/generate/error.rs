//! What can go wrong between logits and text.

use std::path::PathBuf;

use crate::EngineError;
use crate::data::DataError;

/// Text that cannot be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The model or the device.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The tokenizer, or a file of documents.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A file could not be read. The message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A setting outside its range.
    #[error("{name} cannot be {value}: {reason}")]
    Setting {
        /// Its name, as in generation_config.json.
        name: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        reason: &'static str,
    },
    /// Logits from which no token can be chosen.
    #[error("no token can be chosen: {0}")]
    Logits(String),
    /// A text that the tokenizer does not take, or ids it does not give back.
    #[error("the text of the prompt: {0}")]
    Text(String),
    /// A chat template that refuses a conversation, or is none.
    #[error("the chat template: {0}")]
    Template(String),
}
