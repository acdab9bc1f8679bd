//! Reading back what runs have logged, ours or MaxText's: rows by step, and what they come to.
//!
//! A file may have been cut off, appended to by several runs, or gone over twice by a run that started again. Damaged
//! lines are reported and passed over; of a step that was run twice, the last time counts.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::Serialize;
use serde_json::{Map, Value};

use super::jsonl::{MAX_LINE, finite_words};
use super::{MetricsError, Result, log, metrics_path};

/// A quantity that has a value at every training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Training loss.
    Loss,
    /// Learning rate.
    LearningRate,
    /// Norm of all gradients, before clipping.
    RawGradNorm,
    /// Tokens per second of one device.
    TokensPerSecond,
    /// TFLOP/s of one device.
    TflopsPerSecond,
    /// Model FLOPs utilisation, from 0 to 1.
    Mfu,
    /// Memory in use, in bytes.
    MemoryBytes,
    /// Wall time of the step.
    Seconds,
    /// Time for which the step waited for its batch.
    DataWaitSeconds,
    /// 1 where the update was left out.
    Skipped,
}

pub(super) const METRICS: usize = 10;

/// The key of every metric, in the order of the enumeration.
const KEYS: [&str; METRICS] = [
    "learning/loss",
    "learning/current_learning_rate",
    "learning/raw_grad_norm",
    "perf/per_device_tokens_per_sec",
    "perf/per_device_tflops_per_sec",
    "perf/mfu",
    "perf/memory_bytes",
    "perf/step_time_seconds",
    "perf/data_wait_seconds",
    "optim/step_skipped",
];

/// A training step as it was logged.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its index.
    pub step: u64,
    /// When it was logged, in seconds since 1970.
    pub wall_time: Option<f64>,
    pub(super) values: [Option<f64>; METRICS],
}

impl Row {
    /// The value of a metric: none where it was not logged, NaN or infinite where that is what it was.
    #[must_use]
    pub fn get(&self, metric: Metric) -> Option<f64> {
        self.values[metric as usize]
    }
}

/// An evaluation as it was logged.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalRow {
    /// Training step after which it ran.
    pub step: u64,
    /// Loss per target.
    pub loss: f64,
    /// Wall time of the evaluation.
    pub seconds: Option<f64>,
}

/// What one run has logged.
#[derive(Debug, Clone)]
pub struct Run {
    /// Its name, or that of its directory where it has none.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Training steps, in order, each once.
    pub steps: Vec<Row>,
    /// Evaluations, in order.
    pub evals: Vec<EvalRow>,
    /// Steps that were logged again later and no longer count.
    pub repeated_steps: u64,
}

/// A line that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedLine {
    /// The file.
    pub path: PathBuf,
    /// Number of the line, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// Everything found under one path.
#[derive(Debug, Clone)]
pub struct History {
    /// The runs of the file, in the order in which they appear: usually one.
    pub runs: Vec<Run>,
    /// Lines that could not be read: the first thousand of them.
    pub damaged: Vec<DamagedLine>,
    /// How many could not be read.
    pub damaged_lines: u64,
}

const DAMAGED_KEPT: usize = 1000;

/// Reads a run directory, a file of JSON lines, or a log.
///
/// # Errors
/// When there is no such file, or no line of it holds metrics.
pub fn read(path: &Path) -> Result<History> {
    let file = locate(path)?;
    let mut history = History { runs: Vec::new(), damaged: Vec::new(), damaged_lines: 0 };
    let mut reader = BufReader::new(fs::File::open(&file)?);
    let mut line = Vec::new();
    let (mut objects, mut log_lines) = (false, false);
    for number in 1.. {
        line.clear();
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let reason = match parse(&line) {
            Ok((run_name, record)) => {
                objects = true;
                history.run(&file, path, run_name).add(record);
                continue;
            }
            Err(reason) => reason,
        };
        if let Some(record) = log::parse(&line) {
            log_lines = true;
            history.run(&file, path, None).add(record);
            continue;
        }
        history.damaged_lines += 1;
        if history.damaged.len() < DAMAGED_KEPT {
            let torn = !line.ends_with(b"\n");
            let reason = if torn { "the last line was never finished".to_owned() } else { reason };
            history.damaged.push(DamagedLine { path: file.clone(), line: number, reason });
        }
    }
    if log_lines && !objects {
        // A log says other things as well.
        (history.damaged, history.damaged_lines) = (Vec::new(), 0);
    }
    history.runs.retain(|run| !run.steps.is_empty() || !run.evals.is_empty());
    if history.runs.is_empty() { Err(MetricsError::NoMetrics { path: path.to_owned() }) } else { Ok(history) }
}

