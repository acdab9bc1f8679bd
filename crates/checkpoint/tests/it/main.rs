//! Integration tests of the checkpoint crate, one binary.

// All of this binary is test code, its helper functions too.
#![allow(clippy::unwrap_used)]

mod golden;
mod spellings;
