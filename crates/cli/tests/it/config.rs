//! `lapidary config`.

use crate::{command, lapidary, run};

#[test]
fn origins_of_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yml");
    fs_err::write(&file, "model_name: tiny-e2b\nsteps: 7\nlearning_rate: 1e-4\n").unwrap();
    let mut command = command(&["config", "show", file.to_str().unwrap(), "max_target_length=64", "--json"]);
    command.env("LAPIDARY_DTYPE", "float32");
    let json = run(command).exits(0).json();
    let setting = |key: &str| {
        let all = json["settings"].as_array().unwrap();
        all.iter().find(|s| s["key"] == key).unwrap_or_else(|| panic!("{key}")).clone()
    };
    let origin = |key: &str| setting(key)["origin"].as_str().unwrap().to_owned();
    assert_eq!(origin("base_emb_dim"), "models/tiny-e2b.yml:6, built in");
    assert_eq!(origin("steps"), format!("{}:2", file.display()));
    assert_eq!(origin("max_target_length"), "command line");
    assert_eq!(origin("dtype"), "environment LAPIDARY_DTYPE");
    assert_eq!(origin("adam_b1"), "default");
    assert_eq!((setting("steps")["value"].as_i64(), setting("steps")["default"].as_i64()), (Some(7), Some(150_001)));
    assert!(setting("steps")["doc"].as_str().unwrap().ends_with('.'));
    assert_eq!((setting("adam_b1")["set"].as_bool(), setting("dtype")["set"].as_bool()), (Some(false), Some(true)));
    assert_eq!(json["resolved"]["run"]["steps"], 7);
    assert_eq!(json["model"], "tiny-e2b");
}

#[test]
fn filters() {
    let show = |extra: &[&str]| {
        lapidary(&[&["config", "show", "model_name=tiny-e2b", "steps=20"], extra].concat()).exits(0).stdout
    };
    let all = show(&[]);
    assert_eq!(show(&["--all"]), all);
    assert!(all.lines().count() > 100);
    let set = show(&["--set"]);
    assert!(set.contains("\nBatch, length and steps\n  steps") && !set.contains("adam_b1"), "{set}");
    let schedule = show(&["--category", "schedule", "--docs"]);
    assert!(schedule.starts_with("Learning rate\n  learning_rate = 3e-5  (default)\n      "), "{schedule}");
    assert!(!schedule.contains("adam_b1"));
    let wrong = lapidary(&["config", "show", "model_name=tiny-e2b", "--category", "colour"]).exits(2);
    assert!(wrong.stderr.contains("optimizer"), "{}", wrong.stderr);
}

#[test]
fn all_problems_at_once() {
    let words =
        ["config", "show", "model_name=gemma4-e2b", "steps=x", "learning_rat=1", "use_multimodal=true", "emb_dim=3"];
    let run = lapidary(&words).exits(2);
    for part in ["has 4 problems", "`x` is not a whole number", "`learning_rate`", "use_multimodal", "base_emb_dim"] {
        assert!(run.stderr.contains(part), "{part}\n{}", run.stderr);
    }
    assert!(run.stdout.is_empty(), "{}", run.stdout);
    let json = lapidary(&[&words[..], &["--json"]].concat()).exits(2).json();
    let keys: Vec<&str> = json["problems"].as_array().unwrap().iter().filter_map(|p| p["key"].as_str()).collect();
    assert_eq!(keys.len(), 4, "{keys:?}");
    assert!(keys.contains(&"learning_rat"));
}

#[test]
fn explanations() {
    let run = lapidary(&["config", "explain", "remat_policy", "emb_dim", "remat_policy=none", "model_name=tiny-e2b"]);
    let text = run.exits(0).stdout;
    for part in ["remat_policy\n", "none (command line)", "LAPIDARY_REMAT_POLICY", "emb_dim\n", "`base_emb_dim`"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let json = lapidary(&["config", "explain", "steps", "--json"]).exits(0).json();
    assert_eq!((json[0]["key"].as_str(), json[0]["default"].as_str()), (Some("steps"), Some("150001")));
    assert!(json[0]["current"].is_null());
}

#[test]
fn an_unknown_key_does_not_hide_the_others() {
    let run = lapidary(&["config", "explain", "stepz", "steps"]).exits(2);
    assert!(run.stdout.starts_with("steps\n"), "{}", run.stdout);
    assert!(run.stderr.contains("stepz: unknown key") && run.stderr.contains("did you mean"), "{}", run.stderr);
}

#[test]
fn all_keys_are_listed() {
    let text = lapidary(&["config", "explain"]).exits(0).stdout;
    assert!(text.starts_with("Model\n  model_name = "), "{text}");
    assert!(text.contains("\n  lora.lora_rank = "));
    let json = lapidary(&["config", "explain", "--json"]).exits(0).json();
    assert!(json.as_array().unwrap().len() > 140);
}
