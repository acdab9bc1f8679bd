//! The download of a plugin.

use std::cell::RefCell;

use lapidary_pjrt::plugins::{LocateOptions, Origin, candidates, locate};

#[test]
fn a_plugin_is_fetched_once_and_then_found() {
    let dir = tempfile::tempdir().unwrap();
    let steps = RefCell::new(Vec::new());
    let note = |text: &str| steps.borrow_mut().push(text.to_owned());
    let options = LocateOptions {
        cache_dir: Some(dir.path().to_owned()),
        use_environment: false,
        progress: Some(&note),
        ..LocateOptions::default()
    };
    let fetched = locate("cpu", &options).expect("pip or uv can download the plugin");
    assert_eq!(fetched.origin, Origin::Download);
    assert_eq!(fetched.pinned, candidates("cpu").next());
    assert_eq!(steps.borrow().len(), 3, "{steps:?}");
    let found = locate("cpu", &options).unwrap();
    assert_eq!((found.origin, &found.path), (Origin::Cache, &fetched.path));
    // Only the plugin stays: no wheel, no half-unpacked file.
    let names: Vec<_> = fs_err::read_dir(fetched.path.parent().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(names, [fetched.path]);
    assert_eq!(steps.borrow().len(), 3);
}
