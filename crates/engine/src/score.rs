//! How likely a model finds a text.
//!
//! A text is cut into windows. Each begins with the start token, as documents do in training, and the model predicts the
//! window's tokens from it on. Windows may overlap, so that tokens have more before them; each token counts once, in the
//! first window that predicts it.

use gemma4::forward::Trace;
use rayon::prelude::*;

use crate::compare::log_sum_exp;
use crate::{Batch, EngineError, Result, Session};

/// Shortest program; longer ones double up to the window.
const SHORTEST: usize = 16;

/// How a text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Positions that the model sees at once, the start token included.
    pub length: usize,
    /// Tokens from the beginning of one window to that of the next.
    pub stride: usize,
    /// Token before every window. Without it the first token of a text is not predicted.
    pub bos: Option<i32>,
}

/// Sums over predicted tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Sum of their logarithmic probabilities, in nats.
    pub log_likelihood: f64,
}

impl Score {
    /// Adds another text's.
    pub fn add(&mut self, other: Score) {
        self.tokens += other.tokens;
        self.log_likelihood += other.log_likelihood;
    }

    /// Mean negative logarithmic probability of a token, in nats: the loss of training. Not a number without tokens.
    #[must_use]
    pub fn loss(&self) -> f64 {
        -self.log_likelihood / self.tokens as f64
    }

    /// e to the loss.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits for each of `bytes` bytes of text: comparable between models with different tokenizers.
    #[must_use]
    pub fn bits_per_byte(&self, bytes: u64) -> f64 {
        -self.log_likelihood / std::f64::consts::LN_2 / bytes as f64
    }
}

/// One window: which tokens are its own, and which of them count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// First token it predicts.
    pub(crate) start: usize,
    /// One behind the last.
    pub(crate) end: usize,
    /// First token that counts.
    pub(crate) counted: usize,
}

impl Windows {
    /// Refuses sizes that make no sense.
    ///
    /// # Errors
    /// When a size is zero, or the stride leaves tokens out.
    pub fn check(&self) -> Result<()> {
        if self.length == 0 || self.stride == 0 {
            return Err(EngineError::Input("window and stride must be at least 1".into()));
        }
        if self.stride > self.length {
            return Err(EngineError::Input(format!(
                "a stride of {} leaves out tokens between windows of {}",
                self.stride, self.length
            )));
        }
        Ok(())
    }

    /// Windows over `n` tokens.
    pub(crate) fn over(&self, n: usize) -> Vec<Window> {
        let mut out = Vec::new();
        // Without a start token there is nothing to predict the first token from.
        let (mut start, mut counted): (usize, usize) = if self.bos.is_some() { (0, 0) } else { (1, 1) };
        while counted < n {
            let end = n.min(start.saturating_add(self.length));
            out.push(Window { start, end, counted });
            counted = end;
            start += self.stride;
        }
        out
    }
}

/// Scores a text's tokens, without the start token, which `windows` adds. `progress` hears the number of tokens so far.
///
/// # Errors
/// When the windows make no sense, an id is outside the vocabulary, or the device fails.
pub fn score(session: &Session<'_>, ids: &[i32], windows: &Windows, mut progress: impl FnMut(u64)) -> Result<Score> {
    windows.check()?;
    let vocab = session.model().arch().vocab_size();
    if let Some((at, id)) = ids.iter().enumerate().find(|&(_, &id)| id < 0 || id as usize >= vocab) {
        return Err(EngineError::Input(format!("token {id} at position {at} is outside the vocabulary of {vocab}")));
    }
    let mut total = Score::default();
    for window in windows.over(ids.len()) {
        let n = window.end - window.start;
        let seq = n.next_power_of_two().max(SHORTEST).min(windows.length.max(n));
        let mut input = Vec::with_capacity(seq);
        match windows.bos {
            Some(bos) => {
                input.push(bos);
                input.extend_from_slice(&ids[window.start..window.end - 1]);
            }
            None => input.extend_from_slice(&ids[window.start - 1..window.end - 1]),
        }
        input.resize(seq, 0);
        let hidden = session.forward(&Batch { batch: 1, seq, ids: input, segments: None }, Trace::None)?;
        let rows: Vec<usize> = (window.counted - window.start..n).collect();
        session.logits(&hidden.last, &rows, |rows, logits| {
            // Collected in order, so that the sum does not depend on threads.
            let each: Vec<f64> = rows
                .par_iter()
                .zip(logits.par_chunks_exact(vocab))
                .map(|(&row, logits)| {
                    let target = ids[window.start + row] as usize;
                    f64::from(logits[target]) - log_sum_exp(logits)
                })
                .collect();
            total.log_likelihood += each.iter().sum::<f64>();
            total.tokens += each.len() as u64;
            progress(total.tokens);
            Ok(())
        })?;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(n: usize, length: usize, stride: usize, bos: Option<i32>) -> Vec<(usize, usize, usize)> {
        let w = Windows { length, stride, bos };
        w.over(n).into_iter().map(|w| (w.start, w.end, w.counted)).collect()
    }

    #[test]
    fn every_token_counts_once() {
        assert_eq!(cut(10, 4, 4, Some(2)), [(0, 4, 0), (4, 8, 4), (8, 10, 8)]);
        assert_eq!(cut(10, 4, 2, Some(2)), [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]);
        assert_eq!(cut(10, 4, 4, None), [(1, 5, 1), (5, 9, 5), (9, 10, 9)]);
        assert_eq!(cut(3, 9, 9, Some(2)), [(0, 3, 0)]);
        assert_eq!(cut(0, 4, 4, Some(2)), []);
        assert_eq!(cut(1, 4, 4, None), []);
        for n in 0..40 {
            for length in 1..8 {
                for stride in 1..=length {
                    for bos in [None, Some(2)] {
                        let mut counted = vec![0; n];
                        for (start, end, from) in cut(n, length, stride, bos) {
                            assert!(start <= from && end - start <= length && from < end);
                            counted[from..end].iter_mut().for_each(|c| *c += 1);
                        }
                        let skipped = usize::from(bos.is_none()).min(n);
                        assert!(counted[..skipped].iter().all(|c| *c == 0));
                        assert!(counted[skipped..].iter().all(|c| *c == 1), "{n} {length} {stride}: {counted:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn figures() {
        let mut s = Score { tokens: 3, log_likelihood: -3.0 * 2f64.ln() };
        s.add(Score { tokens: 1, log_likelihood: -2f64.ln() });
        assert!((s.perplexity() - 2.0).abs() < 1e-12 && (s.bits_per_byte(8) - 0.5).abs() < 1e-12);
        assert!(Windows { length: 4, stride: 5, bos: None }.check().is_err());
        assert!(Windows { length: 0, stride: 0, bos: None }.check().is_err());
        assert!((log_sum_exp(&[0.0, 0.0]) - 2f64.ln()).abs() < 1e-12);
    }
}
