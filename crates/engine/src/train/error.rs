//! What can go wrong in training.

use std::path::PathBuf;

use crate::EngineError;
use crate::data::DataError;
use crate::mesh::MeshError;
use crate::metrics::MetricsError;
use crate::train_state::StateError;

/// A training run that could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A key asks for what cannot be done.
    #[error("{key}: {reason}")]
    Key {
        /// The key.
        key: &'static str,
        /// Why not, and what to do.
        reason: String,
    },
    /// Keys that do not fit each other.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The configured architecture.
    #[error(transparent)]
    Arch(#[from] gemma4::ArchError),
    /// The device, the programs or a checkpoint.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The training data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The run's checkpoints.
    #[error(transparent)]
    State(#[from] StateError),
    /// The model configured is not the one in a checkpoint.
    #[error("{path} is a checkpoint of another architecture: {reason}")]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// The first difference.
        reason: String,
    },
    /// The run has all its steps.
    #[error("the run has {done} steps and `steps` asks for {steps}: raise steps to go on, or name another run")]
    Finished {
        /// Steps in its last checkpoint.
        done: u64,
        /// Steps asked for.
        steps: u64,
    },
    /// The loss is no number.
    #[error("the loss of step {step} is {loss}; its batch is in {}", .batch.display())]
    BadLoss {
        /// The step.
        step: u64,
        /// The loss.
        loss: f64,
        /// Where the batch was written for a look.
        batch: PathBuf,
    },
    /// The data ended before the last step.
    #[error(
        "the training data ended after {done} of {steps} steps; raise num_epoch, lower steps, or set generate_padding_batch_train=true"
    )]
    OutOfData {
        /// Steps done.
        done: u64,
        /// Steps asked for.
        steps: u64,
    },
    /// Other processes of the run.
    #[error(transparent)]
    Peers(#[from] crate::hosts::peers::PeersError),
    /// Processes of a run that do not stand at the same step.
    #[error(
        "this process found {here} steps in the run's directory, others found another number: all of them need the same files"
    )]
    OtherStep {
        /// Steps in the last checkpoint.
        here: u64,
    },
    /// Processes that write a checkpoint together must see the same files.
    #[error(
        "{} is not the directory in which process 0 keeps its checkpoints; base_output_directory must lie on a file system that all processes share",
        .dir.display()
    )]
    OtherFiles {
        /// The directory of this process.
        dir: PathBuf,
    },
    /// Input or output.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

macro_rules! through_engine {
    ($($from:ty),+) => {$(
        impl From<$from> for TrainError {
            fn from(e: $from) -> Self {
                TrainError::Engine(e.into())
            }
        }
    )+};
}

impl From<MeshError> for TrainError {
    fn from(MeshError { key, reason }: MeshError) -> Self {
        TrainError::Key { key, reason }
    }
}

through_engine!(pjrt::PjrtError, graph::GraphError, tensor::HostError);
