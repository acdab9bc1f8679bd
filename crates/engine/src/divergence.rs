//! How far one way to run a model is from another, on text: what fewer bits a weight cost.

use rayon::prelude::*;

use crate::compare::{Summary, TokenDistance, log_sum_exp};
use crate::generate::LanguageModel;
use crate::score::{Score, Windows};
use crate::{EngineError, Result};

/// Two ways to run a model, on the same text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Divergence {
    /// How likely the first finds the text.
    pub reference: Score,
    /// How likely the second does.
    pub ours: Score,
    /// How far their logits are apart at each token.
    tokens: Vec<TokenDistance>,
    vocab_size: usize,
}

impl Divergence {
    /// Adds another text's.
    pub fn add(&mut self, other: &Divergence) {
        self.reference.add(other.reference);
        self.ours.add(other.ours);
        self.tokens.extend_from_slice(&other.tokens);
        self.vocab_size = other.vocab_size;
    }

    /// The distances together; KL is that of the second from the first.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary::new(&self.tokens, self.vocab_size)
    }
}

/// Feeds windows of a text to both token by token, as generating does, as many side by side as there are slots.
/// `progress` hears the number of tokens so far.
///
/// # Errors
/// When the windows make no sense, the models have different vocabularies or slots or no room for a window, an id is
/// outside the vocabulary, or the device fails.
pub fn divergence(
    reference: &mut dyn LanguageModel,
    ours: &mut dyn LanguageModel,
    ids: &[i32],
    windows: &Windows,
    mut progress: impl FnMut(u64),
) -> Result<Divergence> {
    let vocab = reference.vocab_size();
    let mut sum = Divergence { vocab_size: vocab, ..Divergence::default() };
    walk(&mut [reference, ours], ids, windows, |targets| {
        let rows: Vec<(f64, f64, TokenDistance)> = targets
            .par_iter()
            .map(|t| {
                let (theirs, mine) = (t.logits[0], t.logits[1]);
                (t.log_likelihood(theirs), t.log_likelihood(mine), TokenDistance::new(theirs, mine))
            })
            .collect();
        for (theirs, mine, distance) in rows {
            sum.reference.add(Score { tokens: 1, log_likelihood: theirs });
            sum.ours.add(Score { tokens: 1, log_likelihood: mine });
            sum.tokens.push(distance);
        }
        progress(sum.ours.tokens);
    })?;
    Ok(sum)
}

/// How likely a model finds a text, token by token, as generating goes. `progress` hears the number of tokens so far.
///
/// # Errors
/// As [`divergence`].
pub fn score_stepwise(
    model: &mut dyn LanguageModel,
    ids: &[i32],
    windows: &Windows,
    mut progress: impl FnMut(u64),
) -> Result<Score> {
    let mut sum = Score::default();
    walk(&mut [model], ids, windows, |targets| {
        let each: Vec<f64> = targets.par_iter().map(|t| t.log_likelihood(t.logits[0])).collect();
        // One after the other, so that a sum does not depend on slots or threads.
        for log_likelihood in each {
            sum.add(Score { tokens: 1, log_likelihood });
        }
        progress(sum.tokens);
    })?;
    Ok(sum)
}

/// A token that counts, and what each model makes of the tokens before it.
struct Target<'a, const N: usize> {
    id: i32,
    logits: [&'a [f32]; N],
}

impl<const N: usize> Target<'_, N> {
    fn log_likelihood(&self, logits: &[f32]) -> f64 {
        // Ids were checked when they were fed, but for the last one.
        let logit = usize::try_from(self.id).ok().and_then(|id| logits.get(id));
        logit.map_or(f64::NAN, |&logit| f64::from(logit) - log_sum_exp(logits))
    }
}

