//! `lapidary config`: what a configuration comes to, and what its keys mean.

use std::fmt::Write as _;

use config::{Category, Explanation, Filter, RawConfig, Setting, Sources};
use serde_json::{Value, json};

use super::{CommandResult, Failure, Outcome};
use crate::ui::Ui;

/// Show what every key comes to and where its value was decided, or explain keys.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Show(Show),
    Explain(Explain),
}

/// Final value and origin of every key, after all layers.
///
/// Layers, from lowest to highest: built-in defaults, the model's file, CONFIG.yml (and the files it builds on), the
/// command line, environment variables `LAPIDARY_<KEY>`. All problems are reported at once, with exit code 2.
#[derive(Debug, clap::Args)]
#[command(after_help = SHOW_EXAMPLES)]
struct Show {
    /// A configuration file, then `key=value` words.
    #[arg(value_name = "CONFIG.yml|KEY=VALUE")]
    words: Vec<String>,
    /// Every key (the default).
    #[arg(long, conflicts_with_all = ["set", "category"])]
    all: bool,
    /// Only keys that some layer set.
    #[arg(long, conflicts_with = "category")]
    set: bool,
    /// Only keys of one section.
    #[arg(long, value_name = "SECTION", value_parser = category)]
    category: Option<Category>,
    /// What each key does, below it.
    #[arg(long)]
    docs: bool,
    /// Print settings, notes and the resolved values (or the problems) as JSON.
    #[arg(long)]
    json: bool,
}

const SHOW_EXAMPLES: &str = "\
Examples:
  lapidary config show model_name=gemma4-e2b --set
  lapidary config show run.yml steps=100 learning_rate=1e-4 --category schedule
  lapidary config show model_name=gemma4-e4b --category model --docs
  lapidary config show run.yml --json | jq '.settings[] | select(.origin != \"default\")'

Sections: model, numerics, memory, run, schedule, optimizer, data, checkpoint, mesh, output, decode, fine-tuning.";

/// What keys mean: type, range, default, environment variable, relation to MaxText's key.
///
/// Given a configuration file or `key=value` words too, each key's value there is shown with its origin. Names that
/// are computed from other keys, and keys of MaxText that are not supported, are explained as well.
#[derive(Debug, clap::Args)]
#[command(after_help = EXPLAIN_EXAMPLES)]
struct Explain {
    /// Keys [default: list all of them]; also a configuration file and `key=value` words.
    #[arg(value_name = "KEY")]
    words: Vec<String>,
    /// Print the explanations as JSON.
    #[arg(long)]
    json: bool,
}

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  lapidary config explain                  every key, in a line or two
  lapidary config explain remat_policy
  lapidary config explain sliding_window_pattern model_name=gemma4-e4b
  lapidary config explain emb_dim enable_dropout";

/// The words of `--category`.
const SECTIONS: &[(&str, Category)] = &[
    ("model", Category::Model),
    ("numerics", Category::Numerics),
    ("memory", Category::Memory),
    ("run", Category::Run),
    ("schedule", Category::Schedule),
    ("optimizer", Category::Optimizer),
    ("data", Category::Data),
    ("checkpoint", Category::Checkpoint),
    ("mesh", Category::Mesh),
    ("output", Category::Output),
    ("decode", Category::Decode),
    ("fine-tuning", Category::FineTuning),
];

fn category(word: &str) -> Result<Category, String> {
    SECTIONS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(word))
        .map(|(_, c)| *c)
        .ok_or_else(|| format!("use one of {}", SECTIONS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")))
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    match &args.command {
        Command::Show(args) => show(ui, args),
        Command::Explain(args) => explain(ui, args),
    }
}

fn show(ui: &Ui, args: &Show) -> CommandResult {
    let raw = Sources::from_args(args.words.iter().cloned()).with_process_environment().load();
    let config = match raw.clone().resolve() {
        Ok(config) => config,
        Err(error) => {
            if args.json {
                ui.json(&error)?;
            }
            return Err(Failure::usage(error));
        }
    };
    let filter = match args.category {
        Some(category) => Filter::Category(category),
        None if args.set => Filter::Set,
        None => Filter::All,
    };
    let settings = raw.show(filter);
    for note in raw.notes() {
        ui.say(format!("note: {note}"));
    }
    if args.json {
        ui.json(&json!({
            "model": config.model.name,
            "model_source": config.model_source().map(ToString::to_string),
            "settings": settings.iter().map(setting_json).collect::<Result<Vec<_>, _>>()?,
            "notes": raw.notes().iter().map(ToString::to_string).collect::<Vec<_>>(),
            "resolved": config,
        }))?;
    } else if args.docs {
        ui.data(with_docs(&settings).trim_end());
    } else {
        ui.data(config::render_settings(&settings).trim_end());
    }
    if !args.json && filter == Filter::All {
        ui.say("`--set` leaves out defaults; `lapidary config explain KEY` tells what a key does");
    }
    Ok(Outcome::Yes)
}

fn doc(key: &str) -> &'static str {
    config::keys::find(key).map_or("", |key| key.doc)
}

