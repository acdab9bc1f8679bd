//! `lapidary bench forward`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::Session;
use engine::verify::probe_batches;
use gemma4::Flops;
use gemma4::forward::Trace;
use serde_json::json;
use tensor::DType;

use super::median_and_min;
use crate::commands::verify::place;
use crate::commands::{ArchArgs, CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, seconds};

/// Time a model's forward pass on this machine, all logits included, compilation excluded.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  lapidary bench forward ./gemma-4-E2B-it --tokens 128,512 --dtype bfloat16")]
pub(super) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint.
    model: PathBuf,
    /// Sequence lengths.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "128,512")]
    tokens: Vec<usize>,
    /// Activations: bfloat16 or float32.
    #[arg(long, default_value = "bfloat16")]
    dtype: DType,
    /// Timed runs of each length, after one that is not counted.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Only the logits of the last position.
    #[arg(long)]
    last: bool,
    /// Print the figures as JSON on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn run(ui: &Ui, args: &Args) -> CommandResult {
    if args.tokens.contains(&0) || args.repeat == 0 {
        return Err(Failure::usage("--tokens and --repeat must be at least 1"));
    }
    let model = Arc::new(args.arch.open(ui, &args.model, None)?);
    let runtime = args.engine.start(ui)?;
    let session = place(ui, &runtime, &model, args.dtype)?;
    let mut rows = Vec::new();
    for &n in &args.tokens {
        let (compile, times) = measure(&session, n, args)?;
        let (median, min) = median_and_min(times);
        let mut flops = Flops::forward(session.model().arch(), 1.0, n).total;
        if args.last {
            let arch = session.model().arch();
            flops -= 2.0 * (n as f64 - 1.0) * arch.hidden_size() as f64 * arch.vocab_size() as f64;
        }
        if !args.json {
            ui.data(format!(
                "{n} tokens: median {median:.3} s, min {min:.3} s, {:.1} tokens/s, {:.0} GFLOP/s ({} to compile)",
                n as f64 / median,
                flops / median / 1e9,
                seconds(compile)
            ));
        }
        rows.push(json!({
            "tokens": n, "median_seconds": median, "min_seconds": min, "tokens_per_second": n as f64 / median,
            "flops": flops, "flops_per_second": flops / median, "compile_seconds": compile.as_secs_f64(),
        }));
    }
    if args.json {
        ui.json(&json!({ "model": args.model, "dtype": args.dtype.name(), "last_only": args.last, "forward": rows }))?;
    }
    Ok(Outcome::Yes)
}

/// Compile time, and the time of every counted run.
fn measure(session: &Session<'_>, n: usize, args: &Args) -> Result<(Duration, Vec<Duration>), Failure> {
    let batches = probe_batches(session, &[n]);
    let (_, batch) = &batches[0];
    let wanted: Vec<usize> = if args.last { vec![n - 1] } else { (0..n).collect() };
    let before = session.compile_times().total;
    let mut times = Vec::with_capacity(args.repeat);
    for run in 0..=args.repeat {
        let start = Instant::now();
        let hidden = session.forward(batch, Trace::None)?;
        session.logits(&hidden.last, &wanted, |_, _| Ok(()))?;
        if run > 0 {
            times.push(start.elapsed());
        }
    }
    Ok((session.compile_times().total - before, times))
}
