//! `lapidary report`.

use std::fmt::Write;
use std::path::Path;

use crate::lapidary;

/// A run directory with a line for every step, an evaluation every fifth, a loss that is none at step 7.
fn run_directory(dir: &Path, name: &str, steps: u32, scale: f64) -> String {
    let run = dir.join(name);
    fs_err::create_dir_all(run.join("metrics")).unwrap();
    let mut text = String::new();
    for step in 0..steps {
        let loss = if step == 7 { "null".to_owned() } else { (scale * (2.0 + 6.0 / f64::from(step + 1))).to_string() };
        writeln!(
            text,
            "{{\"step\":{step},\"run_name\":\"{name}\",\"wall_time\":{},\"learning/loss\":{loss},\
             \"learning/current_learning_rate\":{},\"learning/raw_grad_norm\":{},\"perf/step_time_seconds\":{},\
             \"perf/per_device_tokens_per_sec\":{},\"perf/mfu\":0.4,\"perf/memory_bytes\":{},\
             \"perf/data_wait_seconds\":0.05,\"optim/step_skipped\":{}}}",
            1000.0 + 0.5 * f64::from(step),
            1e-5 * f64::from(step),
            300.0 / f64::from(step + 1),
            if step == 0 { 10.0 } else { 0.5 },
            if step == 0 { 25.0 } else { 512.0 },
            2_000_000_000u64 + u64::from(step),
            f64::from(u8::from(step == 3)),
        )
        .unwrap();
        if step % 5 == 0 {
            writeln!(
                text,
                "{{\"step\":{step},\"run_name\":\"{name}\",\"eval/avg_loss\":{},\"perf/eval_seconds\":2.0}}",
                3.0 * scale
            )
            .unwrap();
        }
    }
    fs_err::write(run.join("metrics/metrics.jsonl"), text).unwrap();
    run.to_str().unwrap().to_owned()
}

#[test]
fn figures_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = run_directory(dir.path(), "first", 20, 1.0);
    let json = lapidary(&["report", &run, "--json"]).exits(0).json();
    let s = &json["runs"][0];
    assert_eq!((s["run"].as_str(), s["steps"].as_u64(), s["last_step"].as_u64()), (Some("first"), Some(20), Some(19)));
    assert_eq!((s["final_loss"].as_f64(), s["min_loss_step"].as_u64()), (Some(2.3), Some(19)));
    assert_eq!((s["median_step_seconds"].as_f64(), s["step_seconds"].as_f64()), (Some(0.5), Some(19.5)));
    assert_eq!((s["median_mfu"].as_f64(), s["peak_memory_bytes"].as_u64()), (Some(0.4), Some(2_000_000_019)));
    assert_eq!((s["wall_seconds"].as_f64(), s["eval_seconds"].as_f64()), (Some(19.5), Some(8.0)));
    assert_eq!((s["non_finite_losses"].as_u64(), s["skipped_steps"].as_u64()), (Some(1), Some(1)));
    assert!((s["data_wait_share"].as_f64().unwrap() - 1.0 / 19.5).abs() < 1e-9);

    let text = lapidary(&["report", &run]).exits(0).stdout;
    for part in ["20 (0 to 19)", "2.3000 at step 19", "40.00%", "2.00 GB", "1.0 s (5.1%)", "losses not finite"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn a_page_needs_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let first = run_directory(dir.path(), "first", 20, 1.0);
    let second = run_directory(dir.path(), "second & last", 12, 0.9);
    let out = dir.path().join("page.html");
    let out = out.to_str().unwrap();
    lapidary(&["report", &first, &second, "--out", out, "--title", "a <b> c", "--smooth", "0.5"]).exits(0);
    let page = fs_err::read_to_string(out).unwrap();
    assert_eq!(page.matches("<figure>").count(), 8);
    assert!(page.contains("<h1>a &lt;b&gt; c</h1>") && page.contains("second &amp; last"));
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("moving average"));
    for foreign in ["<script", "href=", "src=", "url(", "@import", "NaN", "inf\""] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    let out = dir.path().join("curves.svg");
    lapidary(&["report", &first, &second, "--out", out.to_str().unwrap(), "--log-loss"]).exits(0);
    let svg = fs_err::read_to_string(out).unwrap();
    assert!(svg.starts_with("<svg xmlns=") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("Loss, logarithmic"));
}

#[test]
fn damage_is_named_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.jsonl");
    let path = file.to_str().unwrap();
    fs_err::write(&file, "{\"step\":0,\"learning/loss\":1}\n{\"step\":1,\"le\n{\"step\":2,\"learning/loss\":1}\n")
        .unwrap();
    let run = lapidary(&["report", path]).exits(0);
    assert!(run.stderr.contains(&format!("{path}:2: line passed over")), "{run:?}");
    let json = lapidary(&["report", path, "--json"]).exits(0).json();
    assert_eq!((json["damaged_lines"].as_u64(), json["damaged"][0]["line"].as_u64()), (Some(1), Some(2)));
    assert_eq!(json["runs"][0]["run"], "m.jsonl");
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().to_str().unwrap();
    assert!(lapidary(&["report", empty]).exits(1).stderr.contains("no metrics found"));
    assert!(lapidary(&["report", "/nowhere/at/all"]).exits(1).stderr.contains("/nowhere/at/all"));
    lapidary(&["report"]).exits(2);
    let run = run_directory(dir.path(), "r", 3, 1.0);
    assert!(lapidary(&["report", &run, "--out", "x.png"]).exits(2).stderr.contains(".html or .svg"));
    assert!(lapidary(&["report", &run, "--smooth", "1"]).exits(2).stderr.contains("--smooth"));
}
