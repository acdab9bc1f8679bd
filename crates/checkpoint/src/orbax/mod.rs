//! Orbax checkpoints: the trees that MaxText writes and reads.

pub mod ocdbt;
