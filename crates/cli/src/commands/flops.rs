//! `lapidary flops`: the work of a step, and the time it takes at peak.

use std::path::{Path, PathBuf};

use checkpoint::hf::HfDirectory;
use config::{Category, Config, Filter, ModelLayer, Origin, Sources};
use engine::peak::{self, Measurement};
use engine::quantized::without_note;
use gemma4::hf::HfModel;
use gemma4::{Arch, Flops, KvSource, LayerKind, param_table};
use serde_json::{Value, json};
use tensor::{DType, Part};

use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, grouped};

/// Floating-point operations of a training step: exact, per layer, in MaxText's accounting.
///
/// A multiply-add counts as two. Causal attention counts half, windows their exact area, borrowed keys and values no
/// projection, lookups nothing; forward and backward make three forward passes. Norms, rotary embedding, softmax and
/// rematerialisation are not counted. Needs no device, except for `--peak measure`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A configuration file, then `key=value` words: model_name, per_device_batch_size, max_target_length,
    /// gradient_accumulation_steps, and the model's shape.
    #[arg(value_name = "CONFIG.yml|KEY=VALUE")]
    words: Vec<String>,
    /// Take the shape from this Hugging Face directory's config.json.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Count one forward pass instead of a training step.
    #[arg(long)]
    forward: bool,
    /// Time at a device's published peak: `DEVICE[:DTYPE]`; `measure[:DTYPE]` times a matrix product on this machine
    /// instead; `list` prints the table.
    #[arg(long, value_name = "DEVICE[:DTYPE]")]
    peak: Option<String>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: super::EngineArgs,
}

const EXAMPLES: &str = "\
Examples:
  lapidary flops model_name=gemma4-e2b per_device_batch_size=1 max_target_length=2048
  lapidary flops --model ./gemma-4-E4B-it max_target_length=8192 --json
  lapidary flops run.yml --peak h100-sxm:bfloat16
  lapidary flops model_name=tiny-e2b --peak measure
  lapidary flops --peak list

MFU of a run = `total` / (seconds per step x peak FLOP/s of a device). Figures are per step and device.";

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    if args.peak.as_deref() == Some("list") {
        return list_peaks(ui, args.json);
    }
    let (config, arch, name) = match &args.model {
        Some(dir) => from_directory(dir, &args.words)?,
        None => from_words(&args.words)?,
    };
    for note in config.notes() {
        ui.say(format!("note: {note}"));
    }
    // A mistyped device should not wait for the rest.
    let wanted = args.peak.as_deref().map(|word| Peak::parse(word, config.numerics.dtype.as_str())).transpose()?;
    let run = config.run;
    let batch = run.per_device_batch_size;
    let flops = if args.forward {
        Flops::forward(&arch, batch, run.max_target_length)
    } else {
        Flops::training_step(&arch, batch, run.max_target_length, run.gradient_accumulation_steps)
    };
    let peaks = match wanted {
        Some(peak) => peak.rates(ui, args)?,
        None => Vec::new(),
    };
    let report = Report { args, name: &name, arch: &arch, config: &config, flops: &flops, peaks: &peaks };
    if args.json {
        ui.json(&report.json())?;
    } else {
        ui.data(report.text());
    }
    Ok(Outcome::Yes)
}

fn from_words(words: &[String]) -> Result<(Config, Arch, String), Failure> {
    let sources = Sources::from_args(words.iter().cloned()).with_process_environment();
    let config = sources.resolve().map_err(|error| {
        let unnamed = error.problems.iter().any(|p| p.key == "model_name");
        let failure = Failure::usage(error);
        if unnamed { failure.hint("`--model DIR` takes the shape of a checkpoint instead") } else { failure }
    })?;
    let arch = Arch::from_config(&config).map_err(Failure::usage)?;
    let name = config.model.name.clone();
    Ok((config, arch, name))
}

/// The shape of a checkpoint; batch and length from the words.
fn from_directory(dir: &Path, words: &[String]) -> Result<(Config, Arch, String), Failure> {
    let directory = HfDirectory::open(dir)?;
    let path = directory.path().join("config.json");
    let json = directory.config().ok_or_else(|| Failure::run(format!("{}: not found", path.display())))?;
    let model =
        HfModel::from_config(&without_note(json)).map_err(|e| Failure::run(format!("{}: {e}", path.display())))?;
    let name = path.display().to_string();
    // The keys only stand in for the shape, which is the checkpoint's own: not every shape has keys.
    let values = vec![("sliding_window_pattern".to_owned(), config::Value::Int(1))];
    let mut sources = Sources::from_args(words.iter().cloned()).with_process_environment();
    sources.model = Some(ModelLayer { name: name.clone(), values });
    let config = sources.resolve().map_err(Failure::usage)?;
    let shape: Vec<&str> = config
        .raw()
        .show(Filter::Category(Category::Model))
        .iter()
        .filter(|s| !matches!(s.origin, Origin::Default | Origin::Checkpoint(_)))
        .filter(|s| !["model_name", "override_model_config"].contains(&s.key))
        .map(|s| s.key)
        .collect();
    if !shape.is_empty() {
        let message = format!("`--model` gives the shape, and so do {}", shape.join(", "));
        return Err(Failure::usage(message).hint("leave one of the two out; `model_name=` starts from a known shape"));
    }
    Ok((config, model.arch, name))
}

