//! Orbax checkpoints: the trees that MaxText writes and reads.

mod checksums;
mod container;
mod error;
mod leaf;
mod locate;
pub mod ocdbt;
mod reader;
mod region;
mod tree;
mod writer;
pub mod zarr;

pub use checksums::CHECKSUMS;
pub use error::OrbaxError;
pub use locate::{Located, is_orbax, locate};
pub use reader::{ArrayInfo, OrbaxCheckpoint, Problem, Scope, Skipped};
pub use region::Region;
pub use tree::{CHECKPOINT_METADATA, COMMIT, Key, METADATA, TreeKind, TreeLeaf, TreeMetadata};
pub use writer::{
    ArrayPlan, ChunkWriter, Layout, LinkedChunk, LinkedFile, OrbaxOptions, OrbaxPlan, OrbaxWriteError, OrbaxWriter,
    Source, Target, WriteReport, ZarrVersion, dotted,
};
