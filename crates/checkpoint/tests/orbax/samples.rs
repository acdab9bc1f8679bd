//! Checkpoints that Orbax itself wrote (`scripts/interop_orbax.py samples`), read without it.

use std::path::{Path, PathBuf};

use lapidary_checkpoint::orbax::ocdbt::Store;
use lapidary_checkpoint::orbax::{OrbaxCheckpoint, OrbaxError, Region, Scope, TreeKind};
use tensor::DType;

use crate::pattern::pattern;

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/orbax/samples").join(name)
}

/// Compares every parameter with the pattern, read in every way there is.
fn check(name: &str, kind: TreeKind, parameters: usize) -> OrbaxCheckpoint {
    check_at(&sample(name), kind, parameters)
}

fn check_at(path: &Path, kind: TreeKind, parameters: usize) -> OrbaxCheckpoint {
    let ckpt = OrbaxCheckpoint::open(path).unwrap();
    let name = path.display();
    assert_eq!(ckpt.kind(), kind, "{name}");
    let found: Vec<_> = ckpt.arrays().iter().filter(|a| a.param_name.is_some()).collect();
    assert_eq!(found.len(), parameters, "{name}");
    for a in found {
        let param = a.param_name.as_ref().unwrap();
        let want = pattern(param, a.dtype, &a.shape);
        let got = ckpt.read_array(&a.name).unwrap();
        assert_eq!((got.dtype(), got.shape()), (a.dtype, &a.shape));
        assert_eq!(got.bytes(), want.bytes(), "{name}: {param}");

        for max in [1, 50, 1 << 20] {
            let size = a.dtype.size();
            let mut assembled = vec![0xEE; want.bytes().len()];
            ckpt.for_each_piece(&a.name, max, |region: &Region, bytes: &[u8]| {
                assert_eq!(bytes.len(), region.elements() * size);
                assert!(bytes.len() <= max.max(size));
                scatter(&mut assembled, &a.shape, region, bytes, size);
                Ok::<(), OrbaxError>(())
            })
            .unwrap();
            assert_eq!(assembled, want.bytes(), "{name}: {param} in pieces of {max}");
        }
        ckpt.verify_array(&a.name).unwrap();
        if a.shape.rank() > 0 {
            let row = want.bytes().len() / a.shape[0];
            let (first, count) = (a.shape[0] / 3, a.shape[0].div_ceil(2));
            let mut rows = vec![0; count * row];
            ckpt.read_rows(&a.name, first, count, &mut rows).unwrap();
            assert_eq!(rows, want.bytes()[first * row..(first + count) * row], "{name}: rows of {param}");
        }
    }
    ckpt
}

/// Puts a dense box into a dense array, one element at a time.
fn scatter(out: &mut [u8], shape: &[usize], region: &Region, bytes: &[u8], size: usize) {
    for (n, element) in bytes.chunks(size).enumerate() {
        let (mut rest, mut at, mut stride) = (n, 0, 1);
        for d in (0..shape.len()).rev() {
            at += (region.origin[d] + rest % region.shape[d]) * stride;
            rest /= region.shape[d];
            stride *= shape[d];
        }
        out[at * size..(at + 1) * size].copy_from_slice(element);
    }
}

#[test]
fn all_four_container_forms() {
    for (name, format) in [
        ("ocdbt_zarr3", "zarr3 sharding"),
        ("ocdbt_zarr2", "zarr2 bytes+zstd"),
        ("files_zarr3", "zarr3 sharding"),
        ("files_zarr2", "zarr2 bytes+zstd"),
    ] {
        let ckpt = check(name, TreeKind::Linen, 17);
        assert_eq!(ckpt.problems(), [], "{name}");
        assert!(ckpt.arrays().iter().all(|a| a.format.starts_with(format) && !a.checksummed && a.compressed), "{name}");
        assert_eq!(ckpt.step(), Some(0));
        assert_eq!(ckpt.custom_metadata()["scan_layers"], false);
        assert_eq!(ckpt.read_array("step").unwrap().as_slice::<i64>().unwrap(), [0]);
        let empty: Vec<String> = ckpt.empty_leaves().iter().map(|l| l.name()).collect();
        assert_eq!(empty, ["opt_state"]);
        let dtypes: std::collections::HashSet<DType> = ckpt.arrays().iter().map(|a| a.dtype).collect();
        assert_eq!(dtypes.len(), DType::ALL.len());
    }
}

