//! `lapidary convert`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use checkpoint::copy::{CopyOptions, Progress};
use checkpoint::orbax::OrbaxOptions;
use engine::EngineError;
use engine::convert::config::describe;
use engine::convert::{Checkpoint, Convention, Hints, Origin, Profile, Report, Settings, Weights, plan};
use serde_json::json;
use tensor::DType;

use super::init::arch_of;
use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// Convert a checkpoint between Hugging Face and MaxText, either way, bit for bit.
///
/// The source is detected: a Hugging Face directory in any spelling, or an Orbax checkpoint (.../0/items, a step or a
/// run). Tensors are streamed in bounded memory; the target appears complete or not at all. From Hugging Face to MaxText
/// and back, every tensor is the same bit for bit.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The checkpoint to read.
    source: PathBuf,
    /// The directory to write. For MaxText, weights go to DST/0/items.
    target: PathBuf,
    /// The format to write. A source of the same format is written anew: other shards, types, layout.
    #[arg(long, value_enum)]
    to: Format,
    /// The architecture of a MaxText checkpoint that does not tell it, in MaxText's keys: model_name=gemma4-e2b ...
    #[arg(value_name = "KEY=VALUE")]
    words: Vec<String>,
    /// The architecture, from this config.json.
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    config: Option<PathBuf>,
    /// A Hugging Face directory of the same architecture: tokenizer and templates are carried over from it, and with
    /// --profile official all tensors that are no parameter of the text model.
    #[arg(long, value_name = "HF_DIR")]
    base: Option<PathBuf>,
    /// Element type of all parameters [default: as they are].
    #[arg(long, value_parser = float)]
    dtype: Option<DType>,
    /// Replace a checkpoint that lies at the target.
    #[arg(long)]
    force: bool,
    /// Continue what an interrupted run of the same command left; keep what is done if this one fails.
    #[arg(long)]
    resume: bool,
    /// Worker threads [default: one per processor].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
    // Last, because their headings hold for everything that follows.
    #[command(flatten)]
    hf: HfArgs,
    #[command(flatten)]
    maxtext: MaxtextArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "To Hugging Face")]
struct HfArgs {
    /// What the directory holds [default: lean].
    #[arg(long, value_enum)]
    profile: Option<ProfileArg>,
    /// Largest weights file, in MB [default: one file].
    #[arg(long, value_name = "MB")]
    shard_mb: Option<u64>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "To MaxText")]
struct MaxtextArgs {
    /// Element type of the scaled token table [default: one from which every bit comes back].
    #[arg(long, value_name = "DTYPE", value_parser = float)]
    embedding_dtype: Option<DType>,
    /// The layout that Pathways reads: plain files, zarr version 2, compressed.
    #[arg(long)]
    pathways: bool,
    /// Compress chunks with zstd; a level may be given.
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "1", require_equals = true,
          value_parser = clap::value_parser!(i32).range(1..=22))]
    zstd: Option<i32>,
    /// Refer to the source's files instead of copying them (hard links where the file system allows it); only the token
    /// table is written. Ready in a moment; no checksum covers what is linked, and loading pays for the transposes.
    #[arg(long, conflicts_with = "pathways")]
    link: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A Hugging Face directory.
    Hf,
    /// An Orbax checkpoint as MaxText reads it.
    Maxtext,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ProfileArg {
    /// The text model alone, in the class of its config.json.
    Lean,
    /// The text model alone, as Gemma4ForCausalLM.
    Causal,
    /// Everything that --base holds, with the text model replaced.
    Official,
}

const EXAMPLES: &str = "\
Examples:
  lapidary convert ./gemma-4-E2B-it ./maxtext --to maxtext
  lapidary convert ./maxtext ./back --to hf
  lapidary convert ./run/checkpoints/900 ./tuned --to hf --profile official --base ./gemma-4-E2B-it
  lapidary convert ./foreign/0/items ./hf --to hf model_name=gemma4-e4b --dtype bfloat16 --shard-mb 5000

