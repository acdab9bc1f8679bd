//! Wrong calls are errors, and the process goes on.

use lapidary_pjrt::plugins::LocateOptions;
use lapidary_pjrt::{Client, ClientOptions, CompileOptions, ExecuteOptions, NamedValue, PjrtError, Plugin};
use tensor::{DType, HostArray};

use crate::basics::ADD;
use crate::common::{client, compile, f32s, put};

#[test]
fn wrong_arguments_are_found_before_the_call() {
    let add = compile(ADD);
    let x = put(&f32s(&[3], &[1.0; 3]));
    let short = put(&f32s(&[2], &[1.0; 2]));
    let ints = put(&HostArray::zeros(DType::I32, [3]).unwrap());
    let matrix = put(&f32s(&[3, 1], &[1.0; 3]));

    let error = add.execute(&[&x]).unwrap_err();
    assert!(matches!(error, PjrtError::ArgumentCount { wanted: 2, got: 1, .. }), "{error}");
    let error = add.execute(&[]).unwrap_err();
    assert!(matches!(error, PjrtError::ArgumentCount { wanted: 2, got: 0, .. }), "{error}");
    let error = add.execute(&[&x, &x, &x]).unwrap_err();
    assert!(matches!(error, PjrtError::ArgumentCount { wanted: 2, got: 3, .. }), "{error}");
    for wrong in [&short, &ints, &matrix] {
        let error = add.execute(&[&x, wrong]).unwrap_err();
        assert!(matches!(error, PjrtError::ArgumentType { index: 1, .. }), "{error}");
    }
    let message = add.execute(&[&x, &ints]).unwrap_err().to_string();
    assert_eq!(message, "argument 1 of program \"add\" must be float32[3], got int32[3] (device 0)");
    let error = add.execute_sharded(&[[&x, &x], [&x, &x]]).unwrap_err();
    assert!(matches!(error, PjrtError::DeviceCount { wanted: 1, got: 2, .. }), "{error}");
    let none: [[&lapidary_pjrt::Buffer; 2]; 0] = [];
    let error = add.execute_sharded(&none).unwrap_err();
    assert!(matches!(error, PjrtError::DeviceCount { wanted: 1, got: 0, .. }), "{error}");
    let error = add.run(&[[&x, &x]], &ExecuteOptions { keep: &[2], wait: false }).unwrap_err();
    assert!(error.to_string().contains("argument 2"), "{error}");
    x.delete().unwrap();
    assert!(matches!(add.execute(&[&x, &x]).unwrap_err(), PjrtError::Deleted { .. }));
}

#[test]
fn buffers_of_another_client_are_refused() {
    let other = Client::new(client().plugin(), &ClientOptions::cpu(1)).unwrap();
    let x = other.buffer_from_host(&f32s(&[3], &[1.0; 3]), 0).unwrap();
    let error = compile(ADD).execute(&[&x, &x]).unwrap_err();
    assert!(error.to_string().contains("another client"), "{error}");
}

#[test]
fn a_buffer_outlives_its_client() {
    let other = Client::new(client().plugin(), &ClientOptions::cpu(1)).unwrap();
    let add = other.compile(ADD, &CompileOptions::default()).unwrap();
    let x = other.buffer_from_host(&f32s(&[3], &[1.0; 3]), 0).unwrap();
    drop(other);
    let r = add.execute(&[&x, &x]).unwrap().remove(0);
    drop((add, x));
    assert_eq!(r.to_host().unwrap().to_f64(), [2.0; 3]);
}

#[test]
fn devices_that_do_not_exist_are_refused() {
    let d = CompileOptions::default;
    let e = |options: CompileOptions| client().compile(ADD, &options).unwrap_err().to_string();
    assert!(e(d().on_devices([4])).contains("no device 4"));
    assert!(e(d().partitioned(5)).contains("no device 4"));
    assert!(e(CompileOptions { num_replicas: 2, ..d() }.on_devices([1, 1])).contains("twice"));
    assert!(e(CompileOptions { num_partitions: 4, ..d() }).contains("use_spmd"));
}

#[test]
fn unknown_client_options_are_refused() {
    let options = ClientOptions::cpu(1).with("no_such_option", NamedValue::Bool(true));
    let error = Client::new(client().plugin(), &options).unwrap_err();
    assert!(error.to_string().contains("no_such_option"), "{error}");
}

#[test]
fn files_that_are_no_plugins_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.so");
    let error = Plugin::load(&missing).unwrap_err();
    assert!(matches!(&error, PjrtError::Load { .. }) && error.to_string().contains("missing.so"), "{error}");
    let text = dir.path().join("text.so");
    fs_err::write(&text, "not a library").unwrap();
    assert!(matches!(Plugin::load(&text).unwrap_err(), PjrtError::Load { .. }));
    // A library that is no plugin: one that every process has loaded already.
    let maps = fs_err::read_to_string("/proc/self/maps").unwrap_or_default();
    if let Some(path) = maps.lines().filter_map(|l| l.split_whitespace().nth(5)).find(|p| p.contains("libc.so")) {
        let error = Plugin::load(path).unwrap_err();
        assert!(matches!(error, PjrtError::NotAPlugin { .. }), "{error}");
    }
}

#[test]
fn loading_twice_gives_the_same_plugin() {
    let path = Plugin::locate("cpu", &LocateOptions::default()).unwrap();
    let (a, b) = (Plugin::load(&path).unwrap(), Plugin::load(&path).unwrap());
    assert!(std::sync::Arc::ptr_eq(&a, &b));
}
