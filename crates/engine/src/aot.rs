//! Programs compiled for machines one does not have, and what can be read off them.

use std::time::{Duration, Instant};

use pjrt::plugins::{LocateOptions, locate, locate_tools};
use pjrt::{
    Client, ClientOptions, Code, CompileOptions, Executable, HloStats, MemoryFigures, PjrtError, Plugin, Topology,
};
use serde::Serialize;

use crate::targets::{Machine, Target};
use crate::train::plan::Plan;
use crate::{EngineError, Result};

/// A compiler for a [`Machine`].
#[derive(Debug)]
pub struct Compiler {
    machine: Machine,
    backend: Backend,
    cuda: Option<String>,
}

#[derive(Debug)]
enum Backend {
    /// Virtual devices that are there.
    Cpu(Client),
    Absent(Topology),
}

/// A compiled program's figures, all for one device.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Time to compile.
    pub time: Duration,
    /// Bytes of memory by use.
    pub memory: MemoryFigures,
    /// Operations, traffic, collectives.
    pub stats: HloStats,
    /// The program, as the plugin stores it. Where it cannot: why not.
    pub stored: std::result::Result<Vec<u8>, String>,
}

/// What became of a program.
#[derive(Debug)]
pub enum Outcome {
    /// It was compiled.
    Compiled(Box<Figures>),
    /// The compiler found no way to run it in the memory there is; its message.
    OutOfMemory(String),
}

impl Compiler {
    /// Loads the plugin (fetching it if it is not there) and describes the machine to it.
    ///
    /// TPU plugins read the environment when they are loaded: see [`Machine::environment`].
    ///
    /// # Errors
    /// When the plugin is missing, cannot be loaded, or does not know the machine.
    pub fn new(machine: Machine, options: &LocateOptions<'_>) -> Result<Self> {
        let located = locate(machine.target.platform, options)?;
        let tools = locate_tools(machine.target.platform, options)?;
        let plugin = Plugin::load(&located.path)?;
        let backend = match machine.description() {
            None => Backend::Cpu(Client::new(&plugin, &ClientOptions::cpu(machine.devices()))?),
            Some((name, options)) => Backend::Absent(Topology::new(&plugin, &name, &options)?),
        };
        if let Backend::Absent(topology) = &backend
            && topology.devices().len() != machine.devices()
        {
            let got = topology.devices().len();
            return Err(EngineError::Input(format!("the plugin sees {got} devices in {machine}")));
        }
        Ok(Compiler { machine, backend, cuda: tools.map(|t| t.display().to_string()) })
    }

    /// The runtime's name for the devices.
    #[must_use]
    pub fn device_kind(&self) -> &str {
        match &self.backend {
            Backend::Cpu(client) => client.devices().first().map_or("", |d| &d.kind),
            Backend::Absent(topology) => topology.devices().first().map_or("", |d| &d.kind),
        }
    }

    /// Options that the platform needs, on top of `options`.
    fn options(&self, mut options: CompileOptions) -> CompileOptions {
        if let Some(cuda) = &self.cuda {
            options = options.with("xla_gpu_cuda_data_dir", cuda.as_str());
        }
        options
    }

    /// Compiles a program, partitioned over all devices of the machine.
    ///
    /// # Errors
    /// When the plugin refuses it for another reason than memory, or its answer cannot be read.
    pub fn compile(&self, program: &str, options: CompileOptions) -> Result<Outcome> {
        let options = self.options(options.partitioned(self.machine.devices()));
        let start = Instant::now();
        let (time, memory, optimized, stored) = match &self.backend {
            Backend::Cpu(client) => {
                let e: Executable = match client.compile(program, &options) {
                    Ok(e) => e,
                    Err(e) => return out_of_memory(e),
                };
                let stored = match options.is_serializable() {
                    true => e.serialize().map_err(|e| e.to_string()),
                    false => Err("programs that call oneDNN cannot be stored".to_owned()),
                };
                (start.elapsed(), e.memory()?, e.optimized_program()?, stored)
            }
            Backend::Absent(topology) => {
                let e = match topology.compile(program, &options) {
                    Ok(e) => e,
                    Err(e) => return out_of_memory(e),
                };
                let time = start.elapsed();
                (time, e.memory()?, e.optimized_program()?, e.serialize().map_err(|e| e.to_string()))
            }
        };
        let stats = HloStats::read(&optimized).map_err(EngineError::Input)?;
        Ok(Outcome::Compiled(Box::new(Figures { time, memory, stats, stored })))
    }
}

