//! `lapidary flops`.

use crate::lapidary;

/// What MaxText's own function returns: TFLOP per step of attention, of weights, and in all.
const ORACLE: &[(&str, u32, u32, u32, f64, f64, f64)] = &[
    ("gemma4-e2b", 1, 128, 1, 0.008455716864, 1.750635380736, 1.759091097600),
    ("gemma4-e2b", 1, 2048, 1, 1.352914698240, 28.010166091776, 29.363080790016),
    ("gemma4-e2b", 4, 4096, 1, 16.956530884608, 224.081328734208, 241.037859618816),
    ("gemma4-e2b", 1, 8192, 1, 14.340895801344, 112.040664367104, 126.381560168448),
    ("gemma4-e2b", 12, 2048, 1, 16.234976378880, 336.121993101312, 352.356969480192),
    ("gemma4-e2b", 1, 2048, 4, 4.0 * 1.352914698240, 4.0 * 28.010166091776, 117.452323160064),
    ("gemma4-e4b", 1, 128, 1, 0.009865003008, 3.566500577280, 3.576365580288),
    ("gemma4-e4b", 1, 2048, 1, 1.510754746368, 57.064009236480, 58.574763982848),
    ("gemma4-e4b", 4, 4096, 1, 18.309445582848, 456.512073891840, 474.821519474688),
    ("gemma4-e4b", 1, 8192, 1, 15.039901728768, 228.256036945920, 243.295938674688),
    ("gemma4-e4b", 12, 2048, 1, 18.129056956416, 684.768110837760, 702.897167794176),
    ("gemma4-e4b", 1, 2048, 4, 4.0 * 1.510754746368, 4.0 * 57.064009236480, 234.299055931392),
];

#[test]
fn agrees_with_maxtext_to_a_billionth() {
    for &(model, batch, length, accumulation, attention, learnable, total) in ORACLE {
        let words = [
            "flops".to_owned(),
            "--json".to_owned(),
            format!("model_name={model}"),
            format!("per_device_batch_size={batch}"),
            format!("max_target_length={length}"),
            format!("gradient_accumulation_steps={accumulation}"),
        ];
        let json = lapidary(&words.iter().map(String::as_str).collect::<Vec<_>>()).exits(0).json();
        for (part, theirs) in [("attention", attention), ("learnable", learnable), ("total", total)] {
            let ours = json["flops_per_step"][part].as_f64().unwrap();
            assert!((ours / 1e12 - theirs).abs() < 1e-9 * theirs, "{words:?} {part}: {ours}, {theirs}e12");
            let tokens = json["tokens_per_step"].as_f64().unwrap();
            assert_eq!(tokens, f64::from(batch * length * accumulation));
            let per_token = json["flops_per_token"][part].as_f64().unwrap();
            assert!((per_token * tokens - ours).abs() <= 1e-12 * ours);
            // The layers hold all attention, and all weights but the head and the per-layer projection.
            let layers: f64 = json["layers"].as_array().unwrap().iter().filter_map(|l| l[part].as_f64()).sum();
            if part == "attention" {
                assert!((layers - ours).abs() <= 1e-12 * ours);
            } else if part == "learnable" {
                assert!(layers < ours);
            }
        }
    }
}

#[test]
fn parameters_and_layers() {
    for (model, parameters, layers, donors) in
        [("gemma4-e2b", 4_628_569_379u64, 35, [13, 14]), ("gemma4-e4b", 7_463_013_418, 42, [22, 23])]
    {
        let json = lapidary(&["flops", &format!("model_name={model}"), "--json"]).exits(0).json();
        assert_eq!(json["parameters"]["total"], parameters);
        let parts = json["parameters"]["by_part"].as_object().unwrap();
        assert_eq!(parts.values().filter_map(serde_json::Value::as_u64).sum::<u64>(), parameters);
        let rows = json["layers"].as_array().unwrap();
        assert_eq!(rows.len(), layers);
        let mut found: Vec<u64> = rows.iter().filter_map(|l| l["kv_donor"].as_u64()).collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, donors);
        assert_eq!(rows[0]["owns_kv"], true);
        assert_eq!(rows[layers - 1]["kind"], "full_attention");
    }
}

