//! A fixed list of batches, to run step by step beside another system.

use std::path::Path;

use checkpoint::safetensors::SafetensorsFile;
use tensor::DType;

use super::cursor::{Cursor, Stream};
use super::{BatchSource, DataError, DataReport, Result, TokenBatch};

/// Name of the tensor that holds the batches.
const TENSOR: &str = "batches";

/// A fixed list of batches of whole rows: inputs are the ids, targets the ids shifted left by one, the last of a row
/// has no target, and everything is segment 1.
#[derive(Debug)]
pub struct FixedBatches {
    /// `[steps, rows, seq]`.
    ids: Vec<i32>,
    steps: usize,
    rows: usize,
    seq: usize,
    next: usize,
}

impl FixedBatches {
    /// Takes ids `[steps, rows, seq]`, row-major.
    ///
    /// # Errors
    /// When the number of ids is another or one is negative.
    pub fn new(ids: Vec<i32>, steps: usize, rows: usize, seq: usize) -> Result<Self> {
        let count = steps.checked_mul(rows).and_then(|n| n.checked_mul(seq));
        if count != Some(ids.len()) {
            return Err(DataError::Shape { ids: ids.len(), steps, rows, seq });
        }
        super::check_sizes(1, rows, seq)?;
        if let Some(id) = ids.iter().find(|id| **id < 0) {
            let vocab_size = i32::MAX as usize;
            return Err(DataError::Vocabulary { at: "a list of batches".to_owned(), id: i64::from(*id), vocab_size });
        }
        Ok(FixedBatches { ids, steps, rows, seq, next: 0 })
    }

    /// Reads the tensor `batches` (integers `[steps, rows, seq]`) of a safetensors file.
    ///
    /// # Errors
    /// When the file is damaged, the tensor is missing or no list of batches, or an id is not below `vocab_size`.
    pub fn from_safetensors(path: &Path, vocab_size: usize) -> Result<Self> {
        let wrong = |reason: String| DataError::File { path: path.to_owned(), reason };
        let file = SafetensorsFile::open(path)?;
        let view = file.tensor(TENSOR).ok_or_else(|| {
            let names: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).take(5).collect();
            wrong(format!("there is no tensor `{TENSOR}` (found: {})", names.join(", ")))
        })?;
        let &[steps, rows, seq] = view.shape.dims() else {
            return Err(wrong(format!("`{TENSOR}` is {}, not [steps, rows, tokens]", view.shape)));
        };
        let ids: Vec<i64> = match view.dtype {
            DType::I64 => {
                view.bytes.chunks_exact(8).filter_map(|b| b.try_into().ok()).map(i64::from_le_bytes).collect()
            }
            DType::I32 => view
                .bytes
                .chunks_exact(4)
                .filter_map(|b| b.try_into().ok())
                .map(|b| i64::from(i32::from_le_bytes(b)))
                .collect(),
            other => return Err(wrong(format!("`{TENSOR}` is of type {other}; token ids are I64 or I32"))),
        };
        let known = |id: i64| usize::try_from(id).is_ok_and(|id| id < vocab_size);
        if let Some((at, id)) = ids.iter().enumerate().find(|(_, id)| !known(**id)) {
            let at = format!("{}: `{TENSOR}` of step {}", path.display(), at / (rows * seq));
            return Err(DataError::Vocabulary { at, id: *id, vocab_size });
        }
        let narrow = ids.into_iter().filter_map(|id| i32::try_from(id).ok()).collect();
        FixedBatches::new(narrow, steps, rows, seq)
    }

    /// Number of batches.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Sequences in a batch.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens in a sequence.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.seq
    }
}

impl BatchSource for FixedBatches {
    fn next(&mut self) -> Result<Option<TokenBatch>> {
        if self.next >= self.steps {
            return Ok(None);
        }
        let size = self.rows * self.seq;
        let ids = &self.ids[self.next * size..(self.next + 1) * size];
        let mut batch = TokenBatch::empty(self.rows, self.seq);
        batch.inputs.copy_from_slice(ids);
        batch.inputs_segmentation.fill(1);
        for at in 0..size {
            let column = at % self.seq;
            batch.inputs_position[at] = column as i32;
            if column + 1 < self.seq {
                batch.targets[at] = ids[at + 1];
                batch.targets_segmentation[at] = 1;
            }
        }
        self.next += 1;
        Ok(Some(batch))
    }

