//! Writes and checks Orbax checkpoints whose values follow from the names of their arrays, for
//! `scripts/interop_orbax.py`, and measures writing and reading.
//!
//! ```text
//! orbax_pattern forms                      names of the forms that `write` knows
//! orbax_pattern write BASE FORM            writes BASE/0/items
//! orbax_pattern check PATH                 reads every parameter and compares it with the pattern
//! orbax_pattern bench-write BASE MIB THREADS [zstd]   times writing a random tree of this size
//! orbax_pattern bench-read PATH THREADS    times reading it, checksums verified
//! ```

#![allow(clippy::print_stdout)]

#[path = "../tests/orbax/pattern.rs"]
mod pattern;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use lapidary_checkpoint::orbax::{
    ArrayPlan, Layout, LinkedChunk, LinkedFile, OrbaxCheckpoint, OrbaxError, OrbaxOptions, OrbaxPlan, OrbaxWriteError,
    OrbaxWriter, Region, Source, Target, ZarrVersion, dotted,
};
use pattern::pattern;
use tensor::{DType, Shape};

type Anything = Box<dyn Error + Send + Sync>;

const FORMS: [&str; 8] = ["default", "zstd", "bare", "ocdbt2", "files3", "pathways", "pathways_raw", "linked"];

fn main() -> Result<(), Anything> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["forms"] => println!("{}", FORMS.join("\n")),
        ["write", base, form] => write(Path::new(base), form)?,
        ["check", path] => check(Path::new(path))?,
        ["bench-write", base, mib, threads, rest @ ..] => {
            bench_write(Path::new(base), mib.parse()?, threads.parse()?, rest == ["zstd"])?;
        }
        ["bench-read", path, threads] => bench_read(Path::new(path), threads.parse()?)?,
        _ => return Err("see the head of examples/orbax_pattern.rs for its commands".into()),
    }
    Ok(())
}

fn params() -> Vec<(&'static str, DType, Shape)> {
    let mut out: Vec<(&str, DType, Shape)> = vec![
        ("token_embedder.embedding", DType::BF16, [4096, 256].into()),
        ("token_embedder.scaled", DType::F32, [2048, 160].into()),
        ("decoder.layers_0.mlp.wi_0.kernel", DType::BF16, [1001, 1024].into()),
        ("decoder.layers_0.attn.query.kernel", DType::BF16, [96, 4, 32].into()),
        ("decoder.layers.scanned.kernel", DType::BF16, [32, 7, 4000].into()),
        ("decoder.layers_0.scale", DType::F32, [1536].into()),
        ("decoder.layers_0.layer_scalar", DType::BF16, [1].into()),
        ("scalar", DType::F32, Shape::scalar()),
    ];
    let all = ["bool", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "f16", "bf16", "f32", "f64"];
    out.extend(all.iter().zip(DType::ALL).map(|(name, dtype)| (*name, dtype, Shape::from([37, 3]))));
    out
}

fn options(form: &str) -> Option<OrbaxOptions> {
    let o = OrbaxOptions::default();
    let mut o = match form {
        "default" | "linked" => o,
        "zstd" => OrbaxOptions { zstd: Some(1), ..o },
        "bare" => OrbaxOptions { crc32c: false, ..o },
        "ocdbt2" => OrbaxOptions { zarr: ZarrVersion::V2, zstd: Some(1), ..o },
        "files3" => OrbaxOptions { layout: Layout::Files, ..o },
        "pathways" => OrbaxOptions::pathways(),
        "pathways_raw" => OrbaxOptions { zstd: None, ..OrbaxOptions::pathways() },
        _ => return None,
    };
    o.custom_metadata.insert("scan_layers".into(), false.into());
    o.custom_metadata.insert("provenance".into(), serde_json::json!({"source": "pattern"}));
    Some(o)
}

fn write(base: &Path, form: &str) -> Result<(), Anything> {
    let options = options(form).ok_or("no such form")?;
    let mut plan = OrbaxPlan::default();
    for (name, dtype, shape) in params() {
        plan.arrays.push(ArrayPlan::pushed(&format!("params.params.{name}"), dtype, shape));
    }
    if form == "linked" {
        link_transposed(base, &mut plan)?;
    }
    plan.arrays.push(ArrayPlan::scalar_i64("step", 0));
    plan.empty.push((dotted("opt_state"), "Dict"));
    let writer = OrbaxWriter::create(Target::Step { base: base.to_owned(), step: 0 }, plan, options)?;
    for (i, (name, dtype, shape)) in params().iter().enumerate() {
        writer.write_array(i, pattern(name, *dtype, shape).bytes())?;
    }
    writer.finish()?;
    Ok(())
}

