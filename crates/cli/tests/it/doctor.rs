//! `lapidary doctor`.

use serde_json::Value;

use crate::{command, lapidary, run};

fn check<'a>(json: &'a Value, name: &str) -> &'a Value {
    json["checks"].as_array().unwrap().iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("{name}: {json}"))
}

#[test]
fn a_machine_that_runs_these_tests_has_what_is_needed() {
    let json = lapidary(&["doctor", "--fetch", "--json"]).exits(0).json();
    assert_eq!(json["ok"], true);
    assert_eq!(check(&json, "engine")["status"], "ok");
    assert_eq!(check(&json, "plugin")["data"]["pinned"], true);
    for name in ["fetching", "program cache", "disk", "processor", "cores", "memory", "environment"] {
        let check = check(&json, name);
        assert_ne!(check["status"], "fail", "{check}");
        // A hint, and only where something is off.
        assert_eq!(check["hint"].is_null(), check["status"] == "ok", "{check}");
    }
    let text = lapidary(&["doctor"]).exits(0).stdout;
    assert!(text.lines().any(|l| l.starts_with("ok    engine ")), "{text}");
}

#[test]
fn a_missing_plugin_is_a_failure_with_a_hint_and_no_download() {
    let dir = tempfile::tempdir().unwrap();
    let mut doctor = command(&["doctor"]);
    doctor.env("LAPIDARY_CACHE_DIR", dir.path()).env_remove("LAPIDARY_PJRT_PLUGIN");
    let found = run(doctor).exits(1);
    assert!(found.stdout.starts_with("fail  plugin"), "{}", found.stdout);
    assert!(found.stdout.contains("hint: `lapidary plugin fetch`"), "{}", found.stdout);
    assert!(!dir.path().join("plugins").exists());
}

#[test]
fn a_file_that_is_no_plugin() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("plugin.so");
    fs_err::write(&file, b"not a library").unwrap();
    let json = lapidary(&["doctor", "--plugin", file.to_str().unwrap(), "--json"]).exits(1).json();
    assert_eq!(check(&json, "plugin")["status"], "warn");
    assert_eq!(check(&json, "engine")["status"], "fail");
}