fn setting_json(setting: &Setting) -> serde_json::Result<Value> {
    let mut value = serde_json::to_value(setting)?;
    value["set"] = json!(setting.is_set());
    value["doc"] = json!(doc(setting.key));
    Ok(value)
}

/// The settings with a key's sentence below it.
fn with_docs(settings: &[Setting]) -> String {
    let mut out = String::new();
    let mut section = "";
    for s in settings {
        if s.category != section {
            let gap = if section.is_empty() { "" } else { "\n" };
            let _ = writeln!(out, "{gap}{}", s.category);
            section = s.category;
        }
        let _ = writeln!(out, "  {} = {}  ({})\n      {}", s.key, s.value, s.origin, doc(s.key));
    }
    out
}

fn explain(ui: &Ui, args: &Explain) -> CommandResult {
    // A configuration is whatever `train` would take: a file, and words with `=`.
    let is_source = |word: &str| word.contains('=') || word.ends_with(".yml") || word.ends_with(".yaml");
    let (sources, keys): (Vec<&String>, Vec<&String>) = args.words.iter().partition(|word| is_source(word));
    let raw = match sources.is_empty() {
        true => None,
        false => Some(Sources::from_args(sources.into_iter().cloned()).with_process_environment().load()),
    };
    if let Some(raw) = &raw {
        // What is wrong with one key need not stop the explanation of another.
        for problem in raw.problems() {
            ui.say(format!("problem: {problem}"));
        }
    }
    if keys.is_empty() && !args.json {
        ui.data(all_keys().trim_end());
        return Ok(Outcome::Yes);
    }
    // Without a key, all of them.
    let keys: Vec<&str> = match keys.is_empty() {
        true => config::keys::all().map(|key| key.name).collect(),
        false => keys.into_iter().map(String::as_str).collect(),
    };
    let mut explanations = Vec::new();
    let mut problems = Vec::new();
    for key in keys {
        match one(raw.as_ref(), key) {
            Ok(explanation) => explanations.push(explanation),
            Err(error) => problems.extend(error.problems),
        }
    }
    if args.json {
        ui.json(&explanations)?;
    } else if !explanations.is_empty() {
        let texts: Vec<String> = explanations.iter().map(config::render_explanation).collect();
        ui.data(texts.join("\n").trim_end());
    }
    if problems.is_empty() { Ok(Outcome::Yes) } else { Err(Failure::usage(config::Error { problems })) }
}

/// Every key with its type, default and first sentence.
fn all_keys() -> String {
    let mut out = String::new();
    for (i, (_, category)) in SECTIONS.iter().enumerate() {
        let _ = writeln!(out, "{}{}", if i > 0 { "\n" } else { "" }, category.title());
        for key in config::keys::all().filter(|key| key.category == *category) {
            let sentence = key.doc.split_inclusive(". ").next().unwrap_or_default().trim_end();
            let _ = writeln!(out, "  {} = {}  ({})\n      {sentence}", key.name, key.default, key.type_phrase());
        }
    }
    out
}

fn one(raw: Option<&RawConfig>, key: &str) -> Result<Explanation, config::Error> {
    match raw {
        Some(raw) => raw.explain(key),
        None => config::explain(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_has_a_word() {
        assert_eq!(SECTIONS.iter().map(|(_, c)| *c).collect::<Vec<_>>(), Category::ALL);
        assert!(SECTIONS.iter().all(|(word, _)| SHOW_EXAMPLES.contains(word)));
        assert_eq!(category("Fine-Tuning"), Ok(Category::FineTuning));
        assert!(category("colour").unwrap_err().contains("optimizer"));
    }
}
