//! Typed configuration: YAML layers, key=value overrides, provenance and validation.
//!
//! One table ([`keys`]) declares every key: name, type, range, default, meaning, and its relation to MaxText's key of
//! the same name. [`Sources`] (files, words, environment) are read and merged into a [`RawConfig`], which knows for
//! every key where its value came from; [`RawConfig::resolve`] checks it and gives a [`Config`] with nothing left to
//! default. All problems are reported at once, as an [`Error`].
//!
//! ```
//! let config = lapidary_config::Sources::from_args(["model_name=tiny-e2b", "steps=20"]).resolve()?;
//! assert_eq!(config.model.num_layers, 10);
//! assert_eq!(config.run.steps, 20);
//! assert_eq!(config.origin("steps"), Some(&lapidary_config::Origin::CommandLine));
//! # Ok::<(), lapidary_config::Error>(())
//! ```
//!
//! **Invariant:** this crate knows nothing of the rest of the project, prints nothing, and reads no environment
//! variable that it was not handed.

mod build;
mod check;
mod choice;
mod coerce;
mod error;
mod explain;
mod files;
pub mod keys;
mod layer;
mod load;
pub mod mesh;
mod reference;
mod resolved;
mod suggest;
mod value;
mod yaml;

pub use choice::{
    Attention, DatasetKind, DecayStyle, DecoderBlock, FloatType, GateActivation, Hardware, MatmulPrecision,
    OptimizerKind, PackingKind, Profiler, RematPolicy, SamplingStrategy, ScheduleKind, TableHome,
};
pub use error::{Error, Problem};
pub use explain::{Explanation, Filter, Setting, explain, render_explanation, render_settings};
pub use files::BUILTIN as BUILTIN_FILES;
pub use keys::{Category, Key, Kind, MaxText, RESERVED_VARIABLES, Support};
pub use layer::{ModelLayer, Note, Origin, RawConfig, Sources};
pub use mesh::MeshShape;
pub use reference::{base_yaml, reference_markdown};
pub use resolved::{
    Batch, Checkpoint, CompilationCache, Config, Data, Decode, Lora, Memory, Mesh, Model, Numerics, Optimizer, Output,
    Run, Schedule, Sft,
};
pub use value::{AxisRule, Literal, Value};
