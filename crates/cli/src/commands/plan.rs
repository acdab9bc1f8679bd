//! `lapidary plan`: which mesh a training step fits on, from the configuration alone.

use config::Sources;
use engine::planner::{Candidate, Figures, candidates, rank};
use engine::targets::Machine;
use gemma4::Arch;
use serde_json::{Value, json};

use super::{CommandResult, Failure, Outcome, train};
use crate::ui::{Ui, bytes};

/// Bytes a device and bytes over the links of a training step, for every mesh of a number of devices; recommends one.
///
/// Computed from the configuration alone: no device, no plugin, no weights. `lapidary compile` asks the compiler, whose figures
/// these follow. Exit code 1: no mesh fits the memory.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A configuration file, then keys: [CONFIG.yml] key=value ...
    #[arg(value_name = "CONFIG.yml | KEY=VALUE")]
    words: Vec<String>,
    /// Number of devices.
    #[arg(long, value_name = "N", required_unless_present = "topology", conflicts_with = "topology")]
    devices: Option<usize>,
    /// Devices as `lapidary compile` takes them: v5e:4x4, h100:8, h100:2x8, ...
    #[arg(long, value_name = "TOPOLOGY")]
    topology: Option<String>,
    /// Memory of a device in GiB [default: of the topology's devices].
    #[arg(long, value_name = "GIB")]
    memory: Option<f64>,
    /// Show every mesh, not the first ten.
    #[arg(long)]
    all: bool,
    /// Print every mesh as JSON, the recommended one first.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary plan --topology v5e:4x4 model_name=gemma4-e2b max_target_length=8192 per_device_batch_size=1 \\
      remat_policy=full
  lapidary plan --topology h100:8 run.yml --all
  lapidary plan --devices 8 --memory 24 model_name=gemma4-e2b --json

Keys of parallelism (ici_*) are left out of account: all meshes are tried.";

/// More meshes than this say nothing to a person.
const SHOWN: usize = 10;
/// No machine has more.
const MOST_DEVICES: usize = 1 << 16;

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let machine: Option<Machine> = args.topology.as_deref().map(str::parse).transpose().map_err(Failure::usage)?;
    let devices = machine.as_ref().map_or(args.devices.unwrap_or(1), Machine::devices);
    if devices == 0 || devices > MOST_DEVICES {
        return Err(Failure::usage(format!("--devices {devices}: must be from 1 to {MOST_DEVICES}")));
    }
    let limit = match args.memory {
        Some(gib) if gib.is_finite() && gib > 0.0 => Some((gib * f64::from(1 << 30)) as u64),
        Some(gib) => return Err(Failure::usage(format!("--memory {gib}: must be a positive number of GiB"))),
        None => machine.as_ref().map(|m| m.target.memory).filter(|&m| m > 0),
    };
    let sources = Sources::from_args(args.words.iter().cloned()).with_process_environment();
    let config = sources.resolve().map_err(Failure::usage)?;
    let arch = Arch::from_config(&config).map_err(Failure::usage)?;
    let mut all = candidates(&config, &arch, devices, machine.as_ref()).map_err(train::explain)?;
    rank(&mut all, limit);
    let fits = |c: &Candidate| c.figures.as_ref().is_ok_and(|f| limit.is_none_or(|l| f.memory.total() <= l));
    let best = all.first().filter(|c| fits(c));
    if args.json {
        let list: Vec<Value> = all.iter().map(|c| entry(c, fits(c))).collect();
        let recommended = best.map(keys);
        ui.json(&json!({ "devices": devices, "memory": limit, "recommended": recommended, "meshes": list }))?;
        return Ok(if best.is_some() { Outcome::Yes } else { Outcome::No });
    }
    print(ui, args, &all, limit);
    match best {
        Some(c) => {
            let keys = keys(c);
            ui.say(format!("recommended: {}", if keys.is_empty() { "one device".to_owned() } else { keys }));
            Ok(Outcome::Yes)
        }
        None => {
            ui.say("no mesh fits: more devices, a shorter max_target_length, a smaller per_device_batch_size, or remat_policy=full");
            Ok(Outcome::No)
        }
    }
}

fn name(c: &Candidate) -> String {
    let parts: Vec<String> = c.mesh.iter().map(|(axis, n)| format!("{axis} {n}")).collect();
    if parts.is_empty() { "one device".to_owned() } else { parts.join(" x ") }
}

/// The mesh as keys of a configuration.
fn keys(c: &Candidate) -> String {
    let mut words: Vec<String> = c.mesh.iter().map(|(axis, n)| format!("ici_{axis}_parallelism={n}")).collect();
    // That axis takes what is left unless it is told otherwise.
    if !c.mesh.is_empty() && c.mesh.iter().all(|(axis, _)| *axis != "fsdp") {
        words.push("ici_fsdp_parallelism=1".to_owned());
    }
    words.join(" ")
}

fn entry(c: &Candidate, fits: bool) -> Value {
    let mesh: serde_json::Map<String, Value> = c.mesh.iter().map(|(a, n)| ((*a).to_owned(), json!(n))).collect();
    match &c.figures {
        Err(reason) => json!({ "mesh": mesh, "fits": false, "reason": reason }),
        Ok(f) => {
            let m = &f.memory;
            json!({
                "mesh": mesh, "keys": keys(c), "fits": fits,
                "bytes": {
                    "parameters": m.parameters, "optimizer": m.optimizer, "batch": m.batch, "gradients": m.gradients,
                    "table_gradients": m.tables, "rounded_weights": m.rounded, "kept_activations": m.kept,
                    "layer": m.layer, "logits": m.head, "head_table": m.head_table, "per_layer_inputs": m.per_layer,
                    "tables_in_tiles": m.relaid + m.early,
                    "arguments": m.arguments(), "temporaries": m.temporaries(), "total": m.total(),
                },
                "sent": f.traffic, "sent_total": f.traffic.total(),
                "seconds": { "products": f.compute, "collectives": f.collectives, "at_least": f.seconds() },
            })
        }
    }
}

fn print(ui: &Ui, args: &Args, all: &[Candidate], limit: Option<u64>) {
    let possible: Vec<(&Candidate, &Figures)> =
        all.iter().filter_map(|c| c.figures.as_ref().ok().map(|f| (c, f))).collect();
    let shown = if args.all { possible.len() } else { possible.len().min(SHOWN) };
    let width = possible[..shown].iter().map(|(c, _)| name(c).len()).max().unwrap_or(0).max(4);
    ui.data(format!(
        "{:width$}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>8}",
        "mesh", "weights", "optimizer", "gradients", "temporary", "total", "sent", "at least"
    ));
    for (c, f) in &possible[..shown] {
        let m = &f.memory;
        let mark = if limit.is_some_and(|l| m.total() > l) { "  does not fit" } else { "" };
        ui.data(format!(
            "{:width$}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>8}{mark}",
            name(c),
            bytes(m.parameters),
            bytes(m.optimizer),
            bytes(m.gradients + m.tables),
            bytes(m.temporaries()),
            bytes(m.total()),
            bytes(f.traffic.total() as u64),
            f.seconds().map_or_else(|| "-".to_owned(), |s| format!("{s:.3} s")),
        ));
    }
    if shown < possible.len() {
        ui.say(format!("{} more with --all", possible.len() - shown));
    }
    let refused = all.len() - possible.len();
    if refused > 0 {
        ui.say(format!("{refused} meshes do not divide the model or the batch (--json tells why)"));
    }
    if let Some(limit) = limit {
        ui.say(format!("memory of a device: {}", bytes(limit)));
    }
}
