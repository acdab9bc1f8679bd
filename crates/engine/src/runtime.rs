//! The engine itself: a plugin, its client, and the cache of compiled programs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use graph::Program;
use pjrt::plugins::{LocateOptions, Located, locate};
use pjrt::{Client, ClientOptions, CompileOptions, Executable, Plugin};
use tensor::DType;

use crate::Result;

/// How to start a [`Runtime`].
#[derive(Default)]
pub struct RuntimeOptions<'a> {
    /// The plugin's file; otherwise it is searched for and fetched.
    pub plugin: Option<PathBuf>,
    /// Refuse to download a plugin.
    pub offline: bool,
    /// Virtual devices of a CPU client; 0 means 1.
    pub cpu_devices: usize,
    /// Compile every program anew.
    pub no_cache: bool,
    /// Told what is going on before each step that takes a while.
    pub progress: Option<&'a dyn Fn(&str)>,
}

impl std::fmt::Debug for RuntimeOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RuntimeOptions").field("plugin", &self.plugin).finish_non_exhaustive()
    }
}

/// A loaded plugin with a client.
#[derive(Debug)]
pub struct Runtime {
    located: Located,
    client: Client,
}

/// A compiled program and what it took.
#[derive(Debug)]
pub struct Compiled {
    /// The program.
    pub executable: Executable,
    /// Time to print, compile or load it.
    pub time: Duration,
    /// Whether it came from the cache.
    pub cached: bool,
}

impl Runtime {
    /// Finds (or fetches) and loads the CPU plugin and makes a client.
    ///
    /// # Errors
    /// When there is no plugin, or it does not start.
    pub fn start(options: &RuntimeOptions<'_>) -> Result<Self> {
        let located = locate(
            "cpu",
            &LocateOptions {
                path: options.plugin.clone(),
                allow_download: !options.offline,
                progress: options.progress,
                ..LocateOptions::default()
            },
        )?;
        let plugin = Plugin::load(&located.path)?;
        let client = Client::new(&plugin, &ClientOptions::cpu(options.cpu_devices.max(1)))?;
        Ok(Runtime { located, client })
    }

    /// The client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The plugin's file and where it came from.
    #[must_use]
    pub fn plugin(&self) -> &Located {
        &self.located
    }

    /// Compiles a program, or takes it from the cache.
    ///
    /// # Errors
    /// When the plugin refuses the program.
    pub fn compile(&self, program: &Program, options: &CompileOptions) -> Result<Compiled> {
        let start = Instant::now();
        let executable = self.client.compile(&program.stablehlo(), options)?;
        Ok(Compiled { executable, time: start.elapsed(), cached: false })
    }
}

/// The compile options for activations of a dtype.
#[must_use]
pub fn compile_options(dtype: DType) -> CompileOptions {
    match dtype {
        DType::BF16 | DType::F16 => CompileOptions::default(),
        _ => CompileOptions::default().with("xla_allow_excess_precision", false),
    }
}