fn locate(path: &Path) -> Result<PathBuf> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(path.to_owned());
    }
    [metrics_path(path), path.join("metrics.jsonl")]
        .into_iter()
        .find(|file| file.is_file())
        .ok_or_else(|| MetricsError::NoMetrics { path: path.to_owned() })
}

pub(super) enum Record {
    Step(Row),
    Eval(EvalRow),
    /// Something else that is known to occur, such as MaxText's averages in the midst of an evaluation.
    Other,
}

fn parse(line: &[u8]) -> std::result::Result<(Option<String>, Record), String> {
    let object: Map<String, Value> = serde_json::from_slice(&finite_words(line)).map_err(|e| {
        // Every line is the first of its own text.
        format!("not a JSON object: {}", e.to_string().replace(" at line 1 column ", " at column "))
    })?;
    let step = match object.get("step") {
        None => return Err("no `step`".to_owned()),
        Some(value) => match value.as_f64() {
            Some(s) if (0.0..9e15).contains(&s) && s.fract() == 0.0 => s as u64,
            _ => return Err(format!("`step` is {value}, not a whole number")),
        },
    };
    let run_name = object.get("run_name").and_then(Value::as_str).map(str::to_owned);
    let number = |key: &str| number(&object, key);
    let record = if object.contains_key(KEYS[Metric::Loss as usize]) {
        let mut values = [None; METRICS];
        for (value, key) in values.iter_mut().zip(KEYS) {
            *value = number(key)?;
        }
        Record::Step(Row { step, wall_time: number("wall_time")?, values })
    } else if object.contains_key("eval/avg_loss") && !object.contains_key("eval/step_time_seconds") {
        let loss = number("eval/avg_loss")?.unwrap_or(f64::NAN);
        Record::Eval(EvalRow { step, loss, seconds: number("perf/eval_seconds")? })
    } else {
        Record::Other
    };
    Ok((run_name, record))
}

/// A number of an object; null stands for what JSON has no word for.
fn number(object: &Map<String, Value>, key: &str) -> std::result::Result<Option<f64>, String> {
    match object.get(key) {
        None => Ok(None),
        Some(Value::Null) => {
            let word = object.get("non_finite").and_then(|words| words.get(key)).and_then(Value::as_str);
            Ok(Some(match word {
                Some("Infinity") => f64::INFINITY,
                Some("-Infinity") => f64::NEG_INFINITY,
                _ => f64::NAN,
            }))
        }
        Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("`{key}` is {value}, not a number")),
    }
}

impl History {
    fn run(&mut self, file: &Path, given: &Path, name: Option<String>) -> &mut Run {
        let name = name.filter(|n| !n.is_empty()).unwrap_or_else(|| {
            given.file_name().map_or_else(|| given.display().to_string(), |n| n.to_string_lossy().into_owned())
        });
        // The last run is nearly always the one.
        let index = self.runs.iter().rposition(|run| run.name == name).unwrap_or_else(|| {
            self.runs.push(Run {
                name,
                path: file.to_owned(),
                steps: Vec::new(),
                evals: Vec::new(),
                repeated_steps: 0,
            });
            self.runs.len() - 1
        });
        &mut self.runs[index]
    }
}

impl Run {
    fn add(&mut self, record: Record) {
        match record {
            Record::Step(row) => {
                let stale = self.steps.iter().rev().take_while(|r| r.step >= row.step).count();
                if stale > 0 {
                    self.steps.truncate(self.steps.len() - stale);
                    self.repeated_steps += stale as u64;
                    self.evals.retain(|e| e.step < row.step);
                }
                self.steps.push(row);
            }
            Record::Eval(row) => {
                self.evals.retain(|e| e.step < row.step);
                self.evals.push(row);
            }
            Record::Other => {}
        }
    }

