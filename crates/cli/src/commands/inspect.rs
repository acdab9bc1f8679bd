//! `lapidary inspect`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use checkpoint::hf::HfDirectory;
use checkpoint::orbax::OrbaxCheckpoint;
use engine::convert::config::describe;
use engine::convert::{Checkpoint, Hints, Stats, Weights, stats};
use engine::quantized::VERSION;
use serde_json::{Value, json};
use tensor::{DType, Shape};

use super::init::arch_of;
use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, grouped};

/// Show what is in a checkpoint: format, architecture, every tensor, and what is wrong with it.
///
/// Nothing but headers is read, unless --stats asks for the values (which verifies every checksum on the way).
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A Hugging Face directory, a .safetensors file, or an Orbax checkpoint (.../0/items, a step or a run).
    checkpoint: PathBuf,
    /// The architecture of a checkpoint that does not tell it, in MaxText's keys: model_name=gemma4-e2b ...
    #[arg(value_name = "KEY=VALUE")]
    words: Vec<String>,
    /// The architecture, from this config.json.
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    config: Option<PathBuf>,
    /// Read all values: minimum, maximum, mean, standard deviation, zeros, what is no number.
    #[arg(long)]
    stats: bool,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary inspect ./gemma-4-E2B-it
  lapidary inspect ./maxtext/0/items --stats
  lapidary inspect ./run --json | jq '.orbax.problems'

Exit code 0: shown. 1: no checkpoint, or damaged. 2: bad usage.";

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let entries = checkpoint.entries();
    let found = if args.stats { Some(read(ui, &checkpoint, &entries)?) } else { None };
    let mut out = match &checkpoint {
        Checkpoint::Hf(dir) => json!({ "format": "hf", "hf": hf_json(dir) }),
        Checkpoint::Orbax(c) => json!({ "format": "maxtext", "orbax": c.inspect() }),
    };
    let head = match &checkpoint {
        Checkpoint::Hf(dir) => hf_text(dir),
        Checkpoint::Orbax(c) => orbax_text(ui, c),
    };
    let arch = if args.words.is_empty() { None } else { Some(arch_of(&args.words)?) };
    let given = arch.is_some() || args.config.is_some();
    let hints = Hints { config: args.config.as_deref(), arch, base: None, quantized: true };
    let model = match Weights::find(checkpoint, &hints) {
        Ok(model) => Ok(model),
        Err(e) if given => return Err(e.into()),
        Err(e) => Err(Failure::from(e)),
    };
    if args.json {
        out["path"] = json!(args.checkpoint);
        out["model"] = match &model {
            Ok(w) => model_json(w),
            Err(e) => json!({ "problem": e.message() }),
        };
        let tensor = |(i, (name, dtype, shape)): (usize, &(String, DType, Shape))| {
            let mut t =
                json!({ "name": name, "dtype": dtype.name(), "shape": shape.dims(), "bytes": size(*dtype, shape) });
            if let Some(s) = found.as_ref().and_then(|f| f.get(i)) {
                t["stats"] = json!(s.1);
            }
            t
        };
        out["tensors"] = entries.iter().enumerate().map(tensor).collect();
        ui.json(&out)?;
        return Ok(Outcome::Yes);
    }
    ui.data(format!("{}\n{head}", ui.bold(&args.checkpoint.display().to_string())));
    ui.data(match &model {
        Ok(w) => model_text(w),
        Err(e) => format!("model: not known ({})", e.message()),
    });
    ui.data(table(&entries, found.as_deref()));
    Ok(Outcome::Yes)
}

fn size(dtype: DType, shape: &Shape) -> u64 {
    (shape.elements() as u64).saturating_mul(dtype.size() as u64)
}

fn read(ui: &Ui, checkpoint: &Checkpoint, entries: &[(String, DType, Shape)]) -> Result<Vec<(String, Stats)>, Failure> {
    let bar = ui.bytes_bar("reading", entries.iter().map(|(_, d, s)| size(*d, s)).sum());
    let found = stats(checkpoint, &|done| bar.set_position(done));
    bar.finish_and_clear();
    Ok(found?)
}

fn totals(entries: impl Iterator<Item = (DType, u64, u64)>) -> BTreeMap<&'static str, (usize, u64, u64)> {
    let mut out: BTreeMap<&'static str, (usize, u64, u64)> = BTreeMap::new();
    for (dtype, elements, bytes) in entries {
        let sum = out.entry(dtype.name()).or_default();
        *sum = (sum.0 + 1, sum.1.saturating_add(elements), sum.2.saturating_add(bytes));
    }
    out
}

fn hf_totals(dir: &HfDirectory) -> BTreeMap<&'static str, (usize, u64, u64)> {
    totals(dir.entries().map(|e| (e.dtype, e.shape.elements() as u64, size(e.dtype, &e.shape))))
}

fn hf_json(dir: &HfDirectory) -> Value {
    let sums: BTreeMap<_, _> = hf_totals(dir)
        .into_iter()
        .map(|(d, (tensors, elements, bytes))| (d, json!({ "tensors": tensors, "elements": elements, "bytes": bytes })))
        .collect();
    json!({
        "files": dir.files().iter().map(|f| f.path()).collect::<Vec<_>>(),
        "dtypes": sums,
        "unindexed": dir.unindexed(),
        "config": dir.config(),
        "generation_config": dir.generation_config(),
    })
}

