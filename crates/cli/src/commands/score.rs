//! `lapidary score`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::data::Tokenizer;
use engine::decode::{DecodeOptions, Decoder, Quantization};
use engine::divergence::{Divergence, divergence, score_stepwise};
use engine::generate::encode_written;
use engine::score::{Score, Windows, score};
use engine::{Runtime, Session};
use serde_json::{Value, json};

use super::generate::setup::{ModelArgs, Setup};
use super::{ArchArgs, CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, grouped, seconds};

/// Tell how likely a model finds a text.
///
/// Log-likelihood, perplexity and bits a byte of a text file, or of the documents of a JSON-lines file. Long texts are cut
/// into windows, each of which begins with the start token; every token counts once.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint (items, a step or a run).
    model: PathBuf,
    /// A text file, which is one document, or JSON lines (.jsonl, .ndjson), each an object with a text.
    file: PathBuf,
    /// Tokens the model sees at once.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    window: usize,
    /// Tokens from one window to the next: less than the window gives tokens more to go by, and takes longer
    /// [default: the window].
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Do not begin windows with the start token.
    #[arg(long)]
    no_bos: bool,
    /// Every line of a text file is a document, as in training.
    #[arg(long)]
    lines: bool,
    /// Key of the text in JSON lines.
    #[arg(long, value_name = "KEY", default_value = "text")]
    column: String,
    /// Compare weights of 8.25 or 4.5 bits with those that are stored: likelihood by both, and KL of the former from the latter.
    /// Token by token, as generating does. On a CPU.
    #[arg(long, value_name = "int8|int4")]
    quantize: Option<Quantization>,
    /// Windows side by side, where a text goes token by token: with --quantize, and with weights that are stored quantized
    /// [default: 8].
    #[arg(long, value_name = "N")]
    sequences: Option<usize>,
    /// Print the result as JSON on stdout.
    #[arg(long)]
    json: bool,
    /// With --json: every document's figures as well.
    #[arg(long, requires = "json")]
    documents: bool,
    #[command(flatten)]
    options: ModelArgs,
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

const EXAMPLES: &str = "\
Examples:
  lapidary score ./gemma-4-E2B book.txt
  lapidary score ./gemma-4-E2B book.txt --window 1024 --stride 512
  lapidary score ./gemma-4-E2B book.txt --window 512 --quantize int4
  lapidary score ./run/checkpoints/900 --tokenizer bytes held_out.jsonl --json --documents";

/// A document and its place in the file.
struct Document {
    line: usize,
    text: String,
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let mut windows = Windows { length: args.window, stride: args.stride.unwrap_or(args.window), bos: None };
    windows.check().map_err(Failure::usage)?;
    let documents = documents(args)?;
    let setup = args.options.open(ui, &args.model, &args.arch)?;
    let tokenizer = setup.tokenizer()?;
    windows.bos = if args.no_bos { None } else { tokenizer.bos.map(|bos| bos as i32) };
    setup.check_context(args.window)?;
    let tokens = documents.iter().map(|d| tokens(args, tokenizer, d)).collect::<Result<Vec<_>, Failure>>()?;
    let total: usize = tokens.iter().map(Vec::len).sum();
    ui.say(format!("{} documents, {} tokens; activations {}", documents.len(), grouped(total as u64), setup.dtype));

