//! `lapidary doctor`: what this machine has, what is missing, what to do.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use engine::runtime::executable_cache_dir;
use pjrt::plugins::{LocateOptions, Located, cache_dir, locate};
use pjrt::{Client, ClientOptions, CompileOptions, Plugin};
use serde::Serialize;
use serde_json::{Value, json};
use tensor::HostArray;

use super::plugin::origin_name;
use super::{CommandResult, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// Look at this machine: engine, caches, processor, memory, disk, and the tools that fetch.
///
/// Every line is `ok`, `warn` (works, but slower or with less) or `fail` (needed and missing), with a hint where
/// something is off. Nothing is downloaded unless --fetch is given.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Download the plugin if it is not there.
    #[arg(long)]
    fetch: bool,
    /// Look at this plugin instead of the one that would be found.
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary doctor
  lapidary doctor --fetch
  lapidary doctor --json | jq '.checks[] | select(.status != \"ok\")'

Exit code 0: nothing needed is missing. 1: something is.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
}

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found, in a phrase.
    found: String,
    hint: Option<String>,
    /// The same for programs.
    data: Value,
}

impl Check {
    fn new(name: &'static str, found: impl Into<String>, data: Value) -> Self {
        Check { name, status: Status::Ok, found: found.into(), hint: None, data }
    }

    fn warn(mut self, hint: impl Into<String>) -> Self {
        self.status = self.status.max(Status::Warn);
        self.hint = Some(hint.into());
        self
    }

    fn fail(mut self, hint: impl Into<String>) -> Self {
        self.status = Status::Fail;
        self.hint = Some(hint.into());
        self
    }
}

impl Status {
    fn max(self, other: Self) -> Self {
        if self == Status::Fail { self } else { other }
    }

    fn word(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

/// Free space below which a fetch or a compilation may fail: a plugin unpacks to 0.2 GB, compiled programs follow.
const LITTLE_DISK: u64 = 2_000_000_000;
/// What the weights of E2B take on a device, its per-layer table left in the file: 2.28 billion times 2 bytes.
const E2B_BF16: u64 = 4_600_000_000;

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let (plugin, located) = plugin(ui, args);
    let mut checks = vec![plugin];
    checks.extend(located.as_ref().map(engine));
    checks.push(fetchers(located.is_some()));
    checks.push(executable_cache());
    checks.push(disk());
    let info = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
    checks.push(processor(&info));
    checks.push(cores(&info));
    checks.push(memory(
        &fs_err::read_to_string("/proc/meminfo").unwrap_or_default(),
        fs_err::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|s| s.trim().parse().ok()),
    ));
    checks.push(environment(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())));
    let missing = checks.iter().filter(|c| c.status == Status::Fail).count();
    let warnings = checks.iter().filter(|c| c.status == Status::Warn).count();
    if args.json {
        ui.json(&json!({ "lapidary": env!("CARGO_PKG_VERSION"), "ok": missing == 0, "checks": checks }))?;
    } else {
        ui.data(text(&checks));
        ui.say(match (missing, warnings) {
            (0, 0) => "all is well".to_owned(),
            (0, n) => format!("all that is needed is here; {n} of {} could be better", checks.len()),
            (n, _) => format!("{n} of {} things needed are missing", checks.len()),
        });
    }
    Ok(if missing == 0 { Outcome::Yes } else { Outcome::No })
}

fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for c in checks {
        lines.push(format!("{:4}  {:width$}  {}", c.status.word(), c.name, c.found));
        lines.extend(c.hint.as_ref().map(|hint| format!("      {:width$}  hint: {hint}", "")));
    }
    lines.join("\n")
}

fn plugin(ui: &Ui, args: &Args) -> (Check, Option<Located>) {
    let progress = |step: &str| ui.say(step);
    let options = LocateOptions {
        path: args.plugin.clone(),
        allow_download: args.fetch && !super::is_offline(false),
        progress: Some(&progress),
        ..LocateOptions::default()
    };
    match locate("cpu", &options) {
        Ok(located) => {
            let origin = origin_name(located.origin);
            let data = json!({
                "path": located.path,
                "origin": origin,
                "sha256": located.sha256,
                "pinned": located.pinned.is_some(),
                "package": located.pinned.map(|p| p.package),
                "version": located.pinned.map(|p| p.version),
            });
            let check = match located.pinned {
                Some(p) => {
                    let found = format!(
                        "{} {}, SHA-256 as pinned, {} ({origin})",
                        p.package,
                        p.version,
                        located.path.display()
                    );
                    Check::new("plugin", found, data)
                }
                None => Check::new("plugin", format!("{}, not a pinned one ({origin})", located.path.display()), data)
                    .warn("figures and proofs of this project were made with the pinned ones: `lapidary plugin list`"),
            };
            (check, Some(located))
        }
        Err(error) => {
            let data = json!({ "error": error.to_string() });
            let hint = if args.fetch { "see above, then `lapidary plugin fetch`" } else { "`lapidary plugin fetch`" };
            (Check::new("plugin", error.to_string(), data).fail(hint), None)
        }
    }
}

