//! Tidiness: what no compiler looks at.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Lines of a source file, tests apart, from which it should be split.
const SOFT_LINES: usize = 500;
/// Lines that it must not exceed.
const HARD_LINES: usize = 900;

/// Generated code and tables, which may be long.
const LONG: &[&str] = &["crates/pjrt/src/sys", "crates/config/src/keys/"];

/// Directories that are not part of the project.
const SKIPPED: &[&str] = &["target", ".git", "corpus", "artifacts", "__pycache__", ".venv", "node_modules"];

/// Text that must not stay behind in code. Written in two parts, so that this file passes itself.
const LEFT_OVER: &[(&str, &str)] = &[
    (concat!("todo", "!("), "unfinished code"),
    (concat!("unimplemented", "!("), "unfinished code"),
    (concat!("dbg", "!("), "debugging output"),
    (concat!("#[ig", "nore"), "a test that does not run"),
];

/// Beginnings of paths that exist on one machine only.
const MACHINE_PATHS: &[&str] =
    &[concat!("/ho", "me/"), concat!("/Us", "ers/"), concat!("/ro", "ot/"), concat!("/wo", "rk/")];

/// Checks every text file of the project.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    let mut files = Vec::new();
    walk(root, root, &mut files)?;
    files.sort();
    let mut count = 0;
    for name in &files {
        if !is_text(name) {
            continue;
        }
        count += 1;
        match fs_err::read_to_string(root.join(name)) {
            Ok(text) => {
                let found = judge(&name.to_string_lossy(), &text);
                wrong.extend(found.errors);
                for warning in found.warnings {
                    println!("    warning: {warning}");
                }
            }
            Err(error) => wrong.push(format!("{error}")),
        }
    }
    wrong.extend(licences(root, &files));
    if !wrong.is_empty() {
        bail!("\n  {}", wrong.join("\n  "));
    }
    println!("    {count} files");
    Ok(())
}

fn walk(root: &Path, dir: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if !SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
                walk(root, &entry.path(), out)?;
            }
        } else if kind.is_file()
            && let Ok(name) = entry.path().strip_prefix(root)
        {
            out.push(name.to_path_buf());
        }
    }
    Ok(())
}

fn is_text(name: &Path) -> bool {
    let by_extension = name
        .extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|extension| ["rs", "md", "toml", "yml", "yaml", "py", "sh"].contains(&extension));
    by_extension || name == Path::new(".ci/run")
}

#[derive(Default)]
struct Found {
    errors: Vec<String>,
    warnings: Vec<String>,
}

fn judge(name: &str, text: &str) -> Found {
    let mut found = Found::default();
    let is_rust = name.ends_with(".rs");
    for (number, line) in (1..).zip(text.lines()) {
        let mut error = |what: &str| found.errors.push(format!("{name}:{number}: {what}"));
        if line.contains('\t') {
            error("a tab");
        }
        if line.ends_with(' ') {
            error("blanks at the end of the line");
        }
        if let Some(path) = MACHINE_PATHS.iter().find(|path| names_path(line, path)) {
            error(&format!("a path of one machine ({path})"));
        }
        if let Some((text, what)) = LEFT_OVER.iter().find(|(text, _)| is_rust && line.contains(text)) {
            error(&format!("{what} ({text})"));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        found.errors.push(format!("{name}: no line feed at the end"));
    }
    if is_rust && !LONG.iter().any(|long| name.starts_with(long)) {
        let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        if lines > HARD_LINES {
            found.errors.push(format!("{name}: {lines} lines without tests, more than {HARD_LINES}"));
        } else if lines > SOFT_LINES {
            found.warnings.push(format!("{name}: {lines} lines without tests, better below {SOFT_LINES}"));
        }
    }
    found
}

/// Whether a line names the path itself, not a longer one that ends with it.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || "._-$}".contains(c)))
}

fn licences(root: &Path, files: &[PathBuf]) -> Vec<String> {
    let mut wrong = Vec::new();
    let licence = fs_err::read_to_string(root.join("LICENSE")).unwrap_or_default();
    if !licence.contains("Apache License") {
        wrong.push("LICENSE: the Apache License is missing".to_owned());
    }
    for manifest in files.iter().filter(|name| name.ends_with("Cargo.toml")) {
        let name = manifest.display();
        let text = fs_err::read_to_string(root.join(manifest)).unwrap_or_default();
        if !text.lines().any(|line| line.starts_with("license")) {
            wrong.push(format!("{name}: no licence"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(name: &str, text: &str) -> Vec<String> {
        judge(name, text).errors
    }

    #[test]
    fn left_overs_are_found() {
        let text = format!("fn f() {{\n    {}\n}}\n", LEFT_OVER[0].0);
        assert_eq!(errors("a.rs", &text), [format!("a.rs:2: unfinished code ({})", LEFT_OVER[0].0)]);
        assert!(errors("a.md", &text).is_empty());
        assert_eq!(
            errors("a.md", "a\tb\nc \nd"),
            ["a.md:1: a tab", "a.md:2: blanks at the end of the line", "a.md: no line feed at the end"]
        );
    }

    #[test]
    fn machine_paths_are_found() {
        assert_eq!(errors("a.md", &format!("see {}x\n", MACHINE_PATHS[0])).len(), 1);
        assert!(errors("a.md", &format!("see $HOME{}x\n", MACHINE_PATHS[0])).is_empty());
    }

    #[test]
    fn long_files_are_found_and_tests_do_not_count() {
        assert_eq!(errors("a.rs", &"x\n".repeat(HARD_LINES + 1)).len(), 1);
        assert_eq!(judge("a.rs", &"x\n".repeat(SOFT_LINES + 1)).warnings.len(), 1);
        let tested = format!("{}#[cfg(test)]\n{}", "x\n".repeat(SOFT_LINES), "x\n".repeat(HARD_LINES));
        assert!(judge("a.rs", &tested).warnings.is_empty() && errors("a.rs", &tested).is_empty());
        assert!(errors("crates/pjrt/src/sys/bindings.rs", &"x\n".repeat(HARD_LINES + 1)).is_empty());
    }
}
