//! `lapidary verify`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engine::golden::Golden;
use engine::verify::{Tolerances, Verdict, against_golden, against_model, default_trace_tolerance, probe_batches};
use engine::{Batch, Model, Runtime, Session, known};
use gemma4::Layout;
use gemma4::forward::Trace;
use serde_json::json;
use tensor::DType;

use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// Prove that a checkpoint computes what a reference computes.
///
/// Runs the model on XLA and compares its logits, token by token, with stored ones of another implementation (a golden
/// file), with a second checkpoint, or with the published answers of the real Gemma 4 E2B-it. With keys of parallelism
/// (ici_fsdp_parallelism=8 ...) weights and work are spread over devices, virtual ones on a CPU: to prove a mesh.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint (items, a step or a run).
    model: PathBuf,
    /// A golden file: .safetensors (input_ids, logits or logits_last, attention_mask) or MaxText's .jsonl.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["against", "known_answers"])]
    golden: Option<PathBuf>,
    /// Another checkpoint to take as the reference.
    #[arg(long, value_name = "MODEL", conflicts_with = "golden")]
    against: Option<PathBuf>,
    /// Compare with the public known answers of google/gemma-4-E2B-it (for users who have its weights).
    #[arg(long, conflicts_with_all = ["golden", "against"])]
    known_answers: bool,
    /// Sequence lengths for --against; token ids are drawn by a fixed rule.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "8,64")]
    lengths: Vec<usize>,
    /// Activations: float32 proves, bfloat16 shows what speed costs.
    #[arg(long, default_value = "float32", value_parser = dtype)]
    dtype: DType,
    /// Arithmetic of a float32 run. `auto` takes float64 for small models, where it costs nothing and leaves only the
    /// reference's own rounding to be seen; large ones run in float32.
    #[arg(long, default_value = "auto", value_enum)]
    arithmetic: Arithmetic,
    /// Every token's KL(reference || model) must be at most this.
    #[arg(long, value_name = "KL", default_value_t = 0.03)]
    max_kl_div: f64,
    /// Every logit must be this close as well.
    #[arg(long, value_name = "X")]
    max_abs_diff: Option<f64>,
    /// Compare hidden states layer by layer and name the first that leaves tolerance.
    #[arg(long)]
    trace: bool,
    /// Tolerance of --trace, relative to the largest reference value [default: 1e-4, in bfloat16 0.25].
    #[arg(long, value_name = "X")]
    trace_tolerance: Option<f64>,
    /// Write the verdict as JSON here, and as a Markdown card beside it (.md).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print the verdict as JSON on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    arch: super::ArchArgs,
    #[command(flatten)]
    engine: super::EngineArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Arithmetic {
    Auto,
    Float32,
    Float64,
}

const EXAMPLES: &str = "\
Examples:
  lapidary verify ./gemma-4-E2B-it --golden e2b.safetensors
  lapidary verify ./fine-tuned --golden e2b.safetensors --trace --report card.json
  lapidary verify ./converted --against ./original --lengths 16,600
  lapidary verify ./run/checkpoints/900 --golden e2b.safetensors model_name=gemma4-e2b
  lapidary verify ./gemma-4-E2B-it --known-answers
  lapidary verify ./gemma-4-E2B-it --golden e2b.safetensors ici_fsdp_parallelism=4 ici_tensor_parallelism=2

scripts/golden_from_hf.py makes a golden file from any Hugging Face directory and prompts.
Exit code 0: within tolerance. 1: outside, or failed while running. 2: bad usage.";

fn dtype(s: &str) -> Result<DType, String> {
    match s.parse::<DType>() {
        Ok(d @ (DType::F32 | DType::BF16)) => Ok(d),
        _ => Err("use float32 or bfloat16".into()),
    }
}

