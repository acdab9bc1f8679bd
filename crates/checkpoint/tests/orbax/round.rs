//! Trees written and read back, with every option.

use std::path::Path;

use lapidary_checkpoint::orbax::{
    ArrayPlan, Layout, LinkedChunk, LinkedFile, OrbaxCheckpoint, OrbaxError, OrbaxOptions, OrbaxPlan, OrbaxWriteError,
    OrbaxWriter, Region, Source, Target, TreeKind, ZarrVersion, dotted,
};
use proptest::prelude::*;
use tensor::{DType, Shape};

#[derive(Debug, Clone)]
struct Array {
    dtype: DType,
    shape: Vec<usize>,
    chunk: Option<Vec<usize>>,
}

fn array() -> impl Strategy<Value = Array> {
    let dims = prop::collection::vec((0usize..9, 1usize..9), 0..4);
    (prop::sample::select(DType::ALL.to_vec()), dims, any::<bool>()).prop_map(|(dtype, dims, chunked)| Array {
        dtype,
        shape: dims.iter().map(|d| d.0).collect(),
        chunk: chunked.then(|| dims.iter().map(|d| d.1).collect()),
    })
}

fn options() -> impl Strategy<Value = OrbaxOptions> {
    let some =
        (any::<bool>(), any::<bool>(), prop::option::of(-3..6), any::<bool>(), 1usize..5, 0usize..200, 1u64..3000);
    some.prop_map(|(files, v2, zstd, crc32c, split, split_above, data_file_bytes)| OrbaxOptions {
        layout: if files { Layout::Files } else { Layout::Ocdbt },
        zarr: if v2 { ZarrVersion::V2 } else { ZarrVersion::V3 },
        zstd,
        crc32c,
        split,
        split_above,
        data_file_bytes,
        ..OrbaxOptions::default()
    })
}

fn name(i: usize) -> String {
    format!("params.params.layer.a{i}")
}

fn plan(arrays: &[Array]) -> OrbaxPlan {
    let mut plan = OrbaxPlan::default();
    for (i, a) in arrays.iter().enumerate() {
        let chunk_shape = a.chunk.clone();
        plan.arrays.push(ArrayPlan { chunk_shape, ..ArrayPlan::pushed(&name(i), a.dtype, a.shape.clone()) });
    }
    plan.arrays.push(ArrayPlan::scalar_i64("step", 42));
    plan.empty.push((dotted("opt_state"), "Dict"));
    plan
}

/// Bytes that do not compress.
fn values(i: usize, a: &Array) -> Vec<u8> {
    let n = a.shape.iter().product::<usize>() * a.dtype.size();
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(i as u64 + 1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..n).map(|_| if a.dtype == DType::Bool { next() & 1 } else { next() }).collect()
}

fn check(path: &Path, arrays: &[Array]) {
    let ckpt = OrbaxCheckpoint::open(path).unwrap();
    assert_eq!(ckpt.problems(), []);
    for (i, a) in arrays.iter().enumerate() {
        let want = values(i, a);
        let got = ckpt.read_array(&name(i)).unwrap();
        assert_eq!((got.dtype(), got.shape().dims(), got.bytes()), (a.dtype, &a.shape[..], &want[..]));
        let mut n = 0;
        ckpt.for_each_piece(&name(i), 40, |r: &Region, bytes: &[u8]| {
            let mut same = vec![0; bytes.len()];
            ckpt.read_region(&name(i), r, &mut same).unwrap();
            assert_eq!(same, bytes);
            n += bytes.len();
            Ok::<(), OrbaxError>(())
        })
        .unwrap();
        assert_eq!(n, want.len());
    }
    assert_eq!(ckpt.read_array("step").unwrap().as_slice::<i64>().unwrap(), [42]);
    assert_eq!(ckpt.empty_leaves()[0].name(), "opt_state");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(
        arrays in prop::collection::vec(array(), 1..5),
        options in options(),
        threads in 1usize..4,
        whole in any::<bool>(),
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let base = tmp.path().join("out");
        let writer = OrbaxWriter::create(Target::Step { base: base.clone(), step: 3 }, plan(&arrays), options).unwrap();
        // The first of them from outside in one piece, if at all; the rest chunk by chunk.
        if whole {
            writer.write_array(0, &values(0, &arrays[0])).unwrap();
        }
        let padded = |a: &Array| a.chunk.as_ref().is_some_and(|c| a.shape.iter().zip(c).any(|(n, c)| n % c != 0));
        for (i, a) in arrays.iter().enumerate().filter(|(_, a)| padded(a)) {
            writer.write_array(i, &values(i, a)).unwrap();
        }
        writer.write_all(threads, |i, region, chunk| {
            let (a, all) = (&arrays[i], values(i, &arrays[i]));
            let size = a.dtype.size();
            let strides = Shape::from(a.shape.clone()).strides();
            for n in 0..region.elements() {
                let (mut rest, mut at) = (n, 0);
                for d in (0..a.shape.len()).rev() {
                    at += (region.origin[d] + rest % region.shape[d]) * strides[d];
                    rest /= region.shape[d];
                }
                chunk.push(&all[at * size..(at + 1) * size])?;
            }
            Ok::<(), OrbaxWriteError>(())
        }).unwrap();
        let report = writer.finish().unwrap();
        prop_assert_eq!(&report.items, &base.join("3/items"));
        check(&base, &arrays);
    }
}

