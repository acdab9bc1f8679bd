//! `lapidary verify` and `bench` on MaxText checkpoints: what is proved of a Hugging Face directory holds for what it was
//! converted into.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Run, lapidary};

fn golden_cases() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")];
    roots.extend(std::env::var_os("LAPIDARY_GOLDEN_DIR").map(PathBuf::from));
    let dirs = roots.iter().flat_map(|r| fs_err::read_dir(r).unwrap().map(|e| e.unwrap().path()));
    let mut cases: Vec<PathBuf> = dirs.filter(|d| d.join("golden.safetensors").is_file()).collect();
    cases.sort();
    assert!(cases.len() > 3);
    cases
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn convert(case: &Path, to: &Path, extra: &[&str]) {
    let source = case.join("model");
    let mut args = vec!["convert", text(&source), text(to), "--to", "maxtext"];
    args.extend(extra);
    lapidary(&args).exits(0);
}

fn verify(model: &Path, case: &Path, extra: &[&str]) -> Run {
    let golden = case.join("golden.safetensors");
    let mut args = vec!["verify", text(model), "--golden", text(&golden), "--json"];
    args.extend(extra);
    lapidary(&args)
}

/// Makes a converted checkpoint one as MaxText leaves it: without the record of the conversion.
fn forget(mt: &Path) {
    for file in [mt.join("0/_CHECKPOINT_METADATA"), mt.join("0/items/_CHECKPOINT_METADATA")] {
        let mut v: Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
        v["custom_metadata"] = serde_json::json!({"scan_layers": false});
        fs_err::write(&file, v.to_string()).unwrap();
    }
    fs_err::remove_file(mt.join("0/items").join(checkpoint::orbax::CHECKSUMS)).unwrap();
}

#[test]
fn every_case_agrees_after_conversion() {
    let tolerances = ["--max-kl-div", "1e-6", "--max-abs-diff", "2e-4", "--trace"];
    for case in golden_cases() {
        let tmp = tempfile::tempdir().unwrap();
        let mt = tmp.path().join("mt");
        convert(&case, &mt, &[]);
        let run = verify(&mt.join("0/items"), &case, &tolerances);
        assert_eq!(run.code, 0, "{}: {run:#?}", case.display());
        let v = &run.json()["verdict"];
        assert!(v["trace"].as_array().unwrap().len() > 4 && v["overall"]["tokens"].as_u64() > Some(10));
        // The very same numbers as from the directory: nothing but the place of the weights has changed.
        let direct = verify(&case.join("model"), &case, &tolerances).exits(0).json();
        let timeless = |v: &Value| v.as_object().unwrap().clone().into_iter().filter(|(k, _)| k != "forward_seconds");
        assert!(timeless(v).eq(timeless(&direct["verdict"])), "{}", case.display());
    }
}

#[test]
fn compressed_layouts_agree_too_and_say_what_they_cost() {
    let case = case("e2b");
    let tmp = tempfile::tempdir().unwrap();
    for (name, option) in [("zstd", "--zstd"), ("pathways", "--pathways")] {
        let mt = tmp.path().join(name);
        convert(&case, &mt, &[option]);
        let run = verify(&mt, &case, &["--max-kl-div", "1e-6", "--max-abs-diff", "2e-4"]).exits(0);
        assert!(run.stderr.contains("went to a temporary file"), "{}", run.stderr);
    }
}

#[test]
fn a_bfloat16_table_computes_what_its_export_computes() {
    // What MaxText's own tool writes: the table times sqrt(hidden), rounded to bfloat16. On these tiny models that is a loss
    // which shows; it must be the loss of the values, not of the reading.
    for case in golden_cases() {
        let tmp = tempfile::tempdir().unwrap();
        let (mt, hf) = (tmp.path().join("mt"), tmp.path().join("hf"));
        convert(&case, &mt, &["--embedding-dtype", "bfloat16"]);
        lapidary(&["convert", text(&mt), text(&hf), "--to", "hf"]).exits(0);
        // The verdict of interest is that both agree; how far they are from the golden is judged below.
        let tolerance = ["--max-kl-div", "10"];
        let (v, w) = (verify(&mt, &case, &tolerance).exits(0).json(), verify(&hf, &case, &tolerance).exits(0).json());
        assert_eq!(v["verdict"]["overall"], w["verdict"]["overall"], "{}", case.display());
        let mean = |v: &serde_json::Value| v["verdict"]["overall"]["mean_kl"].as_f64().unwrap();
        // A table that was scaled twice or not at all is off by more than 1. Rounding one table must cost less than 5e-3, or, on a
        // model that amplifies rounding more than that, less than rounding everything: bf16 arithmetic on the exact weights.
        let source = case.join("model");
        let rounded = verify(&source, &case, &["--max-kl-div", "1000", "--dtype", "bfloat16"]).exits(0).json();
        assert!(mean(&v) < mean(&rounded).max(5e-3), "{}: {} against {}", case.display(), mean(&v), mean(&rounded));
    }
}

#[test]
fn an_architecture_that_nothing_tells_is_asked_for() {
    let case = case("e2b");
    let source = case.join("model");
    let tmp = tempfile::tempdir().unwrap();
    let mt = tmp.path().join("mt");
    convert(&case, &mt, &[]);
    forget(&mt);
    for refused in [verify(&mt, &case, &[]), lapidary(&["bench", "forward", text(&mt)])] {
        let refused = refused.exits(2);
        assert!(refused.stderr.contains("does not say which architecture"), "{}", refused.stderr);
        assert!(refused.stderr.contains("--config") && refused.stderr.contains("model_name="), "{}", refused.stderr);
    }
    let config = source.join("config.json");
    let strict = ["--max-kl-div", "1e-6", "--max-abs-diff", "2e-4"];
    let mut args = vec!["--config", text(&config)];
    args.extend(strict);
    verify(&mt, &case, &args).exits(0);
    // Another model's shape is refused with what does not fit.
    let wrong = verify(&mt, &case, &["model_name=tiny-e2b"]).exits(1);
    assert!(wrong.stderr.contains("does not fit the model"), "{}", wrong.stderr);
    // In a comparison the other side tells it, whichever it is.
    for (a, b) in [(&mt, &source), (&source, &mt)] {
        let v = lapidary(&["verify", text(a), "--against", text(b), "--lengths", "5,40", "--json"]).exits(0).json();
        assert_eq!(v["verdict"]["overall"]["max_abs_diff"], 0.0);
    }
    lapidary(&["verify", text(&mt), "--against", text(&mt)]).exits(2);
    let args = ["bench", "forward", text(&mt), "--tokens", "8", "--repeat", "1", "--json", "--config", text(&config)];
    assert_eq!(lapidary(&args).exits(0).json()["forward"][0]["tokens"], 8);
}

#[test]
fn damage_is_found_while_weights_are_placed() {
    let case = case("e2b");
    let tmp = tempfile::tempdir().unwrap();
    let mt = tmp.path().join("mt");
    convert(&case, &mt, &[]);
    let largest = |d: &Path| {
        let files = fs_err::read_dir(d).unwrap().map(|e| e.unwrap().path());
        files.max_by_key(|p| p.metadata().unwrap().len()).unwrap()
    };
    let data = largest(&mt.join("0/items/d"));
    let mut bytes = fs_err::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs_err::write(&data, bytes).unwrap();
    let run = verify(&mt, &case, &[]).exits(1);
    assert!(run.stderr.contains("chunk") && !run.stderr.contains("panicked"), "{}", run.stderr);
}
