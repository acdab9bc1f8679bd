//! Writes the metrics of a made-up run that is killed and resumed, for `scripts/check_tensorboard.py`.
//!
//! `metrics_pattern DIR [STEPS]`: the first part logs three quarters of the steps, the second starts again at half.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::process::ExitCode;

use lapidary_engine::metrics::{EvalMetrics, MetricsError, MetricsOptions, MetricsWriter, StepMetrics};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let steps = args.get(1).map_or(Some(20), |word| word.parse().ok());
    let (Some(dir), Some(steps)) = (args.first(), steps) else {
        eprintln!("usage: metrics_pattern DIR [STEPS]");
        return ExitCode::from(2);
    };
    match write(Path::new(dir), steps) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(dir: &Path, steps: u64) -> Result<(), MetricsError> {
    let options =
        |resume_step| MetricsOptions { metrics_file: Some(dir.join("named.jsonl")), tensorboard: true, resume_step };
    part(dir, &options(None), 0..steps * 3 / 4)?;
    part(dir, &options(Some(steps / 2)), steps / 2..steps)
}

fn part(dir: &Path, options: &MetricsOptions, steps: std::ops::Range<u64>) -> Result<(), MetricsError> {
    let mut writer = MetricsWriter::open(dir, "pattern", options)?;
    writer.text("config", "| key | value |\n|---|---|\n| steps | 20 |")?;
    for step in steps {
        let metrics = sample(step);
        writer.log_step(&metrics)?;
        println!("{}", metrics.line());
        if step % 5 == 4 {
            let mut eval = EvalMetrics::begin(step);
            eval.add(100.0 * metrics.loss, 100.0, 0.0, 0.3);
            writer.log_eval(&eval)?;
            println!("{}", eval.line());
        }
    }
    writer.flush()
}

/// A loss that falls with ripples, one step without a number, a slow first step.
fn sample(step: u64) -> StepMetrics {
    let x = step as f64;
    let loss = if step == 7 { f64::NAN } else { 2.0 + 7.0 / (1.0 + 0.05 * x).sqrt() + 0.3 * (x * 12.9898).sin() };
    StepMetrics {
        step,
        seconds: if step == 0 { 12.5 } else { 0.225 + 0.01 * (x * 78.233).sin() },
        loss,
        lm_loss: loss,
        perplexity: loss.exp(),
        z_loss: 0.0,
        total_weights: 256,
        grad_norm: 1.0,
        raw_grad_norm: 300.0 / (1.0 + x) + 1.0 + 0.5 * (x * 4.1).sin().abs(),
        param_norm: 120.0 + 0.01 * x,
        learning_rate: 3e-5 * (x / 10.0).min(1.0),
        tflops: 0.0155,
        worked_tflops: 0.0155,
        tokens: 256,
        peak_flops: Some(0.25e12),
        memory_bytes: Some(1_400_000_000 + step % 7 * 10_000_000),
        data_wait_seconds: 0.004 + if step % 10 == 9 { 0.05 } else { 0.0 },
        skipped: step == 7,
    }
}