#[test]
fn the_table_for_people() {
    let run = lapidary(&["flops", "model_name=gemma4-e2b", "per_device_batch_size=1", "--peak", "h100-sxm"]).exits(0);
    for line in [
        "gemma4-e2b: a training step of 1.0 x 2048 tokens x 1 = 2,048 tokens on each device",
        "   14  full           own       6144     43,262,465            103.079            531.502",
        "   15  sliding      of 13      12288     63,708,929             22.549            782.758",
        "attention                           1.352914698         0.660603    4.61%",
        "learnable                          28.010166092        13.676839   95.39%",
        "total                              29.363080790        14.337442  100.00%",
        "total                             4,628,569,379",
        "at 989.5 TFLOP/s of NVIDIA H100 SXM, bfloat16 (NVIDIA H100 datasheet, half of its figures with sparsity)",
    ] {
        assert!(run.stdout.lines().any(|l| l == line), "{line}\n{}", run.stdout);
    }
    assert!(run.stderr.is_empty(), "{}", run.stderr);
}

#[test]
fn a_forward_pass_is_a_third_of_a_step() {
    let words = ["flops", "model_name=tiny-e2b", "per_device_batch_size=2", "max_target_length=40", "--json"];
    let step = lapidary(&words).exits(0).json();
    let forward = lapidary(&[&words[..], &["--forward"]].concat()).exits(0).json();
    let total = |json: &serde_json::Value| json["flops_per_step"]["total"].as_f64().unwrap();
    assert!((total(&step) - 3.0 * total(&forward)).abs() < 1e-6);
    assert_eq!((forward["pass"].as_str(), forward["tokens_per_step"].as_u64()), (Some("forward"), Some(80)));
}

#[test]
fn a_checkpoint_gives_the_shape() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny");
    let path = path.to_str().unwrap();
    lapidary(&["init", path, "model_name=tiny-e2b"]).exits(0);
    let batch = ["per_device_batch_size=3", "max_target_length=17", "--json"];
    let of = |args: &[&str]| {
        let mut json = lapidary(&[&["flops"], args, &batch[..]].concat()).exits(0).json();
        json["model"].take();
        json
    };
    assert_eq!(of(&["--model", path]), of(&["model_name=tiny-e2b"]));
    let twice = lapidary(&["flops", "--model", path, "override_model_config=true", "base_emb_dim=8"]).exits(2);
    assert!(twice.stderr.contains("base_emb_dim") && twice.stderr.contains("hint:"), "{}", twice.stderr);
    assert!(lapidary(&["flops", "--model", "/no/such/directory"]).exits(1).stderr.contains("/no/such/directory"));
}

#[test]
fn peaks() {
    let run = lapidary(&["flops", "model_name=gemma4-e4b", "--peak", "tpu-v5e:bf16", "--json"]).exits(0).json();
    let peak = &run["peak"][0];
    assert_eq!(peak["flops_per_second"], 197e12);
    let seconds = run["flops_per_step"]["total"].as_f64().unwrap() / 197e12;
    assert_eq!(peak["seconds_per_step"], seconds);

    let table = lapidary(&["flops", "--peak", "list"]).exits(0).stdout;
    assert!(table.lines().any(|l| l.starts_with("mi300x") && l.contains("1307.4")), "{table}");
    assert!(lapidary(&["flops", "--peak", "list", "--json"]).exits(0).json().as_array().unwrap().len() > 10);

    let unknown = lapidary(&["flops", "model_name=tiny-e2b", "--peak", "abacus"]).exits(2);
    assert!(unknown.stderr.contains("hint: known: tpu-v4"), "{}", unknown.stderr);
    assert!(unknown.stdout.is_empty());
}

#[test]
fn this_machine_is_measured() {
    let json = lapidary(&["flops", "model_name=tiny-e2b", "--peak", "measure:float32", "--json"]).exits(0).json();
    let peak = &json["peak"][0];
    assert_eq!((json["peak"].as_array().unwrap().len(), peak["dtype"].as_str()), (1, Some("float32")));
    let rate = peak["flops_per_second"].as_f64().unwrap();
    // Neither a clock that stands still nor a product that was not computed.
    assert!((1e8..1e15).contains(&rate), "{rate}");
    let m = &peak["measurement"];
    assert!(m["best_seconds"].as_f64() <= m["median_seconds"].as_f64());
}

#[test]
fn no_model_is_an_error_with_advice() {
    let run = lapidary(&["flops", "per_device_batch_size=1"]).exits(2);
    for part in ["no model is chosen", "gemma4-e2b", "hint: `--model DIR`"] {
        assert!(run.stderr.contains(part), "{part}\n{}", run.stderr);
    }
    assert!(run.stdout.is_empty());
}
