//! `lapidary init`.

use std::path::PathBuf;
use std::time::Instant;

use engine::init::{InitOptions, data_bytes, write_random};
use engine::quantized::without_note;
use gemma4::Arch;
use gemma4::hf::HfModel;
use serde_json::json;
use tensor::DType;

use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// Write a checkpoint with random weights of any shape, as a Hugging Face directory.
///
/// The weights depend on the seed and their names alone: the same command writes the same bytes. Memory stays bounded at
/// any size.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Directory to write.
    target: PathBuf,
    /// Shape: a configuration file and `key=value` words with MaxText's names, such as model_name=gemma4-e2b.
    #[arg(value_name = "CONFIG.yml|KEY=VALUE")]
    words: Vec<String>,
    /// Take the shape from this config.json instead.
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    config: Option<PathBuf>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// bfloat16 or float32.
    #[arg(long, default_value = "bfloat16")]
    dtype: DType,
    /// Names and configuration of Gemma4ForCausalLM instead of Gemma4ForConditionalGeneration.
    #[arg(long)]
    causal: bool,
    /// Largest weights file, in MB.
    #[arg(long, value_name = "MB")]
    shard_mb: Option<u64>,
    /// Draw norms and layer scalars around 1 instead of setting them to it, so that a model which drops one shows.
    #[arg(long)]
    vary_norms: bool,
    /// Replace what is there.
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary init ./tiny model_name=tiny-e2b
  lapidary init ./e2b-random model_name=gemma4-e2b --shard-mb 2000
  lapidary init ./like-that --config ./fine-tuned/config.json --dtype float32";

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let arch = match &args.config {
        Some(path) => {
            let text = fs_err::read_to_string(path)?;
            let value = serde_json::from_str(&text).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            HfModel::from_config(&without_note(&value))
                .map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?
                .arch
        }
        None => arch_of(&args.words)?,
    };
    let options = InitOptions {
        seed: args.seed,
        dtype: args.dtype,
        conditional: !args.causal,
        max_shard_bytes: args.shard_mb.map(|mb| mb.max(1).saturating_mul(1_000_000)),
        force: args.force,
        vary_norms: args.vary_norms,
    };
    if !matches!(args.dtype, DType::BF16 | DType::F32) {
        return Err(Failure::usage(format!("--dtype {}: checkpoints are written in bfloat16 or float32", args.dtype)));
    }
    let total = data_bytes(&arch, args.dtype);
    let start = Instant::now();
    let bar = ui.bytes_bar("writing", total);
    let manifest = write_random(&args.target, &arch, &options, |done| bar.set_position(done));
    bar.finish_and_clear();
    let manifest = manifest?;
    ui.say(format!(
        "{}: {} in {} files, {}",
        args.target.display(),
        bytes(total),
        manifest.files.len(),
        seconds(start.elapsed())
    ));
    if args.json {
        ui.json(&json!({ "path": args.target, "bytes": total, "files": manifest.files }))?;
    }
    Ok(Outcome::Yes)
}

/// The architecture of configuration words.
pub(crate) fn arch_of(words: &[String]) -> Result<Arch, Failure> {
    let sources = config::Sources::from_args(words.iter().cloned()).with_process_environment();
    let resolved = sources.resolve().map_err(Failure::usage)?;
    Arch::from_config(&resolved).map_err(Failure::usage)
}
