//! The engine itself: a plugin, its client, and the cache of compiled programs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use graph::Program;
use pjrt::plugins::{LocateOptions, Located, locate};
use pjrt::{Client, ClientOptions, CompileOptions, Executable, ExecutableCache, Lookup, NamedValue, Plugin};
use tensor::DType;

use crate::hosts::Control;
use crate::hosts::peers::Peers as _;
use crate::{EngineError, Result};

const CPU: &str = "cpu";

const ALONE: &str = "CPUs of several processes form no mesh: their plugin has no collectives between processes. Start the \
                     processes with mpirun, with a build that has the feature `mpi`";

/// Who this process is, as GPU plugins want to know it; TPUs find each other by themselves.
fn shared_options(platform: &str, control: &Control) -> ClientOptions {
    let number = |n: usize| NamedValue::Int64(i64::try_from(n).unwrap_or(i64::MAX));
    match platform.starts_with("tpu") {
        true => ClientOptions::default(),
        false => {
            ClientOptions::default().with("node_id", number(control.rank())).with("num_nodes", number(control.count()))
        }
    }
}

/// How to start a [`Runtime`].
#[derive(Default)]
pub struct RuntimeOptions<'a> {
    /// Kind of device: `cpu` (also where it is empty), `cuda`, `rocm`, `tpu`, or a plugin's own name such as `cuda13`.
    pub platform: &'a str,
    /// The plugin's file; otherwise it is searched for and fetched.
    pub plugin: Option<PathBuf>,
    /// Refuse to download a plugin.
    pub offline: bool,
    /// Virtual devices of a CPU client; 0 means 1.
    pub cpu_devices: usize,
    /// Compile every program anew.
    pub no_cache: bool,
    /// Other processes whose devices form one mesh with this one's.
    pub processes: Option<&'a Control>,
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
    compiler: Compiler,
}

/// What compiles programs. Cloning it is cheap and gives the same one, for another thread.
#[derive(Debug, Clone)]
pub struct Compiler {
    client: Client,
    cache: Option<Arc<ExecutableCache>>,
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
    /// Finds (or fetches) and loads the platform's plugin and makes a client.
    ///
    /// # Errors
    /// When there is no plugin, or it does not start.
    pub fn start(options: &RuntimeOptions<'_>) -> Result<Self> {
        let platform = if options.platform.is_empty() { CPU } else { options.platform };
        let located = locate(
            platform,
            &LocateOptions {
                path: options.plugin.clone(),
                allow_download: !options.offline,
                progress: options.progress,
                ..LocateOptions::default()
            },
        )?;
        let plugin = Plugin::load(&located.path)?;
        let client = match options.processes {
            Some(_) if platform == CPU => return Err(EngineError::Input(ALONE.into())),
            Some(control) => Client::with_store(&plugin, &shared_options(platform, control), control.store())?,
            // Plugins refuse options that they do not know; other platforms count the devices there are.
            None if platform == CPU => Client::new(&plugin, &ClientOptions::cpu(options.cpu_devices.max(1)))?,
            None => Client::new(&plugin, &ClientOptions::default())?,
        };
        let cache = match options.no_cache {
            true => None,
            // A cache that cannot be made costs time, not correctness.
            false => executable_cache_dir().and_then(|dir| ExecutableCache::new(dir).ok()).map(Arc::new),
        };
        Ok(Runtime { located, compiler: Compiler { client, cache } })
    }

    /// The client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.compiler.client
    }

    /// What compiles its programs.
    #[must_use]
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
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
        self.compiler.compile(program, options)
    }
}

impl Compiler {
    /// Compiles a program, or takes it from the cache.
    ///
    /// # Errors
    /// When the plugin refuses the program.
    pub fn compile(&self, program: &Program, options: &CompileOptions) -> Result<Compiled> {
        let start = Instant::now();
        let (executable, outcome) = self.client.compile_cached(&program.stablehlo(), options, self.cache.as_deref())?;
        Ok(Compiled { executable, time: start.elapsed(), cached: outcome.lookup == Lookup::Hit })
    }
}

/// Where compiled programs are kept, if there is a cache directory at all.
#[must_use]
pub fn executable_cache_dir() -> Option<PathBuf> {
    pjrt::plugins::cache_dir().ok().map(|dir| dir.join("executables"))
}

/// The compile options for activations of a dtype.
#[must_use]
pub fn compile_options(dtype: DType) -> CompileOptions {
    match dtype {
        // The default library takes products with [out, in] weights at full rate. oneDNN, which training needs, threw an
        // exception through the C API on this program (plugin 0.11.2), which ends the process.
        DType::BF16 | DType::F16 => CompileOptions::default(),
        // Small models only: compiling takes longer than running, so the code need not be fast.
        DType::F64 => CompileOptions::verify_f32().with("xla_backend_optimization_level", 0i64),
        _ => CompileOptions::verify_f32(),
    }
}