#[test]
fn a_training_checkpoint_of_eight_devices() {
    let ckpt = check("mesh", TreeKind::Linen, 17);
    assert_eq!(ckpt.problems(), []);
    assert_eq!(ckpt.step(), Some(12));
    let kernel = ckpt.parameter("decoder.layers_0.mlp.wi_0.kernel").unwrap();
    assert_eq!((&kernel.chunk_shape[..], kernel.chunks), (&[8, 6][..], 8));
    assert_eq!(kernel.value_type.as_deref(), Some("jax.Array"));
    assert_eq!((ckpt.skipped()[0].subtree.as_str(), ckpt.skipped()[0].arrays), ("opt_state", 2));
    assert_eq!(ckpt.read_array("step").unwrap().as_slice::<i32>().unwrap(), [7]);
    assert!(matches!(ckpt.read_array("opt_state.0.count"), Err(OrbaxError::Unknown { .. })));

    let all = OrbaxCheckpoint::open_scope(&sample("mesh"), Scope::All).unwrap();
    assert_eq!(all.arrays().len(), 17 + 1 + 2);
    assert_eq!(all.read_array("opt_state.0.count").unwrap().as_slice::<i32>().unwrap(), [3]);
    assert!(all.skipped().is_empty());
}

#[test]
fn a_summary_counts_what_is_there() {
    let summary = OrbaxCheckpoint::open(&sample("mesh")).unwrap().inspect();
    assert_eq!((summary.parameters.arrays, summary.total.arrays), (17, 18));
    assert_eq!(summary.dtypes["bfloat16"].elements, 64 * 24 + 8 * 4 * 6 + 1);
    assert_eq!(summary.total.elements, summary.dtypes.values().map(|t| t.elements).sum::<u64>());
    assert!(!summary.checksummed);
    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!(json["kind"], "linen");
    assert_eq!(json["skipped"][0]["arrays"], 2);
    assert_eq!(json["arrays"][0]["dtype"], "bfloat16");
    assert_eq!(json["arrays"].as_array().unwrap().len(), 18);
}

#[test]
fn a_job_of_two_processes() {
    let ckpt = check("processes", TreeKind::Linen, 17);
    assert_eq!(ckpt.problems(), []);
    assert_eq!(ckpt.read_array("step").unwrap().as_slice::<i32>().unwrap(), [7]);
}

/// A merge that never ran leaves no store above those of the processes.
#[test]
fn stores_that_were_never_merged() {
    for (name, step) in [("ocdbt_zarr3", "0"), ("processes", "12")] {
        let tmp = tempfile::tempdir().unwrap();
        let items = tmp.path().join("items");
        fs_err::create_dir(&items).unwrap();
        for entry in fs_err::read_dir(sample(name).join(step).join("items")).unwrap() {
            let entry = entry.unwrap();
            let file = entry.file_name().into_string().unwrap();
            if file != "manifest.ocdbt" && file != "d" {
                std::os::unix::fs::symlink(entry.path(), items.join(file)).unwrap();
            }
        }
        let ckpt = check_at(&items, TreeKind::Linen, 17);
        assert!(ckpt.container().contains("not merged"));
        assert_eq!(ckpt.problems().len(), 1);
    }
}

#[test]
fn trees_of_other_kinds() {
    check("params_only", TreeKind::ParamsOnly, 17);
    check("standard", TreeKind::ParamsOnly, 17);
    check("nnx", TreeKind::Nnx, 3);
    check("nnx_base", TreeKind::NnxBase, 3);
}