fn hf_text(dir: &HfDirectory) -> String {
    let mut lines = vec![format!("format: Hugging Face, {} weights files, {} tensors", dir.files().len(), dir.len())];
    for (dtype, (tensors, elements, size)) in hf_totals(dir) {
        lines.push(format!("  {dtype}: {tensors} tensors, {} elements, {}", grouped(elements), bytes(size)));
    }
    if !dir.unindexed().is_empty() {
        lines.push(format!("  problem: not in the index: {}", dir.unindexed().join(", ")));
    }
    lines.join("\n")
}

fn orbax_text(ui: &Ui, c: &OrbaxCheckpoint) -> String {
    let i = c.inspect();
    let step = i.step.map_or(String::new(), |s| format!(", step {s}"));
    let kind = serde_json::to_value(i.kind).ok().and_then(|v| Some(v.as_str()?.to_owned())).unwrap_or_default();
    let mut lines = vec![format!("format: Orbax, {}, tree {kind}{step}, {}", i.container, i.path)];
    for (dtype, t) in &i.dtypes {
        lines.push(format!("  {dtype}: {} arrays, {} elements, {}", t.arrays, grouped(t.elements), bytes(t.bytes)));
    }
    lines.push(format!("  stored: {} in all", bytes(i.total.stored_bytes)));
    for (format, n) in &i.formats {
        lines.push(format!("  {format}: {n} arrays"));
    }
    lines.push(format!("  checksums: {}", if i.checksummed { "every element" } else { "not everywhere" }));
    for s in &i.skipped {
        lines.push(format!("  not looked at: {} arrays below {}", s.arrays, s.subtree));
    }
    for (name, what) in &i.empty {
        lines.push(format!("  empty: {name} ({what})"));
    }
    for (key, value) in &i.custom_metadata {
        // The provenance of a conversion is long and shown as the model below.
        let text = if value.is_object() { "{...}".to_owned() } else { value.to_string() };
        lines.push(format!("  metadata: {key} = {text}"));
    }
    for p in &i.problems {
        let array = p.array.as_ref().map_or(String::new(), |a| format!("{a}: "));
        lines.push(format!("  {} {array}{}", ui.bold("problem:"), p.message));
    }
    lines.join("\n")
}

fn model_json(w: &Weights) -> Value {
    json!({
        "description": describe(&w.arch),
        "origin": w.origin,
        "conditional": w.conditional,
        "parameters": w.params.iter().map(|p| p.spec.shape.elements() as u64).sum::<u64>(),
        "tensors": w.params.len(),
        "quantized": w.stored.map(|s| json!({
            "format": s.format.name(), "group_size": s.format.group(), "dtype": s.dtype.name(), "version": VERSION,
            "matrices": w.params.iter().filter(|p| p.tiles.is_some()).count(),
        })),
        "prefix": w.report.as_ref().map(|r| &r.prefix),
        "unused_expected": w.report.as_ref().map(|r| {
            let rows = r.unused_expected.iter();
            rows.map(|(label, n)| json!({ "label": label, "tensors": n.tensors, "bytes": n.bytes })).collect::<Vec<_>>()
        }),
        "unused_unexpected": w.report.as_ref().map(|r| &r.unused_unexpected),
        "notes": w.notes,
    })
}

fn model_text(w: &Weights) -> String {
    let parameters: u64 = w.params.iter().map(|p| p.spec.shape.elements() as u64).sum();
    let mut lines = vec![
        format!("model: Gemma 4, {}", describe(&w.arch)),
        format!("  used: {} tensors, {} parameters", w.params.len(), grouped(parameters)),
    ];
    if let Some(stored) = &w.stored {
        lines.push(format!(
            "  quantized: {} matrices in {}, a scale for {} columns (they were {}); stored form {VERSION}",
            w.params.iter().filter(|p| p.tiles.is_some()).count(),
            stored.format.name(),
            stored.format.group(),
            stored.dtype
        ));
    }
    if let Some(r) = &w.report {
        lines.push(format!("  prefix: `{}`", r.prefix));
        for (label, n) in &r.unused_expected {
            lines.push(format!("  not used, as expected: {} tensors ({}), {label}", n.tensors, bytes(n.bytes)));
        }
        for (name, size) in &r.unused_unexpected {
            lines.push(format!("  not used, unexpected: {name} ({})", bytes(*size)));
        }
    }
    lines.extend(w.notes.iter().map(|n| format!("  note: {n}")));
    lines.join("\n")
}

fn table(entries: &[(String, DType, Shape)], found: Option<&[(String, Stats)]>) -> String {
    let width = entries.iter().map(|(n, ..)| n.chars().count()).max().unwrap_or(0).min(100);
    let shapes: Vec<String> = entries.iter().map(|(.., s)| s.to_string()).collect();
    let shape_width = shapes.iter().map(String::len).max().unwrap_or(0);
    let mut lines = Vec::with_capacity(entries.len());
    for (i, ((name, dtype, shape), text)) in entries.iter().zip(&shapes).enumerate() {
        let mut line =
            format!("{name:width$}  {:8}  {text:shape_width$}  {:>9}", dtype.name(), bytes(size(*dtype, shape)));
        if let Some((_, s)) = found.and_then(|f| f.get(i)) {
            let number = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.4e}"));
            line +=
                &format!("  min {} max {} mean {} std {}", number(s.min), number(s.max), number(s.mean), number(s.std));
            for (what, n) in [("zeros", s.zeros), ("NaN", s.nan), ("infinite", s.infinite)] {
                if n > 0 {
                    line += &format!(" {what} {}", grouped(n));
                }
            }
        }
        lines.push(line);
    }
    lines.join("\n")
}
