//! The same model in every layout gives the same tensors.

use std::path::Path;

use lapidary_checkpoint::binding::{Binding, Expected, NameRules, UnusedRule, bind};
use lapidary_checkpoint::hf::HfDirectory;
use lapidary_checkpoint::write::{HfPlan, PlanOptions, TensorPlan, WriteOptions, write_hf};
use tensor::{DType, Shape};

const PREFIXES: [&str; 5] =
    ["model.language_model.", "model.", "language_model.model.", "base_model.model.model.language_model.", ""];

fn expected() -> Vec<Expected> {
    let mut out = vec![Expected { name: "embed.weight".into(), shape: Shape::from([10, 8]), dtype: None }];
    for layer in 0..3 {
        out.push(Expected { name: format!("layers.{layer}.up.weight"), shape: Shape::from([16, 8]), dtype: None });
        out.push(Expected { name: format!("layers.{layer}.scalar"), shape: Shape::from([1]), dtype: None });
    }
    out
}

fn rules() -> NameRules {
    let rule = |label: &str, pattern: &str| UnusedRule { label: label.to_owned(), patterns: vec![pattern.to_owned()] };
    NameRules {
        prefixes: PREFIXES.map(str::to_owned).to_vec(),
        unused: vec![rule("tower", "**.tower.**"), rule("redundant", "layers.*.k.weight")],
    }
}

/// Bytes that depend on the logical name alone.
fn content(name: &str, len: u64) -> Vec<u8> {
    let seed = name.bytes().fold(17u8, |h, b| h.wrapping_mul(31).wrapping_add(b));
    (0..len).map(|i| (i as u8).wrapping_mul(13).wrapping_add(seed)).collect()
}

fn write(target: &Path, prefix: &str, max_shard_bytes: Option<u64>, extras: bool) -> HfDirectory {
    let mut names: Vec<(String, Shape)> = expected().into_iter().map(|e| (e.name, e.shape)).collect();
    let mut tensors: Vec<TensorPlan> = names
        .iter()
        .map(|(name, shape)| TensorPlan { name: format!("{prefix}{name}"), dtype: DType::BF16, shape: shape.clone() })
        .collect();
    if extras {
        for name in [format!("{prefix}layers.2.k.weight"), "model.tower.layers.0.up.weight".to_owned()] {
            tensors.push(TensorPlan { name: name.clone(), dtype: DType::BF16, shape: Shape::from([4]) });
            names.push((name, Shape::from([4])));
        }
    }
    let plan = HfPlan::new(&tensors, &PlanOptions { max_shard_bytes, ..Default::default() }).unwrap();
    let fill = |index: usize, sink: &mut lapidary_checkpoint::write::TensorSink<'_>| {
        Ok(sink.write(&content(&names[index].0, sink.remaining()))?)
    };
    write_hf(target, &plan, &WriteOptions::default(), fill, |_| {}).unwrap();
    HfDirectory::open(target).unwrap()
}

fn check(binding: &Binding, prefix: &str, extras: bool) {
    let r = &binding.report;
    assert_eq!(r.prefix, prefix);
    assert_eq!(r.used.tensors, 7);
    assert_eq!(r.used.bytes, 2 * (80 + 3 * 129));
    let unused: Vec<_> = r.unused_expected.iter().map(|(label, c)| (label.as_str(), c.tensors, c.bytes)).collect();
    assert_eq!(unused, if extras { vec![("tower", 1, 8), ("redundant", 1, 8)] } else { vec![] });
    assert!(r.unused_unexpected.is_empty());
    for (name, view) in &binding.tensors {
        assert_eq!(&*view.bytes, content(name, view.bytes.len() as u64), "{name}");
    }
}

#[test]
fn every_layout_gives_the_same_weights() {
    let tmp = tempfile::tempdir().unwrap();
    for (i, prefix) in PREFIXES.into_iter().enumerate() {
        for shard in [None, Some(1), Some(300)] {
            for extras in [false, true] {
                let target = tmp.path().join(format!("{i}-{shard:?}-{extras}"));
                let dir = write(&target, prefix, shard, extras);
                check(&bind(&dir, &expected(), &rules()).unwrap(), prefix, extras);
            }
        }
    }
}

#[test]
fn bytes_outlive_the_directory() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = write(&tmp.path().join("m"), "model.", Some(300), true);
    let binding = bind(&dir, &expected(), &rules()).unwrap();
    drop(dir);
    tmp.close().unwrap();
    std::thread::spawn(move || check(&binding, "model.", true)).join().unwrap();
}
