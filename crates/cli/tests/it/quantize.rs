//! Model directories whose weights are stored quantised.

use std::path::Path;

use checkpoint::hf::HfDirectory;
use fs_err as fs;
use serde_json::{Value, json};

use super::lapidary;

/// A model of two shards with text files, and what `quantize` made of it.
fn models(dir: &Path, format: &str, dtype: &str) -> [String; 2] {
    let [model, made] = ["model", "made"].map(|n| dir.join(n).to_str().unwrap().to_owned());
    let init = ["init", &model, "model_name=tiny-e2b", "--seed", "5", "--vary-norms", "--shard-mb", "1"];
    lapidary(&[&init[..], &["--dtype", dtype]].concat()).exits(0);
    for name in ["tokenizer.json", "chat_template.jinja"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/text").join(name);
        fs::copy(from, Path::new(&model).join(name)).unwrap();
    }
    lapidary(&["quantize", &model, &made, "--format", format]).exits(0);
    [model, made]
}

/// Answers to prompts of one chunk each: where more rows come together, weights that are quantized at load are used as stored.
fn answers(model: &str, extra: &[&str]) -> Vec<Value> {
    let one = |tokens: &str| {
        let args = ["generate", model, "--tokens", tokens, "--greedy", "-n", "10", "--ignore-eos", "--json"];
        lapidary(&[&args[..], &["--logprobs", "3"], extra].concat()).exits(0).json()["sequences"].take()
    };
    ["2,9,33,4", "2,7,7,19,250,3,8,2,2,17,41,5,5,5,9,60,11,99,33,4"].map(one).to_vec()
}

#[test]
fn stored_weights_give_what_quantizing_at_load_gives() {
    for (format, dtype) in [("int8", "bfloat16"), ("int4", "float32")] {
        let dir = tempfile::tempdir().unwrap();
        let [model, made] = models(dir.path(), format, dtype);
        let (at_load, stored) = (answers(&model, &["--quantize", format]), answers(&made, &[]));
        // Tokens and logarithms of probabilities, to the last digit.
        assert_eq!(at_load, stored, "{format}");
        assert_eq!(stored, answers(&made, &["--quantize", format]));
        assert_ne!(stored, answers(&model, &[]));

        let text = dir.path().join("text.txt");
        fs::write(&text, "amber basalt cobalt dolomite").unwrap();
        let text = text.to_str().unwrap();
        let score = |model: &str, extra: &[&str]| {
            let args = ["score", model, text, "--tokenizer", "bytes", "--json"];
            lapidary(&[&args[..], extra].concat()).exits(0).json()
        };
        let (compared, alone) = (score(&model, &["--quantize", format]), score(&made, &["--documents"]));
        assert_eq!(compared["quantized"]["loss"], alone["loss"], "{compared} {alone}");
        assert_eq!(alone["each"][0]["loss"], alone["loss"]);

        // A conversation, with the template and tokenizer that were carried over.
        let words = ["--prompt", "the", "--greedy", "-n", "6", "--json"];
        let chat = |model: &str, extra: &[&str]| {
            lapidary(&[&["generate", model][..], &words, extra].concat()).exits(0).json()["sequences"].take()
        };
        assert_eq!(chat(&model, &["--quantize", format]), chat(&made, &[]));
        for what in ["decode", "products"] {
            let args = ["bench", what, &made, "--repeat", "1", "--json"];
            assert_eq!(lapidary(&args).exits(0).json()["quantize"], format);
        }
    }
}

