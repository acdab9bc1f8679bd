//! The figures of a training step and of an evaluation, and MaxText's ways to print them.

use serde::{Deserialize, Deserializer, Serialize};

/// A tag and its value.
pub type Scalar = (&'static str, f64);

/// MaxText's guard against a batch without targets.
const EPS: f64 = 1e-8;

/// A step whose waiting for data takes this share of its time says so in its line.
const NOTABLE_WAIT: f64 = 0.05;

/// What a training step came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Index of the step, from 0.
    pub step: u64,
    /// Wall time from the end of the previous step, evaluation and saving excluded, to the end of this one.
    #[serde(deserialize_with = "nan_if_null")]
    pub seconds: f64,
    /// The quantity that is differentiated.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Cross-entropy over targets, z term included, as MaxText has it.
    #[serde(deserialize_with = "nan_if_null")]
    pub lm_loss: f64,
    /// `exp(lm_loss)`.
    #[serde(deserialize_with = "nan_if_null")]
    pub perplexity: f64,
    /// The z term alone.
    #[serde(deserialize_with = "nan_if_null")]
    pub z_loss: f64,
    /// Targets that count, over all devices and micro-batches.
    pub total_weights: u64,
    /// Norm of all gradients, after clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Norm of all gradients, before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub raw_grad_norm: f64,
    /// Norm of all parameters, after the update.
    #[serde(deserialize_with = "nan_if_null")]
    pub param_norm: f64,
    /// Learning rate of this step.
    #[serde(deserialize_with = "nan_if_null")]
    pub learning_rate: f64,
    /// Work of the step on one device, in TFLOP.
    #[serde(deserialize_with = "nan_if_null")]
    pub tflops: f64,
    /// The part of it that is done where parameters are frozen: what MFU counts.
    pub worked_tflops: f64,
    /// Tokens of the step on one device.
    pub tokens: u64,
    /// Peak rate of a device for the run's operands, in FLOP/s, where it is known.
    pub peak_flops: Option<f64>,
    /// Memory in use, in bytes: of the device where it reports it, else of the process (see [`super::memory`]).
    pub memory_bytes: Option<u64>,
    /// Part of `seconds` in which the step waited for its batch.
    #[serde(deserialize_with = "nan_if_null")]
    pub data_wait_seconds: f64,
    /// Whether the update was left out.
    pub skipped: bool,
}

impl StepMetrics {
    /// The line of the step: MaxText's first, so that its readers find what they know, then learning rate, gradient
    /// norms, MFU and memory.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!(
            "completed step: {}, seconds: {}, TFLOP/s/device: {}, Tokens/s/device: {}, total_weights: {}, loss: {}, \
             lm_loss: {}, perplexity: {}",
            self.step,
            decimals(self.seconds),
            decimals(self.tflops_per_second()),
            decimals(self.tokens_per_second()),
            self.total_weights,
            decimals(self.loss),
            decimals(self.lm_loss),
            decimals(self.perplexity)
        );
        line += &format!(", learning_rate: {}", scientific(self.learning_rate));
        line += &format!(", grad_norm: {}, raw_grad_norm: {}", decimals(self.grad_norm), decimals(self.raw_grad_norm));
        if let Some(mfu) = self.mfu() {
            line += &format!(", MFU: {:.2}%", 100.0 * mfu);
        }
        if let Some(bytes) = self.memory_bytes {
            line += &format!(", memory: {:.3} GB", bytes as f64 / 1e9);
        }
        if self.data_wait_seconds >= NOTABLE_WAIT * self.seconds && self.data_wait_seconds > 0.0 {
            line += &format!(", waited for data: {} s", decimals(self.data_wait_seconds));
        }
        if self.skipped {
            line += ", update skipped";
        }
        line
    }

    /// Every figure under MaxText's tag for it, and under ours where it has none.
    #[must_use]
    pub fn scalars(&self) -> Vec<Scalar> {
        let mut scalars = vec![
            ("learning/loss", self.loss),
            ("learning/lm_loss", self.lm_loss),
            ("learning/perplexity", self.perplexity),
            ("learning/z_loss", self.z_loss),
            ("learning/total_weights", self.total_weights as f64),
            ("learning/grad_norm", self.grad_norm),
            ("learning/raw_grad_norm", self.raw_grad_norm),
            ("learning/param_norm", self.param_norm),
            ("learning/current_learning_rate", self.learning_rate),
            ("perf/step_time_seconds", self.seconds),
            ("perf/per_device_tflops", self.tflops),
            ("perf/per_device_tflops_per_sec", self.tflops_per_second()),
            ("perf/per_device_tokens", self.tokens as f64),
            ("perf/per_device_tokens_per_sec", self.tokens_per_second()),
            ("perf/data_wait_seconds", self.data_wait_seconds),
            ("optim/step_skipped", f64::from(u8::from(self.skipped))),
        ];
        scalars.extend(self.mfu().map(|mfu| ("perf/mfu", mfu)));
        scalars.extend(self.memory_bytes.map(|bytes| ("perf/memory_bytes", bytes as f64)));
        scalars
    }

    /// Model FLOPs utilisation: work done over the work the device could have done, from 0 to 1.
    #[must_use]
    pub fn mfu(&self) -> Option<f64> {
        self.peak_flops.filter(|peak| *peak > 0.0).map(|peak| self.worked_tflops / self.clock() * 1e12 / peak)
    }

    /// Work rate of one device, in TFLOP/s.
    #[must_use]
    pub fn tflops_per_second(&self) -> f64 {
        self.tflops / self.clock()
    }

    /// Tokens per second of one device.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.clock()
    }

    /// A clock that stands still must not make rates infinite.
    fn clock(&self) -> f64 {
        self.seconds.max(1e-9)
    }
}

