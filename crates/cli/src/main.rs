//! The `lapidary` command: everything a person sees.
//!
//! Data goes to stdout, talk to stderr. Exit codes: 0 done and true, 1 ran and the answer is no (or it failed while
//! running), 2 bad usage or configuration.

mod commands;
mod ui;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::commands::Outcome;
use crate::ui::Ui;

pjrt::export_allocator!();

/// Train, convert, prove and run Gemma 4 E2B and E4B on OpenXLA.
#[derive(Debug, Parser)]
#[command(name = "lapidary", version, propagate_version = true, after_help = AFTER_HELP)]
struct Cli {
    /// Say nothing on stderr but errors.
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Start here:
  lapidary quickstart                                  the main job on something small, explained
  lapidary verify MODEL --golden golden.safetensors    prove a checkpoint against a reference
  lapidary doctor                                      what this machine has, what is missing

Exit codes: 0 done and true, 1 the answer is no or it failed while running, 2 bad usage or configuration.";

#[derive(Debug, Subcommand)]
enum Command {
    Quickstart(commands::quickstart::Args),
    Train(commands::train::Args),
    Verify(commands::verify::Args),
    Generate(commands::generate::Args),
    Chat(commands::chat::Args),
    Score(commands::score::Args),
    Convert(commands::convert::Args),
    Quantize(commands::quantize::Args),
    Inspect(commands::inspect::Args),
    Diff(commands::diff::Args),
    Init(commands::init::Args),
    Bench(commands::bench::Args),
    Report(commands::report::Args),
    Compile(commands::compile::Args),
    Flops(commands::flops::Args),
    Plan(commands::plan::Args),
    Config(commands::config::Args),
    Doctor(commands::doctor::Args),
    Plugin(commands::plugin::Args),
}

fn main() -> ExitCode {
    // Before anything runs: XLA's CPU client allocates and frees large blocks all the time.
    pjrt::tune_allocator();
    pjrt::quiet_plugins();
    let cli = Cli::parse();
    let ui = Ui::new(cli.quiet);
    let result = match cli.command {
        Command::Quickstart(args) => commands::quickstart::run(&ui, &args),
        Command::Train(args) => commands::train::run(&ui, &args),
        Command::Verify(args) => commands::verify::run(&ui, &args),
        Command::Generate(args) => commands::generate::run(&ui, &args),
        Command::Chat(args) => commands::chat::run(&ui, &args),
        Command::Score(args) => commands::score::run(&ui, &args),
        Command::Bench(args) => commands::bench::run(&ui, &args),
        Command::Convert(args) => commands::convert::run(&ui, &args),
        Command::Quantize(args) => commands::quantize::run(&ui, &args),
        Command::Inspect(args) => commands::inspect::run(&ui, &args),
        Command::Diff(args) => commands::diff::run(&ui, &args),
        Command::Init(args) => commands::init::run(&ui, &args),
        Command::Report(args) => commands::report::run(&ui, &args),
        Command::Compile(args) => commands::compile::run(&ui, &args),
        Command::Flops(args) => commands::flops::run(&ui, &args),
        Command::Plan(args) => commands::plan::run(&ui, &args),
        Command::Config(args) => commands::config::run(&ui, &args),
        Command::Doctor(args) => commands::doctor::run(&ui, &args),
        Command::Plugin(args) => commands::plugin::run(&ui, &args),
    };
    match result {
        Ok(Outcome::Yes) => ExitCode::SUCCESS,
        Ok(Outcome::No) => ExitCode::from(1),
        Err(failure) => {
            ui.failure(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}
