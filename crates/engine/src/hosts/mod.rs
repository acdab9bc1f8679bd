//! Several processes that train one model together: who they are, and how they find each other.
//!
//! [`identity`] tells which process this is from flags and environment. [`store`] is the key-value store through which
//! processes exchange what their devices need to connect. [`peers`] are processes as training sees them: such that sum
//! gradients on the host (MPI), or such whose devices form one mesh ([`control`]).

pub mod control;
pub mod identity;
pub mod peers;
pub mod store;

pub use control::Control;
pub use identity::{HostFlags, HostsError, Identity, Origin};
pub use store::{Server, Store, StoreError};
