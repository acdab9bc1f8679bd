//! OCDBT: a key-value store as a B+tree of immutable nodes whose values are ranges of data files.
//!
//! [`Manifest`] and [`Node`] are the two kinds of blocks; [`Store`] is a whole tree flattened into memory, which even for
//! checkpoints of many hosts is some megabytes. Values stay where they are.

mod bytes;
mod envelope;
mod files;
mod manifest;
mod node;
mod store;

pub use bytes::FormatError;
pub use files::DataFile;
pub use manifest::{Config, Location, Manifest, Version};
pub use node::{Budget, Child, MAX_ENTRIES, MAX_KEY, Node, Value};
pub use store::{Entry, Kept, Store, StoreError};
