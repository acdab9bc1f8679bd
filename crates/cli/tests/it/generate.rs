//! `lapidary generate`, `chat` and `score` as a user runs them.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use checkpoint::safetensors::SafetensorsFile;
use serde_json::{Value, json};

use super::{Run, command, lapidary, run};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The committed cases, and those of the larger set if there is one.
fn cases() -> Vec<PathBuf> {
    let mut roots = vec![root().join("tests/golden")];
    roots.extend(std::env::var_os("LAPIDARY_GOLDEN_DIR").map(PathBuf::from));
    let mut cases: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| fs_err::read_dir(root).unwrap().map(|e| e.unwrap().path()))
        .filter(|path| path.join("golden.safetensors").is_file())
        .collect();
    cases.sort();
    cases
}

/// A tensor of ids, row by row.
fn ids(file: &SafetensorsFile, name: &str) -> Option<Vec<Vec<i64>>> {
    let view = file.tensor(name)?;
    let width = view.shape[1];
    let all: Vec<i64> =
        view.bytes.as_slice().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    Some(all.chunks_exact(width).map(<[i64]>::to_vec).collect())
}

fn list(ids: &[i64]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// A tiny model with a tokenizer of Gemma's kind and a chat template, as an instruction-tuned one has them.
fn chat_model(dir: &Path) -> String {
    let model = dir.join("model").to_str().unwrap().to_owned();
    lapidary(&["init", &model, "model_name=tiny-e2b", "--seed", "5", "--vary-norms"]).exits(0);
    for name in ["tokenizer.json", "chat_template.jinja"] {
        fs_err::copy(root().join("tests/text").join(name), Path::new(&model).join(name)).unwrap();
    }
    model
}

fn tokens(v: &Value, sequence: usize) -> Vec<i64> {
    v["sequences"][sequence]["tokens"].as_array().unwrap().iter().map(|t| t.as_i64().unwrap()).collect()
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let mut compared = 0;
    for case in cases() {
        let file = SafetensorsFile::open(&case.join("golden.safetensors")).unwrap();
        let (Some(expected), Some(inputs)) = (ids(&file, "gen_ids"), ids(&file, "input_ids")) else { continue };
        let mask = ids(&file, "attention_mask");
        let logits = file.tensor("gen_logits").unwrap();
        let vocab = logits.shape[2];
        let logits: Vec<f32> = bytemuck_floats(logits.bytes.as_slice());
        let n = expected[0].len();
        let mut args: Vec<String> = ["generate", case.join("model").to_str().unwrap()].map(str::to_owned).to_vec();
        for (row, prompt) in inputs.iter().enumerate() {
            let real = |at: &usize| mask.as_ref().is_none_or(|m| m[row][*at] != 0);
            let prompt: Vec<i64> = (0..prompt.len()).filter(real).map(|at| prompt[at]).collect();
            args.extend(["--tokens".to_owned(), list(&prompt)]);
        }
        let n_text = n.to_string();
        let rest = ["--greedy", "--ignore-eos", "-n", &n_text, "--json", "--logprobs", "2", "--dtype", "float32"];
        args.extend(rest.map(str::to_owned));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let v = lapidary(&args).exits(0).json();
        for (row, expected) in expected.iter().enumerate() {
            assert_eq!(&tokens(&v, row), expected, "{}", case.display());
            for (step, token) in expected.iter().enumerate() {
                let row_logits = &logits[(row * n + step) * vocab..][..vocab];
                let total = row_logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
                let theirs = f64::from(row_logits[*token as usize]) - total;
                let ours = &v["sequences"][row]["logprobs"][step];
                assert!((ours["logprob"].as_f64().unwrap() - theirs).abs() < 5e-4, "{ours} {theirs}");
                assert_eq!(ours["top"][0]["id"], ours["id"]);
            }
            compared += 1;
        }
    }
    assert!(compared >= 4, "{compared} sequences");
}

fn bytemuck_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn the_same_seed_is_the_same_text() {
    let model = root().join("tests/golden/e2b/model");
    let draw = |seed: &str, extra: &[&str]| {
        let mut args = vec!["generate", model.to_str().unwrap(), "--tokens", "2,7,9", "-n", "12", "--ignore-eos"];
        args.extend(["--seed", seed]);
        args.extend(extra);
        lapidary(&args).exits(0).stdout
    };
    let first = draw("1", &["--temperature", "1.5"]);
    assert_eq!(first.trim().split(',').count(), 12, "{first}");
    assert_eq!(first, draw("1", &["--temperature", "1.5"]));
    assert_ne!(first, draw("2", &["--temperature", "1.5"]));
    let greedy = draw("1", &["--greedy"]);
    assert_eq!(greedy, draw("2", &["--temperature", "0"]));
    assert_eq!(greedy, draw("3", &["--top-k", "1"]));
    // MaxText's keys mean the same.
    let keys = ["decode_sampling_strategy=topk", "decode_sampling_top_k=1"];
    assert_eq!(greedy, draw("4", &keys));
    // What is suppressed does not come.
    let token = greedy.split(',').next().unwrap();
    assert!(!draw("1", &["--suppress-tokens", token]).trim().split(',').any(|t| t == token));
}

#[test]
fn answers_in_the_chat_format() {
    let dir = tempfile::tempdir().unwrap();
    let model = chat_model(dir.path());
    let prompt = "What is the capital of France?";
    let shown = lapidary(&["generate", &model, "--prompt", prompt, "--system", "Be brief.", "--print-prompt"]).exits(0);
    assert_eq!(
        shown.stdout,
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhat is the capital of France?<turn|>\n<|turn>model\n\n"
    );
    let raw = lapidary(&["generate", &model, "--prompt", "ab", "--raw", "--print-prompt"]).exits(0);
    assert!(raw.stdout == "ab\n" && raw.stderr.contains("2 tokens: 2,"), "{raw:#?}");

    let args = ["generate", &model, "--prompt", prompt, "--temperature", "1", "--seed", "7", "-n", "24"];
    let plain = lapidary(&args).exits(0);
    let v = lapidary(&[&args[..], &["--json", "--logprobs", "0"]].concat()).exits(0).json();
    let s = &v["sequences"][0];
    assert_eq!(plain.stdout.trim_end_matches('\n'), s["text"].as_str().unwrap().trim_end_matches('\n'));
    assert!(plain.stderr.contains("tokens/s") && plain.stderr.contains("first token after"), "{plain:#?}");
    assert_eq!(v["stop_ids"], json!([1, 106, 50]));
    assert_eq!((s["prompt_tokens"][0].as_i64(), s["prompt_tokens"][1].as_i64()), (Some(2), Some(105)));
    let n = tokens(&v, 0).len();
    assert!(n == 24 && s["finish"]["reason"] == "length" || s["finish"]["reason"] == "stop_token", "{s}");
    assert_eq!(s["logprobs"].as_array().unwrap().len(), n);
    // A text that ends where a string of it comes up.
    let text = s["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let stopped = lapidary(&[&args[..], &["--json", "--stop", &stop]].concat()).exits(0).json();
    let s = &stopped["sequences"][0];
    assert_eq!(s["finish"], json!({"reason": "stop_string", "what": stop}));
    assert_eq!(s["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
}

#[test]
fn several_prompts_are_generated_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let model = chat_model(dir.path());
    let file = dir.path().join("prompt.txt");
    fs_err::write(&file, "the end").unwrap();
    let file = file.to_str().unwrap();
    let args = ["generate", &model, "--raw", "--greedy", "-n", "6", "--dtype", "float32", "--json"];
    let one = |words: &[&str]| tokens(&lapidary(&[&args[..], words].concat()).exits(0).json(), 0);
    let all =
        lapidary(&[&args[..], &["--prompt", "a", "--prompt-file", file, "--tokens", "2,9"]].concat()).exits(0).json();
    assert_eq!(tokens(&all, 0), one(&["--prompt", "a"]));
    assert_eq!(tokens(&all, 1), one(&["--prompt-file", file]));
    assert_eq!(tokens(&all, 2), one(&["--tokens", "2 9"]));
    let messages = dir.path().join("messages.json");
    fs_err::write(&messages, r#"[{"role": "user", "content": "a"}, {"role": "nobody", "content": "b"}]"#).unwrap();
    let refused = lapidary(&["generate", &model, "--messages", messages.to_str().unwrap()]).exits(1);
    assert!(refused.stderr.contains("no such role: nobody"), "{refused:#?}");
}

#[test]
fn without_a_cache_and_in_fewer_bits() {
    let dir = tempfile::tempdir().unwrap();
    let model = chat_model(dir.path());
    let prompt = list(&(0..40).map(|i| 4 + i * 7 % 300).collect::<Vec<_>>());
    let run = |extra: &[&str]| {
        let args = ["generate", &model, "--tokens", &prompt, "--greedy", "-n", "12", "--ignore-eos", "--json"];
        let rest = ["--dtype", "float32", "--logprobs", "0"];
        lapidary(&[&args[..], &rest, extra].concat()).exits(0).json()
    };
    let (cached, plain, int8) = (run(&[]), run(&["--no-kv-cache"]), run(&["--quantize", "int8"]));
    assert_eq!(tokens(&cached, 0), tokens(&plain, 0));
    // The first token has the same prompt before it everywhere.
    let first = |v: &Value| v["sequences"][0]["logprobs"][0]["logprob"].as_f64().unwrap();
    assert!((first(&cached) - first(&plain)).abs() < 1e-3);
    assert_eq!(tokens(&int8, 0).len(), 12);
    assert_ne!(int8["sequences"][0]["logprobs"], cached["sequences"][0]["logprobs"]);
}

/// Runs `chat` with lines on stdin.
fn chat(model: &str, extra: &[&str], lines: &str) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("lines");
    fs_err::write(&input, lines).unwrap();
    let mut command = command(&[&["chat", model, "-n", "8", "--seed", "3"], extra].concat());
    command.stdin(fs_err::File::open(&input).unwrap().into_parts().0);
    run(command)
}

#[test]
fn a_conversation_goes_on_and_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let model = chat_model(dir.path());
    let talk = chat(&model, &["--temperature", "0"], "a b\nthe\n/reset\na b\n/what\n\n/exit\nnot read\n").exits(0);
    let figures: Vec<&str> = talk.stderr.lines().filter(|l| l.contains("prompt tokens")).collect();
    assert_eq!(figures.len(), 3, "{talk:#?}");
    // After a reset the same question is fed, and answered, as at first.
    let fed = |at: usize| figures[at].split(' ').next().unwrap();
    assert_eq!(fed(0), fed(2));
    let alone = chat(&model, &["--temperature", "0"], "a b\n").exits(0);
    assert!(talk.stdout.starts_with(&alone.stdout) && talk.stdout.ends_with(&alone.stdout), "{talk:#?} {alone:#?}");
    assert!(talk.stderr.contains("no such command: /what"), "{talk:#?}");
    // Room for one question only.
    let small =
        chat(&model, &["--context", "40", "--temperature", "0"], "a b\na b c d e f g h i j k l m n o p\n").exits(0);
    assert!(small.stderr.contains("there is room for 40"), "{small:#?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let model = chat_model(dir.path());
    let mut command =
        command(&["chat", &model, "--ignore-eos", "--context", "4096", "--seed", "1", "--temperature", "1"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut answer = child.stdout.take().unwrap();
    let interrupt = || {
        let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(status.success());
    };
    input.write_all(b"the\n").unwrap();
    // The first bytes of the answer: it is being written.
    let mut some = [0u8; 4];
    std::io::Read::read_exact(&mut answer, &mut some).unwrap();
    interrupt();
    // Whoever does not read its output must not stop it.
    let drain = std::thread::spawn(move || std::io::copy(&mut answer, &mut std::io::sink()).unwrap());
    assert!(said.by_ref().any(|line| line.unwrap() == "stopped"));
    input.write_all(b"/exit\n").unwrap();
    assert!(child.wait().unwrap().success());
    drain.join().unwrap();
}

#[test]
fn a_score_is_the_sum_of_the_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model").to_str().unwrap().to_owned();
    lapidary(&["init", &model, "model_name=tiny-e2b", "--seed", "6", "--vary-norms"]).exits(0);
    let text = "one é!";
    let (plain, rows) = (dir.path().join("text.txt"), dir.path().join("rows.jsonl"));
    fs_err::write(&plain, text).unwrap();
    fs_err::write(&rows, format!("{}\n\n{}\n", json!({"text": text}), json!({"text": text, "other": 1}))).unwrap();
    let score = |file: &Path, extra: &[&str]| {
        let file = file.to_str().unwrap();
        let args = ["score", &model, file, "--tokenizer", "bytes", "--dtype", "float32", "--json"];
        lapidary(&[&args[..], extra].concat()).exits(0).json()
    };
    // Every prefix is a prompt, and what follows it is looked up among all tokens.
    let all: Vec<i64> = [2].into_iter().chain(text.bytes().map(|b| 4 + i64::from(b))).collect();
    let prefixes: Vec<String> = (1..all.len()).map(|n| list(&all[..n])).collect();
    let mut args =
        vec!["generate", &model, "--greedy", "-n", "1", "--json", "--logprobs", "5000", "--dtype", "float32"];
    prefixes.iter().for_each(|p| args.extend(["--tokens", p]));
    let v = lapidary(&args).exits(0).json();
    let expected: f64 = (1..all.len())
        .map(|n| {
            let top = v["sequences"][n - 1]["logprobs"][0]["top"].as_array().unwrap();
            top.iter().find(|t| t["id"] == all[n]).unwrap()["logprob"].as_f64().unwrap()
        })
        .sum();
    let close = |v: &Value, expected: f64| {
        let got = v["log_likelihood"].as_f64().unwrap();
        assert!((got - expected).abs() < 1e-3, "{v}: {expected}");
    };
    let v = score(&plain, &[]);
    close(&v, expected);
    assert_eq!((v["tokens"].as_u64(), v["bytes"].as_u64()), (Some(7), Some(7)));
    let loss = -expected / 7.0;
    assert!((v["perplexity"].as_f64().unwrap() / loss.exp() - 1.0).abs() < 1e-3);
    assert!((v["bits_per_byte"].as_f64().unwrap() - loss / std::f64::consts::LN_2).abs() < 1e-3);
    let v = score(&rows, &["--documents"]);
    close(&v, 2.0 * expected);
    close(&v["each"][1], expected);
    assert_eq!((v["documents"].as_u64(), v["each"][1]["line"].as_u64()), (Some(2), Some(3)));
    // Windows of two tokens: the start token and what lies between. Every token still counts once.
    let v = score(&plain, &["--window", "2", "--stride", "1"]);
    assert_eq!(v["tokens"], 7);
    assert!((v["log_likelihood"].as_f64().unwrap() - expected).abs() > 1e-2, "{v}");
    // Without a start token the first is given.
    assert_eq!(score(&plain, &["--no-bos"])["tokens"], 6);
}

#[test]
fn what_is_missing_is_said() {
    let e2b = root().join("tests/golden/e2b/model").to_str().unwrap().to_owned();
    let e2b = e2b.as_str();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.jsonl");
    fs_err::write(&file, "{\"text\": \"a\"}\n{\"txt\": 1}\n").unwrap();
    let file = file.to_str().unwrap();
    let model = chat_model(dir.path());
    for (args, code, expected) in [
        (&["generate", e2b][..], 2, "--prompt"),
        (&["generate", e2b, "--prompt", "x"], 2, "--tokenizer"),
        (&["generate", e2b, "--prompt", "x", "--tokenizer", "bytes"], 2, "largest id"),
        (&["generate", e2b, "--chat", "--prompt", "x"], 2, "no chat template"),
        (&["generate", e2b, "--tokens", "2,x"], 2, "`x` is no token id"),
        (&["generate", e2b, "--tokens", ""], 2, "no tokens"),
        (&["generate", e2b, "--tokens", "2,999"], 1, "outside the vocabulary"),
        (&["generate", e2b, "--tokens", "2", "--top-p", "7"], 2, "top_p cannot be 7"),
        (&["generate", e2b, "--tokens", "2", "--context", "100000"], 2, "positions"),
        (&["generate", e2b, "--tokens", "2,3,4", "--context", "2"], 2, "--context"),
        (&["generate", e2b, "--tokens", "2", "--logprobs", "2"], 2, "--json"),
        (&["generate", &model, "--prompt", "x", "--tools", file], 2, "rows.jsonl"),
        (&["generate", &model, "--prompt", "x", "--chat-template", "/nonexistent"], 1, "/nonexistent"),
        (&["generate", e2b, "--tokens", "2", "--quantize", "int3"], 2, "neither int8 nor int4"),
        (&["chat", e2b], 2, "no chat template"),
        (&["score", &model, "/nonexistent"], 1, "/nonexistent"),
        (&["score", &model, file], 1, "rows.jsonl:2: there is no `text`"),
        (&["score", &model, file, "--column", "txt"], 1, "rows.jsonl:1"),
        (&["score", &model, file, "--window", "4", "--stride", "5"], 2, "stride"),
    ] {
        let r = lapidary(args).exits(code);
        assert!(r.stderr.contains(expected) && !r.stderr.contains("panicked"), "{args:?}: {r:#?}");
    }
}

#[test]
fn fewer_bits_are_further_from_the_weights_as_stored() {
    let dir = tempfile::tempdir().unwrap();
    let (model, file) = (dir.path().join("model").to_str().unwrap().to_owned(), dir.path().join("text.txt"));
    lapidary(&["init", &model, "model_name=tiny-e2b", "--seed", "6", "--vary-norms"]).exits(0);
    fs_err::write(&file, "amber basalt cobalt dolomite emerald flint garnet").unwrap();
    let file = file.to_str().unwrap();
    let score = |extra: &[&str]| {
        let args = ["score", &model, file, "--tokenizer", "bytes", "--dtype", "float32", "--json"];
        lapidary(&[&args[..], extra].concat()).exits(0).json()
    };
    let plain = score(&[]);
    let number =
        |v: &Value, path: &str| v.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path}: {v}"));
    let [eight, four] = ["int8", "int4"].map(|bits| score(&["--quantize", bits, "--sequences", "2"]));
    for v in [&eight, &four] {
        assert_eq!(v["tokens"], plain["tokens"]);
        // The same loss as without a comparison, over a cache.
        let (stored, alone) = (number(v, "/as_stored/perplexity"), number(&plain, "/perplexity"));
        assert!((stored / alone - 1.0).abs() < 1e-3, "{stored} {alone}");
        assert!(number(v, "/distance/max_kl") >= number(v, "/distance/mean_kl"));
    }
    let (eight, four) = (number(&eight, "/distance/mean_kl"), number(&four, "/distance/mean_kl"));
    assert!(0.0 < eight && eight < four && four < 1.0, "{eight} {four}");
    lapidary(&["score", &model, file, "--tokenizer", "bytes", "--quantize", "int8", "--documents"]).exits(2);
}

#[test]
fn products_are_told_by_role() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model").to_str().unwrap().to_owned();
    lapidary(&["init", &model, "model_name=tiny-e2b"]).exits(0);
    let bench = |extra: &[&str]| {
        lapidary(&[&["bench", "products", &model, "--repeat", "1", "--json"], extra].concat()).exits(0).json()
    };
    let stored = bench(&[]);
    let bytes = |v: &Value| v["bytes"].as_u64().unwrap();
    let products = stored["products"].as_array().unwrap();
    assert_eq!(products.iter().map(bytes).sum::<u64>(), bytes(&stored));
    assert!(products.iter().all(|p| p["bytes_per_second"].as_f64().unwrap() > 0.0 && p["count"].as_u64().unwrap() > 0));
    assert!(products.iter().any(|p| p["name"] == "mlp.down_proj.weight"), "{stored}");
    assert!(bytes(&bench(&["--quantize", "int4", "--rows", "3"])) < bytes(&stored));
    lapidary(&["bench", "products", &model, "--repeat", "0"]).exits(2);
}
