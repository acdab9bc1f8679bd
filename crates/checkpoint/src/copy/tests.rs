use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use tensor::Transform;

use super::*;
use crate::manifest::Manifest;
use crate::orbax::{OrbaxOptions, Target};
use crate::write::{HfPlan, PlanOptions, TensorPlan, WriteOptions, write_hf};

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A pair of names and shapes as a parameter table gives them.
#[derive(Debug, Clone)]
struct Spec {
    name: String,
    shape: Vec<usize>,
    maxtext_shape: Vec<usize>,
    transform: Transform,
}

fn spec(name: &str, shape: &[usize], maxtext_shape: &[usize], transform: Transform) -> Spec {
    Spec { name: name.to_owned(), shape: shape.to_vec(), maxtext_shape: maxtext_shape.to_vec(), transform }
}

/// A small model with every kind of tensor.
fn model() -> Vec<Spec> {
    let t = Transform::Transpose;
    vec![
        spec("embed", &[48, 40], &[48, 40], Transform::Scale(40f32.sqrt())),
        spec("table", &[48, 24], &[48, 24], Transform::Copy),
        spec("q", &[64, 40], &[40, 4, 16], t),
        spec("k", &[16, 40], &[40, 1, 16], t),
        spec("o", &[40, 64], &[4, 16, 40], t),
        spec("up", &[96, 40], &[40, 96], t),
        spec("down", &[40, 96], &[96, 40], t),
        spec("norm", &[40], &[40], Transform::Copy),
        spec("scalar", &[1], &[1], Transform::Copy),
    ]
}

/// Finite floats of every size in any type, from a counter.
fn content(seed: usize, n: usize, dtype: DType) -> Vec<u8> {
    let mut state = (seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    let values: Vec<f64> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
            unit * f64::powi(2.0, (state >> 5) as i32 % 9 - 4)
        })
        .collect();
    tensor::HostArray::from_f64(dtype, [n], &values).unwrap().bytes().to_vec()
}

fn write_model(path: &Path, specs: &[Spec], dtype: DType, shard: Option<u64>) -> HfDirectory {
    let tensors: Vec<TensorPlan> = specs
        .iter()
        .map(|s| TensorPlan { name: format!("model.{}", s.name), dtype, shape: s.shape.clone().into() })
        .collect();
    let plan = HfPlan::new(&tensors, &PlanOptions { max_shard_bytes: shard, ..Default::default() }).unwrap();
    let options = WriteOptions { no_manifest: true, ..Default::default() };
    write_hf(
        path,
        &plan,
        &options,
        |i, sink| Ok(sink.write(&content(i, sink.remaining() as usize / dtype.size(), dtype))?),
        |_| {},
    )
    .unwrap();
    HfDirectory::open(path).unwrap()
}

fn forward(specs: &[Spec], dtype: DType) -> Vec<Item> {
    specs
        .iter()
        .map(|s| {
            let op = Op::forward(s.transform);
            Item {
                store: 0,
                from: format!("model.{}", s.name),
                to: format!("params.params.{}", s.name),
                shape: s.maxtext_shape.clone().into(),
                dtype: op.lossless_dtype(dtype),
                op,
            }
        })
        .collect()
}

fn backward(specs: &[Spec], dtype: DType) -> Vec<Item> {
    specs
        .iter()
        .map(|s| Item {
            store: 0,
            from: s.name.clone(),
            to: format!("model.{}", s.name),
            shape: s.shape.clone().into(),
            dtype,
            op: Op::backward(s.transform),
        })
        .collect()
}

fn orbax_target(base: &Path, options: OrbaxOptions) -> OrbaxTarget {
    OrbaxTarget {
        target: Target::Step { base: base.to_owned(), step: 0 },
        options: OrbaxOptions { time: Some(1), ..options },
        scalars: vec![("step".to_owned(), 0)],
        empty: vec![("opt_state".to_owned(), "Dict")],
        link: false,
    }
}

