//! `lapidary plugin`.

use crate::{command, lapidary, run};

#[test]
fn the_fetched_plugin_is_listed_as_cached() {
    // In the cache already, or fetched by now: these tests need the engine anyway.
    let fetched = lapidary(&["plugin", "fetch"]).exits(0);
    let path = fetched.stdout.trim_end();
    assert!(std::path::Path::new(path).is_file(), "{path}");
    assert_eq!(fetched.stdout.lines().count(), 1);
    let json = lapidary(&["plugin", "fetch", "cpu", "--json"]).exits(0).json();
    assert_eq!((json["path"].as_str(), json["origin"].as_str()), (Some(path), Some("cache")));
    let list = lapidary(&["plugin", "list", "--json"]).exits(0).json();
    let row = list.as_array().unwrap().iter().find(|p| p["path"] == path).unwrap().clone();
    assert_eq!((row["cached"].as_bool(), &row["sha256"]["library"]), (Some(true), &json["sha256"]));
    let text = lapidary(&["plugin", "list", "--quiet"]).exits(0);
    let line = text.stdout.lines().find(|l| l.contains(json["package"].as_str().unwrap())).unwrap();
    assert!(line.starts_with("cpu ") && line.ends_with(" yes"), "{line}");
    assert!(text.stderr.is_empty());
}

#[test]
fn offline_and_unknown_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = |args: &[&str]| {
        let mut command = command(&[&["plugin", "fetch"], args].concat());
        command.env("LAPIDARY_CACHE_DIR", dir.path());
        run(command)
    };
    let offline = fetch(&["--offline"]).exits(1);
    assert!(offline.stderr.contains("LAPIDARY_PJRT_PLUGIN") && offline.stdout.is_empty(), "{}", offline.stderr);
    let unknown = fetch(&["abacus"]).exits(2);
    assert!(unknown.stderr.contains("abacus") && unknown.stderr.contains("hint:"), "{}", unknown.stderr);
}
