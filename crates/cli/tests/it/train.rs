//! `lapidary train` as a user runs it: to the end, interrupted, killed, refused.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};

use checkpoint::safetensors::SafetensorsFile;
use regex::Regex;
use serde_json::Value;

use super::{Run, command, lapidary, run};

/// One run at a time: they all use the same program, which the first one compiles and the others find in the cache.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Text with packing and shuffling, so that a resumed run has a place in the data to find.
pub(super) fn write_text(dir: &Path) {
    let words = ["amber", "basalt", "cobalt", "dolomite", "emerald", "flint", "garnet"];
    let line = |i: usize| {
        let n = 2 + i * 7 % 11;
        (0..n).map(|j| words[(i * i + 3 * j * (i + 1) + j) % words.len()]).collect::<Vec<_>>().join(" ")
    };
    let text: Vec<String> = (0..1200).map(line).collect();
    fs_err::write(dir.join("text.txt"), text.join("\n")).unwrap();
}

/// Words of a run called `name` under `dir`.
pub(super) fn words(dir: &Path, name: &str, more: &[&str]) -> Vec<String> {
    let path = |p: &Path| serde_json::to_string(p.to_str().unwrap()).unwrap();
    let mut words: Vec<String> = [
        "train",
        "model_name=tiny-e2b",
        "override_model_config=true",
        "tokenizer_path=bytes",
        "dataset_type=hf",
        "hf_path=text",
        "steps=12",
        "max_target_length=128",
        "per_device_batch_size=8",
        "dtype=float32",
        "learning_rate=1e-3",
        "checkpoint_period=3",
        "enable_tensorboard=false",
    ]
    .map(String::from)
    .into();
    words.push(format!("run_name={name}"));
    words.push(format!("base_output_directory={}", path(dir)));
    words.push(format!("hf_train_files={}", path(&dir.join("text.txt"))));
    // Of a key that is given twice the later one would be an error: replace.
    for word in more {
        let key = word.split_once('=').unwrap().0;
        words.retain(|w| !w.starts_with(&format!("{key}=")));
        words.push((*word).to_owned());
    }
    words
}

pub(super) fn train(dir: &Path, name: &str, more: &[&str]) -> Run {
    let words = words(dir, name, more);
    lapidary(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Starts a run, and sends the signal as soon as it reports `step`. Gives its exit code and what it said.
fn interrupted(dir: &Path, name: &str, step: u64, signal: &str, more: &[&str]) -> (Option<i32>, String) {
    let words = words(dir, name, more);
    let mut child = command(&words.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mark = format!("completed step: {step},");
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.starts_with(&mark) {
            let kill = format!("kill -{signal} {}", child.id());
            assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        }
        said += &line;
        said += "\n";
    }
    (child.wait().unwrap().code(), said)
}

/// Every file of a checkpoint by name.
fn files(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs_err::read_dir(checkpoint).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs_err::read(e.path()).unwrap())).collect()
}

/// Step and exact loss of every line of `metrics.jsonl`.
pub(super) fn losses(run: &Path) -> Vec<(u64, f64)> {
    let text = fs_err::read_to_string(run.join("metrics/metrics.jsonl")).unwrap();
    let rows = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    rows.map(|v| (v["step"].as_u64().unwrap(), v["learning/loss"].as_f64().unwrap())).collect()
}

