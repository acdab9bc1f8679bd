//! Several processes that train one model together: who they are, and how they find each other.
//!
//! [`identity`] tells which process this is from flags and environment. [`store`] is the key-value store through which
//! processes exchange what their devices need to connect.

pub mod identity;
pub mod peers;
pub mod store;

pub use identity::{HostFlags, HostsError, Identity, Origin};
pub use store::{Server, Store, StoreError};