fn out_of_memory(error: PjrtError) -> Result<Outcome> {
    match error {
        PjrtError::Plugin { code: Code::ResourceExhausted, message, .. } => Ok(Outcome::OutOfMemory(message)),
        other => Err(other.into()),
    }
}

/// Options of the step's program: those of a CPU on a CPU, none elsewhere.
#[must_use]
pub fn compile_options(machine: &Machine, plan: &Plan) -> CompileOptions {
    match machine.target.platform {
        "cpu" => crate::train::device::compile_options(plan),
        _ => CompileOptions::default(),
    }
}

/// Bytes that lie on a device while a program runs: arguments, results that do not take an argument's place, scratch.
#[must_use]
pub fn peak_memory(m: &MemoryFigures) -> u64 {
    u64::try_from(m.arguments + m.outputs - m.aliased + m.temporary).unwrap_or(0)
}

/// How long a step takes at least, by the rates of a device. Real steps take longer: no program keeps every unit busy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Roofline {
    /// Seconds of products at peak.
    pub compute: f64,
    /// Seconds of memory traffic at peak.
    pub memory: f64,
    /// Seconds of collectives over the links, nothing else running.
    pub collectives: f64,
    /// The largest of the three: all of them overlap.
    pub overlapped: f64,
    /// Their sum: nothing overlaps.
    pub serial: f64,
}

impl Roofline {
    /// Of a program's figures on a target, whose table must have a rate for `dtype`. `across` is the share of collective bytes
    /// that leave the island of fast links.
    #[must_use]
    pub fn new(stats: &HloStats, target: &Target, dtype: &str, across: f64) -> Option<Roofline> {
        let compute = stats.flops / target.flops_per_second(dtype)?;
        let memory = stats.bytes / target.bandwidth;
        let sent = stats.sent();
        let collectives = (sent * (1.0 - across) / target.link).max(sent * across / target.network);
        Some(Roofline {
            compute,
            memory,
            collectives,
            overlapped: compute.max(memory).max(collectives),
            serial: compute + memory + collectives,
        })
    }
}

#[cfg(test)]
mod tests {
    use pjrt::{CollectiveKind, CollectiveTotal};

    use super::*;

    #[test]
    fn the_slowest_part_bounds_a_step() {
        let machine: Machine = "v5e:2x2".parse().unwrap();
        let mut stats = HloStats { flops: 197e12, bytes: 819e9 / 2.0, ..HloStats::default() };
        let kind = CollectiveKind::AllReduce;
        stats.collectives.insert(kind, CollectiveTotal { runs: 1.0, bytes: 400e9, sent: 800e9 });
        let r = Roofline::new(&stats, machine.target, "bfloat16", 0.0).unwrap();
        assert_eq!((r.compute, r.memory, r.collectives), (1.0, 0.5, 4.0));
        assert_eq!((r.overlapped, r.serial), (4.0, 5.5));
        assert!(Roofline::new(&stats, machine.target, "float32", 0.0).is_none());
    }

    #[test]
    fn a_program_is_compiled_for_virtual_devices() {
        let compiler = Compiler::new("cpu:2".parse().unwrap(), &LocateOptions::default()).unwrap();
        let program = r#"
module @m attributes {mhlo.num_partitions = 2 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @mesh = <["x"=2]>
  func.func public @main(%a: tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"x"}, {}]>})
      -> (tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>}) {
    %c = stablehlo.add %a, %a : tensor<8x16xf32>
    return %c : tensor<8x16xf32>
  }
}"#;
        let Outcome::Compiled(figures) = compiler.compile(program, CompileOptions::default()).unwrap() else {
            panic!()
        };
        assert_eq!(figures.memory.arguments, 4 * 8 * 8);
        assert_eq!(figures.stats.collectives[&CollectiveKind::AllGather].bytes, 512.0);
        assert!(peak_memory(&figures.memory) >= 3 * 256 && figures.stored.is_ok());
        assert!(compiler.compile("no program", CompileOptions::default()).is_err());
    }
}
