//! The Gemma 4 E2B/E4B text model: architecture, parameters, forward pass, FLOPs.
//!
//! **Invariant:** this crate knows no files and no devices. It turns a configuration into tables ([`Arch`],
//! [`params`]) and tables into programs.
//!
//! Shape letters, used as suffixes of value names everywhere in this crate:
//!
//! | letter | meaning | letter | meaning |
//! |---|---|---|---|
//! | b | batch | h | query heads |
//! | t, s | query, key positions | k | key/value heads |
//! | d | hidden size | g | query heads per key/value head (h = k * g) |
//! | f | MLP width | e | head size |
//! | l | layers | p | per-layer input width |
//! | v | vocabulary | w | window |

pub mod arch;
mod attention;
pub mod cached;
pub mod called;
pub mod decoder;
pub mod flops;
pub mod forward;
mod from_config;
pub mod hf;
pub mod layer;
pub mod layout;
pub mod loss;
pub mod memory;
mod nn;
pub mod params;
pub mod partition;

pub use arch::{Arch, ArchError, KvSource, Layer, LayerKind, PerLayerInput, Rope};
pub use flops::Flops;
pub use layout::Layout;
pub use params::param_table;
pub use partition::{Partition, PartitionError};
