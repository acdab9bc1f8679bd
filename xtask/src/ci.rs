//! The steps of CI.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{arrows, generated, tidy, tokenizer};

/// One check.
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    /// Whether `--fast` keeps it.
    pub(crate) fast: bool,
    action: Action,
}

enum Action {
    /// Runs cargo with these arguments and environment variables.
    Cargo(&'static [&'static str], &'static [(&'static str, &'static str)]),
    /// Runs a function of this program.
    Own(fn(&Path) -> Result<()>),
}

/// Every check, in order: the cheap ones first, the tests last so that their result closes the log.
pub(crate) const STEPS: &[Step] = &[
    Step {
        name: "lock",
        about: "Cargo.lock agrees with the manifests",
        fast: true,
        action: Action::Own(arrows::check_lock),
    },
    Step {
        name: "fmt",
        about: "the code is formatted",
        fast: true,
        action: Action::Cargo(&["fmt", "--all", "--check"], &[]),
    },
    Step {
        name: "tidy",
        about: "file sizes, licences, nothing left over",
        fast: true,
        action: Action::Own(tidy::check),
    },
    Step {
        name: "arrows",
        about: "forbidden dependency edges are absent",
        fast: true,
        action: Action::Own(arrows::check),
    },
    Step {
        name: "deny",
        about: "licences, bans and sources of dependencies, where cargo-deny is installed",
        fast: false,
        action: Action::Own(deny),
    },
    Step { name: "docs", about: "generated files are up to date", fast: true, action: Action::Own(generated::check) },
    Step {
        name: "clippy",
        about: "no warnings, in tests neither",
        fast: true,
        action: Action::Cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]),
    },
    Step {
        name: "doc",
        about: "the API documentation builds without warnings",
        fast: false,
        action: Action::Cargo(&["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")]),
    },
    Step {
        name: "parquet",
        about: "the tests of training data pass with the feature `parquet`",
        fast: false,
        action: Action::Cargo(
            &["test", "--package", "lapidary-engine", "--features", "parquet", "--lib", "data::"],
            &[],
        ),
    },
    Step {
        name: "mpi",
        about: "several processes train as one, where Open MPI is installed",
        fast: false,
        action: Action::Own(mpi),
    },
    Step {
        name: "tokenizer",
        about: "Gemma 4's tokenizer is made, for the tests of known tokens",
        fast: false,
        action: Action::Own(|root| tokenizer::make(&tokenizer::default_dir(root))),
    },
    Step { name: "test", about: "all tests pass", fast: true, action: Action::Own(test) },
];

/// Runs the steps; a failed one does not keep the others from running.
pub(crate) fn run(root: &Path, args: &[&str]) -> Result<()> {
    let is_fast = args.contains(&"--fast");
    let named: Vec<&str> = args.iter().copied().filter(|arg| *arg != "--fast").collect();
    if let Some(unknown) = named.iter().find(|name| STEPS.iter().all(|step| step.name != **name)) {
        bail!("there is no step `{unknown}`; `cargo xtask help` lists them");
    }
    let chosen = |step: &&Step| {
        if named.is_empty() { step.fast || !is_fast } else { named.contains(&step.name) }
    };
    let started = Instant::now();
    let mut failed = Vec::new();
    for step in STEPS.iter().filter(chosen) {
        println!("==> {}: {}", step.name, step.about);
        let began = Instant::now();
        let result = match &step.action {
            Action::Cargo(args, variables) => cargo(root, args, variables),
            Action::Own(check) => check(root),
        };
        let seconds = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("    {} passed ({seconds:.1} s)", step.name),
            Err(error) => {
                println!("    {} FAILED ({seconds:.1} s): {error:#}", step.name);
                failed.push(step.name);
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    if !failed.is_empty() {
        bail!("failed: {} ({seconds:.1} s in all)", failed.join(", "));
    }
    println!("==> all steps passed ({seconds:.1} s)");
    Ok(())
}

/// The cargo that runs this program.
pub(crate) fn cargo_program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn cargo(root: &Path, args: &[&str], variables: &[(&str, &str)]) -> Result<()> {
    let line = format!("cargo {}", args.join(" "));
    let status = Command::new(cargo_program())
        .args(args)
        .envs(variables.iter().copied())
        .current_dir(root)
        .status()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` says no");
    }
    Ok(())
}

/// Every test, those of known tokens with the tokenizer that the step before has made.
fn test(root: &Path) -> Result<()> {
    let dir = tokenizer::default_dir(root);
    let given = std::env::var_os(tokenizer::VARIABLE).is_some();
    let variable = (!given && dir.join("tokenizer.json").is_file()).then(|| dir.to_str()).flatten();
    if variable.is_none() && !given {
        println!("    without Gemma 4's tokenizer (`cargo xtask tokenizer` makes it): known tokens are not looked at");
    }
    let variables: Vec<(&str, &str)> = variable.map(|dir| (tokenizer::VARIABLE, dir)).into_iter().collect();
    cargo(root, &["test", "--workspace"], &variables)
}

fn mpi(root: &Path) -> Result<()> {
    let found = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found("mpirun") || !found("mpicc") {
        println!("    Open MPI is not installed (Debian: libopenmpi-dev openmpi-bin libclang-dev); nothing checked");
        return Ok(());
    }
    cargo(root, &["test", "--package", "lapidary", "--features", "mpi", "--test", "it", "mpi::"], &[])
}

fn deny(root: &Path) -> Result<()> {
    let found = Command::new("cargo-deny").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("    cargo-deny is not installed; nothing checked");
        return Ok(());
    }
    // The advisory database lives on a code host; the rest needs no network.
    cargo(root, &["deny", "--offline", "check", "bans", "licenses", "sources"], &[])
}
