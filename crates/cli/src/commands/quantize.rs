//! `lapidary quantize`.

use std::path::PathBuf;
use std::time::Instant;

use engine::convert::{QuantizeOptions, plan_quantized};
use engine::decode::Quantization;
use serde_json::json;

use super::{ArchArgs, CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// Write a model with weights of 8.25 or 4.5 bits, for decoding on a CPU.
///
/// The directory holds the matrices as `generate --quantize` makes them while a model is opened, and gives the same tokens; it
/// opens without that work, and takes less room. generate, chat, score and bench use it; everything else needs the model as
/// it was. Memory stays bounded; the directory appears complete or not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint (items, a step or a run).
    source: PathBuf,
    /// The directory to write.
    target: PathBuf,
    /// Bits of a weight: int8 (8.25) or int4 (4.5).
    #[arg(long, value_name = "int8|int4")]
    format: Quantization,
    /// Largest weights file, in MB [default: one file].
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..))]
    shard_mb: Option<u64>,
    /// Replace a checkpoint that lies at the target.
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    arch: ArchArgs,
}

const EXAMPLES: &str = "\
Examples:
  lapidary quantize ./gemma-4-E2B-it ./gemma-4-E2B-it-int8 --format int8
  lapidary generate ./gemma-4-E2B-it-int8 --prompt 'Why is the sky blue?'

Exit code 0: written. 1: failed while running; DST is as it was. 2: bad usage.";

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let model = args.arch.open(ui, &args.source, None)?;
    let options =
        QuantizeOptions { force: args.force, max_shard_bytes: args.shard_mb.map(|mb| mb.saturating_mul(1_000_000)) };
    let plan = plan_quantized(&model, args.format, &options)?;
    for note in &plan.notes {
        ui.say(format!("  note: {note}"));
    }
    let start = Instant::now();
    let bar = ui.bytes_bar("quantizing", plan.bytes());
    let result = plan.run(&args.target, |done| bar.set_position(done));
    bar.finish_and_clear();
    let manifest = result.map_err(|e| {
        let exists = e.to_string().contains("exists already");
        let failure = Failure::from(e);
        if exists { failure.hint("--force replaces a checkpoint") } else { failure }
    })?;
    let elapsed = start.elapsed();
    let (read, written) = (model.weights().bytes(), plan.bytes());
    let rate = read as f64 / elapsed.as_secs_f64().max(1e-9);
    ui.say(format!(
        "{}: {} tensors, {} of {}, {}, {}/s read",
        args.target.display(),
        plan.tensors(),
        bytes(written),
        bytes(read),
        seconds(elapsed),
        bytes(rate as u64)
    ));
    if args.json {
        ui.json(&json!({
            "source": args.source, "path": args.target, "format": args.format.name(), "tensors": plan.tensors(),
            "source_bytes": read, "bytes": written, "seconds": elapsed.as_secs_f64(), "source_bytes_per_second": rate,
            "notes": plan.notes, "files": manifest.files,
        }))?;
    }
    Ok(Outcome::Yes)
}
