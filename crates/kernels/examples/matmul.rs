//! Measures products of matrices: `cargo run --release -p lapidary-kernels --example matmul [M N K lhs_t rhs_t]`, in GFLOP/s of
//! wall time and of processor time times threads.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use half::bf16;
use kernels::{Out, Pool, Product, Rows, matmul};

/// Processor time of this process in seconds (Linux; 0 elsewhere).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let a: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let shapes = match a[..] {
        [m, n, k, l, r] => vec![(1, m, n, k, l != 0, r != 0)],
        _ => vec![
            (1, 512, 6144, 1536, false, true),
            (1, 2048, 4096, 512, false, true),
            (1, 2048, 512, 4096, false, true),
            (1, 2048, 512, 4096, false, false),
            (1, 4096, 512, 2048, true, false),
            (1, 512, 4096, 2048, true, false),
            (1, 512, 512, 2048, true, false),
            (1, 2048, 512, 512, false, true),
            (1, 2048, 64, 512, false, true),
            (1, 64, 512, 2048, true, false),
            (1, 512, 32768, 512, false, true),
            (1, 512, 512, 32768, false, false),
            (1, 32768, 512, 512, true, false),
            (8, 2048, 512, 64, false, true),
            (8, 2048, 64, 512, false, false),
        ],
    };
    let pool = Pool::new(2);
    for (batch, m, n, k, lhs_transposed, rhs_transposed) in shapes {
        let p = Product { batch, m, n, k, lhs_transposed, rhs_transposed };
        let flops = 2.0 * (batch * m * n * k) as f64 * 1e-9;
        let l: Vec<f32> = (0..batch * m * k).map(|i| (i % 7) as f32).collect();
        let r: Vec<f32> = (0..batch * k * n).map(|i| (i % 5) as f32).collect();
        let narrow = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
        let (lb, rb) = (narrow(&l), narrow(&r));
        let mut y = vec![bf16::ZERO; batch * m * n];
        let mut z = vec![0.0f32; batch * m * n];
        let mut rates = Vec::new();
        for wide in [false, true] {
            let mut once = || match wide {
                false => matmul(&|t| pool.run(&|_| t()), &p, Rows::Bf16(&lb), Rows::Bf16(&rb), &mut Out::Bf16(&mut y)),
                true => matmul(&|t| pool.run(&|_| t()), &p, Rows::F32(&l), Rows::F32(&r), &mut Out::F32(&mut z)),
            };
            once()?;
            let runs = (200.0 / flops).clamp(3.0, 300.0) as usize;
            let (start, cpu) = (Instant::now(), processor_seconds());
            for _ in 0..runs {
                once()?;
            }
            let each = |t: f64| flops * runs as f64 / t;
            rates.push((each(start.elapsed().as_secs_f64()), each((processor_seconds() - cpu) / 2.0)));
        }
        let layout = |t: bool| if t { "T" } else { "N" };
        println!(
            "{batch} x [{m}, {k}]{} [{k}, {n}]{}: bf16 {:.0} ({:.0}), f32 {:.0} ({:.0})",
            layout(lhs_transposed),
            layout(rhs_transposed),
            rates[0].0,
            rates[0].1,
            rates[1].0,
            rates[1].1
        );
    }
    Ok(())
}
