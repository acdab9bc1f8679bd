//! `lapidary diff`.

use std::path::PathBuf;

use engine::convert::diff::{DiffReport, Sides, diff, diff_bytes};
use engine::convert::{Checkpoint, Convention, Hints, Weights};
use serde_json::json;

use super::convert::{format_line, no_architecture};
use super::init::arch_of;
use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, grouped};

/// Compare two checkpoints tensor by tensor, across formats and layouts.
///
/// Gemma 4 checkpoints are compared by parameter, whatever their prefixes, shards and chunks; between Hugging Face and
/// MaxText, MaxText's values are first turned back into Hugging Face's convention. Anything else is compared by stored
/// name.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// One checkpoint.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// The architecture of MaxText checkpoints that do not tell it and have no Hugging Face directory beside them.
    #[arg(value_name = "KEY=VALUE")]
    words: Vec<String>,
    /// The same, from this config.json.
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    config: Option<PathBuf>,
    /// Compare the text model's parameters alone, also between two Hugging Face directories.
    #[arg(long)]
    text_only: bool,
    /// Print the comparison as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary diff ./gemma-4-E2B-it ./maxtext/0/items
  lapidary diff ./before ./after --json
  lapidary diff ./official ./lean --text-only

Exit code 0: the same, bit for bit. 1: not the same, or failed while running. 2: bad usage.";

/// Lines of differences that a person gets to see.
const SHOWN: usize = 40;

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let arch = if args.words.is_empty() { None } else { Some(arch_of(&args.words)?) };
    let (a, b) = (Checkpoint::open(&args.a)?, Checkpoint::open(&args.b)?);
    let across = a.convention() != b.convention();
    let model = |c: Checkpoint, base: Option<&Weights>| {
        // A given architecture is for checkpoints that do not tell their own.
        let own = c.convention() == Convention::Hf;
        if own {
            return Weights::find(c, &Hints::default());
        }
        Weights::find(c, &Hints { config: args.config.as_deref(), arch: arch.clone(), base, quantized: false })
    };
    // The Hugging Face side first: it can tell the other's architecture.
    let swapped = a.convention() == Convention::Maxtext && across;
    let (first, second) = if swapped { (b, a) } else { (a, b) };
    let models = match model(first, None) {
        Err(e) if across => Err(e),
        Err(e) => Ok(Err(e)),
        Ok(first) => match model(second, Some(&first)) {
            Err(e) if across => Err(e),
            Err(e) => Ok(Err(e)),
            Ok(second) => Ok(Ok(if swapped { (second, first) } else { (first, second) })),
        },
    };
    let report = match models.map_err(no_architecture)? {
        Ok((a, b)) => {
            for (path, w) in [(&args.a, &a), (&args.b, &b)] {
                ui.say(format!("{}: {}", path.display(), format_line(w)));
            }
            compare(ui, Sides::Models { a: &a, b: &b, text_only: args.text_only })?
        }
        Err(e) => {
            let (a, b) = (Checkpoint::open(&args.a)?, Checkpoint::open(&args.b)?);
            ui.say(format!("compared by stored name, because at least one is not read as a Gemma 4 model: {e}"));
            compare(ui, Sides::Raw { a: &a, b: &b })?
        }
    };
    if args.json {
        ui.json(&json!({ "a": args.a, "b": args.b, "report": report }))?;
    } else {
        ui.data(text(ui, &report));
    }
    Ok(if report.equal { Outcome::Yes } else { Outcome::No })
}

fn compare(ui: &Ui, sides: Sides<'_>) -> Result<DiffReport, Failure> {
    let bar = ui.bytes_bar("comparing", diff_bytes(sides));
    let report = diff(sides, &|done| bar.set_position(done));
    bar.finish_and_clear();
    Ok(report?)
}

fn text(ui: &Ui, report: &DiffReport) -> String {
    let mut lines = Vec::new();
    for d in report.differences.iter().take(SHOWN) {
        let [ta, tb] = &d.dtypes;
        let mut line = format!("{}: ", d.name);
        if d.shapes[0] != d.shapes[1] {
            line += &format!("shape {:?} and {:?}", d.shapes[0], d.shapes[1]);
        } else {
            if ta != tb {
                line += &format!("{ta} and {tb}, ");
            }
            line += &format!("{} of {} elements differ", grouped(d.different), grouped(d.elements));
            if let Some(x) = d.max_abs {
                line += &format!(", at most by {x:.3e}");
            }
            if let Some(n) = d.max_ulp {
                line += &format!(" or {} {ta} units", grouped(n));
            }
            if d.not_finite > 0 {
                line += &format!(", {} not finite", grouped(d.not_finite));
            }
            if let Some(at) = &d.first {
                line += &format!(", first at {at:?}");
            }
        }
        lines.push(line);
    }
    if report.differences.len() > SHOWN {
        lines.push(format!("... and {} more (--json shows all)", report.differences.len() - SHOWN));
    }
    for (which, names) in [("first", &report.only_a), ("second", &report.only_b)] {
        if !names.is_empty() {
            let shown = names.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
            let more = if names.len() > 8 { ", ..." } else { "" };
            lines.push(format!("{} only in the {which}: {shown}{more}", names.len()));
        }
    }
    if report.left_out != [0, 0] {
        lines.push(format!(
            "left out, no parameters of the text model: {} in the first, {} in the second",
            report.left_out[0], report.left_out[1]
        ));
    }
    lines.push(format!(
        "{}  {} tensors ({}) compared, {} differ",
        ui.bold(if report.equal { "SAME" } else { "DIFFERENT" }),
        report.compared,
        bytes(report.bytes),
        report.differences.len()
    ));
    lines.join("\n")
}
