//! OpenXLA through the PJRT C API: plugins, clients, buffers, executables.
//!
//! A *plugin* is a shared library for one platform (CPU, CUDA, TPU, ...), found and fetched by [`plugins`] and loaded
//! by [`Plugin::load`]. A [`Client`] has its devices; a [`Buffer`] is an array on one of them; an [`Executable`] is a
//! StableHLO program compiled for some of them.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use lapidary_pjrt::{Client, ClientOptions, CompileOptions, Plugin, plugins::LocateOptions};
//! let plugin = Plugin::load(Plugin::locate("cpu", &LocateOptions::default())?)?;
//! let client = Client::new(&plugin, &ClientOptions::cpu(1))?;
//! let program = "func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
//!     %y = stablehlo.add %x, %x : tensor<2xf32>
//!     return %y : tensor<2xf32>
//! }";
//! let double = client.compile(program, &CompileOptions::default())?;
//! let x = client.buffer_from_host(&tensor::HostArray::from_slice([2], &[1.0f32, 2.0])?, 0)?;
//! assert_eq!(double.execute(&[&x])?[0].to_host()?.as_slice::<f32>()?, &[2.0, 4.0]);
//! # Ok(()) }
//! ```
//!
//! **Invariants.** It knows neither graphs nor models. Everything the caller
//! can get wrong is checked before the plugin is called, because a plugin may end the process instead of returning an
//! error. Everything is `Send + Sync`: the C API is thread-safe. Plugins stay loaded for the life of the process.

#![allow(unsafe_code)]
#![warn(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod allocator;
mod api;
mod buffer;
mod cache;
mod client;
mod compiled;
mod dtype;
mod error;
mod executable;
pub mod ffi;
mod hlo;
mod hlo_stats;
mod key_value;
mod options;
mod plugin;
pub mod plugins;
mod proto;
mod signature;
mod sys;
mod topology;

#[doc(hidden)]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub use allocator::large as allocator_entry;
pub use allocator::{quiet_plugins, set_environment, trim_allocator, tune_allocator};
pub use buffer::{Buffer, Owner, Placement, ZERO_COPY_ALIGNMENT};
pub use cache::{CacheOutcome, CacheStats, ExecutableCache, Lookup};
pub use client::{Client, ClientOptions, Device, DeviceMemory, MeshDevice, TransferStats};
pub use compiled::MemoryFigures;
pub use error::{Code, PjrtError, Result};
pub use executable::{Executable, ExecuteOptions};
pub use hlo_stats::{CollectiveKind, CollectiveTotal, HloStats};
pub use key_value::{KeyValueError, KeyValueStore};
pub use options::{CompileOptions, OptionValue};
pub use plugin::{NamedValue, Plugin};
pub use signature::{ArrayType, ProgramSignature};
pub use topology::{AheadOfTime, Topology, TopologyDevice};
