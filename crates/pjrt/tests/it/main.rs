//! Tests against the real CPU plugin, which is fetched if it is not there: without it they fail, they do not skip.

#![allow(missing_docs, unsafe_code, clippy::unwrap_used, reason = "tests")]

mod basics;
mod cache;
mod common;
mod custom_calls;
mod devices;
mod fetching;
mod memory;
mod mistakes;
mod topology;