    fn cursor(&self) -> Cursor {
        Cursor { batches: self.next as u64, stream: Stream::Fixed }
    }

    fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        if cursor.stream != Stream::Fixed {
            return Err(cursor.foreign("a list of batches"));
        }
        match usize::try_from(cursor.batches) {
            Ok(next) if next <= self.steps => self.next = next,
            _ => {
                let (given, steps) = (cursor.batches, self.steps);
                return Err(DataError::Cursor(format!("{given} batches were read, and there are only {steps}")));
            }
        }
        Ok(())
    }

    fn report(&self) -> DataReport {
        let slots = (self.next * self.rows * self.seq) as u64;
        DataReport { documents: (self.next * self.rows) as u64, tokens: slots, slots, ..DataReport::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_shifted_and_the_last_has_none() {
        let mut source = FixedBatches::new((1..=12).collect(), 2, 2, 3).unwrap();
        let first = source.next().unwrap().unwrap();
        assert_eq!(first.inputs, [1, 2, 3, 4, 5, 6]);
        assert_eq!(first.targets, [2, 3, 0, 5, 6, 0]);
        assert_eq!(first.targets_segmentation, [1, 1, 0, 1, 1, 0]);
        assert_eq!(first.inputs_position, [0, 1, 2, 0, 1, 2]);
        assert_eq!(first.weight(), 4);
        let cursor = source.cursor();
        let second = source.next().unwrap().unwrap();
        assert_eq!(source.next().unwrap(), None);
        source.restore(&cursor).unwrap();
        assert_eq!(source.next().unwrap(), Some(second));
        let far = Cursor { batches: 3, stream: Stream::Fixed };
        assert!(source.restore(&far).unwrap_err().to_string().contains("only 2"));
        let foreign = Cursor { batches: 0, stream: Stream::Synthetic };
        assert!(source.restore(&foreign).unwrap_err().to_string().contains("synthetic"));
    }

    #[test]
    fn what_is_no_list_of_batches_is_refused() {
        assert!(matches!(FixedBatches::new(vec![1; 5], 1, 2, 3), Err(DataError::Shape { .. })));
        assert!(matches!(FixedBatches::new(vec![], usize::MAX, 2, 3), Err(DataError::Shape { .. })));
        assert!(matches!(FixedBatches::new(vec![], 1, 0, 3), Err(DataError::Size { .. })));
        assert!(matches!(FixedBatches::new(vec![-1], 1, 1, 1), Err(DataError::Vocabulary { id: -1, .. })));
    }

    /// A safetensors file with one tensor.
    fn file(dir: &Path, name: &str, dtype: &str, shape: &str, bytes: &[u8]) -> std::path::PathBuf {
        let header =
            format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{}]}}}}"#, bytes.len());
        let mut all = (header.len() as u64).to_le_bytes().to_vec();
        all.extend(header.bytes());
        all.extend(bytes);
        let path = dir.join("batches.safetensors");
        fs_err::write(&path, all).unwrap();
        path
    }

    #[test]
    fn safetensors_files_are_read_and_judged() {
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<u8> = [5i64, 6, 7, 8].iter().flat_map(|id| id.to_le_bytes()).collect();
        let path = file(dir.path(), "batches", "I64", "[1,2,2]", &ids);
        let mut source = FixedBatches::from_safetensors(&path, 9).unwrap();
        assert_eq!((source.steps(), source.rows(), source.seq()), (1, 2, 2));
        assert_eq!(source.next().unwrap().unwrap().inputs, [5, 6, 7, 8]);
        let error = FixedBatches::from_safetensors(&path, 8).unwrap_err().to_string();
        assert!(error.contains("token id 8") && error.contains("vocabulary of 8"), "{error}");
        let path = file(dir.path(), "batches", "I64", "[2,2]", &ids);
        assert!(FixedBatches::from_safetensors(&path, 9).unwrap_err().to_string().contains("[steps, rows, tokens]"));
        let path = file(dir.path(), "other", "I64", "[1,2,2]", &ids);
        assert!(FixedBatches::from_safetensors(&path, 9).unwrap_err().to_string().contains("found: other"));
        let path = file(dir.path(), "batches", "F32", "[1,2,4]", &ids);
        assert!(FixedBatches::from_safetensors(&path, 9).unwrap_err().to_string().contains("type"));
    }
}
