//! The proof: logits and hidden states of a checkpoint against a reference.

use std::time::{Duration, Instant};

use gemma4::forward::Trace;
use rayon::prelude::*;
use serde::Serialize;
use tensor::DType;

use crate::compare::{Summary, TokenDistance, TraceDistance};
use crate::golden::{Golden, trace_order};
use crate::known::KnownAnswer;
use crate::{Batch, EngineError, Result, Session};

/// What counts as agreement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerances {
    /// Every token's KL(reference || ours) must be at most this.
    pub max_kl_div: f64,
    /// Every logit must be this close, if given.
    pub max_abs_diff: Option<f64>,
    /// Intermediate values: largest difference relative to the largest reference value.
    pub trace: f64,
}

/// The outcome of a verification.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Whether everything is within tolerance.
    pub passed: bool,
    /// What was required.
    pub tolerances: Tolerances,
    /// Activation dtype.
    pub dtype: &'static str,
    /// The dtype arithmetic was done in; wider than activations where that costs nothing.
    pub arithmetic: &'static str,
    /// All tokens.
    pub overall: Summary,
    /// Sequence by sequence.
    pub sequences: Vec<SequenceVerdict>,
    /// Intermediate values in the order they are computed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trace: Vec<TraceDistance>,
    /// The first intermediate value outside tolerance.
    pub first_divergence: Option<String>,
    /// Published answers, if those were the reference.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub known_answers: Vec<KnownAnswer>,
    /// Seconds of all forward runs, compilation not included.
    pub forward_seconds: f64,
}

/// One sequence.
#[derive(Debug, Clone, Serialize)]
pub struct SequenceVerdict {
    /// What people call it.
    pub label: String,
    /// Its distances.
    #[serde(flatten)]
    pub summary: Summary,
}

impl Verdict {
    /// A verdict over published answers: tokens and a few logits, no divergence.
    pub(crate) fn of_known_answers(session: &Session<'_>, tolerances: Tolerances, answers: Vec<KnownAnswer>) -> Self {
        let mut verdict = Run::new(tolerances).finish(session, session.model().arch().vocab_size());
        verdict.passed = !answers.is_empty() && answers.iter().all(|a| a.passed);
        verdict.known_answers = answers;
        verdict
    }
}

/// Compares a model with a golden file.
///
/// # Errors
/// When the file does not fit the model, or the device fails. A model that disagrees is a verdict, not an error.
pub fn against_golden(session: &Session<'_>, golden: &Golden, tolerances: Tolerances, trace: Trace) -> Result<Verdict> {
    let v = session.model().arch().vocab_size();
    if golden.vocab_size != v {
        return Err(EngineError::File {
            path: golden.path().to_owned(),
            reason: format!("holds logits over {} tokens, the model has {v}", golden.vocab_size),
        });
    }
    let mut run = Run::new(tolerances);
    for group in groups(golden) {
        let batch = group.batch(golden);
        let hidden = run.time(session, || session.forward(&batch, trace))?;
        for (row, &index) in group.sequences.iter().enumerate() {
            let sequence = &golden.sequences[index];
            let rows: Vec<usize> = sequence.positions.iter().map(|p| row * batch.seq + p).collect();
            let mut distances = Vec::with_capacity(rows.len());
            session.logits(&hidden.last, &rows, |chunk, logits| {
                let first = distances.len();
                let found: Vec<TokenDistance> = (0..chunk.len())
                    .into_par_iter()
                    .map(|i| {
                        let mut reference = Vec::with_capacity(v);
                        sequence.copy_row(first + i, &mut reference, v);
                        TokenDistance::new(&reference, &logits[i * v..(i + 1) * v])
                    })
                    .collect();
                distances.extend(found);
                Ok(())
            })?;
            run.sequence(sequence.label.clone(), distances, v);
        }
        if trace != Trace::None {
            for reference in &golden.trace {
                let Some(ours) = hidden.trace.get(&reference.name) else { continue };
                let (r, o) = reference.pairs(golden, ours).map_err(|reason| EngineError::File {
                    path: golden.path().to_owned(),
                    reason: format!("`{}`: {reason}", reference.name),
                })?;
                run.trace.push(TraceDistance::new(&reference.name, &r, &o, tolerances.trace));
            }
        }
    }
    if trace != Trace::None && run.trace.is_empty() {
        return Err(EngineError::File {
            path: golden.path().to_owned(),
            reason: "holds no hidden states to trace; make it with them, or leave --trace out".into(),
        });
    }
    Ok(run.finish(session, v))
}

/// Compares two checkpoints on the same token sequences; the second is the reference.
///
/// # Errors
/// When their vocabularies differ, or the device fails.
pub fn against_model(
    session: &Session<'_>,
    reference: &Session<'_>,
    batches: &[(String, Batch)],
    tolerances: Tolerances,
    trace: Trace,
) -> Result<Verdict> {
    let v = session.model().arch().vocab_size();
    let other = reference.model().arch().vocab_size();
    if other != v {
        return Err(EngineError::Input(format!("the models have vocabularies of {v} and {other} tokens")));
    }
    let mut run = Run::new(tolerances);
    for (label, batch) in batches {
        let ours = run.time(session, || session.forward(batch, trace))?;
        let theirs = reference.forward(batch, trace)?;
        let rows: Vec<usize> = (0..batch.batch * batch.seq).collect();
        let mut distances = Vec::with_capacity(rows.len());
        for block in rows.chunks(crate::forward::HEAD_ROWS) {
            let mut expected = Vec::new();
            reference.logits(&theirs.last, block, |_, logits| {
                expected.extend_from_slice(logits);
                Ok(())
            })?;
            session.logits(&ours.last, block, |chunk, logits| {
                let found: Vec<TokenDistance> = (0..chunk.len())
                    .into_par_iter()
                    .map(|i| TokenDistance::new(&expected[i * v..(i + 1) * v], &logits[i * v..(i + 1) * v]))
                    .collect();
                distances.extend(found);
                Ok(())
            })?;
        }
        run.sequence(label.clone(), distances, v);
        if trace != Trace::None {
            let mut names: Vec<&String> = theirs.trace.keys().filter(|n| ours.trace.contains_key(*n)).collect();
            names.sort_by_key(|n| trace_order(n));
            for name in names {
                let (r, o) = (theirs.trace[name].to_f64(), ours.trace[name].to_f64());
                run.trace.push(TraceDistance::new(name, &r, &o, tolerances.trace));
            }
        }
    }
    Ok(run.finish(session, v))
}