    let stored = setup.model.weights().stored;
    if args.sequences.is_some() && args.quantize.is_none() && stored.is_none() {
        return Err(Failure::usage("--sequences: only with --quantize or with weights that are stored quantized"));
    }
    if let Some(stored) = stored.filter(|_| args.quantize.is_some()) {
        return Err(Failure::usage(format!(
            "--quantize: {} holds weights quantized to {} and nothing to compare them with",
            args.model.display(),
            stored.format.name()
        ))
        .hint("leave the option out for their score, or give the directory they were made from"));
    }
    let runtime = args.engine.start(ui)?;
    if let Some(quantize) = args.quantize {
        return compare(ui, args, &runtime, &setup, quantize, &windows, &tokens);
    }
    let mut way = match stored {
        Some(_) => Way::Stepwise(Box::new(decoder(args, &runtime, &setup, &windows, None)?)),
        None => Way::Whole(Box::new(super::verify::place(ui, &runtime, &setup.model, setup.dtype)?)),
    };
    let clock = Instant::now();
    let bar = ui.count_bar("scoring", total as u64);
    let (mut sum, mut bytes, mut each) = (Score::default(), 0u64, Vec::new());
    for (document, ids) in documents.iter().zip(&tokens) {
        let before = sum.tokens;
        let progress = |done| bar.set_position(before + done);
        let one = match &mut way {
            Way::Whole(session) => score(session, ids, &windows, progress)?,
            Way::Stepwise(decoder) => score_stepwise(decoder.as_mut(), ids, &windows, progress)?,
        };
        let scored = scored_bytes(tokenizer, document, ids, windows.bos)?;
        if args.documents {
            let mut figures = figures(&one, scored);
            figures["line"] = document.line.into();
            each.push(figures);
        }
        sum.add(one);
        bytes += scored;
    }
    bar.finish_and_clear();
    if sum.tokens == 0 {
        return Err(Failure::run(format!("{}: there is no token to predict", args.file.display())));
    }
    let took = clock.elapsed();
    if args.json {
        ui.json(&report(args, &setup, &windows, documents.len(), &sum, bytes, took.as_secs_f64(), each))?;
    } else {
        ui.data(format!(
            "{} tokens, {} bytes: log-likelihood {:.2}, loss {:.4} nats a token, perplexity {:.3}, {:.4} bits a byte",
            grouped(sum.tokens),
            grouped(bytes),
            sum.log_likelihood,
            sum.loss(),
            sum.perplexity(),
            sum.bits_per_byte(bytes)
        ));
    }
    ui.say(format!("in {}, {:.0} tokens/s", seconds(took), sum.tokens as f64 / took.as_secs_f64()));
    Ok(Outcome::Yes)
}

/// How a text goes through a model.
enum Way<'r> {
    /// Windows at once.
    Whole(Box<Session<'r>>),
    /// Token by token, over a cache.
    Stepwise(Box<Decoder<'r>>),
}

/// A model over a cache that takes windows.
fn decoder<'r>(
    args: &Args,
    runtime: &'r Runtime,
    setup: &Setup,
    windows: &Windows,
    quantize: Option<Quantization>,
) -> Result<Decoder<'r>, Failure> {
    // All windows of all documents would be better side by side; a long text makes no difference.
    let sequences = args.sequences.unwrap_or(8);
    if sequences == 0 {
        return Err(Failure::usage("--sequences must be at least 1"));
    }
    let context = windows.length.saturating_add(1);
    let options = DecodeOptions { sequences, context, dtype: setup.dtype, quantize, ..DecodeOptions::default() };
    Ok(Decoder::new(runtime, setup.model.clone(), options)?)
}

/// The same text by weights as they are stored and quantized.
fn compare(
    ui: &Ui,
    args: &Args,
    runtime: &Runtime,
    setup: &Setup,
    quantize: Quantization,
    windows: &Windows,
    documents: &[Vec<i32>],
) -> CommandResult {
    if args.documents {
        return Err(Failure::usage("--quantize compares all documents together"));
    }
    let spinner = ui.spinner("placing weights, quantizing, compiling");
    let mut stored = decoder(args, runtime, setup, windows, None)?;
    let mut ours = decoder(args, runtime, setup, windows, Some(quantize))?;
    spinner.finish_and_clear();
    let clock = Instant::now();
    let total: usize = documents.iter().map(Vec::len).sum();
    let bar = ui.count_bar("scoring", total as u64);
    let mut sum = Divergence::default();
    for ids in documents {
        let before = sum.ours.tokens;
        sum.add(&divergence(&mut stored, &mut ours, ids, windows, |done| bar.set_position(before + done))?);
    }
    bar.finish_and_clear();
    if sum.ours.tokens == 0 {
        return Err(Failure::run(format!("{}: there is no token to predict", args.file.display())));
    }
    let took = clock.elapsed();
    let distance = sum.summary();
    if args.json {
        ui.json(&json!({
            "model": setup.model.path(), "file": args.file, "lapidary": env!("CARGO_PKG_VERSION"),
            "dtype": setup.dtype.name(), "quantize": quantize.name(), "window": windows.length, "stride": windows.stride,
            "bos": windows.bos, "documents": documents.len(), "tokens": sum.ours.tokens,
            "as_stored": { "loss": sum.reference.loss(), "perplexity": sum.reference.perplexity() },
            "quantized": { "loss": sum.ours.loss(), "perplexity": sum.ours.perplexity() },
            "distance": distance, "seconds": took.as_secs_f64(),
        }))?;
    } else {
        ui.data(format!(
            "{} tokens: loss {:.4} nats a token as stored, {:.4} in {}; perplexity {:.3}, {:.3}",
            grouped(sum.ours.tokens),
            sum.reference.loss(),
            sum.ours.loss(),
            quantize.name(),
            sum.reference.perplexity(),
            sum.ours.perplexity()
        ));
        ui.data(format!(
            "KL of {} from the weights as stored: mean {:.3e}, largest {:.3e} nats; the same most likely token {:.2} % of the time",
            quantize.name(),
            distance.mean_kl,
            distance.max_kl,
            100.0 * distance.top1_agreement
        ));
    }
    ui.say(format!("in {}, {:.1} tokens/s", seconds(took), sum.ours.tokens as f64 / took.as_secs_f64()));
    Ok(Outcome::Yes)
}