#[test]
fn generic_stores() {
    for name in ["stores/deep", "stores/numbered"] {
        let store = Store::open(&sample(name)).unwrap();
        let found: Vec<(String, Vec<u8>)> = store
            .entries()
            .iter()
            .map(|e| (String::from_utf8_lossy(&e.key).into_owned(), store.read(&e.value).unwrap()))
            .collect();
        let n = if name == "stores/deep" { 24 } else { 5 };
        let mut want: Vec<(String, Vec<u8>)> = (0..n)
            .map(|i| (format!("key/{:03}", i * 37 % 101), format!("value {i}").repeat(i % 4).into_bytes()))
            .collect();
        want.sort();
        assert_eq!(found, want, "{name}");
    }
    assert!(Store::open(&sample("stores/deep")).unwrap().height() >= 2);
}

#[test]
fn encodings_that_orbax_does_not_use() {
    let dir = sample("codecs");
    // Arrays that must not be read make the whole directory unreadable: each is tried alone.
    let tmp = tempfile::tempdir().unwrap();
    let mut read = 0;
    for entry in fs_err::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        let stored = entry.file_name().into_string().unwrap();
        let name = stored.strip_prefix("params.").unwrap();
        let alone = tmp.path().join(name);
        fs_err::create_dir(&alone).unwrap();
        std::os::unix::fs::symlink(entry.path(), alone.join(&stored)).unwrap();
        let refused = |what: &str| {
            let e = OrbaxCheckpoint::open(&alone).unwrap_err().to_string();
            assert!(e.contains(what) && e.contains(&stored), "{e}");
        };
        match name {
            "zipped" => refused("gzip"),
            "old_blosc" => refused("blosc"),
            "partial" => {
                let ckpt = OrbaxCheckpoint::open(&alone).unwrap();
                let mut part = vec![0; 13 * 6 * 4];
                let region = Region { origin: vec![0, 0], shape: vec![13, 6] };
                ckpt.read_region(&stored, &region, &mut part).unwrap();
                let e = ckpt.read_array(&stored).unwrap_err();
                assert!(matches!(e, OrbaxError::MissingChunk { .. }), "{e}");
                assert!(e.to_string().contains("c/0/0 (inner [0, 2])"), "{e}");
            }
            _ => {
                let a = check_all(&alone, &stored, name);
                assert_eq!(a, 1);
                read += 1;
            }
        }
    }
    assert_eq!(read, 10);
}

/// Reads every box of an array that starts at a few places, and all of it in pieces.
fn check_all(dir: &Path, stored: &str, name: &str) -> usize {
    let ckpt = OrbaxCheckpoint::open(dir).unwrap();
    let a = ckpt.array(stored).unwrap();
    let want = pattern(name, a.dtype, &a.shape);
    let size = a.dtype.size();
    assert_eq!(ckpt.read_array(stored).unwrap().bytes(), want.bytes(), "{name} ({})", a.format);
    for max in [1, 24, 100, 1 << 20] {
        let mut assembled = vec![0xEE; want.bytes().len()];
        ckpt.for_each_piece(stored, max, |region: &Region, bytes: &[u8]| {
            scatter(&mut assembled, &a.shape, region, bytes, size);
            Ok::<(), OrbaxError>(())
        })
        .unwrap();
        assert_eq!(assembled, want.bytes(), "{name} in pieces of {max}");
    }
    for (r, c) in [(0, 0), (3, 2), (7, 5), (12, 9)] {
        for (h, w) in [(1, 1), (4, 3), (13 - r, 10 - c)] {
            let region = Region { origin: vec![r, c], shape: vec![h.min(13 - r), w.min(10 - c)] };
            let mut got = vec![0; region.elements() * size];
            ckpt.read_region(stored, &region, &mut got).unwrap();
            for i in 0..region.shape[0] {
                let at = ((r + i) * 10 + c) * size;
                let n = region.shape[1] * size;
                assert_eq!(got[i * n..(i + 1) * n], want.bytes()[at..at + n], "{name} {region}");
            }
        }
    }
    ckpt.verify_array(stored).unwrap();
    ckpt.arrays().len()
}
