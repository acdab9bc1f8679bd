//! The loop that generates: feed, choose, feed again.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Choice, GenerateError, LanguageModel, Sampler};
use crate::EngineError;

/// Why a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "reason", content = "what")]
pub enum Finish {
    /// A token that ends a text.
    StopToken(i32),
    /// A string that was to end it.
    StopString(String),
    /// As many tokens as were asked for.
    Length,
    /// The model has no room for more.
    Context,
    /// Whoever listens asked for it.
    Cancelled,
}

/// What a listener wants after a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Continue,
    /// This sequence is finished.
    Finish(Finish),
}

/// One sequence to generate.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// Tokens to feed first: a prompt, or what follows what the slot has seen. Empty leaves the slot alone.
    pub prompt: &'a [i32],
    /// Chooses its tokens. It was told of the prompt, or not, by whoever made it.
    pub sampler: &'a mut Sampler,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
}

/// Time spent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timing {
    /// Tokens fed before the first choice, of all sequences.
    pub prompt_tokens: usize,
    /// Until the first tokens were chosen.
    pub first_token: Duration,
    /// Tokens generated, of all sequences.
    pub new_tokens: usize,
    /// Steps after the first tokens.
    pub steps: usize,
    /// Tokens those steps gave.
    pub step_tokens: usize,
    /// Their time.
    pub decode: Duration,
}

impl Timing {
    /// Tokens a second after the first, all sequences together.
    #[must_use]
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.decode.as_secs_f64();
        (self.step_tokens > 0 && seconds > 0.0).then(|| self.step_tokens as f64 / seconds)
    }

    /// Adds what another run took.
    pub fn add(&mut self, other: &Timing) {
        self.prompt_tokens += other.prompt_tokens;
        self.first_token += other.first_token;
        self.new_tokens += other.new_tokens;
        self.steps += other.steps;
        self.step_tokens += other.step_tokens;
        self.decode += other.decode;
    }
}

