//! What conversion does when bytes rot or the process dies, through the command line.
//!
//! Few trials run by default. `LAPIDARY_FAULTS=full cargo test -p lapidary --test it faults -- --nocapture` flips 1000 bits of
//! each layout and kills 20 conversions each way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use engine::rng::Philox;

use crate::{Run, command, lapidary, run};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name).join("model")
}

/// The number of trials: few, or as many as the documentation tells of.
fn trials(few: usize, full: usize) -> usize {
    if std::env::var_os("LAPIDARY_FAULTS").is_some_and(|v| v == "full") { full } else { few }
}

/// A conversion that writes the same bytes whenever it runs.
fn convert(from: &Path, to: &Path, format: &str, extra: &[&str]) -> std::process::Command {
    let mut args = vec!["convert", text(from), text(to), "--to", format, "--json"];
    args.extend(extra);
    let mut command = command(&args);
    command.env("SOURCE_DATE_EPOCH", "1700000000");
    command
}

/// Every file below a directory. The commit file of Orbax is left out where it names the moment or place of a commit.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs_err::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, out);
            } else {
                out.insert(path.strip_prefix(root).unwrap().to_owned(), fs_err::read(&path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(root, root, &mut out);
    out
}

/// Numbers below a bound, the same in every run.
struct Draw {
    philox: Philox,
    next: u64,
}

impl Draw {
    fn new(seed: u64) -> Self {
        Draw { philox: Philox::new(seed, "faults"), next: 0 }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next += 1;
        let [a, b, ..] = self.philox.block([self.next as u32, 0, 0, 0]);
        (u64::from(a) << 32 | u64::from(b)) % n.max(1)
    }
}

/// What came of a number of flips.
#[derive(Debug, Default, PartialEq, Eq)]
struct Flips {
    /// `convert` failed and left nothing.
    refused: usize,
    /// `convert` wrote the very same bytes; `inspect --stats` or `diff` told the damage.
    told: usize,
    /// All three gave what they give for the undamaged checkpoint.
    harmless: usize,
    /// Files in which harmless bits lay.
    harmless_in: BTreeMap<String, usize>,
}

/// Flips single bits of a converted checkpoint, one at a time: half of them anywhere by size, half in any file alike, so
/// that small files of metadata get their share.
fn flip(count: usize, seed: u64, options: &[&str]) -> Flips {
    let source = golden("e2b");
    let tmp = tempfile::tempdir().unwrap();
    let (mt, back) = (tmp.path().join("mt"), tmp.path().join("back"));
    run(convert(&source, &mt, "maxtext", options)).exits(0);
    run(convert(&mt, &back, "hf", &[])).exits(0);
    let want = files(&back);
    fs_err::remove_dir_all(&back).unwrap();
    let stored = files(&mt);
    let total: u64 = stored.values().map(|b| b.len() as u64).sum();
    let full: Vec<(&PathBuf, &Vec<u8>)> = stored.iter().filter(|(_, b)| !b.is_empty()).collect();
    let mut draw = Draw::new(seed);
    let mut out = Flips::default();
    for i in 0..count {
        let (name, bytes, at) = if i % 2 == 0 {
            let mut at = draw.below(total);
            let found = full.iter().find(|(_, b)| {
                let here = at < b.len() as u64;
                at -= if here { 0 } else { b.len() as u64 };
                here
            });
            let (name, bytes) = found.unwrap();
            (*name, *bytes, at as usize)
        } else {
            let (name, bytes) = full[draw.below(full.len() as u64) as usize];
            (name, bytes, draw.below(bytes.len() as u64) as usize)
        };
        let bit = draw.below(8);
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << bit;
        fs_err::write(mt.join(name), damaged).unwrap();
        let what = format!("bit {bit} of byte {at} in {}", name.display());
        let clean = |r: &Run| assert!(matches!(r.code, 0..=2) && !r.stderr.contains("panicked"), "{what}: {r:#?}");
        let converted = run(convert(&mt, &back, "hf", &[]));
        clean(&converted);
        if converted.code == 0 {
            // Nothing may come through: the output is the same byte for byte.
            assert!(files(&back) == want, "SILENT: {what}");
            let inspected = lapidary(&["inspect", text(&mt), "--stats"]);
            let compared = lapidary(&["diff", text(&mt), text(&source)]);
            clean(&inspected);
            clean(&compared);
            if inspected.code != 0 || compared.code != 0 {
                out.told += 1;
            } else {
                out.harmless += 1;
                *out.harmless_in.entry(name.display().to_string()).or_default() += 1;
            }
            fs_err::remove_dir_all(&back).unwrap();
        } else {
            assert!(!back.exists(), "{what}: a refused conversion left its target");
            out.refused += 1;
        }
        fs_err::write(mt.join(name), bytes).unwrap();
    }
    run(convert(&mt, &back, "hf", &[])).exits(0);
    assert!(files(&back) == want, "a trial was not undone");
    assert_eq!(out.refused + out.told + out.harmless, count);
    out
}

#[test]
fn flipped_bits_never_come_through() {
    let layouts = [(11, &[][..]), (12, &["--zstd"]), (13, &["--pathways"])];
    for (seed, options) in layouts {
        let count = trials(20, 1000);
        let flips = flip(count, seed, options);
        println!("{options:?}: {flips:?}");
        // What is left lies in padding, in times, and in the two marks of a finished write.
        assert!(flips.refused > count / 2, "{flips:?}");
    }
}

/// A checkpoint that takes long enough to write to be interrupted.
fn larger(dir: &Path) {
    let words = "model_name=tiny-e2b vocab_size=65536 vocab_size_per_layer_input=65536 base_emb_dim=256 \
                 hidden_size_per_layer_input=32 override_model_config=true --vary-norms";
    let args: Vec<&str> = ["init", text(dir)].into_iter().chain(words.split_whitespace()).collect();
    lapidary(&args).exits(0);
}

/// What came of a number of kills.
#[derive(Debug, Default)]
struct Kills {
    /// Before anything was staged.
    nothing: usize,
    /// In the middle, with a staging directory left.
    partial: usize,
    /// After the target appeared.
    complete: usize,
    /// Continued runs that found finished data.
    resumed: usize,
    /// The most that one found.
    most_resumed_bytes: u64,
}

/// Kills a conversion at random moments; whatever is left, `--resume` must end with the same bytes.
fn kill(from: &Path, format: &str, count: usize, seed: u64) -> Kills {
    let tmp = tempfile::tempdir().unwrap();
    let (reference, place) = (tmp.path().join("reference"), tmp.path().join("place"));
    let target = place.join("out");
    let time = |target: &Path| {
        let start = Instant::now();
        run(convert(from, target, format, &[])).exits(0);
        start.elapsed()
    };
    let mut whole = time(&reference).min(time(&tmp.path().join("again")));
    let comparable = |dir: &Path| {
        let mut all = files(dir);
        // They tell the path of the write.
        all.retain(|name, _| !name.ends_with("commit_success.txt") && !name.ends_with(checkpoint::orbax::CHECKSUMS));
        all
    };
    let want = comparable(&reference);
    let mut draw = Draw::new(seed);
    let mut out = Kills::default();
    while out.nothing + out.partial + out.complete < count {
        fs_err::create_dir(&place).unwrap();
        let wait = Duration::from_nanos(draw.below(u64::try_from(whole.as_nanos()).unwrap()));
        let mut child = convert(from, &target, format, &[]);
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(wait);
        if child.try_wait().unwrap().is_some() {
            // Too late to kill it: other work on the machine made the measured time too long.
            whole = whole * 3 / 4;
            fs_err::remove_dir_all(&place).unwrap();
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let finished = if format == "maxtext" { target.join("0") } else { target.clone() };
        // Every directory around that could be taken for the result.
        let mut seen = Vec::new();
        for base in [&place, &target] {
            let Ok(entries) = fs_err::read_dir(base) else { continue };
            seen.extend(entries.map(|e| e.unwrap().path()).filter(|p| p.is_dir() && *p != target && *p != finished));
        }
        for dir in &seen {
            let opened = lapidary(&["inspect", text(dir)]);
            assert_ne!(opened.code, 0, "{} after {wait:?} opens: {opened:#?}", dir.display());
        }
        if finished.exists() {
            lapidary(&["inspect", text(&finished), "--stats"]).exits(0);
            assert!(comparable(&target) == want, "what appeared after {wait:?} is not complete");
            out.complete += 1;
        } else {
            let partial = !seen.is_empty();
            *(if partial { &mut out.partial } else { &mut out.nothing }) += 1;
            let report = run(convert(from, &target, format, &["--resume"])).exits(0).json();
            let found = report["resumed_bytes"].as_u64().unwrap();
            out.resumed += usize::from(found > 0);
            out.most_resumed_bytes = out.most_resumed_bytes.max(found);
            assert!(comparable(&target) == want, "after {wait:?} and --resume ({found} bytes) the files differ");
        }
        fs_err::remove_dir_all(&place).unwrap();
    }
    out
}

#[test]
fn a_killed_conversion_is_continued() {
    let count = trials(3, 20);
    let tmp = tempfile::tempdir().unwrap();
    let (hf, mt) = (tmp.path().join("hf"), tmp.path().join("mt"));
    larger(&hf);
    run(convert(&hf, &mt, "maxtext", &[])).exits(0);
    for (from, format, seed) in [(&hf, "maxtext", 21), (&mt, "hf", 22)] {
        let kills = kill(from, format, count, seed);
        println!("to {format}: {kills:?}");
        assert_eq!(kills.nothing + kills.partial + kills.complete, count);
    }
}
