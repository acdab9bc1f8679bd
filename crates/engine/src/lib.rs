//! Where model, checkpoint and device meet: placement, forward runs, verification.
//!
//! **Invariant:** this crate parses no arguments and prints nothing. Long work reports through callbacks.

pub mod aot;
pub mod compare;
pub mod convert;
pub mod data;
pub mod decode;
pub mod divergence;
pub mod error;
pub mod forward;
pub mod generate;
pub mod golden;
pub mod hosts;
pub mod init;
pub mod kernels;
pub mod known;
pub mod mesh;
pub mod metrics;
pub mod model;
pub mod peak;
pub mod planner;
pub mod quantized;
pub mod rng;
pub mod rows;
pub mod runtime;
pub mod score;
pub mod shards;
pub mod targets;
pub mod train;
pub mod train_state;
pub mod verify;

pub use error::{EngineError, Result};
pub use forward::{Batch, Session};
pub use model::Model;
pub use runtime::{Runtime, RuntimeOptions};
