//! Training: programs, optimizer, schedule.

pub mod optimizer;
pub mod step;
