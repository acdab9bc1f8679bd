//! `lapidary quickstart`.

mod grammar;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use checkpoint::copy::CopyOptions;
use config::{Config, Sources};
use engine::convert::diff::{Sides, diff};
use engine::convert::{Convention, Hints, Settings, Weights, plan};
use engine::data::Tokenizer;
use engine::decode::{DecodeOptions, Decoder};
use engine::generate::{
    Finish, GenerateError, GenerationConfig, Sampler, Sampling, Sequence, Writer, encode_text, generate,
};
use engine::golden::Golden;
use engine::init::{InitOptions, write_random};
use engine::train::{Event, TrainOptions, train};
use engine::verify::{Tolerances, against_golden};
use engine::{Model, Runtime, Session};
use gemma4::arch::KvSource;
use gemma4::forward::Trace;
use serde_json::{Value, json};
use tensor::DType;

use super::init::arch_of;
use super::verify::text;
use super::{CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// See the main jobs on something small, from nothing: engine, proof, training, conversion, sampling.
///
/// Fetches the XLA engine if it is not there, writes a tiny random E2B-shaped checkpoint, runs it on XLA and compares its
/// logits and every layer's output with what Hugging Face transformers computed for the same checkpoint. Then trains such a
/// model on text of a small grammar until its loss is near the grammar's entropy, converts it to MaxText and back bit for
/// bit, and samples sentences from it, which the grammar must accept.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep checkpoints, text and the golden file in this directory [default: a temporary one, removed at the end].
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Print the verdict of the proof, and what training, conversion and sampling came to, as JSON on stdout.
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

/// Steps of the training, and sentences enough for each to be seen once: the loss is that of new text.
const STEPS: u64 = 240;
const SENTENCES: usize = 8000;
/// The loss is a mean over the last steps.
const LAST: u64 = 20;
/// How far above the entropy it may be, and below by the chance of which sentences came last.
const MARGIN: f64 = 0.10;
/// Sentences sampled at once, room for each in tokens (the longest sentence has 44 bytes), and how many must be right.
const SAMPLES: usize = 16;
const ROOM: usize = 64;
const NEEDED: usize = 12;
const TEMPERATURE: f32 = 0.7;

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
    let mut out = serde_json::to_value(&verdict)?;
    if !args.json {
        ui.data(text(ui, &verdict));
    }
    if !verdict.passed {
        if args.json {
            ui.json(&out)?;
        }
        return Err(Failure::run("this build does not compute what Hugging Face computes")
            .hint("run `lapidary doctor`; if nothing is off there, this is a fault of Lapidary or of the engine"));
    }

    step(4, "Training, from random weights, on a language whose entropy is known");
    let (trained, training) = learn(ui, &runtime, &dir)?;
    step(5, "The trained checkpoint, to MaxText and back");
    let conversion = there_and_back(ui, &trained, &dir)?;
    step(6, "Sentences of the trained model");
    let samples = sample(ui, &runtime, &trained)?;
    let took = start.elapsed();
    ui.say(format!("\ndone in {}", seconds(took)));
    if args.json {
        for (key, value) in [("training", training), ("conversion", conversion), ("samples", samples)] {
            out[key] = value;
        }
        out["seconds"] = json!(took.as_secs_f64());
        ui.json(&out)?;
    }
    step(7, "Next");
    ui.say(
        "lapidary verify MODEL --golden FILE     the same for your checkpoint (scripts/golden_from_hf.py makes FILE)",
    );
    ui.say("lapidary train key=value ...            your data, your model; keys are MaxText's");
    ui.say("lapidary convert SRC DST --to maxtext   or --to hf");
    ui.say("lapidary flops model_name=gemma4-e2b    exact FLOPs of a training step");
    ui.say("lapidary config explain KEY             every configuration key");
    Ok(Outcome::Yes)
}

