//! `lapidary verify`, `init` and `quickstart` as a user runs them.
//!
//! The cases in `tests/golden` are tiny random checkpoints with outputs of Hugging Face transformers. A larger set is
//! used as well where `LAPIDARY_GOLDEN_DIR` names it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn lapidary(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lapidary")).args(args).output().expect("the binary runs")
}

fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

fn json(o: &Output) -> Value {
    serde_json::from_slice(&o.stdout).unwrap_or_else(|e| panic!("{e}: {}", stderr(o)))
}

/// The committed cases, and those of the larger set if there is one.
fn cases() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")];
    if let Some(dir) = std::env::var_os("LAPIDARY_GOLDEN_DIR") {
        roots.push(dir.into());
    }
    let mut cases = Vec::new();
    for root in roots {
        let before = cases.len();
        for entry in std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display())) {
            let path = entry.unwrap().path();
            if path.join("golden.safetensors").is_file() {
                cases.push(path);
            }
        }
        assert!(cases.len() > before, "{} holds no cases", root.display());
    }
    cases.sort();
    cases
}

fn committed(name: &str) -> (String, String) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let path = |p: &str| dir.join(p).to_str().unwrap().to_owned();
    (path("model"), path("golden.safetensors"))
}

/// Runs one case and returns `verdict`.
fn verify(case: &Path, extra: &[&str]) -> (Option<i32>, Value) {
    let (model, golden) = (case.join("model"), case.join("golden.safetensors"));
    let mut args = vec!["verify", model.to_str().unwrap(), "--golden", golden.to_str().unwrap(), "--json"];
    args.extend(extra);
    let o = lapidary(&args);
    (o.status.code(), json(&o)["verdict"].clone())
}

#[test]
fn every_case_agrees_with_hugging_face() {
    for case in cases() {
        let (code, v) = verify(&case, &["--max-kl-div", "1e-6", "--max-abs-diff", "2e-4", "--trace"]);
        assert_eq!(code, Some(0), "{}: {v:#}", case.display());
        assert_eq!(v["passed"], true);
        assert!(v["trace"].as_array().unwrap().len() > 4, "{}", case.display());
        assert!(v["overall"]["tokens"].as_u64().unwrap() > 10, "{}", case.display());
    }
}

#[test]
fn plain_float32_arithmetic_agrees_too() {
    for case in cases() {
        // The reference's own rounding is up to 9e-6 of the largest logit on these models, ours is of the same kind.
        let (code, v) = verify(&case, &["--arithmetic", "float32", "--max-kl-div", "1e-6", "--trace"]);
        assert_eq!(code, Some(0), "{}: {v:#}", case.display());
        assert_eq!(v["arithmetic"], "float32");
        assert!(v["overall"]["max_abs_diff"].as_f64().unwrap() < 5e-4, "{}: {v:#}", case.display());
    }
}

#[test]
fn bfloat16_is_close_and_not_equal() {
    for case in cases() {
        let (_, v) = verify(&case, &["--dtype", "bfloat16", "--max-kl-div", "10"]);
        let mean = v["overall"]["mean_abs_diff"].as_f64().unwrap();
        // Random tiny models amplify rounding; logits are of size 20.
        assert!(mean > 1e-3 && mean < 1.0, "{}: {mean}", case.display());
    }
}