fn hf_target(path: &Path, shard: Option<u64>) -> HfTarget {
    HfTarget {
        path: path.to_owned(),
        plan: PlanOptions { max_shard_bytes: shard, ..Default::default() },
        extra_files: vec![("config.json".to_owned(), b"{}".to_vec())],
        no_manifest: false,
    }
}

fn assert_same(a: &HfDirectory, b: &HfDirectory) {
    assert_eq!(a.len(), b.len());
    for (x, y) in a.entries().zip(b.entries()) {
        assert_eq!((&x.name, x.dtype, &x.shape), (&y.name, y.dtype, &y.shape));
        assert!(*a.tensor(&x.name).unwrap().bytes == *b.tensor(&y.name).unwrap().bytes, "{}", x.name);
    }
}

fn round_trip(specs: &[Spec], dtype: DType, options: OrbaxOptions, shard: Option<u64>) {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), specs, dtype, shard);
    let base = tmp.path().join("mt");
    let items = forward(specs, dtype);
    let report =
        copy_to_orbax(&[Store::Hf(&source)], &items, &orbax_target(&base, options), &CopyOptions::default(), &go)
            .unwrap();
    assert_eq!(report.written.arrays, specs.len() + 1);
    assert_eq!(report.resumed_bytes, 0);

    let orbax = OrbaxCheckpoint::open(&base).unwrap();
    assert!(orbax.problems().is_empty(), "{:?}", orbax.problems());
    for (s, item) in specs.iter().zip(&items) {
        check_array(&orbax, s, item, dtype, &source);
    }
    let target = hf_target(&tmp.path().join("back"), shard);
    let report =
        copy_to_hf(&[Store::Orbax(&orbax)], &backward(specs, dtype), &target, &CopyOptions::default(), &go).unwrap();
    assert_same(&source, &HfDirectory::open(&target.path).unwrap());
    report.manifest.verify(&target.path).unwrap();
    assert_eq!(Manifest::read(&target.path).unwrap().unwrap(), report.manifest);
}

/// Compares an array with the definition, element by element.
fn check_array(orbax: &OrbaxCheckpoint, s: &Spec, item: &Item, dtype: DType, source: &HfDirectory) {
    let got = orbax.read_array(&item.to).unwrap();
    assert_eq!((got.shape().dims(), got.dtype()), (s.maxtext_shape.as_slice(), item.dtype));
    let hf = source.tensor(&item.from).unwrap();
    let hf = tensor::HostArray::from_bytes(dtype, hf.shape.clone(), &hf.bytes).unwrap().to_f64();
    let got = got.to_f64();
    match s.transform {
        Transform::Copy => assert_eq!(got, hf),
        Transform::Scale(k) if dtype == DType::F32 => {
            assert!(got.iter().zip(&hf).all(|(g, x)| *g == x * f64::from(k)));
        }
        Transform::Scale(k) => assert!(got.iter().zip(&hf).all(|(g, x)| *g == f64::from(*x as f32 * k))),
        Transform::Transpose => {
            let (r, c) = (s.shape[0], s.shape[1]);
            for i in 0..r {
                for j in 0..c {
                    assert_eq!(got[j * r + i], hf[i * c + j], "{} {i} {j}", s.name);
                }
            }
        }
    }
}

#[test]
fn there_and_back_in_every_form() {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for options in [
            // Small limits, so that a small model has many chunks.
            OrbaxOptions { split_above: 256, ..Default::default() },
            OrbaxOptions { split_above: 256, zstd: Some(1), ..Default::default() },
            OrbaxOptions { split_above: 256, ..OrbaxOptions::pathways() },
        ] {
            round_trip(&model(), dtype, options, Some(3000));
        }
    }
    round_trip(&model(), DType::BF16, OrbaxOptions::default(), None);
}