/// Loads the plugin and lets it compute something.
fn engine(located: &Located) -> Check {
    let start = Instant::now();
    match one_plus_one(&located.path) {
        Ok((plugin, platform)) => {
            let (major, minor) = plugin.api_version();
            let stablehlo = plugin.stablehlo_version();
            let found = format!(
                "{platform}, PJRT {major}.{minor}, StableHLO {}; started, compiled and ran in {}",
                stablehlo.as_deref().unwrap_or("unknown"),
                seconds(start.elapsed())
            );
            let data = json!({
                "platform": platform,
                "pjrt_api": format!("{major}.{minor}"),
                "stablehlo": stablehlo,
                "seconds": start.elapsed().as_secs_f64(),
            });
            Check::new("engine", found, data)
        }
        Err(failure) => Check::new("engine", failure.message(), json!({ "error": failure.message() }))
            .fail("this plugin does not run here; `lapidary plugin list` shows others, --plugin FILE tries one"),
    }
}

fn one_plus_one(path: &Path) -> Result<(std::sync::Arc<Plugin>, String), Failure> {
    const PROGRAM: &str = "func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
        %y = stablehlo.add %x, %x : tensor<2xf32>
        return %y : tensor<2xf32>
    }";
    let plugin = Plugin::load(path)?;
    let client = Client::new(&plugin, &ClientOptions::cpu(1))?;
    let program = client.compile(PROGRAM, &CompileOptions::default())?;
    let x = client.buffer_from_host(&HostArray::from_slice([2], &[1.0f32, -0.5])?, 0)?;
    let results = program.execute(&[&x])?;
    let sum = results.first().ok_or_else(|| Failure::run("the plugin gave no result"))?.to_host()?;
    if sum.as_slice::<f32>()? != [2.0, -1.0] {
        return Err(Failure::run(format!("the plugin computed {:?} instead of [2, -1]", sum.to_f64())));
    }
    Ok((plugin, client.platform_name().to_owned()))
}

/// The programs that can download a plugin.
fn fetchers(have_plugin: bool) -> Check {
    let version = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().next().unwrap_or_default().trim();
        // pip adds where it is installed.
        let line = line.split(" from ").next().unwrap_or_default();
        (output.status.success() && !line.is_empty()).then(|| line.to_owned())
    };
    let python = version("python3", &["--version"]).or_else(|| version("python", &["--version"]));
    let pip = version("python3", &["-m", "pip", "--version"])
        .or_else(|| version("python", &["-m", "pip", "--version"]))
        .or_else(|| version("pip3", &["--version"]))
        .or_else(|| version("pip", &["--version"]));
    let uv = version("uv", &["--version"]);
    let data = json!({ "python": python, "pip": pip, "uv": uv });
    let can_fetch = pip.is_some() || uv.is_some();
    let list: Vec<String> = [python, pip, uv].into_iter().flatten().collect();
    let found = if list.is_empty() { "neither python nor pip nor uv".to_owned() } else { list.join(", ") };
    let check = Check::new("fetching", found, data);
    match (can_fetch, have_plugin) {
        (true, _) => check,
        (false, true) => check.warn("the plugin is here, so nothing is needed now; other plugins want pip or uv"),
        (false, false) => check.fail("install pip or uv, or copy a plugin here and name it with LAPIDARY_PJRT_PLUGIN"),
    }
}