/// Trains on the grammar: the checkpoint, and the figures.
fn learn(ui: &Ui, runtime: &Runtime, dir: &Path) -> Result<(PathBuf, Value), Failure> {
    let mut draws = grammar::Draws::new(SEED, "sentences");
    let sentences: Vec<String> = (0..SENTENCES).map(|_| grammar::sentence(&mut draws)).collect();
    let file = dir.join("sentences.txt");
    fs_err::write(&file, sentences.join("\n"))?;
    // A token a byte, and one for the end.
    let tokens: usize = sentences.iter().map(|s| s.len() + 1).sum();
    let entropy = grammar::SENTENCE_NATS * SENTENCES as f64 / tokens as f64;
    ui.say(format!("{}: {SENTENCES} sentences such as \"{}\"", file.display(), sentences[0]));
    ui.say(format!("entropy: {entropy:.3} nats a token; no model can do better on text it has not seen"));

    let run = dir.join("quickstart-run");
    if run.exists() {
        // Of an earlier `--keep`; the name is ours. A run would be continued otherwise.
        fs_err::remove_dir_all(&run)?;
    }
    let config = training_config(&file, dir)?;
    let clock = Instant::now();
    let (mut losses, mut compile) = (Vec::new(), 0.0);
    let mut tell = |event: Event<'_>| match event {
        Event::Status(what) => ui.say(what),
        Event::Compiled(c) => {
            compile = c.time.as_secs_f64();
            ui.say(format!("{} in {}", if c.cached { "loaded from the cache" } else { "compiled" }, seconds(c.time)));
        }
        Event::Step(m) => {
            losses.push((m.lm_loss, m.total_weights as f64));
            let done = m.step + 1;
            if done == 1 || done.is_multiple_of(STEPS / 6) {
                ui.say(format!("step {done:>4}  loss {:.3}", m.lm_loss));
            }
        }
        _ => {}
    };
    let report = train(runtime, &config, TrainOptions::default(), &mut tell).map_err(super::train::explain)?;
    let took = clock.elapsed();
    let last = &losses[losses.len().saturating_sub(LAST as usize)..];
    let (sum, weight) = last.iter().fold((0.0, 0.0), |(s, w), (loss, n)| (s + loss * n, w + n));
    let loss = sum / weight;
    let off = loss / entropy - 1.0;
    let good = off.abs() <= MARGIN;
    ui.say(format!(
        "{}  loss of the last {LAST} steps {loss:.3}, entropy {entropy:.3}: {:+.1} % (allowed: {:.0} %), in {}",
        ui.verdict(good),
        100.0 * off,
        100.0 * MARGIN,
        seconds(took)
    ));
    if !good {
        return Err(Failure::run(format!("the loss {loss:.3} did not come near the entropy {entropy:.3}")));
    }
    let checkpoint = report.checkpoint.ok_or_else(|| Failure::run("the run left no checkpoint"))?;
    let first = losses.first().map(|l| l.0);
    let figures = json!({
        "steps": report.step, "first_loss": first, "loss": loss, "entropy": entropy, "margin": MARGIN,
        "compile_seconds": compile, "seconds": took.as_secs_f64(), "checkpoint": checkpoint,
    });
    Ok((checkpoint, figures))
}

/// What a user would write behind `lapidary train`. The environment has no say: the outcome is stated.
fn training_config(file: &Path, dir: &Path) -> Result<Config, Failure> {
    let path = |p: &Path| serde_json::to_string(&p.to_string_lossy());
    let words = [
        "model_name=tiny-e2b".to_owned(),
        "tokenizer_path=bytes".to_owned(),
        "dataset_type=hf".to_owned(),
        "hf_path=text".to_owned(),
        format!("hf_train_files={}", path(file)?),
        format!("base_output_directory={}", path(dir)?),
        "run_name=quickstart-run".to_owned(),
        format!("steps={STEPS}"),
        "max_target_length=128".to_owned(),
        "per_device_batch_size=8".to_owned(),
        "dtype=float32".to_owned(),
        "learning_rate=3e-3".to_owned(),
        "warmup_steps_fraction=0.1".to_owned(),
        "save_checkpoint_on_start=false".to_owned(),
    ];
    Sources::from_args(words).resolve().map_err(Failure::run)
}