#[test]
fn interrupted_and_killed_runs_end_bit_for_bit_as_whole_ones() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let whole = train(dir.path(), "whole", &[]).exits(0);

    // The lines are read by scripts made for MaxText.
    let line = Regex::new(
        r"completed step: (\d+), seconds: ([\d.]+), TFLOP/s/device: ([\d.]+), Tokens/s/device: ([\d.]+), total_weights: (\d+), loss: ([\d.]+)",
    )
    .unwrap();
    let expected = losses(&dir.path().join("whole"));
    assert_eq!(expected.iter().map(|l| l.0).collect::<Vec<_>>(), (0..12).collect::<Vec<_>>());
    let printed: Vec<(u64, f64)> =
        line.captures_iter(&whole.stderr).map(|c| (c[1].parse().unwrap(), c[6].parse().unwrap())).collect();
    assert_eq!(printed.len(), 12, "{}", whole.stderr);
    for (p, e) in printed.iter().zip(&expected) {
        assert!(p.0 == e.0 && (p.1 - e.1).abs() <= 5e-4, "{p:?} {e:?}");
    }
    assert!(expected[11].1 < expected[0].1, "{expected:?}");

    // Asked to stop: saves where it is. Killed: loses what came after the last checkpoint.
    let (code, said) = interrupted(dir.path(), "broken", 3, "INT", &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("stopped as asked") && !said.contains("completed step: 11,"), "{said}");
    let (code, said) = interrupted(dir.path(), "broken", 8, "KILL", &[]);
    assert_eq!(code, None, "{said}");
    assert!(said.contains("goes on after step") && !said.contains("completed step: 11,"), "{said}");
    let rest = train(dir.path(), "broken", &[]).exits(0);
    assert!(rest.stderr.contains("goes on after step"), "{}", rest.stderr);

    assert_eq!(losses(&dir.path().join("broken")), expected);
    let last = |name: &str| files(&dir.path().join(name).join("checkpoints/12"));
    let (a, b) = (last("whole"), last("broken"));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    assert!(a.contains_key("optimizer.safetensors") && a.contains_key("trainer.json"));
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "{name} differs");
    }

    // Nothing left to do is said, not silently done.
    let again = train(dir.path(), "whole", &[]).exits(1);
    assert!(again.stderr.contains("the run has 12 steps") && again.stderr.contains("raise steps"), "{}", again.stderr);
    assert!(last("whole") == a);

    // A checkpoint of a run is a model like any other.
    let checkpoint = dir.path().join("whole/checkpoints/12");
    let checkpoint = checkpoint.to_str().unwrap();
    lapidary(&["inspect", checkpoint]).exits(0);
    let verdict =
        lapidary(&["verify", checkpoint, "--against", checkpoint, "--lengths", "8", "--json"]).exits(0).json();
    assert_eq!(verdict["verdict"]["passed"], true, "{verdict:#}");
}

#[test]
fn a_table_trained_on_the_host_resumes_bit_for_bit() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let host = ["per_layer_table=host", "gradient_accumulation_steps=2", "per_device_batch_size=4"];
    train(dir.path(), "whole", &host).exits(0);
    let (code, said) = interrupted(dir.path(), "cut", 4, "INT", &host);
    assert_eq!(code, Some(0), "{said}");
    let run =
        train(dir.path(), "cut", &[&host[..1], &["gradient_accumulation_steps=2", "per_device_batch_size=4"]].concat());
    assert!(run.exits(0).stderr.contains("goes on after step"));
    let last = |name: &str| files(&dir.path().join(name).join("checkpoints/12"));
    let (whole, cut) = (last("whole"), last("cut"));
    for (name, bytes) in &whole {
        assert!(bytes == &cut[name], "{name} differs");
    }
    assert_eq!(losses(&dir.path().join("whole")), losses(&dir.path().join("cut")));
    // Moments of the rows that occurred alone: bytes of words, not the whole vocabulary.
    let optimizer = String::from_utf8_lossy(&whole["optimizer.safetensors"]).into_owned();
    assert!(optimizer.contains("rows:embed_tokens_per_layer.weight"));
    // The same steps with the table on the device, where rows that do not occur decay: nearly the same losses.
    train(dir.path(), "device", &["gradient_accumulation_steps=2", "per_device_batch_size=4"]).exits(0);
    let (on_host, on_device) = (losses(&dir.path().join("whole")), losses(&dir.path().join("device")));
    for (a, b) in on_host.iter().zip(&on_device) {
        assert!((a.1 - b.1).abs() <= 1e-3 * b.1, "{a:?} {b:?}");
    }
    let other =
        train(dir.path(), "cut", &["gradient_accumulation_steps=2", "per_device_batch_size=4", "steps=14"]).exits(2);
    assert!(other.stderr.contains("per_layer_table was"), "{}", other.stderr);
}

