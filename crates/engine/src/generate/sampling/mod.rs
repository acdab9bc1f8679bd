//! From logits to the next token.
//!
//! The steps and their order are those of transformers' logits processors: repetition penalty and suppressed tokens always;
//! then, where tokens are drawn, temperature, top-k, top-p and min-p. Each step sees what the ones before it left.
//! Where two tokens are equally likely, the lower id comes first.

mod select;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use super::GenerateError;
use crate::compare::log_sum_exp;
use crate::rng::Philox;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Draws tokens; otherwise the most likely one is taken and everything down to `min_p` has no effect.
    pub do_sample: bool,
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Number of most likely tokens that stay (more where several are as likely as the last); 0 for all.
    pub top_k: usize,
    /// Probability that the most likely tokens which stay have together; 1 for all.
    pub top_p: f32,
    /// Least probability of a token that stays, as a share of the most likely one's; 0 for all.
    pub min_p: f32,
    /// Logits of tokens that were seen are divided by it where positive, multiplied where negative; 1 for no effect.
    pub repetition_penalty: f32,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<i32>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    /// The most likely token.
    fn default() -> Self {
        Sampling {
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            suppress_tokens: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// Refuses settings outside their ranges.
    ///
    /// # Errors
    /// The first that is.
    pub fn check(&self) -> Result<(), GenerateError> {
        let bad = |name, value: f32, reason| Err(GenerateError::Setting { name, value: value.to_string(), reason });
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", self.temperature, "it must be a number from 0 on");
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return bad("top_p", self.top_p, "it must be from 0 to 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", self.min_p, "it must be from 0 to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return bad("repetition_penalty", self.repetition_penalty, "it must be a number above 0");
        }
        Ok(())
    }

    /// Whether chance plays a part.
    #[must_use]
    pub fn draws(&self) -> bool {
        self.do_sample && self.temperature > 0.0
    }
}

/// A token that was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: i32,
    /// Its logarithmic probability, where such were asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their logarithmic probabilities, most likely first.
    pub top: Vec<(i32, f32)>,
}

/// Chooses the tokens of one sequence.
///
/// A draw depends on the seed, the number of the sequence and the number of draws before it alone.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    logprobs: Option<usize>,
    stream: Philox,
    drawn: u64,
    seen: HashSet<i32>,
}

impl Sampler {
    /// A sampler for sequence number `sequence`. `logprobs` asks for logarithmic probabilities: of the chosen token and of
    /// that many others. They are the model's own, before any step changes the logits.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn new(sampling: Sampling, sequence: usize, logprobs: Option<usize>) -> Result<Self, GenerateError> {
        sampling.check()?;
        let stream = Philox::new(sampling.seed, &format!("sample {sequence}"));
        Ok(Sampler { sampling, logprobs, stream, drawn: 0, seen: HashSet::new() })
    }

    /// Takes note of tokens of the prompt, which the repetition penalty counts as seen.
    pub fn observe(&mut self, tokens: &[i32]) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// Forgets what was seen; draws go on where they were.
    pub fn forget(&mut self) {
        self.seen.clear();
    }

    /// Chooses a token by its logits, which are changed on the way.
    ///
    /// # Errors
    /// When a logit is not a number, or every token is suppressed.
    pub fn next(&mut self, logits: &mut [f32]) -> Result<Choice, GenerateError> {
        if logits.iter().any(|x| x.is_nan()) {
            return Err(GenerateError::Logits(
                "the model gave a logit that is not a number; check the weights with `lapidary verify`".to_owned(),
            ));
        }
        let original = self.logprobs.map(|n| {
            let log_total = log_sum_exp(logits);
            (log_total, select::largest(logits, n), n)
        });
        let mut choice = Choice { id: 0, logprob: None, top: Vec::new() };
        let raw = original.as_ref().map(|_| logits.to_vec());
        self.penalise(logits);
        let kept = self.kept(logits);
        choice.id = match kept.as_slice() {
            [] => return Err(GenerateError::Logits("every token is suppressed".to_owned())),
            [(only, _)] => *only as i32,
            several => {
                let place = self.draw(several);
                several[place].0 as i32
            }
        };
        if let (Some((log_total, top, _)), Some(raw)) = (original, raw) {
            let logprob = |logit: f32| (f64::from(logit) - log_total) as f32;
            choice.logprob = Some(logprob(raw[choice.id as usize]));
            choice.top = top.into_iter().map(|(id, logit)| (id as i32, logprob(logit))).collect();
        }
        self.observe(&[choice.id]);
        Ok(choice)
    }

    /// Repetition penalty and suppressed tokens.
    fn penalise(&self, logits: &mut [f32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty != 1.0 {
            for &id in &self.seen {
                if let Some(logit) = usize::try_from(id).ok().and_then(|id| logits.get_mut(id)) {
                    *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                }
            }
        }
        for &id in &self.sampling.suppress_tokens {
            if let Some(logit) = usize::try_from(id).ok().and_then(|id| logits.get_mut(id)) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// The tokens that stay and their weights, which are relative to the largest.
    fn kept(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let s = &self.sampling;
        if !s.draws() {
            let best = select::largest(logits, 1).into_iter();
            return best.filter(|(_, l)| *l > f32::NEG_INFINITY).map(|(id, _)| (id, 1.0)).collect();
        }
        let scaled = |logit: f32| if s.temperature == 1.0 { logit } else { logit / s.temperature };
        // Dividing keeps the order, so that the choice comes first and only what stays is divided.
        let bar = match s.top_k {
            0 => f32::MIN,
            k => select::nth_largest(logits, k).max(f32::MIN),
        };
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from(scaled(logit) - scaled(top)).exp();
        let mut kept: Vec<(u32, f64)> = Vec::new();
        if top == f32::INFINITY {
            // Certain: nothing can be weighed against it.
            kept.extend((0u32..).zip(logits).filter(|(_, l)| **l == f32::INFINITY).map(|(id, _)| (id, 1.0)));
            return kept;
        }
        kept.extend((0u32..).zip(logits).filter(|(_, l)| **l >= bar).map(|(id, l)| (id, weight(*l))));
        if s.top_p < 1.0 {
            select::nucleus(&mut kept, f64::from(s.top_p));
        }
        if s.min_p > 0.0 {
            kept.retain(|(_, w)| *w >= f64::from(s.min_p));
        }
        kept
    }

    /// Draws a place by the weights.
    fn draw(&mut self, kept: &[(u32, f64)]) -> usize {
        let words = self.stream.block([self.drawn as u32, (self.drawn >> 32) as u32, 0, 0]);
        self.drawn += 1;
        // 53 bits, from 0 to below 1.
        let unit = ((u64::from(words[0]) << 32 | u64::from(words[1])) >> 11) as f64 / (1u64 << 53) as f64;
        let total: f64 = kept.iter().map(|(_, w)| w).sum();
        let mut left = unit * total;
        for (place, (_, w)) in kept.iter().enumerate() {
            left -= w;
            if left < 0.0 {
                return place;
            }
        }
        // Rounding can leave a trace at the very end.
        kept.len() - 1
    }
}
