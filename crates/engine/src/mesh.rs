//! From the keys of parallelism to parameters that lie on a mesh of devices.

use config::{Mesh, MeshShape};
use gemma4::partition::{Partition, Rules};
use gemma4::{Arch, Layout};

/// A key of parallelism that asks for what cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct MeshError {
    /// The key.
    pub key: &'static str,
    /// Why not, and what to do.
    pub reason: String,
}

/// The mesh and its rules.
///
/// # Errors
/// When a rule names an axis that is not one.
pub fn partition(keys: &Mesh, shape: &MeshShape) -> Result<Partition, MeshError> {
    let rules = if keys.only_rules { Rules::only(keys.rules.clone()) } else { Rules::replacing(&keys.rules) };
    Partition::new(&shape.sizes(), rules).map_err(|e| MeshError { key: "logical_axis_rules", reason: e.to_string() })
}

/// The layout on a mesh, if that has several devices.
///
/// # Errors
/// Names the parameter and axis that does not divide, or the largest parameter when too much would lie whole everywhere.
pub fn lay_out(layout: Layout, keys: &Mesh, partition: Partition, arch: &Arch) -> Result<Layout, MeshError> {
    let first = keys.ici.iter().zip(&keys.dcn).position(|(i, d)| *i > 1 || *d > 1);
    let key = first.map_or("ici_fsdp_parallelism", |i| {
        [
            "ici_data_parallelism",
            "ici_fsdp_parallelism",
            "ici_fsdp_transpose_parallelism",
            "ici_context_parallelism",
            "ici_tensor_parallelism",
            "ici_tensor_sequence_parallelism",
        ][i]
    });
    let (whole, largest) = partition.whole_share(arch).map_err(|e| MeshError { key, reason: e.to_string() })?;
    if whole > keys.sharding_tolerance {
        let reason = format!(
            "{:.1} % of the parameters would lie whole on every device, more than {:.1} %; the largest is {}; change \
             logical_axis_rules or raise this",
            whole * 100.0,
            keys.sharding_tolerance * 100.0,
            largest.unwrap_or_default()
        );
        return Err(MeshError { key: "sharding_tolerance", reason });
    }
    layout.partitioned(partition).map_err(|e| MeshError { key, reason: e.to_string() })
}
