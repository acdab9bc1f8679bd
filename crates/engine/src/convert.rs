//! Checkpoints in either format as one thing: opened, converted, compared, counted.
//!
//! | module | what it does |
//! |---|---|
//! | [`open`] | detects a checkpoint, finds its architecture, and every parameter in it under either convention |
//! | [`config`] | the configuration files beside the weights |
//! | [`quantize`] | a directory whose matrices are stored quantised |
//! | [`mod@plan`] | what becomes what, and what lies beside the weights |
//! | [`mod@diff`] | tensor by tensor across formats |
//! | [`mod@stats`] | moments and extremes of tensors |
//!
//! Both directions follow from [`gemma4::param_table`] alone; bytes are moved by [`checkpoint::copy`].

pub mod config;
pub mod diff;
pub mod open;
pub mod plan;
pub mod quantize;
pub mod stats;

pub use diff::{DiffReport, Difference, diff};
pub use open::{Checkpoint, Convention, Hints, Origin, Param, Weights};
pub use plan::{Plan, Profile, Report, Settings, plan};
pub use quantize::{QuantizeOptions, QuantizePlan, plan_quantized};
pub use stats::{Stats, stats};
