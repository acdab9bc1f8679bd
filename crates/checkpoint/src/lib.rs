//! Model checkpoints on disk: safetensors and Hugging Face directories, Orbax.
//!
//! | module | what it does |
//! |---|---|
//! | [`mmap`] | files mapped read-only, and cheap ranges of them that keep the map alive |
//! | [`safetensors`] | one file: a strict header reader |
//! | [`hf`] | a directory: one file or shards with an index, and its configuration |
//! | [`binding`] | the tensors a model expects, found under whatever prefix the directory uses |
//! | [`write`](mod@write) | a directory written tensor by tensor in bounded memory |
//! | [`commit`] | output that appears complete or not at all |
//! | [`manifest`] | checksums of every file of a directory |
//! | [`orbax`] | the trees that MaxText reads and writes |
//! | [`copy`] | one streaming engine between all of these |
//!
//! **Invariant:** this crate knows bytes on disk. It knows no model: names, prefixes and the rules for tensors that may
//! be left over come in as data. It depends on `tensor` alone.

pub mod binding;
pub mod commit;
pub mod copy;
pub mod hf;
pub mod manifest;
pub mod mmap;
pub mod orbax;
pub mod safetensors;
pub mod write;
