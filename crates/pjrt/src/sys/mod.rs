//! The C declarations of the PJRT API and of XLA's foreign-function interface, as generated (see the head of
//! `bindings.rs`). Nothing here is safe to call on its own; [`crate::api`] is the way in.

#[allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    reason = "generated"
)]
#[rustfmt::skip]
mod bindings;

pub(crate) use bindings::*;