/// Converts to MaxText and back, and compares bits.
fn there_and_back(ui: &Ui, trained: &Path, dir: &Path) -> Result<Value, Failure> {
    let clock = Instant::now();
    let write = |source: &Weights, target: &Path, to| -> Result<PathBuf, Failure> {
        let settings = Settings { to, ..Settings::default() };
        let options = CopyOptions { force: true, ..CopyOptions::default() };
        let report = plan(source, None, target, &settings)?.run(&options, &|_| ControlFlow::Continue(()))?;
        ui.say(format!("{}: {} tensors, {}", report.path.display(), report.tensors, bytes(report.bytes)));
        Ok(report.path)
    };
    let source = Weights::open(trained, &Hints::default())?;
    let maxtext = write(&source, &dir.join("trained-maxtext"), Convention::Maxtext)?;
    let maxtext = Weights::open(&maxtext, &Hints::default())?;
    let back = write(&maxtext, &dir.join("trained-back"), Convention::Hf)?;
    let back = Weights::open(&back, &Hints::default())?;
    let report = diff(Sides::Models { a: &source, b: &back, text_only: true }, &|_| {})?;
    ui.say(format!(
        "{}  {} tensors compared, {} differ, in {}",
        ui.verdict(report.equal),
        report.compared,
        report.differences.len(),
        seconds(clock.elapsed())
    ));
    if !report.equal {
        return Err(Failure::run("the checkpoint that came back is not the one that went"));
    }
    Ok(json!({ "equal": report.equal, "compared": report.compared, "seconds": clock.elapsed().as_secs_f64() }))
}

/// Samples sentences and asks the grammar.
fn sample(ui: &Ui, runtime: &Runtime, trained: &Path) -> Result<Value, Failure> {
    let clock = Instant::now();
    let options = DecodeOptions { sequences: SAMPLES, context: ROOM, dtype: DType::F32, ..DecodeOptions::default() };
    let mut model = Decoder::new(runtime, Arc::new(Model::open(trained)?), options)?;
    let tokenizer = Tokenizer::bytes();
    let start = encode_text(&tokenizer, "")?;
    let stop_ids = GenerationConfig::default().stop_ids(Some(&tokenizer), false);
    let sampling = Sampling { do_sample: true, temperature: TEMPERATURE, seed: SEED, ..Sampling::default() };
    let mut samplers =
        (0..SAMPLES).map(|i| Sampler::new(sampling.clone(), i, None)).collect::<Result<Vec<_>, GenerateError>>()?;
    let mut sequences: Vec<Sequence<'_>> = samplers
        .iter_mut()
        .map(|sampler| Sequence { prompt: &start, sampler, max_new_tokens: ROOM - start.len() })
        .collect();
    let mut writers: Vec<Writer<'_>> = (0..SAMPLES).map(|_| Writer::new(Some(&tokenizer), false, &[])).collect();
    let (ends, _) = generate(&mut model, &mut sequences, &stop_ids, |slot, choice| {
        writers[slot].take(choice, &stop_ids, &mut |_| {})
    })?;
    for writer in &mut writers {
        writer.finish(&mut |_| {})?;
    }
    let texts: Vec<String> = writers.into_iter().map(|w| w.response.answer).collect();
    let ended = |end: &Finish| matches!(end, Finish::StopToken(_));
    let valid = texts.iter().zip(&ends).filter(|(t, end)| ended(end) && grammar::accepts(t)).count();
    for text in texts.iter().take(4) {
        ui.say(format!("  {text}"));
    }
    let good = valid >= NEEDED;
    ui.say(format!(
        "{}  {valid} of {SAMPLES} sentences obey the grammar (needed: {NEEDED}), in {}",
        ui.verdict(good),
        seconds(clock.elapsed())
    ));
    if !good {
        return Err(Failure::run(format!("only {valid} of {SAMPLES} sampled sentences obey the grammar: {texts:#?}")));
    }
    Ok(json!({
        "valid": valid, "of": SAMPLES, "temperature": TEMPERATURE, "texts": texts,
        "seconds": clock.elapsed().as_secs_f64(),
    }))
}
