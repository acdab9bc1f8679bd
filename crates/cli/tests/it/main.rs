//! The program as a user meets it: words in, exit code and text out.

// The helpers below stand outside of test functions.
#![allow(clippy::unwrap_used)]

mod config;
mod convert;
mod convert_faults;
mod devices;
mod doctor;
mod flops;
mod generate;
mod known_tokens;
#[cfg(feature = "mpi")]
mod mpi;
mod plan;
mod plugin;
mod quantize;
mod report;
mod train;
mod verify;
mod verify_maxtext;

use std::process::Command;

use serde_json::Value;

/// What a run of the program came to.
#[derive(Debug)]
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Run {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}\n{self:#?}"))
    }

    /// Asserts the exit code, and gives the run back.
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }
}

/// The program with arguments, free of the variables that set keys. Where the engine is found stays.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lapidary"));
    command.args(args);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let kept = ["LAPIDARY_PJRT_PLUGIN", "LAPIDARY_CACHE_DIR", "LAPIDARY_OFFLINE"].contains(&&*text);
        if text.starts_with("LAPIDARY_") && !kept {
            command.env_remove(&name);
        }
    }
    command
}

fn run(mut command: Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn lapidary(args: &[&str]) -> Run {
    run(command(args))
}

#[test]
fn no_test_file_is_forgotten() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it");
    let main = fs_err::read_to_string(format!("{dir}/main.rs")).unwrap();
    for entry in fs_err::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(module) = name.strip_suffix(".rs").filter(|m| *m != "main") else { continue };
        assert!(main.contains(&format!("\nmod {module};\n")), "{name} is not part of the tests");
    }
}

#[test]
fn help_teaches_by_example() {
    for words in [
        "",
        "flops",
        "generate",
        "chat",
        "score",
        "quantize",
        "report",
        "config show",
        "config explain",
        "doctor",
        "plan",
        "compile",
        "plugin list",
        "plugin fetch",
    ] {
        let args: Vec<&str> = words.split_whitespace().chain(["--help"]).collect();
        let help = lapidary(&args).exits(0).stdout;
        assert!(help.contains("  lapidary "), "{words}: {help}");
    }
}

#[test]
fn bad_usage_is_two() {
    assert!(lapidary(&["flopz"]).exits(2).stderr.contains("flops"));
    assert!(lapidary(&["flops", "--colour"]).exits(2).stdout.is_empty());
}
