//! Damaged checkpoints: every change is noticed, or is of bytes that nobody uses.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lapidary_checkpoint::orbax::{
    ArrayPlan, CHECKSUMS, Layout, OrbaxCheckpoint, OrbaxOptions, OrbaxPlan, OrbaxWriter, Scope, Target, ZarrVersion,
    dotted,
};
use tensor::{DType, HostArray, Shape};

use crate::pattern::pattern;

/// Everything that reading a checkpoint gives.
#[derive(Debug, PartialEq)]
struct Seen {
    arrays: BTreeMap<String, (DType, Shape, Vec<u8>)>,
    parameters: Vec<Option<String>>,
    metadata: String,
    step: Option<u64>,
    empty: Vec<String>,
}

/// Reads everything; anything suspicious is an error.
fn look(path: &Path) -> Result<Seen, String> {
    let ckpt = OrbaxCheckpoint::open_scope(path, Scope::All).map_err(|e| e.to_string())?;
    if let Some(p) = ckpt.problems().first() {
        return Err(p.message.clone());
    }
    let mut arrays = BTreeMap::new();
    for a in ckpt.arrays() {
        let v: HostArray = ckpt.read_array(&a.name).map_err(|e| e.to_string())?;
        arrays.insert(a.name.clone(), (a.dtype, a.shape.clone(), v.bytes().to_vec()));
    }
    Ok(Seen {
        arrays,
        parameters: ckpt.arrays().iter().map(|a| a.param_name.clone()).collect(),
        metadata: serde_json::to_string(ckpt.custom_metadata()).unwrap(),
        step: ckpt.step(),
        empty: ckpt.empty_leaves().iter().map(|l| format!("{} {}", l.name(), l.value_type)).collect(),
    })
}

fn write(base: &Path, options: OrbaxOptions) {
    let mut options = OrbaxOptions { split: 2, split_above: 500, data_file_bytes: 3500, time: Some(1), ..options };
    options.custom_metadata.insert("scan_layers".into(), false.into());
    let mut plan = OrbaxPlan::default();
    for (name, dtype, shape) in [
        ("a.kernel", DType::BF16, Shape::from([26, 41])),
        ("b", DType::F32, [7, 5].into()),
        ("c", DType::Bool, [3].into()),
    ] {
        plan.arrays.push(ArrayPlan::pushed(&format!("params.params.{name}"), dtype, shape));
    }
    plan.arrays.push(ArrayPlan::scalar_i64("step", 3));
    plan.empty.push((dotted("opt_state"), "Dict"));
    let w = OrbaxWriter::create(Target::Step { base: base.to_owned(), step: 0 }, plan.clone(), options).unwrap();
    for (i, a) in plan.arrays.iter().enumerate().take(3) {
        w.write_array(i, pattern(&a.name(), a.dtype, &a.shape).bytes()).unwrap();
    }
    w.finish().unwrap();
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for e in fs_err::read_dir(dir).unwrap() {
        let p = e.unwrap().path();
        if p.is_dir() { out.extend(files(&p)) } else { out.push(p) }
    }
    out.sort();
    out
}

/// Flips a bit of every `step`-th byte of every file, a different one each time, and counts, by file, the flips after which
/// everything still reads the same. A flip that is noticed by nobody and changes what is read fails the test.
fn flip(base: &Path, step: usize) -> BTreeMap<String, usize> {
    let good = look(base).unwrap();
    let mut harmless = BTreeMap::new();
    let mut total = 0;
    for path in files(base) {
        let name = path.strip_prefix(base).unwrap().display().to_string();
        let bytes = fs_err::read(&path).unwrap();
        for at in (0..bytes.len()).step_by(step) {
            let bit = at * 5 / step % 8;
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            fs_err::write(&path, &bad).unwrap();
            total += 1;
            if let Ok(seen) = look(base) {
                assert_eq!(seen, good, "{name}: bit {bit} of byte {at} changes what is read, silently");
                *harmless.entry(name.clone()).or_default() += 1;
            }
        }
        fs_err::write(&path, &bytes).unwrap();
    }
    assert_eq!(look(base).unwrap(), good);
    assert!(total > 300);
    harmless
}