#[test]
fn directories_are_resharded_and_converted() {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), &model(), DType::BF16, Some(2000));
    let mut items = backward(&model(), DType::F32);
    for item in &mut items {
        item.from.clone_from(&item.to);
        item.shape = source.entry(&item.from).unwrap().shape.clone();
        item.op = Op::Copy;
    }
    let target = hf_target(&tmp.path().join("wide"), None);
    copy_to_hf(&[Store::Hf(&source)], &items, &target, &CopyOptions::default(), &go).unwrap();
    let wide = HfDirectory::open(&target.path).unwrap();
    assert_eq!(wide.files().len(), 1);
    for t in source.entries() {
        let values = |d: &HfDirectory| {
            let v = d.tensor(&t.name).unwrap();
            tensor::HostArray::from_bytes(v.dtype, v.shape.clone(), &v.bytes).unwrap().to_f64()
        };
        assert_eq!(values(&source), values(&wide));
    }
}

#[test]
fn two_sources_make_one_target() {
    let tmp = tempfile::tempdir().unwrap();
    let a = write_model(&tmp.path().join("a"), &model()[..4], DType::BF16, None);
    let b = write_model(&tmp.path().join("b"), &model()[4..], DType::F32, None);
    let item = |store, t: &crate::safetensors::TensorEntry| Item {
        store,
        from: t.name.clone(),
        to: t.name.clone(),
        shape: t.shape.clone(),
        dtype: t.dtype,
        op: Op::Copy,
    };
    let items: Vec<Item> = b.entries().map(|t| item(1, t)).chain(a.entries().map(|t| item(0, t))).collect();
    let target = hf_target(&tmp.path().join("out"), None);
    copy_to_hf(&[Store::Hf(&a), Store::Hf(&b)], &items, &target, &CopyOptions::default(), &go).unwrap();
    let out = HfDirectory::open(&target.path).unwrap();
    assert_eq!(out.len(), 9);
    for dir in [&a, &b] {
        for t in dir.entries() {
            assert!(*dir.tensor(&t.name).unwrap().bytes == *out.tensor(&t.name).unwrap().bytes);
        }
    }
}

#[test]
fn everything_wrong_is_listed_and_nothing_written() {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), &model(), DType::BF16, None);
    let item = |store, from: &str, shape: &[usize], dtype, op| Item {
        store,
        from: from.to_owned(),
        to: "x".to_owned(),
        shape: shape.into(),
        dtype,
        op,
    };
    let items = [
        item(1, "model.q", &[64, 40], DType::BF16, Op::Copy),
        item(0, "model.gone", &[1], DType::BF16, Op::Copy),
        item(0, "model.q", &[40, 64], DType::BF16, Op::Copy),
        item(0, "model.q", &[40, 4, 15], DType::BF16, Op::Transpose),
        item(0, "model.norm", &[40], DType::I32, Op::Copy),
    ];
    let target = hf_target(&tmp.path().join("out"), None);
    let e = copy_to_hf(&[Store::Hf(&source)], &items, &target, &CopyOptions::default(), &go).unwrap_err();
    let path = source.path().display();
    assert_eq!(
        e.to_string(),
        format!(
            "5 arrays cannot be copied: model.q -> x: its source was not given; model.gone -> x: {path} has none; \
             model.q -> x: shape [64, 40] cannot become [40, 64]; \
             model.q -> x: [64, 40] cannot be transposed into [40, 4, 15]; \
             model.norm -> x: bfloat16 cannot become int32"
        )
    );
    let orbax = orbax_target(&tmp.path().join("mt"), OrbaxOptions::default());
    assert!(copy_to_orbax(&[Store::Hf(&source)], &items, &orbax, &CopyOptions::default(), &go).is_err());
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
}

