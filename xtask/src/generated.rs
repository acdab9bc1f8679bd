//! Files that are generated from tables in the code.

use std::path::Path;

use anyhow::{Result, bail};

/// Path and content of every generated file.
fn files() -> [(&'static str, String); 2] {
    [("configs/base.yml", config::base_yaml()), ("docs/reference/config.md", config::reference_markdown())]
}

/// Writes those that differ.
pub(crate) fn write(root: &Path) -> Result<()> {
    for (name, content) in files() {
        let path = root.join(name);
        if fs_err::read_to_string(&path).is_ok_and(|found| found == content) {
            println!("    {name} is up to date");
            continue;
        }
        if let Some(parent) = path.parent() {
            fs_err::create_dir_all(parent)?;
        }
        fs_err::write(&path, content)?;
        println!("    {name} written");
    }
    Ok(())
}

/// Compares them with what is on disk.
pub(crate) fn check(root: &Path) -> Result<()> {
    let stale: Vec<&str> = files()
        .into_iter()
        .filter(|(name, content)| fs_err::read_to_string(root.join(name)).ok().as_ref() != Some(content))
        .map(|(name, _)| name)
        .collect();
    if !stale.is_empty() {
        bail!("out of date: {}; run `cargo xtask docs`", stale.join(", "));
    }
    Ok(())
}
