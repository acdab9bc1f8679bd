//! `lapidary plugin`: the engine's plugins, and fetching one.

use std::path::{Path, PathBuf};

use pjrt::plugins::{LocateError, LocateOptions, Origin, PINNED, PinnedPlugin, cache_dir, locate, locate_tools};
use serde_json::json;

use super::{CommandResult, Failure, Outcome};
use crate::ui::Ui;

/// List the engine's plugins, or fetch one.
///
/// A plugin is XLA for one platform, as a shared library from a Python wheel. The version and both SHA-256 sums are
/// pinned in the program; what does not match is never loaded.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(List),
    Fetch(Fetch),
}

/// Known plugins, the preferred one of each platform first.
#[derive(Debug, clap::Args)]
#[command(after_help = LIST_EXAMPLES)]
struct List {
    /// Print as JSON, with whole hashes and paths.
    #[arg(long)]
    json: bool,
}

const LIST_EXAMPLES: &str = "\
Examples:
  lapidary plugin list
  lapidary plugin list --json | jq -r '.[] | select(.cached) | .path'

A plugin is looked for in this order: --plugin FILE, the variable LAPIDARY_PJRT_PLUGIN, the cache directory
($LAPIDARY_CACHE_DIR, else $XDG_CACHE_HOME/lapidary, else ~/.cache/lapidary), a download.";

/// Download a plugin with your own pip or uv, verify it, and print its path.
///
/// pip and uv know your mirror and proxy. Nothing is downloaded if a pinned plugin of the platform is in the cache. With the
/// plugin come the tools that its compiler calls (for CUDA: ptxas, nvlink and libdevice).
#[derive(Debug, clap::Args)]
#[command(after_help = FETCH_EXAMPLES)]
struct Fetch {
    /// cpu, cuda12, cuda13, rocm7 or tpu; cuda and rocm are the newest of theirs.
    #[arg(default_value = "cpu")]
    platform: String,
    /// Only look into the cache [environment LAPIDARY_OFFLINE=1].
    #[arg(long)]
    offline: bool,
    /// Print path, package, version, hash and origin as JSON.
    #[arg(long)]
    json: bool,
}

const FETCH_EXAMPLES: &str = "\
Examples:
  lapidary plugin fetch
  lapidary plugin fetch cuda13
  export LAPIDARY_PJRT_PLUGIN=$(lapidary plugin fetch --quiet)

For a machine without a network: fetch on another of the same kind, copy the file, and name it with
LAPIDARY_PJRT_PLUGIN or --plugin.";

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    match &args.command {
        Command::List(args) => list(ui, args),
        Command::Fetch(args) => fetch(ui, args),
    }
}

/// Where a pinned plugin lies once it is fetched. The version is part of the path.
fn cached_path(cache: &Path, plugin: &PinnedPlugin) -> PathBuf {
    let file = Path::new(plugin.file).file_name().unwrap_or_default();
    cache.join("plugins").join(format!("{}-{}", plugin.package, plugin.version)).join(file)
}

fn list(ui: &Ui, args: &List) -> CommandResult {
    let cache = cache_dir().ok();
    let rows: Vec<(&PinnedPlugin, Option<PathBuf>, bool)> = PINNED
        .iter()
        .map(|p| {
            let path = cache.as_deref().map(|c| cached_path(c, p));
            let cached = path.as_deref().is_some_and(Path::is_file);
            (p, path, cached)
        })
        .collect();
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(p, path, cached)| {
                json!({
                    "platform": p.platform,
                    "package": p.package,
                    "version": p.version,
                    "target": p.target,
                    "file": p.file,
                    "sha256": { "wheel": p.pin.wheel, "library": p.pin.library },
                    "cached": cached,
                    "path": path,
                    "note": p.note,
                })
            })
            .collect();
        ui.json(&rows)?;
        return Ok(Outcome::Yes);
    }
    let width = |f: fn(&PinnedPlugin) -> &str| PINNED.iter().map(|p| f(p).len()).max().unwrap_or(0);
    let (platforms, packages, versions) = (width(|p| p.platform), width(|p| p.package), width(|p| p.version));
    let platforms = platforms.max("platform".len());
    ui.data(format!(
        "{:platforms$}  {:packages$}  {:versions$}  {:12}  {:12}  cached",
        "platform", "package", "version", "target", "sha256"
    ));
    for (p, _, cached) in &rows {
        ui.data(format!(
            "{:platforms$}  {:packages$}  {:versions$}  {:12}  {:12}  {}",
            p.platform,
            p.package,
            p.version,
            p.target,
            &p.pin.library[..12],
            if *cached { "yes" } else { "no" }
        ));
    }
    for (p, _, _) in &rows {
        ui.say(format!("{} {}: {}", p.package, p.version, p.note));
    }
    match &cache {
        Some(cache) => ui.say(format!("cache: {}", cache.join("plugins").display())),
        None => ui.say("cache: none, because neither LAPIDARY_CACHE_DIR nor XDG_CACHE_HOME nor HOME is set"),
    }
    Ok(Outcome::Yes)
}

/// What an origin is called.
pub(crate) fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Path => "given path",
        Origin::Environment => "environment",
        Origin::Cache => "cache",
        Origin::Download => "download",
    }
}

fn fetch(ui: &Ui, args: &Fetch) -> CommandResult {
    let progress = |step: &str| ui.say(step);
    let options = LocateOptions {
        allow_download: !super::is_offline(args.offline),
        // The question is what the table has, not what is named elsewhere.
        use_environment: false,
        progress: Some(&progress),
        ..LocateOptions::default()
    };
    let located = match locate(&args.platform, &options) {
        Ok(located) => located,
        Err(error @ LocateError::UnknownPlatform { .. }) => {
            return Err(Failure::usage(error).hint("`lapidary plugin list` shows the known ones"));
        }
        Err(error) => return Err(error.into()),
    };
    let tools = locate_tools(&args.platform, &options)?;
    if args.json {
        ui.json(&json!({
            "path": located.path,
            "tools": tools,
            "origin": origin_name(located.origin),
            "package": located.pinned.map(|p| p.package),
            "version": located.pinned.map(|p| p.version),
            "sha256": located.sha256,
        }))?;
        return Ok(Outcome::Yes);
    }
    if let Some(p) = located.pinned {
        let how = if located.origin == Origin::Download { "fetched" } else { "already in the cache" };
        ui.say(format!("{} {}: {how}, SHA-256 as pinned", p.package, p.version));
    }
    if let Some(tools) = tools {
        ui.say(format!("the tools its compiler calls: {}, SHA-256 as pinned", tools.display()));
    }
    ui.data(located.path.display().to_string());
    Ok(Outcome::Yes)
}
