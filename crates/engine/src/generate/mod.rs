//! From logits to text: what stands between a model on a device and a person.

pub mod chat;
mod error;
mod run;
mod sampling;
mod settings;
mod stop;
mod text;
mod uncached;
mod writer;

use std::time::Duration;

pub use error::GenerateError;
pub use run::{Finish, Sequence, Timing, Verdict, generate};
pub use sampling::{Choice, Sampler, Sampling};
pub use settings::GenerationConfig;
pub use stop::StopStrings;
pub use text::{TextStream, encode_text, encode_written};
pub use uncached::Uncached;
pub use writer::Writer;

use crate::{EngineError, Result};

/// A model that gives next-token logits for several sequences.
///
/// Each sequence has a slot, numbered from 0. Slots advance independently: one call may feed a long prompt to one, a single
/// token to another and nothing to a third.
pub trait LanguageModel {
    /// Number of slots.
    fn sequences(&self) -> usize;

    /// Number of token ids, and of logits in a row.
    fn vocab_size(&self) -> usize;

    /// Tokens fed so far, per slot.
    fn lengths(&self) -> &[usize];

    /// Most tokens that a slot can hold.
    fn context(&self) -> usize;

    /// Time spent so far on waiting for programs to be compiled: no part of what generating takes.
    fn compiling(&self) -> Duration {
        Duration::ZERO
    }

    /// Bytes of weights that a step reads, where a step is little more than that.
    fn bytes_per_step(&self) -> Option<usize> {
        None
    }

    /// Appends tokens (a prompt, a continuation or a single next token) to each slot; an empty slice leaves a slot alone.
    ///
    /// Gives `[sequences, vocab_size]` logits after the last token of each slot that was fed; the rows of other slots hold
    /// nothing of meaning.
    ///
    /// # Errors
    /// When there is not one slice a slot, an id is outside the vocabulary, a slot would grow beyond
    /// [`Self::context`] ([`check_feed`] refuses these, before anything changes), or the device fails.
    fn feed(&mut self, tokens: &[&[i32]]) -> Result<Vec<f32>>;

    /// Empties every slot.
    fn reset(&mut self);
}

/// Refuses tokens that a model cannot be fed: to be called first by every [`LanguageModel::feed`].
///
/// # Errors
/// When there is not one slice a slot, an id is outside the vocabulary, or a slot would hold too many tokens.
pub fn check_feed(model: &(impl LanguageModel + ?Sized), tokens: &[&[i32]]) -> Result<()> {
    let (slots, vocab, context) = (model.sequences(), model.vocab_size(), model.context());
    if tokens.len() != slots {
        return Err(EngineError::Input(format!("tokens for {} sequences given, there are {slots}", tokens.len())));
    }
    for (slot, (&fed, &before)) in tokens.iter().zip(model.lengths()).enumerate() {
        if let Some((i, id)) = fed.iter().enumerate().find(|&(_, &id)| id < 0 || id as usize >= vocab) {
            return Err(EngineError::Input(format!(
                "token {id} at position {} of sequence {slot} is outside the vocabulary of {vocab}",
                before + i
            )));
        }
        if before + fed.len() > context {
            return Err(EngineError::Input(format!(
                "sequence {slot} would have {} tokens, there is room for {context}",
                before + fed.len()
            )));
        }
    }
    Ok(())
}
