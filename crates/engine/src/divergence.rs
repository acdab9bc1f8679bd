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
    windows.check()?;
    let (slots, vocab) = (reference.sequences(), reference.vocab_size());
    if ours.sequences() != slots || ours.vocab_size() != vocab {
        return Err(EngineError::Input("only models with the same vocabulary and slots can be compared".into()));
    }
    let mut sum = Divergence { vocab_size: vocab, ..Divergence::default() };
    for group in windows.over(ids.len()).chunks(slots) {
        reference.reset();
        ours.reset();
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
            let (theirs, mine) = (reference.feed(&feed)?, ours.feed(&feed)?);
            let counted: Vec<(usize, usize)> = group
                .iter()
                .enumerate()
                .map(|(slot, w)| (slot, w.start + at, w))
                .filter(|(_, target, w)| (w.counted..w.end).contains(target))
                .map(|(slot, target, _)| (slot, target))
                .collect();
            let rows: Vec<(f64, f64, TokenDistance)> = counted
                .par_iter()
                .map(|&(slot, target)| {
                    let row = slot * vocab..(slot + 1) * vocab;
                    let (theirs, mine) = (&theirs[row.clone()], &mine[row]);
                    // Ids were checked when they were fed, but for the last one.
                    let of = |z: &[f32]| {
                        let logit = usize::try_from(ids[target]).ok().and_then(|id| z.get(id));
                        logit.map_or(f64::NAN, |&logit| f64::from(logit) - log_sum_exp(z))
                    };
                    (of(theirs), of(mine), TokenDistance::new(theirs, mine))
                })
                .collect();
            for (theirs, mine, distance) in rows {
                sum.reference.add(Score { tokens: 1, log_likelihood: theirs });
                sum.ours.add(Score { tokens: 1, log_likelihood: mine });
                sum.tokens.push(distance);
            }
            progress(sum.ours.tokens);
        }
    }
    Ok(sum)
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
