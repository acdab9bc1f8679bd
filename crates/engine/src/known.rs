//! Public known answers of the real google/gemma-4-E2B-it in f32, for users who have its weights.
//!
//! Source: the golden records of the public repository ohdearquant/lattice, made with transformers at commit ab1771c9.

use gemma4::forward::Trace;

use crate::verify::{Tolerances, Verdict};
use crate::{Batch, EngineError, Result, Session};

/// "The capital of France is", with bos.
const PROMPT: [i32; 6] = [2, 818, 5279, 529, 7001, 563];

/// Largest difference of a published logit, which has four decimals: f32 implementations agree far below this.
const LOGIT_TOLERANCE: f32 = 0.01;

/// One published answer.
struct Answer {
    label: &'static str,
    /// Tokens of the prompt; the five after bos repeat.
    length: usize,
    /// Tokens that greedy decoding gives.
    greedy: &'static [i32],
    /// Logits at the last position of the prompt; a token of -1 stands for the most likely one.
    top: &'static [(i32, f32)],
}

/// Lengths around the window of 512 show its edge.
const ANSWERS: [Answer; 4] = [
    Answer {
        label: "The capital of France is",
        length: 6,
        greedy: &[9079, 236_761, 106],
        top: &[
            (9079, 20.0239),
            (5213, 15.0911),
            (1018, 6.9699),
            (711, 6.6982),
            (808, 5.8477),
            (236_743, 5.3530),
            (84_750, 5.0667),
            (236_761, 4.7279),
        ],
    },
    Answer { label: "repeated to 511 tokens", length: 511, greedy: &[818, 5279], top: &[(-1, 20.8803)] },
    Answer { label: "repeated to 512 tokens", length: 512, greedy: &[5279, 529], top: &[(-1, 7.6360)] },
    Answer { label: "repeated to 513 tokens", length: 513, greedy: &[529, 7001], top: &[(-1, 9.9083)] },
];

/// The outcome of one published answer.
#[derive(Debug, Clone, serde::Serialize)]
pub struct KnownAnswer {
    /// The prompt.
    pub label: &'static str,
    /// Tokens that greedy decoding should give.
    pub expected: &'static [i32],
    /// Tokens it gave.
    pub greedy: Vec<i32>,
    /// Largest difference of a published logit.
    pub max_abs_diff: f32,
    /// Whether tokens are equal and logits close.
    pub passed: bool,
}

/// Compares a model with the published answers. Only the tokens and logits that were published can be compared, so the
/// verdict has no divergences.
///
/// # Errors
/// When the model's vocabulary is not Gemma 4's, or the device fails.
pub fn against_known_answers(session: &Session<'_>, tolerances: Tolerances) -> Result<Verdict> {
    let v = session.model().arch().vocab_size();
    if v != 262_144 {
        return Err(EngineError::Input(format!(
            "the known answers are of google/gemma-4-E2B-it with 262144 tokens; this model has {v}"
        )));
    }
    let mut answers = Vec::new();
    for answer in &ANSWERS {
        let mut ids: Vec<i32> = (0..answer.length).map(|i| if i == 0 { 2 } else { PROMPT[1 + (i - 1) % 5] }).collect();
        // One program for every step: room for the continuation, which causal attention does not see.
        let room = answer.length + answer.greedy.len();
        let (mut greedy, mut max_abs_diff) = (Vec::new(), 0f32);
        for step in 0..answer.greedy.len() {
            let mut padded = ids.clone();
            padded.resize(room, 0);
            let hidden = session.forward(&Batch { batch: 1, seq: room, ids: padded, segments: None }, Trace::None)?;
            let mut row = Vec::new();
            session.logits(&hidden.last, &[ids.len() - 1], |_, logits| {
                row.extend_from_slice(logits);
                Ok(())
            })?;
            let best = (0..v).fold(0, |b, i| if row[i] > row[b] { i } else { b });
            if step == 0 {
                for &(token, logit) in answer.top {
                    let ours = row[usize::try_from(token).unwrap_or(best)];
                    let d = (ours - logit).abs();
                    max_abs_diff = if d.is_nan() { f32::INFINITY } else { max_abs_diff.max(d) };
                }
            }
            greedy.push(best as i32);
            // The published continuation goes on, whatever this model says.
            ids.push(answer.greedy[step]);
        }
        let passed = greedy == answer.greedy && max_abs_diff <= LOGIT_TOLERANCE;
        answers.push(KnownAnswer { label: answer.label, expected: answer.greedy, greedy, max_abs_diff, passed });
    }
    Ok(Verdict::of_known_answers(session, tolerances, answers))
}
