//! `lapidary convert`, `inspect` and `diff` as a user runs them, on the tiny checkpoints in `tests/golden` and on a larger
//! set where `LAPIDARY_GOLDEN_DIR` names it.

use std::path::{Path, PathBuf};

use checkpoint::hf::HfDirectory;
use checkpoint::orbax::OrbaxCheckpoint;
use engine::Model;
use gemma4::param_table;
use serde_json::Value;
use tensor::DType;

use crate::{Run, lapidary};

/// Every model directory of the golden cases.
fn models() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")];
    roots.extend(std::env::var_os("LAPIDARY_GOLDEN_DIR").map(PathBuf::from));
    let mut models = Vec::new();
    for root in roots {
        let before = models.len();
        let entries = fs_err::read_dir(&root).unwrap();
        models.extend(entries.map(|e| e.unwrap().path().join("model")).filter(|m| m.join("config.json").is_file()));
        assert!(models.len() > before, "{} holds no models", root.display());
    }
    models.sort();
    models
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name).join("model")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn convert(from: &Path, to: &Path, format: &str, extra: &[&str]) -> Run {
    let mut args = vec!["convert", text(from), text(to), "--to", format];
    args.extend(extra);
    lapidary(&args)
}

fn diff(a: &Path, b: &Path, extra: &[&str]) -> Run {
    let mut args = vec!["diff", text(a), text(b), "--json"];
    args.extend(extra);
    lapidary(&args)
}

/// Asserts that every parameter of the model has the same bytes, found independently of the conversion's own reader.
#[track_caller]
fn assert_same_parameters(a: &Path, b: &Path) {
    let (a, b) = (Model::open(a).unwrap(), Model::open(b).unwrap());
    assert_eq!(a.arch(), b.arch());
    let table = param_table(a.arch());
    assert!(table.len() > 50);
    for p in table {
        let (x, y) = (a.mapped(&p.name).unwrap(), b.mapped(&p.name).unwrap());
        assert_eq!((x.dtype, &x.shape), (y.dtype, &y.shape), "{}", p.name);
        assert!(*x.bytes == *y.bytes, "{} differs", p.name);
    }
}

/// Asserts that both directories hold the same tensors under the same names.
#[track_caller]
fn assert_same_tensors(a: &Path, b: &Path) {
    let (a, b) = (HfDirectory::open(a).unwrap(), HfDirectory::open(b).unwrap());
    let names = |d: &HfDirectory| d.entries().map(|e| e.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for e in a.entries() {
        let (x, y) = (a.tensor(&e.name).unwrap(), b.tensor(&e.name).unwrap());
        assert_eq!((x.dtype, &x.shape), (y.dtype, &y.shape), "{}", e.name);
        assert!(*x.bytes == *y.bytes, "{} differs", e.name);
    }
}

#[test]
fn every_model_survives_the_way_to_maxtext_and_back() {
    for source in models() {
        let tmp = tempfile::tempdir().unwrap();
        let (mt, back) = (tmp.path().join("mt"), tmp.path().join("back"));
        let there = convert(&source, &mt, "maxtext", &["--json"]).exits(0).json();
        assert_eq!(there["path"], text(&mt.join("0/items")));
        convert(&mt, &back, "hf", &[]).exits(0);
        assert_same_parameters(&source, &back);
        // The comparison across formats agrees, in both orders, and so does the one between directories.
        diff(&source, &mt, &[]).exits(0);
        let report = diff(&mt.join("0/items"), &source, &[]).exits(0).json();
        assert_eq!(report["report"]["equal"], true);
        diff(&source, &back, &["--text-only"]).exits(0);
        // Once more over what came back: the same arrays bit for bit.
        let again = tmp.path().join("again");
        convert(&back, &again, "maxtext", &[]).exits(0);
        diff(&mt, &again, &[]).exits(0);
    }
}

#[test]
fn with_a_base_everything_comes_back() {
    for source in models() {
        let tmp = tempfile::tempdir().unwrap();
        let (base, mt, back) = (tmp.path().join("base"), tmp.path().join("mt"), tmp.path().join("back"));
        copy_dir(&source, &base);
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"] {
            fs_err::write(base.join(name), format!("content of {name}")).unwrap();
        }
        convert(&base, &mt, "maxtext", &[]).exits(0);
        convert(&mt, &back, "hf", &["--profile", "official", "--base", text(&base)]).exits(0);
        assert_same_tensors(&base, &back);
        diff(&base, &back, &[]).exits(0);
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"] {
            assert_eq!(fs_err::read(base.join(name)).unwrap(), fs_err::read(back.join(name)).unwrap(), "{name}");
        }
        let read = |p: &Path| fs_err::read(p.join("generation_config.json")).unwrap();
        assert_eq!(read(&base), read(&back));
    }
}

