//! Meshes of devices and how values are laid out over them.

use std::fmt;

use tensor::Shape;

/// Named axes of devices, outermost first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mesh {
    axes: Vec<(String, usize)>,
}

impl Mesh {
    pub(crate) fn new(axes: &[(&str, usize)]) -> Result<Self, String> {
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