Give DST/0/items to MaxText as load_parameters_path. `lapidary diff SRC DST` compares the two.
Exit code 0: written. 1: failed while running; DST is as it was. 2: bad usage.";

pub(super) fn float(s: &str) -> Result<DType, String> {
    match s.parse::<DType>() {
        Ok(d) if d.is_float() => Ok(d),
        _ => Err("use bfloat16, float32, float16 or float64".into()),
    }
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let settings = settings(args)?;
    let arch = if args.words.is_empty() { None } else { Some(arch_of(&args.words)?) };
    let base = args.base.as_deref().map(|p| Weights::open(p, &Hints::default())).transpose()?;
    let hints = Hints { config: args.config.as_deref(), arch, base: base.as_ref(), ..Hints::default() };
    let source = open(ui, &args.source, &hints)?;
    let plan = plan(&source, base.as_ref(), &args.target, &settings).map_err(|e| match e {
        EngineError::Input(message) => Failure::usage(message),
        other => other.into(),
    })?;
    for note in &plan.notes {
        ui.say(format!("  note: {note}"));
    }
    let options = CopyOptions {
        threads: args.threads,
        resume: args.resume,
        keep_partial: args.resume,
        force: args.force,
        ..CopyOptions::default()
    };
    let start = Instant::now();
    let bar = ui.bytes_bar("converting", plan.bytes());
    let result = plan.run(&options, &|p: Progress| {
        bar.set_length(p.total);
        bar.set_position(p.done);
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    let report = result.map_err(|e| advise(e, args))?;
    let elapsed = start.elapsed();
    let linked = report.orbax.as_ref().map_or(0, |o| o.linked_bytes);
    let written = report.bytes.saturating_sub(report.resumed_bytes).saturating_sub(linked);
    let rate = written as f64 / elapsed.as_secs_f64().max(1e-9);
    let mut apart = String::new();
    if report.resumed_bytes > 0 {
        apart += &format!(", {} were there", bytes(report.resumed_bytes));
    }
    if linked > 0 {
        apart += &format!(", {} stay in the source's files", bytes(linked));
    }
    ui.say(format!(
        "{}: {} {}, {}{apart}, {}, {}/s",
        report.path.display(),
        report.tensors,
        if settings.to == Convention::Hf { "tensors" } else { "arrays" },
        bytes(report.bytes),
        seconds(elapsed),
        bytes(rate as u64)
    ));
    if args.json {
        ui.json(&summary(args, &source, &plan.notes, &report, written, elapsed.as_secs_f64()))?;
    }
    Ok(Outcome::Yes)
}

fn settings(args: &Args) -> Result<Settings, Failure> {
    let foreign = |flags: &[(&str, bool)], format: &str| {
        let given: Vec<&str> = flags.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if given.is_empty() {
            return Ok(());
        }
        Err(Failure::usage(format!("{}: only with --to {format}", given.join(", "))))
    };
    let (hf, mt) = (&args.hf, &args.maxtext);
    match args.to {
        Format::Hf => foreign(
            &[
                ("--embedding-dtype", mt.embedding_dtype.is_some()),
                ("--pathways", mt.pathways),
                ("--zstd", mt.zstd.is_some()),
                ("--link", mt.link),
            ],
            "maxtext",
        )?,
        Format::Maxtext => {
            foreign(&[("--profile", hf.profile.is_some()), ("--shard-mb", hf.shard_mb.is_some())], "hf")?;
        }
    }
    if hf.shard_mb == Some(0) {
        return Err(Failure::usage("--shard-mb must be at least 1"));
    }
    let mut orbax = if mt.pathways { OrbaxOptions::pathways() } else { OrbaxOptions::default() };
    orbax.zstd = mt.zstd.or(orbax.zstd);
    // The same moment gives the same bytes.
    if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH") {
        let seconds: u64 =
            epoch.parse().map_err(|_| Failure::usage(format!("SOURCE_DATE_EPOCH={epoch}: not a number of seconds")))?;
        orbax.time = Some(seconds.saturating_mul(1_000_000_000));
    }
    Ok(Settings {
        to: if args.to == Format::Hf { Convention::Hf } else { Convention::Maxtext },
        dtype: args.dtype,
        embedding_dtype: mt.embedding_dtype,
        profile: match hf.profile {
            None | Some(ProfileArg::Lean) => Profile::Lean,
            Some(ProfileArg::Causal) => Profile::Causal,
            Some(ProfileArg::Official) => Profile::Official,
        },
        max_shard_bytes: hf.shard_mb.map(|mb| mb.saturating_mul(1_000_000)),
        orbax,
        link: mt.link,
    })
}

/// Opens a checkpoint as a model and says what was found.
pub(super) fn open(ui: &Ui, path: &Path, hints: &Hints<'_>) -> Result<Weights, Failure> {
    let source = Weights::open(path, hints).map_err(no_architecture)?;
    say_found(ui, path, &source);
    Ok(source)
}

/// Says what was found in a checkpoint.
pub(super) fn say_found(ui: &Ui, path: &Path, source: &Weights) {
    ui.say(format!("{}: {}, {}", path.display(), format_line(source), bytes(source.bytes())));
    ui.say(format!("  {}", describe(&source.arch)));
    if let Some(report) = &source.report {
        for (label, count) in &report.unused_expected {
            ui.say(format!("  not used, as expected: {} tensors ({}), {label}", count.tensors, bytes(count.bytes)));
        }
        for (name, size) in &report.unused_unexpected {
            ui.say(format!("  not used, unexpected: {name} ({})", bytes(*size)));
        }
    }
    if let Checkpoint::Orbax(c) = &source.checkpoint {
        for p in c.problems() {
            let array = p.array.as_ref().map_or(String::new(), |a| format!("{a}: "));
            ui.say(format!("  note: {array}{}", p.message));
        }
    }
    for note in &source.notes {
        ui.say(format!("  note: {note}"));
    }
}

/// An architecture that nothing tells is a matter of usage.
pub(super) fn no_architecture(e: EngineError) -> Failure {
    match e {
        EngineError::NoArchitecture { .. } => Failure::usage(e)
            .hint("give --config config.json of the model, or --base with a Hugging Face directory of the same shape")
            .hint("or MaxText's keys, such as model_name=gemma4-e2b"),
        other => other.into(),
    }
}

pub(super) fn format_line(source: &Weights) -> String {
    let tensors = source.params.len();
    match &source.checkpoint {
        Checkpoint::Hf(_) => {
            let prefix = source.report.as_ref().map_or("", |r| r.prefix.as_str());
            let form = match source.stored {
                Some(stored) => format!("{} (quantized from {})", stored.format.name(), stored.dtype),
                None => source.main_dtype().to_string(),
            };
            format!("Hugging Face, {tensors} parameters in {form}, prefix `{prefix}`")
        }
        Checkpoint::Orbax(c) => {
            let told = match source.origin {
                Origin::Provenance | Origin::Config => "as noted in it",
                Origin::Given => "as given",
            };
            format!("MaxText ({}), {tensors} parameters in {}, architecture {told}", c.container(), source.main_dtype())
        }
    }
}

fn advise(e: EngineError, args: &Args) -> Failure {
    let text = e.to_string();
    let failure = Failure::from(e);
    if text.contains("exists already") {
        return failure.hint("--force replaces a checkpoint");
    }
    if text.contains("cancelled") || args.resume {
        return failure.hint("run the same command again to continue");
    }
    failure
}

fn summary(
    args: &Args,
    source: &Weights,
    notes: &[String],
    report: &Report,
    written: u64,
    time: f64,
) -> serde_json::Value {
    json!({
        "source": args.source,
        "source_format": source.checkpoint.convention(),
        "path": report.path,
        "tensors": report.tensors,
        "bytes": report.bytes,
        "resumed_bytes": report.resumed_bytes,
        "seconds": time,
        "bytes_per_second": written as f64 / time.max(1e-9),
        "notes": source.notes.iter().chain(notes).collect::<Vec<_>>(),
        "hf": report.hf,
        "orbax": report.orbax,
    })
}