/// Multiply-adds below which float64 arithmetic takes less than a second.
const SMALL: u64 = 2_000_000_000;

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    // Cheap mistakes first: the files, before a device is started.
    let golden = args.golden.as_deref().map(Golden::open).transpose()?;
    let (model, against) = models(ui, args)?;
    let tolerances = Tolerances {
        max_kl_div: args.max_kl_div,
        max_abs_diff: args.max_abs_diff,
        trace: args.trace_tolerance.unwrap_or_else(|| default_trace_tolerance(args.dtype)),
    };
    let bad = |x: f64| x.is_nan() || x < 0.0;
    if bad(tolerances.max_kl_div) || bad(tolerances.trace) || tolerances.max_abs_diff.is_some_and(bad) {
        return Err(Failure::usage("tolerances must not be negative"));
    }
    let mesh = args.arch.mesh()?;
    let runtime = args.engine.start_on(ui, mesh.hardware, mesh.cpu_devices(), None)?;
    let spread = |model: &Model| lay_out(&runtime, &mesh, model);
    let tokens = match &golden {
        Some(g) => g.sequences.iter().map(|s| s.ids.len()).sum(),
        None => args.lengths.iter().sum(),
    };
    let compute = compute_dtype(args, &model, tokens);
    let start = Instant::now();
    let session = place_on(ui, &runtime, &model, compute, spread(&model)?)?;
    let trace = if args.trace { Trace::Parts } else { Trace::None };
    let mut verdict = if args.known_answers {
        known::against_known_answers(&session, tolerances)?
    } else if let Some(golden) = &golden {
        against_golden(&session, golden, tolerances, trace)?
    } else if let Some(other) = &against {
        if args.lengths.contains(&0) {
            return Err(Failure::usage("--lengths: a sequence needs at least one token"));
        }
        let reference = place_on(ui, &runtime, other, compute, spread(other)?)?;
        let batches: Vec<(String, Batch)> = probe_batches(&session, &args.lengths);
        against_model(&session, &reference, &batches, tolerances, trace)?
    } else {
        return Err(Failure::usage("give --golden, --against or --known-answers"));
    };
    verdict.dtype = args.dtype.name();
    verdict.arithmetic = compute.name();
    let times = session.compile_times();
    ui.say(format!(
        "ran in {} ({} programs, {} from the cache, {} to compile)",
        seconds(start.elapsed()),
        times.programs,
        times.cached,
        seconds(times.total)
    ));
    if let Some(path) = &args.report {
        write_report(path, args, &verdict)?;
        ui.say(format!("report: {} and {}", path.display(), path.with_extension("md").display()));
    }
    if args.json {
        ui.json(&report(args, &verdict))?;
    } else {
        ui.data(text(ui, &verdict));
    }
    Ok(if verdict.passed { Outcome::Yes } else { Outcome::No })
}

fn compute_dtype(args: &Args, model: &Model, tokens: usize) -> DType {
    if args.dtype != DType::F32 {
        return args.dtype;
    }
    let weights: u64 = gemma4::forward::body_params(model.arch()).map(|p| p.shape.elements() as u64).sum();
    let small = weights.saturating_mul(tokens as u64) < SMALL;
    match args.arithmetic {
        Arithmetic::Float64 => DType::F64,
        Arithmetic::Auto if small => DType::F64,
        _ => DType::F32,
    }
}

/// Opens the model and the one to compare it with. Either can tell the other's architecture.
fn models(ui: &Ui, args: &Args) -> Result<(Arc<Model>, Option<Arc<Model>>), Failure> {
    let Some(other) = &args.against else { return Ok((Arc::new(args.arch.open(ui, &args.model, None)?), None)) };
    let reference = args.arch.open(ui, other, None);
    let model = args.arch.open(ui, &args.model, reference.as_ref().ok())?;
    let reference = match reference {
        Err(_) => args.arch.open(ui, other, Some(&model))?,
        Ok(reference) => reference,
    };
    Ok((Arc::new(model), Some(Arc::new(reference))))
}

/// The model's layers, written out, on the devices of a mesh.
fn lay_out(runtime: &Runtime, mesh: &config::Mesh, model: &Model) -> Result<Layout, Failure> {
    let shape = mesh.resolve(runtime.client().devices().len(), 1).map_err(Failure::usage)?;
    // A proof has no memory to save: any model may be spread over any mesh as far as it divides.
    let partition = engine::mesh::partition(mesh, &shape).map_err(Failure::usage)?.lenient();
    Layout::unrolled(model.arch()).partitioned(partition).map_err(Failure::usage)
}

/// Places a model's weights and says how.
pub(crate) fn place<'r>(
    ui: &Ui,
    runtime: &'r Runtime,
    model: &Arc<Model>,
    dtype: DType,
) -> Result<Session<'r>, Failure> {
    place_on(ui, runtime, model, dtype, Layout::unrolled(model.arch()))
}

/// The same on the mesh of a layout.
fn place_on<'r>(
    ui: &Ui,
    runtime: &'r Runtime,
    model: &Arc<Model>,
    dtype: DType,
    layout: Layout,
) -> Result<Session<'r>, Failure> {
    let spinner = ui.spinner("placing weights");
    let start = Instant::now();
    let devices = layout.devices();
    let session = Session::on(runtime, model.clone(), dtype, layout)?;
    spinner.finish_and_clear();
    let p = session.placed();
    ui.say(format!(
        "weights placed in {}: {} used in place in the file, {} copied to aligned memory",
        seconds(start.elapsed()),
        bytes(p.mapped_bytes as u64),
        bytes(p.copied_bytes as u64)
    ));
    if devices > 1 {
        let share = p.copied_bytes as f64 / devices as f64;
        ui.say(format!("{devices} devices share them: {} on each on average", bytes(share as u64)));
    }
    if p.spooled_bytes > 0 {
        ui.say(format!(
            "the per-layer table cannot be used where it is stored: {} went to a temporary file",
            bytes(p.spooled_bytes)
        ));
    }
    Ok(session)
}