/// What `--peak` asks for.
#[derive(Debug)]
enum Peak {
    Published { device: &'static peak::Device, dtype: &'static str, rate: f64 },
    Measure(Vec<DType>),
}

/// A rate to hold the work against.
#[derive(Debug)]
struct PeakRate {
    label: String,
    dtype: &'static str,
    rate: f64,
    source: String,
    measurement: Option<Measurement>,
}

impl Peak {
    /// Reads `DEVICE[:DTYPE]`; without a dtype, that of the configuration.
    fn parse(word: &str, default_dtype: &str) -> Result<Self, Failure> {
        let (name, dtype) = match word.split_once(':') {
            Some((name, dtype)) => (name, Some(dtype)),
            None => (word, None),
        };
        if name == "measure" {
            let dtypes = match dtype {
                None => vec![DType::BF16, DType::F32],
                Some(d) => match d.parse::<DType>() {
                    Ok(d @ (DType::BF16 | DType::F32)) => vec![d],
                    _ => return Err(Failure::usage(format!("--peak {word}: bfloat16 and float32 are measured"))),
                },
            };
            return Ok(Peak::Measure(dtypes));
        }
        let Some(device) = peak::find(name) else {
            let known: Vec<&str> = peak::DEVICES.iter().map(|d| d.name).collect();
            return Err(Failure::usage(format!("--peak {word}: no figures are known for `{name}`"))
                .hint(format!("known: {}, or `measure` for this machine", known.join(", ")))
                .hint("`lapidary flops --peak list` shows the table"));
        };
        let dtype = match dtype.unwrap_or(default_dtype) {
            "bf16" => "bfloat16",
            "f32" | "fp32" => "float32",
            "fp8" | "f8" => "float8",
            other => other,
        };
        match device.rates.iter().find(|r| r.dtype == dtype) {
            Some(r) => Ok(Peak::Published { device, dtype: r.dtype, rate: r.tflops * 1e12 }),
            None => {
                let has: Vec<&str> = device.rates.iter().map(|r| r.dtype).collect();
                Err(Failure::usage(format!("--peak {word}: no {dtype} figure is published for {}", device.title))
                    .hint(format!("known for it: {}", has.join(", "))))
            }
        }
    }

    fn rates(self, ui: &Ui, args: &Args) -> Result<Vec<PeakRate>, Failure> {
        match self {
            Peak::Published { device, dtype, rate } => Ok(vec![PeakRate {
                label: device.title.to_owned(),
                dtype,
                rate,
                source: device.source.to_owned(),
                measurement: None,
            }]),
            Peak::Measure(dtypes) => {
                let runtime = args.engine.start(ui)?;
                let mut rates = Vec::new();
                for dtype in dtypes {
                    let spinner = ui.spinner(&format!("timing products in {dtype}"));
                    let m = peak::measure(&runtime, dtype);
                    spinner.finish_and_clear();
                    let m = m?;
                    rates.push(PeakRate {
                        label: "this machine".to_owned(),
                        dtype: m.dtype,
                        rate: m.flops_per_second(),
                        source: format!(
                            "median of {} products {}x{}x{}, fastest {:.1} GFLOP/s",
                            m.repetitions,
                            m.m,
                            m.k,
                            m.n,
                            m.best_flops_per_second() / 1e9
                        ),
                        measurement: Some(m),
                    });
                }
                Ok(rates)
            }
        }
    }
}