/// What accumulates while sequences are compared.
struct Run {
    tolerances: Tolerances,
    all: Vec<TokenDistance>,
    sequences: Vec<SequenceVerdict>,
    trace: Vec<TraceDistance>,
    forward: Duration,
}

impl Run {
    fn new(tolerances: Tolerances) -> Self {
        Run { tolerances, all: Vec::new(), sequences: Vec::new(), trace: Vec::new(), forward: Duration::ZERO }
    }

    /// Runs and counts the time, less what compiling took.
    fn time<T>(&mut self, session: &Session<'_>, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let (start, compiled) = (Instant::now(), session.compile_times().total);
        let out = f()?;
        self.forward += start.elapsed().saturating_sub(session.compile_times().total - compiled);
        Ok(out)
    }

    fn sequence(&mut self, label: String, distances: Vec<TokenDistance>, vocab_size: usize) {
        self.sequences.push(SequenceVerdict { label, summary: Summary::new(&distances, vocab_size) });
        self.all.extend(distances);
    }

    fn finish(self, session: &Session<'_>, vocab_size: usize) -> Verdict {
        let overall = Summary::new(&self.all, vocab_size);
        let first_divergence = self.trace.iter().find(|t| !t.within).map(|t| t.name.clone());
        let passed = overall.max_kl <= self.tolerances.max_kl_div
            && self.tolerances.max_abs_diff.is_none_or(|t| overall.max_abs_diff <= t)
            && first_divergence.is_none();
        Verdict {
            passed,
            tolerances: self.tolerances,
            dtype: session.dtype().name(),
            arithmetic: session.dtype().name(),
            overall,
            sequences: self.sequences,
            trace: self.trace,
            first_divergence,
            known_answers: Vec::new(),
            forward_seconds: self.forward.as_secs_f64(),
        }
    }
}

/// Sequences of a golden file that run as one batch.
struct Group {
    seq: usize,
    sequences: Vec<usize>,
}

/// One batch for files of one length; sequences of several lengths run one by one, padded to a common length so that one
/// program serves all.
fn groups(golden: &Golden) -> Vec<Group> {
    let longest = golden.sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let uniform = golden.sequences.iter().all(|s| s.ids.len() == longest);
    if uniform {
        return vec![Group { seq: longest, sequences: (0..golden.sequences.len()).collect() }];
    }
    (0..golden.sequences.len()).map(|i| Group { seq: longest, sequences: vec![i] }).collect()
}

impl Group {
    fn batch(&self, golden: &Golden) -> Batch {
        let ragged = golden.sequences.iter().any(|s| s.ids.len() != self.seq);
        let segmented = golden.padded() || ragged;
        let mut batch =
            Batch { batch: self.sequences.len(), seq: self.seq, ids: Vec::new(), segments: segmented.then(Vec::new) };
        for &i in &self.sequences {
            let s = &golden.sequences[i];
            batch.ids.extend(&s.ids);
            batch.ids.resize(batch.ids.len() + self.seq - s.ids.len(), 0);
            if let Some(segments) = &mut batch.segments {
                segments.extend((0..self.seq).map(|p| {
                    let real = p < s.ids.len() && s.mask.as_ref().is_none_or(|m| m[p]);
                    i32::from(real)
                }));
            }
        }
        batch
    }
}

/// Token sequences to compare two models on when the user gives none: lengths around the window, ids spread over the
/// vocabulary by a fixed rule, the first one bos.
#[must_use]
pub fn probe_batches(session: &Session<'_>, lengths: &[usize]) -> Vec<(String, Batch)> {
    let v = session.model().arch().vocab_size() as u64;
    lengths
        .iter()
        .map(|&n| {
            let mut state = 0x9E37_79B9_7F4A_7C15u64 ^ n as u64;
            let ids = (0..n)
                .map(|i| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    if i == 0 { 2.min(v - 1) as i32 } else { ((state >> 33) % v) as i32 }
                })
                .collect();
            (format!("{n} tokens"), Batch { batch: 1, seq: n, ids, segments: None })
        })
        .collect()
}

/// The default tolerance of intermediate values for a dtype, relative to the largest reference value.
#[must_use]
pub fn default_trace_tolerance(dtype: DType) -> f64 {
    match dtype {
        // Rounding of every one of the layers adds up: on a random full-size E2B transformers' own bf16 run departs from
        // its f32 run by up to 0.14 of the largest value (layer 29), this one by up to 0.18 (layer 31).
        DType::BF16 | DType::F16 => 0.25,
        _ => 1e-4,
    }
}
