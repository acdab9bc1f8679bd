//! Where plugins come from: a table of pinned wheels, and the search for one on this machine.
//!
//! Nothing is loaded here; [`locate`] returns a file, and what is known about it.

mod fetch;
pub(crate) mod hash;
mod locate;
mod table;

pub use locate::{LocateError, LocateOptions, Located, Origin, PLUGIN_VARIABLE, cache_dir, locate, locate_tools};
pub use table::{PINNED, Pin, PinnedPlugin, PinnedTool, TOOLS, ToolFile, by_sha256, candidates, tools};