/// Files of the step around the items: not recorded, and nothing of theirs is used but what the items repeat.
const AROUND: [&str; 2] = ["0/_CHECKPOINT_METADATA", "0/commit_success.txt"];

#[test]
fn flipped_bits_of_the_default_form_are_seen_or_unused() {
    let tmp = tempfile::tempdir().unwrap();
    let base = tmp.path().join("out");
    write(&base, OrbaxOptions::default());
    let mut harmless = flip(&base, 3);
    for name in AROUND {
        harmless.remove(name);
    }
    // Two chunks of 13 * 41 * 2 bytes and a checksum, aligned to 64: what lies between them belongs to no chunk.
    let gap = 1070usize.next_multiple_of(64) - 1070;
    let unused = harmless.remove("0/items/d/data-00000");
    assert!(unused.is_some_and(|n| n == gap / 3 || n == gap.div_ceil(3)), "{unused:?}");
    assert_eq!(harmless, BTreeMap::new());
}

#[test]
fn flipped_bits_of_other_forms_are_seen() {
    let o = OrbaxOptions::default;
    for (form, options) in [
        ("zstd", OrbaxOptions { zstd: Some(1), ..o() }),
        ("files", OrbaxOptions { layout: Layout::Files, ..o() }),
        ("pathways", OrbaxOptions::pathways()),
        ("pathways raw", OrbaxOptions { zstd: None, ..OrbaxOptions::pathways() }),
        ("zarr 2 in a tree", OrbaxOptions { zarr: ZarrVersion::V2, zstd: Some(1), ..o() }),
    ] {
        let tmp = tempfile::tempdir().unwrap();
        let base = tmp.path().join("out");
        write(&base, options);
        let mut harmless = flip(&base, 11);
        for name in AROUND {
            harmless.remove(name);
        }
        // Frame headers have bits that decoders ignore.
        if form == "zarr 2 in a tree" {
            harmless.retain(|_, n| *n > 2);
        }
        assert_eq!(harmless, BTreeMap::new(), "{form}");
    }
}

#[test]
fn cut_and_lost_files_are_seen() {
    for options in [OrbaxOptions::default(), OrbaxOptions::pathways()] {
        let tmp = tempfile::tempdir().unwrap();
        let base = tmp.path().join("out");
        write(&base, options);
        let good = look(&base).unwrap();
        for path in files(&base) {
            let name = path.strip_prefix(&base).unwrap().display().to_string();
            let bytes = fs_err::read(&path).unwrap();
            let cuts = [0, 1, 5, bytes.len() / 2, bytes.len() - 1].map(Some);
            for cut in cuts.into_iter().chain([None]) {
                match cut {
                    Some(n) => fs_err::write(&path, &bytes[..n]).unwrap(),
                    None => fs_err::remove_file(&path).unwrap(),
                }
                match look(&base) {
                    Err(_) => {}
                    Ok(seen) => {
                        assert_eq!(seen, good, "{name} cut to {cut:?}");
                        let around = AROUND.contains(&name.as_str());
                        // Without the record, what the formats themselves protect is still protected.
                        let record = name.ends_with(CHECKSUMS) && cut.is_none();
                        assert!(around || record, "{name} cut to {cut:?} is not seen");
                    }
                }
            }
            let longer = [&bytes[..], b"x"].concat();
            fs_err::write(&path, longer).unwrap();
            if let Ok(seen) = look(&base) {
                assert_eq!(seen, good, "{name} made longer");
            }
            fs_err::write(&path, &bytes).unwrap();
        }
    }
}