/// Stores every matrix transposed in a file outside and refers to it.
fn link_transposed(base: &Path, plan: &mut OrbaxPlan) -> Result<(), Anything> {
    let outside = base.with_extension("raw");
    let mut bytes = vec![0; 13];
    for (array, (name, dtype, shape)) in plan.arrays.iter_mut().zip(params()).filter(|(_, p)| p.2.rank() == 2) {
        let a = pattern(name, dtype, &shape);
        let (rows, columns, size) = (shape[0], shape[1], dtype.size());
        let chunks = vec![LinkedChunk { file: 0, offset: bytes.len() as u64 }];
        for c in 0..columns {
            for r in 0..rows {
                bytes.extend(&a.bytes()[(r * columns + c) * size..][..size]);
            }
        }
        array.chunk_shape = Some(shape.to_vec());
        array.source = Source::Linked { order: Some(vec![1, 0]), chunks };
    }
    fs_err::write(&outside, bytes)?;
    plan.links.push(LinkedFile { name: "linked/outside.raw".into(), target: outside, hard: false });
    Ok(())
}

fn check(path: &Path) -> Result<(), Anything> {
    let ckpt = OrbaxCheckpoint::open(path)?;
    let mut n = 0;
    for a in ckpt.arrays() {
        let Some(name) = &a.param_name else { continue };
        if ckpt.read_array(&a.name)?.bytes() != pattern(name, a.dtype, &a.shape).bytes() {
            return Err(format!("{name} differs").into());
        }
        n += 1;
    }
    println!("{n} arrays equal, {:?}, {}, {} problems", ckpt.kind(), ckpt.container(), ckpt.problems().len());
    Ok(())
}

/// Matrices of 16 MiB, and a norm each.
fn bench_plan(mib: usize) -> OrbaxPlan {
    let mut plan = OrbaxPlan::default();
    for i in 0..mib.div_ceil(16) {
        plan.arrays.push(ArrayPlan::pushed(&format!("params.params.layers_{i}.kernel"), DType::BF16, [4096, 2048]));
        plan.arrays.push(ArrayPlan::pushed(&format!("params.params.layers_{i}.scale"), DType::BF16, [2048]));
    }
    plan
}

fn bench_write(base: &Path, mib: usize, threads: usize, zstd: bool) -> Result<(), Anything> {
    // Random mantissas under the exponents of weights, so that compression finds what it would find in a model.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let block: Vec<u8> = (0..8 << 20)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let exponent = 121 - (state >> 40).trailing_zeros().min(20) as u16;
            (((state as u16 & 0x80ff) << 8 >> 8 & 0x807f) | (state as u16 & 0x8000) | (exponent << 7)).to_le_bytes()
        })
        .collect();
    let options = OrbaxOptions { zstd: zstd.then_some(1), force: true, ..OrbaxOptions::default() };
    let start = Instant::now();
    let writer = OrbaxWriter::create(Target::Step { base: base.to_owned(), step: 0 }, bench_plan(mib), options)?;
    writer.write_all(threads, |_, _, chunk| {
        let n = chunk.left();
        block[..n].chunks(1 << 20).try_for_each(|piece| chunk.push(piece))?;
        Ok::<(), OrbaxWriteError>(())
    })?;
    let pushed = start.elapsed();
    let report = writer.finish()?;
    let total = start.elapsed();
    println!(
        "wrote {} MiB in {:.2} s, {:.2} s with commit",
        report.stored_bytes >> 20,
        pushed.as_secs_f64(),
        total.as_secs_f64()
    );
    usage();
    Ok(())
}

fn bench_read(path: &Path, threads: usize) -> Result<(), Anything> {
    let start = Instant::now();
    let ckpt = OrbaxCheckpoint::open(path)?;
    let opened = start.elapsed();
    let (next, bytes, sum) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| -> Result<(), Anything> {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(a) = ckpt.arrays().get(next.fetch_add(1, Ordering::Relaxed)) {
                        ckpt.for_each_piece(&a.name, 1 << 20, |_: &Region, piece: &[u8]| {
                            bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
                            sum.fetch_add(u64::from(piece[piece.len() / 2]), Ordering::Relaxed);
                            Ok::<(), OrbaxError>(())
                        })?;
                    }
                    Ok::<(), OrbaxError>(())
                })
            })
            .collect();
        for w in workers {
            w.join().map_err(|_| "a reader died")??;
        }
        Ok(())
    })?;
    println!(
        "read {} MiB in {:.2} s (opened in {:.3} s), sum {}",
        bytes.into_inner() >> 20,
        start.elapsed().as_secs_f64(),
        opened.as_secs_f64(),
        sum.into_inner()
    );
    usage();
    Ok(())
}

/// Prints what the system knows about this process.
fn usage() {
    let status = fs_err::read_to_string(PathBuf::from("/proc/self/status")).unwrap_or_default();
    for line in status.lines().filter(|l| l.starts_with("RssAnon") || l.starts_with("VmHWM")) {
        println!("{line}");
    }
}
