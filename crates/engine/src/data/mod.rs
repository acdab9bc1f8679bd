//! Training data: from files to batches of token ids.
//!
//! A [`BatchSource`] gives [`TokenBatch`]es in an order that depends on the configuration and the files alone, and its
//! [`Cursor`] is everything needed to go on from there: a restored source gives exactly the batches that would have
//! followed. [`Prefetch`] runs a source on a thread of its own, some batches ahead.
//!
//! Vocabulary: a *document* is a line of a file (or a row of a table); a *piece* is a run of its tokens that lies in one
//! row; a *row* is one sequence of a batch; a *segment* is a piece within a row, numbered from 1, 0 being padding.

mod cursor;
mod document;
mod error;
mod files;
mod fixed;
mod index;
mod open;
mod order;
mod pack;
mod prefetch;
mod report;
mod spool;
mod synthetic;
#[cfg(test)]
mod tests;
mod text;
mod tokenizer;

use std::path::Path;

use config::Config;

pub use cursor::Cursor;
pub use error::DataError;
pub use fixed::FixedBatches;
pub use prefetch::Prefetch;
pub use report::{BadDocument, DataReport};
pub use synthetic::Synthetic;
pub use tokenizer::{BYTES, BYTES_VOCAB_SIZE, Tokenizer};

/// A result of this module.
pub type Result<T> = std::result::Result<T, DataError>;

/// One batch on the host: every field row-major `[rows, seq]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenBatch {
    /// Sequences.
    pub rows: usize,
    /// Tokens per sequence.
    pub seq: usize,
    /// Token ids the model reads; 0 in padding.
    pub inputs: Vec<i32>,
    /// Position of each token in its piece, from 0.
    pub inputs_position: Vec<i32>,
    /// Segment of each token, from 1; 0 in padding.
    pub inputs_segmentation: Vec<i32>,
    /// Token that follows in the same document.
    pub targets: Vec<i32>,
    /// Segment of the target; 0 where there is none and the loss must not count.
    pub targets_segmentation: Vec<i32>,
}

impl TokenBatch {
    /// Some of its sequences. The range must lie within them.
    #[must_use]
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let part = |field: &[i32]| field[rows.start * self.seq..rows.end * self.seq].to_vec();
        TokenBatch {
            rows: rows.len(),
            seq: self.seq,
            inputs: part(&self.inputs),
            inputs_position: part(&self.inputs_position),
            inputs_segmentation: part(&self.inputs_segmentation),
            targets: part(&self.targets),
            targets_segmentation: part(&self.targets_segmentation),
        }
    }

    /// A batch of padding.
    #[must_use]
    pub fn empty(rows: usize, seq: usize) -> Self {
        let zeros = || vec![0; rows.saturating_mul(seq)];
        TokenBatch {
            rows,
            seq,
            inputs: zeros(),
            inputs_position: zeros(),
            inputs_segmentation: zeros(),
            targets: zeros(),
            targets_segmentation: zeros(),
        }
    }

    /// Number of targets that count in the loss.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.targets_segmentation.iter().filter(|segment| **segment != 0).count() as u64
    }
}

/// A stream of batches.
pub trait BatchSource: Send {
    /// The next batch, or `None` at the end.
    ///
    /// # Errors
    /// When the files cannot be read, or hold what the configuration says is fatal.
    fn next(&mut self) -> Result<Option<TokenBatch>>;

    /// Where the stream stands: before the batch that [`Self::next`] would give.
    fn cursor(&self) -> Cursor;

    /// Goes to a cursor of a source with the same configuration.
    ///
    /// # Errors
    /// When the cursor belongs to other data, another tokenizer or another kind of source; the source is unchanged.
    fn restore(&mut self, cursor: &Cursor) -> Result<()>;

    /// What was read since the source was opened.
    fn report(&self) -> DataReport;
}

impl<T: BatchSource + ?Sized> BatchSource for Box<T> {
    fn next(&mut self) -> Result<Option<TokenBatch>> {
        (**self).next()
    }

    fn cursor(&self) -> Cursor {
        (**self).cursor()
    }

    fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        (**self).restore(cursor)
    }

    fn report(&self) -> DataReport {
        (**self).report()
    }
}

/// Opens the training data of a configuration: batches of `rows` sequences of `max_target_length` tokens.
///
/// `vocab_size` bounds the token ids. `model_tokenizer` is the directory of the model's checkpoint, or its
/// tokenizer.json; it is used when `tokenizer_path` is empty. All files are read once, to find the documents.
///
/// # Errors
/// When files or tokenizer are missing or damaged, or do not fit the model.
pub fn open_train(
    config: &Config,
    vocab_size: usize,
    model_tokenizer: Option<&Path>,
    rows: usize,
) -> Result<Box<dyn BatchSource>> {
    open::open(config, open::Part::Train, vocab_size, model_tokenizer, rows)
}

/// Opens the evaluation data of a configuration; `None` when it asks for no evaluation. See [`open_train`].
///
/// Documents come once and in the order of the files, and empty rows fill the last batch. To evaluate again, restore the
/// cursor of the beginning.
///
/// # Errors
/// As [`open_train`]; also when evaluation is asked for and no data for it is named.
pub fn open_eval(
    config: &Config,
    vocab_size: usize,
    model_tokenizer: Option<&Path>,
    rows: usize,
) -> Result<Option<Box<dyn BatchSource>>> {
    if config.output.eval_interval.is_none() {
        return Ok(None);
    }
    open::open(config, open::Part::Eval, vocab_size, model_tokenizer, rows).map(Some)
}

/// Refuses sizes that no batch can have.
fn check_sizes(vocab_size: usize, rows: usize, seq: usize) -> Result<()> {
    // Ids, positions and segments are i32.
    const MOST: usize = i32::MAX as usize;
    for (name, size) in [("vocab_size", vocab_size), ("the batch", rows), ("max_target_length", seq)] {
        if size == 0 || size > MOST {
            return Err(DataError::Size { name, size });
        }
    }
    if rows.checked_mul(seq).is_none_or(|tokens| tokens > MOST) {
        return Err(DataError::Size { name: "the number of tokens in a batch", size: rows.saturating_mul(seq) });
    }
    Ok(())
}