#[test]
fn other_layouts_hold_the_same() {
    let source = model("e4b");
    let tmp = tempfile::tempdir().unwrap();
    let plain = tmp.path().join("plain");
    convert(&source, &plain, "maxtext", &[]).exits(0);
    for (name, options) in [
        ("pathways", &["--pathways"][..]),
        ("zstd", &["--zstd"]),
        ("zstd9", &["--zstd=9"]),
        ("one", &["--threads", "1"]),
    ] {
        let target = tmp.path().join(name);
        convert(&source, &target, "maxtext", options).exits(0);
        diff(&plain, &target, &[]).exits(0);
        // MaxText to MaxText: only the layout changes.
        let anew = tmp.path().join(format!("{name}-anew"));
        convert(&plain, &anew, "maxtext", options).exits(0);
        diff(&target, &anew, &[]).exits(0);
        let (back, again) = (tmp.path().join(format!("{name}-back")), tmp.path().join(format!("{name}-again")));
        convert(&target, &back, "hf", &[]).exits(0);
        convert(&anew, &again, "hf", &[]).exits(0);
        assert_same_parameters(&source, &back);
        assert_same_parameters(&source, &again);
    }
    let format = |n: &str| {
        let c = OrbaxCheckpoint::open(&tmp.path().join(n)).unwrap();
        let name = "decoder.layers_0.mlp.wi_0.kernel";
        (c.container(), c.parameter(name).unwrap().format.clone(), c.parameter(name).unwrap().compressed)
    };
    assert!(format("pathways").1.contains("zarr2") && format("pathways").2, "{:?}", format("pathways"));
    assert!(format("zstd").1.contains("zarr3") && format("zstd").2, "{:?}", format("zstd"));
    assert!(!format("plain").2 && format("plain").1.contains("crc32c"), "{:?}", format("plain"));
}

#[test]
fn linked_files_are_read_in_place_and_outlive_the_source() {
    for name in ["e2b", "e4b", "keqv"] {
        let tmp = tempfile::tempdir().unwrap();
        let (source, mt, back) = (tmp.path().join("source"), tmp.path().join("mt"), tmp.path().join("back"));
        copy_dir(&model(name), &source);
        let run = convert(&source, &mt, "maxtext", &["--link", "--json"]).exits(0);
        assert!(run.stderr.contains("stay in the source's files"), "{}", run.stderr);
        let report = run.json();
        let linked = report["orbax"]["linked_bytes"].as_u64().unwrap();
        assert!(linked > report["bytes"].as_u64().unwrap() / 2, "{report}");
        assert_eq!(report["resumed_bytes"], 0);
        let c = OrbaxCheckpoint::open(&mt).unwrap();
        assert!(c.problems().is_empty(), "{:?}", c.problems());
        // Only the scaled table has bytes of its own.
        let copied: Vec<_> = c.arrays().iter().filter(|a| a.param_name.is_some() && a.checksummed).collect();
        assert_eq!(copied.len(), 1, "{copied:?}");
        assert_eq!(copied[0].param_name.as_deref(), Some("token_embedder.embedding"));
        diff(&mt, &source, &[]).exits(0);
        fs_err::remove_dir_all(&source).unwrap();
        diff(&mt, &model(name), &[]).exits(0);
        convert(&mt, &back, "hf", &[]).exits(0);
        assert_same_parameters(&model(name), &back);
        // A copy of it has everything in it.
        let anew = tmp.path().join("anew");
        convert(&mt, &anew, "maxtext", &[]).exits(0);
        diff(&anew, &model(name), &[]).exits(0);
        // What cannot be linked is refused.
        let refused = |from: &Path, format: &str, options: &[&str]| {
            let run = convert(from, &tmp.path().join("x"), format, options).exits(2);
            assert!(run.stderr.contains("--link") || run.stderr.contains("link files"), "{}", run.stderr);
        };
        refused(&back, "maxtext", &["--link", "--pathways"]);
        refused(&back, "hf", &["--link"]);
        refused(&mt, "maxtext", &["--link"]);
        // Another type has to be written.
        let typed = tmp.path().join("typed");
        let other = if name == "keqv" { "bfloat16" } else { "float16" };
        let run = convert(&back, &typed, "maxtext", &["--link", "--dtype", other, "--json"]).exits(0).json();
        assert_eq!(run["orbax"]["linked_bytes"], 0);
    }
}

