//! `lapidary quickstart`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use engine::golden::Golden;
use engine::init::{InitOptions, write_random};
use engine::verify::{Tolerances, against_golden};
use engine::{Model, Session};
use gemma4::arch::KvSource;
use gemma4::decoder::Trace;
use tensor::DType;

use super::init::arch_of;
use super::verify::text;
use super::{CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// See the main job on something small, from nothing: engine, checkpoint, proof.
///
/// Fetches the XLA engine if it is not there, writes a tiny random E2B-shaped checkpoint, runs it on XLA and compares its
/// logits and every layer's output with what Hugging Face transformers computed for the same checkpoint.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep the checkpoint and the golden file in this directory [default: a temporary one, removed at the end].
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Print the verdict as JSON on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What transformers 5.23 computed for the checkpoint that `lapidary init model_name=tiny-e2b --seed 20 --vary-norms` writes:
/// made by `scripts/golden_from_hf.py` with --hidden.
const GOLDEN: &[u8] = include_bytes!("../../assets/quickstart_golden.safetensors");
const SEED: u64 = 20;

/// The reference is f32 and the checkpoint the same, so that only rounding remains; mistakes show at 0.01 and above.
const MAX_KL: f64 = 1e-6;

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let start = Instant::now();
    let temporary;
    let dir = match &args.keep {
        Some(dir) => {
            fs_err::create_dir_all(dir)?;
            dir.clone()
        }
        None => {
            temporary = tempfile::Builder::new().prefix("lapidary-quickstart-").tempdir()?;
            temporary.path().to_path_buf()
        }
    };
    let step = |n: usize, title: &str| ui.say(format!("\n{}", ui.bold(&format!("{n}. {title}"))));

    step(1, "The engine: XLA behind the PJRT C API");
    let runtime = args.engine.start(ui)?;
    let client = runtime.client();
    ui.say(format!("{} ({})", client.platform_name(), runtime.plugin().path.display()));

    step(2, "A tiny random checkpoint with the shape of E2B");
    let arch = arch_of(&["model_name=tiny-e2b".to_owned()])?;
    let (model_dir, golden_path) = (dir.join("tiny-e2b"), dir.join("quickstart_golden.safetensors"));
    let options = InitOptions { seed: SEED, vary_norms: true, force: true, ..InitOptions::default() };
    write_random(&model_dir, &arch, &options, |_| {})?;
    fs_err::write(&golden_path, GOLDEN)?;
    let model = Arc::new(Model::open(&model_dir)?);
    let borrowers: Vec<String> = arch
        .layers()
        .iter()
        .enumerate()
        .filter_map(|(i, l)| match l.kv {
            KvSource::Shared { donor } => Some(format!("{i} from {donor}")),
            KvSource::Own => None,
        })
        .collect();
    ui.say(format!(
        "{}: {} tensors, {}; {} layers, of which {} borrow keys and values ({})",
        model_dir.display(),
        model.weights().params.len(),
        bytes(model.weights().bytes()),
        arch.layers().len(),
        borrowers.len(),
        borrowers.join(", ")
    ));

    step(3, "The proof: our logits against Hugging Face's, for the same weights and tokens");
    let golden = Golden::open(&golden_path)?;
    let session = Session::new(&runtime, model, DType::F64)?;
    let tolerances = Tolerances { max_kl_div: MAX_KL, max_abs_diff: None, trace: 1e-4 };
    let mut verdict = against_golden(&session, &golden, tolerances, Trace::Layers)?;
    verdict.dtype = DType::F32.name();
    if args.json {
        ui.json(&verdict)?;
    } else {
        ui.data(text(ui, &verdict));
    }
    if !verdict.passed {
        return Err(Failure::run("this build does not compute what Hugging Face computes")
            .hint("run `lapidary doctor`; if nothing is off there, this is a fault of Lapidary or of the engine"));
    }
    ui.say(format!("\ndone in {}", seconds(start.elapsed())));
    step(4, "Next");
    ui.say(
        "lapidary verify MODEL --golden FILE     the same for your checkpoint (scripts/golden_from_hf.py makes FILE)",
    );
    ui.say("lapidary verify A --against B           two checkpoints, no golden file");
    ui.say("lapidary flops model_name=gemma4-e2b    exact FLOPs of a training step");
    ui.say("lapidary config explain KEY             every configuration key");
    Ok(Outcome::Yes)
}
