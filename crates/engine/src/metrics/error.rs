//! What can go wrong with metrics.

use std::io;
use std::path::PathBuf;

/// A result of this module.
pub type Result<T, E = MetricsError> = std::result::Result<T, E>;

/// Why metrics could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file system refused; the source names the path.
    #[error("metrics: {0}")]
    Io(#[from] io::Error),
    /// A file to be continued holds something else.
    #[error("{path} is not a file of metrics (its first line is no JSON object with a `step`); name another `{key}`")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The configuration key that names it.
        key: &'static str,
    },
    /// A path given for reading holds no metrics.
    #[error(
        "{path}: no metrics found; expected a run directory with metrics/metrics.jsonl, a JSON lines file, or a log with lines `completed step: ...`"
    )]
    NoMetrics {
        /// The path.
        path: PathBuf,
    },
    /// A metric that JSON cannot hold.
    #[error("metrics as JSON: {0}")]
    Json(#[from] serde_json::Error),
}