#[test]
fn the_tree_is_what_maxtext_expects() {
    let source = model("e2b");
    let tmp = tempfile::tempdir().unwrap();
    convert(&source, tmp.path(), "maxtext", &[]).exits(0);
    let c = OrbaxCheckpoint::open(&tmp.path().join("0/items")).unwrap();
    assert_eq!(c.custom_metadata()["scan_layers"], false);
    assert!(c.problems().is_empty(), "{:?}", c.problems());
    let table = param_table(Model::open(&source).unwrap().arch());
    // Every parameter and the step; nothing for optimizer state but an empty entry.
    assert_eq!(c.arrays().len(), table.len() + 1);
    for p in &table {
        let a = c.array(&format!("params.params.{}", p.maxtext_name)).unwrap();
        assert_eq!(a.shape, p.maxtext_shape, "{}", a.name);
    }
    assert_eq!(c.array("step").unwrap().dtype, DType::I64);
    assert_eq!(c.empty_leaves().iter().map(|l| l.name()).collect::<Vec<_>>(), ["opt_state"]);
}

#[test]
fn profiles_name_and_class_agree() {
    let tmp = tempfile::tempdir().unwrap();
    let conditional = models().into_iter().find(|m| config(m)["model_type"] == "gemma4");
    for (i, source) in [Some(model("e2b")), conditional].into_iter().flatten().enumerate() {
        let mt = tmp.path().join(format!("mt{i}"));
        convert(&source, &mt, "maxtext", &[]).exits(0);
        for profile in ["lean", "causal"] {
            let back = tmp.path().join(format!("{profile}{i}"));
            convert(&mt, &back, "hf", &["--profile", profile, "--shard-mb", "1"]).exits(0);
            assert_same_parameters(&source, &back);
            let c = config(&back);
            let causal = profile == "causal" || config(&source)["model_type"] == "gemma4_text";
            assert_eq!(c["model_type"], if causal { "gemma4_text" } else { "gemma4" });
            let prefix = if causal { "model.layers" } else { "model.language_model.layers" };
            let dir = HfDirectory::open(&back).unwrap();
            assert!(dir.entries().any(|e| e.name.starts_with(prefix)));
            assert!(c.get("vision_config").is_none_or(Value::is_null));
            let class = if causal { "Gemma4ForCausalLM" } else { "Gemma4ForConditionalGeneration" };
            assert_eq!(c["architectures"][0], class);
        }
    }
}

fn config(model: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(model.join("config.json")).unwrap()).unwrap()
}

