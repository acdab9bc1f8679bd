//! Tests against the real CPU plugin, which is fetched if it is not there: without it they fail, they do not skip.

#![allow(missing_docs)]

mod basics;
mod common;
