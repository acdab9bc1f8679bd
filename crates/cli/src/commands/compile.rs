//! `lapidary compile`: the training step, compiled for devices that are not here.

use std::path::PathBuf;

use config::Sources;
use engine::aot::{Compiler, Figures, Outcome as Compiled, Roofline, peak_memory};
use engine::planner::memory_of;
use engine::targets::Machine;
use engine::train::plan::Plan;
use engine::train::step::step_program;
use gemma4::Arch;
use pjrt::plugins::LocateOptions;
use serde_json::{Value, json};

use super::{CommandResult, Failure, Outcome, train};
use crate::ui::{Ui, bytes, seconds};

/// Compile the training step of a configuration for devices that are not here, and say what it takes.
///
/// The program is the one that `train` runs: same mesh, rematerialisation, optimizer. XLA's own compiler for the device says how
/// much memory it needs and which collectives it does; a roofline from published rates bounds the time of a step. Needs the
/// device's plugin (`lapidary plugin fetch tpu`, `cuda13`), no weights and no device. Exit code 1: it does not fit the device.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A configuration file, then keys: [CONFIG.yml] key=value ...
    #[arg(value_name = "CONFIG.yml | KEY=VALUE")]
    words: Vec<String>,
    /// Devices: v5e:4x4, v6e:2x4, v5p:2x2x2 (chips along the sides of a TPU slice), h100:8, a100:8, l4, b200:8, h100:2x8 (hosts
    /// x devices), cpu:8 (virtual devices of this machine).
    #[arg(long, value_name = "TOPOLOGY")]
    topology: String,
    /// Write the compiled program here, as the plugin stores it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the program before it is compiled (StableHLO text) here.
    #[arg(long, value_name = "FILE")]
    stablehlo: Option<PathBuf>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
    /// Never download a plugin [environment LAPIDARY_OFFLINE=1].
    #[arg(long)]
    offline: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary compile --topology v5e:4x4 model_name=gemma4-e2b max_target_length=8192 per_device_batch_size=1 \\
      remat_policy=full scan_layers=true
  lapidary compile --topology h100:8 run.yml --json
  lapidary compile --topology cpu:8 model_name=tiny-e2b ici_fsdp_parallelism=4 ici_tensor_parallelism=2

Times are lower bounds from published peak rates; nothing was run. `lapidary plan` finds the mesh.";

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let machine: Machine = args.topology.parse().map_err(Failure::usage)?;
    // Before anything that starts a thread: plugins read their environment when they are loaded.
    let environment = machine.environment();
    let variables: Vec<(&str, &str)> = environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
    if !pjrt::set_environment(&variables) {
        let list: Vec<String> = environment.iter().map(|(k, v)| format!("{k}={v}")).collect();
        return Err(Failure::run("the environment that the plugin needs cannot be set here")
            .hint(format!("set it before the command: {}", list.join(" "))));
    }
    let sources = Sources::from_args(args.words.iter().cloned()).with_process_environment();
    let config = sources.resolve().map_err(Failure::usage)?;
    for note in config.notes() {
        ui.say(format!("note: {note}"));
    }
    let arch = Arch::from_config(&config).map_err(Failure::usage)?;
    let mesh = config.mesh.resolve(machine.devices(), 1).map_err(Failure::usage)?;
    let plan = Plan::on(&config, arch, &mesh).map_err(train::explain)?;
    let program = step_program(&plan.arch, &plan.layout, &plan.step, &|s| plan.role(s))?;
    let text = program.stablehlo();
    if let Some(path) = &args.stablehlo {
        fs_err::write(path, &text)?;
    }
    let progress = |step: &str| ui.say(step);
    let options = LocateOptions {
        allow_download: !super::is_offline(args.offline),
        // That variable names the plugin of the devices that are here.
        use_environment: machine.target.name == "cpu",
        progress: Some(&progress),
        ..LocateOptions::default()
    };
    let compiler = Compiler::new(machine.clone(), &options)?;
    ui.say(format!("compiling {} of program for {} ({})", bytes(text.len() as u64), machine, compiler.device_kind()));
    let report = match compiler.compile(&text, engine::aot::compile_options(&machine, &plan))? {
        Compiled::Compiled(figures) => Report { args, machine: &machine, plan: &plan, figures: *figures },
        Compiled::OutOfMemory(message) => return does_not_fit(ui, args, &machine, &message),
    };
    if let Some(path) = &args.out {
        match &report.figures.stored {
            Ok(program) => fs_err::write(path, program)?,
            Err(reason) => return Err(Failure::run(format!("the compiled program cannot be stored: {reason}"))),
        }
    }
    if args.json {
        ui.json(&report.json())?;
    } else {
        report.print(ui);
    }
    Ok(if report.fits() { Outcome::Yes } else { Outcome::No })
}

/// The compiler's message, which lists what takes the memory, cut to what a terminal takes.
fn does_not_fit(ui: &Ui, args: &Args, machine: &Machine, message: &str) -> CommandResult {
    let message: String = message.lines().take(24).collect::<Vec<_>>().join("\n");
    if args.json {
        ui.json(&json!({ "topology": machine.to_string(), "devices": machine.devices(), "fits": false, "message": message }))?;
    } else {
        ui.data(format!("does not fit the memory of {machine}:\n{message}"));
        ui.say(format!("`lapidary plan --topology {machine}` with the same keys says which mesh would"));
    }
    Ok(Outcome::No)
}

