//! Orbax checkpoints: the trees that MaxText writes and reads.
//!
//! [`OrbaxCheckpoint`] opens one in any of its forms, [`OrbaxWriter`] writes one. Below them lie two formats: [`ocdbt`], where
//! bytes are, and [`zarr`], what they mean; the tree and its metadata are JSON files beside the data.
//!
//! | read | written |
//! |---|---|
//! | OCDBT of any height, numbered manifests, stores of several processes not merged; plain files | OCDBT; plain files |
//! | zarr 3 and 2; bytes of both byte orders, zstd, crc32c, sharding, transpose | zarr 3 and 2; bytes, zstd, crc32c; transpose in links |
//! | any chunk grid | any chunk grid; 16 chunks along the first dimension by default, as MaxText does |
//! | trees of conversion, training, fine-tuning, bare parameters | as planned by the caller |
//!
//! A missing chunk, a wrong checksum or an impossible size is an error that names array and chunk; nothing is ever filled
//! with zeros instead.

mod checksums;
mod container;
mod error;
mod inspect;
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
pub use inspect::{Inspection, Tally};
pub use locate::{Located, is_orbax, locate};
pub use reader::{ArrayInfo, OrbaxCheckpoint, Problem, Scope, Skipped};
pub use region::Region;
pub use tree::{CHECKPOINT_METADATA, COMMIT, Key, METADATA, TreeKind, TreeLeaf, TreeMetadata};
pub use writer::{
    ArrayPlan, ChunkWriter, Layout, LinkedChunk, LinkedFile, OrbaxOptions, OrbaxPlan, OrbaxWriteError, OrbaxWriter,
    Source, Target, WriteReport, ZarrVersion, dotted,
};