/// Sums over the batches of an evaluation, and what follows from them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Training step after which the evaluation ran.
    pub step: u64,
    /// Batches seen.
    pub batches: u64,
    /// Wall time of the whole evaluation.
    #[serde(deserialize_with = "nan_if_null")]
    pub seconds: f64,
    /// Cross-entropy, summed over targets.
    #[serde(deserialize_with = "nan_if_null")]
    pub total_loss: f64,
    /// Targets that count.
    #[serde(deserialize_with = "nan_if_null")]
    pub total_weights: f64,
    /// z term of each batch, summed over batches.
    #[serde(deserialize_with = "nan_if_null")]
    pub z_loss: f64,
}

impl EvalMetrics {
    /// An evaluation after a training step, before its first batch.
    #[must_use]
    pub fn begin(step: u64) -> Self {
        EvalMetrics { step, batches: 0, seconds: 0.0, total_loss: 0.0, total_weights: 0.0, z_loss: 0.0 }
    }

    /// Adds a batch: its summed cross-entropy, its targets, its mean z term, its wall time.
    pub fn add(&mut self, total_loss: f64, total_weights: f64, z_loss: f64, seconds: f64) {
        self.batches += 1;
        self.total_loss += total_loss;
        self.total_weights += total_weights;
        self.z_loss += z_loss;
        self.seconds += seconds;
    }

    /// Cross-entropy per target: sum of losses over sum of weights.
    #[must_use]
    pub fn avg_loss(&self) -> f64 {
        self.total_loss / (self.total_weights + EPS)
    }

    /// `exp` of [`Self::avg_loss`].
    #[must_use]
    pub fn avg_perplexity(&self) -> f64 {
        self.avg_loss().exp()
    }

    /// Mean z term over batches.
    #[must_use]
    pub fn avg_z_loss(&self) -> f64 {
        self.z_loss / self.batches.max(1) as f64
    }

    /// MaxText's line after every batch of an evaluation: `seconds` of the batch just added, averages so far.
    #[must_use]
    pub fn running_line(&self, seconds: f64) -> String {
        format!(
            "Completed eval step: {}, seconds: {}, running loss={}, running perplexity={}, running total_weights={:?}",
            self.batches.saturating_sub(1),
            decimals(seconds),
            decimals(self.avg_loss()),
            decimals(self.avg_perplexity()),
            self.total_weights
        )
    }

    /// MaxText's line at the end of an evaluation, then batches and time.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "Completed eval after train step {}, loss={}, perplexity={}, total_weights={:?}, avg_z_loss={}, \
             batches={}, seconds={}",
            self.step,
            decimals(self.avg_loss()),
            decimals(self.avg_perplexity()),
            self.total_weights,
            decimals(self.avg_z_loss()),
            self.batches,
            decimals(self.seconds)
        )
    }

    /// Every figure under MaxText's tag for it, and under ours where it has none.
    #[must_use]
    pub fn scalars(&self) -> Vec<Scalar> {
        vec![
            ("eval/total_loss", self.total_loss),
            ("eval/total_weights", self.total_weights),
            ("eval/z_loss", self.z_loss),
            ("eval/avg_loss", self.avg_loss()),
            ("eval/avg_perplexity", self.avg_perplexity()),
            ("eval/avg_z_loss", self.avg_z_loss()),
            ("perf/eval_seconds", self.seconds),
            ("perf/eval_batches", self.batches as f64),
        ]
    }
}

/// Three decimals, and Python's words for what is no number.
fn decimals(value: f64) -> String {
    if value.is_nan() { "nan".to_owned() } else { format!("{value:.3}") }
}