fn report(args: &Args, verdict: &Verdict) -> serde_json::Value {
    json!({
        "model": args.model,
        "golden": args.golden,
        "against": args.against,
        "known_answers": args.known_answers,
        "lapidary": env!("CARGO_PKG_VERSION"),
        "verdict": verdict,
    })
}

fn write_report(path: &Path, args: &Args, verdict: &Verdict) -> Result<(), Failure> {
    fs_err::write(path, serde_json::to_string_pretty(&report(args, verdict))? + "\n")?;
    let reference = match (&args.golden, &args.against) {
        (Some(p), _) | (None, Some(p)) => p.display().to_string(),
        _ => "known answers of google/gemma-4-E2B-it".to_owned(),
    };
    let mut card = format!(
        "# {} {}\n\nReference: `{reference}`. Activations {}, arithmetic {}. Lapidary {}.\n\n| | tokens | max KL | mean KL | max abs | top-1 | top-10 |\n|---|---|---|---|---|---|---|\n",
        args.model.display(),
        if verdict.passed { "PASS" } else { "FAIL" },
        verdict.dtype,
        verdict.arithmetic,
        env!("CARGO_PKG_VERSION"),
    );
    for a in &verdict.known_answers {
        card += &format!("| {} | {} | | | {:.2e} | {} | |\n", a.label, a.greedy.len(), a.max_abs_diff, a.passed);
    }
    let overall = verdict.known_answers.is_empty().then_some(("all", &verdict.overall));
    let rows = verdict.sequences.iter().map(|s| (s.label.as_str(), &s.summary));
    for (label, s) in rows.chain(overall) {
        card += &format!(
            "| {} | {} | {:.2e} | {:.2e} | {:.2e} | {:.1} % | {:.1} % |\n",
            label.replace('|', "\\|").replace('\n', " "),
            s.tokens,
            s.max_kl,
            s.mean_kl,
            s.max_abs_diff,
            100.0 * s.top1_agreement,
            100.0 * s.top10_agreement
        );
    }
    card += &format!("\nRequired: max KL <= {}.\n", verdict.tolerances.max_kl_div);
    if let Some(name) = &verdict.first_divergence {
        card += &format!("\nFirst value outside tolerance: `{name}`.\n");
    }
    fs_err::write(path.with_extension("md"), card)?;
    Ok(())
}

/// The verdict for a person.
pub(crate) fn text(ui: &Ui, verdict: &Verdict) -> String {
    let mut lines = Vec::new();
    if !verdict.known_answers.is_empty() {
        for a in &verdict.known_answers {
            lines.push(format!(
                "{}  {}: tokens {:?}, expected {:?}; published logits within {:.4}",
                ui.verdict(a.passed),
                a.label,
                a.greedy,
                a.expected,
                a.max_abs_diff
            ));
        }
        return lines.join("\n");
    }
    let width = verdict.sequences.iter().map(|s| s.label.chars().count()).max().unwrap_or(3).clamp(3, 40);
    lines.push(format!(
        "{:width$}  {:>6}  {:>9}  {:>9}  {:>9}  {:>7}  {:>7}",
        "", "tokens", "max KL", "mean KL", "max abs", "top-1", "top-10"
    ));
    let rows = verdict.sequences.iter().map(|s| (s.label.as_str(), &s.summary));
    for (label, s) in rows.chain([("all", &verdict.overall)]) {
        let label: String = label.chars().map(|c| if c.is_control() { ' ' } else { c }).take(width).collect();
        lines.push(format!(
            "{label:width$}  {:>6}  {:>9.2e}  {:>9.2e}  {:>9.2e}  {:>6.1}%  {:>6.1}%",
            s.tokens,
            s.max_kl,
            s.mean_kl,
            s.max_abs_diff,
            100.0 * s.top1_agreement,
            100.0 * s.top10_agreement
        ));
    }
    if !verdict.trace.is_empty() {
        let worst = verdict.trace.iter().map(|t| t.relative).fold(0.0, f64::max);
        lines.push(format!(
            "trace: {} values compared, largest difference {worst:.2e} of the largest value (tolerance {:.0e})",
            verdict.trace.len(),
            verdict.tolerances.trace
        ));
    }
    if let Some(name) = &verdict.first_divergence {
        lines.push(format!("first value outside tolerance: {name}"));
    }
    lines.push(format!(
        "{}  max KL {:.2e} (at most {:e}), activations {}, arithmetic {}",
        ui.verdict(verdict.passed),
        verdict.overall.max_kl,
        verdict.tolerances.max_kl_div,
        verdict.dtype,
        verdict.arithmetic
    ));
    lines.join("\n")
}