#[test]
fn damage_in_the_source_is_an_error() {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), &model(), DType::BF16, None);
    let base = tmp.path().join("mt");
    let options = OrbaxOptions { split_above: 256, ..Default::default() };
    let target = orbax_target(&base, options);
    let items = forward(&model(), DType::BF16);
    copy_to_orbax(&[Store::Hf(&source)], &items, &target, &CopyOptions::default(), &go).unwrap();
    let data = base.join("0/items/d");
    let data = fs::read_dir(data).unwrap().map(|e| e.unwrap().path()).find(|p| !p.ends_with("tree")).unwrap();
    let mut bytes = fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&data, bytes).unwrap();
    let orbax = OrbaxCheckpoint::open(&base).unwrap();
    let target = hf_target(&tmp.path().join("back"), None);
    let e =
        copy_to_hf(&[Store::Orbax(&orbax)], &backward(&model(), DType::BF16), &target, &CopyOptions::default(), &go);
    assert!(matches!(e, Err(CopyError::Orbax(OrbaxError::Chunk { .. }))), "{e:?}");
    assert!(!target.path.exists());
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);
}

/// Cancels after so many bytes.
fn cancel_after(limit: u64) -> impl Fn(Progress) -> ControlFlow<()> + Sync {
    move |p| if p.done > limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    list(dir, &mut found).unwrap();
    let mut out: Vec<_> =
        found.into_iter().map(|(p, ..)| (p.strip_prefix(dir).unwrap().to_owned(), fs::read(&p).unwrap())).collect();
    out.sort();
    out
}

#[test]
fn cancelled_copies_leave_nothing_or_continue_to_the_same_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), &model(), DType::BF16, None);
    let stores = [Store::Hf(&source)];
    let items = forward(&model(), DType::BF16);
    let options = OrbaxOptions { split_above: 256, data_file_bytes: 4096, ..Default::default() };
    let one = |resume, keep_partial| CopyOptions { threads: Some(1), resume, keep_partial, ..Default::default() };

    let whole = orbax_target(&tmp.path().join("whole"), options.clone());
    copy_to_orbax(&stores, &items, &whole, &one(false, false), &go).unwrap();
    let total: u64 = items.iter().map(|i| i.shape.elements() as u64 * i.dtype.size() as u64).sum();
    for percent in [0, 10, 45, 80, 99] {
        let limit = total * percent / 100;
        // In the place of the first, because a mark of completion names its path.
        let target = orbax_target(&tmp.path().join("again"), options.clone());
        let again = |o: &CopyOptions, p: OnProgress<'_>| copy_to_orbax(&stores, &items, &target, o, p);
        assert!(matches!(again(&one(false, false), &cancel_after(limit)), Err(CopyError::Cancelled)));
        assert_eq!(fs::read_dir(tmp.path().join("again")).unwrap().count(), 0);
        assert!(matches!(again(&one(false, true), &cancel_after(limit)), Err(CopyError::Cancelled)));
        let report = again(&one(true, false), &go).unwrap();
        assert!(report.resumed_bytes <= limit + 4096 && (percent < 45 || report.resumed_bytes > 0));
        let (a, b) = (files(&tmp.path().join("whole/0")), files(&tmp.path().join("again/0")));
        assert_eq!(a.len(), b.len());
        for ((name, x), (_, y)) in a.iter().zip(&b) {
            let about_its_place = name.ends_with("commit_success.txt") || name.ends_with("lapidary.checksums.json");
            assert!(x == y || about_its_place, "{}", name.display());
        }
        fs::remove_dir_all(tmp.path().join("again")).unwrap();
    }

    let orbax = OrbaxCheckpoint::open(&tmp.path().join("whole")).unwrap();
    let stores = [Store::Orbax(&orbax)];
    let items = backward(&model(), DType::BF16);
    let whole = hf_target(&tmp.path().join("hf2"), Some(3000));
    let total = copy_to_hf(&stores, &items, &whole, &one(false, false), &go).unwrap().data_bytes;
    for percent in [0, 10, 45, 80, 99] {
        let limit = total * percent / 100;
        let target = hf_target(&tmp.path().join("hf3"), Some(3000));
        let again = |o: &CopyOptions, p: OnProgress<'_>| copy_to_hf(&stores, &items, &target, o, p);
        assert!(matches!(again(&one(false, false), &cancel_after(limit)), Err(CopyError::Cancelled)));
        assert!(!fs::exists(tmp.path().join(".hf3.lapidary-partial")).unwrap());
        assert!(matches!(again(&one(false, true), &cancel_after(limit)), Err(CopyError::Cancelled)));
        let partial = tmp.path().join(".hf3.lapidary-partial");
        assert!(matches!(HfDirectory::open(&partial), Err(crate::hf::HfError::Incomplete { .. })));
        // A page that was lost, or a box that was torn: noticed and written again.
        if percent == 80 {
            let shards = fs::read_dir(&partial).unwrap().map(|e| e.unwrap().path());
            let path = shards.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).min().unwrap();
            let mut bytes = fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
        let report = again(&one(true, false), &go).unwrap();
        assert!(percent == 80 || percent < 45 || report.resumed_bytes > 0);
        assert_eq!(files(&whole.path), files(&target.path));
        fs::remove_dir_all(&target.path).unwrap();
    }
}