    /// Values of a metric by step, where it was logged.
    pub fn values(&self, metric: Metric) -> impl Iterator<Item = (u64, f64)> + '_ {
        self.steps.iter().filter_map(move |row| Some((row.step, row.get(metric)?)))
    }

    /// What the run came to.
    #[must_use]
    pub fn summary(&self) -> RunSummary {
        let finite = |metric| self.values(metric).map(|(_, v)| v).filter(|v| v.is_finite());
        let median = |metric| median(finite(metric).collect());
        let logged = |metric| self.values(metric).next().is_some();
        let sum = |metric| logged(metric).then(|| finite(metric).sum::<f64>());
        let lowest = |points: &mut dyn Iterator<Item = (u64, f64)>| {
            points.filter(|(_, v)| v.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1))
        };
        let min_loss = lowest(&mut self.values(Metric::Loss));
        let min_eval = lowest(&mut self.evals.iter().map(|e| (e.step, e.loss)));
        let step_seconds = sum(Metric::Seconds);
        let data_wait_seconds = sum(Metric::DataWaitSeconds);
        let wall_seconds = match (self.steps.first(), self.steps.last()) {
            (Some(first), Some(last)) => first
                .wall_time
                .zip(last.wall_time)
                .map(|(from, to)| to - from + first.get(Metric::Seconds).filter(|s| s.is_finite()).unwrap_or(0.0)),
            _ => None,
        };
        RunSummary {
            run: self.name.clone(),
            path: self.path.clone(),
            steps: self.steps.len() as u64,
            first_step: self.steps.first().map(|r| r.step),
            last_step: self.steps.last().map(|r| r.step),
            final_loss: self.values(Metric::Loss).last().map(|(_, v)| v),
            min_loss: min_loss.map(|(_, v)| v),
            min_loss_step: min_loss.map(|(s, _)| s),
            final_eval_loss: self.evals.last().map(|e| e.loss),
            min_eval_loss: min_eval.map(|(_, v)| v),
            min_eval_loss_step: min_eval.map(|(s, _)| s),
            median_step_seconds: median(Metric::Seconds),
            median_tokens_per_second_per_device: median(Metric::TokensPerSecond),
            median_tflops_per_second_per_device: median(Metric::TflopsPerSecond),
            median_mfu: median(Metric::Mfu),
            peak_memory_bytes: finite(Metric::MemoryBytes).max_by(f64::total_cmp).map(|b| b as u64),
            step_seconds,
            eval_seconds: self.evals.iter().filter_map(|e| e.seconds).reduce(|a, b| a + b),
            wall_seconds,
            data_wait_seconds,
            data_wait_share: data_wait_seconds.zip(step_seconds).filter(|(_, s)| *s > 0.0).map(|(w, s)| w / s),
            skipped_steps: self.values(Metric::Skipped).filter(|(_, v)| *v == 1.0).count() as u64,
            non_finite_losses: self.values(Metric::Loss).filter(|(_, v)| !v.is_finite()).count() as u64,
            repeated_steps: self.repeated_steps,
        }
    }
}

/// What a run came to. What was never logged is none.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunSummary {
    /// Name of the run.
    pub run: String,
    /// Its file.
    pub path: PathBuf,
    /// Training steps.
    pub steps: u64,
    /// The first of them.
    pub first_step: Option<u64>,
    /// The last of them.
    pub last_step: Option<u64>,
    /// Loss of the last step; not a number where it was none.
    pub final_loss: Option<f64>,
    /// Lowest loss of a step.
    pub min_loss: Option<f64>,
    /// The step of the lowest loss.
    pub min_loss_step: Option<u64>,
    /// Loss of the last evaluation.
    pub final_eval_loss: Option<f64>,
    /// Lowest loss of an evaluation.
    pub min_eval_loss: Option<f64>,
    /// The step of that evaluation.
    pub min_eval_loss_step: Option<u64>,
    /// Wall time of a step: the median, which the first steps with their compilation do not move.
    pub median_step_seconds: Option<f64>,
    /// The median over steps.
    pub median_tokens_per_second_per_device: Option<f64>,
    /// The median over steps.
    pub median_tflops_per_second_per_device: Option<f64>,
    /// The median over steps, from 0 to 1.
    pub median_mfu: Option<f64>,
    /// The most that any step reports.
    pub peak_memory_bytes: Option<u64>,
    /// Sum over steps.
    pub step_seconds: Option<f64>,
    /// Sum over evaluations.
    pub eval_seconds: Option<f64>,
    /// From the beginning of the first step to the end of the last, pauses included.
    pub wall_seconds: Option<f64>,
    /// Time for which steps waited for data, in sum.
    pub data_wait_seconds: Option<f64>,
    /// Its part of the steps' time, from 0 to 1.
    pub data_wait_share: Option<f64>,
    /// Steps whose update was left out.
    pub skipped_steps: u64,
    /// Steps whose loss was not a finite number.
    pub non_finite_losses: u64,
    /// Steps that were logged again later and no longer count.
    pub repeated_steps: u64,
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some(f64::midpoint(values[n / 2 - 1], values[n / 2])),
    }
}

