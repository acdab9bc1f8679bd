//! Random tokens, for measuring and testing: the same batch at every step, as MaxText's `dataset_type=synthetic`.

use super::cursor::{Cursor, Stream};
use super::{BatchSource, DataReport, Result, TokenBatch};
use crate::rng::Philox;

/// One fixed batch of uniform random ids, repeated without end.
///
/// Each row is drawn one token longer than the sequence; inputs are all but its last token, targets all but its first.
#[derive(Debug)]
pub struct Synthetic {
    batch: TokenBatch,
    batches: u64,
}

impl Synthetic {
    /// Draws the batch `[rows, seq]` of ids below `vocab_size`.
    #[must_use]
    pub fn new(rows: usize, seq: usize, vocab_size: usize) -> Self {
        let random = Philox::new(0, "synthetic batch");
        // A word times the size, high half: uniform to one part in 2^32 / vocab_size.
        let id = |at: usize| {
            let (block, lane) = ((at / 4) as u64, at % 4);
            let word = random.block([block as u32, (block >> 32) as u32, 0, 0])[lane];
            ((u64::from(word) * vocab_size as u64) >> 32) as i32
        };
        let mut batch = TokenBatch::empty(rows, seq);
        for row in 0..rows {
            for column in 0..seq {
                let (from, to) = (row * (seq + 1) + column, row * seq + column);
                batch.inputs[to] = id(from);
                batch.targets[to] = id(from + 1);
                batch.inputs_position[to] = column as i32;
            }
        }
        batch.inputs_segmentation.fill(1);
        batch.targets_segmentation.fill(1);
        Synthetic { batch, batches: 0 }
    }
}

impl BatchSource for Synthetic {
    fn next(&mut self) -> Result<Option<TokenBatch>> {
        self.batches += 1;
        Ok(Some(self.batch.clone()))
    }

    fn cursor(&self) -> Cursor {
        Cursor { batches: self.batches, stream: Stream::Synthetic }
    }

    fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        if cursor.stream != Stream::Synthetic {
            return Err(cursor.foreign("synthetic data"));
        }
        self.batches = cursor.batches;
        Ok(())
    }

    fn report(&self) -> DataReport {
        let slots = self.batches * self.batch.inputs.len() as u64;
        DataReport { tokens: slots, slots, ..DataReport::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_shifted_batch_at_every_step() {
        let mut source = Synthetic::new(3, 5, 100);
        let first = source.next().unwrap().unwrap();
        assert_eq!(source.next().unwrap().unwrap(), first);
        assert_eq!(first.weight(), 15);
        for row in 0..3 {
            let at = row * 5..row * 5 + 5;
            assert_eq!(first.inputs[at.clone()][1..], first.targets[at.clone()][..4]);
            assert_eq!(first.inputs_position[at], [0, 1, 2, 3, 4]);
        }
        assert!(first.inputs.iter().all(|id| (0..100).contains(id)));
        assert_ne!(first.inputs[..5], first.inputs[5..10]);
        assert_eq!(source.cursor().batches(), 2);
    }

    #[test]
    fn ids_cover_the_vocabulary_evenly() {
        let batch = Synthetic::new(100, 1000, 10).next().unwrap().unwrap();
        for id in 0..10 {
            let count = batch.inputs.iter().filter(|found| **found == id).count();
            // 10000 expected, standard deviation 95.
            assert!((9500..10500).contains(&count), "{id}: {count}");
        }
    }

    #[test]
    fn one_token_rows_have_a_target() {
        let batch = Synthetic::new(2, 1, 1).next().unwrap().unwrap();
        assert_eq!((batch.inputs, batch.targets, batch.targets_segmentation), (vec![0, 0], vec![0, 0], vec![1, 1]));
    }
}
