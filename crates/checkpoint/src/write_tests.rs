use proptest::prelude::*;

use super::*;
use crate::hf::HfDirectory;

fn t(name: &str, dtype: DType, shape: &[usize]) -> TensorPlan {
    TensorPlan { name: name.to_owned(), dtype, shape: Shape::from(shape) }
}

/// Bytes that tell tensors and positions apart.
fn content(index: usize, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add((index as u8).wrapping_mul(31))).collect()
}

fn write(
    target: &Path,
    tensors: &[TensorPlan],
    plan: &PlanOptions,
    options: &WriteOptions,
    piece: usize,
) -> Result<Manifest, WriteError> {
    let plan = HfPlan::new(tensors, plan)?;
    let mut last = 0;
    let manifest = write_hf(
        target,
        &plan,
        options,
        |index, sink| {
            for bytes in content(index, sink.remaining()).chunks(piece) {
                sink.write(bytes)?;
            }
            Ok(())
        },
        |bytes| {
            assert!(bytes >= last);
            last = bytes;
        },
    )?;
    assert_eq!(last, plan.data_bytes);
    Ok(manifest)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn one_file_reads_back_aligned() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let tensors = [
        t("scalar", DType::BF16, &[1]),
        t("z", DType::BF16, &[32, 4]),
        t("odd", DType::U8, &[3]),
        t("long", DType::I64, &[3]),
        t("a", DType::F32, &[16]),
        t("none", DType::F32, &[0, 4]),
    ];
    let options =
        WriteOptions { extra_files: vec![("config.json".to_owned(), b"{\"k\":1}".to_vec())], ..Default::default() };
    let manifest = write(&target, &tensors, &PlanOptions::default(), &options, 5).unwrap();
    let dir = HfDirectory::open(&target).unwrap();
    assert_eq!(dir.config().unwrap()["k"], 1);
    let file = &dir.files()[0];
    assert_eq!(file.header().data_start % 64, 0);
    assert_eq!(file.header().metadata, [("format".to_owned(), "pt".to_owned())]);
    let order: Vec<_> =
        file.tensors().iter().map(|t| (t.name.as_str(), t.range.start - file.header().data_start)).collect();
    assert_eq!(order, [("z", 0), ("a", 256), ("none", 320), ("long", 320), ("scalar", 344), ("odd", 346)]);
    for (i, t) in tensors.iter().enumerate() {
        let view = dir.tensor(&t.name).unwrap();
        assert_eq!((view.dtype, &view.shape), (t.dtype, &t.shape));
        assert_eq!(&*view.bytes, content(i, view.bytes.len() as u64), "{}", t.name);
        if !view.bytes.is_empty() {
            assert_eq!(view.bytes.as_ptr() as usize % t.dtype.size(), 0);
        }
    }
    assert_eq!(names(&target), ["config.json", "lapidary_manifest.json", "model.safetensors"]);
    assert_eq!(Manifest::read(&target).unwrap().unwrap(), manifest);
    manifest.verify(&target).unwrap();
}

#[test]
fn shards_have_an_index() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let tensors = [
        t("b", DType::U8, &[60]),
        t("big", DType::U8, &[500]),
        t("c", DType::U8, &[50]),
        t("d", DType::U8, &[50]),
        t("e", DType::U8, &[1]),
    ];
    let plan = PlanOptions { max_shard_bytes: Some(100), ..Default::default() };
    let options = WriteOptions { no_manifest: true, ..Default::default() };
    write(&target, &tensors, &plan, &options, 1000).unwrap();
    assert_eq!(
        names(&target),
        [
            "model-00001-of-00004.safetensors",
            "model-00002-of-00004.safetensors",
            "model-00003-of-00004.safetensors",
            "model-00004-of-00004.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let index: Value = serde_json::from_slice(&fs::read(target.join(INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 661);
    assert_eq!(index["metadata"]["total_parameters"], 661);
    assert_eq!(index["weight_map"]["d"], "model-00003-of-00004.safetensors");
    let dir = HfDirectory::open(&target).unwrap();
    assert!(dir.unindexed().is_empty());
    for (i, t) in tensors.iter().enumerate() {
        let bytes = dir.tensor(&t.name).unwrap().bytes;
        assert_eq!(&*bytes, content(i, bytes.len() as u64));
    }
}

#[test]
fn large_tensors_cross_pieces() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let tensors = [t("a", DType::U8, &[3 * PIECE + 17]), t("b", DType::U8, &[PIECE])];
    let manifest = write(&target, &tensors, &PlanOptions::default(), &WriteOptions::default(), PIECE * 2 + 3).unwrap();
    manifest.verify(&target).unwrap();
    let dir = HfDirectory::open(&target).unwrap();
    assert_eq!(&*dir.tensor("a").unwrap().bytes, content(0, 3 * PIECE as u64 + 17));
    assert_eq!(&*dir.tensor("b").unwrap().bytes, content(1, PIECE as u64));
}

