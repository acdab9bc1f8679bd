//! `lapidary train`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use config::{Filter, Hardware, Sources};
use engine::hosts::peers::Peers;
use engine::hosts::{Control, HostFlags, Identity, Origin};
use engine::train::{End, Event, TrainError, TrainOptions, TrainReport, train};
use pjrt::{CollectiveKind, CollectiveTotal, HloStats};
use serde_json::json;

use super::{CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, bytes, seconds};

/// Train a model: from random weights or from a checkpoint, on text or synthetic batches.
///
/// Every key of MaxText's configuration that applies is accepted as `key=value`, in a YAML file, or as an environment variable
/// `M_KEY`; `lapidary config explain KEY` tells what it does. A run lives in `base_output_directory/run_name`: checkpoints (each
/// a Hugging Face model directory), metrics, TensorBoard files and the final configuration. Started again under the same
/// run_name it goes on from its last checkpoint, bit for bit. Ctrl-C saves and ends.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A configuration file, then keys: [CONFIG.yml] key=value ...
    #[arg(value_name = "CONFIG.yml | KEY=VALUE")]
    words: Vec<String>,
    /// Train on the token batches of a safetensors file (tensor `batches`, [steps, rows, tokens]) instead of a data set: for
    /// comparing losses with another system step by step.
    #[arg(long, value_name = "FILE")]
    batches: Option<PathBuf>,
    /// Print what the run came to as JSON on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hosts: HostArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Which of several processes this is, where no launcher tells.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Several processes")]
struct HostArgs {
    /// This process, counted from 0 [default: from LAPIDARY_*, Open MPI, JobSet, NODE_RANK or SLURM variables].
    #[arg(long, value_name = "N")]
    process_id: Option<usize>,
    /// How many processes there are.
    #[arg(long, value_name = "N")]
    num_processes: Option<usize>,
    /// Where process 0 is reached by the others.
    #[arg(long, value_name = "HOST[:PORT]")]
    coordinator: Option<String>,
}

impl HostArgs {
    fn flags(&self) -> HostFlags {
        HostFlags { process: self.process_id, count: self.num_processes, coordinator: self.coordinator.clone() }
    }
}

const EXAMPLES: &str = "\
Examples:
  lapidary train model_name=tiny-e2b steps=20 max_target_length=128 per_device_batch_size=4
  lapidary train run_name=mine load_parameters_path=./gemma-4-E2B dataset_type=hf hf_path=text hf_train_files='data/*.txt' \\
      trainable_parameters_mask='[\"layers.3[0-4].\"]' steps=1000
  lapidary report lapidary_output/mine --out mine.html";

/// The flag that a signal sets.
fn on_interrupt() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    // A second signal ends the process at once: the first one armed this.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let sources = Sources::from_args(args.words.iter().cloned()).with_process_environment();
    let config = sources.resolve().map_err(Failure::usage)?;
    for note in config.notes() {
        ui.say(format!("note: {note}"));
    }
    let stop = on_interrupt()?;
    let others = others(ui, args, config.mesh.hardware)?;
    let peers = others.as_ref().map(Others::peers);
    // One of several processes speaks for all.
    let quiet = Ui::new(true);
    let ui = if peers.is_some_and(|p| p.rank() > 0) { &quiet } else { ui };
    if let Some(p) = peers {
        ui.say(format!("{} processes share every batch", p.count()));
    }
    let control = others.as_ref().and_then(Others::control);
    let runtime = args.engine.start_on(ui, config.mesh.hardware, config.mesh.cpu_devices(), control)?;
    let settings = config.raw().show(Filter::Set);
    let config_text: String = settings.iter().map(|s| format!("{}: {}\n", s.key, s.value)).collect();
    let options =
        TrainOptions { stop: Some(&stop), batches: args.batches.clone(), config_text: Some(config_text), peers };
    let mut stopping = false;
    let bar = ui.steps_bar(config.run.steps as u64);
    // Lines go above the bar.
    let say = |line: &str| bar.suspend(|| ui.say(line));
    let mut tell = |event: Event<'_>| {
        if stop.load(Ordering::Relaxed) && !stopping {
            stopping = true;
            say("stopping after this step; once more to end at once");
        }
        match event {
            Event::Status(what) => say(what),
            Event::Summary(text) => say(text),
            Event::Resumed { step, path } => {
                bar.set_position(step);
                // Time left is that of the steps of this process.
                bar.reset_eta();
                say(&format!("goes on after step {step}, from {}", path.display()));
            }
            Event::Compiled(c) => {
                let memory = c.memory.map(|m| format!(", {} for temporaries", bytes(m.temporary as u64)));
                let how = if c.cached { "loaded from the cache" } else { "compiled" };
                say(&format!("{how} in {}{}", seconds(c.time), memory.unwrap_or_default()));
                for line in c.shared.iter().flat_map(collectives) {
                    say(&line);
                }
            }
            Event::Step(m) => {
                say(&m.line());
                bar.set_message(format!("loss {:.3}", m.loss));
                bar.set_position(m.step + 1);
            }
            Event::EvalStep { line } => say(line),
            Event::Eval(e) => say(&e.line()),
            Event::Saved { step, path, paused } => {
                say(&format!("checkpoint after {step} steps: {} (paused {})", path.display(), seconds(paused)));
            }
            _ => {}
        }
    };
    let report = train(&runtime, &config, options, &mut tell);
    bar.finish_and_clear();
    let report = report.map_err(explain)?;
    say_end(ui, args, &report)
}

