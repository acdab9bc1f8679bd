//! What a run says about itself: a line per step, JSON lines, TensorBoard files, and reading them back.
//!
//! Tags, keys and the beginning of the line are MaxText's, so that what reads its output reads this. The two forms on
//! disk serve different readers: `metrics.jsonl` is complete and easy to load, event files are what TensorBoard shows.
//!
//! **Invariant:** after a resume, a reader of either finds every step once. The writer drops what an interrupted run
//! had logged beyond the checkpoint that the new one starts from.

pub mod config;
mod error;
mod event;
pub mod history;
mod jsonl;
mod log;
pub mod memory;
mod record;
mod step;
pub mod summary;
mod writer;

pub use error::{MetricsError, Result};
pub use step::{EvalMetrics, Scalar, StepMetrics};
pub use writer::{MetricsOptions, MetricsWriter, metrics_path};