#[test]
fn types_can_be_changed_and_losses_are_told() {
    let source = model("e4b");
    let tmp = tempfile::tempdir().unwrap();
    let (mt, back) = (tmp.path().join("mt"), tmp.path().join("back"));
    let narrow = ["--dtype", "bfloat16", "--embedding-dtype", "bfloat16"];
    convert(&source, &mt, "maxtext", &narrow).exits(0);
    convert(&mt, &back, "hf", &["--dtype", "float32"]).exits(0);
    assert!(HfDirectory::open(&back).unwrap().entries().all(|e| e.dtype == DType::F32));
    assert_eq!(config(&back)["dtype"], "float32");
    // Told where the weights are bfloat16 already and only the table loses.
    let bf16 = tmp.path().join("bf16");
    convert(&source, &bf16, "hf", &["--dtype", "bfloat16"]).exits(0);
    let lossy = tmp.path().join("lossy");
    let run = convert(&bf16, &lossy, "maxtext", &["--embedding-dtype", "bfloat16"]).exits(0);
    assert!(run.stderr.contains("of the 128 significands come back one unit off"), "{}", run.stderr);
    let lossy_back = tmp.path().join("lossy-back");
    convert(&lossy, &lossy_back, "hf", &[]).exits(0);
    let report = diff(&bf16, &lossy_back, &[]).exits(1).json();
    let differences = report["report"]["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 1);
    assert_eq!((&differences[0]["name"], &differences[0]["max_ulp"]), (&"embed_tokens.weight".into(), &1.into()));
}

#[test]
fn a_foreign_checkpoint_needs_an_architecture() {
    let source = model("e2b");
    let tmp = tempfile::tempdir().unwrap();
    let mt = tmp.path().join("mt");
    convert(&source, &mt, "maxtext", &[]).exits(0);
    // As MaxText would leave it: without the record of this conversion.
    for file in [mt.join("0/_CHECKPOINT_METADATA"), mt.join("0/items/_CHECKPOINT_METADATA")] {
        let mut v: Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
        v["custom_metadata"] = serde_json::json!({"scan_layers": false});
        fs_err::write(&file, v.to_string()).unwrap();
    }
    fs_err::remove_file(mt.join("0/items").join(checkpoint::orbax::CHECKSUMS)).unwrap();
    let refused = convert(&mt, &tmp.path().join("x"), "hf", &[]).exits(2);
    assert!(refused.stderr.contains("--config") && refused.stderr.contains("model_name="), "{}", refused.stderr);
    lapidary(&["inspect", text(&mt)]).exits(0);
    let config = source.join("config.json");
    for (name, hints) in [("c", ["--config", text(&config)]), ("b", ["--base", text(&source)])] {
        let back = tmp.path().join(name);
        convert(&mt, &back, "hf", &hints).exits(0);
        assert_same_parameters(&source, &back);
    }
    // A wrong one is told with every name.
    let wrong = convert(&mt, &tmp.path().join("x"), "hf", &["model_name=tiny-e2b"]).exits(1);
    assert!(wrong.stderr.contains("does not fit the model"), "{}", wrong.stderr);
    // The other side of a comparison tells it too.
    diff(&mt, &source, &[]).exits(0);
    // Two of them without any architecture: by name.
    let by_name = diff(&mt, &mt, &[]).exits(0);
    assert!(by_name.stderr.contains("by stored name"), "{}", by_name.stderr);
}

#[test]
fn nothing_is_overwritten_without_being_asked() {
    let source = model("win");
    let tmp = tempfile::tempdir().unwrap();
    for (format, marker) in [("maxtext", "0/items/_METADATA"), ("hf", "config.json")] {
        let target = tmp.path().join(format);
        convert(&source, &target, format, &[]).exits(0);
        let before = fs_err::read(target.join(marker)).unwrap();
        let again = convert(&source, &target, format, &[]).exits(1);
        assert!(again.stderr.contains("exists already") && again.stderr.contains("--force"), "{}", again.stderr);
        assert_eq!(fs_err::read(target.join(marker)).unwrap(), before);
        convert(&source, &target, format, &["--force"]).exits(0);
    }
    let own = tmp.path().join("own");
    fs_err::create_dir(&own).unwrap();
    fs_err::write(own.join("notes.txt"), "mine").unwrap();
    let refused = convert(&source, &own, "hf", &["--force"]).exits(1);
    assert!(refused.stderr.contains("does not look like a checkpoint"), "{}", refused.stderr);
}

#[test]
fn the_same_moment_gives_the_same_bytes() {
    let source = model("e2b");
    let tmp = tempfile::tempdir().unwrap();
    let files = |name: &str, threads: &str| {
        let target = tmp.path().join(name);
        let mut command =
            crate::command(&["convert", text(&source), text(&target), "--to", "maxtext", "--threads", threads]);
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        crate::run(command).exits(0);
        let mut out = Vec::new();
        walk(&target, &target, &mut out);
        // The commit file names its own place.
        out.retain(|(name, _)| !name.ends_with("commit_success.txt") && !name.contains("lapidary"));
        out.sort();
        out
    };
    let (one, two) = (files("one", "1"), files("two", "4"));
    assert!(one.len() > 3 && one == two);
}

fn walk(root: &Path, dir: &Path, out: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(root, &path, out);
        } else {
            out.push((text(path.strip_prefix(root).unwrap()).to_owned(), fs_err::read(&path).unwrap()));
        }
    }
}

