//! Next-token logits without a cache: every call runs the whole of every sequence again.
//!
//! Slow, and simple enough to be the measure of anything cleverer.

use std::borrow::Borrow;
use std::marker::PhantomData;

use gemma4::forward::Trace;

use super::{LanguageModel, check_feed};
use crate::{Batch, Result, Session};

/// Shortest length a program is compiled for, if there is room. Longer ones double, so that few programs serve every length.
const SHORTEST: usize = 64;

/// A [`LanguageModel`] over a [`Session`], owned or lent, that keeps nothing but the tokens.
#[derive(Debug)]
pub struct Uncached<'r, S> {
    session: S,
    runtime: PhantomData<&'r ()>,
    tokens: Vec<Vec<i32>>,
    lengths: Vec<usize>,
    context: usize,
}

impl<'r, S: Borrow<Session<'r>>> Uncached<'r, S> {
    /// Empty slots for `sequences` sequences of at most `context` tokens.
    #[must_use]
    pub fn new(session: S, sequences: usize, context: usize) -> Self {
        Uncached {
            session,
            runtime: PhantomData,
            tokens: vec![Vec::new(); sequences],
            lengths: vec![0; sequences],
            context,
        }
    }
}

impl<'r, S: Borrow<Session<'r>>> LanguageModel for Uncached<'r, S> {
    fn sequences(&self) -> usize {
        self.tokens.len()
    }

    fn vocab_size(&self) -> usize {
        self.session.borrow().model().arch().vocab_size()
    }

    fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    fn context(&self) -> usize {
        self.context
    }

    fn feed(&mut self, tokens: &[&[i32]]) -> Result<Vec<f32>> {
        check_feed(self, tokens)?;
        for ((all, length), fed) in self.tokens.iter_mut().zip(&mut self.lengths).zip(tokens) {
            all.extend_from_slice(fed);
            *length = all.len();
        }
        let vocab = self.vocab_size();
        let mut logits = vec![0f32; self.sequences() * vocab];
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        if longest == 0 || tokens.iter().all(|fed| fed.is_empty()) {
            return Ok(logits);
        }
        // Nothing before it sees the padding behind a sequence.
        let seq = longest.next_power_of_two().max(SHORTEST).min(self.context);
        let mut ids = Vec::with_capacity(self.sequences() * seq);
        for all in &self.tokens {
            ids.extend_from_slice(all);
            ids.resize(ids.len() + seq - all.len(), 0);
        }
        let batch = Batch { batch: self.sequences(), seq, ids, segments: None };
        let session = self.session.borrow();
        let hidden = session.forward(&batch, Trace::None)?;
        let fed: Vec<usize> = (0..tokens.len()).filter(|&slot| !tokens[slot].is_empty()).collect();
        let rows: Vec<usize> = fed.iter().map(|&slot| slot * seq + self.lengths[slot] - 1).collect();
        let mut slots = fed.iter();
        session.logits(&hidden.last, &rows, |_, block| {
            for (row, &slot) in block.chunks_exact(vocab).zip(&mut slots) {
                logits[slot * vocab..(slot + 1) * vocab].copy_from_slice(row);
            }
            Ok(())
        })?;
        Ok(logits)
    }

    fn reset(&mut self) {
        self.tokens.iter_mut().for_each(Vec::clear);
        self.lengths.fill(0);
    }
}