/// Feeds windows of a text to models token by token, as many side by side as there are slots; `each` gets the tokens that count
/// of a step.
fn walk<const N: usize>(
    models: &mut [&mut dyn LanguageModel; N],
    ids: &[i32],
    windows: &Windows,
    mut each: impl FnMut(&[Target<'_, N>]),
) -> Result<()> {
    windows.check()?;
    let Some((slots, vocab)) = models.first().map(|m| (m.sequences(), m.vocab_size())) else { return Ok(()) };
    if models.iter().any(|m| m.sequences() != slots || m.vocab_size() != vocab) {
        return Err(EngineError::Input("only models with the same vocabulary and slots can be compared".into()));
    }
    for group in windows.over(ids.len()).chunks(slots) {
        models.iter_mut().for_each(|m| m.reset());
        let longest = group.iter().map(|w| w.end - w.start).max().unwrap_or(0);
        for at in 0..longest {
            let mut feed: Vec<&[i32]> = vec![&[]; slots];
            for (slot, w) in group.iter().enumerate().filter(|(_, w)| w.start + at < w.end) {
                let target = w.start + at;
                feed[slot] = match (at, &windows.bos) {
                    (0, Some(bos)) => std::slice::from_ref(bos),
                    // Without a start token windows begin at the second token.
                    _ => &ids[target - 1..target],
                };
            }
            let mut logits = Vec::with_capacity(N);
            for model in models.iter_mut() {
                logits.push(model.feed(&feed)?);
            }
            let places = group.iter().enumerate().map(|(slot, w)| (slot, w.start + at, w));
            let targets: Vec<Target<'_, N>> = places
                .filter(|(_, target, w)| (w.counted..w.end).contains(target))
                .map(|(slot, target, _)| Target {
                    id: ids[target],
                    logits: std::array::from_fn(|i| &logits[i][slot * vocab..(slot + 1) * vocab]),
                })
                .collect();
            each(&targets);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::check_feed;

    /// Its logits depend on the last token and how many there were; `sharp` scales them.
    struct Model {
        lengths: Vec<usize>,
        sharp: f32,
    }

    impl LanguageModel for Model {
        fn sequences(&self) -> usize {
            self.lengths.len()
        }
        fn vocab_size(&self) -> usize {
            5
        }
        fn lengths(&self) -> &[usize] {
            &self.lengths
        }
        fn context(&self) -> usize {
            8
        }
        fn feed(&mut self, tokens: &[&[i32]]) -> Result<Vec<f32>> {
            check_feed(self, tokens)?;
            let mut out = vec![f32::NAN; self.lengths.len() * 5];
            for (slot, fed) in tokens.iter().enumerate() {
                self.lengths[slot] += fed.len();
                if let Some(&last) = fed.last() {
                    for (i, z) in out[slot * 5..][..5].iter_mut().enumerate() {
                        *z = self.sharp * ((i + last as usize * 2 + self.lengths[slot]) % 5) as f32;
                    }
                }
            }
            Ok(out)
        }
        fn reset(&mut self) {
            self.lengths.fill(0);
        }
    }

    fn model(slots: usize, sharp: f32) -> Model {
        Model { lengths: vec![0; slots], sharp }
    }

    #[test]
    fn slots_change_nothing_and_every_token_counts() {
        let ids = [1, 4, 0, 2, 3, 3, 1, 0, 2, 4, 1];
        for bos in [None, Some(2)] {
            let windows = Windows { length: 4, stride: 3, bos };
            let of =
                |slots| divergence(&mut model(slots, 1.0), &mut model(slots, 1.5), &ids, &windows, |_| ()).unwrap();
            let one = of(1);
            assert_eq!(one.reference.tokens, ids.len() as u64 - u64::from(bos.is_none()));
            let three = of(3);
            let (a, b) = (one.summary(), three.summary());
            assert!(a.mean_kl > 0.01 && a.top1_agreement == 1.0);
            assert_eq!(a.tokens, b.tokens);
            assert!((a.mean_kl - b.mean_kl).abs() < 1e-12);
            assert!((three.ours.log_likelihood - one.ours.log_likelihood).abs() < 1e-9);
        }
        let same = divergence(
            &mut model(2, 1.0),
            &mut model(2, 1.0),
            &ids,
            &Windows { length: 8, stride: 8, bos: None },
            |_| (),
        );
        let same = same.unwrap();
        assert_eq!((same.summary().max_kl, same.reference), (0.0, same.ours));
        let windows = Windows { length: 8, stride: 8, bos: None };
        assert_eq!(score_stepwise(&mut model(2, 1.0), &ids, &windows, |_| ()).unwrap(), same.ours);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let windows = Windows { length: 4, stride: 4, bos: Some(0) };
        assert!(divergence(&mut model(1, 1.0), &mut model(2, 1.0), &[1, 2], &windows, |_| ()).is_err());
        assert!(divergence(&mut model(1, 1.0), &mut model(1, 1.0), &[1, 7, 2], &windows, |_| ()).is_err());
        let long = Windows { length: 9, stride: 9, bos: Some(0) };
        assert!(divergence(&mut model(1, 1.0), &mut model(1, 1.0), &[1; 9], &long, |_| ()).is_err());
    }
}