#[test]
fn unfinished_output_does_not_load() {
    let tmp = tempfile::tempdir().unwrap();
    let mt = tmp.path().join("mt");
    convert(&model("e2b"), &mt, "maxtext", &[]).exits(0);
    let back = tmp.path().join("back");
    // As a killed run leaves them: under a hidden name, with the mark of an unfinished write.
    for (path, name) in [(mt.join("0"), ".0.lapidary-partial"), (back.clone(), ".back.lapidary-partial")] {
        if path == back {
            convert(&mt.join(".0.lapidary-partial"), &back, "hf", &[]).exits(1);
            fs_err::create_dir(&path).unwrap();
            fs_err::write(path.join("config.json"), "{}").unwrap();
        }
        let hidden = path.with_file_name(name);
        fs_err::rename(&path, &hidden).unwrap();
        fs_err::write(hidden.join(checkpoint::commit::INCOMPLETE_MARKER), "").unwrap();
        for words in [vec!["inspect", text(&hidden)], vec!["diff", text(&hidden), text(&hidden)]] {
            let run = lapidary(&words).exits(1);
            assert!(run.stderr.contains("never completed") || run.stderr.contains("unfinished"), "{}", run.stderr);
        }
    }
    let run = convert(&mt, &tmp.path().join("x"), "hf", &[]).exits(1);
    assert!(!tmp.path().join("x").exists(), "{}", run.stderr);
}

