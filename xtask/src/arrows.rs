//! Proves, from what cargo resolves, that dependencies point one way.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::ci::cargo_program;

/// Every crate of the workspace with the crates of the workspace it may use, directly or through others.
const ALLOWED: &[(&str, &[&str])] = &[
    ("lapidary-tensor", &[]),
    ("lapidary-config", &[]),
    ("lapidary-graph", &["lapidary-tensor"]),
    ("lapidary-pjrt", &["lapidary-tensor"]),
    ("lapidary-kernels", &[]),
    ("lapidary-checkpoint", &["lapidary-tensor"]),
    ("lapidary-gemma4", &["lapidary-tensor", "lapidary-graph", "lapidary-config"]),
    (
        "lapidary-engine",
        &[
            "lapidary-tensor",
            "lapidary-config",
            "lapidary-graph",
            "lapidary-pjrt",
            "lapidary-checkpoint",
            "lapidary-gemma4",
            "lapidary-kernels",
        ],
    ),
    (
        "lapidary",
        &[
            "lapidary-tensor",
            "lapidary-config",
            "lapidary-graph",
            "lapidary-pjrt",
            "lapidary-checkpoint",
            "lapidary-gemma4",
            "lapidary-kernels",
            "lapidary-engine",
        ],
    ),
    ("xtask", &["lapidary-config"]),
];

/// Packages that the default build must not contain, with the reason.
const BANNED: &[(&str, &str)] = &[
    ("tokio", "nothing here waits on a network"),
    ("async-std", "nothing here waits on a network"),
    ("hyper", "nothing here waits on a network"),
    ("openssl-sys", "downloads go through the user's own tools"),
    ("aws-lc-sys", "downloads go through the user's own tools"),
    ("hf-hub", "models are local files"),
    ("pyo3", "no Python runs inside"),
    ("serde_yaml", "unmaintained"),
    ("serde_yml", "unmaintained"),
];

/// Checks every crate of the workspace.
pub(crate) fn check(root: &Path) -> Result<()> {
    let members = packages(root, &["--workspace", "--depth", "0"])?;
    let mut wrong = Vec::new();
    for member in &members {
        wrong.extend(violations(member, &packages(root, &["--package", member])?, &members));
    }
    for (name, _) in ALLOWED.iter().filter(|(name, _)| !members.contains(*name)) {
        wrong.push(format!("{name} is in the table of allowed edges and not in the workspace"));
    }
    let everything = packages(root, &["--workspace"])?;
    for (name, why) in BANNED.iter().filter(|(name, _)| everything.contains(*name)) {
        wrong.push(format!("{name} is in the build: {why}"));
    }
    if !wrong.is_empty() {
        bail!("\n  {}", wrong.join("\n  "));
    }
    println!("    {} crates, {} packages in the build", members.len(), everything.len());
    Ok(())
}

/// What is wrong with the packages that one member uses.
fn violations(member: &str, used: &BTreeSet<String>, members: &BTreeSet<String>) -> Vec<String> {
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == member) else {
        return vec![format!("{member} is not in the table of allowed edges")];
    };
    members
        .iter()
        .filter(|other| *other != member && used.contains(*other) && !allowed.contains(&other.as_str()))
        .map(|other| format!("{member} must not depend on {other}"))
        .collect()
}

/// Checks that nothing needs to be written to Cargo.lock.
pub(crate) fn check_lock(root: &Path) -> Result<()> {
    packages(root, &["--workspace", "--locked"]).map(|_| ())
}

/// Names of the packages in a tree without its development dependencies.
fn packages(root: &Path, args: &[&str]) -> Result<BTreeSet<String>> {
    let output = Command::new(cargo_program())
        .args(["tree", "--quiet", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"])
        .args(args)
        .current_dir(root)
        .output()
        .context("cannot start `cargo tree`")?;
    if !output.status.success() {
        bail!("`cargo tree` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(names(&String::from_utf8_lossy(&output.stdout)))
}

fn names(tree: &str) -> BTreeSet<String> {
    tree.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_first_words() {
        let tree = "lapidary-graph v0.1.0 (/somewhere)\nlapidary-tensor v0.1.0 (/somewhere)\nhalf v2.7.1 (*)\n\n";
        let expected = ["half", "lapidary-graph", "lapidary-tensor"].map(str::to_owned);
        assert_eq!(names(tree), BTreeSet::from(expected));
    }

    #[test]
    fn a_forbidden_edge_is_named() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let members = set(&["lapidary-checkpoint", "lapidary-graph", "lapidary-tensor", "stranger"]);
        let used = set(&["lapidary-checkpoint", "lapidary-graph", "lapidary-tensor", "zstd"]);
        let found = violations("lapidary-checkpoint", &used, &members);
        assert_eq!(found, ["lapidary-checkpoint must not depend on lapidary-graph"]);
        assert_eq!(violations("stranger", &used, &members), ["stranger is not in the table of allowed edges"]);
        assert!(violations("lapidary-graph", &set(&["lapidary-graph", "lapidary-tensor"]), &members).is_empty());
    }

    #[test]
    fn the_table_has_no_cycle() {
        for (name, uses) in ALLOWED {
            for other in *uses {
                let back = ALLOWED.iter().find(|(n, _)| n == other).map(|(_, u)| *u).unwrap_or_default();
                assert!(!back.contains(name), "{name} and {other} may use each other");
            }
        }
    }

    #[test]
    fn this_workspace_keeps_the_rules() {
        check(&crate::root().unwrap()).unwrap();
    }
}