/// What devices say to each other in a step, a line a kind.
fn collectives(stats: &HloStats) -> Vec<String> {
    let line = |(kind, c): (&CollectiveKind, &CollectiveTotal)| {
        format!("  {kind}: {} a step, each device sends {}", c.runs, bytes(c.sent as u64))
    };
    let mut lines: Vec<String> = stats.collectives.iter().map(line).collect();
    if stats.unknown_loops > 0 {
        lines.push(format!(
            "  bodies of {} loops are counted once: they do not tell how often they run",
            stats.unknown_loops
        ));
    }
    lines
}

/// The other processes of the job.
enum Others {
    /// Each has a model, and they sum gradients.
    #[cfg(feature = "mpi")]
    Mpi(engine::hosts::peers::Mpi),
    /// The devices of all are one mesh.
    Mesh(Control),
}

impl Others {
    fn peers(&self) -> &dyn Peers {
        match self {
            #[cfg(feature = "mpi")]
            Others::Mpi(mpi) => mpi,
            Others::Mesh(control) => control,
        }
    }

    #[cfg_attr(not(feature = "mpi"), allow(clippy::unnecessary_wraps))]
    fn control(&self) -> Option<&Control> {
        match self {
            #[cfg(feature = "mpi")]
            Others::Mpi(_) => None,
            Others::Mesh(control) => Some(control),
        }
    }
}

/// What processes prove to each other that they belong together with.
const TOKEN: &str = "LAPIDARY_TOKEN";

/// Finds the other processes of the job, if there are any, and waits for them.
fn others(ui: &Ui, args: &Args, hardware: Hardware) -> Result<Option<Others>, Failure> {
    let found = Identity::find(&args.hosts.flags(), &|name| std::env::var(name).ok()).map_err(Failure::usage)?;
    let Some(identity) = found else { return Ok(None) };
    if identity.origin == Origin::Mpi {
        #[cfg(feature = "mpi")]
        return Ok(Some(Others::Mpi(engine::hosts::peers::Mpi::start()?)));
        #[cfg(not(feature = "mpi"))]
        return Err(Failure::usage("mpirun started several processes, and this build has no MPI")
            .hint("cargo install --path crates/cli --features mpi, with Open MPI's headers and libclang installed"));
    }
    if args.engine.platform(hardware) == "cpu" {
        return Err(Failure::usage(format!(
            "{} say that this is process {} of {}; on CPUs, training over several processes runs under mpirun",
            identity.origin, identity.process, identity.count
        ))
        .hint("docs/guide/hosts.md tells what is offered; unset the variables to train alone"));
    }
    let token = std::env::var(TOKEN).ok().filter(|t| !t.is_empty()).ok_or_else(|| {
        Failure::usage(format!("{TOKEN} is not set: the processes of a run know each other by it"))
            .hint(format!("set {TOKEN} to the same secret on all hosts, such as the output of `openssl rand -hex 16`"))
    })?;
    ui.say(format!("waiting for {} processes", identity.count));
    Ok(Some(Others::Mesh(Control::start(&identity, token.as_bytes())?)))
}

fn say_end(ui: &Ui, args: &Args, report: &TrainReport) -> CommandResult {
    let how = match report.end {
        End::Steps => "all steps done",
        End::Stopped => "stopped as asked",
        End::Target => "target_eval_loss reached",
    };
    ui.say(format!("{how}: {} steps; {}", report.step, report.run_dir.display()));
    if report.data.bad_documents > 0 {
        ui.say(format!("{} documents could not be used", report.data.bad_documents));
        for bad in &report.data.first_bad {
            ui.say(format!("  {bad}"));
        }
    }
    if args.json {
        ui.json(&json!({
            "end": format!("{:?}", report.end).to_lowercase(), "steps": report.step, "run": report.run_dir,
            "checkpoint": report.checkpoint, "last": report.last, "data": report.data,
        }))?;
    }
    Ok(Outcome::Yes)
}

/// The error as a person wants it: configuration is usage.
pub(super) fn explain(e: TrainError) -> Failure {
    match e {
        TrainError::Key { key, .. } => {
            Failure::usage(&e).hint(format!("`lapidary config explain {key}` tells what it does"))
        }
        TrainError::Config(_) | TrainError::Arch(_) | TrainError::OtherModel { .. } => Failure::usage(&e),
        TrainError::BadLoss { .. } => {
            Failure::run(&e).hint("lower learning_rate, or look at the batch; checkpoints up to here are kept")
        }
        other => other.into(),
    }
}