#[test]
fn curves_are_proved_in_f64() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let run = |name: &str, dtypes: &[&'static str]| {
        let said = train(dir.path(), name, &[dtypes, &["steps=4", "checkpoint_period=4"]].concat()).exits(0).stderr;
        (losses(&dir.path().join(name)), said)
    };
    let (exact, said) = run("exact", &["dtype=float64", "weight_dtype=float64"]);
    assert!(said.contains("no checkpoints: weights are float64"), "{said}");
    assert!(!dir.path().join("exact/checkpoints").exists());
    let (again, _) = run("again", &["dtype=float64", "weight_dtype=float64"]);
    assert_eq!(exact, again);
    // Weights in f32 round once a step, activations in f32 everywhere.
    let (rounded, _) = run("rounded", &["dtype=float64"]);
    let (narrow, _) = run("narrow", &["dtype=float32"]);
    for (((step, exact), (_, rounded)), (_, narrow)) in exact.iter().zip(&rounded).zip(&narrow) {
        assert!((exact - rounded).abs() <= 1e-5 * exact, "step {step}: {exact} in f64, {rounded} with f32 weights");
        assert!((exact - narrow).abs() <= 1e-4 * exact, "step {step}: {exact} in f64, {narrow} in f32");
    }
    assert!(exact.iter().zip(&narrow).any(|(a, b)| a.1 != b.1), "{exact:?}");
}

/// A checkpoint holds parameters, whether a program has them one by one or in stacks.
#[test]
fn looped_layers_are_saved_as_written_out_ones() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let [looped, plain] = ["scan_layers=true", "scan_layers=false"].map(|scan| {
        let keys = [scan, "base_num_decoder_layers=20", "num_kv_shared_layers=10", "steps=1", "max_target_length=64"];
        train(dir.path(), &scan[12..], &keys).exits(0);
        dir.path().join(&scan[12..]).join("checkpoints")
    });
    let first = "model-trained-00001.safetensors";
    let drawn = |run: &Path| fs_err::read(run.join("0").join(first)).unwrap();
    assert!(drawn(&looped) == drawn(&plain), "the same seed draws the same weights");
    for file in [first, "optimizer.safetensors"] {
        let [a, b] = [&looped, &plain].map(|run| {
            let tensors = floats(&run.join("1").join(file));
            assert!(tensors.len() > 100, "{}", tensors.len());
            tensors
        });
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (name, a) in &a {
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let off = norm(&mut a.iter().zip(&b[name]).map(|(a, b)| f64::from(a - b)));
            // Rounding differs; another layer's array would be off by its whole size.
            assert!(off <= 0.05 * norm(&mut b[name].iter().map(|&b| f64::from(b))), "{file}: {name}");
        }
    }
}

/// The f32 tensors of a file by name.
fn floats(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = SafetensorsFile::open(path).unwrap();
    let values = |i: usize| {
        let view = file.view(i).unwrap();
        assert_eq!(view.dtype.name(), "float32");
        let values = view.bytes.as_slice().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        (view.name, values)
    };
    (0..file.tensors().len()).map(values).collect()
}