#[test]
fn a_wrong_model_is_a_no_that_names_the_first_layer() {
    let (model, golden) = committed("e2b");
    let dir = tempfile::tempdir().unwrap();
    let wrong = dir.path().join("model");
    copy_dir(Path::new(&model), &wrong);
    // A dropped window: every position sees twice as far.
    let config = std::fs::read_to_string(wrong.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["sliding_window"] = 16.into();
    std::fs::write(wrong.join("config.json"), config.to_string()).unwrap();
    let o = lapidary(&["verify", wrong.to_str().unwrap(), "--golden", &golden, "--json", "--trace"]);
    assert_eq!(o.status.code(), Some(1), "{}", stderr(&o));
    let v = &json(&o)["verdict"];
    assert_eq!(v["passed"], false);
    // The embedding is right; layer 0 is the first with a window.
    assert_eq!(v["first_divergence"], "trace.0.attn");
}

#[test]
fn two_checkpoints_are_compared_without_a_golden_file() {
    let (model, _) = committed("win");
    let o = lapidary(&["verify", &model, "--against", &model, "--lengths", "1,3,9", "--json"]);
    assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    let v = &json(&o)["verdict"];
    assert_eq!(v["overall"]["max_abs_diff"], 0.0);
    assert_eq!(v["overall"]["tokens"], 13);
}

#[test]
fn a_report_is_json_and_a_card() {
    let (model, golden) = committed("keqv");
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("card.json");
    let o = lapidary(&["verify", &model, "--golden", &golden, "--report", report.to_str().unwrap()]);
    assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    let v: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(v["verdict"]["passed"], true);
    let card = std::fs::read_to_string(dir.path().join("card.md")).unwrap();
    assert!(card.contains("PASS") && card.contains("| all |"), "{card}");
}

#[test]
fn maxtext_golden_lines_are_read() {
    let (model, golden) = committed("keqv");
    // Rewrite the golden file as MaxText's JSONL, from its own JSON summary of the first row.
    let file = checkpoint::safetensors::SafetensorsFile::open(Path::new(&golden)).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let logits = file.tensor("logits").unwrap();
    let (s, v) = (logits.shape[1], logits.shape[2]);
    let id_bytes = ids.bytes.as_slice();
    let mut lines = String::new();
    for (row, n) in [(0, s), (1, s - 3)] {
        let tokens: Vec<i64> =
            (0..n).map(|p| i64::from_le_bytes(id_bytes[(row * s + p) * 8..][..8].try_into().unwrap())).collect();
        let rows: Vec<Vec<f32>> = (0..n)
            .map(|p| {
                let at = ((row * s + p) * v) * 4;
                logits.bytes.as_slice()[at..at + v * 4]
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect()
            })
            .collect();
        lines += &serde_json::json!({"prompt": format!("row {row}"), "tokens": tokens, "logits": rows}).to_string();
        lines.push('\n');
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("golden.jsonl");
    std::fs::write(&path, lines).unwrap();
    let o = lapidary(&["verify", &model, "--golden", path.to_str().unwrap(), "--max-kl-div", "1e-6", "--json"]);
    assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    assert_eq!(json(&o)["verdict"]["overall"]["tokens"], 2 * s - 3);
}

#[test]
fn broken_checkpoints_are_clean_errors() {
    let (model, golden) = committed("e2b");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let weights = path.join("model.safetensors");
    let run = |expect: &[&str]| {
        let o = lapidary(&["verify", path.to_str().unwrap(), "--golden", &golden]);
        let text = stderr(&o);
        assert!(matches!(o.status.code(), Some(1 | 2)), "{:?}: {text}", o.status);
        for part in expect {
            assert!(text.contains(part), "{part:?} not in {text}");
        }
        assert!(!text.contains("panicked"), "{text}");
    };
    // truncated in the data
    copy_dir(Path::new(&model), &path);
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    run(&["model.safetensors"]);
    // a header longer than the file
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&weights, &huge).unwrap();
    run(&["model.safetensors", "header"]);
    // a renamed tensor is missing, and named
    let mut renamed = bytes.clone();
    let at = renamed.windows(24).position(|w| w == b"layers.3.mlp.up_proj.wei").unwrap();
    renamed[at..at + 8].copy_from_slice(b"layerz.3");
    std::fs::write(&weights, &renamed).unwrap();
    run(&["layers.3.mlp.up_proj.weight"]);
    // another shape in the configuration
    std::fs::write(&weights, &bytes).unwrap();
    let text = std::fs::read_to_string(path.join("config.json")).unwrap();
    std::fs::write(path.join("config.json"), text.replace("\"intermediate_size\": 48", "\"intermediate_size\": 56"))
        .unwrap();
    run(&["mlp", "shape"]);
    // not JSON
    std::fs::write(path.join("config.json"), "{").unwrap();
    run(&["config.json"]);
    std::fs::remove_file(path.join("config.json")).unwrap();
    run(&["config.json"]);
}

#[test]
fn bad_usage_exits_with_2() {
    let (model, _) = committed("e2b");
    assert_eq!(lapidary(&["verify", &model]).status.code(), Some(2));
    assert_eq!(lapidary(&["verify", &model, "--golden", "x", "--dtype", "float16"]).status.code(), Some(2));
    let missing = lapidary(&["verify", "/nonexistent", "--golden", "/nonexistent.safetensors"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(stderr(&missing).contains("/nonexistent.safetensors"));
}

#[test]
fn init_is_reproducible_and_loads() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: &str| dir.path().join(n).to_str().unwrap().to_owned();
    for n in ["a", "b"] {
        let o = lapidary(&["init", &path(n), "model_name=tiny-e2b", "--seed", "3", "--shard-mb", "1"]);
        assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    }
    let files = |n: &str| {
        let mut names: Vec<_> = std::fs::read_dir(path(n)).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(files("a"), files("b"));
    for f in files("a") {
        let read = |n: &str| std::fs::read(Path::new(&path(n)).join(&f)).unwrap();
        assert!(read("a") == read("b"), "{f:?} differs");
    }
    let o = lapidary(&["verify", &path("a"), "--against", &path("b"), "--json"]);
    assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    // never overwritten without --force
    let again = lapidary(&["init", &path("a"), "model_name=tiny-e2b"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("force") || stderr(&again).contains("exists"), "{}", stderr(&again));
}

#[test]
fn quickstart_proves_trains_and_samples() {
    let o = lapidary(&["quickstart", "--json"]);
    assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    let v = json(&o);
    assert_eq!(v["passed"], true);
    assert!(v["trace"].as_array().unwrap().len() >= 12);
    assert!(v["training"]["loss"].as_f64().unwrap() < v["training"]["first_loss"].as_f64().unwrap() / 10.0, "{v:#}");
    assert_eq!(v["conversion"]["equal"], true);
    assert!(v["samples"]["valid"].as_u64().unwrap() >= 12, "{v:#}");
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