#[test]
fn damage_is_an_error_and_leaves_nothing() {
    let source = model("e2b");
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let broken = tmp.path().join("broken");
    copy_dir(&source, &broken);
    // A missing tensor is named.
    let weights = broken.join("model.safetensors");
    let bytes = fs_err::read(&weights).unwrap();
    let mut renamed = bytes.clone();
    let at = renamed.windows(24).position(|w| w == b"layers.3.mlp.up_proj.wei").unwrap();
    renamed[at..at + 8].copy_from_slice(b"layerz.3");
    fs_err::write(&weights, &renamed).unwrap();
    let run = convert(&broken, &target, "maxtext", &[]).exits(1);
    assert!(run.stderr.contains("layers.3.mlp.up_proj.weight"), "{}", run.stderr);
    fs_err::write(&weights, &bytes[..bytes.len() - 3]).unwrap();
    convert(&broken, &target, "maxtext", &[]).exits(1);
    assert!(!target.exists());
    // A flipped bit in the data of an Orbax checkpoint.
    let mt = tmp.path().join("mt");
    convert(&source, &mt, "maxtext", &[]).exits(0);
    let data = fs_err::read_dir(mt.join("0/items/d"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .max_by_key(|p| p.metadata().unwrap().len())
        .unwrap();
    let mut bytes = fs_err::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs_err::write(&data, bytes).unwrap();
    let back = tmp.path().join("back");
    let run = convert(&mt, &back, "hf", &[]).exits(1);
    assert!(run.stderr.contains("damaged") || run.stderr.contains("not as it was written"), "{}", run.stderr);
    assert!(!back.exists());
    lapidary(&["inspect", text(&mt), "--stats"]).exits(1);
}

#[test]
fn what_is_no_checkpoint_is_told() {
    let tmp = tempfile::tempdir().unwrap();
    let empty = tmp.path().join("empty");
    fs_err::create_dir(&empty).unwrap();
    let target = tmp.path().join("t");
    for words in [
        vec!["convert", text(&empty), text(&target), "--to", "hf"],
        vec!["inspect", text(&empty)],
        vec!["diff", text(&empty), text(&empty)],
    ] {
        assert!(lapidary(&words).exits(1).stderr.contains("no checkpoint"));
    }
    let absent = tmp.path().join("absent");
    assert!(lapidary(&["inspect", text(&absent)]).exits(1).stderr.contains("does not exist"));
    // Usage.
    let source = model("e2b");
    convert(&source, &target, "gguf", &[]).exits(2);
    convert(&source, &target, "hf", &["--pathways"]).exits(2);
    convert(&source, &target, "maxtext", &["--profile", "lean"]).exits(2);
    convert(&source, &target, "maxtext", &["--dtype", "int8"]).exits(2);
    convert(&source, &target, "hf", &["--shard-mb", "0"]).exits(2);
    lapidary(&["convert", text(&source), text(&target)]).exits(2);
    let mt = tmp.path().join("mt");
    convert(&source, &mt, "maxtext", &[]).exits(0);
    assert!(convert(&mt, &target, "hf", &["--profile", "official"]).exits(2).stderr.contains("--base"));
    let other = convert(&mt, &target, "hf", &["--base", text(&model("e4b"))]).exits(1);
    assert!(other.stderr.contains("another architecture"), "{}", other.stderr);
    assert!(!target.exists());
}

#[test]
fn differences_are_found_and_measured() {
    let source = model("e2b");
    let tmp = tempfile::tempdir().unwrap();
    let changed = tmp.path().join("changed");
    copy_dir(&source, &changed);
    let name = Model::open(&source).unwrap().mapped("layers.1.mlp.up_proj.weight").unwrap().name;
    let (offset, dtype) = {
        let dir = HfDirectory::open(&source).unwrap();
        let view = dir.tensor(&name).unwrap();
        (view.bytes.range().start, view.dtype)
    };
    let weights = changed.join("model.safetensors");
    let mut bytes = fs_err::read(&weights).unwrap();
    // The last bit of the third element.
    bytes[offset + 2 * dtype.size()] ^= 1;
    fs_err::write(&weights, bytes).unwrap();
    let mt = tmp.path().join("mt");
    convert(&changed, &mt, "maxtext", &[]).exits(0);
    for other in [&changed, &mt] {
        let report = diff(&source, other, &[]).exits(1).json()["report"].clone();
        let d = &report["differences"][0];
        assert_eq!(report["differences"].as_array().unwrap().len(), 1);
        assert_eq!(d["name"], "layers.1.mlp.up_proj.weight");
        assert_eq!((&d["different"], &d["max_ulp"]), (&1.into(), &1.into()));
        assert_eq!(d["first"], serde_json::json!([0, 2]));
        assert!(d["max_abs"].as_f64().unwrap() > 0.0);
    }
    let words = lapidary(&["diff", text(&source), text(&mt)]).exits(1);
    assert!(words.stdout.contains("1 of ") && words.stdout.contains("DIFFERENT"), "{}", words.stdout);
    // Other models: shapes and names.
    let report = diff(&source, &model("e4b"), &[]).exits(1).json();
    assert!(
        !report["report"]["only_a"].as_array().unwrap().is_empty()
            || report["report"]["differences"][0]["elements"] == 0
    );
}

#[test]
fn inspect_tells_what_is_there() {
    let tmp = tempfile::tempdir().unwrap();
    for source in models() {
        let used = param_table(Model::open(&source).unwrap().arch()).len();
        let v = lapidary(&["inspect", text(&source), "--json", "--stats"]).exits(0).json();
        assert_eq!(v["format"], "hf");
        assert_eq!(v["model"]["tensors"], used);
        let tensors = v["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), HfDirectory::open(&source).unwrap().len());
        for t in tensors {
            let s = &t["stats"];
            assert!(s["min"].as_f64() <= s["mean"].as_f64() && s["mean"].as_f64() <= s["max"].as_f64(), "{t}");
            assert_eq!(s["nan"], 0);
        }
    }
    let mt = tmp.path().join("mt");
    convert(&model("e2b"), &mt, "maxtext", &[]).exits(0);
    let v = lapidary(&["inspect", text(&mt), "--json"]).exits(0).json();
    assert_eq!(
        (&v["format"], &v["orbax"]["step"], &v["orbax"]["kind"]),
        (&"maxtext".into(), &0.into(), &"linen".into())
    );
    assert_eq!((&v["orbax"]["checksummed"], &v["orbax"]["problems"]), (&true.into(), &serde_json::json!([])));
    assert_eq!(v["model"]["origin"], "provenance");
    let words = lapidary(&["inspect", text(&mt)]).exits(0).stdout;
    for part in ["format: Orbax", "model: Gemma 4", "params.params.token_embedder.embedding", "zarr3"] {
        assert!(words.contains(part), "{part}: {words}");
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).unwrap();
    for entry in fs_err::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