/// Four digits and an exponent, as Python's `.3e`: `3.000e-05`.
fn scientific(value: f64) -> String {
    if !value.is_finite() {
        return decimals(value);
    }
    let text = format!("{value:.3e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// JSON has no word for NaN, so that it is written as null.
fn nan_if_null<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            seconds: 0.25,
            loss: 8.917_154,
            lm_loss: 8.917_154,
            perplexity: 7458.83,
            z_loss: 0.0,
            total_weights: 256,
            grad_norm: 1.0,
            raw_grad_norm: 306.79,
            param_norm: 120.5,
            learning_rate: 3e-5,
            tflops: 0.016,
            worked_tflops: 0.016,
            tokens: 256,
            peak_flops: Some(0.32e12),
            memory_bytes: Some(2_512_000_000),
            data_wait_seconds: 0.001,
            skipped: false,
        }
    }

    #[test]
    fn the_line() {
        let mut m = sample(7);
        assert_eq!(
            m.line(),
            "completed step: 7, seconds: 0.250, TFLOP/s/device: 0.064, Tokens/s/device: 1024.000, total_weights: 256, \
             loss: 8.917, lm_loss: 8.917, perplexity: 7458.830, learning_rate: 3.000e-05, grad_norm: 1.000, \
             raw_grad_norm: 306.790, MFU: 20.00%, memory: 2.512 GB"
        );
        (m.peak_flops, m.memory_bytes, m.data_wait_seconds, m.skipped) = (None, None, 0.2, true);
        (m.loss, m.lm_loss, m.learning_rate) = (f64::NAN, f64::INFINITY, 0.0);
        let line = m.line();
        assert!(line.contains("loss: nan, lm_loss: inf,"), "{line}");
        assert!(line.ends_with("learning_rate: 0.000e+00, grad_norm: 1.000, raw_grad_norm: 306.790, waited for data: 0.200 s, update skipped"), "{line}");
    }

    /// Reads a line by a pattern of literals and `%` for a number, as the regular expression of MaxText's readers does:
    /// digits for a whole number, digits and points for others. Gives the numbers.
    fn read(line: &str, pattern: &str) -> Option<Vec<f64>> {
        // The expression is searched for, not anchored.
        (0..line.len()).find_map(|start| {
            let mut rest = line.get(start..)?;
            let mut numbers = Vec::new();
            for (i, literal) in pattern.split('%').enumerate() {
                if i > 0 {
                    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
                    numbers.push(rest[..end].parse().ok()?);
                    rest = &rest[end..];
                }
                rest = rest.strip_prefix(literal)?;
            }
            Some(numbers)
        })
    }

    #[test]
    fn readers_of_maxtext_understand_the_line() {
        let documented =
            "completed step: %, seconds: %, TFLOP/s/device: %, Tokens/s/device: %, total_weights: %, loss: %";
        let theirs = "completed step: 9, seconds: 5.667, TFLOP/s/device: 134.924, Tokens/s/device: 8672.758, \
                      total_weights: 196608, loss: 10.374";
        assert_eq!(read(theirs, documented).unwrap(), [9.0, 5.667, 134.924, 8672.758, 196_608.0, 10.374]);
        assert_eq!(read(&sample(7).line(), documented).unwrap(), [7.0, 0.25, 0.064, 1024.0, 256.0, 8.917]);
        assert_eq!(read("completed step: x, seconds: 1", documented), None);
    }

    #[test]
    fn rates() {
        let mut m = sample(0);
        assert_eq!(m.mfu(), Some(0.2));
        assert_eq!(m.tokens_per_second(), 1024.0);
        m.seconds = 0.0;
        assert!(m.tokens_per_second().is_finite());
        m.peak_flops = Some(0.0);
        assert_eq!(m.mfu(), None);
    }

    #[test]
    fn nan_survives_json() {
        let mut m = sample(3);
        m.loss = f64::NAN;
        let back: StepMetrics = serde_json::from_str(&serde_json::to_string(&m).unwrap()).unwrap();
        assert!(back.loss.is_nan());
        assert_eq!(StepMetrics { loss: 0.0, ..back }, StepMetrics { loss: 0.0, ..m });
    }

    #[test]
    fn evaluation() {
        let mut e = EvalMetrics::begin(10);
        e.add(512.0, 256.0, 0.5, 0.2);
        assert_eq!(
            e.running_line(0.2),
            "Completed eval step: 0, seconds: 0.200, running loss=2.000, running perplexity=7.389, running \
             total_weights=256.0"
        );
        e.add(256.0, 128.0, 0.25, 0.1);
        assert!((e.avg_loss() - 2.0).abs() < 1e-9);
        assert_eq!(
            e.line(),
            "Completed eval after train step 10, loss=2.000, perplexity=7.389, total_weights=384.0, \
             avg_z_loss=0.375, batches=2, seconds=0.300"
        );
        // No batch at all is no division by zero.
        assert_eq!(EvalMetrics::begin(0).avg_loss(), 0.0);
    }
}