#[test]
fn bad_plans() {
    let plan = |tensors: &[TensorPlan]| HfPlan::new(tensors, &PlanOptions::default()).unwrap_err().to_string();
    assert_eq!(plan(&[t("a", DType::U8, &[1]), t("a", DType::U8, &[1])]), "tensor \"a\" is planned twice");
    assert_eq!(plan(&[t("__metadata__", DType::U8, &[1])]), "tensor name \"__metadata__\" is reserved by the format");
    assert_eq!(
        plan(&[t("a", DType::F32, &[usize::MAX])]),
        format!("tensor \"a\": shape [{}] is too large for this machine's address space", usize::MAX)
    );
    assert!(plan(&[t("a", DType::U8, &[usize::MAX]), t("b", DType::U8, &[1])]).starts_with("tensor \"b\": shape [1]"));
}

#[test]
fn sources_that_fail_leave_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let plan = HfPlan::new(&[t("a", DType::U8, &[4]), t("b", DType::U8, &[4])], &PlanOptions::default()).unwrap();
    let run = |bytes: &[u8], fail: bool| {
        let e = write_hf(
            &target,
            &plan,
            &WriteOptions::default(),
            |index, sink| {
                if index == 1 && fail {
                    return Err("the disk is on fire".into());
                }
                Ok(sink.write(if index == 0 { b"good" } else { bytes })?)
            },
            |_| {},
        )
        .unwrap_err();
        assert!(names(tmp.path()).is_empty());
        e.to_string()
    };
    assert_eq!(run(b"good", true), "cannot produce tensor \"b\": the disk is on fire");
    assert_eq!(run(b"bad", false), "tensor \"b\" has 4 bytes, its source gave 3");
    assert_eq!(run(b"worse", false), "tensor \"b\" has 4 bytes, its source gave 5");
}

#[test]
fn existing_output_stays_without_force() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let (first, second) = ([t("a", DType::U8, &[4])], [t("b", DType::U8, &[4])]);
    let go = |tensors: &[TensorPlan], force| {
        write(&target, tensors, &PlanOptions::default(), &WriteOptions { force, ..Default::default() }, 10)
    };
    go(&first, false).unwrap();
    assert!(matches!(go(&second, false), Err(WriteError::Commit(CommitError::Exists { .. }))));
    assert!(HfDirectory::open(&target).unwrap().tensor("a").is_some());
    go(&second, true).unwrap();
    assert!(HfDirectory::open(&target).unwrap().tensor("b").is_some());
}

#[test]
fn extra_files_have_names_of_their_own() {
    let tmp = tempfile::tempdir().unwrap();
    for name in ["../x", "a/b", "", "..", "model.safetensors", "lapidary_manifest.json", "model.safetensors.index.json"]
    {
        let options = WriteOptions { extra_files: vec![(name.to_owned(), Vec::new())], ..Default::default() };
        let e = write(&tmp.path().join("out"), &[], &PlanOptions::default(), &options, 1).unwrap_err();
        assert!(matches!(e, WriteError::ExtraName(n) if n == name));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn random_trees_read_back(
        spec in prop::collection::vec((0..13usize, prop::collection::vec(0..9usize, 0..4)), 0..12),
        max in prop::option::of(1..3000u64),
        piece in 1..2000usize,
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        let tensors: Vec<_> = spec
            .iter()
            .enumerate()
            // Names that need escaping and are not ordered like their indices.
            .map(|(i, (d, shape))| t(&format!("\"é\n{}.w{i}", 97 * i % 13), DType::ALL[*d], shape))
            .collect();
        let plan = PlanOptions { max_shard_bytes: max, ..Default::default() };
        write(&target, &tensors, &plan, &WriteOptions::default(), piece).unwrap();
        let dir = HfDirectory::open(&target).unwrap();
        prop_assert_eq!(dir.len(), tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            let view = dir.tensor(&t.name).unwrap();
            prop_assert_eq!((view.dtype, &view.shape), (t.dtype, &t.shape));
            prop_assert_eq!(&*view.bytes, content(i, view.bytes.len() as u64));
            if !view.bytes.is_empty() && view.bytes.len().is_multiple_of(64) {
                prop_assert_eq!(view.bytes.as_ptr() as usize % 64, 0);
            }
        }
    }
}
