//! Meshes of virtual devices as a user asks for them: training goes on from one to another, golden cases agree on all.

use std::path::Path;

use super::lapidary;
use super::train::{alone, losses, train, write_text};

/// What every run has in common: so small a rate that rounding in another order is not amplified.
const COMMON: [&str; 2] = ["learning_rate=1e-5", "learning_rate_schedule_steps=9"];

#[test]
fn a_run_goes_on_over_other_devices() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let with = |name: &str, more: &[&str]| train(dir.path(), name, &[&COMMON[..], more].concat()).exits(0);
    with("one", &["steps=9"]);
    let eight = with("many", &["steps=3", "per_device_batch_size=1", "ici_fsdp_parallelism=8"]);
    assert!(eight.stderr.contains("all-gather: ") && eight.stderr.contains("each device sends"), "{}", eight.stderr);
    assert!(!eight.stderr.contains("shardy"), "{}", eight.stderr);
    let two =
        with("many", &["steps=6", "per_device_batch_size=4", "ici_context_parallelism=2", "ici_fsdp_parallelism=1"]);
    assert!(two.stderr.contains("goes on after step 3"), "{}", two.stderr);
    let one = with("many", &["steps=9"]);
    assert!(one.stderr.contains("goes on after step 6"), "{}", one.stderr);
    let (wanted, found) = (losses(&dir.path().join("one")), losses(&dir.path().join("many")));
    assert_eq!(found.len(), 9);
    assert!(wanted[8].1 < wanted[0].1, "{wanted:?}");
    for (w, f) in wanted.iter().zip(&found) {
        assert!(w.0 == f.0 && (w.1 - f.1).abs() <= 1e-5 * w.1, "{w:?} {f:?}");
    }
    // The same rows of the same text would come in another order from other batches.
    let other = train(dir.path(), "many", &[&COMMON[..], &["steps=12", "per_device_batch_size=4"]].concat()).exits(2);
    assert!(other.stderr.contains("micro_batch_size_to_train_on was 8"), "{}", other.stderr);
}

#[test]
fn meshes_that_do_not_fit_are_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let cases: [(&[&str], &[&str]); 4] = [
        (&["ici_tensor_parallelism=2"], &["ici_tensor_parallelism", "embed_tokens.weight", "515"]),
        (&["ici_fsdp_parallelism=3", "num_cpu_devices=8"], &["ici_fsdp_parallelism=3 wants 3 devices, there are 8"]),
        (&["ici_fsdp_parallelism=8", "per_device_batch_size=0.5"], &["per_device_batch_size", "4 sequences"]),
        (&["ici_context_parallelism=3", "ici_fsdp_parallelism=1"], &["max_target_length", "128"]),
    ];
    for (more, told) in cases {
        let r = train(dir.path(), "refused", more).exits(2);
        for text in told {
            assert!(r.stderr.contains(text), "{more:?}: {}", r.stderr);
        }
    }
    assert!(!dir.path().join("refused").exists());
}

#[test]
fn golden_cases_agree_on_every_mesh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let all: [&[&str]; 5] = [
        &["ici_fsdp_parallelism=8"],
        &["ici_data_parallelism=2", "ici_fsdp_parallelism=4"],
        &["ici_fsdp_parallelism=4", "ici_tensor_parallelism=2"],
        &["ici_tensor_parallelism=4"],
        &["ici_context_parallelism=2", "ici_fsdp_parallelism=2"],
    ];
    // One case on all of them, windows and padding over devices that share a sequence, the others in turn.
    let cases =
        [("e2b", &all[..]), ("long", &all[4..]), ("padded", &all[4..]), ("e4b", &all[2..3]), ("keqv", &all[3..4])];
    for (case, meshes) in cases {
        let (model, golden) = (root.join(case).join("model"), root.join(case).join("golden.safetensors"));
        for mesh in meshes {
            let mut args = vec!["verify", model.to_str().unwrap(), "--golden", golden.to_str().unwrap()];
            args.extend(["--max-kl-div", "1e-6", "--max-abs-diff", "2e-4", "--trace", "--json"]);
            args.extend(*mesh);
            let r = lapidary(&args).exits(0);
            assert!(r.stderr.contains("devices share them"), "{}", r.stderr);
            assert_eq!(r.json()["verdict"]["passed"], true, "{case} {mesh:?}");
        }
    }
}