#[test]
fn a_lost_chunk_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let base = tmp.path().join("out");
    write(&base, OrbaxOptions::pathways());
    let items = base.join("0/items");
    fs_err::remove_file(items.join("params.params.a.kernel/1.0")).unwrap();
    let e = OrbaxCheckpoint::open(&base).unwrap_err().to_string();
    assert!(e.contains("params.params.a.kernel/1.0") && e.contains("gone"), "{e}");
    // As in a checkpoint of another program, without a record of its files.
    fs_err::remove_file(items.join(CHECKSUMS)).unwrap();
    let ckpt = OrbaxCheckpoint::open(&base).unwrap();
    assert!(ckpt.problems()[0].message.contains("chunk 1.0 is missing"));
    let e = ckpt.read_array("params.params.a.kernel").unwrap_err().to_string();
    assert!(e.contains("params.params.a.kernel") && e.contains("chunk 1.0 is missing"), "{e}");
    assert!(ckpt.read_array("params.params.b").is_ok());
    fs_err::remove_dir_all(items.join("params.params.b")).unwrap();
    let ckpt = OrbaxCheckpoint::open(&base).unwrap();
    let e = ckpt.read_array("params.params.b").unwrap_err().to_string();
    assert!(e.contains("never stored"), "{e}");
}

#[test]
fn damaged_samples_never_panic() {
    let tmp = tempfile::tempdir().unwrap();
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/orbax/samples");
    let mut state = 1u64;
    let mut random = move |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n.max(1)
    };
    for name in ["ocdbt_zarr3", "ocdbt_zarr2", "files_zarr3", "files_zarr2", "mesh", "processes", "codecs"] {
        let copy = tmp.path().join(name);
        for path in files(&samples.join(name)) {
            let to = copy.join(path.strip_prefix(samples.join(name)).unwrap());
            fs_err::create_dir_all(to.parent().unwrap()).unwrap();
            fs_err::copy(&path, &to).unwrap();
        }
        for path in files(&copy) {
            let bytes = fs_err::read(&path).unwrap();
            for _ in 0..12 {
                let mut bad = bytes.clone();
                match random(4) {
                    0 => bad.truncate(random(bytes.len())),
                    1 if !bad.is_empty() => bad[random(bytes.len())] = 0xFF,
                    _ if !bad.is_empty() => bad[random(bytes.len())] ^= 1 << random(8),
                    _ => bad.push(0),
                }
                fs_err::write(&path, &bad).unwrap();
                if let Ok(ckpt) = OrbaxCheckpoint::open_scope(&copy, Scope::All) {
                    for a in ckpt.arrays() {
                        // Any answer will do but a panic.
                        let _ = ckpt.read_array(&a.name);
                        let _ = ckpt.verify_array(&a.name);
                    }
                }
            }
            fs_err::write(&path, &bytes).unwrap();
        }
    }
}

#[test]
fn absurd_sizes_cost_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let array = tmp.path().join("params.w");
    fs_err::create_dir_all(array.join("c")).unwrap();
    let meta = |shape: u64, chunk: u64, codecs: serde_json::Value| {
        serde_json::json!({
            "zarr_format": 3, "node_type": "array", "shape": [shape], "data_type": "uint8", "fill_value": 0, "codecs": codecs,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}},
            "chunk_key_encoding": {"name": "default"},
        })
        .to_string()
    };
    let plain = serde_json::json!(["bytes"]);
    let packed = serde_json::json!(["bytes", "zstd"]);
    let shards = serde_json::json!([{"name": "sharding_indexed", "configuration": {
        "chunk_shape": [1], "codecs": ["bytes"], "index_codecs": ["bytes", "crc32c"]}}]);
    fs_err::write(array.join("c/0"), [0; 100]).unwrap();
    for (shape, chunk, codecs) in [
        (1 << 40, 1 << 40, &plain),
        (1 << 40, 1 << 40, &packed),
        (1 << 40, 1 << 40, &shards),
        (1 << 60, 1, &plain),
        (1 << 62, 100, &plain),
        (101, 1 << 40, &packed),
        (10, 1 << 62, &plain),
    ] {
        fs_err::write(array.join("zarr.json"), meta(shape, chunk, codecs.clone())).unwrap();
        let ckpt = OrbaxCheckpoint::open(tmp.path()).unwrap();
        assert!(ckpt.read_array("params.w").is_err(), "{shape} {chunk} {codecs}");
        assert!(ckpt.verify_array("params.w").is_err(), "{shape} {chunk} {codecs}");
        assert!(ckpt.read_rows("params.w", 0, 1, &mut [0]).is_err() || codecs == &plain, "{shape} {chunk} {codecs}");
    }
}