struct Report<'a> {
    args: &'a Args,
    machine: &'a Machine,
    plan: &'a Plan,
    figures: Figures,
}

impl Report<'_> {
    fn peak(&self) -> u64 {
        peak_memory(&self.figures.memory)
    }

    fn fits(&self) -> bool {
        let limit = self.machine.target.memory;
        limit == 0 || self.peak() <= limit
    }

    fn roofline(&self) -> Option<Roofline> {
        let island = self.machine.devices_per_island();
        // Rings cross between hosts once for all devices of a host.
        let across = if self.machine.devices() > island { 1.0 / island as f64 } else { 0.0 };
        Roofline::new(&self.figures.stats, self.machine.target, self.plan.step.loss.dtype.name(), across)
    }

    /// Model FLOPs utilisation of a step that takes so long.
    fn mfu(&self, seconds: f64) -> Option<f64> {
        let peak = self.machine.target.flops_per_second(self.plan.step.loss.dtype.name())?;
        Some(self.plan.flops.total / (seconds * peak))
    }

    fn json(&self) -> Value {
        let (m, s) = (&self.figures.memory, &self.figures.stats);
        let planned = memory_of(self.plan, self.machine.target.compiler());
        let collectives: serde_json::Map<String, Value> = s
            .collectives
            .iter()
            .map(|(k, c)| (k.name().to_owned(), json!({ "runs": c.runs, "bytes": c.bytes, "sent": c.sent })))
            .collect();
        json!({
            "topology": self.machine.to_string(),
            "devices": self.machine.devices(),
            "fits": self.fits(),
            "compile_seconds": self.figures.time.as_secs_f64(),
            "memory": {
                "arguments": m.arguments, "outputs": m.outputs, "aliased": m.aliased, "temporary": m.temporary,
                "code": m.generated_code, "peak_by_plugin": m.peak, "peak": self.peak(),
                "device": self.machine.target.memory,
            },
            "planned": { "arguments": planned.arguments(), "temporaries": planned.temporaries(), "peak": planned.total() },
            "flops": { "model": self.plan.flops.total, "compiled": s.flops },
            "memory_traffic": s.bytes,
            "collectives": collectives,
            "loops_of_unknown_length": s.unknown_loops,
            "instructions": s.instructions,
            "roofline_seconds": self.roofline(),
            "mfu": self.roofline().map(|r| json!({ "overlapped": self.mfu(r.overlapped), "serial": self.mfu(r.serial) })),
            "out": self.args.out,
        })
    }

    fn print(&self, ui: &Ui) {
        let (m, s) = (&self.figures.memory, &self.figures.stats);
        let size = |n: i64| bytes(n.max(0) as u64);
        let limit = match self.machine.target.memory {
            0 => String::new(),
            n => format!(" of {}{}", bytes(n), if self.fits() { "" } else { ": does not fit" }),
        };
        ui.data(format!(
            "{}: compiled in {}, {} instructions",
            self.machine,
            seconds(self.figures.time),
            s.instructions
        ));
        ui.data(format!("peak memory  {}{limit} a device", bytes(self.peak())));
        ui.data(format!(
            "             arguments {}, results beside them {}, temporaries {}, code {}",
            size(m.arguments),
            size(m.outputs - m.aliased),
            size(m.temporary),
            size(m.generated_code)
        ));
        let planned = memory_of(self.plan, self.machine.target.compiler());
        let off = 100.0 * (planned.total() as f64 / self.peak().max(1) as f64 - 1.0);
        ui.data(format!(
            "planned      {} ({off:+.1} %): arguments {}, temporaries {}",
            bytes(planned.total()),
            bytes(planned.arguments()),
            bytes(planned.temporaries())
        ));
        ui.data(format!(
            "work         {:.3} TFLOP in products, {:.3} TFLOP of the model, {} through memory",
            s.flops / 1e12,
            self.plan.flops.total / 1e12,
            bytes(s.bytes as u64)
        ));
        if s.unknown_loops > 0 {
            ui.data(format!("             {} loops do not tell their length and are counted once", s.unknown_loops));
        }
        for (kind, c) in &s.collectives {
            ui.data(format!(
                "{:<18} {:>6} times, {} in all, {} sent by each device",
                kind.name(),
                c.runs,
                bytes(c.bytes as u64),
                bytes(c.sent as u64)
            ));
        }
        if let Some(r) = self.roofline() {
            let percent = |t: f64| self.mfu(t).map_or(String::new(), |m| format!(" (MFU {:.1} %)", 100.0 * m));
            ui.data(format!(
                "at least     {:.4} s a step{} if all overlaps, {:.4} s{} if nothing does",
                r.overlapped,
                percent(r.overlapped),
                r.serial,
                percent(r.serial)
            ));
            ui.data(format!(
                "             products {:.4} s, memory {:.4} s, collectives {:.4} s at published peak rates; not run",
                r.compute, r.memory, r.collectives
            ));
        }
    }
}
