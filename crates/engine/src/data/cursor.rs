//! Where a stream of batches stands.

use serde::{Deserialize, Serialize};

use super::DataError;

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
}

impl Stream {
    fn name(&self) -> &'static str {
        match self {
            Stream::Synthetic => "synthetic data",
            Stream::Fixed => "a list of batches",
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
