//! Training: plan, programs, optimizer, schedule, and the loop around them.
//!
//! [`plan::Plan`] turns a configuration into programs and tables and refuses what cannot be followed; [`device`] holds the
//! arrays and runs the programs; [`train`] is the loop.

pub mod device;
mod error;
pub mod optimizer;
pub mod plan;
pub mod schedule;
mod source;
mod start;
pub mod step;
mod table;
mod trainer;

pub use error::TrainError;
pub use trainer::{End, Event, TrainOptions, TrainReport, train};