/// Twenty steps beside transformers and torch's AdamW in f64 on the same batches (`scripts/train_curve_from_hf.py`).
#[test]
fn curves_are_those_of_pytorch() {
    let _turn = alone();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/e2b");
    let text = fs_err::read_to_string(golden.join("curve.json")).unwrap();
    let curve: Vec<f64> =
        serde_json::from_value(serde_json::from_str::<Value>(&text).unwrap()["losses"].take()).unwrap();
    assert_eq!(curve.len(), 20);
    let dir = tempfile::tempdir().unwrap();
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    // A run in f64 is left with scalars of a step (learning rate, corrections, the gradient's norm) in f32.
    for (dtype, bound) in [("float32", 1e-4), ("float64", 1e-5)] {
        let keys = [
            format!("run_name={dtype}"),
            format!("base_output_directory={}", path(dir.path())),
            format!("load_parameters_path={}", path(&golden.join("model"))),
            format!("dtype={dtype}"),
            format!("weight_dtype={dtype}"),
        ];
        let batches = path(&golden.join("curve_batches.safetensors"));
        let rule = "steps=20 per_device_batch_size=4 max_target_length=48 learning_rate=1e-3 adam_b1=0.9 adam_b2=0.95 \
                    adam_eps=1e-8 adam_weight_decay=0.1 gradient_clipping_threshold=1.0 warmup_steps_fraction=0.0 \
                    learning_rate_final_fraction=1.0 save_checkpoint_on_start=false enable_tensorboard=false";
        let mut words = vec!["train", "--batches", &batches];
        words.extend(keys.iter().map(String::as_str).chain(rule.split_whitespace()));
        lapidary(&words).exits(0);
        let found = losses(&dir.path().join(dtype));
        assert_eq!(found.len(), curve.len());
        for ((step, loss), wanted) in found.into_iter().zip(&curve) {
            assert!((loss - wanted).abs() <= bound * wanted, "step {step}: {loss} for {wanted} in {dtype}");
        }
    }
    assert!(curve[0] - curve[19] > 0.5, "the curve falls: {curve:?}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_leaves_its_batch() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let r = train(dir.path(), "nan", &["learning_rate=1e30", "warmup_steps_fraction=0", "enable_checkpointing=false"])
        .exits(1);
    let step: u64 =
        Regex::new(r"the loss of step (\d+) is (?:NaN|inf)").unwrap().captures(&r.stderr).unwrap()[1].parse().unwrap();
    let file = dir.path().join(format!("nan/bad_batch_step_{step}.json"));
    assert!(r.stderr.contains(file.to_str().unwrap()), "{}", r.stderr);
    let batch: Value = serde_json::from_slice(&fs_err::read(file).unwrap()).unwrap();
    assert_eq!(batch["step"], step);
    assert_eq!(batch["inputs"].as_array().unwrap().len(), 8 * 128);
    assert!(!dir.path().join("nan/checkpoints").exists());
}

#[test]
fn what_cannot_be_followed_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let uneven = ["scan_layers=true", "base_num_decoder_layers=9", "num_kv_shared_layers=3"];
    let cases: [(&[&str], i32, &[&str]); 6] = [
        (&["hf_train_files=missing.txt"], 1, &["hf_train_files", "missing.txt"]),
        (&["trainable_parameters_mask=[\"(\"]"], 2, &["trainable_parameters_mask", "\"(\""]),
        (&["trainable_parameters_mask=[\"nothing_is_called_so\"]"], 2, &["trainable_parameters_mask", "no parameter"]),
        (&uneven, 2, &["scan_layers", "scan_layers=false"]),
        (&["grad_dtype=bfloat16"], 2, &["grad_dtype"]),
        (&["stepz=3"], 2, &["stepz"]),
    ];
    for (more, code, told) in cases {
        let r = train(dir.path(), "refused", more).exits(code);
        for text in told {
            assert!(r.stderr.contains(text), "{more:?}: {}", r.stderr);
        }
        assert!(!r.stderr.contains("panicked"), "{}", r.stderr);
    }
    // Nothing was begun.
    assert!(!dir.path().join("refused").exists());
}

#[test]
fn keys_may_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yml");
    fs_err::write(&file, "model_name: tiny-e2b\nhf_train_files: nowhere.txt\ndataset_type: hf\nhf_path: text\n")
        .unwrap();
    let r = run(command(&["train", file.to_str().unwrap(), "tokenizer_path=bytes"])).exits(1);
    assert!(r.stderr.contains("nowhere.txt"), "{}", r.stderr);
}

#[test]
fn a_checkpoint_tells_its_own_model() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/grads/model");
    let (model, out) = (model.to_str().unwrap(), dir.path().to_str().unwrap());
    let r = lapidary(&[
        "train",
        &format!("load_parameters_path={model}"),
        &format!("base_output_directory={out}"),
        "run_name=given",
        "dataset_type=synthetic",
        "steps=1",
        "max_target_length=8",
        "per_device_batch_size=1",
        "trainable_parameters_mask=[\"layers.0.input_layernorm\"]",
    ])
    .exits(0);
    assert!(r.stderr.contains("completed step: 0"), "{}", r.stderr);
}

#[test]
fn processes_that_cannot_meet_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let with = |flags: &[&str], more: &[&str]| {
        let words: Vec<String> = words(dir.path(), "hosts", more);
        let words: Vec<&str> = words.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        lapidary(&words).exits(2).stderr
    };
    let two = ["--process-id", "0", "--num-processes", "2", "--coordinator", "127.0.0.1:1"];
    assert!(with(&two, &[]).contains("on CPUs, training over several processes runs under mpirun"));
    assert!(with(&two[..2], &[]).contains("not how many"));
    assert!(with(&two[..4], &[]).contains("where process 0 is"));
    assert!(with(&two, &["hardware=gpu"]).contains("LAPIDARY_TOKEN is not set"));
}