#[cfg(test)]
mod tests {
    use super::super::step::tests::sample;
    use super::super::{EvalMetrics, MetricsOptions, MetricsWriter};
    use super::*;

    fn of(text: &[u8]) -> Result<History> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn what_the_writer_writes() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::open(dir.path(), "first", &MetricsOptions::default()).unwrap();
        for step in 0..5 {
            let mut m = sample(step);
            m.seconds = if step == 0 { 20.0 } else { 0.5 };
            m.loss = [5.0, f64::NAN, 3.0, f64::INFINITY, 4.0][step as usize];
            m.data_wait_seconds = 0.1;
            m.skipped = step == 3;
            m.memory_bytes = Some(100 - step);
            writer.log_step(&m).unwrap();
        }
        let mut eval = EvalMetrics::begin(4);
        eval.add(20.0, 10.0, 0.0, 0.25);
        writer.log_eval(&eval).unwrap();
        let history = read(dir.path()).unwrap();
        assert_eq!((history.runs.len(), history.damaged_lines), (1, 0));
        let s = history.runs[0].summary();
        assert_eq!((s.run.as_str(), s.steps, s.first_step, s.last_step), ("first", 5, Some(0), Some(4)));
        assert_eq!((s.final_loss, s.min_loss, s.min_loss_step), (Some(4.0), Some(3.0), Some(2)));
        assert_eq!((s.non_finite_losses, s.skipped_steps, s.repeated_steps), (2, 1, 0));
        assert!(history.runs[0].values(Metric::Loss).any(|(step, v)| step == 3 && v == f64::INFINITY));
        assert_eq!((s.median_step_seconds, s.step_seconds, s.eval_seconds), (Some(0.5), Some(22.0), Some(0.25)));
        assert!((s.data_wait_share.unwrap() - 0.5 / 22.0).abs() < 1e-12);
        assert!((s.final_eval_loss.unwrap() - 2.0).abs() < 1e-8 && s.min_eval_loss_step == Some(4));
        assert_eq!(s.peak_memory_bytes, Some(100));
        assert!(s.wall_seconds.unwrap() >= 20.0);
    }

    #[test]
    fn a_file_of_maxtext() {
        let history = of(br#"{"learning/loss": 8.9, "perf/step_time_seconds": 1.5, "step": 0.0, "run_name": "mt"}
{"learning/loss": NaN, "perf/step_time_seconds": 0.5, "step": 1.0, "run_name": "mt"}
{"eval/avg_loss": 7.5, "eval/step_time_seconds": 0.1, "step": 0.0, "run_name": "mt"}
{"eval/avg_loss": 7.0, "eval/total_weights": 256.0, "step": 1.0, "run_name": "mt"}
"#)
        .unwrap();
        let s = history.runs[0].summary();
        assert_eq!((s.steps, s.final_eval_loss, s.median_step_seconds), (2, Some(7.0), Some(1.0)));
        assert_eq!((s.non_finite_losses, s.median_mfu, s.data_wait_share), (1, None, None));
        assert_eq!(history.runs[0].evals.len(), 1);
    }

    #[test]
    fn a_log() {
        let text = format!("starting\n{}\nW1124 something else\n{}\n", sample(0).line(), sample(1).line());
        let history = of(text.as_bytes()).unwrap();
        assert_eq!((history.runs[0].steps.len(), history.damaged_lines), (2, 0));
        assert_eq!(history.runs[0].summary().final_loss, Some(8.917));
    }

    #[test]
    fn damage_is_named_and_passed_over() {
        let history = of(b"{\"step\": 0, \"learning/loss\": 1}\n\n{\"step\": 1, \"lear\n[1]\n{\"learning/loss\": 1}\n\
            {\"step\": 0.5}\n{\"step\": 2, \"learning/loss\": \"x\"}\n\xff\xfe\n{\"step\": 3, \"learning/loss\": 2}\n{\"st")
            .unwrap();
        assert_eq!(history.runs[0].steps.len(), 2);
        let lines: Vec<_> = history.damaged.iter().map(|d| d.line).collect();
        assert_eq!(lines, [3, 4, 5, 6, 7, 8, 10]);
        assert!(history.damaged[2].reason.contains("no `step`"));
        assert!(history.damaged[4].reason.contains("`learning/loss` is \"x\""));
        assert!(history.damaged[6].reason.contains("never finished"));
        assert_eq!(history.damaged_lines, 7);
    }

    #[test]
    fn the_last_run_of_a_step_counts_and_runs_are_told_apart() {
        let line = |run: &str, step: u64, loss: u64| {
            format!("{{\"step\":{step},\"run_name\":\"{run}\",\"learning/loss\":{loss}}}\n")
        };
        let text: String = [("a", 0, 9), ("a", 1, 8), ("b", 0, 7), ("a", 2, 6), ("a", 1, 5), ("a", 2, 4)]
            .map(|(r, s, l)| line(r, s, l))
            .concat();
        let history = of(text.as_bytes()).unwrap();
        let names: Vec<_> = history.runs.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        let losses: Vec<_> = history.runs[0].values(Metric::Loss).collect();
        assert_eq!(losses, [(0, 9.0), (1, 5.0), (2, 4.0)]);
        assert_eq!(history.runs[0].repeated_steps, 2);
    }

    proptest::proptest! {
        /// Foreign bytes are an error or a history, never a panic: whole lines, pieces of them, and pieces turned over.
        #[test]
        fn any_bytes(pieces in proptest::collection::vec((0..LINES.len(), 0..120usize, proptest::bits::u8::ANY), 0..12)) {
            let mut text = Vec::new();
            for (line, length, flip) in pieces {
                let line = LINES[line].as_bytes();
                text.extend(line.iter().take(length));
                if let Some(last) = text.last_mut().filter(|_| flip < 64) {
                    *last ^= flip;
                }
                if length > line.len() {
                    text.push(b'\n');
                }
            }
            if let Ok(history) = of(&text) {
                for run in &history.runs {
                    let steps: Vec<u64> = run.steps.iter().map(|r| r.step).collect();
                    proptest::prop_assert!(steps.is_sorted_by(|a, b| a < b));
                    serde_json::to_string(&run.summary()).unwrap();
                }
            }
        }
    }

    const LINES: &[&str] = &[
        r#"{"step":0,"run_name":"a","wall_time":1.0,"learning/loss":2.5,"perf/step_time_seconds":0.5}"#,
        r#"{"step":1,"learning/loss":null,"non_finite":{"learning/loss":"Infinity"},"perf/memory_bytes":1e300}"#,
        r#"{"step":5.0, "learning/loss": NaN, "perf/step_time_seconds": -1e308}"#,
        r#"{"step":3,"eval/avg_loss":1e308,"perf/eval_seconds":1e308}"#,
        r#"{"step":9007199254740993,"learning/loss":[],"non_finite":7}"#,
    ];

    #[test]
    fn nothing_to_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read(dir.path()), Err(MetricsError::NoMetrics { .. })));
        assert!(matches!(read(&dir.path().join("none")), Err(MetricsError::Io(_))));
        assert!(matches!(of(b"hello\nworld\n"), Err(MetricsError::NoMetrics { .. })));
        assert!(matches!(of(b""), Err(MetricsError::NoMetrics { .. })));
    }
}