fn list_peaks(ui: &Ui, as_json: bool) -> CommandResult {
    if as_json {
        ui.json(&peak::DEVICES)?;
        return Ok(Outcome::Yes);
    }
    let name_width = peak::DEVICES.iter().map(|d| d.name.len()).max().unwrap_or(0);
    let title_width = peak::DEVICES.iter().map(|d| d.title.len()).max().unwrap_or(0);
    let columns = |cell: &dyn Fn(&str) -> String| {
        peak::DTYPES.iter().map(|t| format!("{:>8}", cell(t))).collect::<Vec<_>>().join("  ")
    };
    ui.data(format!("{:name_width$}  {:title_width$}  {}  source", "", "TFLOP/s, dense", columns(&str::to_owned)));
    for d in peak::DEVICES {
        let cell = |t: &str| d.flops_per_second(t).map_or_else(|| "-".to_owned(), |r| format!("{:.1}", r / 1e12));
        ui.data(format!("{:name_width$}  {:title_width$}  {}  {}", d.name, d.title, columns(&cell), d.source));
    }
    Ok(Outcome::Yes)
}

struct Report<'a> {
    args: &'a Args,
    name: &'a str,
    arch: &'a Arch,
    config: &'a Config,
    flops: &'a Flops,
    peaks: &'a [PeakRate],
}

/// The parts of a model, as people call them.
const PARTS: &[(Part, &str, &str)] = &[
    (Part::TokenEmbedding, "token_embedding", "token table (and tied head)"),
    (Part::PerLayerEmbedding, "per_layer_embedding", "per-layer table"),
    (Part::PerLayerProjection, "per_layer_projection", "per-layer projection"),
    (Part::Attention, "attention", "attention"),
    (Part::Mlp, "mlp", "MLPs"),
    (Part::PerLayerGate, "per_layer_gate", "per-layer gates"),
    (Part::Norm, "norm", "norms and scalars"),
];

impl Report<'_> {
    fn parameters(&self) -> (Vec<u64>, Vec<u64>) {
        let mut by_part = vec![0; PARTS.len()];
        let mut by_layer = vec![0; self.arch.layers().len()];
        for p in param_table(self.arch) {
            let n = p.shape.elements() as u64;
            if let Some(i) = PARTS.iter().position(|(part, ..)| *part == p.part) {
                by_part[i] += n;
            }
            if let Some(layer) = p.layer {
                by_layer[layer] += n;
            }
        }
        (by_part, by_layer)
    }

    fn json(&self) -> Value {
        let f = self.flops;
        let tokens = f.tokens as f64;
        let (by_part, by_layer) = self.parameters();
        let run = &self.config.run;
        let parts: serde_json::Map<String, Value> =
            PARTS.iter().zip(&by_part).map(|((_, key, _), n)| ((*key).to_owned(), json!(n))).collect();
        let layers: Vec<Value> = f
            .layers
            .iter()
            .zip(self.arch.layers())
            .zip(&by_layer)
            .map(|((l, layer), parameters)| {
                json!({
                    "layer": l.layer,
                    "kind": l.kind,
                    "owns_kv": l.owns_kv,
                    "kv_donor": match layer.kv { KvSource::Own => None, KvSource::Shared { donor } => Some(donor) },
                    "mlp_width": layer.mlp_width,
                    "parameters": parameters,
                    "attention": l.attention,
                    "learnable": l.learnable,
                })
            })
            .collect();
        json!({
            "model": self.name,
            "pass": if self.args.forward { "forward" } else { "training_step" },
            "per_device_batch_size": run.per_device_batch_size,
            "max_target_length": run.max_target_length,
            "gradient_accumulation_steps": self.accumulation(),
            "tokens_per_step": f.tokens,
            "flops_per_step": { "attention": f.attention, "learnable": f.learnable, "total": f.total },
            "tflops_per_step": {
                "attention": f.attention / 1e12, "learnable": f.learnable / 1e12, "total": f.total / 1e12,
            },
            "flops_per_token": {
                "attention": f.attention / tokens, "learnable": f.learnable / tokens, "total": f.total / tokens,
            },
            "learnable_percent": 100.0 * f.learnable / f.total,
            "learnable_by_part": f.breakdown,
            "parameters": { "total": by_part.iter().sum::<u64>(), "by_part": parts },
            "layers": layers,
            "peak": self.peaks.iter().map(|p| json!({
                "device": p.label,
                "dtype": p.dtype,
                "flops_per_second": p.rate,
                "source": p.source,
                "measurement": p.measurement,
                "seconds_per_step": f.total / p.rate,
                "tokens_per_second": tokens * p.rate / f.total,
            })).collect::<Vec<_>>(),
        })
    }

    /// A forward pass is one micro-batch.
    fn accumulation(&self) -> usize {
        if self.args.forward { 1 } else { self.config.run.gradient_accumulation_steps }
    }

    fn text(&self) -> String {
        let f = self.flops;
        let run = &self.config.run;
        let (by_part, by_layer) = self.parameters();
        let mut lines = vec![
            format!(
                "{}: {} of {:?} x {} tokens x {} = {} tokens on each device",
                self.name,
                if self.args.forward { "a forward pass" } else { "a training step" },
                run.per_device_batch_size,
                run.max_target_length,
                self.accumulation(),
                grouped(f.tokens)
            ),
            String::new(),
            format!(
                "{:>5}  {:7}  {:>9}  {:>9}  {:>13}  {:>17}  {:>17}",
                "layer", "kind", "K/V", "MLP width", "parameters", "attention GFLOP", "learnable GFLOP"
            ),
        ];
        for ((l, layer), parameters) in f.layers.iter().zip(self.arch.layers()).zip(&by_layer) {
            lines.push(format!(
                "{:>5}  {:7}  {:>9}  {:>9}  {:>13}  {:>17.3}  {:>17.3}",
                l.layer,
                if layer.kind == LayerKind::Full { "full" } else { "sliding" },
                match layer.kv {
                    KvSource::Own => "own".to_owned(),
                    KvSource::Shared { donor } => format!("of {donor}"),
                },
                layer.mlp_width,
                grouped(*parameters),
                l.attention / 1e9,
                l.learnable / 1e9
            ));
        }
        lines.push(String::new());
        let heading = |a: &str, b: &str| format!("{:28}  {:>17}  {:>15}  {:>7}", "", a, b, "share");
        lines.push(heading("TFLOP per step", "GFLOP per token"));
        let tokens = f.tokens.max(1) as f64;
        let b = &f.breakdown;
        for (label, value) in [
            ("  scores and values", f.attention),
            ("  query and output", b.query_output),
            ("  keys and values", b.key_value),
            ("  MLPs", b.mlp),
            ("  per-layer inputs", b.per_layer_input),
            ("  head", b.head),
            ("attention", f.attention),
            ("learnable", f.learnable),
            ("total", f.total),
        ] {
            lines.push(format!(
                "{label:28}  {:>17.9}  {:>15.6}  {:>6.2}%",
                value / 1e12,
                value / tokens / 1e9,
                100.0 * value / f.total
            ));
        }
        lines.push(String::new());
        lines.push(format!("{:28}  {:>17}", "", "parameters"));
        for ((_, _, label), n) in PARTS.iter().zip(&by_part).filter(|(_, n)| **n > 0) {
            lines.push(format!("  {label:26}  {:>17}", grouped(*n)));
        }
        lines.push(format!("{:28}  {:>17}", "total", grouped(by_part.iter().sum())));
        for p in self.peaks {
            lines.push(String::new());
            lines.push(format!("at {} of {}, {} ({})", rate(p.rate), p.label, p.dtype, p.source));
            lines.push(format!(
                "  a step takes {:.6} s, {:.1} tokens/s; MFU of a run = its tokens/s / {:.1}",
                f.total / p.rate,
                tokens * p.rate / f.total,
                tokens * p.rate / f.total
            ));
        }
        lines.join("\n")
    }
}

