//! Compiles and times one StableHLO program on the CPU plugin, with arguments drawn at random:
//! `cargo run --release -p lapidary-pjrt --example time_program FILE.mlir [flag=value ...]`.
//!
//! `wall` is the best of five runs, `cpu` half the processor time of a run: what two idle cores would give.

#![allow(clippy::print_stdout, unsafe_code)]

mod support;

use std::time::Instant;

use lapidary_pjrt::plugins::LocateOptions;
use lapidary_pjrt::{Buffer, Client, ClientOptions, CompileOptions, OptionValue, Plugin, tune_allocator};
use tensor::{DType, HostArray};

use support::processor_seconds;

lapidary_pjrt::export_allocator!();

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tune_allocator();
    let mut arguments = std::env::args().skip(1);
    let text = std::fs::read_to_string(arguments.next().ok_or("which program?")?)?;
    let mut options = CompileOptions::default();
    for flag in arguments {
        let (name, value) = flag.split_once('=').ok_or("flags are name=value")?;
        let value = match value {
            "true" => OptionValue::Bool(true),
            "false" => OptionValue::Bool(false),
            v => v.parse().map_or_else(|_| OptionValue::String(v.to_owned()), OptionValue::Int),
        };
        options = options.with(name, value);
    }
    let plugin = Plugin::load(Plugin::locate("cpu", &LocateOptions::default())?)?;
    let client = Client::new(&plugin, &ClientOptions::cpu(1))?;
    let start = Instant::now();
    let program = client.compile(&text, &options)?;
    println!("compile {:.2} s, {:?}", start.elapsed().as_secs_f64(), program.memory()?);
    let inputs: Vec<Buffer> = program
        .signature()
        .inputs
        .iter()
        .map(|i| {
            let n: usize = i.shape.iter().product();
            let values: Vec<f64> = match i.dtype {
                DType::I32 => (0..n).map(|i| (i % 7) as f64).collect(),
                _ => (0..n).map(|i| ((i * 7919) % 255) as f64 / 1270.0 - 0.1).collect(),
            };
            Ok(client.buffer_from_host(&HostArray::from_f64(i.dtype, i.shape.clone(), &values)?, 0)?)
        })
        .collect::<Result<_, Box<dyn std::error::Error>>>()?;
    let mut inputs = inputs;
    let mut run = || -> Result<(), Box<dyn std::error::Error>> {
        let refs: Vec<&Buffer> = inputs.iter().collect();
        let mut results = program.execute(&refs)?;
        for b in &results {
            b.wait()?;
        }
        // Donated arguments are gone; results of their type, in order, take their places.
        for &i in &program.signature().donated {
            let input = &program.signature().inputs[i];
            let twin = results.iter().position(|b| b.dtype() == input.dtype && *b.shape() == input.shape);
            inputs[i] = results.remove(twin.ok_or("no result takes a donated argument's place")?);
        }
        Ok(())
    };
    run()?;
    let (mut best, cpu, runs) = (f64::MAX, processor_seconds(), 5);
    for _ in 0..runs {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("wall {:.4} s, cpu/2 {:.4} s", best, (processor_seconds() - cpu) / f64::from(runs) / 2.0);
    Ok(())
}