#[test]
fn the_rest_is_copied_and_the_same_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let [model, made] = models(dir.path(), "int4", "bfloat16");
    let (from, to) = (HfDirectory::open(Path::new(&model)).unwrap(), HfDirectory::open(Path::new(&made)).unwrap());
    let mut tiles = 0;
    for entry in to.entries() {
        if entry.dtype == tensor::DType::U8 {
            // The last dimension is a block of 64 columns.
            assert!(matches!(*entry.shape.dims(), [_, _, 576]), "{} {}", entry.name, entry.shape);
            tiles += 1;
        } else {
            let was = from.tensor(&entry.name).unwrap();
            assert!(was.bytes.as_slice() == to.tensor(&entry.name).unwrap().bytes.as_slice(), "{}", entry.name);
        }
    }
    assert!(tiles > 10 && to.entries().count() == from.entries().count() + 1, "{tiles}");
    for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
        let read = |dir: &str| fs::read(Path::new(dir).join(name)).unwrap();
        assert!(read(&model) == read(&made), "{name}");
    }
    let config: Value = serde_json::from_slice(&fs::read(Path::new(&made).join("config.json")).unwrap()).unwrap();
    let noted = json!({
        "quant_method": "lapidary", "version": 1, "format": "int4", "group_size": 32, "dtype": "bfloat16"
    });
    assert_eq!(config["quantization_config"], noted);

    // What is there is not replaced, and nothing is left beside it.
    let before = fs::read_dir(dir.path()).unwrap().count();
    let refused = lapidary(&["quantize", &model, &made, "--format", "int8"]).exits(1);
    assert!(refused.stderr.contains("exists already") && refused.stderr.contains("--force"), "{refused:#?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before);
    assert_eq!(HfDirectory::open(Path::new(&made)).unwrap().config(), Some(&config));
    let again = dir.path().join("again").to_str().unwrap().to_owned();
    lapidary(&["quantize", &model, &again, "--format", "int4", "--shard-mb", "1"]).exits(0);
    let same = lapidary(&["diff", &made, &again]).exits(0);
    assert!(same.stderr.contains("quantized to int4"), "{same:#?}");
    lapidary(&["diff", &model, &made]).exits(1);
    // MaxText's form of the model gives the same tiles.
    let maxtext = dir.path().join("maxtext").to_str().unwrap().to_owned();
    lapidary(&["convert", &model, &maxtext, "--to", "maxtext"]).exits(0);
    lapidary(&["quantize", &maxtext, &again, "--format", "int4", "--force"]).exits(0);
    lapidary(&["diff", &made, &again]).exits(0);

    let shown = lapidary(&["inspect", &made]).exits(0).stdout;
    assert!(shown.contains("in int4, a scale for 32 columns (they were bfloat16)"), "{shown}");
    assert_eq!(lapidary(&["inspect", &made, "--json"]).exits(0).json()["model"]["quantized"]["format"], "int4");
    let flops = |dir: &str| lapidary(&["flops", "--model", dir, "--json"]).exits(0).json()["total"].take();
    assert_eq!(flops(&model), flops(&made));
}

#[test]
fn what_needs_the_weights_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let [model, made] = models(dir.path(), "int8", "bfloat16");
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, load, text) = (at("out"), format!("load_parameters_path={made}"), at("text.txt"));
    fs::write(&text, "amber basalt").unwrap();
    let run = format!("base_output_directory={}", at("runs"));
    for (args, code, expected) in [
        (&["convert", &made, &out, "--to", "maxtext"][..], 1, "quantized to int8"),
        (&["convert", &made, &out, "--to", "hf"], 1, "quantized to int8"),
        (&["quantize", &made, &out, "--format", "int8"], 1, "quantized to int8"),
        (&["verify", &made, "--against", &model], 1, "quantized to int8"),
        (&["verify", &model, "--against", &made], 1, "quantized to int8"),
        (&["bench", "forward", &made], 1, "quantized to int8"),
        (&["train", "model_name=tiny-e2b", &load, "dataset_type=synthetic", "steps=1", &run], 1, "quantized to int8"),
        (&["generate", &made, "--tokens", "2", "--quantize", "int4"], 1, "int4 is made of the weights as they were"),
        (&["generate", &made, "--tokens", "2", "--no-kv-cache"], 2, "over a cache only"),
        (&["score", &made, &text, "--tokenizer", "bytes", "--quantize", "int8"], 2, "nothing to compare them with"),
        (&["score", &model, &text, "--tokenizer", "bytes", "--sequences", "2"], 2, "--sequences"),
        (&["quantize", &model, &out], 2, "--format"),
        (&["quantize", &model, &out, "--format", "int2"], 2, "neither int8 nor int4"),
    ] {
        let r = lapidary(args).exits(code);
        assert!(r.stderr.contains(expected) && !r.stderr.contains("panicked"), "{args:?}: {r:#?}");
        assert!(!Path::new(&out).exists(), "{args:?}");
    }
}