fn executable_cache() -> Check {
    const NAME: &str = "program cache";
    let Some(dir) = executable_cache_dir() else {
        return Check::new(NAME, "none: LAPIDARY_CACHE_DIR, XDG_CACHE_HOME and HOME are not set", json!({}))
            .warn("set LAPIDARY_CACHE_DIR, or every start compiles its programs anew");
    };
    let (mut entries, mut size) = (0u64, 0u64);
    for entry in fs_err::read_dir(&dir).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "exe")
            && let Ok(metadata) = entry.metadata()
        {
            entries += 1;
            size += metadata.len();
        }
    }
    let data = |writable| json!({ "path": dir, "writable": writable, "entries": entries, "bytes": size });
    let found = format!("{}, {entries} programs, {}", dir.display(), bytes(size));
    match try_writing(&dir) {
        Ok(()) => Check::new(NAME, found, data(true)),
        Err(error) => Check::new(NAME, format!("{found}, cannot be written: {error}"), data(false))
            .warn("make it writable or set LAPIDARY_CACHE_DIR, or every start compiles its programs anew"),
    }
}

/// Writes and removes a file, since permissions alone do not tell.
fn try_writing(dir: &Path) -> std::io::Result<()> {
    fs_err::create_dir_all(dir)?;
    let path = dir.join(format!(".doctor-{}", std::process::id()));
    let written = fs_err::File::create(&path).and_then(|mut file| file.write_all(b"doctor"));
    let removed = fs_err::remove_file(&path);
    written.and(removed)
}

fn disk() -> Check {
    const NAME: &str = "disk";
    let Ok(cache) = cache_dir() else {
        return Check::new(NAME, "there is no cache directory to look at", json!({})).warn("set LAPIDARY_CACHE_DIR");
    };
    // The cache may not be there yet; the disk is that of the nearest directory that is.
    let Some(dir) = cache.ancestors().find(|d| d.is_dir()) else {
        return Check::new(NAME, format!("{}: no such directory", cache.display()), json!({}))
            .warn("set LAPIDARY_CACHE_DIR");
    };
    match rustix::fs::statvfs(dir) {
        Ok(s) => {
            let free = s.f_bavail.saturating_mul(s.f_frsize);
            let total = s.f_blocks.saturating_mul(s.f_frsize);
            let data = json!({ "path": dir, "free_bytes": free, "total_bytes": total });
            let found = format!("{} free of {} at {}", bytes(free), bytes(total), dir.display());
            let check = Check::new(NAME, found, data);
            if free < LITTLE_DISK {
                check.warn("plugin and compiled programs want 2 GB; free some, or set LAPIDARY_CACHE_DIR")
            } else {
                check
            }
        }
        Err(error) => Check::new(NAME, format!("{}: {error}", dir.display()), json!({})).warn("look at the disk"),
    }
}

/// The value of the first line `name : value` of /proc/cpuinfo.
fn cpuinfo_value<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().filter_map(|line| line.split_once(':')).find(|(n, _)| n.trim() == name).map(|(_, v)| v.trim())
}

