//! Where a stream of batches stands.

use serde::{Deserialize, Serialize};

use super::DataError;
use super::index::FileMark;
use super::pack::Places;

/// Where a stream of batches stands; part of a checkpoint.
///
/// It is opaque: only the source that gave it, opened again with the same configuration, can go on from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    /// Batches handed out so far.
    pub(super) batches: u64,
    /// What else the kind of source needs.
    pub(super) stream: Stream,
}

/// What a kind of source needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stream {
    /// The same batch over and over.
    Synthetic,
    /// A fixed list of batches.
    Fixed,
    /// Files of documents.
    Text(Box<TextCursor>),
}

/// Where a stream of documents stands.
///
/// Rows that are being filled are kept as places in documents; their tokens are read again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TextCursor {
    /// What must be the same, by the names of the keys.
    pub(super) settings: Vec<(String, String)>,
    /// The files.
    pub(super) files: Vec<FileMark>,
    /// Epochs that were completed.
    pub(super) epoch: u64,
    /// Number of the next document in the order of the epoch.
    pub(super) position: u64,
    /// A document of which only some tokens are in rows: its number in the index, and how many.
    pub(super) current: Option<(u64, u64)>,
    /// Rows that are being filled, and rows that are full and not yet handed out.
    pub(super) rows: Places,
}

impl Stream {
    fn name(&self) -> &'static str {
        match self {
            Stream::Synthetic => "synthetic data",
            Stream::Fixed => "a list of batches",
            Stream::Text(_) => "text files",
        }
    }
}

impl Cursor {
    /// Batches handed out so far.
    #[must_use]
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// The error for a cursor of another kind of source.
    pub(super) fn foreign(&self, here: &str) -> DataError {
        DataError::Cursor(format!("it was taken from {}, and this is {here}", self.stream.name()))
    }
}