fn figures(score: &Score, bytes: u64) -> Value {
    json!({
        "tokens": score.tokens,
        "bytes": bytes,
        "log_likelihood": score.log_likelihood,
        "loss": score.loss(),
        "perplexity": score.perplexity(),
        "bits_per_byte": score.bits_per_byte(bytes),
    })
}

#[allow(clippy::too_many_arguments)]
fn report(
    args: &Args,
    setup: &Setup,
    windows: &Windows,
    documents: usize,
    sum: &Score,
    bytes: u64,
    seconds: f64,
    each: Vec<Value>,
) -> Value {
    let mut out = figures(sum, bytes);
    out["model"] = json!(setup.model.path());
    out["file"] = json!(args.file);
    out["lapidary"] = env!("CARGO_PKG_VERSION").into();
    out["dtype"] = setup.dtype.name().into();
    out["window"] = windows.length.into();
    out["stride"] = windows.stride.into();
    out["bos"] = json!(windows.bos);
    out["documents"] = documents.into();
    out["seconds"] = seconds.into();
    if args.documents {
        out["each"] = each.into();
    }
    out
}

/// Bytes that predicted tokens stand for: all, unless the first token was there to begin with.
fn scored_bytes(tokenizer: &Tokenizer, document: &Document, ids: &[i32], bos: Option<i32>) -> Result<u64, Failure> {
    let all = document.text.len();
    let first = match (bos, ids.first()) {
        (None, Some(&first)) => tokenizer.decode(&[first as u32]).map_err(Failure::run)?.len(),
        _ => 0,
    };
    Ok(all.saturating_sub(first) as u64)
}

fn tokens(args: &Args, tokenizer: &Tokenizer, document: &Document) -> Result<Vec<i32>, Failure> {
    encode_written(tokenizer, &document.text)
        .map_err(|e| Failure::run(format!("{}:{}: {e}", args.file.display(), document.line)))
}

fn documents(args: &Args) -> Result<Vec<Document>, Failure> {
    let text = fs_err::read_to_string(&args.file)?;
    let lines = || text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(|(i, l)| (i + 1, l));
    let json = args.file.extension().and_then(|e| e.to_str()).is_some_and(|e| ["jsonl", "ndjson"].contains(&e));
    let out: Vec<Document> = match (json, args.lines) {
        (true, _) => lines()
            .map(|(line, text)| column(&args.file, line, text, &args.column).map(|text| Document { line, text }))
            .collect::<Result<_, _>>()?,
        (false, true) => lines().map(|(line, text)| Document { line, text: text.to_owned() }).collect(),
        (false, false) => vec![Document { line: 1, text }],
    };
    Ok(out)
}

fn column(path: &Path, line: usize, text: &str, column: &str) -> Result<String, Failure> {
    let wrong = |what: String| Failure::run(format!("{}:{line}: {what}", path.display()));
    let value: Value = serde_json::from_str(text).map_err(|e| wrong(format!("no JSON: {e}")))?;
    match value.get(column) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(wrong(format!("`{column}` is no text"))),
        None => Err(wrong(format!("there is no `{column}`; --column names the text's key"))),
    }
}