fn processor(info: &str) -> Check {
    // x86-64 and Arm call the list differently.
    let flags = cpuinfo_value(info, "flags").or_else(|| cpuinfo_value(info, "Features")).unwrap_or_default();
    let flags: BTreeSet<&str> = flags.split_whitespace().collect();
    let model = cpuinfo_value(info, "model name").unwrap_or(std::env::consts::ARCH);
    let interesting: &[&str] = if flags.contains("asimd") {
        &["asimd", "sve", "bf16", "i8mm"]
    } else {
        &["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    };
    let features: serde_json::Map<String, Value> =
        interesting.iter().map(|f| ((*f).to_owned(), json!(flags.contains(f)))).collect();
    let list = |present: bool| {
        let words: Vec<&str> = interesting.iter().copied().filter(|f| flags.contains(f) == present).collect();
        if words.is_empty() { "none".to_owned() } else { words.join(" ") }
    };
    if flags.is_empty() {
        return Check::new("processor", format!("{model}, instruction sets not known"), json!({ "model": model }))
            .warn("nothing can be said about its speed");
    }
    let found = format!("{model}: has {}; lacks {}", list(true), list(false));
    let check = Check::new("processor", found, json!({ "model": model, "features": features }));
    let has = |f: &str| flags.contains(f);
    if !has("avx2") && !has("asimd") {
        check.warn("without wide vectors everything is slow; fine for small models only")
    } else if !has("avx512_bf16") && !has("amx_bf16") && !has("bf16") {
        check.warn("no bfloat16 products in hardware: float32 may be as fast as bfloat16 here, at twice the memory")
    } else {
        check
    }
}

fn cores(info: &str) -> Check {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let there = info.lines().filter(|line| line.starts_with("processor")).count().max(usable);
    let data = json!({ "usable": usable, "online": there });
    let check = Check::new("cores", format!("{usable} usable of {there}"), data);
    if usable == 1 { check.warn("one core: expect half the speed of a small machine or less") } else { check }
}

/// From /proc/meminfo, and the limit of the control group in bytes.
fn memory(info: &str, limit: Option<u64>) -> Check {
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let (Some(total), Some(available)) = (field("MemTotal"), field("MemAvailable")) else {
        return Check::new("memory", "not known", json!({ "limit_bytes": limit })).warn("there is no /proc/meminfo");
    };
    let usable = limit.map_or(available, |l| l.min(available));
    let data = json!({ "total_bytes": total, "available_bytes": available, "limit_bytes": limit });
    let mut found = format!("{} available of {}", bytes(available), bytes(total));
    if let Some(limit) = limit.filter(|l| *l < total) {
        found += &format!(", limited to {}", bytes(limit));
    }
    let check = Check::new("memory", found, data);
    if usable < 2 * E2B_BF16 {
        check.warn(format!(
            "weights of E2B take {} in bfloat16 and {} in float32, and activations come on top",
            bytes(E2B_BF16),
            bytes(2 * E2B_BF16)
        ))
    } else {
        check
    }
}

/// Variables that change what the program does.
fn environment(names: impl Iterator<Item = String>) -> Check {
    let mut set: Vec<String> = names.filter(|n| n.starts_with("LAPIDARY_") || n == "XLA_FLAGS").collect();
    set.sort();
    let data = json!({ "set": set });
    let found = if set.is_empty() { "no LAPIDARY_ variable, no XLA_FLAGS".to_owned() } else { set.join(", ") };
    let check = Check::new("environment", found, data);
    if set.iter().any(|n| n == "XLA_FLAGS") {
        return check.warn("XLA_FLAGS changes what programs compile to, speed and rounding included");
    }
    let reserved = |n: &str| config::keys::RESERVED_VARIABLES.iter().any(|(name, _)| *name == n);
    let is_key = |n: &str| config::keys::all().any(|k| k.variable() == n);
    match set.iter().find(|n| !reserved(n) && !is_key(n)) {
        Some(odd) => check.warn(format!("{odd} sets no key; `lapidary config show` reports such problems")),
        None => check,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors() {
        let zen = "processor\t: 0\nmodel name\t: Zen\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\n";
        let c = processor(zen);
        assert_eq!((c.status, c.data["features"]["avx512_bf16"].as_bool()), (Status::Ok, Some(true)));
        assert_eq!(c.found, "Zen: has avx2 avx512f avx512_bf16; lacks amx_tile amx_bf16");
        assert_eq!(processor("flags : fpu avx2").status, Status::Warn);
        assert_eq!(processor("Features : asimd bf16").status, Status::Ok);
        assert_eq!(processor("").status, Status::Warn);
        assert!(cores(zen).data["online"].as_u64() >= Some(2));
    }

    #[test]
    fn memory_is_what_the_control_group_leaves() {
        let info = "MemTotal:       25165824 kB\nMemFree: 1 kB\nMemAvailable:   20971520 kB\n";
        assert_eq!(memory(info, None).status, Status::Ok);
        let c = memory(info, Some(4_000_000_000));
        assert_eq!(c.status, Status::Warn);
        assert_eq!(c.found, "21.47 GB available of 25.77 GB, limited to 4.00 GB");
        assert_eq!(memory("nonsense", None).status, Status::Warn);
        assert_eq!(memory("MemTotal: x kB\nMemAvailable: 99999999999999999999 kB", None).status, Status::Warn);
    }

    #[test]
    fn variables() {
        let of = |names: &[&str]| environment(names.iter().map(|n| (*n).to_owned()));
        assert_eq!(of(&["PATH", "HOME"]).status, Status::Ok);
        assert_eq!(of(&["LAPIDARY_STEPS", "LAPIDARY_OFFLINE"]).status, Status::Ok);
        assert!(of(&["LAPIDARY_STEP"]).hint.unwrap().contains("LAPIDARY_STEP "));
        assert_eq!(of(&["XLA_FLAGS"]).status, Status::Warn);
    }

    #[test]
    fn a_failure_outlives_a_warning() {
        let c = Check::new("x", "y", json!({})).fail("f").warn("w");
        assert_eq!(c.status, Status::Fail);
        assert_eq!(text(&[Check::new("a", "b", json!({})).warn("do")]), "warn  a  b\n         hint: do");
    }
}