/// Generates one sequence in each slot of `model`, until every one is finished.
///
/// `stop_ids` end a sequence; they are given to `on_token`, as every other token is, but not fed. `on_token` is called with
/// the slot and what was chosen, and may end the sequence; the last token of a sequence is never fed, so that
/// a slot holds all but that one.
///
/// # Errors
/// When there is not one sequence a slot, the model fails, no token can be chosen, or `on_token` fails.
pub fn generate(
    model: &mut dyn LanguageModel,
    sequences: &mut [Sequence<'_>],
    stop_ids: &[i32],
    mut on_token: impl FnMut(usize, &Choice) -> Result<Verdict, GenerateError>,
) -> Result<(Vec<Finish>, Timing), GenerateError> {
    let slots = model.sequences();
    if sequences.len() != slots {
        let what = format!("{} sequences to generate, the model has {slots} slots", sequences.len());
        return Err(EngineError::Input(what).into());
    }
    let mut timing = Timing { prompt_tokens: sequences.iter().map(|s| s.prompt.len()).sum(), ..Timing::default() };
    let mut finished: Vec<Option<Finish>> = sequences
        .iter()
        .map(|s| if s.prompt.is_empty() || s.max_new_tokens == 0 { Some(Finish::Length) } else { None })
        .collect();
    let mut count = vec![0usize; slots];
    let mut last = vec![0i32; slots];
    let (mut clock, mut compiling) = (Instant::now(), model.compiling());
    let mut first = true;
    while finished.iter().any(Option::is_none) {
        let feed: Vec<&[i32]> = (0..slots)
            .map(|slot| match (&finished[slot], first) {
                (Some(_), _) => [].as_slice(),
                (None, true) => sequences[slot].prompt,
                (None, false) => std::slice::from_ref(&last[slot]),
            })
            .collect();
        let mut logits = model.feed(&feed)?;
        let vocab = model.vocab_size();
        let mut chosen = 0;
        for slot in 0..slots {
            if finished[slot].is_some() {
                continue;
            }
            let choice = sequences[slot].sampler.next(&mut logits[slot * vocab..(slot + 1) * vocab])?;
            chosen += 1;
            count[slot] += 1;
            last[slot] = choice.id;
            let verdict = on_token(slot, &choice)?;
            finished[slot] = match verdict {
                // A string that was met is the reason, even where the token would have been one.
                Verdict::Finish(why) => Some(why),
                Verdict::Continue if stop_ids.contains(&choice.id) => Some(Finish::StopToken(choice.id)),
                Verdict::Continue if count[slot] >= sequences[slot].max_new_tokens => Some(Finish::Length),
                Verdict::Continue if model.lengths()[slot] >= model.context() => Some(Finish::Context),
                Verdict::Continue => None,
            };
        }
        timing.new_tokens += chosen;
        let took = clock.elapsed().saturating_sub(model.compiling().saturating_sub(compiling));
        if first {
            timing.first_token = took;
        } else {
            timing.steps += 1;
            timing.step_tokens += chosen;
            timing.decode += took;
        }
        first = false;
        (clock, compiling) = (Instant::now(), model.compiling());
    }
    Ok((finished.into_iter().map(|f| f.unwrap_or(Finish::Length)).collect(), timing))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::generate::{Sampling, check_feed};

    /// A model that counts: after token `n` comes `n + 1`.
    #[derive(Debug)]
    pub(in super::super) struct Counting {
        pub(in super::super) lengths: Vec<usize>,
        pub(in super::super) fed: Vec<Vec<i32>>,
        pub(in super::super) context: usize,
    }

    impl Counting {
        pub(in super::super) fn new(slots: usize, context: usize) -> Self {
            Counting { lengths: vec![0; slots], fed: vec![Vec::new(); slots], context }
        }
    }

    impl LanguageModel for Counting {
        fn sequences(&self) -> usize {
            self.lengths.len()
        }
        fn vocab_size(&self) -> usize {
            100
        }
        fn lengths(&self) -> &[usize] {
            &self.lengths
        }
        fn context(&self) -> usize {
            self.context
        }
        fn feed(&mut self, tokens: &[&[i32]]) -> crate::Result<Vec<f32>> {
            check_feed(self, tokens)?;
            let mut logits = vec![f32::NAN; self.lengths.len() * 100];
            for (slot, fed) in tokens.iter().enumerate() {
                let Some(last) = fed.last() else { continue };
                self.lengths[slot] += fed.len();
                self.fed[slot].extend_from_slice(fed);
                let row = &mut logits[slot * 100..(slot + 1) * 100];
                row.fill(0.0);
                row[(*last as usize + 1) % 100] = 1.0;
            }
            Ok(logits)
        }
        fn reset(&mut self) {
            self.lengths.fill(0);
            self.fed.iter_mut().for_each(Vec::clear);
        }
    }

    fn run(
        model: &mut Counting,
        prompts: &[&[i32]],
        most: usize,
        stop: &[i32],
        mut verdict: impl FnMut(usize, i32) -> Verdict,
    ) -> (Vec<Vec<i32>>, Vec<Finish>, Timing) {
        let mut samplers: Vec<Sampler> =
            (0..prompts.len()).map(|i| Sampler::new(Sampling::default(), i, None).unwrap()).collect();
        let mut sequences: Vec<Sequence<'_>> = prompts
            .iter()
            .zip(&mut samplers)
            .map(|(prompt, sampler)| Sequence { prompt, sampler, max_new_tokens: most })
            .collect();
        let mut out = vec![Vec::new(); prompts.len()];
        let (finish, timing) = generate(model, &mut sequences, stop, |slot, choice| {
            out[slot].push(choice.id);
            Ok(verdict(slot, choice.id))
        })
        .unwrap();
        (out, finish, timing)
    }

    #[test]
    fn sequences_end_each_on_its_own() {
        let mut m = Counting::new(4, 8);
        let prompts: [&[i32]; 4] = [&[1, 2], &[10], &[20, 21, 22, 23, 24, 25], &[]];
        let (out, finish, timing) = run(&mut m, &prompts, 4, &[12], |_, _| Verdict::Continue);
        assert_eq!(out, [vec![3, 4, 5, 6], vec![11, 12], vec![26, 27, 28], vec![]]);
        assert_eq!(finish, [Finish::Length, Finish::StopToken(12), Finish::Context, Finish::Length]);
        // The last token is not fed, and a finished slot is left alone.
        assert_eq!(m.fed, [vec![1, 2, 3, 4, 5], vec![10, 11], vec![20, 21, 22, 23, 24, 25, 26, 27], vec![]]);
        assert_eq!((timing.prompt_tokens, timing.new_tokens, timing.steps, timing.step_tokens), (9, 9, 3, 6));
    }

    #[test]
    fn a_listener_can_end_it() {
        let mut m = Counting::new(2, 50);
        let (out, finish, _) = run(&mut m, &[&[1], &[40]], 9, &[], |slot, id| match (slot, id) {
            (0, 4) => Verdict::Finish(Finish::Cancelled),
            (1, 42) => Verdict::Finish(Finish::StopString("x".to_owned())),
            _ => Verdict::Continue,
        });
        assert_eq!(out, [vec![2, 3, 4], vec![41, 42]]);
        assert_eq!(finish, [Finish::Cancelled, Finish::StopString("x".to_owned())]);
        assert_eq!(
            serde_json::to_value(&finish[1]).unwrap(),
            serde_json::json!({"reason": "stop_string", "what": "x"})
        );
    }

    #[test]
    fn nothing_asked_for_is_nothing_run() {
        let mut m = Counting::new(1, 4);
        let (out, finish, timing) = run(&mut m, &[&[1]], 0, &[], |_, _| Verdict::Continue);
        assert_eq!((out[0].len(), &finish[0], timing.new_tokens), (0, &Finish::Length, 0));
        let error = generate(&mut m, &mut [], &[], |_, _| Ok(Verdict::Continue)).unwrap_err();
        assert!(error.to_string().contains("1 slots"));
        let mut sampler = Sampler::new(Sampling::default(), 0, None).unwrap();
        let mut long = [Sequence { prompt: &[1, 2, 3, 4, 5], sampler: &mut sampler, max_new_tokens: 1 }];
        let error = generate(&mut m, &mut long, &[], |_, _| Ok(Verdict::Continue)).unwrap_err();
        assert!(error.to_string().contains("room for 4"));
    }
}