#[test]
fn another_copy_is_not_continued() {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), &model(), DType::BF16, None);
    let copy = |items: &[Item], resume, limit| {
        let target = hf_target(&tmp.path().join("out"), None);
        let options = CopyOptions { resume, keep_partial: true, ..Default::default() };
        copy_to_hf(&[Store::Hf(&source)], items, &target, &options, &cancel_after(limit))
    };
    let items = |dtype| -> Vec<Item> {
        let specs = model();
        backward(&specs, dtype).into_iter().map(|i| Item { from: i.to.clone(), op: Op::Copy, ..i }).collect()
    };
    assert!(copy(&items(DType::BF16), false, 20_000).is_err());
    let report = copy(&items(DType::F32), true, u64::MAX).unwrap();
    assert_eq!(report.resumed_bytes, 0);
    let out = HfDirectory::open(&tmp.path().join("out")).unwrap();
    assert!(out.entries().all(|t| t.dtype == DType::F32));
}

#[test]
fn progress_counts_every_byte() {
    let tmp = tempfile::tempdir().unwrap();
    let source = write_model(&tmp.path().join("hf"), &model(), DType::BF16, None);
    let last = AtomicU64::new(0);
    let seen = |p: Progress| {
        last.fetch_max(p.done, Ordering::Relaxed);
        assert!(p.done <= p.total);
        ControlFlow::Continue(())
    };
    let items = forward(&model(), DType::BF16);
    let total: u64 = items.iter().map(|i| i.shape.elements() as u64 * i.dtype.size() as u64).sum();
    let target = orbax_target(&tmp.path().join("mt"), OrbaxOptions::default());
    copy_to_orbax(&[Store::Hf(&source)], &items, &target, &CopyOptions::default(), &seen).unwrap();
    assert_eq!(last.load(Ordering::Relaxed), total);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_trees_come_back(
        sizes in prop::collection::vec((1usize..40, 1usize..6, 1usize..20, 0usize..5), 1..10),
        dtype in prop::sample::select(vec![DType::BF16, DType::F16, DType::F32]),
        split_above in 1usize..2000,
        zstd in prop::option::of(Just(1)),
        shard in prop::option::of(1u64..5000),
    ) {
        let specs: Vec<Spec> = sizes
            .iter()
            .enumerate()
            .map(|(i, &(d, h, e, kind))| {
                let t = Transform::Transpose;
                let name = format!("t{i}");
                match kind {
                    0 => spec(&name, &[h * e, d], &[d, h, e], t),
                    1 => spec(&name, &[d, h * e], &[h, e, d], t),
                    2 => spec(&name, &[e, d], &[d, e], t),
                    3 => spec(&name, &[e, d], &[e, d], Transform::Scale((d as f32).sqrt())),
                    _ => spec(&name, &[d, h, e], &[d, h, e], Transform::Copy),
                }
            })
            .collect();
        round_trip(&specs, dtype, OrbaxOptions { split_above, zstd, ..Default::default() }, shard);
    }
}
