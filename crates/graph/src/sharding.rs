//! Meshes of devices and how values are laid out over them.

use std::fmt;
use std::ops::Range;

use tensor::Shape;

/// Named axes of devices, outermost first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mesh {
    axes: Vec<(String, usize)>,
}

impl Mesh {
    /// Axes by name and size, outermost first.
    ///
    /// # Errors
    /// When a name is not a word or occurs twice, or a size is 0.
    pub fn new(axes: &[(&str, usize)]) -> Result<Self, String> {
        let mut out: Vec<(String, usize)> = Vec::with_capacity(axes.len());
        for &(name, size) in axes {
            if !is_identifier(name) {
                return Err(format!("mesh axis {name:?} must be a word of letters, digits and underscores"));
            }
            if size == 0 {
                return Err(format!("mesh axis {name:?} has size 0"));
            }
            if out.iter().any(|(n, _)| n == name) {
                return Err(format!("mesh axis {name:?} is named twice"));
            }
            out.push((name.to_owned(), size));
        }
        out.iter()
            .try_fold(1usize, |n, (_, s)| n.checked_mul(*s))
            .ok_or_else(|| "the mesh has too many devices".to_owned())?;
        Ok(Mesh { axes: out })
    }

    /// Names and sizes of the axes, outermost first.
    #[must_use]
    pub fn axes(&self) -> &[(String, usize)] {
        &self.axes
    }

    /// Number of devices.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.axes.iter().map(|(_, s)| s).product()
    }

    /// Where a device (a partition of the program) stands along every axis: devices are numbered with the last axis fastest.
    #[must_use]
    pub fn coordinates(&self, device: usize) -> Vec<usize> {
        let mut rest = device;
        let mut at: Vec<usize> = self
            .axes
            .iter()
            .rev()
            .map(|&(_, size)| {
                let here = rest % size;
                rest /= size;
                here
            })
            .collect();
        at.reverse();
        at
    }

    /// Size of the axis of this name.
    #[must_use]
    pub fn size(&self, axis: &str) -> Option<usize> {
        self.axes.iter().find(|(n, _)| n == axis).map(|(_, s)| *s)
    }
}

/// Mesh axes per dimension of a value; a dimension without axes is whole on every device.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Sharding {
    dims: Vec<Vec<String>>,
}

impl Sharding {
    /// Axis names for each dimension, for instance `Sharding::new(&[&["fsdp"], &[]])`.
    #[must_use]
    pub fn new(dims: &[&[&str]]) -> Self {
        Sharding { dims: dims.iter().map(|d| d.iter().map(|&a| a.to_owned()).collect()).collect() }
    }

    /// Axis names for each dimension, owned.
    #[must_use]
    pub fn from_axes(dims: Vec<Vec<String>>) -> Self {
        Sharding { dims }
    }

    /// The same on every device, for a value of this rank.
    #[must_use]
    pub fn replicated(rank: usize) -> Self {
        Sharding { dims: vec![Vec::new(); rank] }
    }

    /// Axis names for each dimension.
    #[must_use]
    pub fn dims(&self) -> &[Vec<String>] {
        &self.dims
    }

    /// The shape of one device's part.
    ///
    /// # Errors
    /// When the sharding does not fit the mesh or the shape.
    pub fn shard_shape(&self, mesh: &Mesh, shape: &Shape) -> Result<Shape, String> {
        if self.dims.len() != shape.rank() {
            return Err(format!("sharding {self} has {} dimensions, the value has {}", self.dims.len(), shape.rank()));
        }
        let mut seen: Vec<&str> = Vec::new();
        let mut out = Vec::with_capacity(shape.rank());
        for (d, axes) in self.dims.iter().enumerate() {
            let mut parts = 1usize;
            for a in axes {
                let size =
                    mesh.size(a).ok_or_else(|| format!("sharding {self} names axis {a:?}, which the mesh lacks"))?;
                if seen.contains(&a.as_str()) {
                    return Err(format!("sharding {self} uses axis {a:?} twice"));
                }
                seen.push(a);
                parts *= size;
            }
            if !shape[d].is_multiple_of(parts) {
                return Err(format!("dimension {d} of {shape} is not divisible into {parts} parts ({self})"));
            }
            out.push(shape[d] / parts);
        }
        Ok(Shape::from(out))
    }

    /// Which part of each dimension a device holds. The first axis of a dimension cuts it coarsest.
    ///
    /// # Errors
    /// When the sharding does not fit the mesh or the shape.
    pub fn shard_bounds(&self, mesh: &Mesh, shape: &Shape, device: usize) -> Result<Vec<Range<usize>>, String> {
        let part = self.shard_shape(mesh, shape)?;
        let at = mesh.coordinates(device);
        let along =
            |axis: &String| mesh.axes().iter().zip(&at).find(|((n, _), _)| n == axis).map(|((_, s), &i)| (*s, i));
        Ok(self
            .dims
            .iter()
            .zip(part.dims())
            .map(|(axes, &len)| {
                let index = axes.iter().filter_map(along).fold(0, |index, (size, i)| index * size + i);
                index * len..(index + 1) * len
            })
            .collect())
    }

    /// Whether every device holds the whole value.
    #[must_use]
    pub fn is_replicated(&self) -> bool {
        self.dims.iter().all(Vec::is_empty)
    }
}

/// Prints Shardy's notation: `[{"fsdp"}, {}]`.
impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, axes) in self.dims.iter().enumerate() {
            f.write_str(if i > 0 { ", {" } else { "{" })?;
            for (j, a) in axes.iter().enumerate() {
                write!(f, "{}\"{a}\"", if j > 0 { ", " } else { "" })?;
            }
            f.write_str("}")?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sharding({self})")
    }
}

/// Whether a name can stand in program text without quoting.
pub(crate) fn is_identifier(s: &str) -> bool {
    let mut chars = s.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_tile_the_value() {
        let mesh = Mesh::new(&[("data", 2), ("fsdp", 3), ("tensor", 2)]).unwrap();
        assert_eq!(mesh.coordinates(0), [0, 0, 0]);
        assert_eq!(mesh.coordinates(7), [1, 0, 1]);
        let shape = Shape::from([4, 12]);
        let s = Sharding::new(&[&["tensor"], &["fsdp", "data"]]);
        assert_eq!(s.shard_bounds(&mesh, &shape, 7).unwrap(), [2..4, 2..4]);
        let mut count = [0; 48];
        for device in 0..12 {
            let b = s.shard_bounds(&mesh, &shape, device).unwrap();
            for r in b[0].clone() {
                for c in b[1].clone() {
                    count[r * 12 + c] += 1;
                }
            }
        }
        assert!(count.iter().all(|&n| n == 1));
        assert_eq!(Sharding::replicated(2).shard_bounds(&mesh, &shape, 5).unwrap(), [0..4, 0..12]);
        assert!(Sharding::new(&[&["fsdp"], &[]]).shard_bounds(&mesh, &shape, 0).is_err());
    }
}