#[test]
fn files_are_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let [_, made] = models(dir.path(), "int8", "bfloat16");
    let (weights, config) = (Path::new(&made).join("model.safetensors"), Path::new(&made).join("config.json"));
    let (good, noted) = (fs::read(&weights).unwrap(), fs::read_to_string(&config).unwrap());
    let refused = |expected: &[&str]| {
        let r = lapidary(&["generate", &made, "--tokens", "2", "-n", "1"]).exits(1);
        assert!(expected.iter().all(|e| r.stderr.contains(e)) && !r.stderr.contains("panicked"), "{expected:?} {r:#?}");
    };
    fs::write(&weights, &good[..good.len() - 1]).unwrap();
    refused(&["model.safetensors"]);

    // A header of the same length that says something else.
    let header = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = good.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&weights, bytes).unwrap();
    };
    let text = String::from_utf8_lossy(&good[8..200_000.min(good.len())]).into_owned();
    let name = "layers.0.mlp.up_proj.weight";
    let entry = &text[text.find(name).unwrap()..];
    let shape = &entry[entry.find("\"shape\":[").unwrap() + 9..];
    let shape = &shape[..shape.find(']').unwrap()];
    let parts: Vec<&str> = shape.split(',').collect();
    // As many bytes, otherwise divided.
    let [tiles, blocks, block] = parts[..] else { panic!("{shape}") };
    let swapped = format!("{blocks},{tiles},{block}");
    assert_ne!(swapped, shape);
    let entry_start = &entry[..entry.find(shape).unwrap() + shape.len()];
    header(entry_start, &entry_start.replace(shape, &swapped));
    refused(&[name, "has shape"]);
    let dtype = &entry_start[..entry_start.find("\"U8\"").unwrap() + 4];
    header(dtype, &dtype.replace("\"U8\"", "\"I8\""));
    refused(&[name, "expected uint8"]);
    header("embed_tokens.tiles", "embed_tokens.tilez");
    refused(&["embed_tokens.tiles", "missing"]);
    fs::write(&weights, &good).unwrap();

    for (from, to, expected) in [
        ("\"version\": 1", "\"version\": 2", "version 2"),
        ("\"format\": \"int8\"", "\"format\": \"int3\"", "int3"),
        ("\"format\": \"int8\"", "\"format\": \"int4\"", "group_size"),
        ("\"group_size\": 64", "\"group_size\": 16", "group_size 16"),
        ("\"quant_method\": \"lapidary\"", "\"quant_method\": \"gptq\"", "quantized checkpoints are not read"),
    ] {
        assert!(noted.contains(from), "{noted}");
        fs::write(&config, noted.replace(from, to)).unwrap();
        refused(&["config.json", expected]);
    }
    // Another format with the group size that belongs to it: tiles of another size.
    let other = noted.replace("\"int8\"", "\"int4\"").replace("\"group_size\": 64", "\"group_size\": 32");
    fs::write(&config, other).unwrap();
    refused(&[name, "has shape"]);
    fs::write(&config, noted).unwrap();
    lapidary(&["generate", &made, "--tokens", "2", "-n", "1"]).exits(0);
}

#[test]
fn a_weight_that_is_no_number_stops_it() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let (made, path) = (dir.path().join("made"), model.to_str().unwrap());
    lapidary(&["init", path, "model_name=tiny-e2b"]).exits(0);
    let opened = HfDirectory::open(&model).unwrap();
    let entry = opened.entries().find(|e| e.name.ends_with("layers.1.mlp.down_proj.weight")).unwrap();
    let view = opened.tensor(&entry.name).unwrap();
    let (k, at) = (entry.shape.dims()[1], view.bytes.range().start);
    let file = view.bytes.file().path().to_owned();
    drop((view, opened));
    let mut bytes = fs::read(&file).unwrap();
    // Row 21, the third element.
    bytes[at + (21 * k + 2) * 2..][..2].copy_from_slice(&0x7f80u16.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let r = lapidary(&["quantize", path, made.to_str().unwrap(), "--format", "int4"]).exits(1);
    assert!(r.stderr.contains("layers.1.mlp.down_proj.weight") && r.stderr.contains("row 21"), "{r:#?}");
    assert!(!made.exists() && fs::read_dir(dir.path()).unwrap().count() == 1, "{r:#?}");
}
