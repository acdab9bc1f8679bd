//! `lapidary bench products`.

use std::path::PathBuf;

use engine::decode::{Alike, Quantization, matrices_by_role};
use engine::kernels::{Bandwidth, pool, time_products};
use serde_json::{Value, json};
use tensor::DType;

use crate::commands::{ArchArgs, CommandResult, Failure, Outcome};
use crate::ui::Ui;

/// Time the products of decode steps with a model's own weights, beside the speed of memory.
///
/// Each kind of matrix is timed over all layers that have it, and memory is read before and after: the share is what a
/// product reaches of the speed at which the same threads only read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  lapidary bench products ./gemma-4-E2B-it --quantize int8")]
pub(super) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint.
    model: PathBuf,
    /// Rows of activations.
    #[arg(long, default_value_t = 1)]
    rows: usize,
    /// Timed runs of each, after one that is not counted.
    #[arg(long, default_value_t = 9)]
    repeat: usize,
    /// Weights as int8 or int4 instead of as stored.
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<Quantization>,
    /// Print the figures as JSON on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    arch: ArchArgs,
}

/// Medians of one kind of matrix.
struct Figures {
    bytes: usize,
    speed: f64,
    share: f64,
}

pub(super) fn run(ui: &Ui, args: &Args) -> CommandResult {
    if args.rows == 0 || args.repeat == 0 {
        return Err(Failure::usage("--rows and --repeat must be at least 1"));
    }
    let model = args.arch.open_to_decode(ui, &args.model)?;
    let quantize = model.quantization(args.quantize)?;
    let reading = Bandwidth::new()?;
    let all = matrices_by_role(&model, DType::BF16, args.quantize)?;
    ui.say(format!("{:?}", pool()));
    let (mut rows, mut bytes, mut time) = (Vec::new(), 0, 0.0);
    for alike in &all {
        let Some(first) = alike.matrices.first() else { continue };
        let f = figures(alike, args, &reading)?;
        bytes += f.bytes;
        time += f.bytes as f64 / f.share;
        if !args.json {
            ui.data(format!(
                "{:<36} {:>6} x {:<6} {:>3} of {:<8} {:>7.1} GB/s {:>6.1} %",
                alike.name,
                first.n(),
                first.k(),
                alike.matrices.len(),
                first.format().to_string(),
                f.speed / 1e9,
                100.0 * f.share
            ));
        }
        rows.push(row(alike, &f));
    }
    let share = bytes as f64 / time;
    if args.json {
        ui.json(&json!({
            "model": args.model, "rows": args.rows, "quantize": quantize.map(Quantization::name),
            "products": rows, "bytes": bytes, "share_of_bandwidth": share,
        }))?;
    } else {
        ui.data(format!("all together: {:.2} GB at {:.1} % of the speed of memory", bytes as f64 / 1e9, 100.0 * share));
    }
    Ok(Outcome::Yes)
}

fn figures(alike: &Alike, args: &Args, reading: &Bandwidth) -> Result<Figures, Failure> {
    let bytes: usize = alike.matrices.iter().map(|m| m.bytes().len()).sum();
    let (mut speeds, mut shares) = (Vec::new(), Vec::new());
    for run in 0..=args.repeat {
        let before = reading.measure(1);
        let speed = bytes as f64 / time_products(&alike.matrices, args.rows)?.as_secs_f64();
        if run > 0 {
            speeds.push(speed);
            shares.push(2.0 * speed / (before + reading.measure(1)));
        }
    }
    let median = |mut all: Vec<f64>| {
        all.sort_unstable_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Ok(Figures { bytes, speed: median(speeds), share: median(shares) })
}

fn row(alike: &Alike, f: &Figures) -> Value {
    let first = alike.matrices.first();
    json!({
        "name": alike.name, "shape": first.map(|m| [m.n(), m.k()]), "count": alike.matrices.len(),
        "format": first.map(|m| m.format().to_string()), "bytes": f.bytes, "bytes_per_second": f.speed,
        "share_of_bandwidth": f.share,
    })
}