fn small() -> Vec<Array> {
    vec![
        Array { dtype: DType::BF16, shape: vec![64, 60], chunk: None },
        Array { dtype: DType::F32, shape: vec![33, 64], chunk: None },
        Array { dtype: DType::F32, shape: vec![5], chunk: None },
    ]
}

fn small_options() -> OrbaxOptions {
    OrbaxOptions { split: 4, split_above: 1000, data_file_bytes: 5000, time: Some(1), ..OrbaxOptions::default() }
}

/// Every file below a directory with its bytes, except those that name the directory.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    fn walk(dir: &Path, root: &Path, out: &mut Vec<(String, Vec<u8>)>) {
        for e in fs_err::read_dir(dir).unwrap() {
            let p = e.unwrap().path();
            if p.is_dir() {
                walk(&p, root, out);
            } else if !p.ends_with("commit_success.txt") && !p.ends_with("lapidary.checksums.json") {
                out.push((p.strip_prefix(root).unwrap().display().to_string(), fs_err::read(&p).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(dir, dir, &mut out);
    out.sort();
    out
}

#[test]
fn an_interrupted_write_is_continued_to_the_same_bytes() {
    for zstd in [None, Some(1)] {
        let tmp = tempfile::tempdir().unwrap();
        let arrays = small();
        let options = || OrbaxOptions { zstd, ..small_options() };
        let straight = tmp.path().join("straight");
        let w = OrbaxWriter::create(Target::Items(straight.clone()), plan(&arrays), options()).unwrap();
        for (i, a) in arrays.iter().enumerate() {
            w.write_array(i, &values(i, a)).unwrap();
        }
        w.finish().unwrap();

        let out = Target::Items(tmp.path().join("continued"));
        let resume = || OrbaxOptions { resume: true, ..options() };
        let mut w = OrbaxWriter::create(out.clone(), plan(&arrays), resume()).unwrap();
        w.write_array(0, &values(0, &arrays[0])).unwrap();
        w.begin(1, 2).unwrap().push(&[0xAB; 50]).unwrap();
        w.keep();
        let staging = w.staging().to_owned();
        drop(w);
        assert!(OrbaxCheckpoint::open(&staging).is_err(), "what is unfinished must not open");
        // A chunk that was damaged meanwhile must be written again.
        let victim = match zstd {
            None => staging.join("d/data-00000"),
            Some(_) => staging.join("d/00000-00001"),
        };
        let mut bytes = fs_err::read(&victim).unwrap();
        bytes[10] ^= 1;
        fs_err::write(&victim, bytes).unwrap();

        let w = OrbaxWriter::create(out.clone(), plan(&arrays), resume()).unwrap();
        let done: Vec<bool> = (0..4).map(|c| w.is_done(0, c)).collect();
        let broken = usize::from(zstd.is_some());
        assert_eq!(done.iter().position(|d| !d), Some(broken), "{done:?}");
        assert_eq!(done.iter().filter(|d| **d).count(), 3);
        for (i, a) in arrays.iter().enumerate() {
            w.write_array(i, &values(i, a)).unwrap();
        }
        w.finish().unwrap();
        check(&tmp.path().join("continued"), &arrays);
        assert_eq!(contents(&tmp.path().join("continued")), contents(&straight));

        // Another plan does not find the other's files.
        let other = Target::Items(tmp.path().join("other"));
        let mut w = OrbaxWriter::create(other.clone(), plan(&arrays), resume()).unwrap();
        w.write_array(0, &values(0, &arrays[0])).unwrap();
        w.keep();
        drop(w);
        let w = OrbaxWriter::create(other, plan(&arrays[2..]), resume()).unwrap();
        assert!(!w.is_done(0, 0));
        w.write_array(0, &values(0, &arrays[2])).unwrap();
        w.finish().unwrap();
        let files = contents(&tmp.path().join("other"));
        assert!(files.iter().all(|(name, _)| !name.starts_with("d/data") && !name.starts_with("d/0")), "{files:?}");
        check(&tmp.path().join("other"), &arrays[2..]);
    }
}

#[test]
fn chunks_must_be_complete_and_come_once() {
    let tmp = tempfile::tempdir().unwrap();
    let w = OrbaxWriter::create(Target::Items(tmp.path().join("out")), plan(&small()), small_options()).unwrap();
    assert_eq!((w.chunk_count(0), w.chunk_count(1)), (4, 4));
    let mut c = w.begin(0, 1).unwrap();
    c.push(&[0; 1800]).unwrap();
    assert!(c.push(&[0; 121]).unwrap_err().to_string().contains("121 bytes where 120"));
    assert!(c.finish().unwrap_err().to_string().contains("lacks 120 bytes"));
    let mut c = w.begin(0, 1).unwrap();
    c.push(&[0; 1920]).unwrap();
    c.finish().unwrap();
    assert!(w.begin(0, 1).unwrap_err().to_string().contains("written already"));
    let e = w.finish().unwrap_err().to_string();
    assert!(e.contains("params.params.layer.a0") && e.contains("c/0/0") && e.contains("never written"), "{e}");
    assert!(fs_err::read_dir(tmp.path()).unwrap().next().is_none(), "nothing is left");
}

#[test]
fn an_error_of_the_source_ends_the_write() {
    let tmp = tempfile::tempdir().unwrap();
    let w = OrbaxWriter::create(Target::Items(tmp.path().join("out")), plan(&small()), small_options()).unwrap();
    let e = w.write_all(2, |i, _, chunk| {
        let n = chunk.left();
        if i == 1 { Err(std::io::Error::other("the source is gone").into()) } else { chunk.push(&vec![0; n]) }
    });
    assert!(e.unwrap_err().to_string().contains("the source is gone"));
}

#[test]
fn existing_output_stays_unless_asked() {
    let tmp = tempfile::tempdir().unwrap();
    let base = tmp.path().join("out");
    let arrays = small();
    let write = |force| {
        let target = Target::Step { base: base.clone(), step: 0 };
        let w = OrbaxWriter::create(target, plan(&arrays), OrbaxOptions { force, ..small_options() })?;
        for (i, a) in arrays.iter().enumerate() {
            w.write_array(i, &values(i, a))?;
        }
        w.finish()
    };
    write(false).unwrap();
    assert!(matches!(write(false), Err(OrbaxWriteError::Commit(_))));
    write(true).unwrap();
    check(&base, &arrays);
}

#[test]
fn arrays_in_other_files_are_read_through_links() {
    let tmp = tempfile::tempdir().unwrap();
    let outside = tmp.path().join("weights.bin");
    // Two layers, each stored transposed, make one stacked array: (D, L, F) from two of (F, D).
    let (d, l, f) = (6, 2, 4);
    let stacked = Array { dtype: DType::BF16, shape: vec![d, l, f], chunk: None };
    let all = values(0, &stacked);
    let mut bytes = vec![1; 10];
    let mut chunks = Vec::new();
    for layer in 0..l {
        chunks.push(LinkedChunk { file: 0, offset: bytes.len() as u64 });
        for i in 0..f {
            for j in 0..d {
                let at = ((j * l + layer) * f + i) * 2;
                bytes.extend(&all[at..at + 2]);
            }
        }
        bytes.extend([9; 3]);
    }
    fs_err::write(&outside, &bytes).unwrap();
    for hard in [false, true] {
        let mut p = plan(std::slice::from_ref(&stacked));
        p.arrays[0].chunk_shape = Some(vec![d, 1, f]);
        p.arrays[0].source = Source::Linked { order: Some(vec![1, 2, 0]), chunks: chunks.clone() };
        p.links.push(LinkedFile { name: "linked/weights.bin".into(), target: outside.clone(), hard });
        let out = tmp.path().join(format!("out{hard}"));
        let w = OrbaxWriter::create(Target::Items(out.clone()), p.clone(), OrbaxOptions::default()).unwrap();
        assert!(w.is_done(0, 0));
        w.write_all(1, |_, _, _| Err(OrbaxWriteError::Io(std::io::Error::other("nothing to do")))).unwrap();
        w.finish().unwrap();
        check(&out, std::slice::from_ref(&stacked));
        let ckpt = OrbaxCheckpoint::open(&out).unwrap();
        assert_eq!(ckpt.arrays()[0].format, "zarr3 transpose[1, 2, 0]+bytes");
        assert_eq!(ckpt.kind(), TreeKind::Linen);
        // Beyond the end of the file.
        let Source::Linked { chunks, .. } = &mut p.arrays[0].source else { unreachable!() };
        chunks[1].offset += 4;
        let e = OrbaxWriter::create(Target::Items(tmp.path().join("x")), p, OrbaxOptions::default()).unwrap_err();
        assert!(e.to_string().contains("weights.bin has"), "{e}");
    }
}

#[test]
fn uncompressed_chunks_are_used_in_place() {
    let tmp = tempfile::tempdir().unwrap();
    let arrays = small();
    for layout in [Layout::Ocdbt, Layout::Files] {
        let out = tmp.path().join(format!("{layout:?}"));
        let options = OrbaxOptions { layout, ..small_options() };
        let w = OrbaxWriter::create(Target::Items(out.clone()), plan(&arrays), options).unwrap();
        for (i, a) in arrays.iter().enumerate() {
            w.write_array(i, &values(i, a)).unwrap();
        }
        w.finish().unwrap();
        let ckpt = OrbaxCheckpoint::open(&out).unwrap();
        let map = ckpt.mapped_chunk(&name(0), &[2, 0]).unwrap();
        assert_eq!(map.unwrap().as_slice(), &values(0, &arrays[0])[2 * 1920..3 * 1920]);
        // The smallest lie inside the tree.
        assert_eq!(ckpt.mapped_chunk(&name(2), &[0]).unwrap().is_some(), layout == Layout::Files);
        assert!(ckpt.mapped_chunk(&name(0), &[4, 0]).is_err());
        assert!(ckpt.mapped_chunk("absent", &[0]).is_err());
    }
}

#[test]
fn reading_beyond_an_array_is_an_error() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let w = OrbaxWriter::create(Target::Items(out.clone()), plan(&small()), small_options()).unwrap();
    for (i, a) in small().iter().enumerate() {
        w.write_array(i, &values(i, a)).unwrap();
    }
    w.finish().unwrap();
    let ckpt = OrbaxCheckpoint::open(&out).unwrap();
    let mut buffer = vec![0; 120];
    assert!(ckpt.read_rows(&name(0), 63, 1, &mut buffer).is_ok());
    for (first, count) in [(64, 1), (63, 2), (usize::MAX, 1), (0, usize::MAX)] {
        assert!(matches!(ckpt.read_rows(&name(0), first, count, &mut buffer), Err(OrbaxError::Region { .. })));
    }
    assert!(matches!(ckpt.read_rows(&name(0), 0, 1, &mut buffer[1..]), Err(OrbaxError::Region { .. })));
    assert!(matches!(ckpt.read_rows("step", 0, 1, &mut buffer), Err(OrbaxError::Region { .. })));
    assert!(matches!(ckpt.read_array("absent"), Err(OrbaxError::Unknown { .. })));
}
