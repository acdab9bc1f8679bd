//! `lapidary plan` and `lapidary compile`.

use crate::lapidary;

/// A model of two layers that a CPU compiles in a moment, one of them with borrowed keys and values.
const SMALL: &[&str] = &[
    "model_name=tiny-e2b",
    "override_model_config=true",
    "base_num_decoder_layers=2",
    "num_kv_shared_layers=1",
    "sliding_window_pattern=1",
    "max_target_length=32",
    "dtype=bfloat16",
    "remat_policy=full",
];

#[test]
fn a_mesh_is_recommended_without_a_device() {
    let words = [
        "plan",
        "--topology",
        "v5e:4x4",
        "model_name=gemma4-e2b",
        "max_target_length=8192",
        "per_device_batch_size=1",
        "remat_policy=full",
    ];
    let text = lapidary(&words).exits(0);
    assert!(text.stdout.starts_with("mesh ") && text.stderr.contains("recommended: ici_"), "{text:#?}");
    let json = lapidary(&[&words[..], &["--json"]].concat()).exits(0).json();
    let best = &json["meshes"][0];
    assert_eq!((best["keys"].as_str(), best["fits"].as_bool()), (json["recommended"].as_str(), Some(true)));
    let sixteen = 16u64 << 30;
    assert!(best["bytes"]["total"].as_u64().unwrap() <= sixteen && json["memory"] == sixteen);
    // Every way to write 16 as a product of four is there once.
    assert_eq!(json["meshes"].as_array().unwrap().len(), 35);
}

#[test]
fn what_does_not_fit_is_exit_code_one() {
    let run = lapidary(&[&["plan", "--devices", "2", "--memory", "0.000001"], SMALL].concat()).exits(1);
    assert!(run.stderr.contains("no mesh fits") && run.stdout.contains("does not fit"), "{run:#?}");
}

#[test]
fn mistakes_are_usage() {
    for (words, part) in [
        (&["plan", "--topology", "abacus:4"][..], "unknown device"),
        (&["plan", "--devices", "0"], "from 1 to"),
        (&["plan", "--devices", "2", "--memory=-1"], "positive number"),
        (&["plan"], "--devices"),
        (&["compile", "--topology", "v5e:4"], "such as 4x4"),
        (&["compile", "--topology", "cpu:2", "ici_tensor_parallelism=4"], "there are 2"),
    ] {
        let run = lapidary(&[words, &["model_name=tiny-e2b"]].concat()).exits(2);
        assert!(run.stderr.contains(part), "{run:#?}");
    }
}

#[test]
fn a_compiled_step_takes_the_planned_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("step");
    let words = ["compile", "--topology", "cpu:2", "--json", "--out", out.to_str().unwrap()];
    let json = lapidary(&[&words[..], SMALL].concat()).exits(0).json();
    assert_eq!(json["memory"]["arguments"], json["planned"]["arguments"], "{json:#}");
    assert!(json["collectives"].as_object().is_some_and(|c| !c.is_empty()), "{json:#}");
    assert!(json["flops"]["compiled"].as_f64() > Some(0.0) && json["fits"] == true);
    assert!(fs_err::metadata(&out).unwrap().len() > 1000);
}
