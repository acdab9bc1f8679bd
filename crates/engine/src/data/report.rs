//! What was read.

use std::path::PathBuf;

/// What a source has read since it was opened.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct DataReport {
    /// Documents read, repeats in later epochs included.
    pub documents: u64,
    /// Tokens put into batches.
    pub tokens: u64,
    /// Places in batches, padding included.
    pub slots: u64,
    /// Documents cut to the length of a sequence.
    pub truncated_documents: u64,
    /// Tokens lost by cutting.
    pub truncated_tokens: u64,
    /// Tokens at the end that did not fill a batch and were left out.
    pub left_over_tokens: u64,
    /// Documents with nothing to predict, which are left out.
    pub empty_documents: u64,
    /// Different documents that could not be used.
    pub bad_documents: u64,
    /// The first few of them.
    pub first_bad: Vec<BadDocument>,
}

impl DataReport {
    /// Share of the places in batches that hold a token; 1 before the first batch.
    #[must_use]
    pub fn fill_rate(&self) -> f64 {
        if self.slots == 0 { 1.0 } else { self.tokens as f64 / self.slots as f64 }
    }
}

/// A document that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BadDocument {
    /// Its file.
    pub file: PathBuf,
    /// Its line (or row of a table), from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

impl std::fmt::Display for BadDocument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.reason)
    }
}
