//! One module for each command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod compile;
pub(crate) mod config;
pub(crate) mod convert;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod flops;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod plan;
pub(crate) mod plugin;
pub(crate) mod quantize;
pub(crate) mod quickstart;
pub(crate) mod report;
pub(crate) mod score;
pub(crate) mod train;
pub(crate) mod verify;

use std::fmt;
use std::path::{Path, PathBuf};

use ::config::{Hardware, Mesh, Sources};
use engine::convert::{Checkpoint, Convention, Hints, Weights};
use engine::hosts::Control;
use engine::{EngineError, Model, Runtime, RuntimeOptions};

use crate::ui::Ui;

/// What a command that ran to its end has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Done, and true.
    Yes,
    /// Ran, and the answer is no.
    No,
}

/// Why a command did not run to its end.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Whether usage or configuration is to blame.
    usage: bool,
    message: String,
    hints: Vec<String>,
}

impl Failure {
    /// Bad usage or configuration.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Failure { usage: true, message: message.to_string(), hints: Vec::new() }
    }

    /// Something failed while running.
    pub(crate) fn run(message: impl fmt::Display) -> Self {
        Failure { usage: false, message: message.to_string(), hints: Vec::new() }
    }

    /// The same, with advice.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    pub(crate) fn exit_code(&self) -> u8 {
        if self.usage { 2 } else { 1 }
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn hints(&self) -> &[String] {
        &self.hints
    }
}

impl<E: std::error::Error> From<E> for Failure {
    /// Any error met while running, with its sources.
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(s) = source {
            let text = s.to_string();
            // Many errors already tell their source.
            if !message.contains(&text) {
                message += ": ";
                message += &text;
            }
            source = s.source();
        }
        Failure::run(message)
    }
}

/// What a command gives back.
pub(crate) type CommandResult = Result<Outcome, Failure>;

/// Options of every command that runs programs.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct EngineArgs {
    /// Kind of device: cpu, cuda, rocm, tpu [default: cpu; the key `hardware` for train]. Only cpu has been run by the makers of
    /// this version.
    #[arg(long, value_name = "KIND", help_heading = "Engine")]
    device: Option<String>,
    /// The PJRT plugin's file [default: found or fetched; environment LAPIDARY_PJRT_PLUGIN].
    #[arg(long, value_name = "FILE", help_heading = "Engine")]
    plugin: Option<PathBuf>,
    /// Compile every program anew instead of looking into the cache.
    #[arg(long, help_heading = "Engine")]
    no_cache: bool,
    /// Never download the plugin [environment LAPIDARY_OFFLINE=1].
    #[arg(long, help_heading = "Engine")]
    offline: bool,
}

impl EngineArgs {
    /// Starts the engine, and says so where it takes time.
    pub(crate) fn start(&self, ui: &Ui) -> Result<Runtime, Failure> {
        self.start_on(ui, Hardware::Auto, 1, None)
    }

    /// The kind of device: the flag's, else that of a configuration.
    pub(crate) fn platform(&self, hardware: Hardware) -> &str {
        let named = match hardware {
            Hardware::Gpu => "cuda",
            Hardware::Tpu => "tpu",
            _ => "cpu",
        };
        self.device.as_deref().unwrap_or(named)
    }

    /// The same on hardware that a configuration names, if the flag names none, with this many virtual devices if it is a CPU, and
    /// with the devices of other processes.
    pub(crate) fn start_on(
        &self,
        ui: &Ui,
        hardware: Hardware,
        cpu_devices: usize,
        processes: Option<&Control>,
    ) -> Result<Runtime, Failure> {
        let progress = |step: &str| ui.say(step);
        Ok(Runtime::start(&RuntimeOptions {
            platform: self.platform(hardware),
            plugin: self.plugin.clone(),
            offline: is_offline(self.offline),
            no_cache: self.no_cache,
            cpu_devices,
            processes,
            progress: Some(&progress),
        })?)
    }
}

/// What tells the architecture of a MaxText checkpoint that does not tell it itself.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct ArchArgs {
    /// The architecture of a MaxText checkpoint that does not tell it, in MaxText's keys: model_name=gemma4-e2b ...
    #[arg(value_name = "KEY=VALUE")]
    words: Vec<String>,
    /// The same, from this config.json.
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    config: Option<PathBuf>,
}

impl ArchArgs {
    /// Whether any word says something of the model's shape.
    fn tells_a_model(&self) -> bool {
        Sources::from_args(self.words.iter().cloned()).with_process_environment().load().tells_a_model()
    }

    /// The devices that the words ask for.
    pub(crate) fn mesh(&self) -> Result<Mesh, Failure> {
        // The checkpoint tells its shape; a configuration is not complete without one, and devices do not depend on it.
        let stand_in = (!self.tells_a_model()).then(|| "model_name=tiny-e2b".to_owned());
        let words = self.words.iter().cloned().chain(stand_in);
        let config = Sources::from_args(words).with_process_environment().resolve().map_err(Failure::usage)?;
        Ok(config.mesh)
    }

    /// Opens a model and says what was found. `base` tells the architecture where nothing else does. Weights that are stored
    /// quantised are refused.
    pub(crate) fn open(&self, ui: &Ui, path: &Path, base: Option<&Model>) -> Result<Model, Failure> {
        self.open_any(ui, path, base, false)
    }

    /// The same for decoding, which can do with quantised weights.
    pub(crate) fn open_to_decode(&self, ui: &Ui, path: &Path) -> Result<Model, Failure> {
        self.open_any(ui, path, None, true)
    }

    fn open_any(&self, ui: &Ui, path: &Path, base: Option<&Model>, quantized: bool) -> Result<Model, Failure> {
        let checkpoint = Checkpoint::open(path)?;
        // A Hugging Face directory always tells its own.
        let hints = if checkpoint.convention() == Convention::Hf {
            Hints { quantized, ..Hints::default() }
        } else {
            let arch = if self.tells_a_model() { Some(init::arch_of(&self.words)?) } else { None };
            Hints { config: self.config.as_deref(), arch, base: base.map(Model::weights), ..Hints::default() }
        };
        let weights = Weights::find(checkpoint, &hints).map_err(|e| match e {
            EngineError::NoArchitecture { .. } => Failure::usage(e)
                .hint("give --config config.json of the model, or MaxText's keys, such as model_name=gemma4-e2b"),
            other => other.into(),
        })?;
        convert::say_found(ui, path, &weights);
        Ok(Model::new(weights))
    }
}

/// Whether nothing may be downloaded: a flag or the environment says so.
pub(crate) fn is_offline(flag: bool) -> bool {
    flag || std::env::var_os("LAPIDARY_OFFLINE").is_some_and(|v| v != "0" && !v.is_empty())
}
