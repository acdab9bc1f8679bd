//! Measures large matrix products on the CPU plugin under different compile options:
//! `cargo run --release -p lapidary-pjrt --example products [M K N]`.
//!
//! `wall` is what was seen; `cpu` divides by half the processor time used, which is what two idle cores would give.

#![allow(clippy::print_stdout, unsafe_code)]

mod support;

use std::time::Instant;

use lapidary_pjrt::plugins::LocateOptions;
use lapidary_pjrt::{Buffer, Client, ClientOptions, CompileOptions, Plugin, tune_allocator};
use tensor::{DType, HostArray};

use support::processor_seconds;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tune_allocator();
    let sizes: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let [m, k, n] = sizes.try_into().unwrap_or([512, 1536, 6144]);
    let plugin = Plugin::load(Plugin::locate("cpu", &LocateOptions::default())?)?;
    let client = Client::new(&plugin, &ClientOptions::cpu(1))?;
    let d = CompileOptions::default;
    let variants = [
        ("plugin's defaults", d()),
        ("exact rounding", d().with("xla_allow_excess_precision", false)),
        ("oneDNN", d().with("xla_cpu_use_onednn", true).with("xla_cpu_experimental_onednn_custom_call", true)),
        ("verify_f32()", CompileOptions::verify_f32()),
        ("bf16()", CompileOptions::bf16()),
    ];
    println!("{m} x {k} x {n}; GFLOP/s as wall / cpu");
    for (input, output) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16)] {
        for (layout, lhs, rhs, dims) in [
            ("[m,k][k,n]", [m, k], [k, n], "[1] x [0]"),
            ("[m,k][n,k]", [m, k], [n, k], "[1] x [1]"),
            ("[k,m][k,n]", [k, m], [k, n], "[0] x [0]"),
        ] {
            let t = |s: [usize; 2], d: DType| format!("tensor<{}x{}x{}>", s[0], s[1], d.mlir_name());
            let (a, b, r) = (t(lhs, input), t(rhs, input), t([m, n], output));
            let program = format!(
                "func.func @main(%x: {a}, %w: {b}) -> {r} {{
                   %r = stablehlo.dot_general %x, %w, contracting_dims = {dims} : ({a}, {b}) -> {r}
                   return %r : {r}
                 }}"
            );
            let fill = |s: [usize; 2]| -> Result<Buffer, Box<dyn std::error::Error>> {
                let values: Vec<f64> = (0..s[0] * s[1]).map(|i| ((i * 7919) % 255) as f64 / 127.0 - 1.0).collect();
                Ok(client.buffer_from_host(&HostArray::from_f64(input, s, &values)?, 0)?)
            };
            let (x, w) = (fill(lhs)?, fill(rhs)?);
            for (name, options) in &variants {
                let dot = client.compile(&program, options)?;
                dot.execute(&[&x, &w])?[0].wait()?;
                let (mut best, cpu, runs) = (f64::MAX, processor_seconds(), 8);
                for _ in 0..runs {
                    let start = Instant::now();
                    dot.execute(&[&x, &w])?[0].wait()?;
                    best = best.min(start.elapsed().as_secs_f64());
                }
                let flops = 2.0 * m as f64 * k as f64 * n as f64 * 1e-9;
                let cpu = (processor_seconds() - cpu) / f64::from(runs) / 2.0;
                let pair = format!("{}->{}", input.mlir_name(), output.mlir_name());
                println!("{pair:12} {layout:12} {name:20} {:6.0} / {:6.0}", flops / best, flops / cpu);
            }
        }
    }
    Ok(())
}
