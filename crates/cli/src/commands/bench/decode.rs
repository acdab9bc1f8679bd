//! `lapidary bench decode` and `lapidary bench prefill`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::decode::{DecodeOptions, Decoder, Quantization};
use engine::generate::LanguageModel;
use engine::kernels::{Bandwidth, Spent, spent};
use serde_json::json;
use tensor::DType;

use super::median_and_min;
use crate::commands::{ArchArgs, CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, seconds};

/// What both have in common.
#[derive(Debug, clap::Args)]
struct Common {
    /// The model: a Hugging Face directory or a MaxText checkpoint.
    model: PathBuf,
    /// Activations and cache: bfloat16 or float32.
    #[arg(long, default_value = "bfloat16")]
    dtype: DType,
    /// Sequences side by side.
    #[arg(long, default_value_t = 1)]
    sequences: usize,
    /// Timed runs, after one that is not counted.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Weights of products with few rows: int8 or int4 instead of as stored.
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<Quantization>,
    /// Print the figures as JSON on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Time decode steps, one token of every sequence each.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  lapidary bench decode ./gemma-4-E2B-it --tokens 32")]
pub(super) struct DecodeArgs {
    #[command(flatten)]
    common: Common,
    /// Steps of a run.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// Tokens of the prompt before them.
    #[arg(long, default_value_t = 16)]
    prompt: usize,
}

/// Time prompts up to the logits of their last token.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  lapidary bench prefill ./gemma-4-E2B-it --tokens 128,512")]
pub(super) struct PrefillArgs {
    #[command(flatten)]
    common: Common,
    /// Lengths of the prompts.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "512")]
    tokens: Vec<usize>,
}

impl Common {
    fn options(&self, context: usize) -> DecodeOptions {
        DecodeOptions {
            sequences: self.sequences,
            context,
            dtype: self.dtype,
            quantize: self.quantize,
            ..DecodeOptions::default()
        }
    }
}

/// Ids that are neither all alike nor in order.
fn ids(n: usize, vocab: usize) -> Vec<i32> {
    (0..n).map(|i| i32::try_from((i * 7919 + i * i) % vocab.max(1)).unwrap_or(0)).collect()
}

/// A timed run.
#[derive(Debug)]
struct Run {
    /// Seconds of a step.
    step: f64,
    /// What the products of all its steps took.
    products: Spent,
    /// Bytes a second, read before and after.
    bandwidth: f64,
}

fn median(runs: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    let mut all: Vec<f64> = runs.iter().map(of).collect();
    all.sort_unstable_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

fn least(runs: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    runs.iter().map(of).fold(f64::INFINITY, f64::min)
}

pub(super) fn decode(ui: &Ui, args: &DecodeArgs) -> CommandResult {
    let common = &args.common;
    if args.tokens == 0 || args.prompt == 0 || common.repeat == 0 || common.sequences == 0 {
        return Err(Failure::usage("--tokens, --prompt, --repeat and --sequences must be at least 1"));
    }
    let model = Arc::new(common.arch.open_to_decode(ui, &common.model)?);
    let runtime = common.engine.start(ui)?;
    let (vocab, quantize) = (model.arch().vocab_size(), model.quantization(common.quantize)?);
    let mut decoder = Decoder::new(&runtime, model, common.options(args.prompt + args.tokens))?;
    let compile = decoder.prepare(args.prompt)?;
    let prompt = ids(args.prompt, vocab);
    let reading = Bandwidth::new()?;
    let mut runs = Vec::new();
    for run in 0..=common.repeat {
        decoder.reset();
        decoder.feed(&vec![prompt.as_slice(); common.sequences])?;
        let next = ids(args.tokens + 1, vocab);
        // Speed of memory changes on a machine that is shared: what a run is compared with is measured around it.
        let before = reading.measure(3);
        let (start, products) = (Instant::now(), spent());
        for token in next.chunks(1).take(args.tokens) {
            decoder.feed(&vec![token; common.sequences])?;
        }
        let (time, products) = (start.elapsed(), spent().since(products));
        if run > 0 {
            let bandwidth = (before + reading.measure(3)) / 2.0;
            runs.push(Run { step: time.as_secs_f64() / args.tokens as f64, products, bandwidth });
        }
    }
    let bytes = decoder.bytes_per_step() as f64;
    let (step, least) = (median(&runs, |r| r.step), least(&runs, |r| r.step));
    let bandwidth = median(&runs, |r| r.bandwidth);
    let share = median(&runs, |r| bytes / r.step / r.bandwidth);
    let within = median(&runs, |r| r.products.time.as_secs_f64() / args.tokens as f64);
    let calls = runs.first().map_or(0, |r| r.products.calls) / args.tokens as u64;
    let products = median(&runs, |r| r.products.bytes as f64 / r.products.time.as_secs_f64() / r.bandwidth);
    let rate = common.sequences as f64 / step;
    if common.json {
        ui.json(&json!({
            "model": common.model, "dtype": common.dtype.name(), "sequences": common.sequences,
            "quantize": quantize.map(Quantization::name),
            "median_seconds": step, "min_seconds": least, "tokens_per_second": rate, "bytes_per_step": bytes,
            "bytes_per_second": bytes / step, "read_bandwidth": bandwidth, "share_of_bandwidth": share,
            "products": { "calls": calls, "median_seconds": within, "share_of_bandwidth": products },
            "compile_seconds": compile.as_secs_f64(),
        }))?;
    } else {
        ui.data(format!(
            "step: median {:.1} ms, min {:.1} ms, {rate:.2} tokens/s ({} to prepare)",
            step * 1e3,
            least * 1e3,
            seconds(compile)
        ));
        ui.data(format!(
            "{:.2} GB of weights at {:.1} GB/s, {:.1} % of {:.1} GB/s at which memory was read around each run",
            bytes / 1e9,
            bytes / step / 1e9,
            100.0 * share,
            bandwidth / 1e9
        ));
        if calls > 0 {
            ui.data(format!(
                "{calls} calls of products: {:.1} ms of a step, at {:.1} % of that speed",
                within * 1e3,
                100.0 * products
            ));
        }
    }
    Ok(Outcome::Yes)
}

pub(super) fn prefill(ui: &Ui, args: &PrefillArgs) -> CommandResult {
    let common = &args.common;
    if args.tokens.contains(&0) || args.tokens.is_empty() || common.repeat == 0 || common.sequences == 0 {
        return Err(Failure::usage("--tokens, --repeat and --sequences must be at least 1"));
    }
    let model = Arc::new(common.arch.open_to_decode(ui, &common.model)?);
    let runtime = common.engine.start(ui)?;
    let vocab = model.arch().vocab_size();
    let longest = args.tokens.iter().copied().max().unwrap_or(1);
    let mut decoder = Decoder::new(&runtime, model, common.options(longest))?;
    let mut rows = Vec::new();
    for &n in &args.tokens {
        let compile = decoder.prepare(n)?;
        let prompt = ids(n, vocab);
        let mut times: Vec<Duration> = Vec::new();
        for run in 0..=common.repeat {
            decoder.reset();
            let start = Instant::now();
            decoder.feed(&vec![prompt.as_slice(); common.sequences])?;
            if run > 0 {
                times.push(start.elapsed());
            }
        }
        let (median, min) = median_and_min(times);
        let rate = (n * common.sequences) as f64 / median;
        if !common.json {
            ui.data(format!(
                "{n} tokens: median {median:.3} s, min {min:.3} s, {rate:.1} tokens/s ({} to prepare)",
                seconds(compile)
            ));
        }
        rows.push(json!({
            "tokens": n, "median_seconds": median, "min_seconds": min, "tokens_per_second": rate,
            "compile_seconds": compile.as_secs_f64(),
        }));
    }
    if common.json {
        let (dtype, sequences) = (common.dtype.name(), common.sequences);
        ui.json(&json!({ "model": common.model, "dtype": dtype, "sequences": sequences, "prefill": rows }))?;
    }
    Ok(Outcome::Yes)
}
