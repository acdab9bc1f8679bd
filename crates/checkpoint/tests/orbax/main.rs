//! Orbax checkpoints end to end.

// Helpers outside of test functions unwrap too.
#![allow(clippy::unwrap_used)]

mod damage;
mod pattern;
mod round;
mod samples;