fn rate(flops_per_second: f64) -> String {
    if flops_per_second < 1e12 {
        format!("{:.1} GFLOP/s", flops_per_second / 1e9)
    } else {
        format!("{:.1} TFLOP/s", flops_per_second / 1e12)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_dtypes() {
        let published = |word: &str, default: &str| match Peak::parse(word, default) {
            Ok(Peak::Published { device, dtype, rate }) => (device.name, dtype, rate),
            other => panic!("{word}: {other:?}"),
        };
        assert_eq!(published("h100-sxm:bf16", "float32"), ("h100-sxm", "bfloat16", 989.5e12));
        assert_eq!(published("TPU-V5E", "bfloat16"), ("tpu-v5e", "bfloat16", 197e12));
        assert_eq!(published("a100", "float32"), ("a100", "float32", 19.5e12));
        assert!(matches!(Peak::parse("measure", "bfloat16"), Ok(Peak::Measure(d)) if d == [DType::BF16, DType::F32]));
        assert!(matches!(Peak::parse("measure:float32", "bfloat16"), Ok(Peak::Measure(d)) if d == [DType::F32]));
        for (word, part) in
            [("abacus", "no figures"), ("tpu-v4:float32", "no float32 figure"), ("measure:i8", "measured")]
        {
            let failure = Peak::parse(word, "bfloat16").unwrap_err();
            assert!(failure.exit_code() == 2 && failure.message().contains(part), "{failure:?}");
        }
    }

    #[test]
    fn every_part_is_named() {
        let arch = super::super::init::arch_of(&["model_name=tiny-e2b".to_owned()]).unwrap();
        assert!(param_table(&arch).iter().all(|p| PARTS.iter().any(|(part, ..)| *part == p.part)));
    }
}
