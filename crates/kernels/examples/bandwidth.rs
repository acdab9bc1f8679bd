//! Speed of products with matrices of Gemma 4 E2B's shapes, beside the speed at which memory can be read:
//! `cargo run --release -p lapidary-kernels --example bandwidth [THREADS [GB [LEVEL]]]`.
//!
//! Each figure is the best of several passes over copies that together are far larger than the caches. `cpu` is by
//! processor time of the calling thread instead of time passed: with one thread, what the machine would do if nobody
//! else used it.

#![allow(clippy::print_stdout)]

use std::sync::Arc;
use std::time::Instant;

use kernels::{Bytes, Format, Level, Matrix, Out, Pool, Reading, Rows, products};
use memmap2::MmapMut;

const SHAPES: [(usize, usize); 12] = [
    (256, 1536),
    (512, 1536),
    (2048, 1536),
    (4096, 1536),
    (1536, 256),
    (1536, 2048),
    (1536, 4096),
    (6144, 1536),
    (12288, 1536),
    (1536, 6144),
    (1536, 12288),
    (262_144, 1536),
];

struct Memory(memmap2::Mmap);

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Processor time of this thread, where the system tells.
fn processor() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e9
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let threads = args.next().map_or(Ok(0), |a| a.parse())?;
    let size = (args.next().map_or(Ok(2.0), |a| a.parse::<f64>())? * 1e9) as usize;
    let mut pool = Pool::new(threads);
    if let Some(level) = args.next() {
        let found = Level::available().into_iter().find(|l| l.to_string() == level);
        pool = pool.with_level(found.ok_or("no such level on this machine")?);
    }
    let start = (Instant::now(), processor());
    let reading = Reading::new(size)?;
    let times: Vec<_> = (0..5).map(|_| reading.time(&pool)).collect();
    let cpu = processor() - start.1;
    let best = times.iter().min().map_or(f64::NAN, |t| size as f64 / t.as_secs_f64() / 1e9);
    println!("{pool:?}; reading: best {best:.1} GB/s; {times:.3?}, {cpu:.2} s of processor time");
    drop(reading);
    let mut memory = MmapMut::map_anon(size)?;
    #[cfg(target_os = "linux")]
    memory.advise(memmap2::Advice::HugePage)?;
    // Scales of zero and weights of whatever: the time does not depend on them.
    memory.iter_mut().step_by(64).for_each(|b| *b = 1);
    let bytes = Bytes::new(Arc::new(Memory(memory.make_read_only()?)));
    for format in [Format::Bf16, Format::Int8, Format::Int4, Format::F32] {
        for (n, k) in SHAPES {
            let each = format.bytes(n, k).ok_or("too large")?;
            // Six bytes off, as a file's tensors may lie.
            let count = ((size - 64) / each).min(4000);
            let matrices = (0..count)
                .map(|i| Ok(Matrix::new(format, bytes.slice(i * each + 6..(i + 1) * each + 6).ok_or("range")?, n, k)?))
                .collect::<Result<Vec<Matrix>, Box<dyn std::error::Error>>>()?;
            print!("{format} {n} x {k}:");
            for m in [1, 4, 8] {
                let (x, mut y) = (vec![1.0; m * k], vec![0.0; m * n]);
                let (mut wall, mut cpu) = (f64::INFINITY, f64::INFINITY);
                for _ in 0..3 {
                    let start = (Instant::now(), processor());
                    for w in &matrices {
                        products(&pool, Rows::F32(&x), m, &[w], &mut [Out::F32(&mut y)])?;
                    }
                    (wall, cpu) = (wall.min(start.0.elapsed().as_secs_f64()), cpu.min(processor() - start.1));
                }
                let all = (each * count) as f64 / 1e9;
                print!("  m={m} {:.1} GB/s = {:.0} %, cpu {:.1}", all / wall, all / wall / best * 100.0, all / cpu);
            }
            println!();
        }
    }
    Ok(())
}
